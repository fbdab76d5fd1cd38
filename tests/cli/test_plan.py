"""`psft plan` says what a request means, without weights and without a network (tests/conftest.py is offline)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from psft import recipes
from psft.cli.plan import run
from psft.errors import RequestError


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No quick-start model at hand: tests see the same on every machine."""
    monkeypatch.setenv("PSFT_CACHE", str(tmp_path / "no-cache"))


def _facts(text: str) -> dict[str, str]:
    rows = (line.strip().split("  ", 1) for line in text.splitlines() if line.startswith("  ") and "  " in line.strip())
    return {row[0]: row[1].strip() for row in rows}


@pytest.mark.parametrize("name", recipes.names())
def test_every_recipe_plans_without_weights_or_network(
    name: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Goes red if a recipe holds an unknown key, contradicts itself, or its model is not in the table."""
    assert run([name]) == 0
    out = capsys.readouterr().out
    facts = _facts(out)
    assert int(facts["windows per epoch"]) > 0 and "not at hand: model" in out and "H100 80GB" in out
    assert ("this is plain SFT" in out) is name.endswith("-sft")
    assert not (tmp_path / "no-cache").exists()


def test_openr1_has_178_windows_of_256(capsys: pytest.CaptureFixture[str]) -> None:
    """The paper's number. Goes red if the tail that fills no window is counted."""
    assert run(["math-qwen2.5-7b-psft"]) == 0
    facts = _facts(capsys.readouterr().out)
    assert facts["windows per epoch"] == "178"
    assert facts["steps per epoch"] == "1424"
    assert facts["steps in all"].startswith("14240 ")
    assert run(["math-qwen2.5-7b-psft-warmup"]) == 0
    facts = _facts(capsys.readouterr().out)
    assert facts["warm-up steps of plain SFT"] == "200"
    assert facts["steps in all"].startswith(f"{178 + 22 + 156 * 8 + 8 * 1424} ")


def test_local_data_is_counted_and_shown_with_its_loss_mask(
    tiny_model_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Goes red if plan reads another tokenizer, or the end token is not among the trained ones."""
    data = tmp_path / "data.jsonl"
    data.write_text(
        "".join(json.dumps({"question": f"1 + {n}?", "answer": f"It is {n + 1}."}) + "\n" for n in range(10))
    )
    request = [
        "--model_name_or_path",
        str(tiny_model_path),
        "--dataset",
        str(data),
        "--output_dir",
        str(tmp_path / "run"),
    ]
    sizes = ["--train_batch_size", "4", "--mini_batch_size", "2", "--num_train_epochs", "1"]
    assert run([*request, *sizes]) == 0
    out = capsys.readouterr().out
    facts = _facts(out)
    assert facts["windows per epoch"] == "3" and facts["steps in all"].startswith("5 ")
    assert facts["rows used"] == "10 of 10"
    assert "It is 1.<|im_end|>⟧" in out
    assert not (tmp_path / "run").exists()


def test_one_mini_batch_per_window_is_called_plain_sft(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Goes red if the note is tied to the objective alone."""
    assert run(["quickstart", "--mini_batch_size", "32", "--output_dir", str(tmp_path)]) == 0
    assert "this is plain SFT: with one mini-batch per window" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["quickstart", "--mini_batch_size", "5"], "mini_batch_size"),
        (["quickstart", "--epsilon_hihg", "0.2"], "epsilon_high"),
        (["quickstart", "--dtype", "bfloat16"], "force_pure_bf16"),
        (["quickstart", "--dataset", "nowhere.jsonl"], "nowhere.jsonl"),
    ],
)
def test_what_train_refuses_plan_refuses(argv: list[str], message: str) -> None:
    """Goes red if plan does not build the same settings as train."""
    with pytest.raises(RequestError, match=message):
        run(argv)
