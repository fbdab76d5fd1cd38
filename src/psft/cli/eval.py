"""`psft eval`: benchmarks sampled k times, graded, scored with errors. Loads torch only for a model on this machine."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from psft.errors import RequestError

if TYPE_CHECKING:
    from psft.evaluation.benchmarks import Suite
    from psft.evaluation.harness.registry import HarnessTask
    from psft.evaluation.harness.settings import HarnessSettings
    from psft.evaluation.readiness.settings import ReadinessSettings
    from psft.evaluation.session import Outcome
    from psft.evaluation.settings import HowToSample, WhatToEvaluate

HELP = "evaluate a model on benchmarks: avg@k, pass@k, maj@k with errors; resumable"
_USAGE = (
    "usage: psft eval MODEL --suite NAME|FILE... [--option value]...",
    "       psft eval MODEL... --suite rl-readiness [PROMPTS]... [--base MODEL] [--option value]...",
    "",
    "Samples k answers to each item, grades them, and writes scores with errors. What is done is kept in",
    "OUTPUT/samples.jsonl; the same command goes on after Ctrl-C or a kill. docs/evaluation.md explains the numbers.",
    "alignment-tax (or alignment-tax/mmlu, harness:TASK; @N for N items) runs tasks of lm-evaluation-harness instead.",
    "",
    "rl-readiness says which of several models to start reinforcement learning from, and why: pass@k against avg@k,",
    "groups of mixed outcome, entropy, drift, readable answers. PROMPTS: benchmarks, suite files, rows with a question",
    "and an answer (FILE.jsonl, ...), reasoning-gym:TASK; none: prompts that come with psft.",
    "",
    "MODEL: a hub id, a folder, RUN or RUN/checkpoint-N of psft train, smollm2-135m-instruct; with --backend openai",
    "the server's name for it.",
    "",
)


@dataclass(frozen=True)
class EvalRequest:
    """What a person asked for. models: one; several for rl-readiness alone. suite: sampled benchmarks; tasks: those of
    lm-eval, asked for as tasks_name. readiness: None unless rl-readiness is asked for."""

    models: tuple[str, ...]
    what: WhatToEvaluate
    how: HowToSample
    suite: Suite
    harness: HarnessSettings
    tasks: tuple[HarnessTask, ...] = ()
    tasks_name: str = ""
    readiness: ReadinessSettings | None = None


def read_request(argv: Sequence[str]) -> EvalRequest:
    """Read MODEL... and flags. Loads no model and no data.

    Raises:
        RequestError: no model, no suite, an unknown one, unknown settings, or one without effect.
    """
    from psft.cli.arguments import parse_request
    from psft.evaluation.chosen import choose
    from psft.evaluation.harness.registry import choose_tasks, split_names
    from psft.evaluation.harness.settings import HarnessSettings
    from psft.evaluation.readiness.prompts import as_rollouts, readiness_suite
    from psft.evaluation.readiness.settings import READINESS, ReadinessSettings
    from psft.evaluation.settings import HowToSample, WhatToEvaluate

    num_models = next((i for i, word in enumerate(argv) if word.startswith("-")), len(argv))
    models = tuple(argv[:num_models])
    if not models:
        raise RequestError("the model comes first: psft eval MODEL --suite math.")
    sections = [WhatToEvaluate, HowToSample, HarnessSettings, ReadinessSettings]
    given = parse_request(argv[num_models:], sections, command="eval")
    what, how = WhatToEvaluate(**given[WhatToEvaluate]), HowToSample(**given[HowToSample])
    harness, readiness = HarnessSettings(**given[HarnessSettings]), ReadinessSettings(**given[ReadinessSettings])
    if not what.suite:
        raise RequestError(
            "--suite is missing. Give math, ood, smoke, alignment-tax, rl-readiness, a benchmark such as aime24, or a "
            "YAML file."
        )
    if READINESS in what.suite:
        _refuse(given[HarnessSettings], "alignment-tax or harness:TASK in --suite, without rl-readiness")
        suite = readiness_suite(what.suite)
        return EvalRequest(models, *as_rollouts(what, how, readiness.group_size), suite, harness, readiness=readiness)
    if len(models) > 1:
        raise RequestError(
            f"{len(models)} models are named ({', '.join(models[:4])}). --suite rl-readiness compares several; any "
            "other suite takes one."
        )
    _refuse(given[ReadinessSettings], "rl-readiness in --suite")
    sampled, through_lm_eval = split_names(what.suite)
    suite, tasks = choose(sampled), choose_tasks(through_lm_eval, what.limit)
    if not tasks:
        _refuse(given[HarnessSettings], "alignment-tax or harness:TASK in --suite")
    return EvalRequest(models, what, how, suite, harness, tasks, "+".join(through_lm_eval))


def _refuse(given: Mapping[str, Any], needed: str) -> None:
    if given:
        names = " and ".join(f"--{name}" for name in given)
        raise RequestError(f"{names} has no effect without {needed}. Leave it out.")


def run(argv: list[str]) -> int:
    """`psft eval MODEL... --suite NAME`. Returns the exit code."""
    if not argv or "-h" in argv or "--help" in argv:
        from psft.cli.arguments import format_help
        from psft.evaluation.harness.settings import HarnessSettings
        from psft.evaluation.readiness.settings import ReadinessSettings
        from psft.evaluation.settings import HowToSample, WhatToEvaluate

        sections = [WhatToEvaluate, HowToSample, HarnessSettings, ReadinessSettings]
        print(format_help("eval", sections, usage=_USAGE))
        return 0
    request = read_request(argv)
    return _run_benchmarks(request) if request.readiness is None else _run_readiness(request, request.readiness)


def _run_readiness(request: EvalRequest, settings: ReadinessSettings) -> int:
    from psft.evaluation.readiness.session import evaluate_readiness
    from psft.evaluation.results import remarks

    found = evaluate_readiness(request.models, request.suite, request.what, request.how, settings)
    print(found.table)
    for name, outcome in zip(request.models, found.outcomes, strict=True):
        for line in remarks(outcome.results["benchmarks"]):
            print(f"- {name}: {line}")
    print()
    for line in found.verdict.lines:
        print(line)
    print()
    for outcome in found.outcomes:
        print(outcome.results_path)
    if found.path is not None:
        print(found.path)
    for outcome in found.outcomes:
        outcome.raise_if_incomplete()
    return 0


def _run_benchmarks(request: EvalRequest) -> int:
    from psft.evaluation.harness.scores import table as harness_table
    from psft.evaluation.harness.session import evaluate_harness, load_tasks
    from psft.evaluation.results import table
    from psft.evaluation.session import evaluate

    model, what, how, harness, tasks = request.models[0], request.what, request.how, request.harness, request.tasks
    with_data = load_tasks(tasks, what, how, harness) if tasks else []
    outcomes = []
    if request.suite.benchmarks:
        outcomes.append(evaluate(model, request.suite, what, how))
        _show(outcomes[-1], table)
    if tasks:
        outcomes.append(evaluate_harness(model, request.tasks_name, with_data, what, how, harness))
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
