"""What a request to evaluate means: its settings checked, its model, backend and folders found. Nothing is generated.

Shared by our own benchmarks (`session`) and those of lm-evaluation-harness (`harness.session`).
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from psft.errors import RequestError, shown
from psft.evaluation.backends import BACKENDS, Backend
from psft.evaluation.identity import Model, model_of_folder, plain_name, template_hash
from psft.evaluation.settings import HowToSample, WhatToEvaluate
from psft.runs import RunFolder

Say = Callable[[str], None]


def say_on_stderr(line: str) -> None:
    print(f"psft eval: {line}", file=sys.stderr, flush=True)


def check_settings(what: WhatToEvaluate, how: HowToSample) -> None:
    """Raises RequestError for settings that contradict each other."""
    problems = []
    if how.backend not in BACKENDS:
        problems.append(f"--backend {shown(how.backend)} is not known; use {', '.join(BACKENDS)}")
    if how.backend == "openai" and not how.base_url:
        problems.append("--backend openai needs --base_url, as http://localhost:8000/v1")
    if how.backend == "replay" and not how.replay_file:
        problems.append("--backend replay needs --replay_file")
    if how.dtype not in ("auto", "float32", "bfloat16"):
        problems.append(f"--dtype {shown(how.dtype)} is not known; use auto, float32 or bfloat16")
    if how.batch_size is not None and how.batch_size < 1:
        problems.append("--batch_size must be 1 or more")
    problems += _without_effect(how)
    if what.run_dir is not None and not RunFolder(Path(what.run_dir).expanduser()).holds_run():
        problems.append(f"--run_dir {what.run_dir} is no run folder; give the output_dir of psft train")
    if what.step is not None and what.step < 0:
        problems.append("--step must be 0 or more")
    if (what.step is None) != (what.run_dir is None):
        problems.append("--run_dir and --step go together: which run's eval.jsonl, and at which step")
    if problems:
        raise RequestError("; ".join(problems) + ".")


def _without_effect(how: HowToSample) -> list[str]:
    """Settings that were given and that the backend does not look at."""
    if how.backend not in BACKENDS:
        return []
    return [
        f"--{setting.name} has no effect with --backend {how.backend}, only with {' and '.join(backends)}"
        for setting in fields(HowToSample)
        if (backends := setting.metadata.get("backends"))
        and how.backend not in backends
        and getattr(how, setting.name) != getattr(HowToSample(), setting.name)
    ]


def find_model(name: str, how: HowToSample) -> Model:
    """What a name means to a backend.

    Raises:
        RequestError: no such model, or one that cannot be evaluated.
    """
    if how.backend not in ("hf", "vllm"):
        return Model(plain_name(name), f"{how.backend}:{name}")
    from psft.models import resolve_model

    path = Path(name).expanduser()
    if path.is_dir() and RunFolder(path).holds_run() and not (path / "config.json").is_file():
        steps = sorted(int(item.name.rpartition("-")[2]) for item in path.glob("checkpoint-*"))
        advice = f"Name a checkpoint of it: {path / f'checkpoint-{steps[-1]}'}" if steps else "It has no checkpoint yet"
        raise RequestError(f"{name} is a run that has saved no final model. {advice}.")
    folder = resolve_model(name, how.model_revision, trust_remote_code=how.trust_remote_code)
    model = model_of_folder(name, folder)
    if how.chat_template_path is None:
        return model
    return replace(model, chat_template_sha256=template_hash(Path(how.chat_template_path).expanduser()))


def make_backend(model: Model, how: HowToSample) -> Backend:
    """The backend that was asked for; no model is loaded yet.

    Raises:
        RequestError: a setting it cannot use.
    """
    if how.backend == "replay":
        from psft.evaluation.backends.replay import ReplayBackend

        return ReplayBackend(Path(str(how.replay_file)).expanduser())
    if how.backend == "openai":
        from psft.evaluation.backends.openai import OpenAIBackend, Server

        return OpenAIBackend(
            Server(
                str(how.base_url), model.identity.partition(":")[2], os.environ.get(how.api_key_env) or None,
                concurrency=how.concurrency, timeout_s=how.request_timeout, max_retries=how.max_retries,
                extra=how.request_extra,
            )
        )  # fmt: skip
    if how.backend == "vllm":
        from psft.evaluation.backends.vllm import VLLMBackend

        code = {"trust_remote_code": True} if how.trust_remote_code else {}
        return VLLMBackend(
            str(model.folder), dtype=how.dtype, batch_size=how.batch_size or 512, options={**code, **how.engine_options}
        )
    from psft.evaluation.backends.hf import HFBackend, choose_device, choose_dtype

    device = choose_device(how.device)
    return HFBackend(
        str(model.folder), dtype=choose_dtype(how.dtype, device), device=device, batch_size=how.batch_size or 16,
        chat_template_path=how.chat_template_path, trust_remote_code=how.trust_remote_code,
    )  # fmt: skip


def default_output(model: Model) -> Path:
    """Where results of a model go if nobody says otherwise."""
    if model.run is None or model.folder is None:
        return Path("evals") / model.name
    is_final = model.folder.resolve() == model.run.resolve()
    return model.run / "evaluation" / ("final" if is_final else model.folder.resolve().name)


def check_replaced(path: Path, model: Model, say: Say) -> None:
    """Say so where the results file is that of another model of this name."""
    with contextlib.suppress(RequestError):  # none there, or damaged
        before = RunFolder(path.parent).read_json(path.name).get("model")
        if isinstance(before, dict) and before.get("identity") != model.identity:
            asked = before.get("asked_as")
            say(f"{path} holds another model of this name ({asked}) and will be replaced; its samples stay")


def other_results(what: WhatToEvaluate) -> dict[str, Any] | None:
    if what.compare_to is None:
        return None
    path = Path(what.compare_to).expanduser()
    found = RunFolder(path.parent).read_json(path.name) if path.is_file() else {}
    if not isinstance(found.get("benchmarks"), list):
        raise RequestError(f"--compare_to {path} holds no results of psft eval. Give its MODEL.SUITE.json.")
    return found
