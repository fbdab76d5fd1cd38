"""The command as a whole: any name for files and folders, and a model folder that wants more than it may have."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from psft.cli.main import main

ROWS = [{"question": f"{number} + 1 = ?", "answer": f"It is {number + 1}."} for number in range(8)]
SETTINGS = "train_batch_size: 4\nmini_batch_size: 2\nmax_steps: 1\nbf16: false\nreport_to: none\ndisable_tqdm: true\n"


@pytest.fixture
def request_for(tiny_model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """request_for(name) -> arguments of a one-step run whose recipe, data, model and output folder have that name."""
    monkeypatch.chdir(tmp_path)

    def make(name: str) -> list[str]:
        shutil.copytree(tiny_model_path, tmp_path / name)
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
        (tmp_path / f"{name}.yaml").write_text(SETTINGS)
        argv = [f"./{name}.yaml", f"--dataset={name}.jsonl", f"--model_name_or_path=./{name}"]
        argv += [f"--output_dir=out/{name}", "--eval_dataset", json.dumps([f"held={name}.jsonl"])]
        return [*argv, "--save_strategy=steps", "--save_steps=1"]

    return make


@pytest.mark.parametrize(
    "name", ["a b 'c\" $(d) %s {e}", "--leading=dash,and comma", "line\nbreak\ttab", "ünïcödé 数学 😀", "\u202ertl #1"]
)
def test_a_run_reads_and_writes_under_any_name(name, request_for, tmp_path, capsys):
    """Goes red if a name is split, quoted, stripped or encoded anywhere on its way to the run folder.

    Seen: `_split_flags` partitioning at the last "=".
    """
    argv = request_for(name)
    code = main(["train", *argv])
    assert code == 0, capsys.readouterr().err
    folder = tmp_path / "out" / name
    info = json.loads((folder / "run.json").read_text())
    assert info["data"]["dataset"] == f"{name}.jsonl" and info["data_reports"]["train"]["num_used"] == len(ROWS)
    assert (folder / "model.safetensors").is_file() and (folder / "checkpoint-1").is_dir()
    assert main(["plan", *argv]) == 0


def test_a_dash_before_a_file_s_name_needs_no_other_spelling(request_for, tmp_path, capsys):
    """Goes red if a value that begins with one dash is taken for an option."""
    argv = [word for word in request_for("-x") if not word.startswith("--dataset")]
    assert main(["plan", *argv, "--dataset", "-x.jsonl"]) == 0
    assert main(["plan", "-x.yaml"]) == 2
    assert "./-x.yaml" in capsys.readouterr().err


def test_a_model_folder_s_code_and_pickles_are_refused_until_they_are_allowed(
    request_for, tmp_path, capsys, monkeypatch
):
    """Goes red if `prepare_run` does not pass a setting on, one implies the other, or a traceback is shown."""
    import torch

    argv = request_for("model")
    folder = tmp_path / "model"
    torch.save(_weights(folder), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert main(["train", *argv, "--trust_remote_code"]) == 2
    assert "--allow_pickle" in capsys.readouterr().err
    assert main(["train", *argv, "--allow_pickle"]) == 0
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoModelForCausalLM": "evil.Model"}}))
    (folder / "evil.py").write_text("raise RuntimeError('code of the model folder was run')\n")
    capsys.readouterr()
    again = [*argv, "--allow_pickle", "--overwrite_output_dir"]
    assert main(["train", *again]) == 2
    refused = capsys.readouterr().err
    assert "--trust_remote_code" in refused and "was run" not in refused and "Traceback" not in refused
    assert main(["train", *again, "--trust_remote_code"]) == 2
    assert "code of the model folder was run" in capsys.readouterr().err


def _weights(folder: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")
