"""Fewer points of a long series, without losing what a person looks for: its ends and its extremes."""

from __future__ import annotations

import numpy as np


def thin(values: np.ndarray, most: int) -> np.ndarray:
    """Which points of a series to show: at most `most` indices, rising, the first and the last among them.

    The points between are cut into buckets of equal length, and of each the smallest and the largest value stay. So a
    peak that lasts one step is there however long the run was. NaN (no value) is never an extreme; a bucket that holds
    nothing else keeps its first point, so that a gap stays a gap.

    Args:
        values: (n,) float.
        most: 4 or more.
    """
    n = len(values)
    assert most >= 4, most
    if n <= most:
        return np.arange(n)
    inner = values[1:-1]
    num_buckets = (most - 2) // 2
    width = -(-len(inner) // num_buckets)
    num_buckets = -(-len(inner) // width)
    padded = np.full(num_buckets * width, np.nan)
    padded[: len(inner)] = inner
    buckets = padded.reshape(num_buckets, width)
    is_missing = np.isnan(buckets)
    starts = np.arange(num_buckets) * width
    lowest = starts + np.where(is_missing, np.inf, buckets).argmin(axis=1)  # all missing: argmin is the first
    highest = starts + np.where(is_missing, -np.inf, buckets).argmax(axis=1)
    return np.unique(np.concatenate([[0], lowest + 1, highest + 1, [n - 1]]))


def thin_band(mean: np.ndarray, low: np.ndarray, high: np.ndarray, most: int) -> np.ndarray:
    """The same for a line inside a band: the extremes of the band's two edges stay."""
    if len(mean) <= most:
        return np.arange(len(mean))
    half = max(most // 2, 4)
    return np.union1d(thin(low, half), thin(high, half))


def running_mean(values: np.ndarray, width: int, at: np.ndarray) -> np.ndarray:
    """(len(at),) mean of the last `width` values up to each index of `at`, fewer at the beginning; NaN left out."""
    means = np.full(len(at), np.nan)
    for i, end in enumerate(at):
        part = values[max(end + 1 - width, 0) : end + 1]
        part = part[np.isfinite(part)]
        if len(part):
            means[i] = part.mean()
    return means
