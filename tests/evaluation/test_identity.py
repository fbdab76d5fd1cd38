"""Laws of a model's identity: it changes with what decides an answer, and with nothing else."""

from __future__ import annotations

import json
import os

import pytest

from psft.errors import RequestError
from psft.evaluation import identity
from psft.evaluation.identity import chat_template_hash, find_run, folder_identity, model_of_folder, plain_name
from psft.runs import RunFolder


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A model's folder, as its identity sees it, and a cache of its own."""
    monkeypatch.setenv("PSFT_CACHE", str(tmp_path / "cache"))
    made = tmp_path / "model"
    made.mkdir()
    (made / "config.json").write_text('{"rope_theta": 1}')
    (made / "model.safetensors").write_bytes(b"weights 1")
    (made / "tokenizer.json").write_text("{}")
    return made


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", b'{"rope_theta": 2}'), ("model.safetensors", b"weights 2"), ("chat_template.jinja", b"x"),
        ("modeling_own.py", b"x"), ("generation_config.json", b"{}"), ("tokenizer_config.json", b"{}"),
    ],
)  # fmt: skip
def test_a_byte_that_decides_an_answer_changes_the_identity(folder, name, content):
    """The first two keep their size. Goes red if a file is left out, or a size taken for its content."""
    before = folder_identity(folder)
    (folder / name).write_bytes(content)
    assert folder_identity(folder) != before


def test_what_decides_no_answer_does_not(folder):
    """Goes red if the optimizer's state, notes or the folder's own name are part of it."""
    before = folder_identity(folder)
    for name in ("optimizer.pt", "training_args.bin", "README.md", "trainer_state.json", "psft_window.safetensors"):
        (folder / name).write_bytes(b"x")
    assert folder_identity(folder.rename(folder.with_name("moved"))) == before


def test_a_large_file_is_read_once_until_it_changes(folder, monkeypatch):
    """Goes red if the checksum is not remembered, or remembered in spite of a newer file of the same size."""
    monkeypatch.setattr(identity, "_SMALL", 9)  # the weights' size: they are a large file now
    read = []
    monkeypatch.setattr(identity, "sha256_of", lambda path: read.append(path.name) or path.read_bytes().hex())
    first = folder_identity(folder)
    assert folder_identity(folder) == first and read.count("model.safetensors") == 1
    (folder / "model.safetensors").write_bytes(b"weights 2")
    os.utime(folder / "model.safetensors", (1, 1))
    assert folder_identity(folder) != first and read.count("model.safetensors") == 2


def test_a_folder_without_a_model_is_refused(tmp_path):
    """Goes red if the identity of nothing is a value."""
    with pytest.raises(RequestError, match="holds no model file"):
        folder_identity(tmp_path)


def test_a_checkpoint_knows_its_run_and_step(folder, tmp_path):
    """Goes red if the step of the final model is the last checkpoint's, or a plain folder is taken for a run's."""
    assert find_run(folder) == (None, None)
    run = RunFolder(tmp_path / "run")
    run.write_json("run.json", {})
    checkpoint = folder.rename(tmp_path / "run" / "checkpoint-40")
    assert find_run(checkpoint) == (tmp_path / "run", 40)
    assert find_run(tmp_path / "run") == (tmp_path / "run", None)  # killed: nobody knows
    run.write_json("summary.json", {"steps": 44})
    assert find_run(tmp_path / "run") == (tmp_path / "run", 44)
    assert model_of_folder(str(checkpoint), checkpoint).name == "run-checkpoint-40"


def test_a_name_becomes_a_part_of_a_file_name():
    """Goes red if a slash gets through, or nothing is left."""
    assert plain_name("Qwen/Qwen2.5 7B") == "Qwen_Qwen2.5_7B" and plain_name("..") == plain_name("/") == "model"


def test_a_template_is_found_in_either_place(folder):
    """Goes red if the file and the configuration of one template have two hashes."""
    assert chat_template_hash(folder) is None
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ x }}"}))
    inside = chat_template_hash(folder)
    (folder / "chat_template.jinja").write_text("{{ x }}")
    assert inside is not None and chat_template_hash(folder) == inside
