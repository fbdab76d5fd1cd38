"""Sizes counted from the table equal those of the models that transformers builds (on the meta device: no memory)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from psft.errors import RequestError
from psft.models.architectures import KNOWN, Architecture, find_architecture, from_config


def _config(architecture: Architecture) -> Any:
    from transformers import LlamaConfig, Qwen2Config, Qwen3Config

    kind: Any = Qwen3Config if architecture.has_qk_norm else Qwen2Config if architecture.has_qkv_bias else LlamaConfig
    head = {} if architecture.has_qkv_bias else {"head_dim": architecture.head_size}
    return kind(
        num_hidden_layers=architecture.num_layers,
        hidden_size=architecture.hidden_size,
        intermediate_size=architecture.intermediate_size,
        num_attention_heads=architecture.num_heads,
        num_key_value_heads=architecture.num_kv_heads,
        vocab_size=architecture.vocab_size,
        tie_word_embeddings=architecture.is_tied,
        max_position_embeddings=architecture.context,
        **head,
    )


@pytest.mark.parametrize(
    "name",
    [
        "Qwen/Qwen2.5-0.5B-Instruct",
        "Qwen/Qwen2.5-7B-Instruct",
        "Qwen/Qwen3-4B-Base",
        "meta-llama/Llama-3.1-8B-Instruct",
    ],
)
def test_counted_parameters_equal_those_of_the_built_model(name: str, tmp_path: Path) -> None:
    """Goes red if a bias, a norm or the tied head is left out of the count, or `from_config` reads a size wrongly."""
    import torch
    from transformers import AutoModelForCausalLM

    architecture = KNOWN[name]
    config = _config(architecture)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert architecture.num_parameters == sum(parameter.numel() for parameter in model.parameters())
    config.save_pretrained(tmp_path)
    assert from_config(tmp_path) == architecture


# Published totals: model cards and safetensors metadata on the hub.
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("Qwen/Qwen2.5-1.5B-Instruct", 1_543_714_304),
        ("Qwen/Qwen2.5-3B-Instruct", 3_085_938_688),
        ("Qwen/Qwen2.5-7B-Instruct", 7_615_616_512),
        ("meta-llama/Llama-3.2-1B-Instruct", 1_235_814_400),
        ("meta-llama/Llama-3.1-8B-Instruct", 8_030_261_248),
        ("Qwen/Qwen3-0.6B", 596_049_920),
        ("Qwen/Qwen3-1.7B", 1_720_574_976),
        ("Qwen/Qwen3-4B-Base", 4_022_468_096),
        ("Qwen/Qwen3-8B", 8_190_735_360),
        ("smollm2-135m-instruct", 134_515_008),
        ("HuggingFaceTB/SmolLM2-360M-Instruct", 361_821_120),
        ("HuggingFaceTB/SmolLM2-1.7B-Instruct", 1_711_376_384),
    ],
)
def test_the_table_gives_the_published_totals(name: str, expected: int) -> None:
    """Goes red if a size in the table is mistyped."""
    assert KNOWN[name].num_parameters == expected


def test_unknown_models_are_unknown_and_broken_configs_are_errors(tmp_path: Path) -> None:
    """Goes red if a model of another shape is counted as if it were a Llama."""
    assert find_architecture("nobody/nothing") is None
    config = tmp_path / "config.json"
    config.write_text('{"model_type": "mamba"}')
    assert from_config(config) is None
    config.write_text('{"model_type": "llama"}')
    with pytest.raises(RequestError, match="gives no model sizes"):
        find_architecture(str(tmp_path))
