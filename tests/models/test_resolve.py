"""From a name to a folder, a tokenizer and weights: every way it can go wrong says what, where and what to do."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from psft.errors import RequestError
from psft.models import load_model, load_tokenizer, resolve_model
from psft.models.resolve import check_dtype, local_folder, looks_like_hub_id


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


@pytest.mark.parametrize(
    ("tokenizer_class", "model_type"),
    [
        ("TokenizersBackend", "llama"),
        ("PreTrainedTokenizerFast", "qwen2"),
        ("Qwen2TokenizerFast", "qwen2"),  # its own class, which puts a text into another form first
        ("Qwen2Tokenizer", "llama"),
        ("LlamaTokenizerFast", "llama"),
        ("LlamaTokenizer", "mistral"),
        ("TokenizersBackend", "unheard-of"),
        (None, "qwen2"),
    ],
)
def test_a_tokenizer_is_what_transformers_makes_of_the_whole_configuration(
    tokenizer_class: str | None, model_type: str, make_tiny_tokenizer: Any, tmp_path: Path
) -> None:
    """Goes red if a name that transformers looks at is left out of what it is given: another class, other tokens."""
    from transformers import AutoTokenizer

    from psft.data.digests import digest_of_tokenizer

    make_tiny_tokenizer().save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text()) | {"tokenizer_class": tokenizer_class}
    if tokenizer_class is None:
        del settings["tokenizer_class"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    made, expected = load_tokenizer(str(tmp_path)), AutoTokenizer.from_pretrained(tmp_path)
    assert type(made) is type(expected)
    assert digest_of_tokenizer(made) == digest_of_tokenizer(expected) is not None


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


CODE = "raise RuntimeError('code of the model folder was run')\n"


@pytest.fixture
def folder_with_code(tiny_model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """folder_with_code(file, model_type) -> a copy of the tiny model whose `file` names Python code beside it."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))

    def make(file: str, model_type: str = "llama") -> Path:
        folder = tmp_path / "with code"
        shutil.copytree(tiny_model_path, folder)
        content = json.loads((folder / file).read_text())
        names = {
            "AutoConfig": "evil.Config",
            "AutoModelForCausalLM": "evil.Model",
            "AutoTokenizer": ["evil.Slow", None],
        }
        content |= {"auto_map": names}
        if file == "config.json":
            content["model_type"] = model_type
        (folder / file).write_text(json.dumps(content))
        (folder / "evil.py").write_text(CODE)
        return folder

    return make


@pytest.mark.parametrize("model_type", ["llama", "unheard_of"])
def test_code_of_a_model_folder_is_run_only_if_it_is_trusted(folder_with_code: Any, model_type: str) -> None:
    """Goes red if auto_map is not looked for, trust_remote_code is not passed on, or allow_pickle implies it."""
    folder = str(folder_with_code("config.json", model_type))
    for load in (resolve_model, load_model, load_tokenizer):
        with pytest.raises(RequestError, match=r"config\.json names Python code .*evil\.Model.*--trust_remote_code"):
            load(folder, allow_pickle=True)
    resolve_model(folder, trust_remote_code=True)
    for trusting in (load_model, load_tokenizer):
        with pytest.raises(RequestError, match="code of the model folder was run"):
            trusting(folder, trust_remote_code=True)


def test_code_of_a_tokenizer_is_run_only_if_it_is_trusted(folder_with_code: Any) -> None:
    """Goes red if only config.json is looked at."""
    folder = str(folder_with_code("tokenizer_config.json"))
    with pytest.raises(RequestError, match=r"tokenizer_config\.json names Python code.*--trust_remote_code"):
        load_tokenizer(folder)
    with pytest.raises(RequestError, match="code of the model folder was run"):
        load_tokenizer(folder, trust_remote_code=True)


@pytest.fixture
def pickled_model(tiny_model: Any, tiny_model_path: Path, tmp_path: Path) -> Path:
    """The tiny model with pytorch_model.bin and no safetensors."""
    import torch

    folder = tmp_path / "pickled"
    shutil.copytree(tiny_model_path, folder)
    (folder / "model.safetensors").unlink()
    torch.save(tiny_model.state_dict(), folder / "pytorch_model.bin")
    return folder


def test_pickled_weights_are_read_only_if_they_are_allowed(pickled_model: Path, tiny_model: Any) -> None:
    """Goes red if a folder of .bin files passes, allow_pickle is not passed on, or trust_remote_code implies it."""
    import torch

    for load in (resolve_model, load_model):
        with pytest.raises(RequestError, match=r"pickled has its weights only as pytorch_model\.bin.*--allow_pickle"):
            load(str(pickled_model), trust_remote_code=True)
    loaded = load_model(str(pickled_model), allow_pickle=True)
    assert all(torch.equal(loaded.state_dict()[name], weight) for name, weight in tiny_model.state_dict().items())


def test_allowed_pickles_still_run_no_code(pickled_model: Path, tmp_path: Path) -> None:
    """Goes red if anyone loads with weights_only=False: the pickle would write a file."""
    import torch

    written = tmp_path / "written"
    torch.save({"model.norm.weight": _Writes(str(written))}, pickled_model / "pytorch_model.bin")
    with pytest.raises(RequestError, match="cannot be loaded"):
        load_model(str(pickled_model), allow_pickle=True)
    assert not written.exists()


class _Writes:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return open, (self.path, "w")


def test_safetensors_are_taken_where_both_are(pickled_model: Path, tiny_model_path: Path) -> None:
    """Goes red if allow_pickle makes pickles the first choice."""
    shutil.copy(tiny_model_path / "model.safetensors", pickled_model)
    (pickled_model / "pytorch_model.bin").write_bytes(b"no pickle")
    load_model(str(pickled_model))
    load_model(str(pickled_model), allow_pickle=True)


@pytest.mark.parametrize(("trusted", "pickles"), [(False, False), (True, False), (False, True)])
def test_only_what_is_allowed_is_fetched_from_the_hub(
    trusted: bool, pickles: bool, monkeypatch: pytest.MonkeyPatch, pickled_model: Path
) -> None:
    """Goes red if Python files or .bin files are downloaded unasked, or both kinds of weights where one is enough."""
    import huggingface_hub

    asked: list[list[str]] = []

    def fetch(name: str, *, revision: str, allow_patterns: list[str]) -> str:
        asked.append(allow_patterns)
        return str(pickled_model)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    if pickles:
        assert resolve_model("owner/name", allow_pickle=True) == pickled_model
    else:
        with pytest.raises(RequestError, match="allow_pickle"):
            resolve_model("owner/name", trust_remote_code=trusted)
    assert ["*.bin" in patterns for patterns in asked] == ([False, True] if pickles else [False])
    assert all(("*.py" in patterns) == trusted for patterns in asked)


@pytest.mark.parametrize(
    ("file", "content", "load"),
    [
        ("config.json", b"[" * 9999, load_model),
        ("config.json", b"[]", load_model),
        ("config.json", b'{"model_type": 7, "hidden_size": "x"}', load_model),
        ("config.json", b"\xff\xfe", load_model),
        ("model.safetensors", b"\x08\0\0\0\0\0\0\0notjson!", load_model),
        ("model.safetensors", b"", load_model),
        ("model.safetensors", None, load_model),
        ("tokenizer.json", b"{}", load_tokenizer),
        ("tokenizer.json", b"[" * 9999, load_tokenizer),
        ("tokenizer_config.json", b"[]", load_tokenizer),
        ("tokenizer_config.json", b'{"eos_token": 7, "tokenizer_class": {}}', load_tokenizer),
        ("chat_template.jinja", b"\xff", load_tokenizer),
    ],
)
def test_a_damaged_model_folder_is_one_line(
    file: str, content: bytes | None, load: Any, tiny_model_path: Path, tmp_path: Path
) -> None:
    """Goes red if an exception of transformers, safetensors or tokenizers (plain Exception there) comes through."""
    folder = tmp_path / "damaged"
    shutil.copytree(tiny_model_path, folder)
    content = (folder / file).read_bytes()[:-100] if content is None else content
    (folder / file).write_bytes(content)
    with pytest.raises(RequestError, match="damaged") as caught:
        load(str(folder))
    assert str(caught.value).isprintable() and len(str(caught.value)) < 600


def test_a_model_with_an_adapter_in_its_folder_is_refused(tiny_model_path: Path, tmp_path: Path) -> None:
    """Goes red if the adapter is put into the model without a word, as transformers does where peft is installed."""
    folder = tmp_path / "both"
    shutil.copytree(tiny_model_path, folder)
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "somebody/else"}')
    with pytest.raises(RequestError, match="holds a LoRA adapter"):
        load_model(str(folder))


@pytest.mark.parametrize("name", ["~nobody-of-this-name/x", "a\0b", "x" * 5000, "a\nb", "owner/na--me..", "ünï/mödel"])
def test_an_impossible_model_name_is_one_line(name: str) -> None:
    """Goes red if the exception of the system or of the hub's client comes through, in `local_folder` too."""
    with pytest.raises(RequestError) as caught:
        resolve_model(name)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 600
    if len(name) < 5000:
        assert local_folder(name) is None


@pytest.mark.parametrize("path", ["~nobody-of-this-name/x", "a\0b", "."])
def test_an_impossible_template_path_is_one_line(path: str, tiny_model_path: Path) -> None:
    """Goes red if only OSError is expected of a path."""
    with pytest.raises(RequestError, match="chat template .* cannot be read"):
        load_tokenizer(str(tiny_model_path), path)
