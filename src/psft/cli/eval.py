"""`psft eval`: benchmarks sampled k times, graded, scored with errors. Loads torch only for a model on this machine."""

from __future__ import annotations

from pathlib import Path

from psft.errors import RequestError

HELP = "evaluate a model on benchmarks: avg@k, pass@k, maj@k with errors; resumable"
_USAGE = (
    "usage: psft eval MODEL --suite NAME|FILE... [--option value]...",
    "",
    "Samples k answers to each item, grades them, and writes scores with errors. What is done is kept in",
    "OUTPUT/samples.jsonl; the same command goes on after Ctrl-C or a kill. docs/evaluation.md explains the numbers.",
    "",
    "MODEL: a hub id, a folder, RUN or RUN/checkpoint-N of psft train, smollm2-135m-instruct; with --backend openai",
    "the server's name for it.",
    "",
)


def run(argv: list[str]) -> int:
    """`psft eval MODEL --suite NAME`. Returns the exit code."""
    from psft.cli.arguments import format_help, parse_request
    from psft.evaluation.settings import HowToSample, WhatToEvaluate

    sections = [WhatToEvaluate, HowToSample]
    if not argv or "-h" in argv or "--help" in argv:
        print(format_help("eval", sections, usage=_USAGE))
        return 0
    if argv[0].startswith("-"):
        raise RequestError("the model comes first: psft eval MODEL --suite math.")
    given = parse_request(argv[1:], sections, command="eval")
    what, how = WhatToEvaluate(**given[WhatToEvaluate]), HowToSample(**given[HowToSample])
    if not what.suite:
        raise RequestError("--suite is missing. Give math, ood, smoke, a benchmark such as aime24, or a YAML file.")

    from psft.evaluation.benchmarks import choose, read_suite
    from psft.evaluation.results import remarks, table
    from psft.evaluation.session import evaluate

    own = {name: read_suite(Path(name).expanduser()) for name in what.suite if name.endswith((".yaml", ".yml"))}
    outcome = evaluate(argv[0], choose(what.suite, own), what, how)
    found = outcome.results["benchmarks"]
    print(table(found))
    for line in [*remarks(found), *(f"{note}." for note in outcome.results["backend"]["notes"])]:
        print(f"- {line}")
    print(outcome.results_path)
    outcome.raise_if_incomplete()
    return 0
