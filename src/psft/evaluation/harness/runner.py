"""lm-evaluation-harness itself: one task at a time, as its own command would run it, its result files kept.

    PLACE/tasks/*.yaml              what was run: `lm_eval run --include_path PLACE/tasks --tasks TASK` repeats it
          results_DATE.json         lm-eval's own
          samples_TASK_DATE.jsonl   lm-eval's own, each item with prompt, answer and scores
          responses_rank0.db        answers as they come, so that a kill costs one batch; gone when the task is done

A task that was stopped goes on in other batches than an uninterrupted one would have: rounding may turn an item.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from psft.errors import RequestError, RunFailed
from psft.evaluation.harness.registry import HarnessTask
from psft.evaluation.harness.settings import HarnessSettings
from psft.evaluation.settings import HowToSample

OLDEST = (0, 4, 13)
"""Of lm-eval: its first version whose task manager this was written for."""
_INSTALL = 'Install it: pip install "psft[eval]".'
_RESPONSES = "responses"


def require_lm_eval() -> str:
    """lm-eval's version; nothing is imported.

    Raises:
        RequestError: it is not installed, or too old.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise RequestError(f"the alignment tax needs lm-evaluation-harness (lm-eval), which is not here. {_INSTALL}")
    version = importlib.metadata.version("lm_eval")
    numbers = tuple(int(part) for part in version.split(".")[:3] if part.isdecimal())
    if numbers < OLDEST:
        wanted = ".".join(map(str, OLDEST))
        raise RequestError(f"lm-eval {version} is too old, {wanted} or later is needed. {_INSTALL}")
    return version


def packaged_folder(task: HarnessTask) -> Path | None:
    """Where lm-eval keeps the YAML files of a registered task."""
    import lm_eval

    return Path(lm_eval.__file__).parent / "tasks" / task.folder if task.folder is not None else None


@dataclass(frozen=True)
class ModelArguments:
    """What makes lm-eval's model. kind: its name for the engine; batch_size: items at a time, or `auto`."""

    kind: str
    arguments: Mapping[str, Any]
    batch_size: int | str
    device: str | None


def model_arguments(folder: Path, how: HowToSample) -> ModelArguments:
    """lm-eval's arguments for a model folder, from ours."""
    # Absolute: lm-eval asks the hub for the revision of anything that could be owner/name.
    arguments: dict[str, Any] = {"pretrained": str(folder.resolve())}
    if how.backend == "vllm":
        arguments |= {"dtype": how.dtype, "trust_remote_code": how.trust_remote_code, **how.engine_options}
        return ModelArguments("vllm", arguments, how.batch_size or "auto", None)
    from psft.evaluation.backends.hf import choose_device, choose_dtype

    device = choose_device(how.device)
    arguments |= {"dtype": choose_dtype(how.dtype, device), "trust_remote_code": how.trust_remote_code}
    return ModelArguments("hf", arguments, how.batch_size or 8, device)


def load_model(model: ModelArguments) -> Any:
    """lm-eval's model."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # as lm-eval's command does
    from lm_eval.api.registry import get_model

    more = {"batch_size": model.batch_size, "device": model.device}
    return get_model(model.kind).create_from_arg_obj(dict(model.arguments), more)


def run_task(
    lm: Any,
    model: ModelArguments,
    task: HarnessTask,
    place: Path,
    settings: HarnessSettings,
    max_new_tokens: int | None = None,
) -> dict[str, Any]:
    """Run a task and keep lm-eval's files of it in `place`.

    Returns lm-eval's results with their `samples`.

    Raises:
        RequestError: lm-eval has no such task.
        RunFailed: memory ran out, or lm-eval could not write its files.
    """
    import torch
    from lm_eval import simple_evaluate
    from lm_eval.loggers import EvaluationTracker
    from lm_eval.tasks import TaskManager

    own = place / "tasks"
    manager = TaskManager(include_path=str(own), include_defaults=False) if own.is_dir() else TaskManager()
    tracker = EvaluationTracker(output_path=str(place / "results.json"))
    responses = place / f"{_RESPONSES}_rank0.db"
    try:
        found = simple_evaluate(
            model=lm,
            model_args=dict(model.arguments),
            tasks=[task.task],  # by name: it seeds, then loads, and GPQA's loading draws
            num_fewshot=None if own.is_dir() else settings.num_fewshot,
            batch_size=model.batch_size,
            device=model.device,
            use_cache=str(place / _RESPONSES),
            limit=task.limit,
            log_samples=True,
            evaluation_tracker=tracker,
            apply_chat_template=settings.apply_chat_template,
            fewshot_as_multiturn=settings.apply_chat_template,
            gen_kwargs=None if max_new_tokens is None else {"max_gen_toks": max_new_tokens},
            task_manager=manager,
        )
    except KeyError as error:
        if task.task not in manager.all_tasks:
            raise RequestError(f"lm-eval has no task {task.task}. `lm_eval ls tasks` lists those there are.") from error
        raise
    except torch.OutOfMemoryError as error:
        raise RunFailed(
            f"{task.task}: memory ran out with batches of {model.batch_size}. Set --batch_size lower; the same command "
            "goes on from here."
        ) from error
    finally:
        if lm.cache_hook.dbdict is not None:
            lm.cache_hook.dbdict.close()  # waits until what came is written
    samples = found.pop("samples")
    tracker.save_results_aggregated(results=found, samples=samples)
    for name in found["configs"]:
        tracker.save_results_samples(task_name=name, samples=samples[name])
    if not list(place.glob("results_*.json")) or len(list(place.glob("samples_*.jsonl"))) < len(samples):
        raise RunFailed(f"lm-eval could not write its files into {place}. Make room there; the same command goes on.")
    responses.unlink(missing_ok=True)
    return {**found, "samples": samples}
