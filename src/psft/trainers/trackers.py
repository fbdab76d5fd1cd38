"""What `report_to` sends to TensorBoard, Trackio, W&B, MLflow and the others that the HF Trainer knows.

The Trainer's own callbacks do the sending: every `logging_steps` steps TRL logs the mean of what was kept since, and
the Trainer adds loss, grad_norm and learning_rate. Drift is logged when it is measured, step 0 included. The names are
those of metrics.jsonl; each tracker puts `train/` before them (MLflow: nothing), and `eval/` before held-out data.
"""

from __future__ import annotations

import difflib
import importlib.util
import sys
from collections.abc import Iterable, Mapping, MutableMapping
from typing import TYPE_CHECKING, Any

from psft.runs.rows import ProbeRow

if TYPE_CHECKING:
    from psft.trainers.psft_trainer import PSFTTrainer

_MODULES = {
    "azure_ml": ("azureml",),
    "clearml": ("clearml",),
    "codecarbon": ("codecarbon",),
    "comet_ml": ("comet_ml",),
    "dagshub": ("dagshub",),
    "dvclive": ("dvclive",),
    "flyte": ("flytekit",),
    "kubeflow": (),
    "mlflow": ("mlflow",),
    "neptune": ("neptune",),
    "swanlab": ("swanlab",),
    "tensorboard": ("tensorboard", "tensorboardX"),
    "trackio": ("trackio",),
    "wandb": ("wandb",),
}
"""What transformers calls a tracker, and the modules of which it needs one."""
_PACKAGES = {"azure_ml": "azureml-core", "comet_ml": "comet-ml", "flyte": "flytekit"}  # where pip says it otherwise
_NOT_KEPT = {
    "loss", "grad_norm", "learning_rate", "epoch",  # the Trainer logs these itself
    "step", "window", "mini_batch", "num_mini_batches", "tokens", "pairs",  # places and counts: their means say nothing
}  # fmt: skip
_LARGEST = {"log_ratio_abs_max", "peak_memory_bytes"}


def refused_trackers(report_to: str | Iterable[str]) -> list[str]:
    """What is wrong with the trackers asked for: unknown, or not installed. Importing none of them."""
    problems = []
    for name in [report_to] if isinstance(report_to, str) else report_to:
        modules = _MODULES.get(name)
        if modules is None:
            near = difflib.get_close_matches(name, _MODULES, n=1)
            hint = f"Did you mean '{near[0]}'? " if near else ""
            problems.append(f"report_to={name} is no tracker. {hint}Known: none, all, {', '.join(_MODULES)}")
        elif modules and not any(map(_is_installed, modules)):
            package = _PACKAGES.get(name, name)
            problems.append(f"report_to={name} needs a package that is not installed: pip install {package}")
    return problems


def _is_installed(module: str) -> bool:
    """A folder of that name in the working directory, such as the `wandb` that a run leaves, is no package."""
    if module in sys.modules:
        return True
    spec = importlib.util.find_spec(module)
    return spec is not None and spec.origin is not None


def keep_for_trackers(kept: MutableMapping[str, list[float]], row: Mapping[str, Any]) -> None:
    """Add a row of metrics.jsonl to what is logged next as a mean; of a maximum only the largest is kept."""
    for name, value in row.items():
        if name in _NOT_KEPT or isinstance(value, bool) or not isinstance(value, int | float):
            continue
        kept[name] = [max([value, *kept.get(name, [])])] if name in _LARGEST else [*kept.get(name, []), value]


def probe_numbers(rows: Iterable[ProbeRow]) -> dict[str, float]:
    """A measurement of the retention probe by names for trackers: drift, drift_stderr, probe_entropy, drift_KIND."""
    numbers: dict[str, float | None] = {}
    for row in rows:
        if row["group"] == "all":
            numbers |= {"drift": row["drift_nats_per_token"], "drift_stderr": row["stderr"]}
            numbers["probe_entropy"] = row["entropy"]
        else:
            numbers[f"drift_{row['group']}"] = row["drift_nats_per_token"]
    return {name: value for name, value in numbers.items() if value is not None}


def tell_trackers(trainer: PSFTTrainer, numbers: dict[str, float]) -> None:
    """Log numbers at the current step now. TRL's own `log` would send what was kept with them."""
    from transformers import Trainer  # here, so that a configuration comes without the trainer

    is_log_due = trainer.control.should_log
    Trainer.log(trainer, numbers)
    trainer.control.should_log = is_log_due  # the Trainer takes any log for the one that was due
