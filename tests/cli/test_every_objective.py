"""Every objective, in every form, from the command line to finite numbers in the run folder, held-out data included."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from psft.cli.main import main
from psft.models.quickstart import NAME, is_built
from psft.objectives import objective_names

FORMS = {
    "sft": ["sft"],
    "psft": ["psft", "psft epsilon_high=inf", "psft target_clip_fraction=0.1", "psft target_drift=0.1"],
    "psft_tv": ["psft_tv", "psft_tv target_clip_fraction=0.1"],
    "psft_soft": ["psft_soft soft_form=sapo", "psft_soft soft_form=pspo", "psft_soft target_drift=0.1"],
    "sft_kl": [
        f"sft_kl kl_estimator={estimator} kl_direction={direction}"
        for estimator in ("full", "k1", "k2", "k3")
        for direction in ("forward", "reverse")
    ],
    "dft": ["dft"],
    "iw_sft": ["iw_sft iw_level=sequence", "iw_sft iw_level=token"],
    "gem": ["gem gem_weighting=linear", "gem gem_weighting=logsigmoid"],
    "asft": ["asft kl_direction=forward", "asft kl_direction=reverse"],
    "eaft": [f"eaft eaft_scaling={scaling}" for scaling in ("paper", "llama_factory", "axolotl")],
    "chord_phi": ["chord_phi"],
}
REAL_MODEL_FORMS = [forms[0] for forms in FORMS.values()] + [
    "psft target_clip_fraction=0.1", "psft_soft soft_form=pspo", "sft_kl kl_estimator=full kl_direction=reverse",
    "sft_kl kl_estimator=k3 kl_direction=reverse", "iw_sft iw_level=token", "gem gem_weighting=logsigmoid",
]  # fmt: skip
EVERY_FORM = [form for forms in FORMS.values() for form in forms]
UNWEIGHTED = ("gem", "sft_kl kl_estimator=full")  # more than a coefficient on the gradient of log p


def flags_of(form: str) -> list[str]:
    name, *settings = form.split()
    return ["--objective", name, *(f"--{setting}" for setting in settings)]


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def check_records(folder: Path, form: str, *, num_steps: int, eval_steps: int) -> None:
    """What each form leaves behind: one row a step, one value a metric and evaluation, all finite."""
    name, *settings = form.split()
    info = json.loads((folder / "run.json").read_text())["objective"]
    assert info["name"] == name
    for setting in settings:
        key, _, value = setting.partition("=")
        if key in info["settings"]:
            assert str(info["settings"][key]) == ("None" if value == "inf" else value)  # JSON has no infinity
    metrics = rows_of(folder / "metrics.jsonl")
    assert [row["step"] for row in metrics] == list(range(1, num_steps + 1))
    measured = ["loss", "nll", "entropy", "grad_norm"]
    measured += [] if name == "sft" or form.startswith(UNWEIGHTED) else ["token_weight"]
    measured += ["log_ratio_abs_mean"] if name.startswith("psft") else []
    measured += ["clip_fraction"] if name in ("psft", "psft_tv") else []
    kls = sorted(key for key in metrics[0] if key.startswith("kl_ref_"))
    assert len(kls) == (name in ("sft_kl", "asft"))
    for row in metrics:
        assert all(row[key] is not None and math.isfinite(row[key]) for key in [*measured, *kls]), row
        assert row["grad_norm"] > 0
    evaluated = rows_of(folder / "eval.jsonl")
    expected = {(step, metric) for step in range(0, num_steps + 1, eval_steps) for metric in ("nll", "entropy")}
    assert {(row["step"], row["metric"]) for row in evaluated} == expected
    assert all(math.isfinite(row["value"]) for row in evaluated)


def test_every_registered_objective_is_here():
    """Goes red if an objective is registered without its forms being added above."""
    assert sorted(FORMS) == objective_names()


@pytest.fixture(scope="module")
def demonstrations_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "clips.jsonl"
    rows = [
        {"question": f"How many clips are {n} and {n % 3}?", "answer": "The answer is " + "3 " * (n + 1)}
        for n in range(6)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("form", EVERY_FORM)
def test_it_trains_and_evaluates(form, tiny_model_path, demonstrations_path, tmp_path, monkeypatch):
    """Goes red if an objective lacks a quantity in training or asks for one in evaluation, where there is no old policy
    and no reference (TRL's DFT once crashed there), or if it is nan or without gradient on the tiny model.
    """
    monkeypatch.setenv("PSFT_CACHE", str(tmp_path / "cache"))
    arguments = [
        "--model_name_or_path", str(tiny_model_path), "--dataset", str(demonstrations_path),
        "--eval_dataset", f"held={demonstrations_path}", "--eval_strategy", "steps", "--eval_steps", "1",
        "--output_dir", str(tmp_path / "run"), "--max_steps", "2", "--train_batch_size", "4", "--mini_batch_size", "2",
        "--learning_rate", "1e-2", "--bf16", "false", "--report_to", "none", "--save_strategy", "no",
        "--disable_tqdm", "true", "--gradient_checkpointing", "false",
    ]  # fmt: skip
    assert main(["train", *arguments, *flags_of(form)]) == 0
    check_records(tmp_path / "run", form, num_steps=2, eval_steps=1)


@pytest.mark.slow
@pytest.mark.timeout(1800)  # on a shared machine several minutes each
@pytest.mark.parametrize("form", REAL_MODEL_FORMS)
def test_it_trains_and_evaluates_on_a_real_model(form, tmp_path):
    """The same with a real vocabulary and real weights, two windows of four steps. Goes red as above, or if a weight
    overflows where logits are peaked. Held-out NLL falls, but not for objectives that weigh a token by its own
    probability: theirs may rise while their loss falls.
    """
    if not is_built():
        pytest.skip(f"{NAME} is not in psft's cache: `make quickstart` builds it")
    flags = [
        "--model_name_or_path", NAME, "--dataset", "reasoning-gym:gsm_symbolic?size=16&seed=0",
        "--eval_dataset", "held=reasoning-gym:gsm_symbolic?size=2&seed=1000", "--eval_strategy", "steps",
        "--eval_steps", "4", "--output_dir", str(tmp_path / "run"), "--max_steps", "8", "--train_batch_size", "8",
        "--mini_batch_size", "2", "--learning_rate", "1e-4", "--report_to", "none", "--save_strategy", "no",
        "--disable_tqdm", "true", "--gradient_checkpointing", "false",
    ]  # fmt: skip
    if form.startswith(("iw_sft", "sft_kl kl_estimator=k")):
        flags += ["--ref_cache_dir", str(tmp_path / "cache")]
    assert main(["train", *flags, *flags_of(form)]) == 0
    check_records(tmp_path / "run", form, num_steps=8, eval_steps=4)
    held = [row["value"] for row in rows_of(tmp_path / "run" / "eval.jsonl") if row["metric"] == "nll"]
    assert held[-1] < held[0] or (form.startswith(("dft", "asft", "chord_phi")) and held[-1] != held[0])
