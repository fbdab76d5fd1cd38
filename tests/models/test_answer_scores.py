"""Scores of answers against plain log-softmax over whole rows."""

from __future__ import annotations

import pytest
import torch

from psft.models import answer_scores
from psft.models.answer_scores import score_answers

ROWS = [([5, 6, 7], [8, 9]), ([10], [11, 12, 13, 14, 15, 16]), ([17, 18, 19, 20, 21], [22]), ([30, 31], [32, 33, 34])]


def by_hand(model, prompt, answer):
    """Summed log-prob and entropy of the answer's tokens."""
    with torch.no_grad():
        logps = model(torch.tensor([prompt + answer])).logits[0].double().log_softmax(-1)
    at = logps[len(prompt) - 1 : -1]
    return at[range(len(answer)), answer].sum().item(), -(at.exp() * at).sum().item()


@pytest.mark.parametrize("most", [4096, 12, 1])
def test_scores_are_those_of_whole_rows_alone(tiny_model, monkeypatch, most):
    """Goes red if a neighbour's padding is looked at, a token is scored one place off, or the prompt's tokens count."""
    monkeypatch.setitem(answer_scores._MOST_PADDED_TOKENS, "cpu", most)
    found = dict(score_answers(tiny_model, ROWS))
    assert sorted(found) == [0, 1, 2, 3]
    for number, (prompt, answer) in enumerate(ROWS):
        logp, entropy = by_hand(tiny_model, prompt, answer)
        assert found[number].tokens == len(answer)
        assert (found[number].logp, found[number].entropy) == pytest.approx((logp, entropy), rel=1e-4)
