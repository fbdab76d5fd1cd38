"""Laws of thinning: what a person looks for in a curve is still there."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from psft.reports.sampling import running_mean, thin, thin_band

values = st.lists(st.one_of(st.floats(-1e9, 1e9), st.just(float("nan"))), min_size=1, max_size=400).map(np.array)


@given(values, st.integers(4, 60))
def test_ends_and_extremes_stay_and_the_budget_holds(series, most):
    """Goes red if a bucket keeps its first point alone, or the last bucket is forgotten."""
    kept = thin(series, most)
    assert len(kept) <= max(most, 4) and (np.diff(kept) > 0).all()
    assert kept[0] == 0 and kept[-1] == len(series) - 1
    if np.isfinite(series).any():
        assert np.nanmax(series[kept]) == np.nanmax(series) and np.nanmin(series[kept]) == np.nanmin(series)


@given(values, st.integers(4, 60))
def test_every_stretch_keeps_its_own_extremes(series, most):
    """Goes red if extremes are taken over the whole series alone: of every bucket the largest must be shown."""
    kept = set(thin(series, most).tolist())
    if len(series) <= most:
        assert kept == set(range(len(series)))
        return
    num_buckets = (most - 2) // 2
    width = -(-(len(series) - 2) // num_buckets)
    for start in range(1, len(series) - 1, width):
        bucket = series[start : min(start + width, len(series) - 1)]
        if np.isfinite(bucket).any():
            shown = [series[i] for i in range(start, start + len(bucket)) if i in kept]
            assert np.nanmax(bucket) in shown and np.nanmin(bucket) in shown


@given(st.integers(0, 999), st.integers(0, 999), st.integers(8, 60))
def test_a_band_keeps_the_extremes_of_both_edges(dip, peak, most):
    """Goes red if only the mean, or only one edge, is looked at."""
    mean = np.random.default_rng(0).random(1000)
    low, high = mean - 1, mean + 1
    low[dip], high[peak] = -5, 5
    kept = thin_band(mean, low, high, most)
    assert {0, 999, dip, peak} <= set(kept.tolist()) and len(kept) <= most + 4


def test_a_peak_of_one_step_in_a_million_is_there():
    """Goes red if the series is thinned by taking every n-th point."""
    series = np.zeros(1_000_000)
    series[123_457] = 5.0
    assert 123_457 in thin(series, 40)


@given(values, st.integers(1, 50))
def test_the_running_mean_is_the_mean_of_the_last_points(series, width):
    """Goes red if it looks ahead, counts NaN as 0, or divides by the width at the beginning."""
    means = running_mean(series, width, np.arange(len(series)))
    for i, mean in enumerate(means):
        part = series[max(0, i + 1 - width) : i + 1]
        part = part[np.isfinite(part)]
        assert np.isnan(mean) if not len(part) else np.isclose(mean, part.mean())
