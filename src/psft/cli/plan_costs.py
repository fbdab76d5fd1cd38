"""The table of memory and time in `psft plan`: what the objective's passes and reference add, device by device."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from psft.models import estimate

if TYPE_CHECKING:
    from psft.models.architectures import Architecture
    from psft.objectives import Objective


@dataclass(frozen=True)
class Lengths:
    """Tokens of a training row. is_bound: not counted, both are max_length. num_rows: None if unknown."""

    longest: int
    mean: float
    is_bound: bool
    num_rows: int | None


@dataclass(frozen=True)
class DeviceCost:
    """What a run takes on one kind of device. num_devices: 0 = it does not fit. seconds: of all steps, at that number;
    None = not known."""

    device: str
    num_devices: int
    seconds: float | None


_recorded: ContextVar[list[DeviceCost] | None] = ContextVar("recorded", default=None)


@contextlib.contextmanager
def recording() -> Iterator[list[DeviceCost]]:
    """What is estimated inside, as numbers: a pipeline's plan adds up what its stages' plans print."""
    found: list[DeviceCost] = []
    token = _recorded.set(found)
    try:
        yield found
    finally:
        _recorded.reset(token)


@dataclass(frozen=True)
class Extras:
    """What a method costs beyond SFT. Parameters count those of the reference; 0 where it needs none.

    num_mini_batches: K of the old pass, 1 without one. copied: in a frozen copy. streamed: of a forward pass at every
    step. scored_once: of one pass over the training set.
    """

    num_mini_batches: int
    copied: int
    streamed: int
    scored_once: int


def cost_lines(
    model: Architecture,
    reference: Architecture | None,
    lengths: Lengths,
    arguments: Any,
    settings: Any,
    objective: Objective,
    *,
    num_steps: int | None,
) -> list[str]:
    """Lines of text.

    Args:
        reference: sizes of the objective's reference, if it has one; None if they are not known.
        arguments: `ModelArguments`. settings: a resolved `PSFTConfig`.
        num_steps: optimizer steps of the run; None if not known.
    """
    extras = _extras(model, reference or model, objective, arguments, settings)
    rows = settings.mini_batch_size
    lines = cost_table(model, extras, lengths, arguments, settings, rows_per_step=rows, num_steps=num_steps)
    if reference is None and (extras.streamed or extras.scored_once):
        lines.append("  the reference's sizes are not at hand; it is counted as large as the model.")
    return lines


def cost_table(
    model: Architecture,
    extras: Extras,
    lengths: Lengths,
    arguments: Any,
    settings: Any,
    *,
    rows_per_step: int,
    num_steps: int | None,
) -> list[str]:
    """Lines of text: sizes, then memory and time by device, then how they were reckoned.

    Args:
        arguments: `ModelArguments`. settings: has max_tokens_per_micro_batch and gradient_checkpointing.
        num_steps: optimizer steps of the run; None if not known.
    """
    trainable = estimate.lora_parameters(model, arguments.lora_r) if arguments.use_peft else model.num_parameters
    parameters = f"{model.num_parameters:,}" + (f", about {trainable:,} trained" if arguments.use_peft else "")
    if extras.copied:
        parameters += f"; {extras.copied:,} in the frozen reference"
    mean = f"{lengths.mean:,.0f}" + (": max_length, so an upper bound" if lengths.is_bound else " on average")
    lines = [f"  parameters      {parameters}", f"  tokens per row  {mean}"]
    rows: list[tuple[str, ...]] = [("device", "micro-batch", "needed", "fewest devices", "one step", "all steps")]
    for device in (*estimate.ACCELERATORS, estimate.this_cpu()):
        rows.append(
            _device_row(device, model, extras, trainable, lengths, arguments, settings, rows_per_step, num_steps)
        )
    return [*lines, *in_columns(rows), *_footnotes(extras)]


def in_columns(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Rows of equal length as lines, their cells aligned."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]


def _extras(
    model: Architecture, reference: Architecture, objective: Objective, arguments: Any, settings: Any
) -> Extras:
    is_adapter_off = arguments.use_peft and settings.ref_model_name_or_path is None
    size = reference.num_matmul_parameters
    return Extras(
        num_mini_batches=settings.train_batch_size // settings.mini_batch_size if objective.needs_old_logps else 1,
        copied=reference.num_parameters if objective.needs_ref_vocabulary and not is_adapter_off else 0,
        streamed=size if objective.needs_ref_vocabulary else 0,
        scored_once=size if objective.needs_ref_logps else 0,
    )


def _device_row(
    device: estimate.Device,
    model: Architecture,
    extras: Extras,
    trainable: int,
    lengths: Lengths,
    arguments: Any,
    settings: Any,
    rows_per_step: int,
    num_steps: int | None,
) -> tuple[str, ...]:
    on_cpu = device.name.startswith("this CPU")
    cap = settings.max_tokens_per_micro_batch
    tokens = max(lengths.longest, (1024 if on_cpu else 8192) if cap == "auto" else int(cap))
    memory = estimate.estimate_memory(
        model,
        micro_batch_tokens=tokens,
        trainable_parameters=trainable,
        bf16_autocast=not on_cpu,
        pure_bf16=arguments.dtype == "bfloat16",
        gradient_checkpointing=settings.gradient_checkpointing,
        reference_parameters=extras.copied,
        has_reference_logits=bool(extras.streamed),
    )
    count = 1 if on_cpu else estimate.fewest_devices(memory, device)
    fits = memory.total() <= device.memory_gib * estimate.GIB
    step_s = estimate.seconds_per_step(
        model,
        device,
        tokens_per_step=lengths.mean * rows_per_step,
        num_mini_batches=extras.num_mini_batches,
        gradient_checkpointing=settings.gradient_checkpointing,
        reference_matmul_parameters=extras.streamed,
    ) / (count or 1)
    once_s = estimate.seconds_of_forward(
        extras.scored_once, device, num_tokens=(lengths.num_rows or 0) * lengths.mean
    ) / (count or 1)
    devices = ("1" if fits else "does not fit") if on_cpu else (str(count) if count else "more than 64")
    needed = f"{memory.total() / estimate.GIB:.1f} GiB"
    if (recorded := _recorded.get()) is not None:
        seconds = None if num_steps is None else step_s * num_steps + once_s
        recorded.append(DeviceCost(device.name, int(devices) if devices.isdigit() else 0, seconds))
    if not devices.isdigit():
        return device.name, f"{tokens} tok", needed, devices, "-", "-"
    total = "unknown" if num_steps is None else duration(step_s * num_steps + once_s)
    return device.name, f"{tokens} tok", needed, devices, duration(step_s), total


def _footnotes(extras: Extras) -> list[str]:
    shares = ", ".join(f"{device.name} {device.utilisation:.0%}" for device in estimate.ACCELERATORS)
    cpu = f"CPU {estimate.CPU_UTILISATION:.0%} (its peak measured now, in float32)"
    operations = "6 N per token"
    if extras.num_mini_batches > 1:
        operations += ", + 2 N (K-1)/K for old passes"
    if extras.streamed:
        operations += ", + 2 N of the reference for its forward pass at every step"
    lines = [
        "  needed: on one device, unsharded. Several devices: states sharded (FSDP or ZeRO-3), time at their number.",
        f"  assumed share of the peak: {shares}, {cpu}.",
        f"  operations: {operations}, + 2 N for checkpointing. Tiny models take longer.",
    ]
    if extras.scored_once:
        lines.append("  all steps: includes 2 N of the reference once for every token of the training set.")
    return lines


def duration(seconds: float) -> str:
    """In the largest unit that leaves two digits or so."""
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 100:
        return f"{seconds:.1f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
