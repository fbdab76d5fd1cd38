"""Rough memory and time of a training run, from sizes alone. Estimates, not measurements: expect 30 % either way.

Left out: attention's own operations (under 10 % up to about 5,000 tokens), allocator fragmentation, communication.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass

from psft.machine import logical_cores
from psft.models.architectures import Architecture

GIB = 2**30
HEAD_BYTES_PER_LOGIT = 9  # of one chunk, float32: 4 each for probability and (some objectives) logit, 1 for scratch
HEAD_BYTES_PER_REFERENCE_LOGIT = 4  # its log-probability, float32
DEFAULT_HEAD_CHUNK_TOKENS = 512  # psft.ops.lm_head.CHUNK_ROWS


@dataclass(frozen=True)
class Device:
    """One accelerator or CPU. memory_gib: usable. peak_tflops: dense. utilisation: assumed share of the peak."""

    name: str
    memory_gib: float
    peak_tflops: float
    utilisation: float
    note: str


ACCELERATORS = (
    Device("RTX 4090 24GB", 22, 165, 0.40, "bf16 dense, float32 sums; vendor's data sheet"),
    Device("A100 80GB", 76, 312, 0.45, "bf16 dense; vendor's data sheet"),
    Device("H100 80GB", 76, 989, 0.40, "bf16 dense, SXM; vendor's data sheet"),
    Device("H200 141GB", 134, 989, 0.40, "bf16 dense, SXM; vendor's data sheet"),
)
CPU_UTILISATION = 0.6


def this_cpu() -> Device:
    """The machine's own processor; its peak is the fastest of five float32 matrix products (takes about 0.1 s)."""
    import numpy as np

    cores = logical_cores()
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
    except (ValueError, OSError, AttributeError):
        memory = 8.0
    size = 768
    matrix = np.full((size, size), 0.5, dtype=np.float32)
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        matrix @ matrix  # noqa: B018  only its time is wanted
        seconds.append(time.perf_counter() - start)
    peak_tflops = 2 * size**3 / min(seconds) / 1e12
    return Device(f"this CPU ({cores} cores)", memory * 0.9, peak_tflops, CPU_UTILISATION, "float32; peak measured now")


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on one device that holds everything. Sharding over n devices divides `states` by n."""

    weights: float
    gradients: float
    optimizer: float
    autocast_copies: float
    activations: float
    head: float
    reference: float = 0.0

    @property
    def states(self) -> float:
        """What full sharding (FSDP, ZeRO-3) divides."""
        return self.weights + self.gradients + self.optimizer + self.reference

    def total(self, num_shards: int = 1) -> float:
        """Bytes on each of `num_shards` devices. Sharded, only about two layers' bf16 copies are whole at a time."""
        copies = self.autocast_copies if num_shards == 1 else self.autocast_copies * 0.1
        return self.states / num_shards + copies + self.activations + self.head


def estimate_memory(
    model: Architecture,
    *,
    micro_batch_tokens: int,
    trainable_parameters: int | None = None,
    bf16_autocast: bool = True,
    pure_bf16: bool = False,
    gradient_checkpointing: bool = False,
    reference_parameters: int = 0,
    has_reference_logits: bool = False,
    head_chunk_tokens: int = DEFAULT_HEAD_CHUNK_TOKENS,
) -> MemoryEstimate:
    """Bytes needed while one micro-batch is trained.

    weights 4 B per parameter; gradients 4 B and AdamW 8 B per trainable one (pure bf16: 2, 2 and 4). Autocast keeps a
    bf16 copy, 2 B, of every matrix it multiplies by. Activations as `activation_bytes_per_token`; the head holds the
    logits of `head_chunk_tokens` at most, 9 B each. A frozen reference has 4 B per parameter (pure bf16: 2) and no
    gradients; its logits add 4 B each. It runs without gradients, so nothing of it is kept from forward to backward.

    Args:
        micro_batch_tokens: padded tokens of one forward pass on one device.
        trainable_parameters: fewer than all with LoRA; default all.
        reference_parameters: of a frozen copy kept in memory; 0 where there is none, or where the reference is the
            trained model without its adapter.
        has_reference_logits: whether the reference's whole distribution is compared at every token.
    """
    trainable = model.num_parameters if trainable_parameters is None else trainable_parameters
    size = 2 if pure_bf16 else 4
    per_token = activation_bytes_per_token(
        model, half=bf16_autocast or pure_bf16, gradient_checkpointing=gradient_checkpointing
    )
    one_layer = _layer_bytes_per_token(model, half=bf16_autocast or pure_bf16) if gradient_checkpointing else 0
    per_logit = HEAD_BYTES_PER_LOGIT + (HEAD_BYTES_PER_REFERENCE_LOGIT if has_reference_logits else 0)
    return MemoryEstimate(
        weights=size * model.num_parameters,
        gradients=size * trainable,
        optimizer=2 * size * trainable,
        autocast_copies=2.0 * model.num_matmul_parameters if bf16_autocast and not pure_bf16 else 0.0,
        activations=micro_batch_tokens * (per_token + one_layer),
        head=min(micro_batch_tokens, head_chunk_tokens) * model.vocab_size * per_logit,
        reference=size * reference_parameters,
    )


def activation_bytes_per_token(model: Architecture, *, half: bool, gradient_checkpointing: bool) -> float:
    """Bytes kept per token from forward to backward, head excluded.

    Without checkpointing each layer keeps what `_layer_bytes_per_token` lists; with it only its input, 4 B x
    hidden_size (the residual stream stays float32), and one layer at a time is whole again. The last norm
    keeps two such vectors.
    """
    vector = 4.0 * model.hidden_size
    each_layer = vector if gradient_checkpointing else _layer_bytes_per_token(model, half=half)
    return model.num_layers * each_layer + 2 * vector


def _layer_bytes_per_token(model: Architecture, *, half: bool) -> float:
    """Norms and residuals: 4 float32 vectors of hidden_size. Then, in the compute dtype: the inputs of the projections
    (2 hidden_size); queries, keys and values before and after the rotation, the attention's result (4 queries, 4 keys
    or values); the MLP's gate, its activation, the up projection and their product (4 intermediate_size)."""
    query, key_value = model.num_heads * model.head_size, model.num_kv_heads * model.head_size
    computed = 2 * model.hidden_size + 4 * query + 4 * key_value + 4 * model.intermediate_size
    return 4.0 * 4 * model.hidden_size + (2 if half else 4) * computed


def flops_per_token(
    model: Architecture,
    *,
    num_mini_batches: int,
    gradient_checkpointing: bool,
    reference_matmul_parameters: int = 0,
) -> float:
    """Operations per training token: 6 N (forward 2 N, backward 4 N), + 2 N where checkpointing repeats the forward
    pass, + 2 N (K-1)/K for an old pass (mini-batch 1 of K needs none), + 2 N_ref for a reference's forward pass.

    Args:
        num_mini_batches: K, the mini-batches that share an old policy; 1 for an objective without one.
        reference_matmul_parameters: N_ref of a reference that reads every step's tokens; 0 where there is none, or
            where its log-probs were computed once (`seconds_of_forward`).
    """
    old_pass = 2 * (num_mini_batches - 1) / num_mini_batches
    own = (6 + old_pass + (2 if gradient_checkpointing else 0)) * model.num_matmul_parameters
    return own + 2 * reference_matmul_parameters


def seconds_per_step(
    model: Architecture,
    device: Device,
    *,
    tokens_per_step: float,
    num_mini_batches: int,
    gradient_checkpointing: bool,
    reference_matmul_parameters: int = 0,
) -> float:
    """Seconds of one optimizer step on one device: operations / (peak x assumed utilisation)."""
    each = flops_per_token(
        model,
        num_mini_batches=num_mini_batches,
        gradient_checkpointing=gradient_checkpointing,
        reference_matmul_parameters=reference_matmul_parameters,
    )
    return tokens_per_step * each / (device.peak_tflops * 1e12 * device.utilisation)


def seconds_of_forward(matmul_parameters: int, device: Device, *, num_tokens: float) -> float:
    """Seconds of one forward pass without gradient on one device: 2 N operations a token."""
    return num_tokens * 2 * matmul_parameters / (device.peak_tflops * 1e12 * device.utilisation)


def fewest_devices(memory: MemoryEstimate, device: Device, most: int = 64) -> int | None:
    """The fewest devices (1, 2, 4, ... `most`) on which a fully sharded run fits, or None."""
    count = 1
    while count <= most:
        if memory.total(count) <= device.memory_gib * GIB:
            return count
        count *= 2
    return None


def lora_parameters(model: Architecture, rank: int) -> int:
    """Trainable numbers of a LoRA adapter of `rank` on every linear layer of the body."""
    hidden, query, key_value = (
        model.hidden_size,
        model.num_heads * model.head_size,
        model.num_kv_heads * model.head_size,
    )
    pairs = ((hidden, query), (hidden, key_value), (hidden, key_value), (query, hidden))
    mlp = 3 * (hidden + model.intermediate_size)
    return model.num_layers * rank * (sum(a + b for a, b in pairs) + mlp)
