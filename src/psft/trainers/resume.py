"""What a checkpoint holds beside the Hugging Face Trainer's files, so that a run goes on to the same bits.

The place in the data, what is left of the open window with its old log-probs, the trust region, the reference's scores,
and the identity of the run: what must be the same for the numbers to go on as if nothing had happened.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import broadcast_object_list
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from psft.config import CHANGES
from psft.data.table import dataset_digest
from psft.errors import RequestError
from psft.ops.precision import matmul_precision
from psft.runs.checkpoints import Checkpoint, newest_complete, what_is_wrong
from psft.runs.folder import to_json
from psft.window import Step, Window

if TYPE_CHECKING:
    from psft.trainers.durability import Durability
    from psft.trainers.durable import DurableTrainer

logger = logging.getLogger(__name__)

STATE_FILE = "psft_state.json"
FORMAT = 1
_WATCHED = (
    "learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay", "max_grad_norm", "num_train_epochs",
    "max_steps", "bf16", "fp16", "adam_beta1", "adam_beta2", "optim", "gradient_checkpointing",
)  # fmt: skip
"""Settings a person may change on purpose: announced, not refused."""


_ENGINES = {"plain": "without sharding", "fsdp": "with FSDP", "deepspeed": "with DeepSpeed"}


@dataclass(frozen=True)
class Position:
    """Where in the data a run stands: optimizer steps of `epoch` (0-based) that are done, and rows they took."""

    epoch: int
    step_in_epoch: int
    row: int


@dataclass(frozen=True)
class ResumePoint:
    """One complete checkpoint, read.

    is_same_run: nothing that `CHANGES` lists differs. keeps_window: the open window goes on where it was; else it is
    dropped and the run restarts at the next window boundary.
    """

    path: Path
    step: int
    position: Position
    is_same_run: bool
    keeps_window: bool
    state: Mapping[str, Any]

    def open_window(
        self, trainer: DurableTrainer
    ) -> tuple[list[Step], list[list[list[int]]], dict[Any, Tensor]] | None:
        """Steps, row numbers by micro-batch and old log-probs of what was left of the window, or None."""
        path = self.path / _window_file(trainer.args.process_index)
        if not self.keeps_window or not path.exists():
            return None
        device = trainer.args.device
        with safe_open(path, framework="pt", device="cpu" if device.type == "cpu" else str(device)) as file:
            layout = json.loads(file.metadata()["layout"])
            old_logps = {tuple(map(int, key.split("."))): file.get_tensor(key) for key in file.keys()}
        return [Step(**step) for step in layout["steps"]], layout["rows"], old_logps


def watched_settings(args: Any) -> dict[str, Any]:
    """Settings that may change on purpose, and what is in force in this process, of which the last bits may follow."""
    return {
        **{name: getattr(args, name) for name in _WATCHED},
        "matmul_precision": matmul_precision(),
        "num_threads": torch.get_num_threads() if args.device.type == "cpu" else None,
    }


def identity_of(trainer: DurableTrainer) -> dict[str, Any]:
    """What the numbers of a run follow from, by the names of `CHANGES`, and the settings that are watched."""
    args = trainer.args
    return to_json(
        {
            "data": dataset_digest(trainer.train_dataset),
            "objective": {"name": trainer.objective.name, **trainer.objective.settings},
            "batch_sizes": {
                name: getattr(args, name)
                for name in (
                    "train_batch_size", "mini_batch_size", "max_tokens_per_micro_batch", "padding_free",
                    "sft_warmup_steps", "sft_warmup_mini_batch_size", "dataloader_drop_last", "loss_aggregation",
                )
            },
            "world_size": args.world_size,
            "seed": {"seed": args.seed, "data_seed": args.data_seed, "order": args.train_sampling_strategy},
            "watched": {
                **watched_settings(args), "head_kernel": trainer.head_kernel, "attention": trainer.attention,
            },
        }
    )  # fmt: skip


def save_state(trainer: DurableTrainer, folder: Path, position: Position, window: Window | None) -> None:
    """Write this rank's part of the state into a checkpoint's folder, and on the first rank the common part."""
    args = trainer.args
    if window is not None and not window.is_spent:
        steps, mini_batches, old_logps = window.remaining()
        rows = [[list(micro_batch["row_numbers"]) for micro_batch in mini_batch] for mini_batch in mini_batches]
        layout = json.dumps({"steps": [asdict(step) for step in steps], "rows": rows})
        tensors = {f"{k}.{i}": logps.cpu().contiguous() for (k, i), logps in old_logps.items()}
        save_file(tensors, folder / _window_file(args.process_index), metadata={"layout": layout})
    if trainer.clipped_tokens is not None:
        trainer.clipped_tokens.save(folder)
    if not trainer.is_world_process_zero():
        return
    trainer.watch.save(folder)
    if trainer.reference is not None:
        trainer.reference.save(folder)
    state = {
        "format": FORMAT,
        "step": trainer.state.global_step,
        "position": asdict(position),
        "engine": engine_of(trainer),
        "identity": trainer.identity,
        "trust_region": trainer.trust_region.state_dict(),
        "num_train_tokens": trainer._total_train_tokens,
        "bad_steps_in_a_row": trainer.bad_steps.in_a_row,
        "is_evaluated": trainer.recorder.last_evaluated_step == trainer.state.global_step,
        "num_eval_rows": trainer.recorder.num_eval_rows,
        "micro_batch_cap": trainer.micro_batch_cap.state_dict(),
        "benchmarks": None if trainer.benchmarks is None else trainer.benchmarks.state_dict(),
    }
    (folder / STATE_FILE).write_text(json.dumps(state, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def find_checkpoint(trainer: Durability, named: str | Path | None) -> Path | None:
    """The checkpoint to go on from: the one that is named, or the newest complete one; None to begin at the start.

    Raises:
        RequestError: the named one is missing or incomplete.
    """
    if named is not None:
        path = Path(named)
        problem = _by_first_rank(trainer, lambda: what_is_wrong(path) if path.is_dir() else "there is no such folder")
        if problem is not None:
            raise RequestError(
                f"checkpoint {path} cannot be resumed from: {problem}. Name another, or let --resume choose."
            )
        return path
    found: tuple[Checkpoint | None, list[Checkpoint]]
    found = _by_first_rank(trainer, lambda: newest_complete(Path(str(trainer.args.output_dir))))
    chosen, passed_over = found
    for checkpoint in passed_over:
        logger.warning("checkpoint %s is passed over: %s.", checkpoint.path, checkpoint.problem)
    if chosen is None:
        logger.warning("no complete checkpoint in %s: the run starts at the beginning.", trainer.args.output_dir)
        return None
    return chosen.path


def read_state(trainer: Durability, path: Path) -> dict[str, Any]:
    """What psft wrote into a checkpoint.

    Raises:
        RequestError: it holds no state of psft, of another version, or one written by another engine.
    """
    try:
        state: dict[str, Any] = json.loads((path / STATE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RequestError(
            f"checkpoint {path} holds no {STATE_FILE} of a psft run ({type(error).__name__}). To start a new run from "
            "its weights give it as --model_name_or_path."
        ) from error
    if state.get("format") != FORMAT:
        raise RequestError(
            f"checkpoint {path} has format {state.get('format')}; this version reads {FORMAT}. Resume it with the "
            "version that wrote it, or start a new run from its weights."
        )
    if state.get("engine", "plain") != engine_of(trainer):
        written, wanted = (_ENGINES[name] for name in (state.get("engine", "plain"), engine_of(trainer)))
        raise RequestError(
            f"checkpoint {path} was written {written} and this run trains {wanted}, which keeps weights and moments in "
            "another form. Resume it as it was begun, or start a new run from its weights: --model_name_or_path "
            f"{path}."
        )
    return state


def check_identity(trainer: Durability, path: Path, before: Mapping[str, Any], *, onward: str) -> list[str]:
    """Hold a checkpoint's run against this one. Returns which of `CHANGES` differ; watched settings are announced.

    Args:
        before: the identity in the checkpoint.
        onward: where a run with allowed changes goes on, for the message.
    Raises:
        RequestError: something differs that `allow_changed` does not name.
    """
    now = trainer.identity
    changed = [name for name in CHANGES if before[name] != now[name]]
    allowed = set(trainer.args.allow_changed or [])
    refused = [name for name in changed if name not in allowed]
    if refused:
        differences = "; ".join(f"{name}: {_difference(before[name], now[name])}" for name in refused)
        raise RequestError(
            f"this is not the run that {path} was written by. {differences}. Give what it had, or go on all the same, "
            f"{onward}, with --allow_changed {','.join(refused)}."
        )
    watched = {n: (before["watched"].get(n), v) for n, v in now["watched"].items() if before["watched"].get(n) != v}
    for name, (old, new) in watched.items():
        logger.warning("%s was %s and is %s now: the run goes on, but not to the same bits.", name, old, new)
    return changed


def read_resume_point(trainer: DurableTrainer, path: Path) -> ResumePoint:
    """Read a checkpoint and hold it against the run that is to go on from it.

    Raises:
        RequestError: it holds no state of psft, or something of `CHANGES` differs and `allow_changed` does not name it.
    """
    state = read_state(trainer, path)
    changed = check_identity(trainer, path, state["identity"], onward="from the next window on")
    position = Position(**state["position"])
    why = f"{', '.join(changed)} changed" if changed else None
    if not changed and trainer.micro_batch_cap.resume(
        state.get("micro_batch_cap"), _largest_micro_batch(trainer, path)
    ):
        why = (
            f"memory ran out since this checkpoint, and its open window has micro-batches of more than the "
            f"{trainer.micro_batch_cap.tokens} padded tokens that are kept to now"
        )
    if why is not None:
        position = _next_boundary(trainer, position, is_other_data="data" in changed)
        logger.warning(
            "%s: the open window is dropped and the run goes on at the next window boundary, step %d of epoch %d.",
            why,
            position.step_in_epoch,
            position.epoch,
        )
    return ResumePoint(path, int(state["step"]), position, not changed, why is None, state)


def _largest_micro_batch(trainer: DurableTrainer, path: Path) -> int:
    """Padded tokens of the largest micro-batch in what a checkpoint left of the open window on this rank."""
    file_path = path / _window_file(trainer.args.process_index)
    if not file_path.exists():
        return 0
    with safe_open(file_path, framework="pt") as file:
        layout = json.loads(file.metadata()["layout"])["rows"]
    lengths = trainer.row_lengths
    groups = [[lengths[row] for row in group] for mini_batch in layout for group in mini_batch if group]
    return max((sum(group) if trainer.padding_free else len(group) * max(group) for group in groups), default=0)


def position_after(trainer: DurableTrainer, epoch: int, step: Step | None, num_steps: int) -> Position:
    """The position once `step`, the last of `num_steps` done in `epoch`, is done."""
    if step is None:
        return Position(epoch, 0, 0)
    if num_steps >= len(trainer.schedule().epoch(epoch)):
        return Position(epoch + 1, 0, 0)
    return Position(epoch, num_steps, step.stop)


def _next_boundary(trainer: DurableTrainer, position: Position, *, is_other_data: bool) -> Position:
    """The first step at or after the position at which a window of the present schedule begins."""
    if is_other_data:
        return position if position.row == 0 else Position(position.epoch + 1, 0, 0)
    for number, step in enumerate(trainer.schedule().epoch(position.epoch)):
        if step.mini_batch == 1 and step.start >= position.row:
            return Position(position.epoch, number, step.start)
    return Position(position.epoch + 1, 0, 0)


def _by_first_rank(trainer: Durability, look: Callable[[], Any]) -> Any:
    """What the first rank finds, on every rank: what changes while they look cannot part them, and one reads enough."""
    if trainer.args.world_size == 1:
        return look()
    found = [look() if trainer.is_world_process_zero() else None]
    return broadcast_object_list(found)[0]


def engine_of(trainer: Durability) -> str:
    """`plain`, `fsdp` or `deepspeed`."""
    return "deepspeed" if trainer.is_deepspeed_enabled else "fsdp" if trainer.is_fsdp_enabled else "plain"


def _difference(before: Any, now: Any) -> str:
    if isinstance(before, dict) and isinstance(now, dict):
        names = [name for name in sorted({*before, *now}) if before.get(name) != now.get(name)]
        return ", ".join(f"{name} was {before.get(name)} and is {now.get(name)}" for name in names)
    if isinstance(before, str) and len(before) == 64:
        return "the training rows are others than they were"
    return f"it was {before} and is {now}"


def _window_file(rank: int) -> str:
    return f"psft_window-rank{rank}.safetensors"
