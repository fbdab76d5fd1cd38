"""`psft eval`: benchmarks sampled k times, graded, scored with errors. Loads torch only for a model on this machine."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from psft.errors import RequestError

if TYPE_CHECKING:
    from psft.evaluation.session import Outcome

HELP = "evaluate a model on benchmarks: avg@k, pass@k, maj@k with errors; resumable"
_USAGE = (
    "usage: psft eval MODEL --suite NAME|FILE... [--option value]...",
    "",
    "Samples k answers to each item, grades them, and writes scores with errors. What is done is kept in",
    "OUTPUT/samples.jsonl; the same command goes on after Ctrl-C or a kill. docs/evaluation.md explains the numbers.",
    "alignment-tax (or alignment-tax/mmlu, harness:TASK; @N for N items) runs tasks of lm-evaluation-harness instead.",
    "",
    "MODEL: a hub id, a folder, RUN or RUN/checkpoint-N of psft train, smollm2-135m-instruct; with --backend openai",
    "the server's name for it.",
    "",
)


def run(argv: list[str]) -> int:
    """`psft eval MODEL --suite NAME`. Returns the exit code."""
    from psft.cli.arguments import format_help, parse_request
    from psft.evaluation.harness.settings import HarnessSettings
    from psft.evaluation.settings import HowToSample, WhatToEvaluate

    sections = [WhatToEvaluate, HowToSample, HarnessSettings]
    if not argv or "-h" in argv or "--help" in argv:
        print(format_help("eval", sections, usage=_USAGE))
        return 0
    if argv[0].startswith("-"):
        raise RequestError("the model comes first: psft eval MODEL --suite math.")
    given = parse_request(argv[1:], sections, command="eval")
    what, how = WhatToEvaluate(**given[WhatToEvaluate]), HowToSample(**given[HowToSample])
    if not what.suite:
        raise RequestError(
            "--suite is missing. Give math, ood, smoke, alignment-tax, a benchmark such as aime24, or a YAML file."
        )

    from psft.evaluation.chosen import choose
    from psft.evaluation.harness.registry import choose_tasks, split_names
    from psft.evaluation.harness.scores import table as harness_table
    from psft.evaluation.harness.session import evaluate_harness, load_tasks
    from psft.evaluation.results import table
    from psft.evaluation.session import evaluate

    sampled, through_lm_eval = split_names(what.suite)
    suite, tasks = choose(sampled), choose_tasks(through_lm_eval, what.limit)
    settings = HarnessSettings(**given[HarnessSettings])
    if not tasks and given[HarnessSettings]:
        names = " and ".join(f"--{name}" for name in given[HarnessSettings])
        raise RequestError(f"{names} has no effect without alignment-tax or harness:TASK in --suite. Leave it out.")
    with_data = load_tasks(tasks, what, how, settings) if tasks else []
    outcomes = []
    if suite.benchmarks:
        outcomes.append(evaluate(argv[0], suite, what, how))
        _show(outcomes[-1], table)
    if tasks:
        outcomes.append(evaluate_harness(argv[0], "+".join(through_lm_eval), with_data, what, how, settings))
        _show(outcomes[-1], harness_table)
    for outcome in outcomes:
        outcome.raise_if_incomplete()
    return 0


def _show(outcome: Outcome, table: Callable[[Sequence[Mapping[str, Any]]], str]) -> None:
    from psft.evaluation.results import remarks

    found = outcome.results["benchmarks"]
    print(table(found))
    for line in [*remarks(found), *(f"{note}." for note in outcome.results["backend"]["notes"])]:
        print(f"- {line}")
    print(outcome.results_path)
