"""Asks every command of a pipeline whether it would take its stage, before the first one runs.

The commands are asked in a process of their own: reading settings imports torch and may take hold of a GPU, which the
stages need. What only shows later (a data set's rows, memory) is for `psft plan`.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from psft.errors import RequestError, RunFailed, shown

if TYPE_CHECKING:
    from psft.pipelines import Executor, Stage

_MARK = "psft-check:"


def check_stages(executor: Executor, stages: Sequence[Stage]) -> None:
    """Raise RequestError with everything that is wrong with the requests of these stages.

    Raises:
        RunFailed: the process that asks did not end as it should.
    """
    from psft.pipelines.commands import STAGE_COMMANDS
    from psft.pipelines.process import environment

    asked = []
    for stage in stages:
        arguments = executor.arguments(stage)
        earlier = [str(executor.folder / other.name) for other in executor.pipeline.stages]
        asked.append({"stage": stage.name, "arguments": arguments, "made": earlier})
        if STAGE_COMMANDS[stage.command].takes_model:
            _refuse_adapter(executor, stage)
    if not asked:
        return
    done = subprocess.run(
        [sys.executable, "-m", "psft.cli.check_stages"], input=json.dumps(asked), capture_output=True, text=True,
        env=environment(),
    )  # fmt: skip
    answer = next((line for line in done.stdout.splitlines() if line.startswith(_MARK)), None)
    if answer is None:
        raise RunFailed(
            f"the stages' settings could not be checked (exit code {done.returncode}):\n{done.stderr[-3000:]}"
        )
    problems = json.loads(answer.removeprefix(_MARK))
    if problems:
        lines = [f"stage {name}: {problem}" for name, problem in problems]
        text = lines[0] if len(lines) == 1 else "\n".join(["", *(f"  - {line}" for line in lines)])
        raise RequestError(f"{shown(executor.pipeline.source)}: {text}")


def _refuse_adapter(executor: Executor, stage: Stage) -> None:
    from psft.pipelines.keys import settings_of
    from psft.pipelines.stage import Reference

    if isinstance(stage.model, Reference):
        maker = executor.pipeline.stage(stage.model.stage)
        if settings_of(maker).get("use_peft") in (True, "true"):
            raise RequestError(
                f"{shown(executor.pipeline.source)}: stage {stage.name}: {stage.model} is a LoRA adapter (use_peft in "
                f"stage {maker.name}), to be merged into its base model first. Train all weights there, or end there."
            )


def problem_of(arguments: Sequence[str], made: Sequence[str] = ()) -> str | None:
    """Why a command would refuse a stage; None if nothing is known.

    Args:
        arguments: its command line, after `psft`. made: folders that earlier stages make.
    """
    from psft.cli.main import COMMANDS

    command, *rest = arguments
    if command not in COMMANDS or command not in _CHECKS:
        return f"this psft has no command {command}."
    try:
        _CHECKS[command](rest, made)
    except RequestError as error:
        return str(error)
    except SystemExit as stop:
        return f"psft {command} ends with {stop.code} before it begins."
    return None


def _check_training(command: str) -> Callable[[list[str], Sequence[str]], None]:
    def check(arguments: list[str], made: Sequence[str]) -> None:
        import importlib

        from psft.cli.launch import requested
        from psft.cli.train import named_sources

        requested(arguments, command=command)
        module = importlib.import_module(f"psft.cli.{command}")
        request = module.read_request(arguments, command=command)
        _check_model(request.model_name, made)
        for source in (request.data.dataset, *named_sources(request.data.eval_dataset or []).values()):
            _check_source(source)
        if getattr(request.config, "rewards", None):
            request.config.reward_set().prepare()
        _check_vllm(getattr(request.config, "use_vllm", False), command)
        if getattr(request.config, "eval_suite", None) and not request.config.eval_suite_download:
            from psft.evaluation.in_training import load_benchmarks

            load_benchmarks(request.config)

    return check


def _check_evaluation(arguments: list[str], made: Sequence[str]) -> None:
    from dataclasses import replace

    from psft.cli.eval import read_request
    from psft.evaluation.harness.session import load_tasks
    from psft.evaluation.items import why_absent
    from psft.evaluation.local_data import data_folder, leave_out, not_here
    from psft.evaluation.request import check_settings
    from psft.evaluation.session import asked
    from psft.rewards import get_grader

    request = read_request(arguments)
    what, how = request.what, request.how
    is_later = what.run_dir is not None and what.run_dir in made
    check_settings(replace(what, run_dir=None, step=None) if is_later else what, how)
    if how.backend in ("hf", "vllm"):
        for model in request.models:
            _check_model(model, made)
    _check_vllm(how.backend == "vllm", "eval")
    suite, data_dir = asked(request.suite, what, how), data_folder(what.data_dir, setting="--data_dir ")
    absent = [b for b in not_here(suite, data_dir) if not (what.download and b.hub is not None)]
    words = [why_absent(benchmark, data_dir) for benchmark in absent]
    leave_out(words, len(suite.benchmarks), skip_missing=what.skip_missing, say=lambda line: None)
    for benchmark in suite.benchmarks:
        grader = get_grader(benchmark.kind, **benchmark.grader)
        if benchmark.kind != "ifeval":  # what that needs may lie beside its data
            grader.prepare()
    if request.tasks:
        load_tasks(request.tasks, what, how, request.harness, say=lambda line: None)


def _check_report(arguments: list[str], made: Sequence[str]) -> None:
    from psft.cli.report import parse

    for run in parse(arguments).runs:
        if run not in made and not Path(run).is_dir():
            raise RequestError(f"there is no run folder {shown(run)}. Check the path.")


def _check_model(name: str, made: Sequence[str]) -> None:
    """Refuse a model that is no folder, no hub id, and none that an earlier stage makes."""
    from psft.models.quickstart import NAME
    from psft.models.resolve import looks_like_hub_id

    is_made = any(Path(name) == Path(folder) or Path(folder) in Path(name).parents for folder in made)
    if not is_made and name != NAME and not Path(name).expanduser().is_dir() and not looks_like_hub_id(name):
        raise RequestError(f"there is no model folder {shown(name)}, and it is no hub id. Check the path.")


def _check_source(source: str) -> None:
    from psft.cli.plan import is_local

    is_file = is_local(source) and not source.startswith(("reasoning-gym:", "reasoning-gym-pairs:"))
    if is_file and not Path(source.partition("?")[0]).expanduser().exists():
        raise RequestError(f"there is no data file {shown(source)}. Check the path.")


def _check_vllm(is_used: bool, command: str) -> None:
    if is_used and find_spec("vllm") is None:
        raise RequestError(
            f"psft {command} is to use vLLM, which is not installed. Install it, or choose another backend."
        )


_CHECKS: dict[str, Callable[[list[str], Sequence[str]], None]] = {
    "train": _check_training("train"),
    "dpo": _check_training("dpo"),
    "grpo": _check_training("grpo"),
    "eval": _check_evaluation,
    "report": _check_report,
}


def _answer(text: str) -> str:
    """For requests as JSON the problems as JSON: [stage, problem] pairs."""
    with contextlib.redirect_stdout(sys.stderr):
        found = [(asked["stage"], problem_of(asked["arguments"], asked["made"])) for asked in json.loads(text)]
    return _MARK + json.dumps([pair for pair in found if pair[1] is not None])


if __name__ == "__main__":
    _result: Any = _answer(sys.stdin.read())
    print(_result)
