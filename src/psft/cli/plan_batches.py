"""The part of `psft plan` about micro-batches: the cap, as far as it is known, and what padding costs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from psft.objectives import Objective

_MINI_BATCHES_LOOKED_AT = 64


def micro_batch_facts(
    lengths: Sequence[int] | None,
    model_folder: Path | None,
    arguments: Any,
    settings: Any,
    objective: Objective,
    *,
    num_ranks: int,
) -> list[tuple[str, str]]:
    """Lines of text: name and value.

    Args:
        lengths: tokens of each training row; None if they are not at hand.
        model_folder: with the model's config.json; None if it is not at hand.
        arguments: `ModelArguments`. settings: a resolved `PSFTConfig`.
    Raises:
        RequestError: an attention that this machine cannot train, or none for padding_free on its accelerator.
    """
    from psft.trainers.remembered_cap import UNMEASURED_TOKENS

    cap, how = _cap(lengths, model_folder, settings, objective, num_ranks)
    facts = [("layout", _layout(model_folder, arguments, settings)), ("largest micro-batch", how)]
    if not lengths:
        return facts
    if settings.padding_free:
        return [*facts, ("padding", "none: the rows of a micro-batch are joined (padding_free)")]
    on_cpu = settings.device.type == "cpu"
    share, number = padding(lengths, settings, cap, on_cpu=on_cpu, num_ranks=num_ranks)
    facts.append(("micro-batches", f"{number:.1f} a mini-batch and device"))
    if not on_cpu:
        return [*facts, ("padding", f"{share:.1%} of the tokens that are computed; padding_free=true would save it")]
    there = UNMEASURED_TOKENS if settings.max_tokens_per_micro_batch == "auto" else cap
    elsewhere, _ = padding(lengths, settings, there, on_cpu=False, num_ranks=num_ranks)
    facts.append(("padding", f"{share:.1%} of the tokens that are computed (padding_free=true is slower on a CPU)"))
    return [*facts, ("on an accelerator", f"{elsewhere:.1%} at {there} tokens; there padding_free=true would save it")]


def _layout(model_folder: Path | None, arguments: Any, settings: Any) -> str:
    from psft.models.attention import choose_attention

    device_type = settings.device.type
    attention = choose_attention(
        arguments.attn_implementation,
        model_folder,
        padding_free=bool(settings.padding_free),
        is_half=bool(settings.bf16 or settings.fp16 or arguments.dtype == "bfloat16"),
        device_type=device_type,
        trust_remote_code=settings.trust_remote_code,
    )
    named = attention.name or "as transformers chooses (sdpa where the model has it)"
    if not settings.padding_free:
        return f"padded rows; attention: {named}"
    if attention.why is not None:
        return attention.why.replace("padding_free:", "joined rows (padding_free);")
    slower = "; on a CPU it computes the whole square, and padded rows are faster" if device_type == "cpu" else ""
    return f"joined rows (padding_free); attention: {named}{slower}"


def padding(lengths: Sequence[int], settings: Any, cap: int, *, on_cpu: bool, num_ranks: int) -> tuple[float, float]:
    """Share of padding in all that is computed, and micro-batches of a mini-batch on one device, in the first epoch.

    Looks at the beginning of the epoch only, in the order in which training reads it.
    """
    from psft.data.microbatch import ACCELERATOR_OVERHEAD_TOKENS, CPU_OVERHEAD_TOKENS, Cut
    from psft.trainers.loader import WindowSampler
    from psft.window.schedule import Schedule

    cut = Cut(cap, is_hard=False, overhead_tokens=CPU_OVERHEAD_TOKENS if on_cpu else ACCELERATOR_OVERHEAD_TOKENS)
    schedule = Schedule(
        len(lengths),
        settings.train_batch_size,
        settings.mini_batch_size,
        drop_last=settings.dataloader_drop_last,
    )
    seed = settings.seed if settings.data_seed is None else settings.data_seed
    real = padded = groups = steps = 0
    for rank in range(num_ranks):
        sampler = WindowSampler(
            schedule, lengths=lengths, cut=cut, seed=seed, is_shuffled=settings.train_sampling_strategy == "random",
            rank=rank, world_size=num_ranks,
        )  # fmt: skip
        for layout in islice(sampler, _MINI_BATCHES_LOOKED_AT):
            sizes = [[lengths[row] for row in group if row >= 0] for group in layout]
            real += sum(sum(group) for group in sizes)
            padded += sum(len(group) * max(group, default=0) for group in sizes)
            groups, steps = groups + len(sizes), steps + 1
    return 1 - real / padded, groups / steps


def _cap(
    lengths: Sequence[int] | None, model_folder: Path | None, settings: Any, objective: Objective, num_ranks: int
) -> tuple[int, str]:
    """The cap as far as it is known, and in words."""
    from psft.trainers.device_meter import meter_of
    from psft.trainers.remembered_cap import CPU_TOKENS, UNMEASURED_TOKENS, caps_folder, config_digest, matching_caps

    given = settings.max_tokens_per_micro_batch
    if given != "auto":
        return int(given), f"{given} padded tokens"
    meter = meter_of(settings.device)
    known: dict[str, Any] = {
        "device": "cpu" if meter is None else meter.name,
        "needs": sorted(objective.needs),
        "gradient_checkpointing": bool(settings.gradient_checkpointing),
        "padding_free": bool(settings.padding_free),
        "world_size": num_ranks,
    }
    found = []
    if lengths and model_folder is not None and caps_folder().is_dir():  # else no run has remembered one
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(model_folder, trust_remote_code=settings.trust_remote_code)
        known |= {
            "model": config_digest(config.to_dict()),
            "row_tokens": max(lengths),
            "most_rows": math.ceil(settings.most_rows_per_step / num_ranks),
        }
        found = list(matching_caps(caps_folder(), **known))
    if found:
        why = "lowered since memory ran out" if found[0].lowered_from is not None else "measured by an earlier run"
        return found[0].tokens, f"auto: {found[0].tokens} padded tokens, {why} on {found[0].depends_on['device']}"
    if settings.device.type == "cpu":
        return CPU_TOKENS, f"auto: {CPU_TOKENS} padded tokens on this CPU; on an accelerator measured at start"
    if meter is None:
        return UNMEASURED_TOKENS, f"auto: {UNMEASURED_TOKENS} padded tokens; memory is not measured on this device"
    return UNMEASURED_TOKENS, f"auto: measured at start on {meter.name}; {UNMEASURED_TOKENS} is taken below"
