"""Which stages of a pipeline run, and running them one after the other.

    decide()   stage by stage: skip, run, go on, make again, or refuse; nothing is written
    run()      the same, then does it: OUTPUT/STAGE for each, OUTPUT/pipeline.json after every change

A stage is done if its key is the one it was made with and what it leaves is there. A done stage that has changed is put
aside, never written over: evaluations and reports by themselves, training only when it is asked for (`redo`).
"""

from __future__ import annotations

import contextlib
import itertools
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psft
from psft.errors import RequestError, RunFailed
from psft.pipelines import keys
from psft.pipelines.commands import STAGE_COMMANDS, arguments_of, evaluation_folder, model_left
from psft.pipelines.definition import Pipeline
from psft.pipelines.process import END, LOG, FolderLock, Signals, last_lines, run_stage
from psft.pipelines.stage import Reference, Stage
from psft.pipelines.state import PipelineState, StageState, now
from psft.runs import RunFolder

ASIDE = "aside"
CHANGED = "changed"
"""`redo` of this: every stage that has changed."""
PROGRAM = (sys.executable, "-m", "psft.cli.attend")
Say = Callable[[str], None]


@dataclass(frozen=True)
class Decision:
    """What happens with a stage.

    action: skip, run, go on, redo (put aside first), refuse (it has changed), left out (not asked for). why: in words.
    making: names the result it has or will have, for the keys of later stages.
    """

    stage: Stage
    action: str
    why: str
    parts: dict[str, Any]
    making: str

    @property
    def runs(self) -> bool:
        return self.action in ("run", "go on", "redo")


class Executor:
    """A pipeline in its folder.

    Args:
        redo: stages to make again, or "changed". first: the first stage that may run. only: the one stage that may.
        program: what attends a stage's process (`process.run_stage`).
    Raises:
        RequestError: a stage of that name is not there, or the folder holds another pipeline.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        folder: Path,
        *,
        redo: Sequence[str] = (),
        first: str | None = None,
        only: str | None = None,
        program: Sequence[str] = PROGRAM,
        say: Say = print,
    ) -> None:
        if first is not None and only is not None:
            raise RequestError("--from and --only exclude each other. Give one of them.")
        names = [stage.name for stage in pipeline.stages]
        for name in (*(n for n in redo if n != CHANGED), *filter(None, (first, only))):
            pipeline.stage(name)
        self.pipeline, self.folder, self.redo = pipeline, folder, set(redo)
        self.asked = {only} if only is not None else set(names[names.index(first) if first is not None else 0 :])
        self.program, self.say = program, say
        self.state = PipelineState(folder, pipeline.name, pipeline.source)

    def place(self, reference: Reference) -> str:
        """The path that a reference stands for: as its stage has left it, or will unless it chooses a best."""
        known = self.state.stages.get(reference.stage, {}).get("outputs", {}).get(reference.result)
        if known is not None:
            return str(self.folder / known)
        stage = self.pipeline.stage(reference.stage)
        folder = self.folder / stage.name
        return str(folder / "results.json" if reference.result == "results" else folder)

    def arguments(self, stage: Stage) -> list[str]:
        """The stage's command line after `psft`; a run that has begun goes on."""
        folder = self.folder / stage.name
        return arguments_of(stage, folder, self.place, resume=RunFolder(folder).holds_run())

    def decide(self) -> list[Decision]:
        """What happens with each stage, in order. Writes nothing."""
        decisions: dict[str, Decision] = {}
        for stage in self.pipeline.stages:
            upstream = {other.name: decisions[other.name] for other in self.pipeline.upstream(stage)}
            decisions[stage.name] = self._decide(stage, upstream)
        return list(decisions.values())

    def _decide(self, stage: Stage, upstream: Mapping[str, Decision]) -> Decision:
        parts = keys.parts_of(stage, {name: decision.making for name, decision in upstream.items()})
        generation = self.state.generations.get(stage.name, 0)
        action, why = self._action(stage, parts, upstream)
        if stage.name not in self.asked and action != "skip":
            action, why = "left out", f"not asked for; {why}"
        making = f"{keys.key_of(parts)}, {generation + (action == 'redo')}"
        return Decision(stage, action, why, parts, making)

    def _action(self, stage: Stage, parts: dict[str, Any], upstream: Mapping[str, Decision]) -> tuple[str, str]:
        known = self._known(stage)
        if known is None:
            if not RunFolder(self.folder / stage.name).holds_run():
                return "run", "not begun"
            why = "its folder holds a run that pipeline.json does not know"
            return ("redo" if self.redo & {stage.name, CHANGED} else "refuse"), why
        before = known.get("parts", {})
        is_other_start = before.get("upstream") != parts["upstream"]
        if stage.name in self.redo:
            return "redo", "asked for"
        if known["status"] != "done":
            ended = {"running": "was cut off", "stopped": "was stopped"}.get(known["status"], "has failed")
            if is_other_start and STAGE_COMMANDS[stage.command].makes_model:
                return "redo", f"{ended}, and began from another model"
            return "go on", ended
        if known.get("key") == keys.key_of(parts):
            missing = [path for path in known.get("outputs", {}).values() if not self._is_there(stage, path)]
            if missing:
                return "run", f"what it has left is gone: {', '.join(missing)}"
            return "skip", f"done {known.get('ended_at')}"
        changes = "; ".join(keys.what_changed(before, parts))
        follows = any(decision.action == "redo" for decision in upstream.values())
        if STAGE_COMMANDS[stage.command].makes_model and CHANGED not in self.redo and not follows:
            return "refuse", f"it is done, and has changed since: {changes}"
        return "redo", changes

    def _known(self, stage: Stage) -> StageState | None:
        """The stage's state; of one that outlived its `psft run`, as its own process wrote it down."""
        known = self.state.stages.get(stage.name)
        if known is None or known["status"] != "running":
            return known
        with contextlib.suppress(RequestError):  # it was killed before it could
            end = RunFolder(self.folder / stage.name).read_json(END)
            if end.get("exit_code") == 0 and end.get("key") == known.get("key"):
                with contextlib.suppress(RunFailed):
                    ended: StageState = {**known, "status": "done", "exit_code": 0, "ended_at": end.get("ended_at")}
                    ended["outputs"] = self._outputs(stage)
                    return ended
        return known

    def _is_there(self, stage: Stage, path: str) -> bool:
        if STAGE_COMMANDS[stage.command].makes_model:
            return model_left(self.folder / path, "last") is not None
        return (self.folder / path).exists()

    def check(self, decisions: Sequence[Decision]) -> None:
        """Raise RequestError if something must be said by the person first; all of it in one message."""
        refused = [d for d in decisions if d.action == "refuse"]
        if refused:
            lines = [f"  - stage {d.stage.name}: {d.why}" for d in refused]
            names = " ".join(d.stage.name for d in refused)
            raise RequestError(
                "\n".join(["", *lines])
                + f"\n--redo {names} puts what is there aside ({self.folder / ASIDE}) and makes it again, with all "
                "that follows from it. Or choose another --output_dir, or undo the change."
            )
        left_out = {d.stage.name: d.why for d in decisions if d.action == "left out"}
        problems = []
        for decision in decisions:
            if decision.runs:
                needed = [other.name for other in self.pipeline.upstream(decision.stage) if other.name in left_out]
                problems += [f"stage {decision.stage.name} needs {name} ({left_out[name]})" for name in needed]
        if problems:
            raise RequestError("; ".join(problems) + ". Leave out --from and --only, or name an earlier stage.")

    def run(self) -> int:
        """Run what is to be run. Returns 0, or the exit code of the stage that did not end well.

        Raises:
            RequestError: a changed stage that nobody asked to make again, or another `psft run` is at work here.
            RunFailed: a stage was killed, or ended well without what it should leave.
        """
        self.check(self.decide())
        signals = Signals()
        with FolderLock(self.folder) as lock, signals.handed_on():
            self.state = PipelineState(self.folder, self.pipeline.name, self.pipeline.source)
            decisions = self.decide()
            self.check(decisions)
            for number, decision in enumerate(decisions, start=1):
                place = f"[{number}/{len(decisions)}] {decision.stage.name}"
                if not decision.runs:
                    self._keep_known(decision)
                    self.say(f"{place}: {decision.action}: {decision.why}")
                    continue
                if signals.number is not None:
                    self.say(f"{place}: stopped before it began. The same command goes on here.")
                    return 128 + signals.number
                self.say(f"{place}: {decision.action}: {decision.why}")
                code = self._make(decision, lock, signals)
                if code != 0:
                    return code
        return 0

    def _keep_known(self, decision: Decision) -> None:
        known = self._known(decision.stage)
        if known is not None and known is not self.state.stages.get(decision.stage.name):
            self.state.stages[decision.stage.name] = known
            self.state.save()

    def _make(self, decision: Decision, lock: FolderLock, signals: Signals) -> int:
        stage, folder = decision.stage, self.folder / decision.stage.name
        if decision.action == "redo":
            self._put_aside(stage, decision.why)
        arguments = self.arguments(stage)
        before: StageState = self.state.stages.get(stage.name, {})
        state: StageState = {
            "status": "running", "command": arguments, "folder": stage.name, "key": keys.key_of(decision.parts),
            "parts": decision.parts, "started_at": before.get("started_at") or now(), "ended_at": None,
            "seconds": before.get("seconds", 0.0), "attempts": before.get("attempts", 0) + 1, "exit_code": None,
            "psft": psft.__version__,
        }  # fmt: skip
        self.state.stages[stage.name] = state
        self.state.save()
        self.say(f"$ psft {shlex.join(arguments)}")
        seen = self._results_there(stage)
        started = time.monotonic()
        code = run_stage(self.program, arguments, folder, state["key"], lock, signals)
        state["seconds"] = round(state["seconds"] + time.monotonic() - started, 1)
        state["ended_at"], state["exit_code"] = now(), code
        state["status"] = "done" if code == 0 else "stopped" if signals.number is not None else "failed"
        try:
            if code == 0:
                state["outputs"] = self._outputs(stage, seen)
        except RunFailed:
            state["status"] = "failed"
            raise
        finally:
            self.state.save()
        return code if code == 0 else self._ended_badly(stage, code, state, signals)

    def _ended_badly(self, stage: Stage, code: int, state: StageState, signals: Signals) -> int:
        folder = self.folder / stage.name
        again = f"the same command{' without --redo' if self.redo else ''} goes on with this stage"
        again += ", from its newest checkpoint if it has one" if STAGE_COMMANDS[stage.command].makes_model else ""
        if signals.number is not None:
            self.say(f"stage {stage.name} was stopped after {state['seconds']:.0f} s; {again}. Its log: {folder / LOG}")
            return code if code > 0 else 128 + signals.number
        how = f"ended with exit code {code}"
        if code < 0:
            how = f"was killed by signal {-code}" + (
                " (a machine that runs out of memory does that)" if code == -9 else ""
            )
        elif code == 2:
            how = "refused its request (exit code 2)"
        tail = "\n".join(f"  | {line}" for line in last_lines(folder / LOG))
        print(
            f"psft run: stage {stage.name} {how} after {state['seconds']:.0f} s.\n{tail}\nIts log: {folder / LOG}\n"
            f"Its folder: {folder}\nStages before it are kept. When the cause is gone, {again}.",
            file=sys.stderr,
        )
        return code if code > 0 else 1

    def _outputs(self, stage: Stage, seen: Mapping[Path, Any] | None = None) -> dict[str, str]:
        """What the stage has left, relative to the pipeline's folder.

        Args:
            seen: results files as they were before an evaluation; None: unknown.
        Raises:
            RunFailed: it is not there.
        """
        folder = self.folder / stage.name
        found: dict[str, Path | None] = {"folder": folder}
        if STAGE_COMMANDS[stage.command].makes_model:
            found |= {result: model_left(folder, result) for result in ("model", "last")}
        elif stage.command == "eval":
            there = self._results_there(stage)
            new = [path for path, mark in there.items() if seen is None or seen.get(path) != mark]
            found["results"] = max(new, key=lambda path: path.stat().st_mtime_ns, default=None)
        else:
            found["page"] = folder / "index.html" if (folder / "index.html").is_file() else None
        missing = [name for name, path in found.items() if path is None]
        if missing:
            raise RunFailed(
                f"stage {stage.name} ended well, and left no {' and no '.join(missing)} in {folder}. Its log: "
                f"{folder / LOG}"
            )
        return {
            name: Path(path).relative_to(self.folder).as_posix() for name, path in found.items() if path is not None
        }

    def _results_there(self, stage: Stage) -> dict[Path, Any]:
        """Files that may be an evaluation's results, each with a mark that changes when it is written."""
        if stage.command != "eval":
            return {}
        folder = evaluation_folder(stage, self.folder / stage.name, self.place)
        return {path: path.stat().st_mtime_ns for path in folder.glob("*.json") if path.name != END}

    def _put_aside(self, stage: Stage, why: str) -> None:
        """Move what a stage has left out of the way of a new one. Of an evaluation the samples stay where they are."""
        folder, generation = self.folder / stage.name, self.state.generations.get(stage.name, 0) + 1
        names = (f"{stage.name}-{number}" for number in itertools.count(generation))
        aside = next(path for path in (self.folder / ASIDE / name for name in names) if not path.exists())
        aside.parent.mkdir(parents=True, exist_ok=True)
        if folder.exists():
            folder.rename(aside)
        results = self.state.stages.get(stage.name, {}).get("outputs", {}).get("results")
        if results is not None and (self.folder / results).is_file():
            aside.mkdir(exist_ok=True)
            shutil.copy2(self.folder / results, aside)
        self.state.generations[stage.name] = generation
        self.state.stages.pop(stage.name, None)
        entry = {"stage": stage.name, "folder": aside.relative_to(self.folder).as_posix(), "at": now(), "why": why}
        self.state.set_aside.append(entry)
        self.state.save()
        self.say(f"  what was there is now in {aside}")
