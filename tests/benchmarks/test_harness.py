"""The harness: order of arms, what is kept, ratios, the JSON it writes."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from benchmarks.harness import (
    Block,
    Budget,
    Spread,
    check_results,
    interleave,
    ratio,
    read_results,
    results,
    summarise,
    write_results,
)


def test_arms_take_turns_and_the_first_repetition_is_dropped() -> None:
    """Goes red if each arm is timed in one go, or if the discarded repetition is kept."""
    calls: list[tuple[str, int]] = []

    def arm(name: str):
        def run(repetition: int) -> Block:
            calls.append((name, repetition))
            return Block(float(repetition))

        return run

    series = interleave({"a": arm("a"), "b": arm("b")}, repetitions=2)
    assert calls == [("a", 0), ("b", 0), ("a", 1), ("b", 1), ("a", 2), ("b", 2)]
    assert {name: [block.seconds for block in blocks] for name, blocks in series.items()} == {
        "a": [1.0, 2.0],
        "b": [1.0, 2.0],
    }


def test_no_repetition_begins_that_overruns_the_budget_and_one_is_kept() -> None:
    """Goes red if the reserve is left out, or if a run without time keeps nothing."""
    spent = Budget(10.0)
    spent.started -= 9.0  # nine seconds ago
    series = interleave({"a": lambda repetition: Block(1.0)}, repetitions=5, discard=0, budget=spent)
    assert len(series["a"]) == 5  # instant blocks fit into the second that is left
    kept = interleave({"a": lambda repetition: Block(1.0)}, repetitions=5, discard=0, budget=spent, reserve=lambda: 2.0)
    assert len(kept["a"]) == 1


def test_ratio_is_the_median_of_ratios_within_repetitions() -> None:
    """Goes red if it is the ratio of medians: here that is 2, since the machine slowed down between repetitions."""
    series = {"a": [Block(1.0), Block(2.0), Block(40.0)], "b": [Block(0.5), Block(1.0), Block(10.0)]}
    assert ratio(series, "a", "b") == Spread(2.0, 2.0, 4.0)
    series = {"a": [Block(1.0), Block(30.0), Block(5.0)], "b": [Block(1.0), Block(10.0), Block(1.0)]}
    assert ratio(series, "a", "b") == Spread(3.0, 1.0, 5.0)


def test_summary_counts_real_tokens_and_compares_with_the_first_arm() -> None:
    """Goes red if padded tokens are counted, or if the reference is another arm than the first."""
    details = {"real_tokens": 100.0, "trained_tokens": 50.0, "padded_tokens": 400.0}
    summary = summarise({"a": [Block(2.0, details)], "b": [Block(4.0, details)]})
    assert summary["b"]["real_tokens_per_second"]["median"] == 25.0
    assert summary["b"]["trained_tokens_per_second"]["median"] == 12.5
    assert summary["b"]["over_a"]["median"] == 2.0
    assert not any("padded" in key for key in summary["a"])


def _content(**changes: object) -> dict:
    series = {"a": [Block(1.0), Block(2.0)], "b": [Block(2.0), Block(4.0)]}
    made = results(
        "steps", prologue={"clock": "wall"}, settings={}, series=series, ratios={"b_over_a": ratio(series, "b", "a")}
    )
    return {**made, **changes}


def test_results_survive_the_file(tmp_path: Path) -> None:
    """Goes red if raw blocks are not kept, or if a ratio is anything but a plain number."""
    path = tmp_path / "deep" / "r.json"
    write_results(path, _content())
    read = read_results(path)
    assert read["ratios"] == {"b_over_a": 2.0}
    assert [block["seconds"] for block in read["samples"]["b"]] == [2.0, 4.0]
    assert [entry.name for entry in path.parent.iterdir()] == ["r.json"]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"ratios": {"x": math.nan}}, "ratio 'x' is nan"),
        ({"ratios": {"x": -1.0}}, "ratio 'x' is -1.0"),
        ({"schema": 0}, "'schema' is 0"),
        ({"samples": []}, "'samples' is list"),
        ({"samples": {"a": [{}], "b": []}}, "unequally often"),
    ],
)
def test_results_that_are_none_are_named(tmp_path: Path, change: dict, says: str) -> None:
    """Goes red if any of the checks in `check_results` is left out."""
    with pytest.raises(ValueError, match="|".join([says.replace("(", r"\(")])):
        check_results(_content(**change))
    path = tmp_path / "r.json"
    path.write_text(json.dumps(_content(**change)))
    with pytest.raises(ValueError, match="Repeat the run"):
        read_results(path)


def test_missing_keys_come_together() -> None:
    """Goes red if only the first is reported."""
    with pytest.raises(ValueError, match="'ratios' is missing.*'prologue' is missing"):
        check_results({k: v for k, v in _content().items() if k not in ("ratios", "prologue")})
