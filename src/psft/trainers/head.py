"""Score target tokens inside the model's own forward, the LM head on trained positions only.

It lives in the forward, not beside it, so that what wraps the model (DDP, FSDP, PEFT, autocast) sees one ordinary call.
"""

from __future__ import annotations

import functools
import types
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from psft.errors import RequestError
from psft.models.joined import known_rows
from psft.models.logits import logit_transform
from psft.ops import TokenStatistics, token_loss, token_statistics
from psft.trainers.bound_objective import BoundObjective
from psft.trainers.layout import TrainedTokens
from psft.trainers.trl_kernel import trl_token_statistics


@dataclass
class ScoredTokens(ModelOutput):
    """(B, T - 1) each, aligned with labels[:, 1:]; zero where `mask` is False. None: not asked for.

    mask: bool, True = a trained token. logps, entropies: nats; differentiable, except beside a loss. is_top1: bool.
    loss: scalar, an objective's on this micro-batch. metrics: scalars by name, what it returned with it.
    """

    logps: Tensor = None  # type: ignore[assignment]
    mask: Tensor = None  # type: ignore[assignment]
    entropies: Tensor = None  # type: ignore[assignment]
    is_top1: Tensor = None  # type: ignore[assignment]
    loss: Tensor = None  # type: ignore[assignment]
    metrics: dict[str, Tensor] = None  # type: ignore[assignment]


@dataclass
class ReferenceRows:
    """What gives a model's logits at the trained tokens of a micro-batch: hidden (N, H), head (V, H), bias (V,).

    No `ModelOutput`: accelerate would turn each of those, the whole head too, from half precision to float32.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None


def add_token_scoring(model: PreTrainedModel, head_kernel: str = "torch") -> None:
    """Teach the model's forward more calls; any other call is unchanged.

    model(**inputs, labels=labels, score_tokens="logps") -> ScoredTokens with logps and mask alone
    model(**inputs, labels=labels, score_tokens="statistics") -> and entropies and top-1 hits
    model(**inputs, labels=labels, score_tokens="objective", objective=BoundObjective) -> and loss and metrics
    model(**inputs, labels=labels, score_tokens="rows") -> ReferenceRows

    The log-probs are the same to the bit in the first three. `trained_positions`, (N,), saves finding them: see
    `TrainedTokens`.

    Args:
        model: causal language model, before any wrapping; under PEFT its base model.
        head_kernel: "torch" or "trl" (see `choose_head_kernel`).
    Raises:
        RequestError: a head whose logits are not those of its weight.
    """
    check_head(model.get_output_embeddings())
    original_forward = model.forward
    logit_scale, softcap = logit_transform(model)
    how: dict[str, Any] = {"logit_scale": logit_scale, "softcap": softcap}

    @functools.wraps(type(model).forward)  # `generate` checks its arguments against this signature
    def forward(
        self: PreTrainedModel,
        *args: Any,
        score_tokens: str | None = None,
        objective: BoundObjective | None = None,
        trained_positions: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        if score_tokens is None:
            return original_forward(*args, **kwargs)
        labels = kwargs.pop("labels")
        kwargs["use_cache"] = False
        with known_rows(kwargs):
            hidden = self.base_model(*args, **kwargs).last_hidden_state
        tokens = TrainedTokens.of(labels, trained_positions)
        head = self.get_output_embeddings()
        weight, bias = _whole(head.weight), _whole(getattr(head, "bias", None))
        rows = tokens.hidden_of(hidden)
        if score_tokens == "rows":
            if hasattr(head.weight, "ds_id"):  # DeepSpeed ZeRO-3 takes the head back at the end of this forward
                weight, bias = weight.clone(), None if bias is None else bias.clone()
            return ReferenceRows(hidden=rows, weight=weight, bias=bias)
        inputs = (rows, weight, tokens.labels_of(labels))
        if objective is None:
            scored = _statistics(head_kernel, *inputs, bias=bias, logps_only=score_tokens == "logps", **how)
            return _placed(scored, tokens)
        quantities = objective.objective.vocabulary
        if objective.objective.is_token_local and head_kernel == "torch":
            chunk_loss = objective.on_chunks(tokens)
            out = token_loss(
                *inputs, chunk_loss, bias=bias, quantities=quantities, reference=objective.reference, **how
            )
            return _placed(out.statistics, tokens, loss=out.loss, metrics=out.metrics)
        scored = _statistics(
            head_kernel, *inputs, bias=bias, quantities=quantities, reference=objective.reference, **how
        )
        loss, metrics = objective.on_layout(scored, tokens)
        return _placed(scored, tokens, loss=loss, metrics=metrics)

    model.forward = types.MethodType(forward, model)


ADAPTER_ON_HEAD = (
    "there is a PEFT adapter on the LM head, and log-probs are computed from the head's weight alone: it would be left "
    "out. Take the head (lm_head, or embeddings tied to it) out of target_modules and trainable_token_indices; or "
    "train the head whole with modules_to_save=['lm_head']; or, in a model that is not trained, merge the adapter."
)


def check_head(head: Any) -> None:
    """Raise `RequestError` for a head that is not its weight's product: an adapter on it, or quantised weights."""
    if hasattr(head, "base_layer") or hasattr(head, "token_adapter"):  # of PEFT; `modules_to_save` is no adapter
        raise RequestError(ADAPTER_ON_HEAD)
    if head is not None and not head.weight.is_floating_point():
        raise RequestError(
            f"the LM head is quantised ({head.weight.dtype}), and log-probs are computed from its weight. Leave it out "
            "of the quantisation (llm_int8_skip_modules=['lm_head'])."
        )


def _whole(parameter: Any) -> Any:
    """The parameter, gathered where FSDP2 has cut it up."""
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter


def _statistics(head_kernel: str, *inputs: Tensor, **how: Any) -> TokenStatistics:
    """(N,) each; what TRL's kernel cannot compute `choose_head_kernel` does not send it."""
    if head_kernel == "torch":
        return token_statistics(*inputs, **how)
    return trl_token_statistics(*inputs, **how)


def _placed(scored: TokenStatistics, tokens: TrainedTokens, **more: Any) -> ScoredTokens:
    entropies, is_top1 = (None if x is None else tokens.placed(x) for x in (scored.entropies, scored.is_top1))
    return ScoredTokens(
        logps=tokens.placed(scored.logps), mask=tokens.mask, entropies=entropies, is_top1=is_top1, **more
    )
