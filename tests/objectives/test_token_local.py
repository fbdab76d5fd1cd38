"""Which objectives are sums over tokens, so that the head may evaluate them on any cut of the tokens."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from objectives.test_laws import CASES, Batch, Result, assert_same, batches, evaluate, few

from psft.errors import RequestError
from psft.objectives import iw_sft_loss, resolve_objective
from psft.objectives.registry import _REGISTERED, _TOKEN_LOCAL, Variants


def cut(batch: Batch, at: list[int]) -> list[Batch]:
    """The counted tokens alone, in one row, cut at the places given: how the head hands them to an objective."""
    counted = batch.map(lambda x: x[batch.completion_mask][None])
    borders = [0, *sorted(at), counted.logps.shape[1]]
    return [counted.map(lambda x, a=a, b=b: x[:, a:b]) for a, b in zip(borders, borders[1:], strict=False)]


def summed(parts: list[Result]) -> Result:
    return Result(
        sum(part.loss for part in parts),
        {name: torch.cat([part.grads[name] for part in parts], 1) for name in parts[0].grads},
        {name: sum(part.metrics[name] for part in parts) for name in parts[0].metrics},
    )


@pytest.mark.parametrize("case", [case for case in CASES if case.function in _TOKEN_LOCAL], ids=lambda case: case.name)
@few
@given(batch=batches(), at=st.lists(st.integers(0, 4), max_size=3))
def test_any_cut_of_the_tokens_gives_the_loss_the_gradients_and_the_metrics_of_the_whole(case, batch, at):
    """Goes red if an objective that is declared token-local looks at another token, a row, or a count of its own."""
    whole = evaluate(case, batch, 8)  # a power of two: the metrics' float32 quotients add up exactly
    at = [min(place, int(batch.completion_mask.sum())) for place in at]
    grads = {name: grad[batch.completion_mask][None] for name, grad in whole.grads.items()}
    assert_same(summed([evaluate(case, part, 8) for part in cut(batch, at)]), whole._replace(grads=grads))


def test_every_registered_form_is_declared_or_shown_to_look_across_tokens():
    """Goes red if a form is added without saying which it is: not declared, it would cost a product more."""
    forms = [f for x in _REGISTERED.values() for f in (x.forms.values() if isinstance(x, Variants) else [x])]
    assert set(forms) - _TOKEN_LOCAL == {iw_sft_loss} and set(forms) > _TOKEN_LOCAL
    assert {case.function for case in CASES} == set(forms)


def test_the_importance_weight_of_a_sequence_is_not_that_of_its_tokens():
    """Two tokens with p / p_ref = 1 and 4, one sequence: both weigh sqrt(4) = 2; cut apart, 1 and 4."""
    logps, ids = torch.tensor([[0.0, 0.0]]), torch.zeros(1, 2, dtype=torch.long)
    ref_logps, mask = torch.tensor([[0.0, -math.log(4)]]), torch.ones(1, 2, dtype=torch.bool)
    whole = iw_sft_loss(logps, ref_logps, ids, mask, normalizer=1).metrics["token_weight"]
    parts = [iw_sft_loss(*(x[:, i : i + 1] for x in (logps, ref_logps, ids, mask)), normalizer=1) for i in (0, 1)]
    assert whole.item() == pytest.approx(4)
    assert sum(part.metrics["token_weight"].item() for part in parts) == pytest.approx(5)


def half(logps, completion_mask, *, normalizer):
    return -0.5 * (logps * completion_mask).sum() / normalizer


def by_sequence(logps, sequence_ids, completion_mask, *, normalizer):
    return half(logps, completion_mask, normalizer=normalizer)


def test_a_function_of_the_users_own_is_token_local_only_if_it_says_so(monkeypatch):
    """Goes red if it is taken for granted, or taken at its word where it asks for sequences."""
    assert not resolve_objective(f"{__name__}:half", {}).is_token_local
    monkeypatch.setattr(half, "is_token_local", True, raising=False)
    assert resolve_objective(f"{__name__}:half", {}).is_token_local
    monkeypatch.setattr(by_sequence, "is_token_local", True, raising=False)
    with pytest.raises(RequestError, match="is_token_local and takes sequence_ids"):
        resolve_objective(f"{__name__}:by_sequence", {})
