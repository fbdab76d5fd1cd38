"""The estimates: exact where they only count, within a stated factor where they approximate."""

from __future__ import annotations

from typing import Any

import pytest

from psft.models.architectures import KNOWN, Architecture
from psft.models.estimate import (
    GIB,
    Device,
    activation_bytes_per_token,
    estimate_memory,
    fewest_devices,
    flops_per_token,
    lora_parameters,
    seconds_of_forward,
    seconds_per_step,
)

QWEN = KNOWN["Qwen/Qwen2.5-7B-Instruct"]


def test_states_are_sixteen_bytes_per_parameter() -> None:
    """Goes red if weights, gradients or AdamW's two moments are left out. With LoRA only weights stay whole."""
    memory = estimate_memory(QWEN, micro_batch_tokens=1)
    assert memory.states == 16 * QWEN.num_parameters
    lora = estimate_memory(QWEN, micro_batch_tokens=1, trainable_parameters=1000)
    assert lora.states == 4 * QWEN.num_parameters + 12 * 1000


def test_operations_follow_the_formula() -> None:
    """Goes red if the old pass is counted for the first mini-batch, or for plain SFT."""
    n = QWEN.num_matmul_parameters
    assert flops_per_token(QWEN, num_mini_batches=1, gradient_checkpointing=False) == 6 * n
    assert flops_per_token(QWEN, num_mini_batches=8, gradient_checkpointing=False) == 7.75 * n
    assert flops_per_token(QWEN, num_mini_batches=8, gradient_checkpointing=True) == 9.75 * n
    device = Device("d", 1, peak_tflops=1.0, utilisation=0.5, note="")
    seconds = seconds_per_step(QWEN, device, tokens_per_step=100, num_mini_batches=1, gradient_checkpointing=False)
    assert seconds == pytest.approx(100 * 6 * n / 0.5e12)


def test_a_reference_costs_its_copy_and_a_forward_pass() -> None:
    """Goes red if the copy gets gradients or moments, is not sharded, or its pass is counted as one with a backward."""
    n = QWEN.num_matmul_parameters
    plain = estimate_memory(QWEN, micro_batch_tokens=512)
    copied = estimate_memory(QWEN, micro_batch_tokens=512, reference_parameters=1000, has_reference_logits=True)
    assert copied.states - plain.states == 4 * 1000
    assert copied.head - plain.head == 512 * QWEN.vocab_size * 4 and copied.activations == plain.activations
    half = estimate_memory(QWEN, micro_batch_tokens=512, reference_parameters=1000, pure_bf16=True)
    assert half.reference == 2 * 1000
    each = flops_per_token(QWEN, num_mini_batches=1, gradient_checkpointing=False, reference_matmul_parameters=n)
    assert each == 8 * n
    device = Device("d", 1, peak_tflops=1.0, utilisation=0.5, note="")
    assert seconds_of_forward(n, device, num_tokens=100) == pytest.approx(100 * 2 * n / 0.5e12)


def test_sharding_needs_the_fewest_devices_that_fit() -> None:
    """Goes red if `fewest_devices` stops one too early or late. 7B: 114 GiB of states fit 80 GB only when shared."""
    memory = estimate_memory(QWEN, micro_batch_tokens=8192, gradient_checkpointing=True)
    count = fewest_devices(memory, Device("80", 76, 1, 1, ""))
    assert count is not None and count > 1
    assert memory.total(count) <= 76 * GIB < memory.total(count // 2)
    assert fewest_devices(memory, Device("tiny", 1, 1, 1, "")) is None


def test_lora_parameters_equal_those_of_peft(tiny_model: Any) -> None:
    """Goes red if a linear layer is left out."""
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(tiny_model, peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    trained = sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)
    tiny = Architecture(2, 32, 64, 4, 2, 8, 400, True, 64)
    assert lora_parameters(tiny, 4) == trained


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_activations_are_within_a_fifth_of_what_torch_keeps(gradient_checkpointing: bool) -> None:
    """Goes red if the MLP or the residual stream is left out. Measured: what autograd saves."""
    import torch
    from transformers import LlamaConfig, LlamaModel

    sizes = {"num_hidden_layers": 4, "hidden_size": 128, "intermediate_size": 384, "num_attention_heads": 4}
    config = LlamaConfig(**sizes, num_key_value_heads=2, vocab_size=64, attn_implementation="sdpa", use_cache=False)
    model = LlamaModel(config).train()
    if gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    saved: dict[int, Any] = {}  # holds the storages, so that no address is used twice

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage
        return tensor

    num_tokens = 256
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(torch.arange(num_tokens)[None] % 64).last_hidden_state
    assert output.requires_grad
    measured = sum(storage.nbytes() for storage in saved.values()) / num_tokens
    architecture = Architecture(4, 128, 384, 4, 2, 32, 64, False, 256)
    expected = activation_bytes_per_token(architecture, half=False, gradient_checkpointing=gradient_checkpointing)
    assert measured / 1.2 <= expected <= measured * 1.2
