"""`psft plan` of a pipeline: the plan of every stage, by its own command's planner, and what all of them take together.

A stage that starts from an earlier one's model is planned with the sizes of the model that one began from.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from psft.errors import RequestError

if TYPE_CHECKING:
    from psft.cli.plan_costs import DeviceCost
    from psft.pipelines import Pipeline, Reference, Stage

_NOT_OF_A_STAGE = ("  - not at hand: model ", " holds another run: ")
"""Notes of the planners that a pipeline sees to itself."""


def run(argv: list[str]) -> int:
    """Prints the plan of each stage, then the total. Returns the exit code.

    Raises:
        RequestError: what `psft run` or one of the commands would refuse; every stage that is wrong is named.
    """
    from psft.cli.plan_costs import recording
    from psft.cli.run import parse
    from psft.pipelines import read_pipeline

    request = parse(argv)
    if request.first or request.only or request.redo or request.dry_run:
        raise RequestError(
            "psft plan PIPELINE plans every stage. Of psft run's options it takes --output_dir and the launch's."
        )
    pipeline = read_pipeline(request.pipeline).launched(request.launch)
    folder = request.output_dir or Path(pipeline.output_dir)
    print(f"Pipeline {pipeline.name}: {len(pipeline.stages)} stages, in {folder}")
    costs: dict[str, list[DeviceCost]] = {}
    evaluations: dict[str, str] = {}
    problems = []
    for number, stage in enumerate(pipeline.stages, start=1):
        title = f"[{number}/{len(pipeline.stages)}] {stage.name}: psft {stage.command}"
        print(f"\n{'=' * 100}\n{title}" + (f" {stage.recipe}" if stage.recipe else ""))
        try:
            with recording() as costs[stage.name]:
                _plan_stage(pipeline, stage, folder / stage.name, evaluations)
        except RequestError as error:
            problems.append(f"stage {stage.name}: {error}")
            print(f"  psft {stage.command} will refuse this: {error}")
    if problems:
        raise RequestError(problems[0] if len(problems) == 1 else "\n".join(["", *(f"  - {p}" for p in problems)]))
    print(f"\n{'=' * 100}\nTotal (rough estimates, as above)")
    print("\n".join(_total(pipeline, costs)))
    return 0


def _plan_stage(pipeline: Pipeline, stage: Stage, folder: Path, evaluations: dict[str, str]) -> None:
    """evaluations: what was printed for an evaluation, and the stage it was printed for; it is printed once."""
    from psft.pipelines import Reference
    from psft.pipelines.commands import arguments_of

    if isinstance(stage.model, Reference):
        base = pipeline.base_model(stage)
        print(f"The model is what stage {stage.model.stage} leaves; counted with the sizes of {base}.")
    if stage.command == "report":
        print(f"  runs  {', '.join(map(str, stage.runs))}")
        return

    def place(reference: Reference) -> str:
        if reference == stage.model and stage.command != "eval":
            return str(pipeline.base_model(stage))
        made = folder.parent / reference.stage
        return str(made / "results.json" if reference.result == "results" else made)

    command, *arguments = arguments_of(stage, folder, place, resume=False)
    if command == "eval":
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            _plan_evaluation(arguments)
        before = evaluations.setdefault(printed.getvalue(), stage.name)
        print(printed.getvalue().rstrip("\n") if before == stage.name else f"  benchmarks  as in stage {before}")
        return
    from psft.cli.plan import run as plan

    if stage.recipe is None:
        arguments.append(f"--stage={command}")
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        plan(arguments)
    is_later = isinstance(stage.model, Reference)
    for line in printed.getvalue().rstrip().splitlines():
        if _NOT_OF_A_STAGE[1] not in line and not (is_later and line.startswith(_NOT_OF_A_STAGE[0])):
            print(line)


def _plan_evaluation(arguments: Sequence[str]) -> None:
    """Prints what an evaluation asks of a model; the items are not read."""
    from psft.cli.eval import read_request
    from psft.cli.plan import heading, table
    from psft.evaluation.harness import data as harness_data
    from psft.evaluation.items import why_absent
    from psft.evaluation.local_data import data_folder, not_here
    from psft.evaluation.session import asked

    request = read_request(list(arguments))
    suite = asked(request.suite, request.what, request.how)
    data_dir = data_folder(request.what.data_dir, setting="--data_dir ")
    missing = not_here(suite, data_dir)
    rows, notes, fetched = [], [], []
    for benchmark in suite.benchmarks:
        items = min(benchmark.rows or benchmark.limit or 0, benchmark.limit or 10**9) or None
        what = f"{items:,} items x {benchmark.k} samples" if items else f"{benchmark.k} samples an item"
        rows.append((benchmark.shown_name, f"{what}, at most {benchmark.sampling.max_tokens:,} tokens"))
        if benchmark in missing:
            if request.what.download and benchmark.hub is not None:
                fetched.append(benchmark.shown_name)
            else:
                notes.append(why_absent(benchmark, data_dir))
    notes += [f"not at hand, fetched from the hub when they are due: {', '.join(fetched)}"] if fetched else []
    for task in request.tasks:
        rows.append((task.title, f"lm-evaluation-harness, task {task.task}"))
        if harness_data.find_file(task, data_dir) is None:
            notes.append(harness_data.why_absent(task, data_dir))
    heading("Benchmarks")
    table([("backend", request.how.backend), *rows])
    if notes:
        heading("Notes")
        print("\n".join(f"  - {note}" for note in notes))


def _total(pipeline: Pipeline, costs: dict[str, list[DeviceCost]]) -> list[str]:
    from psft.cli.plan_costs import duration, in_columns

    known = {name: found for name, found in costs.items() if found}
    lines = []
    devices = list(dict.fromkeys(cost.device for found in known.values() for cost in found))
    rows = []
    for device in devices:
        of_device = {name: cost for name, found in known.items() for cost in found if cost.device == device}
        parts = [f"{name} {_part(cost)}" for name, cost in of_device.items()]
        is_whole = all(cost.num_devices and cost.seconds is not None for cost in of_device.values())
        seconds = sum(cost.seconds or 0.0 for cost in of_device.values())
        rows.append((device, (duration(seconds) if is_whole else "-"), ", ".join(parts)))
    lines += in_columns([("device", "all stages", "of which"), *rows])
    left_out = [stage.name for stage in pipeline.stages if stage.name not in known and stage.command != "report"]
    if left_out:
        lines.append(f"  not estimated, as it depends on how long answers become: {', '.join(left_out)}")
    return lines


def _part(cost: DeviceCost) -> str:
    from psft.cli.plan_costs import duration

    if not cost.num_devices:
        return "does not fit"
    time = "unknown" if cost.seconds is None else duration(cost.seconds)
    return time if cost.num_devices == 1 else f"{time} on {cost.num_devices}"
