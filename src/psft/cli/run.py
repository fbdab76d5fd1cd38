"""`psft run`: the stages of a pipeline, each in its own process; done ones are skipped, a stopped one goes on."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from psft.errors import RequestError

if TYPE_CHECKING:
    from psft.pipelines.executor import Decision, Executor

HELP = "run the stages of a pipeline one after the other; skips what is done, goes on where it stopped"
_USAGE = """usage: psft run PIPELINE [--output_dir DIR] [--from STAGE | --only STAGE] [--redo STAGE...] [--dry_run]
                         [--num_processes N] [--accelerate KIND]

PIPELINE is a YAML file or a recipe whose name begins with pipeline- (psft recipes lists them). Each stage is a command
of psft in a process of its own, with a folder and a log in DIR; DIR/pipeline.json says what became of it. The same
command goes on after a crash, a kill or Ctrl-C: stages that are done are skipped, and the one that was cut off goes on
from its newest checkpoint.

  --output_dir DIR   default: what the file says, else runs/NAME
  --from STAGE       run this stage and those after it; what it needs of earlier ones must be done
  --only STAGE       run this stage alone
  --redo STAGE...    make these stages again, and all that follows from them; "changed" = every stage that has changed.
                     What is there is put aside (DIR/aside), nothing is deleted
  --num_processes N, --accelerate KIND
                     of every stage that trains, as those commands take them
  --dry_run          say what would be done with each stage, and its command line

docs/pipelines.md explains the file; psft plan PIPELINE counts steps, memory and time."""
_VALUES = {"--output_dir": "runs/mine", "--from": "grpo", "--only": "report", "--redo": "psft"}
_LAUNCH = {"--num_processes": "8", "--accelerate": "fsdp2"}
"""Options with a value; those of the launch are handed on to the stages that train."""


@dataclass(frozen=True)
class Request:
    """What was asked for."""

    pipeline: str
    output_dir: Path | None = None
    first: str | None = None
    only: str | None = None
    redo: tuple[str, ...] = field(default=())
    launch: Mapping[str, str] = field(default_factory=dict)
    dry_run: bool = False


def run(argv: list[str]) -> int:
    """`psft run PIPELINE`. Returns the exit code of the stage that did not end well, or 0.

    Raises:
        RequestError: the file, a stage's settings, or what was asked for is wrong; nothing was run.
        RunFailed: a stage ended without what it should leave.
    """
    if not argv or "-h" in argv or "--help" in argv:
        print(_USAGE)
        return 0
    request = parse(argv)

    from psft.cli.check_stages import check_stages
    from psft.pipelines import Executor, read_pipeline

    pipeline = read_pipeline(request.pipeline).launched(request.launch)
    folder = request.output_dir or Path(pipeline.output_dir).expanduser()
    executor = Executor(
        pipeline,
        folder,
        redo=request.redo,
        first=request.first,
        only=request.only,
        say=lambda line: print(line, flush=True),
    )
    decisions = executor.decide()
    if not request.dry_run:
        executor.check(decisions)
    check_stages(executor, [decision.stage for decision in decisions if decision.runs])
    if request.dry_run:
        _show(executor, decisions)
        executor.check(decisions)
        return 0
    code = executor.run()
    if code == 0:
        print(f"Everything is in {folder}")
    return code


def parse(argv: list[str]) -> Request:
    """The request; options may stand anywhere.

    Raises:
        RequestError: an unknown option, one without its value, or not one pipeline.
    """
    names: list[str] = []
    values: dict[str, list[str]] = {}
    is_dry, rest, known = False, list(argv), {**_VALUES, **_LAUNCH}
    while rest:
        word = rest.pop(0)
        name, equals, value = word.partition("=")
        name = name.replace("-", "_").replace("__", "--", 1) if name.startswith("--") else name
        if word in ("--dry_run", "--dry-run"):
            is_dry = True
        elif name in known:
            if not equals and (not rest or rest[0].startswith("--")):
                raise RequestError(f"{name} needs a value, e.g. {name} {known[name]}.")
            found = values.setdefault(name, [])
            found.append(value if equals else rest.pop(0))
            while name == "--redo" and rest and not rest[0].startswith("--"):
                found.append(rest.pop(0))
        elif word.startswith("-"):
            raise RequestError(f"unknown option {word}. Known: {', '.join(known)}, --dry_run.")
        else:
            names.append(word)
    if len(names) != 1:
        raise RequestError(
            f"name one pipeline, e.g. psft run pipeline-quickstart-grpo; got {' '.join(names) or 'none'}."
        )
    single = {name: found[-1] for name, found in values.items()}
    redo = tuple(part for text in values.get("--redo", []) for part in text.split(",") if part)
    output_dir = Path(single["--output_dir"]).expanduser() if "--output_dir" in single else None
    launch = {name.removeprefix("--"): single[name] for name in _LAUNCH if name in single}
    return Request(names[0], output_dir, single.get("--from"), single.get("--only"), redo, launch, is_dry)


def _show(executor: Executor, decisions: list[Decision]) -> None:
    for number, decision in enumerate(decisions, start=1):
        print(f"[{number}/{len(decisions)}] {decision.stage.name}: {decision.action}: {decision.why}")
        if decision.runs:
            print(f"    psft {shlex.join(executor.arguments(decision.stage))}")
