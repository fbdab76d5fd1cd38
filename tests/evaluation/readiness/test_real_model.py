"""Readiness of the quick-start model on a few one-digit sums, as the grpo-quickstart recipe asks them."""

from __future__ import annotations

import json

import pytest

from psft.cli.main import main
from psft.models.quickstart import NAME, is_built

SUMS = "reasoning-gym:chain_sum?size=4&seed=0&min_terms=2&max_terms=2&min_digits=1&max_digits=1"


@pytest.mark.slow
@pytest.mark.timeout(900)  # on one busy core
def test_the_quick_start_model_is_judged_on_one_digit_sums(tmp_path, monkeypatch, capsys):
    """Goes red if a real model's entropy or answers come out as no model's do. Needs the cache."""
    if not is_built():
        pytest.skip("the quick-start model is not in the cache: run `make quickstart` once")
    monkeypatch.chdir(tmp_path)
    assert main(["eval", NAME, "--suite", "rl-readiness", SUMS, "--max_new_tokens", "32"]) == 0
    (path,) = (tmp_path / "evals").glob("*/*.rl-readiness-chain_sum.json")
    found = json.loads(path.read_text())["readiness"]
    assert found["prompts"] == 4 and found["k"] == found["group_size"] == 8
    assert 0 < found["avg@8"]["value"] <= found["pass@8"]["value"] <= 1
    assert 0.05 < found["entropy_nats_per_token"]["value"] < 4  # it is 2.0; of 49,152 tokens at most 10.8
    assert found["drift_nats_per_token"] is None and "no checkpoint of a run" in found["drift_source"]
    assert found["readable"]["value"] > 0.1
    said = capsys.readouterr().out
    assert f"{NAME} is ready for RL" in said or f"{NAME} is not ready" in said
