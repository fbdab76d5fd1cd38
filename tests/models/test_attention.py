"""Which attention is taken for joined rows, on imagined CUDA machines."""

import importlib.metadata

import pytest
import torch
from transformers import GPT2Config
from transformers.utils import import_utils

from psft.errors import RequestError
from psft.models import load_model, varlen
from psft.models.attention import choose_attention


@pytest.fixture
def installed(monkeypatch):
    """installed(*names, capability): what transformers and PyTorch have on an imagined CUDA machine."""

    def pretend(*names, capability=(9, 0)):
        known = {
            "is_flash_attn_3_available": "flash3", "is_flash_attn_2_available": "flash2",
            "is_torch_flex_attn_available": "flex",
        }  # fmt: skip
        for function, name in known.items():
            monkeypatch.setattr(import_utils, function, lambda name=name: name in names)
        monkeypatch.setattr(varlen, "is_in_pytorch", lambda: "varlen" in names)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
        monkeypatch.setattr(importlib.metadata, "version", lambda name: "1.2.3")

    return pretend


def chosen(folder, requested=None, **how):
    return choose_attention(requested, folder, **{"padding_free": True, "is_half": True, "device_type": "cuda", **how})


EVERY = ("flash3", "flash2", "varlen", "flex")


def test_the_best_attention_that_is_there_is_taken_and_said(installed, tiny_model_path):
    """Goes red if the order changes, or a kernel is taken that the device or the precision cannot run."""
    installed(*EVERY)
    assert chosen(tiny_model_path).name == "flash_attention_3"
    assert chosen(tiny_model_path).why == "padding_free: attention is flash_attention_3 (flash-attn-3 1.2.3)"
    assert chosen(tiny_model_path, is_half=False).name == "flex_attention"
    installed(*EVERY, capability=(8, 0))
    assert chosen(tiny_model_path).name == "flash_attention_2"
    installed(*EVERY, capability=(7, 5))
    assert chosen(tiny_model_path).name == "flex_attention"
    installed("varlen", "flex")
    assert chosen(tiny_model_path).name == "psft_varlen"
    installed("flex")
    assert chosen(tiny_model_path).name == "flex_attention"


def test_where_nothing_fits_every_reason_and_a_way_on_are_told(installed, tiny_model_path):
    installed("varlen", "flash2", capability=(8, 9))
    told = "flash_attention_3: flash-attn-3 is not.*psft_varlen: it computes in half.*flex.*pip install flash-attn"
    with pytest.raises(RequestError, match=told):
        chosen(tiny_model_path, is_half=False)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"head_dim": 12}, "flex_attention"), ({"head_dim": 512}, "flex_attention"), ({"head_dim": 256}, "psft_varlen"),
        ({"attn_logit_softcapping": 50.0}, "flex_attention"),
    ],
)  # fmt: skip
def test_a_kernel_is_not_taken_for_a_model_that_it_cannot_compute(change, name, installed, make_tiny_model, tmp_path):
    """Goes red if the heads' size or soft-capped scores are not looked at: the run would fail in its first forward."""
    installed("varlen", "flex")
    config = make_tiny_model().config
    for field, value in change.items():
        setattr(config, field, value)
    config.save_pretrained(tmp_path)
    assert chosen(tmp_path).name == name


def test_a_model_class_without_support_is_not_given_a_kernel(installed, tmp_path, monkeypatch):
    from transformers import GPT2LMHeadModel

    installed("flash2")
    GPT2Config().save_pretrained(tmp_path)
    assert chosen(tmp_path).name == "flash_attention_2"
    monkeypatch.setattr(GPT2LMHeadModel, "_supports_flash_attn", False)
    with pytest.raises(RequestError, match="GPT2LMHeadModel has no support for it"):
        chosen(tmp_path)


def test_what_a_person_asked_for_is_kept_or_refused(installed, tiny_model_path):
    """Goes red if a request is replaced, or what the device or precision cannot run goes through."""
    installed("flash2")
    hub = "kernels-community/flash-attn2"
    for name in ("sdpa", "eager", "flex_attention", "flash_attention_2", "psft_varlen", hub):
        assert chosen(tiny_model_path, name) == chosen(tiny_model_path, name, padding_free=False)
        assert chosen(tiny_model_path, name).name == name
    assert chosen(tiny_model_path, padding_free=False).name is None
    assert chosen(tiny_model_path, device_type="cpu").name is None
    for name in ("flash_attention_2", "flex_attention", "psft_varlen", hub):
        with pytest.raises(RequestError, match=f"attn_implementation={name} cannot be trained on a CPU.*sdpa or eager"):
            chosen(tiny_model_path, name, device_type="cpu", padding_free=False)
    for name in ("flash_attention_2", "psft_varlen", hub):
        with pytest.raises(RequestError, match=f"attn_implementation={name} computes in half precision only"):
            chosen(tiny_model_path, name, is_half=False)
    assert chosen(tiny_model_path, "flex_attention", is_half=False).name == "flex_attention"


def test_a_model_is_loaded_and_saved_with_psft_varlen(tiny_model_path, tmp_path):
    """Goes red if the name is unknown where nothing else of psft is imported, or goes into a saved model."""
    model = load_model(str(tiny_model_path), attn_implementation="psft_varlen")
    assert model.config._attn_implementation == "psft_varlen"
    model.save_pretrained(tmp_path)
    assert "psft_varlen" not in (tmp_path / "config.json").read_text()
