"""Cutting a mini-batch under a hard cap of padded tokens."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from psft.data.microbatch import MiniBatchCollator, cut_by_tokens
from psft.errors import RequestError


@given(st.lists(st.integers(1, 50), max_size=40), st.integers(50, 200), st.booleans())
def test_every_row_once_longest_first_and_never_over_the_cap(lengths, cap, is_padded):
    """Goes red if the cap counts real instead of padded tokens, or is checked after adding a row."""
    groups = cut_by_tokens(lengths, cap, is_padded=is_padded)
    assert sorted(i for group in groups for i in group) == list(range(len(lengths)))
    for group in groups:
        sizes = [lengths[i] for i in group]
        assert sizes == sorted(sizes, reverse=True)
        assert (len(sizes) * sizes[0] if is_padded else sum(sizes)) <= cap


def test_a_row_over_the_cap_is_named_and_auto_makes_room_for_it():
    with pytest.raises(RequestError, match=r"has 9 tokens. Raise it to at least 9"):
        cut_by_tokens([3, 9], 8)
    collate = MiniBatchCollator(lambda rows: {"n": len(rows)}, max_tokens="auto", auto_tokens=4)
    batch = collate([{"input_ids": [0] * n} for n in (9, 2, 2)])
    assert batch["micro_batches"] == [{"n": 1}, {"n": 2}] and batch["num_input_tokens"] == 13
