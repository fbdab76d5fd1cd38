"""Pairs without a download: the worked solution of a problem before that of another."""

from __future__ import annotations

import pytest

from psft.data.demonstrations import final_answer
from psft.data.sources import open_source, read_rows
from psft.errors import RequestError


def test_a_pair_is_a_problem_with_its_own_solution_and_another_ones() -> None:
    """Goes red if chosen is not the problem's own, rejected is, or a problem has no pair."""
    pairs = [row.value for row in read_rows("reasoning-gym-pairs:gsm_symbolic?size=6&seed=3")]
    own = [row.value["messages"] for row in read_rows("reasoning-gym:gsm_symbolic?size=6&seed=3")]
    assert [pair["prompt"] for pair in pairs] == [messages[0]["content"] for messages in own]
    assert [pair["chosen"] for pair in pairs] == [messages[1]["content"] for messages in own]
    assert [pair["rejected"] for pair in pairs] == [pair["chosen"] for pair in [*pairs[1:], pairs[0]]]
    assert all(final_answer(pair[side]) is not None for pair in pairs for side in ("chosen", "rejected"))


def test_pairs_and_demonstrations_of_one_seed_are_kept_apart() -> None:
    """Goes red if prepared data of the one would be taken for the other."""
    digests = [open_source(f"reasoning-gym{kind}:gsm_symbolic?size=6&seed=3").digest() for kind in ("", "-pairs")]
    assert digests[0] != digests[1]


@pytest.mark.parametrize(("query", "message"), [("size=1", "size=2 or more"), ("sise=4", "cannot use sise=4")])
def test_a_wrong_source_is_refused_in_words(query: str, message: str) -> None:
    """Goes red if one problem is paired with itself, or an option is passed over."""
    with pytest.raises(RequestError, match=message):
        list(read_rows(f"reasoning-gym-pairs:gsm_symbolic?{query}"))
