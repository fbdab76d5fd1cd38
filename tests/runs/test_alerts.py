"""The watch on synthetic runs: each alert on the series it is for, and silence on those it must not fire on."""

import math
import random
import statistics

import pytest

from psft.runs.alerts import Watch


def steps(num_epochs=4, per_epoch=40, entropy=lambda step, epoch: 1.0, **fields):
    """Rows of a run whose numbers are functions of the 1-based step, with noise from a fixed seed."""
    noise = random.Random(0)
    for step in range(1, num_epochs * per_epoch + 1):
        epoch = math.ceil(step / per_epoch) - 1
        row = {
            "step": step, "stage": "train", "epoch": step / per_epoch, "mini_batch": (step - 1) % 8 + 1,
            "num_mini_batches": 8, "tokens": 1000, "clip_fraction": 0.03, "grad_norm": 1.0 + 0.1 * noise.random(),
            "entropy": entropy(step, epoch) + noise.gauss(0, 0.005), "nll": 1.0,
        }  # fmt: skip
        yield row | {name: of(step) if callable(of) else of for name, of in fields.items()}


def names(rows, watch=None):
    watch = watch or Watch()
    for row in rows:
        watch.metrics(row)
    return [alert.name for alert in watch.said]


def saw(step, epoch):
    return 1.2 - 0.15 * epoch


SILENT = {
    "flat": lambda step, epoch: 1.0,
    "a smooth decline": lambda step, epoch: 4.0 - step / 40,
    "a drop at the first boundary alone": lambda step, epoch: 1.0 if epoch == 0 else 0.8,
    "a drop inside epochs": lambda step, epoch: 1.2 - 0.15 * ((step + 20) // 40),
    "rises at boundaries": lambda step, epoch: 1.0 + 0.15 * epoch,
    "waves, one of whose drops meets each boundary": lambda step, epoch: 1.0 + 0.15 * ((step - 1) % 8 >= 4),
}


def test_entropy_that_drops_at_every_epoch_boundary_is_a_saw_tooth():
    """Goes red if the drop is taken inside epochs, or a boundary's blocks overlap it."""
    watch = Watch()
    assert names(steps(entropy=saw), watch) == ["entropy_sawtooth"]
    (alert,) = watch.said
    assert 80 < alert.step <= 84 and "by 0.14" in alert.message  # as soon as the second boundary's block is whole
    assert names(steps(entropy=lambda step, epoch: saw(step, epoch) + 0.05 * (step % 40) / 40)) == ["entropy_sawtooth"]


@pytest.mark.parametrize("series", SILENT)
def test_entropy_that_falls_otherwise_is_no_saw_tooth(series):
    """Goes red if trend or noise inside epochs is not held against the drop, or one boundary is enough."""
    assert names(steps(entropy=SILENT[series])) == []


def test_epochs_too_short_to_tell_say_nothing():
    assert names(steps(num_epochs=3, per_epoch=1, entropy=saw)) == []


def test_a_clip_that_never_acts_is_said_once_after_three_windows():
    """Goes red if mini-batch 1, where the ratio is 1, counts, or if fewer windows are enough."""
    watch = Watch()
    rows = list(steps(clip_fraction=lambda step: 0.0 if step % 8 == 1 else 0.009))
    assert names(rows, watch) == ["clip_inactive"] and watch.said[0].step == 24
    assert "0.90%" in watch.said[0].message
    assert names(steps(clip_fraction=lambda step: 0.0 if step % 8 == 1 else 0.011)) == []


@pytest.mark.parametrize(
    "fields",
    [
        {"clip_fraction": None},  # an objective without a clip
        {"stage": "warmup", "clip_fraction": 0.0},
        {"num_mini_batches": 1, "mini_batch": 1, "clip_fraction": 0.0},  # said at the start: plain SFT
        {"clip_fraction": lambda step: 0.05 if (step - 1) // 8 % 3 == 0 else 0.0},  # one window of three clips
    ],
)
def test_no_clip_to_speak_of_says_nothing(fields):
    assert names(steps(**fields)) == []


def test_a_clip_fraction_is_weighed_by_tokens():
    """Goes red if windows average fractions: 100 tokens with 20 % among 100,000 with none are 0.02 %."""
    rows = steps(
        tokens=lambda step: 100 if step % 8 == 0 else 100_000, clip_fraction=lambda step: 0.2 if step % 8 == 0 else 0.0
    )
    assert names(rows) == ["clip_inactive"]


def test_a_gradient_spike_is_said_with_its_size():
    """Goes red if the spike is part of what is usual, or if the first steps, where nothing is usual yet, count."""
    watch = Watch()
    assert names(steps(grad_norm=lambda step: 30.0 if step == 60 else 1.0), watch) == ["gradient_spike"]
    assert watch.said[0].step == 60 and "30 times" in watch.said[0].message
    for quiet in (
        lambda step: 30.0 if step == 5 else 1.0,
        lambda step: 1.05**step,  # grows steadily
        lambda step: None if step == 60 else 1.0,
        lambda step: math.inf if step == 60 else 1.0,  # a bad step has its own words
        lambda step: 0.0 if step < 60 else 1.0,
    ):
        assert names(steps(grad_norm=quiet)) == []


def run_with_held_out(train, held_out, name="heldout", metric="nll"):
    watch = Watch()
    for epoch in range(len(held_out)):
        watch.evaluated({"step": epoch * 10, "benchmark": name, "metric": metric, "value": held_out[epoch]})
        watch.evaluated({"step": epoch * 10, "benchmark": "other", "metric": "nll", "value": 1.0 - 0.1 * epoch})
        for step in range(10):
            watch.metrics({"step": epoch * 10 + step + 1, "nll": train[epoch]})
    return [(alert.name, alert.step) for alert in watch.said]


def test_overfitting_is_held_out_nll_that_rises_twice_while_training_nll_falls():
    """Goes red if one rise is enough, or if a second data set of the same step takes the training NLL away."""
    falls = [1.0, 0.8, 0.6, 0.4, 0.2]
    assert run_with_held_out(falls, [1.2, 1.0, 1.1, 1.2, 1.3]) == [("overfitting", 30)]
    assert run_with_held_out(falls, [1.2, 1.0, 1.1, 0.9, 1.0]) == []
    assert run_with_held_out(falls, [1.2, 1.0, 1.005, 1.005, 1.005]) == []
    assert run_with_held_out([0.8, 0.9, 1.0, 1.1, 1.2], [1.2, 1.0, 1.1, 1.2, 1.3]) == []  # training rises too
    assert run_with_held_out(falls, [1.2, 1.0, 1.1, 1.2, 1.3], metric="entropy") == []
    assert run_with_held_out(falls, [1.2, 1.0, None, 1.1, 0.9]) == []


def test_drift_over_the_budget_counts_two_standard_errors_below_it():
    watch = Watch(drift_budget=0.05)
    row = {"step": 50, "group": "all", "drift_nats_per_token": 0.06, "stderr": 0.01}
    assert watch.probed(row) == []
    assert watch.probed({**row, "group": "code", "drift_nats_per_token": 0.9}) == []
    (alert,) = watch.probed({**row, "step": 100, "drift_nats_per_token": 0.08})
    assert (alert.name, alert.step) == ("drift", 100) and "0.080 +- 0.010" in alert.message
    assert watch.probed({**row, "drift_nats_per_token": 0.2}) == []  # once each
    assert Watch().probed({**row, "drift_nats_per_token": 9.0}) == []


def test_a_spike_is_found_where_the_plain_rule_finds_it():
    """Goes red if the floor below which no median is looked for is not lowered by a smaller norm."""
    noise = random.Random(0)
    for _ in range(200):
        norms = [math.exp(noise.gauss(0, noise.choice([0.1, 0.8, 1.5]))) for _ in range(120)]
        norms[noise.randrange(120)] = 0.0
        plain = next(
            (
                i + 1
                for i, norm in enumerate(norms)
                if i >= 10 and norm > 10 * statistics.median(norms[max(0, i - 50) : i]) > 0
            ),
            None,
        )
        watch = Watch()
        for i, norm in enumerate(norms):
            watch.metrics({"step": i + 1, "grad_norm": norm})
        assert [alert.step for alert in watch.said] == ([] if plain is None else [plain])
