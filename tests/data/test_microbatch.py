"""Cutting a mini-batch under a hard cap of padded tokens, and dealing it to ranks."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from psft.data.microbatch import Cut, MiniBatchCollator, NumberedRows, cut_by_tokens, deal_and_cut
from psft.errors import RequestError

lengths_of_rows = st.lists(st.integers(1, 50), max_size=40)


@given(lengths_of_rows, st.integers(50, 200), st.booleans(), st.integers(0, 300))
def test_every_row_once_longest_first_and_never_over_the_cap(lengths, cap, is_padded, overhead):
    """Goes red if the cap counts real instead of padded tokens, or is checked after adding a row."""
    groups = cut_by_tokens(lengths, Cut(cap, is_padded=is_padded, overhead_tokens=overhead))
    assert sorted(i for group in groups for i in group) == list(range(len(lengths)))
    assert all(groups)
    for group in groups:
        sizes = [lengths[i] for i in group]
        assert sizes == sorted(sizes, reverse=True)
        assert (len(sizes) * sizes[0] if is_padded else sum(sizes)) <= cap


@given(st.lists(st.integers(1, 30), min_size=1, max_size=9), st.integers(30, 90), st.integers(0, 60), st.booleans())
def test_no_cut_of_the_sorted_rows_costs_less(lengths, cap, overhead, is_padded):
    """Against every one of the 2^(n-1) cuts. Goes red if the overhead is left out, or a start is missed."""
    sizes = sorted(lengths, reverse=True)

    def cost(groups):
        tokens = [len(group) * group[0] if is_padded else sum(group) for group in groups]
        return sum(tokens) + overhead * len(tokens) if max(tokens) <= cap else None

    def all_cuts():
        for number in range(len(sizes)):
            for stops in itertools.combinations(range(1, len(sizes)), number):
                yield [sizes[a:b] for a, b in zip((0, *stops), (*stops, len(sizes)), strict=True)]

    least = min(found for groups in all_cuts() if (found := cost(groups)) is not None)
    ours = cut_by_tokens(lengths, Cut(cap, is_padded=is_padded, overhead_tokens=overhead))
    assert cost([[lengths[i] for i in group] for group in ours]) == least


def test_a_row_over_the_cap_is_named_and_auto_makes_room_for_it():
    with pytest.raises(RequestError, match=r"has 9 tokens. Raise it to at least 9"):
        cut_by_tokens([3, 9], Cut(8))
    assert cut_by_tokens([2, 9, 2], Cut(4, is_hard=False, overhead_tokens=1)) == [[1], [0, 2]]


@given(lengths_of_rows.filter(bool), st.integers(1, 8), st.integers(50, 200), st.booleans())
def test_ranks_share_the_rows_evenly_and_have_as_many_micro_batches_each(lengths, world_size, cap, is_padded):
    """Goes red if a rank cuts for itself, or if the last deal is dropped.

    Only the last deal may be short; it alone can leave a rank without its last micro-batch.
    """
    cut, rows = Cut(cap, is_padded=is_padded), list(range(len(lengths)))
    shares = [deal_and_cut(rows, lengths, cut, rank=rank, world_size=world_size) for rank in range(world_size)]
    own = [[row for group in share for row in group if row >= 0] for share in shares]
    assert sorted(itertools.chain(*own)) == rows
    assert max(map(len, own)) - min(map(len, own)) <= 1
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    for share, mine in zip(shares, own, strict=True):
        assert (mine == []) == any(row < 0 for group in share for row in group)
        for group in share:
            sizes = [lengths[max(row, ~row)] for row in group]
            assert (len(sizes) * max(sizes) if is_padded else sum(sizes)) <= cap


def test_rows_are_dealt_to_and_fro():
    """8 7 | 6 5 | 4 3 | 2 1 between two ranks. Goes red if every deal goes the same way: 20 tokens and 16."""
    lengths = [3, 8, 1, 6, 4, 7, 2, 5]
    shares = [deal_and_cut(range(8), lengths, Cut(16, overhead_tokens=3), rank=rank, world_size=2) for rank in (0, 1)]
    assert [[[lengths[row] for row in group] for group in share] for share in shares] == [
        [[8, 5], [4, 1]], [[7, 6], [3, 2]],
    ]  # fmt: skip


def test_one_rank_gets_every_row_in_the_order_of_the_cut():
    lengths = [5, 9, 9, 2]
    cut = Cut(18, overhead_tokens=1)
    assert deal_and_cut([0, 1, 2, 3], lengths, cut, rank=0, world_size=1) == [[1, 2], [0], [3]]


def test_a_rank_without_rows_borrows_one_that_trains_nothing():
    """Goes red if the borrowed row's tokens are counted, or its labels kept."""
    rows = [{"input_ids": [5] * n, "labels": [5] * n} for n in (3, 4)]
    (groups,) = [deal_and_cut([1], [3, 4], Cut(64), rank=2, world_size=4)]
    assert groups == [[~1]]

    def collate(members):
        names = ("input_ids", "labels")
        inputs = {name: torch.tensor([row[name] for row in members]) for name in names}
        return {**inputs, "attention_mask": torch.ones_like(inputs["labels"])}

    batch = MiniBatchCollator(collate)(NumberedRows(rows).__getitems__(groups))
    (micro_batch,) = batch["micro_batches"]
    assert micro_batch["input_ids"].shape == (1, 4) and (micro_batch["labels"] == -100).all()
    assert micro_batch["row_numbers"] == [] and batch["num_rows"] == batch["num_input_tokens"] == 0
    batch = MiniBatchCollator(collate)(NumberedRows(rows).__getitems__([[1], [0]]))
    assert [m["row_numbers"] for m in batch["micro_batches"]] == [[1], [0]]
    assert batch["num_rows"] == 2 and batch["num_input_tokens"] == 7
