"""Benchmarks whose items reasoning-gym makes: no file, no network, graded by its own scorer."""

from __future__ import annotations

from pathlib import Path

import pytest

from psft.data.gym import parse_gym_source
from psft.errors import RequestError
from psft.evaluation.benchmarks import make_suite, packaged_suite
from psft.evaluation.grading import grader_of, prepare_graders
from psft.evaluation.items import load_data
from psft.evaluation.local_data import not_here
from psft.recipes import load_recipe
from psft.rewards import get_grader


def test_the_quick_start_suite_needs_no_data(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Goes red if made items are looked for in a folder, differ from call to call, or lose what grades them."""
    monkeypatch.delenv("PSFT_DATA_DIR", raising=False)
    suite = packaged_suite("quickstart")
    assert not_here(suite, None) == []
    data = [load_data(benchmark, None) for benchmark in suite.benchmarks]
    assert [len(part.items) for part in data] == [32, 8]
    assert [part.sha256 for part in data] == [load_data(b, tmp_path).sha256 for b in suite.benchmarks]
    prepare_graders(data)
    assert "reasoning-gym" in grader_of(data[0])["versions"]
    item = data[0].items[0]
    assert item.question == "Calculate 6 + 5."
    grader = get_grader("reasoning_gym", **data[0].benchmark.grader)
    assert grader({**item.grading, "response": "It is 11."}).score == 1.0
    assert grader({**item.grading, "response": "It is 12."}).score < 1.0


def test_the_quick_start_suite_asks_what_the_quick_starts_train_on() -> None:
    """Goes red if a recipe gets another task and the suite is left behind, or the same problems are asked again."""
    asked = {benchmark.name: benchmark for benchmark in packaged_suite("quickstart").benchmarks}
    for name, recipe in (("sums", load_recipe("grpo-quickstart")), ("gsm_symbolic", load_recipe("quickstart"))):
        (task, own), (trained_task, trained) = (parse_gym_source(s) for s in (asked[name].file, recipe["dataset"]))
        seeds = own.pop("seed"), trained.pop("seed")
        del own["size"], trained["size"]
        assert (task, own) == (trained_task, trained) and seeds[0] != seeds[1]
    rewarded = load_recipe("grpo-quickstart")
    assert asked["sums"].system_prompt == rewarded["system_prompt"]
    assert asked["sums"].grader == rewarded["reward_settings"]["reasoning_gym"]
    assert asked["sums"].sampling.max_tokens == rewarded["max_completion_length"]


def test_an_unknown_task_is_refused_with_the_nearest() -> None:
    """Goes red if that shows after the model was loaded."""
    entry = {
        "kind": "reasoning_gym",
        "file": "reasoning-gym:chain_sums",
        "fields": {name: name for name in ("question", "gym_source", "gym_index")},
    }
    suite = make_suite("mine", {"benchmarks": {"sums": entry}}, where="mine.yaml")
    with pytest.raises(RequestError, match="Did you mean chain_sum"):
        load_data(suite.benchmarks[0], None)
