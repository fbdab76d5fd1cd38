"""One evaluation through lm-evaluation-harness, from request to results.

    OUTPUT/harness/TASK-KEY/      a task: its YAML files, lm-eval's own results and samples (`runner`), and result.json,
                                  our entry for it; its presence says the task is done
           MODEL.SUITE.json       the results, in the form of every other evaluation

KEY is the hash of everything a task's numbers depend on: the model's bytes, the task, its data, examples, limit and
prompt form, and lm-eval's version. A task whose folder has a result is not run again.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from psft.errors import RequestError
from psft.evaluation.backends import Description
from psft.evaluation.harness import runner, scores
from psft.evaluation.harness.data import LocalData, find_file, prepare, why_absent
from psft.evaluation.harness.registry import HarnessTask
from psft.evaluation.harness.settings import HarnessSettings
from psft.evaluation.harness.task_files import write_task_files
from psft.evaluation.identity import Model, plain_name
from psft.evaluation.local_data import data_folder, leave_out
from psft.evaluation.request import (
    Say,
    check_replaced,
    check_settings,
    default_output,
    find_model,
    other_results,
    say_on_stderr,
)
from psft.evaluation.results_file import results_path, write_results
from psft.evaluation.samples import digest
from psft.evaluation.session import Outcome, compare_with, record_rows
from psft.evaluation.settings import HowToSample, WhatToEvaluate
from psft.runs import RunFolder

TaskWithData = tuple[HarnessTask, LocalData | None]
"""None: lm-eval fetches the data from the hub."""
RESULT = "result.json"
_VERSION = 1
"""Of what we make of lm-eval's results; rises when old entries must be made again."""


@dataclass(frozen=True)
class _Prepared:
    """A task with its data (None = lm-eval fetches them) and what identifies its result."""

    task: HarnessTask
    data: LocalData | None
    identity: Mapping[str, Any]

    @property
    def folder_name(self) -> str:
        return f"{plain_name(self.task.task)}-{digest(self.identity)[:12]}"


def load_tasks(
    tasks: Sequence[HarnessTask],
    what: WhatToEvaluate,
    how: HowToSample,
    settings: HarnessSettings,
    *,
    say: Say = say_on_stderr,
) -> list[TaskWithData]:
    """Check a request and find the data of its tasks: what is wrong shows before anything is run.

    Raises:
        RequestError: lm-eval is not here, a setting has no effect, or data are absent or not as expected.
    """
    _check(what, how, settings)
    runner.require_lm_eval()
    return _load_all(tasks, what, say)


def evaluate_harness(
    model_name: str,
    suite_name: str,
    tasks: Sequence[TaskWithData],
    what: WhatToEvaluate,
    how: HowToSample,
    settings: HarnessSettings,
    *,
    say: Say = say_on_stderr,
) -> Outcome:
    """Evaluate a model on tasks of lm-evaluation-harness.

    Args:
        model_name: hub id, folder, run folder or checkpoint.
        tasks: from `load_tasks`.
        say: told lines a person should read.
    Raises:
        RequestError: something about the request is wrong; nothing was run.
        RunFailed: a task cannot go on; what is done is kept.
    """
    version = runner.require_lm_eval()
    other = other_results(what)
    model = find_model(model_name, how)
    step = what.step if what.step is not None else model.step
    assert model.folder is not None
    arguments = runner.model_arguments(model.folder, how)
    output = Path(what.output_dir).expanduser() if what.output_dir else default_output(model)
    prepared = [
        _Prepared(task, data, _identity(task, data, model, arguments, how, settings, version)) for task, data in tasks
    ]
    path = results_path(output, model.name, suite_name)
    check_replaced(path, model, say)
    started = time.monotonic()
    found, num_run = _run_all(prepared, output / "harness", arguments, how, settings, say)
    if other is not None:
        compare_with(found, other)
    content = write_results(
        path,
        model={
            "name": model.name, "asked_as": model_name, "identity": model.identity, "step": step,
            "chat_template_sha256": model.chat_template_sha256 if settings.apply_chat_template else None,
        },
        suite=suite_name,
        seed=None,
        backend=_description(arguments, settings, version),
        benchmarks=found,
        started=started,
        samples_made=num_run,
        contamination_against=None,
        compared_to=None if other is None else other.get("model", {}).get("name"),
    )  # fmt: skip
    if step is not None:
        record_rows(model, what, [row for result in found for row in scores.eval_rows(result, step)], say)
    return Outcome(content, path, None)


def _description(arguments: runner.ModelArguments, settings: HarnessSettings, version: str) -> Description:
    own = {name: value for name, value in arguments.arguments.items() if name != "pretrained"}
    return Description(
        f"lm-eval/{arguments.kind}",
        {
            "version": version, **own, "batch_size": arguments.batch_size, "device": arguments.device,
            "apply_chat_template": settings.apply_chat_template,
        },
    )  # fmt: skip


def _check(what: WhatToEvaluate, how: HowToSample, settings: HarnessSettings) -> None:
    """Raises RequestError for settings that lm-eval's tasks would not follow."""
    problems = []
    if how.backend not in ("hf", "vllm"):
        problems.append(
            f"--backend {how.backend} cannot give the log-probabilities that its tasks need; use hf or vllm"
        )
    if settings.num_fewshot is not None and settings.num_fewshot < 0:
        problems.append("--num_fewshot must be 0 or more")
    if what.limit is not None and what.limit < 1:
        problems.append("--limit must be 1 or more")
    set_by_task = {
        "--k": what.k, "--temperature": how.temperature, "--top_p": how.top_p, "--top_k": how.top_k,
        "--seed": how.seed or None, "--chat_template_path": how.chat_template_path,
        "--contamination_against": what.contamination_against, "--regrade": what.regrade or None,
    }  # fmt: skip
    given = [name for name, value in set_by_task.items() if value is not None]
    if given:
        problems.append(f"{', '.join(given)} has no effect there, its tasks set all that. Leave it out")
    if problems:
        raise RequestError("lm-evaluation-harness: " + "; ".join(problems) + ".")
    check_settings(what, how)


def _load_all(tasks: Sequence[HarnessTask], what: WhatToEvaluate, say: Say) -> list[TaskWithData]:
    """The local data of every task, None where lm-eval shall fetch them; those absent are named together."""
    data_dir = data_folder(what.data_dir, setting="--data_dir ")
    paths = {task.task: find_file(task, data_dir) for task in tasks}
    absent = [task for task in tasks if paths[task.task] is None and not what.download]
    words = [why_absent(task, data_dir) for task in absent]
    leave_out(words, len(tasks), skip_missing=what.skip_missing, say=say)
    found: list[TaskWithData] = []
    for task in tasks:
        path = paths[task.task]
        if path is not None:
            found.append((task, prepare(task, path, any_rows=what.any_rows)))
        elif what.download:
            say(f"{task.title}: lm-eval fetches its data from the hub")
            found.append((task, None))
    return found


def _identity(
    task: HarnessTask,
    data: LocalData | None,
    model: Model,
    arguments: runner.ModelArguments,
    how: HowToSample,
    settings: HarnessSettings,
    version: str,
) -> dict[str, Any]:
    """Everything the numbers depend on but the rounding of another batch size or device."""
    return {
        "version": _VERSION,
        "lm_eval": version,
        "model": model.identity,
        "engine": {name: value for name, value in arguments.arguments.items() if name != "pretrained"}
        | {"kind": arguments.kind},
        "task": task.task,
        "data": None if data is None else data.sha256,
        "limit": task.limit,
        "num_fewshot": settings.num_fewshot if settings.num_fewshot is not None else task.num_fewshot,
        "apply_chat_template": settings.apply_chat_template,
        "max_new_tokens": how.max_new_tokens,
    }


def _run_all(
    prepared: Sequence[_Prepared],
    place: Path,
    arguments: runner.ModelArguments,
    how: HowToSample,
    settings: HarnessSettings,
    say: Say,
) -> tuple[list[dict[str, Any]], int]:
    """The entry of every task, and how many items were run for them; the model is loaded if one is to run."""
    done = {part.folder_name: _finished(place / part.folder_name, part.identity) for part in prepared}
    waiting = [part for part in prepared if done[part.folder_name] is None]
    for part in waiting:  # all of them before the model is loaded: what is wrong with a request shows at once
        _write_files(part, place / part.folder_name, settings)
    lm: Any = None
    num_run = 0
    for part in prepared:
        own = place / part.folder_name
        if done[part.folder_name] is not None:
            say(f"{part.task.task} is done already: {own}")
            continue
        if lm is None:
            lm = runner.load_model(arguments)
        started = time.monotonic()
        say(f"{part.task.task}: lm-eval runs it")
        try:
            results = runner.run_task(lm, arguments, part.task, own, settings, how.max_new_tokens)
        except KeyboardInterrupt:
            say(f"stopped; answers so far are kept in {own}. The same command goes on from here.")
            raise
        entry = scores.describe(part.task, results, part.data)
        entry["harness"] |= {"files": f"harness/{own.name}", "wall_time_s": round(time.monotonic() - started, 1)}
        RunFolder(own).write_json(RESULT, {"identity": dict(part.identity), "result": entry})
        done[part.folder_name] = entry
        num_run += entry["n"]
    return [entry for entry in done.values() if entry is not None], num_run


def _finished(place: Path, identity: Mapping[str, Any]) -> dict[str, Any] | None:
    """The entry of a task that was run already."""
    if not (place / RESULT).is_file():
        return None
    content = RunFolder(place).read_json(RESULT)
    if content.get("identity") != identity:
        return None
    entry: dict[str, Any] = content["result"]
    return entry


def _write_files(part: _Prepared, place: Path, settings: HarnessSettings) -> None:
    packaged = runner.packaged_folder(part.task)
    place.mkdir(parents=True, exist_ok=True)
    if packaged is not None:
        write_task_files(
            place / "tasks",
            part.task.task,
            packaged=packaged,
            files=None if part.data is None else part.data.files,
            default_num_fewshot=part.task.num_fewshot,
            num_fewshot=settings.num_fewshot,
        )
