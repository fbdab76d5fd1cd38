"""Find how many padded tokens one forward and backward pass may have, by running a few small ones and a line through
what they took.

A micro-batch of rows of one length takes memory in proportion to their number, whatever attention makes of a row's own
length. So all probes have rows of the data's longest length: a micro-batch of shorter rows takes less than the line.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from psft.errors import RunFailed
from psft.trainers.device_meter import DeviceMeter, is_out_of_memory

SAFE_SHARE = 0.85
"""Of the free memory: the rest is for fragments, which no line foresees. Not yet held against a real accelerator."""
_LEAST_PROBE_TOKENS = 512  # below, the chunks of the head are not full and the line would be too steep
_GRAIN = 64  # tokens; a cap is a multiple of it, so that small differences in free memory give the same one


@dataclass(frozen=True)
class MeasuredCap:
    """tokens: the cap. row_tokens: of the longest row. free_bytes: what micro-batches may have, before `SAFE_SHARE`.
    bytes_at_cap: what a micro-batch of `tokens` takes.

    probes: (tokens, bytes above what lay there before) of each pass. bytes_per_token: slope of the line through the two
    largest; None where one probe was enough.
    """

    tokens: int
    row_tokens: int
    free_bytes: int
    bytes_at_cap: int
    probes: list[tuple[int, int]]
    bytes_per_token: float | None


def measure_cap(
    run: Callable[[int], None],
    meter: DeviceMeter,
    *,
    row_tokens: int,
    most_rows: int,
    reserved_bytes: int,
    least: Callable[[int], int],
) -> MeasuredCap:
    """Run micro-batches of 1, a few and many rows, and see what they take.

    Args:
        run: a forward and backward pass of so many of the longest rows; it may run out of memory.
        row_tokens: tokens of the longest row.
        most_rows: rows of the largest mini-batch on this device: no micro-batch can have more.
        reserved_bytes: still to be allocated before the first optimizer step is over, beside micro-batches.
        least: the smallest of a number over all ranks. Every rank calls it equally often.
    Returns:
        the same cap on every rank: at least one row, at most `most_rows`.
    Raises:
        RunFailed: the longest row does not fit alone.
    """

    def peak_of(num_rows: int) -> int | None:
        """Bytes above what lay there before, or None if any rank ran out."""
        meter.release()
        before = meter.in_use()
        meter.reset_peak()
        has_room = _has_room(run, num_rows)
        taken = meter.peak() - before
        return taken if least(int(has_room)) else None

    if peak_of(1) is None:  # it also allocates what stays: gradients, workspaces of the libraries
        raise RunFailed(no_room_for_a_row(row_tokens))
    meter.release()
    free = least(meter.free() - reserved_bytes)
    first = min(math.ceil(_LEAST_PROBE_TOKENS / row_tokens), most_rows)
    probes: list[tuple[int, int]] = []
    most_tokens = most_rows * row_tokens

    def probe(num_rows: int) -> None:
        """Add a larger probe, or keep to what ran before."""
        nonlocal most_tokens
        num_tokens = num_rows * row_tokens
        if num_tokens > most_tokens or (probes and num_tokens <= probes[-1][0]):
            return
        taken = peak_of(num_rows)
        if taken is not None:
            probes.append((num_tokens, taken))
        elif probes:
            most_tokens = probes[-1][0]

    room = SAFE_SHARE * free
    probe(first)
    while not probes and first > 1:
        most_tokens, first = (first - 1) * row_tokens, first // 2
        probe(first)
    if not probes:
        raise RunFailed(no_room_for_a_row(row_tokens))
    if first > 1 and not least(int(probes[0][1] <= room)):
        # It runs now, and would not once the optimizer has its moments: a second point below it gives the line.
        taken = peak_of(first // 2)
        if taken is not None:
            probes.insert(0, (first // 2 * row_tokens, taken))
    else:
        probe(min(2 * first, most_tokens // row_tokens))
    if len(probes) == 2:
        half = _tokens_in(room / 2, probes)
        probe(least(min(most_rows, int(half // row_tokens) if half < most_tokens else most_rows)))
    tokens = most_tokens
    if len(probes) > 1:
        tokens = int(min(tokens, _tokens_in(room, probes)))
    if tokens < most_tokens:
        tokens -= tokens % _GRAIN
    tokens = least(max(tokens, row_tokens))
    slope = _slope(probes) if len(probes) > 1 else None
    at_cap = probes[-1][1] + int((slope or 0.0) * (tokens - probes[-1][0]))
    return MeasuredCap(tokens, row_tokens, free, at_cap, probes, slope)


def no_room_for_a_row(row_tokens: int) -> str:
    """What to do where even one row does not fit."""
    return (
        f"the longest row, {row_tokens} tokens, does not fit into this device's memory alone. Lower max_length, set "
        "gradient_checkpointing=true, train an adapter (use_peft=true), or share the model between devices: "
        "--accelerate fsdp2."
    )


def _has_room(run: Callable[[int], None], num_rows: int) -> bool:
    try:
        run(num_rows)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return False
    return True


def _slope(probes: list[tuple[int, int]]) -> float:
    """Bytes a token, of the line through the two largest probes."""
    (tokens, taken), (more_tokens, more_taken) = probes[-2:]
    return (more_taken - taken) / (more_tokens - tokens)


def _tokens_in(room: float, probes: list[tuple[int, int]]) -> float:
    """Where that line reaches `room` bytes; infinite if it does not rise."""
    tokens, taken = probes[-1]
    slope = _slope(probes)
    return tokens + (room - taken) / slope if slope > 0 else math.inf
