"""`psft quickstart`: the quickstart recipe, with a table of before and after and a report at the end."""

from __future__ import annotations

import logging
from typing import Any

from psft.cli.main import COMMANDS

HELP = "train the bundled small model on this machine and show before and after"
NUM_PROBLEMS = 32
MAX_NEW_TOKENS = 200  # the longest worked solutions of the task have about 150


def run(argv: list[str]) -> int:
    """`psft quickstart [--flag value]...`: takes any setting of `psft train`."""
    from psft.cli.train import named_sources, prepare_run, read_request
    from psft.data.demonstrations import read_demonstrations
    from psft.evaluation.greedy import GreedyAnswers, greedy_answers
    from psft.reports.write import write_report

    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    request = read_request(["quickstart", *argv], command="quickstart")
    prepared = prepare_run(request)
    trainer = prepared.trainer
    tokenizer: Any = trainer.processing_class
    held_out = next(
        (s for s in named_sources(request.data.eval_dataset or []).values() if s.startswith("reasoning-gym:")), None
    )
    problems = [row.value["messages"] for row in read_demonstrations(held_out)][:NUM_PROBLEMS] if held_out else []

    def measure(when: str) -> GreedyAnswers | None:
        if not problems:
            return None
        answers = greedy_answers(
            trainer.model,
            tokenizer,
            problems,
            max_new_tokens=MAX_NEW_TOKENS,
            description=f"answers {when}",
        )
        for metric, share in (("greedy_accuracy", answers.accuracy), ("answer_form", answers.form_share)):
            trainer.recorder.measured("heldout", metric, share, answers.stderr(share), answers.num_problems, k=1)
        return answers

    measure("before")
    prepared.train()
    measure("after")
    summary = trainer.recorder.write_summary()
    print(_table(summary, len(problems)))
    folder = trainer.recorder.folder.path
    print(f"\nTrained {summary['steps']} steps in {summary['wall_time_s']:.0f} s. Everything is in {folder}")
    if trainer.is_world_process_zero():
        report = write_report([folder], folder / "report", commands=COMMANDS)
        print(f"What the run did, as a page: {report.page}")
    return 0


def _table(summary: dict[str, Any], num_problems: int) -> str:
    first, last = summary["first"], summary["last"]
    rows = [
        ("held-out NLL (nats/token)", "heldout_nll", "{:.3f}"),
        ("held-out entropy (nats/token)", "heldout_entropy", "{:.3f}"),
        ("clip fraction (first, last step)", "clip_fraction", "{:.2%}"),
        ("answers in the taught form (#### NUMBER)", "heldout_answer_form", "{:.1%}"),
        (f"greedy accuracy ({num_problems} held-out problems)", "heldout_greedy_accuracy", "{:.1%}"),
    ]
    lines = [f"\n{'':44}{'before':>9}{'after':>9}"]
    lines += [
        f"{label:44}{form.format(first[key]):>9}{form.format(last[key]):>9}" for label, key, form in rows if key in last
    ]
    return "\n".join(lines)
