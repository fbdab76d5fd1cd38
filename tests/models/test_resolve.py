"""From a name to a folder, a tokenizer and weights: every way it can go wrong says what, where and what to do."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from psft.errors import RequestError
from psft.models import load_model, load_tokenizer, resolve_model
from psft.models.resolve import check_dtype, looks_like_hub_id


def test_a_saved_model_is_resolved_and_loads_in_float32(tiny_model_path: Path, tiny_model: Any) -> None:
    """Goes red if `load_model` drops the dtype or reads other weights."""
    import torch

    assert resolve_model(str(tiny_model_path)) == tiny_model_path
    loaded = load_model(str(tiny_model_path))
    for name, weight in tiny_model.state_dict().items():
        assert loaded.state_dict()[name].dtype == torch.float32
        assert torch.equal(loaded.state_dict()[name], weight)


def test_a_folder_without_weights_is_refused(tiny_model_path: Path, tmp_path: Path) -> None:
    """Goes red if `check_model_folder` is not called for local folders."""
    with pytest.raises(RequestError, match="no config.json"):
        resolve_model(str(tmp_path))
    shutil.copy(tiny_model_path / "config.json", tmp_path)
    with pytest.raises(RequestError, match=r"no weights .*model\.safetensors"):
        resolve_model(str(tmp_path))


def test_a_missing_shard_is_named(tiny_model_path: Path, tmp_path: Path) -> None:
    """Goes red if the shards of an index are not looked for."""
    shutil.copy(tiny_model_path / "config.json", tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}))
    (tmp_path / "one.safetensors").write_bytes(b"x")
    with pytest.raises(RequestError, match="lacks 1 of 2 weight files, first two.safetensors"):
        resolve_model(str(tmp_path))
    index.write_text("{")
    with pytest.raises(RequestError, match="cannot be read"):
        resolve_model(str(tmp_path))


def test_a_name_that_is_neither_path_nor_hub_id_is_refused(tmp_path: Path) -> None:
    """Goes red if such a name is sent to the hub, or a file is taken for a folder."""
    with pytest.raises(RequestError, match="no model folder at ./nowhere"):
        resolve_model("./nowhere")
    (tmp_path / "file").write_text("")
    with pytest.raises(RequestError, match="is a file"):
        resolve_model(str(tmp_path / "file"))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("Qwen/Qwen3-4B-Base", True),
        ("runs/a/b", False),
        ("./runs", False),
        ("../x", False),
        ("~/x", False),
        ("/x", False),
    ],
)
def test_hub_ids_are_told_from_paths(name: str, expected: bool) -> None:
    """Goes red if a relative path counts as owner/name."""
    assert looks_like_hub_id(name) is expected


def test_a_hub_model_offline_is_one_clear_error() -> None:
    """Goes red if the hub's own exception comes through. Offline by tests/conftest.py."""
    with pytest.raises(RequestError, match="cannot be fetched from the hub"):
        resolve_model("nobody/no-such-model")


def test_pure_bf16_is_refused_with_the_reason_unless_forced() -> None:
    """Goes red if bfloat16 passes without force_pure_bf16."""
    with pytest.raises(RequestError, match=r"1e-6.*rounded away.*--force_pure_bf16"):
        check_dtype("bfloat16")
    check_dtype("bfloat16", force_pure_bf16=True)
    check_dtype("float32")
    with pytest.raises(RequestError, match="float16 is not known"):
        check_dtype("float16")


def test_the_reason_holds_an_update_at_1e_6_is_lost_in_bf16() -> None:
    """The claim of the message: AdamW moves a weight by at most about lr, and 0.02 is a usual weight."""
    import torch

    weight = torch.tensor(0.02, dtype=torch.bfloat16)
    assert weight - 1e-6 == weight
    assert weight.float() - 1e-6 != weight.float()


def test_a_missing_pad_token_becomes_a_spare_one_not_the_end(make_tiny_tokenizer: Any, tmp_path: Path) -> None:
    """Goes red if the end token is taken although `<|pad|>` is in the vocabulary."""
    tokenizer = make_tiny_tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path))
    assert loaded.pad_token == "<|pad|>" and len(loaded) == len(tokenizer)


def test_a_chat_template_file_replaces_the_models(tiny_model_path: Path, tmp_path: Path) -> None:
    """Goes red if chat_template_path is ignored."""
    template = tmp_path / "template.jinja"
    template.write_text("{% for message in messages %}[{{ message['content'] }}]{% endfor %}")
    tokenizer = load_tokenizer(str(tiny_model_path), str(template))
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "[hi]"
    with pytest.raises(RequestError, match="cannot be read"):
        load_tokenizer(str(tiny_model_path), str(tmp_path / "none.jinja"))
