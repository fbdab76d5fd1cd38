"""One evaluation from request to results: data, then samples, then grades, then scores.

    OUTPUT/samples.jsonl          every sample ever made, one line each (`SampleRow`)
           grades.jsonl           what graders said of them (`GradeRow`); may be deleted, is made again
           MODEL.SUITE.json       the results

Each step takes up what is there: samples that exist are not made again, grades neither. Whatever stops it (Ctrl-C, a
kill, a full disk), the same command goes on.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from psft.errors import RequestError, RunFailed
from psft.evaluation import results
from psft.evaluation.benchmarks import Suite
from psft.evaluation.chosen import adjusted, contradictions
from psft.evaluation.contamination import Overlap, find_overlap
from psft.evaluation.generate import Generated, Plan, make_plan
from psft.evaluation.graded import generate_graded, graded_items
from psft.evaluation.grading import Grades, grader_of, prepare_graders
from psft.evaluation.identity import Model
from psft.evaluation.items import Data
from psft.evaluation.local_data import data_folder, load_all
from psft.evaluation.request import (
    Say,
    check_replaced,
    check_settings,
    default_output,
    find_model,
    make_backend,
    other_results,
    say_on_stderr,
)
from psft.evaluation.results import ItemScores
from psft.evaluation.results_file import results_path, write_results
from psft.evaluation.samples import GRADES, SAMPLES, KeyedFile
from psft.evaluation.settings import HowToSample, WhatToEvaluate
from psft.runs import EvalRow, RunFolder


@dataclass(frozen=True)
class Outcome:
    """results: what the results file holds. problem: what kept it from being whole, in words; None = it is."""

    results: dict[str, Any]
    results_path: Path
    problem: str | None

    def raise_if_incomplete(self) -> None:
        """Raises RunFailed if a sample is missing."""
        if self.problem is not None:
            raise RunFailed(self.problem)


Answered = Callable[[Plan, Mapping[str, ItemScores]], None]
"""Told of a benchmark whose samples are made and graded: what was asked, and the scores by item."""


def evaluate(
    model_name: str,
    suite: Suite,
    what: WhatToEvaluate,
    how: HowToSample,
    *,
    say: Say | None = None,
    answered: Answered | None = None,
) -> Outcome:
    """Evaluate a model on a suite.

    Args:
        model_name: hub id, folder, run folder or checkpoint; the server's name for it with backend openai.
        say: told lines a person should read; default: stderr. answered: told of every benchmark when it is done.
    Raises:
        RequestError: something about the request is wrong; nothing was generated.
        RunFailed: the backend cannot go on; what came so far is kept.
    """
    say = say or say_on_stderr
    suite = asked(suite, what, how)
    check_settings(what, how)
    data = load_all(
        suite, data_folder(what.data_dir, setting="--data_dir "), download=what.download, any_rows=what.any_rows,
        skip_missing=what.skip_missing, say=say,
    )  # fmt: skip
    prepare_graders(data)
    other = other_results(what)
    model = find_model(model_name, how)
    step = what.step if what.step is not None else model.step
    overlap = _overlap(data, what, say)
    backend = make_backend(model, how)
    output = Path(what.output_dir).expanduser() if what.output_dir else default_output(model)
    path = results_path(output, model.name, suite.name)
    check_replaced(path, model, say)
    started = time.monotonic()
    found: list[dict[str, Any]] = []
    made: dict[str, Generated] = {}
    with contextlib.ExitStack() as files:
        samples = files.enter_context(KeyedFile(output / SAMPLES))
        if what.regrade:  # only now: nobody else has the file of samples, so nobody has this one
            (output / GRADES).unlink(missing_ok=True)
        grade_file = files.enter_context(KeyedFile(output / GRADES))
        try:
            for part in data:
                plan = make_plan(part, model=model.identity, numerics=backend.numerics, seed=how.seed)
                grades = Grades(part, grade_file)
                if not what.regrade:
                    made[part.benchmark.name] = generate_graded(
                        plan, backend, samples, grades, title=part.benchmark.shown_name
                    )
                items = graded_items(plan, samples, grades)
                if answered is not None:
                    answered(plan, items)
                hits = None if overlap is None else overlap.hits[part.benchmark.name]
                found.append(results.describe(part, items, grader=grader_of(part), hits=hits))
        except KeyboardInterrupt:
            say(f"stopped; {len(samples):,} samples are kept in {samples.path}. The same command goes on from here.")
            raise
        finally:
            backend.close()
    if other is not None:
        compare_with(found, other)
    content = write_results(
        path,
        model={
            "name": model.name, "asked_as": model_name, "identity": model.identity, "step": step,
            "chat_template_sha256": model.chat_template_sha256,
        },
        suite=suite.name,
        seed=how.seed,
        backend=backend.describe(),
        benchmarks=found,
        started=started,
        samples_made=sum(part.num_made for part in made.values()),
        contamination_against=_described(overlap, what),
        compared_to=None if other is None else other.get("model", {}).get("name"),
    )  # fmt: skip
    if step is not None:
        whole = [result for result in found if not result["missing_samples"]]
        record_rows(model, what, [row for result in whole for row in results.eval_rows(result, step)], say)
    return Outcome(content, path, _problem(found, made))


def asked(suite: Suite, what: WhatToEvaluate, how: HowToSample) -> Suite:
    """The suite with what the command line says instead.

    Raises:
        RequestError: the two contradict each other.
    """
    if any(number is not None and number < 1 for number in (what.k, what.limit)):
        raise RequestError("--k and --limit must be 1 or more.")
    made = adjusted(
        suite, k=what.k, limit=what.limit, temperature=how.temperature, top_p=how.top_p, top_k=how.top_k,
        max_tokens=how.max_new_tokens,
    )  # fmt: skip
    problems = contradictions(made, one_sample="--k 1")
    if problems:
        raise RequestError("; ".join(problems) + ".")
    return made


def _overlap(data: Sequence[Data], what: WhatToEvaluate, say: Say) -> Overlap | None:
    if what.contamination_against is None:
        return None
    say(f"looking for the test items in {what.contamination_against}")
    found = find_overlap(data, what.contamination_against)
    if found.num_unreadable:
        say(f"{found.num_unreadable:,} of its rows cannot be read and were not looked at")
    return found


def _described(overlap: Overlap | None, what: WhatToEvaluate) -> dict[str, Any] | None:
    if overlap is None:
        return None
    source = str(what.contamination_against)
    return {
        "file": Path(source).name if Path(source).expanduser().exists() else source,
        "rows": overlap.num_rows, "unreadable_rows": overlap.num_unreadable, "kinds": overlap.hits,
    }  # fmt: skip


def compare_with(found: Sequence[dict[str, Any]], other: Mapping[str, Any]) -> None:
    """Add to each result the paired test against another model's result of the same benchmark."""
    theirs = {entry.get("benchmark"): entry for entry in other["benchmarks"]}
    for result in found:
        if result["benchmark"] in theirs:
            result["compared"] = results.compare(result, theirs[result["benchmark"]])


def record_rows(model: Model, what: WhatToEvaluate, rows: Sequence[EvalRow], say: Say) -> None:
    """Rows for the run's eval.jsonl, if the model belongs to a run; one that stands there already is not repeated."""
    run = Path(what.run_dir).expanduser() if what.run_dir is not None else model.run
    if run is None:
        return
    folder = RunFolder(run)
    there = folder.read_rows("eval.jsonl")
    new = [row for row in rows if dict(row) not in there]
    for row in new:
        folder.append("eval.jsonl", row)
    if new:
        say(f"{len(new)} rows added to {run / 'eval.jsonl'} at step {new[0]['step']:,}")


def _problem(found: Sequence[Mapping[str, Any]], made: Mapping[str, Generated]) -> str | None:
    missing = sum(result["missing_samples"] for result in found)
    if not missing:
        return None
    reasons = [f"{n} of {name}: {why}" for name, part in made.items() for why, n in part.failures.most_common(3)]
    why = "; ".join(reasons) if reasons else "they were never made"
    return f"{missing:,} samples are missing ({why}). What there is is kept; the same command asks for the rest again."
