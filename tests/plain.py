"""Every objective written out from full logits, one token at a time, in float64: what the fast code is compared with.

Written from the papers' equations, without a look at the code under test, and importing none of it; gradients come
from torch autograd and every stop-gradient is a `.detach()`. Slow on purpose: made for tens of tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

IGNORE_INDEX = -100
LARGEST_LOG_RATIO = 20.0  # where an unclipped ratio is held, as verl does; e^20 is about 5e8


class Token(NamedTuple):
    """One counted token: its label y and what three policies say about every token v of the vocabulary."""

    label: int
    logits: Tensor  # (V,) z of the policy in training; the only tensor with a gradient
    old_logits: Tensor | None  # (V,) of the policy at window start
    ref_logits: Tensor | None  # (V,) of the frozen reference

    @property
    def log_probs(self) -> Tensor:
        """(V,) log p_v, nats, with gradient."""
        return log_softmax(self.logits)

    @property
    def logp(self) -> Tensor:
        """Scalar log p_y, nats, with gradient."""
        return self.log_probs[self.label]

    @property
    def old_logp(self) -> Tensor:
        """Scalar log p_y at window start, a constant."""
        assert self.old_logits is not None, "this objective needs old_logits"
        return log_softmax(self.old_logits)[self.label].detach()

    @property
    def ref_log_probs(self) -> Tensor:
        """(V,) log p_v of the reference, constants."""
        assert self.ref_logits is not None, "this objective needs ref_logits"
        return log_softmax(self.ref_logits).detach()

    @property
    def ref_logp(self) -> Tensor:
        """Scalar log p_y of the reference, a constant."""
        return self.ref_log_probs[self.label]


Row = list[Token]  # the counted tokens of one sequence, in order


def plain_loss(
    name: str,
    logits: Tensor,
    labels: Tensor,
    *,
    old_logits: Tensor | None = None,
    ref_logits: Tensor | None = None,
    normalizer: float | Tensor,
    **settings: Any,
) -> Tensor:
    """(1/N) times the sum of the objective's loss over the counted tokens.

    Args:
        name: objective, as in `psft.objectives`; `settings` are its settings by the same names.
        logits, old_logits, ref_logits: (B, T, V), of the positions that predict `labels`. Every row is one sequence.
        labels: (B, T) int64, already shifted; IGNORE_INDEX = not counted.
        normalizer: N.
    Returns:
        Scalar float64; without a counted token it is 0 with a graph.
    """
    loss_of_row = OBJECTIVES[name]
    total = 0.0 * logits.double().sum()
    for b in range(labels.shape[0]):
        row = []
        for t in range(labels.shape[1]):
            label = int(labels[b, t])
            if label != IGNORE_INDEX:
                old = None if old_logits is None else old_logits[b, t].double()
                ref = None if ref_logits is None else ref_logits[b, t].double()
                row.append(Token(label, logits[b, t].double(), old, ref))
        for token_loss in loss_of_row(row, **settings):
            total = total + token_loss
    return total / normalizer


def log_softmax(logits: Tensor) -> Tensor:
    """log p_v = z_v - log sum_u e^(z_u)."""
    return logits - logits.exp().sum().log()


def entropy(log_probs: Tensor) -> Tensor:
    """-sum_v p_v log p_v, nats."""
    return -(log_probs.exp() * log_probs).sum()


def sft(row: Row) -> list[Tensor]:
    """-log p"""
    return [-token.logp for token in row]


def psft(row: Row, *, epsilon_high: float = 0.28) -> list[Tensor]:
    """-min(r, 1 + epsilon), r = p / p_old: PPO's clip with advantage 1 (arXiv 2508.17784)"""
    losses = []
    for token in row:
        ratio = (token.logp - token.old_logp).exp()
        losses.append(-ratio.clamp(max=min(1 + epsilon_high, math.exp(LARGEST_LOG_RATIO))))
    return losses


def psft_tv(row: Row, *, tv_delta: float = 0.2) -> list[Tensor]:
    """-min(r, 1 + delta / p_old): the token gives no gradient once p - p_old > delta"""
    losses = []
    for token in row:
        ratio = (token.logp - token.old_logp).exp()
        bound = min(1 + tv_delta / token.old_logp.exp().item(), math.exp(LARGEST_LOG_RATIO))
        losses.append(-ratio.clamp(max=bound))
    return losses


def psft_soft(
    row: Row, *, soft_form: str = "sapo", soft_temperature: float = 1.0, soft_alpha: float = 0.1
) -> list[Tensor]:
    """sapo: -(4 / tau) sigmoid(tau (r - 1)) (arXiv 2511.20347); pspo: -((1 - alpha) r + alpha) (arXiv 2509.21282)"""
    losses = []
    for token in row:
        ratio = (token.logp - token.old_logp).exp()
        if soft_form == "sapo":
            gate = 1 / (1 + (-soft_temperature * (ratio - 1)).exp())
            losses.append(-4 / soft_temperature * gate)
        elif soft_form == "pspo":
            losses.append(-((1 - soft_alpha) * ratio + soft_alpha))
        else:
            raise ValueError(f"soft_form={soft_form!r}")
    return losses


def sft_kl(
    row: Row, *, kl_coef: float = 0.5, kl_direction: str = "forward", kl_estimator: str = "full"
) -> list[Tensor]:
    """-log p + c KL, over the whole vocabulary ("full") or estimated on the label alone (k1, k2, k3)"""
    losses = []
    for token in row:
        if kl_estimator == "full":
            kl = full_kl(token, kl_direction)
        else:
            kl = label_kl(token, kl_direction, kl_estimator)
        losses.append(-token.logp + kl_coef * kl)
    return losses


def full_kl(token: Token, direction: str) -> Tensor:
    """forward: KL(ref || p) = sum_v ref_v log(ref_v / p_v); reverse: KL(p || ref) = sum_v p_v log(p_v / ref_v)"""
    policy, ref = token.log_probs, token.ref_log_probs
    if direction == "forward":
        return (ref.exp() * (ref - policy)).sum()
    if direction == "reverse":
        return (policy.exp() * (policy - ref)).sum()
    raise ValueError(f"kl_direction={direction!r}")


def label_kl(token: Token, direction: str, estimator: str) -> Tensor:
    """Schulman, "Approximating KL Divergence": for KL(a || b), x from a, and u = log b(x) - log a(x),

    k1 = -u, k2 = u^2 / 2, k3 = e^u - 1 - u. Here x is the label, whoever wrote it, and the gradient goes through u.
    """
    if direction == "forward":  # a = ref, b = policy
        u = token.logp - token.ref_logp
    elif direction == "reverse":  # a = policy, b = ref
        u = token.ref_logp - token.logp
    else:
        raise ValueError(f"kl_direction={direction!r}")
    if estimator == "k1":
        return -u
    if estimator == "k2":
        return u**2 / 2
    if estimator == "k3":
        return u.clamp(max=LARGEST_LOG_RATIO).exp() - 1 - u
    raise ValueError(f"kl_estimator={estimator!r}")


def dft(row: Row) -> list[Tensor]:
    """-sg(p) log p (arXiv 2508.05629)"""
    return [-token.logp.exp().detach() * token.logp for token in row]


def chord_phi(row: Row) -> list[Tensor]:
    """-sg(p (1 - p)) log p (arXiv 2508.11408)"""
    losses = []
    for token in row:
        p = token.logp.exp().detach()
        losses.append(-p * (1 - p) * token.logp)
    return losses


def iw_sft(row: Row, *, iw_level: str = "sequence", iw_temperature: float = 1.0) -> list[Tensor]:
    """-sg(w) log p (arXiv 2507.12856; clamps as published with its code)

    sequence: w = exp(tau mean over the row of log(p / ref)), held to 0..16, one w for the whole row.
    token: w = p / ref, held to 0.2..1.8.
    """
    log_ratios = [(token.logp - token.ref_logp).item() for token in row]
    losses = []
    for token, log_ratio in zip(row, log_ratios, strict=True):
        if iw_level == "sequence":
            w = min(max(math.exp(iw_temperature * sum(log_ratios) / len(log_ratios)), 0.0), 16.0)
        elif iw_level == "token":
            w = min(max(math.exp(log_ratio), 0.2), 1.8)
        else:
            raise ValueError(f"iw_level={iw_level!r}")
        losses.append(-w * token.logp)
    return losses


def gem(row: Row, *, gem_beta: float = 0.7, gem_weighting: str = "linear") -> list[Tensor]:
    """-sum_v q_v w_v (log p_y - log p_v), q = sg softmax(z / beta) (arXiv 2408.16673)

    w = 1 (linear) or sg sigmoid(0.01 (z_v - z_y)) (logsigmoid).
    """
    losses = []
    for token in row:
        z = token.logits.detach()
        q = log_softmax(z / gem_beta).exp()
        if gem_weighting == "linear":
            w = torch.ones_like(z)
        elif gem_weighting == "logsigmoid":
            w = 1 / (1 + (-0.01 * (z - z[token.label])).exp())
        else:
            raise ValueError(f"gem_weighting={gem_weighting!r}")
        losses.append(-(q * w * (token.logp - token.log_probs)).sum())
    return losses


def asft(row: Row, *, kl_coef: float = 0.1, kl_direction: str = "forward") -> list[Tensor]:
    """-sg(p) log p + lambda KL over the whole vocabulary (arXiv 2509.23753)"""
    return [-token.logp.exp().detach() * token.logp + kl_coef * full_kl(token, kl_direction) for token in row]


def eaft(row: Row, *, eaft_top_k: int = 20, eaft_alpha: float = 1.0, eaft_scaling: str = "paper") -> list[Tensor]:
    """-sg((H / scale)^alpha) log p, H = entropy of the K likeliest tokens, renormalised (arXiv 2601.02151)

    scale = ln K, the largest H there is (paper); 3 (llama_factory); 1 (axolotl).
    """
    scale = {"paper": math.log(eaft_top_k), "llama_factory": 3.0, "axolotl": 1.0}[eaft_scaling]
    losses = []
    for token in row:
        likeliest = token.logits.detach().sort(descending=True).values[:eaft_top_k]
        weight = (entropy(log_softmax(likeliest)) / scale) ** eaft_alpha
        losses.append(-weight * token.logp)
    return losses


OBJECTIVES: dict[str, Callable[..., list[Tensor]]] = {
    "sft": sft,
    "psft": psft,
    "psft_tv": psft_tv,
    "psft_soft": psft_soft,
    "sft_kl": sft_kl,
    "dft": dft,
    "chord_phi": chord_phi,
    "iw_sft": iw_sft,
    "gem": gem,
    "asft": asft,
    "eaft": eaft,
}
