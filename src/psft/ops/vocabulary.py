"""Quantities of a token that need the whole row of logits: GEM's gap, the KL to a reference, the top-k entropy.

Each is defined on a chunk of rows, with its gradient in closed form, so that the head (`token_statistics`) can compute
it chunk by chunk and never hold (tokens x vocabulary). The fields of each class are settings of the objectives that
take it. `reference.py` has the same quantities written plainly, differentiated by autograd.
"""

from dataclasses import dataclass, fields
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from psft.ops.checks import check_choice, check_positive


class ReferenceLogits(NamedTuple):
    """What gives the frozen reference's logits for the same N tokens, H_r wide; nothing here carries a gradient."""

    hidden: Tensor  # (N, H_r)
    weight: Tensor  # (V, H_r)
    bias: Tensor | None = None  # (V,)
    logit_scale: float = 1.0
    softcap: float | None = None


class Rows(NamedTuple):
    """A block of rows of logits. log p = logits - log_norm."""

    logits: Tensor  # (rows, V), less each row's maximum
    probs: Tensor  # (rows, V)
    log_norm: Tensor  # (rows, 1)
    labels: Tensor  # (rows, 1)
    ref_log_probs: Tensor | None  # (rows, V), the frozen reference's


@dataclass(frozen=True)
class VocabularyQuantity:
    """One number per token from its row of logits."""

    name: ClassVar[str]
    needs_reference: ClassVar[bool] = False
    is_differentiable: ClassVar[bool] = True

    def values(self, rows: Rows) -> Tensor:
        """(rows,) in the dtype of the logits."""
        raise NotImplementedError

    def add_logit_gradient(self, rows: Rows, grad: Tensor, out: Tensor) -> None:
        """Add d(sum grad * values)/d logits to `out` (rows, V); grad is (rows, 1)."""
        raise NotImplementedError

    @classmethod
    def setting_names(cls) -> tuple[str, ...]:
        return tuple(field.name for field in fields(cls))


@dataclass(frozen=True)
class GemGap(VocabularyQuantity):
    """sum_v a_v (log p_y - log p_v), in nats: how far the target leads what the tempered model would say.

    a_v = q_v w_v without gradient; q = softmax(z / gem_beta); w = 1 ("linear") or sigmoid(0.01 (z_v - z_y))
    ("logsigmoid"). Gradient: d/dz = S onehot(y) - a, with S = sum_v a_v.
    Source: Li et al., arXiv:2408.16673; the names of both weightings and the 0.01 are those of its code (liziniu/GEM).
    Limits (linear): beta = 1 has the gradient of log p_y, plain SFT; beta -> 0 moves the most likely token's logit
    against the target's alone; beta -> infinity weighs all tokens alike, q = 1/V.
    """

    gem_beta: float = 0.7
    gem_weighting: str = "linear"
    name: ClassVar[str] = "gem_gaps"

    def __post_init__(self) -> None:
        check_positive(gem_beta=self.gem_beta)
        check_choice(("linear", "logsigmoid"), gem_weighting=self.gem_weighting)

    def _weights(self, rows: Rows) -> Tensor:
        weights = torch.softmax(rows.logits / self.gem_beta, -1)
        if self.gem_weighting == "logsigmoid":
            target = rows.logits.gather(1, rows.labels)
            weights = weights * torch.sigmoid(0.01 * (rows.logits - target))
        return weights

    def values(self, rows: Rows) -> Tensor:
        target = rows.logits.gather(1, rows.labels)
        return expectation(self._weights(rows), target - rows.logits)

    def add_logit_gradient(self, rows: Rows, grad: Tensor, out: Tensor) -> None:
        weights = self._weights(rows)
        at_target = out.gather(1, rows.labels) + grad * weights.sum(-1, keepdim=True)
        at_target -= grad * weights.gather(1, rows.labels)
        out.addcmul_(weights, grad, value=-1).scatter_(1, rows.labels, at_target)


@dataclass(frozen=True)
class RefKl(VocabularyQuantity):
    """Exact KL divergence over the vocabulary between policy p and frozen reference p_ref, in nats, >= 0.

    forward: KL(ref || policy) = sum_v p_ref (log p_ref - log p); d/dz = p - p_ref.
    reverse: KL(policy || ref) = sum_v p (log p - log p_ref); d/dz_v = p_v (log p_v - log p_ref_v - KL).
    Infinite where the second distribution has probability 0 and the first has not.
    """

    kl_direction: str = "forward"
    name: ClassVar[str] = "ref_kls"
    needs_reference: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_choice(("forward", "reverse"), kl_direction=self.kl_direction)

    def values(self, rows: Rows) -> Tensor:
        log_ref = _present(rows.ref_log_probs)
        surprise = (rows.logits - rows.log_norm).sub_(log_ref)  # log p - log p_ref
        if self.kl_direction == "forward":
            return expectation(log_ref.exp(), surprise.neg_())
        return expectation(rows.probs, surprise)

    def add_logit_gradient(self, rows: Rows, grad: Tensor, out: Tensor) -> None:
        log_ref = _present(rows.ref_log_probs)
        if self.kl_direction == "forward":
            out.addcmul_(rows.probs, grad).addcmul_(log_ref.exp(), grad, value=-1)
            return
        surprise = (rows.logits - rows.log_norm).sub_(log_ref)
        surprise.sub_(expectation(rows.probs, surprise)[:, None])
        out.addcmul_(torch.where(rows.probs > 0, rows.probs * surprise, 0.0), grad)


@dataclass(frozen=True)
class TopKEntropy(VocabularyQuantity):
    """Entropy of the `eaft_top_k` largest logits, renormalised among themselves, in nats: 0 to ln k. No gradient.

    A vocabulary smaller than k is taken whole. Source: EAFT, arXiv:2601.02151 (k = 20).
    """

    eaft_top_k: int = 20
    name: ClassVar[str] = "topk_entropies"
    is_differentiable: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.eaft_top_k < 2:
            raise ValueError(f"eaft_top_k={self.eaft_top_k} must be 2 or more: one token alone has no entropy")

    def values(self, rows: Rows) -> Tensor:
        k = min(self.eaft_top_k, rows.logits.shape[1])
        log_q = torch.log_softmax(rows.logits.topk(k, -1).values, -1)
        return -expectation(log_q.exp(), log_q)


def expectation(probs: Tensor, values: Tensor) -> Tensor:
    """(rows,) sum over the vocabulary of probs * values, with 0 * -inf = 0."""
    return torch.where(probs > 0, probs * values, 0.0).sum(-1)


def check_reference(
    num_tokens: int, num_words: int, quantities: tuple[VocabularyQuantity, ...], reference: ReferenceLogits | None
) -> None:
    """Raise `ValueError` if a quantity lacks its reference, or the reference scores other tokens or words."""
    wanting = [q.name for q in quantities if q.needs_reference and reference is None]
    if wanting:
        raise ValueError(f"{', '.join(wanting)} needs the reference's logits: give reference=ReferenceLogits(...)")
    if reference is not None and (len(reference.hidden), len(reference.weight)) != (num_tokens, num_words):
        raise ValueError(
            f"the reference has {len(reference.hidden)} tokens and {len(reference.weight)} words; "
            f"the policy {num_tokens} and {num_words}"
        )


def _present(ref_log_probs: Tensor | None) -> Tensor:
    assert ref_log_probs is not None, "`check_reference` has seen to it"
    return ref_log_probs


VOCABULARY_QUANTITIES: dict[str, type[VocabularyQuantity]] = {q.name: q for q in (GemGap, RefKl, TopKEntropy)}
"""By the name under which an objective takes them."""
