"""The controller inside a run: what it moves, what the records say, what a checkpoint holds."""

import json
from pathlib import Path

import pytest

from psft.errors import RequestError


def rows_of(trainer):
    return [json.loads(line) for line in (Path(trainer.args.output_dir) / "metrics.jsonl").read_text().splitlines()]


def clip_fraction_by_window(rows):
    """Token mean over mini-batches 2..K of each window: what the controller steers."""
    sums = {}
    for row in rows:
        if row["mini_batch"] > 1:
            clipped, tokens = sums.get(row["window"], (0.0, 0))
            sums[row["window"]] = (clipped + row["clip_fraction"] * row["tokens"], tokens + row["tokens"])
    return [clipped / tokens for clipped, tokens in sums.values()]


def test_without_a_target_the_bound_and_the_window_stay(make_trainer):
    trainer = make_trainer(max_steps=8)
    trainer.train()
    assert {(row["epsilon_high"], row["num_mini_batches"]) for row in rows_of(trainer)} == {(0.28, 4)}


@pytest.mark.parametrize(
    ("objective", "radius", "learning_rate"), [("psft", "epsilon_high", 1e-5), ("psft_tv", "tv_delta", 1e-3)]
)
def test_a_target_clip_fraction_moves_the_bound_until_tokens_clip(make_trainer, objective, radius, learning_rate):
    """At this learning rate nothing clips at the configured bound. Goes red if the moved bound does not reach the
    objective, or if the mini-batches of ratio 1 are counted."""
    free = make_trainer("free", objective=objective, max_steps=48, learning_rate=learning_rate)
    free.train()
    assert max(clip_fraction_by_window(rows_of(free))) < 0.005
    held = make_trainer(
        "held", objective=objective, max_steps=48, learning_rate=learning_rate, target_clip_fraction=0.1
    )
    held.train()
    rows = rows_of(held)
    bounds = [row[radius] for row in rows]
    assert bounds[0] == {"epsilon_high": 0.28, "tv_delta": 0.2}[radius]
    assert all(len({row[radius] for row in rows if row["window"] == w}) == 1 for w in range(12)), (
        "moved inside a window"
    )
    assert bounds[-1] < bounds[0] / 10
    last = clip_fraction_by_window(rows)[-3:]
    assert 0.03 < sum(last) / 3 < 0.3, (last, bounds[::4])


def test_a_target_drift_moves_the_refresh_interval(make_trainer):
    """Goes red if windows keep their configured size, or if their labels do not follow."""
    trainer = make_trainer(max_steps=40, learning_rate=3e-4, target_drift=0.2, num_train_epochs=5)
    trainer.train()
    rows = rows_of(trainer)
    sizes = {row["window"]: row["num_mini_batches"] for row in rows}
    assert sizes[0] == 4 and max(sizes.values()) > 4
    for window, size in sizes.items():
        places = [row["mini_batch"] for row in rows if row["window"] == window]
        assert places == list(range(1, size + 1))
        first, *later = [row for row in rows if row["window"] == window]
        assert first["log_ratio_abs_max"] == 0.0 and all(row["log_ratio_abs_max"] > 0 for row in later)
    assert sorted(sizes) == list(range(len(sizes)))


def test_a_checkpoint_holds_the_state_of_the_controller(make_trainer):
    trainer = make_trainer(max_steps=6, target_clip_fraction=0.05, save_strategy="steps", save_steps=6)
    trainer.train()
    path = Path(trainer.args.output_dir) / "checkpoint-6" / "psft_state.json"
    state = json.loads(path.read_text())["trust_region"]
    assert state["controller"] == json.loads(json.dumps(trainer.trust_region.controller.state_dict()))


def test_the_warm_up_neither_moves_nor_feeds_the_controller(make_trainer):
    trainer = make_trainer(max_steps=7, sft_warmup_steps=3, target_clip_fraction=0.05)
    trainer.train()
    rows = rows_of(trainer)
    assert [row.get("epsilon_high") for row in rows][:3] == [None] * 3 and rows[3]["epsilon_high"] == 0.28


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"objective": "sft", "target_clip_fraction": 0.1}, "no old policy"),
        ({"objective": "psft_soft", "target_clip_fraction": 0.1}, "needs a bound that clips"),
        ({"target_clip_fraction": 0.1, "target_drift": 0.1}, "two ways"),
        ({"target_clip_fraction": 1.0}, "between 0 and 1"),
        ({"target_drift": 0.0}, "greater than 0"),
        ({"controller_adjusts": "window"}, "no effect without target"),
        ({"target_drift": 0.1, "controller_adjusts": "rate"}, "epsilon or window"),
        ({"target_drift": 0.1, "mini_batch_size": 16}, "one mini-batch per window"),
        ({"target_clip_fraction": 0.1, "epsilon_high": float("inf")}, "it is inf"),
    ],
)
def test_a_controller_that_could_not_act_is_refused(make_trainer, settings, message):
    with pytest.raises(RequestError, match=message):
        make_trainer(**settings)
