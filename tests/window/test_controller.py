"""Laws of the trust-region controller, and where it settles on simulated windows."""

import json
import math
from itertools import pairwise
from statistics import NormalDist, fmean

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from psft.errors import RequestError
from psft.window.controller import TrustRegionController

PAIRS = [
    ("clip_fraction", "epsilon", +1),
    ("clip_fraction", "window", -1),
    ("drift", "epsilon", -1),
    ("drift", "window", -1),
]
pairs = pytest.mark.parametrize(("measures", "adjusts", "sign"), PAIRS)
measurements = st.one_of(st.floats(0, 1), st.floats(0, 1e300), st.sampled_from([math.nan, math.inf, -1.0, None]))
step_lists = st.lists(st.tuples(st.integers(1, 4), st.integers(0, 5000), measurements), max_size=8)


def controller(measures="clip_fraction", adjusts="epsilon", **settings):
    """Limits far apart, target 2 % or 0.02 nats, unless given."""
    limits = {"epsilon": (0.28, 1e-3, 10.0), "window": (8, 2, 64)}.get(adjusts, (1, 1, 2))
    settings = {"target": 0.02, **dict(zip(("value", "minimum", "maximum"), limits, strict=True)), **settings}
    return TrustRegionController(measures=measures, adjusts=adjusts, **settings)


def observe(steered, mini_batch, num_tokens, measured, other=0.5):
    """One step in which the quantity that is not steered reads `other`."""
    both = (measured, other) if steered.measures == "clip_fraction" else (other, measured)
    steered.observe(mini_batch, num_tokens, *both)


def after(measured, **settings):
    """log(new value / old value) of one window that measured `measured`."""
    steered = controller(**settings)
    old = steered.value
    observe(steered, 2, 1000, measured)
    assert steered.window_ends() == measured
    return math.log(steered.value / old)


# --- laws


@pairs
def test_more_than_the_target_moves_the_value_towards_less_of_it_and_the_more_the_further(measures, adjusts, sign):
    """Goes red if a sign in the table is turned, or if the two quantities are exchanged in `observe`."""
    measured = [0.0, 0.005, 0.015, 0.02, 0.03, 0.1, 0.9]
    moves = [sign * after(m, measures=measures, adjusts=adjusts) for m in measured]
    assert moves == sorted(moves) and moves[3] == 0 and moves[2] < 0 < moves[4]
    assert len(set(moves[1:6])) == 5


@pairs
@given(measured=st.floats(0, 1e300), gain=st.floats(0.01, 1), target=st.floats(1e-300, 0.999))
def test_one_window_moves_the_value_by_at_most_a_factor_e_to_the_gain(measures, adjusts, sign, measured, gain, target):
    """Goes red if the error is not clamped. Tiny targets: red, with an exception, if the floor leaves log's domain."""
    move = after(measured, measures=measures, adjusts=adjusts, gain=gain, target=target)
    assert abs(move) <= gain * (1 + 1e-12) + 1e-12


@pairs
@given(target=st.floats(1e-300, 0.999))
def test_a_measured_zero_moves_the_value_by_exactly_the_full_step(measures, adjusts, sign, target):
    """Goes red if zero is skipped as falsy, or if a floor keeps the error short of -1."""
    assert after(0.0, measures=measures, adjusts=adjusts, target=target) == pytest.approx(-sign * 0.5)


def test_a_step_by_hand():
    """Goes red if the log is not divided by log(1/target): the value then moves by 0.5 * log(2).

    Clip fraction 4 % against 2 %: error = log(2) / log(50) = 0.17718, times 0.5, epsilon 0.28 -> 0.28 * e^0.08859.
    Drift 0.04 against 0.02 nats: error = log(2) = 0.69315, times 0.5, K 8 -> 8 * 2^-0.5 = 5.6569, trained as 6.
    """
    clip = controller()
    observe(clip, 2, 100, 0.04)
    assert clip.window_ends() == 0.04 and clip.value == pytest.approx(0.28 * math.exp(0.0885926), rel=1e-6)
    drift = controller("drift", "window")
    observe(drift, 2, 100, 0.04)
    assert drift.window_ends() == 0.04 and drift.value == pytest.approx(5.656854, rel=1e-6)
    assert drift.num_mini_batches == 6


@pairs
@given(windows=st.lists(step_lists, max_size=12))
def test_whatever_is_measured_the_value_stays_a_number_within_its_limits(measures, adjusts, sign, windows):
    """Goes red if the clamp to a limit is dropped, if `is_at_limit` knows one limit only, or if NaN is let in."""
    limits = (0.2, 0.4) if adjusts == "epsilon" else (5, 10)
    steered = controller(measures, adjusts, minimum=limits[0], maximum=limits[1])
    for steps in windows:
        for mini_batch, num_tokens, measured in steps:
            observe(steered, mini_batch, num_tokens, measured)
        steered.window_ends()
        assert limits[0] <= steered.value <= limits[1]
        assert steered.is_at_limit == (steered.value in limits)
        if adjusts == "window":
            assert isinstance(steered.num_mini_batches, int) and limits[0] <= steered.num_mini_batches <= limits[1]


@pairs
def test_a_target_out_of_reach_ends_at_a_limit_and_leaves_it_at_once_when_reachable(measures, adjusts, sign):
    """Goes red if the unclamped value is kept (a wound-up integral takes as many windows back)."""
    steered = controller(measures, adjusts)
    for far, near in ((1.0, 0.0), (0.0, 1.0)):
        for _ in range(40):
            observe(steered, 2, 100, far)
            steered.window_ends()
        assert steered.is_at_limit
        observe(steered, 2, 100, near)
        steered.window_ends()
        assert not steered.is_at_limit


@given(st.lists(st.tuples(st.integers(1, 10_000), st.floats(0, 1)), min_size=1, max_size=9))
def test_the_window_reads_the_mean_over_tokens_not_over_steps(steps):
    """Goes red if steps weigh the same, or if a window begins with what the one before it measured."""
    steered = controller("drift")
    observe(steered, 2, 7777, 0.9)
    steered.window_ends()
    for mini_batch, (num_tokens, measured) in enumerate(steps, start=2):
        observe(steered, mini_batch, num_tokens, measured)
    want = math.fsum(n * m for n, m in steps) / sum(n for n, _ in steps)
    assert steered.window_ends() == pytest.approx(want, rel=1e-12, abs=1e-300)


@pairs
@given(ignored=st.lists(st.tuples(st.sampled_from([math.nan, math.inf, -math.inf, -1.0, None]), st.integers(1, 9))))
def test_mini_batch_1_and_steps_without_tokens_or_numbers_are_as_if_they_had_not_been(measures, adjusts, sign, ignored):
    """Goes red if mini-batch 1 counts, or if a NaN, an inf or a None reaches the mean or takes up tokens."""
    plain, disturbed = controller(measures, adjusts), controller(measures, adjusts)
    observe(disturbed, 1, 500, 0.0)
    assert disturbed.window_ends() is None and disturbed.value == plain.value
    for measured, num_tokens in ignored:
        observe(disturbed, 3, num_tokens, measured)
    observe(disturbed, 2, 0, 0.7)
    assert disturbed.window_ends() is None and disturbed.value == plain.value
    for measured, num_tokens in ignored:
        observe(disturbed, 3, num_tokens, measured)
    for steered in (plain, disturbed):
        observe(steered, 2, 40, 0.05)
        observe(steered, 3, 60, 0.01)
    assert plain.window_ends() == disturbed.window_ends() == pytest.approx(0.026)
    assert plain.value == disturbed.value


def test_small_steps_of_the_window_add_up_before_they_show():
    """Goes red if the rounded number is what is kept: 8 * e^0.03 rounds to 8 for ever."""
    steered = controller("drift", "window")
    seen = []
    for _ in range(4):
        observe(steered, 2, 100, 0.02 * math.exp(-0.06))
        steered.window_ends()
        seen.append(steered.num_mini_batches)
    assert seen == [8, 8, 9, 9]


# --- state


@pairs
@given(first=step_lists, second=step_lists, third=step_lists)
def test_a_state_taken_inside_a_window_goes_on_to_the_bit_through_json(measures, adjusts, sign, first, second, third):
    """Goes red if the open window's mean or tokens are not saved, or if anything is rounded."""
    steered = controller(measures, adjusts)
    for steps in (first, second):
        steered.window_ends()
        for step in steps:
            observe(steered, *step)
    text = json.dumps(steered.state_dict(), allow_nan=False)
    resumed = controller(measures, adjusts)
    observe(resumed, 2, 123, 0.3)  # what a fresh controller saw before loading is forgotten
    resumed.load_state_dict(json.loads(text))
    assert json.dumps(resumed.state_dict()) == text
    for one in (steered, resumed):
        for step in third:
            observe(one, *step)
    assert steered.window_ends() == resumed.window_ends()
    assert steered.value == resumed.value and steered.state_dict() == resumed.state_dict()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target": 0.05}, r"target_clip_fraction=0.05 cannot .* made with target_clip_fraction=0.02"),
        ({"measures": "drift"}, r"target_drift=0.02 cannot .* made with target_clip_fraction=0.02"),
        ({"adjusts": "window"}, r"adjusts='window' .* made with adjusts='epsilon'"),
    ],
)
def test_a_state_of_another_purpose_is_refused_by_name_and_changes_nothing(settings, message):
    """Goes red if one of the three comparisons is left out."""
    state = controller().state_dict()
    other = controller(**settings)
    before = other.state_dict()
    with pytest.raises(RequestError, match=message):
        other.load_state_dict(state)
    assert other.state_dict() == before


def test_a_damaged_state_is_refused_and_new_limits_hold():
    """Goes red if a missing key is a KeyError, a NaN is loaded, or the value is not brought within the new limits."""
    state = controller().state_dict()
    with pytest.raises(RequestError, match="lacks .*'window_tokens'"):
        controller().load_state_dict({k: v for k, v in state.items() if k != "window_tokens"})
    for name in ("value", "window_mean"):
        with pytest.raises(RequestError, match=f"damaged: .*{name}=nan"):
            controller().load_state_dict({**state, name: math.nan})
    narrow = controller(value=0.1, maximum=0.2)
    narrow.load_state_dict(state)
    assert narrow.value == 0.2


# --- arguments


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target": 0.0}, r"target_clip_fraction=0.0 must lie in \(0, 1\)"),
        ({"target": 1.0}, r"target_clip_fraction=1.0 must lie in \(0, 1\)"),
        ({"target": math.nan}, r"target_clip_fraction=nan must lie in \(0, 1\)"),
        ({"measures": "drift", "target": 0.0}, "target_drift=0.0 must be .* greater than 0"),
        ({"measures": "drift", "target": math.inf}, "target_drift=inf must be"),
        ({"measures": "kl"}, "measures='kl' is not known. Use clip_fraction or drift"),
        ({"adjusts": "beta"}, "adjusts='beta' is not known. Use epsilon or window"),
        ({"gain": 0.0}, "gain=0.0 must lie"),
        ({"gain": 1.5}, "gain=1.5 must lie"),
        ({"minimum": 0.0}, "minimum=0.0 and maximum=10.0 of epsilon_high must be greater than 0"),
        ({"maximum": math.inf}, "maximum=inf of epsilon_high must be .* finite"),
        ({"minimum": 1.0, "maximum": 1.0}, "minimum the smaller"),
        ({"value": 20.0}, "epsilon_high=20.0 to start with must lie between minimum=0.001 and maximum=10.0"),
        ({"value": math.nan}, "epsilon_high=nan to start with"),
        ({"adjusts": "window", "minimum": 1}, "minimum=1 .* of mini-batches per window must be whole numbers from 2"),
        ({"adjusts": "window", "maximum": 8.5}, "maximum=8.5 of mini-batches per window must be whole numbers"),
        ({"adjusts": "window", "value": 1}, "mini-batches per window=1 to start with must lie between minimum=2"),
    ],
)
def test_an_unusable_argument_is_refused_by_the_name_of_its_setting(settings, message):
    """Goes red if a check is dropped, or written so that NaN passes it."""
    merged = {"measures": "clip_fraction", "adjusts": "epsilon", **settings}
    with pytest.raises(RequestError, match=message):
        controller(merged.pop("measures"), merged.pop("adjusts"), **merged)


def test_several_unusable_arguments_come_together():
    """Goes red if the first problem is raised alone."""
    with pytest.raises(RequestError, match="target_drift=-1.*gain=2.*maximum=0.1"):
        controller("drift", target=-1, gain=2, maximum=0.1)


# --- simulated windows: log ratios of a known distribution, read through sampling noise

TARGET = 0.02
TOKENS = 3500  # of mini-batches 2..8, 500 each
NORMAL = NormalDist()


def clip_fraction(tail, scale, epsilon):
    """P(log ratio > log(1 + epsilon)) for Laplace or Gaussian log ratios of mean 0."""
    bound = math.log1p(epsilon) / scale
    return 0.5 * math.exp(-bound) if tail == "laplace" else NORMAL.cdf(-bound)


def wanted_epsilon(tail, scale):
    return math.expm1(scale * (math.log(0.5 / TARGET) if tail == "laplace" else -NORMAL.inv_cdf(TARGET)))


plants = pytest.mark.parametrize(
    ("tail", "scale", "start"),
    [(t, s, e) for t in ("laplace", "gaussian") for s in (0.02, 0.2) for e in (0.05, 0.28, 2.0)],
)


@plants
def test_without_noise_every_window_brings_epsilon_closer_and_none_carries_it_past(tail, scale, start):
    """Goes red if the log is not divided by log(1/target): epsilon then swings about a Gaussian's for ever."""
    steered = controller(value=start)
    errors = []
    for _ in range(25):
        errors.append(math.log(steered.value / wanted_epsilon(tail, scale)))
        observe(steered, 2, TOKENS, clip_fraction(tail, scale, steered.value))
        steered.window_ends()
    assert all(abs(later) <= abs(earlier) and later * earlier >= 0 for earlier, later in pairwise(errors))
    assert abs(errors[-1]) < 0.01


@plants
@pytest.mark.parametrize("delay", [0, 1])
def test_epsilon_reaches_two_percent_within_15_windows_and_stays(tail, scale, start, delay):
    """Goes red if the log is not divided by log(1/target), if the sign is turned, or if the step is a tenth.

    The band is a factor 1.2 of epsilon: from a start 43 times too wide, 2.0 where a Gaussian of scale 0.02 wants 0.042,
    8 full steps lead there. delay: windows that were drawn before the value moved.
    """
    rng = np.random.default_rng(0)
    draw = rng.laplace if tail == "laplace" else rng.normal
    steered = controller(value=start)
    values = [steered.value] * (1 + delay)
    fractions = []
    for _ in range(100):
        epsilon = values[-1 - delay]
        for mini_batch in range(1, 9):
            log_ratios = draw(0.0, scale if mini_batch > 1 else 0.0, TOKENS // 7)
            clipped = float((log_ratios > math.log1p(epsilon)).mean())
            steered.observe(mini_batch, TOKENS // 7, clipped, float(np.abs(log_ratios).mean()))
        fractions.append(steered.window_ends())
        values.append(steered.value)
    errors = np.log(np.array(values[15:]) / wanted_epsilon(tail, scale))
    assert np.abs(errors).max() < math.log(1.2)
    assert fmean(fractions[15:]) == pytest.approx(TARGET, rel=0.06)


@pytest.mark.parametrize("growth", [0.5, 1.0])
@pytest.mark.parametrize("start", [2, 8, 64])
@pytest.mark.parametrize("wanted", [4, 11.5, 30])
@pytest.mark.parametrize("delay", [0, 1])
def test_the_window_reaches_the_drift_asked_for_within_15_windows_and_stays(growth, start, wanted, delay):
    """Goes red if the sign is turned, if the rounded K is kept, or if the step is a tenth.

    Drift after k - 1 updates grows as (k - 1)^growth: 0.5 where updates wander, 1 where they agree. The target is the
    drift of `wanted` mini-batches, also between two whole numbers, where K must take turns. Laplace |log ratio|.
    """
    rng = np.random.default_rng(0)

    def drift(num_mini_batches):
        return fmean(0.01 * (k - 1) ** growth for k in range(2, num_mini_batches + 1))

    target = (drift(math.floor(wanted)) + drift(math.ceil(wanted))) / 2
    steered = controller("drift", "window", value=start, target=target)
    ks = [steered.num_mini_batches] * (1 + delay)
    drifts = []
    for _ in range(100):
        for mini_batch in range(1, ks[-1 - delay] + 1):
            scale = 0.01 * (mini_batch - 1) ** growth
            steered.observe(mini_batch, 200, 0.0, float(np.abs(rng.laplace(0.0, scale, 200)).mean()))
        drifts.append(steered.window_ends())
        ks.append(steered.num_mini_batches)
    assert max(abs(k - wanted) for k in ks[15:]) <= max(1, 0.15 * wanted)
    assert fmean(drifts[15:]) == pytest.approx(target, rel=0.03)


@pytest.mark.parametrize("tail", ["laplace", "gaussian"])
@pytest.mark.parametrize("growth", [0.5, 1.0])
@pytest.mark.parametrize("start", [2, 64])
def test_the_window_reaches_two_percent_clipping_within_25_windows_and_stays(tail, growth, start):
    """Goes red if the sign is turned, or if the log is not divided by log(1/target): K then jumps to and fro.

    The scale of the log ratios after k - 1 updates is 0.03 * (k - 1)^growth, epsilon is 0.28. Clipping rises so steeply
    with K that one mini-batch more may double it, so K may take turns with its neighbours.
    """
    rng = np.random.default_rng(0)

    def fraction(k):
        return clip_fraction(tail, 0.03 * (k - 1) ** growth, 0.28)

    wanted = min(range(2, 65), key=lambda n: abs(fmean(fraction(k) for k in range(2, n + 1)) - TARGET))
    steered = controller("clip_fraction", "window", value=start)
    ks = []
    for _ in range(100):
        ks.append(steered.num_mini_batches)
        for mini_batch in range(2, ks[-1] + 1):
            steered.observe(mini_batch, 1000, rng.binomial(1000, fraction(mini_batch)) / 1000, 0.1)
        steered.window_ends()
    assert 3 <= wanted <= 40 and max(abs(k - wanted) for k in ks[25:]) <= 1
