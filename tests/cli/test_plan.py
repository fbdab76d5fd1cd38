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


@pytest.mark.parametrize("name", [name for name in recipes.names() if recipes.stage_of(name) == "train"])
def test_every_recipe_plans_without_weights_or_network(
    name: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Goes red if a recipe holds an unknown key, contradicts itself, or its model is not in the table."""
    assert run([name]) == 0
    out = capsys.readouterr().out
    facts = _facts(out)
    assert "not at hand: model" in out and "H100 80GB" in out
    if recipes.stage_of(name) == "dpo":
        assert facts["pairs per step"] and ("steps in all" in facts) is (name != "dpo-quickstart")  # without data
        return
    assert int(facts["windows per epoch"]) > 0
    assert ("this is plain SFT" in out) is (name.endswith("-sft") or name.endswith("-matched"))
    assert ("only rescales SFT's token weights" in out) is name.endswith("-sft-kl")
    assert ("the ratio is never clipped" in out) is name.endswith("-noclip")
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


def _plan(capsys: pytest.CaptureFixture[str], tmp_path: Path, *flags: str) -> tuple[dict[str, str], str]:
    assert run(["quickstart", "--output_dir", str(tmp_path), *flags]) == 0
    out = capsys.readouterr().out
    return _facts(out), " ".join(out.split())


def test_the_settings_shown_are_those_of_the_objective(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Goes red if a setting of another objective is shown, or a default is not told from what was asked for."""
    facts, _ = _plan(capsys, tmp_path, "--objective", "sft_kl", "--kl_coef", "0.25")
    assert facts["kl_coef"] == "0.25" and facts["kl_estimator"] == "full  (default)"
    assert "epsilon_high" not in facts and "gem_beta" not in facts and "loss" in facts
    facts, _ = _plan(capsys, tmp_path)
    assert facts["epsilon_high"] == "0.28" and "kl_coef" not in facts
    own = ["--objective", f"{__name__}:scaled_loss", "--objective_settings", "scale=2"]
    facts, _ = _plan(capsys, tmp_path, *own)
    assert facts["scale"] == "2" and facts["form"] == "linear  (default)" and "epsilon_high" not in facts


def scaled_loss(logps, completion_mask, *, scale, form="linear", normalizer):  # type: ignore[no-untyped-def]
    return -(scale * logps * completion_mask).sum() / normalizer


@pytest.mark.parametrize(
    ("flags", "needs", "old_pass", "reference"),
    [
        (["--objective", "sft"], "the policy's log-prob", "none: this objective", "none"),
        ([], "the old policy's log-prob", "at every window's start", "none"),
        (["--mini_batch_size", "32"], "the old policy's log-prob", "none: one mini-batch", "none"),
        (["--objective", "gem"], "the target's lead", "none", "none"),
        (["--objective", "eaft"], "among its likeliest tokens", "none", "none"),
        (["--objective", "sft_kl"], "over the whole vocabulary", "none", "a frozen copy stays in memory"),
        (["--objective", "asft", "--use_peft"], "over the whole vocabulary", "none", "without its adapter: no second"),
        (["--objective", "iw_sft"], "which sequence", "none", "before the first step, cached, 4 bytes a token"),
        (["--objective", "sft_kl", "--kl_estimator", "k2"], "reference's log-prob", "none", "before the first step"),
        (["--objective", "asft", "--ref_model_name_or_path", "mine"], "KL", "none", "mine: a frozen copy"),
    ],
)
def test_what_an_objective_needs_is_said_in_words(
    flags: list[str],
    needs: str,
    old_pass: str,
    reference: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    """Goes red if a quantity lacks its words, or old pass and reference are guessed from the objective's name."""
    facts, _ = _plan(capsys, tmp_path, *flags)
    assert needs in facts["needs"] and facts["old pass"].startswith(old_pass) and reference in facts["reference"]


def test_memory_and_time_count_the_passes_of_the_objective(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Goes red if an old pass is counted for every objective but sft, a reference for none, its copy where the adapter
    is switched off instead, or the one pass over the data not at all.
    """
    needed_gib, total_ms, notes = {}, {}, {}
    for name, flags in {
        "sft": ["--objective", "sft"],
        "dft": ["--objective", "dft"],
        "psft": [],
        "full": ["--objective", "sft_kl"],
        "k3": ["--objective", "sft_kl", "--kl_estimator", "k3"],
        "lora": ["--objective", "sft_kl", "--use_peft"],
        "sft, lora": ["--objective", "sft", "--use_peft"],
    }.items():
        facts, out = _plan(capsys, tmp_path, *flags)  # the 40 steps of the quick start are one pass over its data
        row = facts["H200 141GB"].split()
        assert row[-1] == "ms"
        needed_gib[name], total_ms[name] = float(row[row.index("GiB") - 1]), float(row[-2])
        marks = {"old": "2 N (K-1)/K", "streamed": "at every step, + 2 N", "once": "once for every token"}
        notes[name] = {mark for mark, text in marks.items() if text in out}
    assert notes["sft"] == notes["dft"] == set() and notes["psft"] == {"old"}
    assert notes["full"] == {"streamed"} and notes["k3"] == {"once"}
    assert total_ms["psft"] / total_ms["sft"] == pytest.approx(7.75 / 6, rel=0.05)
    assert total_ms["full"] / total_ms["sft"] == pytest.approx(8 / 6, rel=0.05)
    assert total_ms["k3"] / total_ms["sft"] == pytest.approx(8 / 6, rel=0.05) and total_ms["dft"] == total_ms["sft"]
    assert needed_gib["full"] - needed_gib["sft"] == pytest.approx(4 * 134_515_008 / 2**30, abs=0.2)
    assert needed_gib["lora"] - needed_gib["sft, lora"] == pytest.approx(0, abs=0.2)
    assert needed_gib["k3"] == needed_gib["psft"] == needed_gib["sft"]


@pytest.mark.parametrize(
    ("flags", "note"),
    [
        (["--objective", "sft"], "this is plain SFT: objective is sft"),
        (["--objective", "psft_tv", "--mini_batch_size", "32"], "this is plain SFT: with one mini-batch per window"),
        (
            ["--objective", "psft_soft", "--soft_form", "pspo", "--mini_batch_size", "32"],
            "its gradient times 0.9 (1 - soft_alpha)",
        ),
        (["--objective", "sft_kl", "--kl_coef", "0"], "this is plain SFT: kl_coef is 0"),
        (
            ["--objective", "sft_kl", "--kl_estimator", "k3", "--kl_direction", "reverse", "--kl_coef", "1"],
            "only rescales SFT's token weights, to 0 + 1 p_ref / p",
        ),
        (
            ["--objective", "sft_kl", "--kl_estimator", "k1", "--kl_direction", "reverse"],
            "scales the gradient of SFT by 0.5",
        ),
        (["--objective", "asft", "--kl_coef", "0"], "this is dft"),
        (["--objective", "eaft", "--eaft_alpha", "0"], "this is plain SFT: eaft_alpha is 0"),
        (["--objective", "gem", "--gem_beta", "1"], "this is plain SFT: the gradient of gem"),
        (["--epsilon_high", "inf"], "the ratio is never clipped"),
        (["--objective", "psft_tv", "--tv_delta", "1"], "nothing is clipped"),
        (["--loss_aggregation", "micro_batch_token_mean"], "the result depends on how a step is cut"),
        (
            ["--target_clip_fraction", "0.02"],
            "the controller moves epsilon_high, 0.28 to begin with, until the clip fraction over mini-batches 2..K "
            "averages 0.02",
        ),
        (["--target_drift", "0.1"], "moves the mini-batches per window, 8 to begin with"),
    ],
)
def test_what_the_settings_amount_to_is_noted(
    flags: list[str], note: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Goes red if a setting that makes an objective plain SFT, or never acts, passes without a word."""
    _, out = _plan(capsys, tmp_path, *flags)
    assert note in out


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--objective", "sft_kl"],
        ["--objective", "sft_kl", "--kl_estimator", "k3", "--kl_direction", "reverse", "--kl_coef", "1.5"],
        ["--objective", "sft_kl", "--kl_estimator", "k3"],
        ["--objective", "dft"],
        ["--objective", "psft_soft"],
    ],
)
def test_an_objective_that_is_more_than_sft_is_not_called_so(
    flags: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Goes red if a note is printed regardless of coefficient, direction or estimator."""
    _, out = _plan(capsys, tmp_path, *flags)
    assert "plain SFT" not in out and "only rescales" not in out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["quickstart", "--mini_batch_size", "5"], "mini_batch_size"),
        (["quickstart", "--objective", "dft", "--epsilon_high", "0.3"], "epsilon_high=0.3 has no effect"),
        (["quickstart", "--epsilon_hihg", "0.2"], "epsilon_high"),
        (["quickstart", "--dtype", "bfloat16"], "force_pure_bf16"),
        (["quickstart", "--dataset", "nowhere.jsonl"], "nowhere.jsonl"),
    ],
)
def test_what_train_refuses_plan_refuses(argv: list[str], message: str) -> None:
    """Goes red if plan does not build the same settings as train."""
    with pytest.raises(RequestError, match=message):
        run(argv)
