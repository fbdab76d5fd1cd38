"""Groups cut out of batches and put together again."""

from __future__ import annotations

import pytest
import torch

from psft.trainers.rollout_groups import join_groups, num_counted, silenced, split_groups

PAD = 9


def batch(prompt_lengths: list[int], answer_lengths: list[int], *, first: int = 0) -> dict[str, torch.Tensor]:
    """Answers `first`, `first + 1`, ... with every number telling its row and place."""
    rows, width, span = len(prompt_lengths), max(prompt_lengths), max(answer_lengths)
    made = {
        "prompt_ids": torch.full((rows, width), PAD), "prompt_mask": torch.zeros((rows, width), dtype=torch.long),
        "completion_ids": torch.full((rows, span), PAD), "completion_mask": torch.zeros((rows, span), dtype=torch.long),
        "old_per_token_logps": torch.zeros(rows, span),
        "advantages": torch.arange(rows, dtype=torch.float32) + first, "num_items_in_batch": torch.tensor(0),
    }  # fmt: skip
    for row, (p, a) in enumerate(zip(prompt_lengths, answer_lengths, strict=True)):
        made["prompt_ids"][row, width - p :] = 100 * (first + row) + torch.arange(p)
        made["prompt_mask"][row, width - p :] = 1
        made["completion_ids"][row, :a] = 1000 * (first + row) + torch.arange(a)
        made["completion_mask"][row, :a] = 1
        made["old_per_token_logps"][row, :a] = -0.5 - row - torch.arange(a)
    return made


def contents(made: dict[str, torch.Tensor]) -> list[tuple]:
    """Every row without its padding."""
    return [
        (
            made["prompt_ids"][i][made["prompt_mask"][i].bool()].tolist(),
            made["completion_ids"][i][made["completion_mask"][i].bool()].tolist(),
            made["old_per_token_logps"][i][made["completion_mask"][i].bool()].tolist(),
            made["advantages"][i].item(),
        )
        for i in range(len(made["advantages"]))
    ]


def test_groups_of_different_batches_keep_every_token_in_its_place():
    """Goes red if a side is padded wrongly, a row changes places, or log-probs part from their tokens."""
    one, other = batch([3, 3, 2, 2], [4, 1, 2, 2]), batch([5, 5], [1, 7], first=4)
    groups = [*split_groups(one, 2), *split_groups(other, 2)]
    joined = join_groups([groups[2], groups[0]], PAD)
    assert contents(joined) == [*contents(other), *contents(one)[:2]]
    assert joined["prompt_ids"].shape == (4, 5) and joined["completion_ids"].shape == (4, 7)
    assert bool(joined["prompt_mask"][:, -1].all()) and bool(joined["completion_mask"][:, 0].all())  # no gap between
    assert (joined["prompt_ids"][joined["prompt_mask"] == 0] == PAD).all()
    assert (joined["completion_ids"][joined["completion_mask"] == 0] == PAD).all()


def test_a_batch_is_as_narrow_as_its_longest_rows():
    """Goes red if the width of a group that was dropped stays."""
    groups = split_groups(batch([3, 3, 8, 8], [2, 1, 9, 9]), 2)
    joined = join_groups(groups[:1], PAD)
    assert joined["prompt_ids"].shape == (2, 3) and joined["completion_mask"].shape == (2, 2)


def test_a_silenced_group_counts_no_token():
    """Goes red if a group that only fills a place has an advantage or a token in the divisor."""
    group = split_groups(batch([2, 2], [3, 2]), 2)[0]
    silent = join_groups([group, silenced(group)], PAD)
    assert int(num_counted(silent)) == 5 and silent["advantages"][2:].tolist() == [0.0, 0.0]
    alone = join_groups([silenced(group)], PAD)
    assert alone["completion_ids"].shape == (2, 1) and int(num_counted(alone)) == 0


def test_a_group_has_memory_of_its_own():
    whole = batch([2, 2], [2, 2])
    group = split_groups(whole, 2)[0]
    whole["completion_ids"].zero_()
    assert group["completion_ids"].sum() > 0


def test_images_are_refused():
    with pytest.raises(ValueError, match="pixel_values cannot be cut"):
        split_groups({**batch([2, 2], [2, 2]), "pixel_values": torch.zeros(2)}, 2)
