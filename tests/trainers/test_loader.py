"""One cut for both passes of a window, and for what is left of it after a checkpoint."""

import json
import shutil
from pathlib import Path

import pytest

from psft.data.microbatch import Cut
from psft.errors import RequestError
from psft.trainers.loader import WindowSampler
from psft.window import Schedule


def rows_of(trainer):
    lines = (Path(trainer.args.output_dir) / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    return [{k: v for k, v in row.items() if k not in ("tokens_per_second", "peak_memory_bytes")} for row in rows]


def test_each_micro_batch_is_collated_once_for_both_passes(make_trainer):
    """Goes red if the old pass or the training pass cuts or collates for itself.

    Eight steps of four rows, two windows: 6 mini-batches are scored and 8 trained, on 8 mini-batches of tensors.
    """
    trainer = make_trainer(max_steps=8)
    collated, scored = [], {}
    collate, score = trainer.data_collator, trainer._score

    def counting(rows):
        collated.append(len(rows))
        return collate(rows)

    def noted(model, micro_batch, **how):
        scored.setdefault(tuple(micro_batch["row_numbers"]), []).append(micro_batch)
        return score(model, micro_batch, **how)

    trainer.data_collator, trainer._score = counting, noted
    trainer.train()
    assert sum(collated) == 32 and len(collated) > 8, "every row once, in more micro-batches than mini-batches"
    assert len(scored) == len(collated)
    for passes in scored.values():
        assert all(micro_batch is passes[0] for micro_batch in passes)
    twice = sum(len(rows) for rows, passes in scored.items() if len(passes) == 2)
    assert twice >= 24, "6 of 8 mini-batches have an old pass"


def sampler(*, rank=0, world_size=1, cut=None, num_rows=20):
    lengths = [3 + (7 * row) % 11 for row in range(num_rows)]
    schedule = Schedule(num_rows, 8, 4)
    return WindowSampler(
        schedule, lengths=lengths, cut=cut or Cut(30), seed=5, is_shuffled=True, rank=rank, world_size=world_size
    )


def test_ranks_together_hold_the_rows_of_one_process():
    """Goes red if ranks draw different orders, or deal rows of another mini-batch."""
    one = [sorted(row for group in step for row in group) for step in sampler()]
    shares = [list(sampler(rank=rank, world_size=4)) for rank in range(4)]
    assert one == [sorted(row for share in shares for group in share[n] for row in group) for n in range(len(one))]
    assert one == [sorted(rows) for rows in sampler().mini_batches()]
    other = sampler()
    other.set_epoch(1)
    assert one != [sorted(rows) for rows in other.mini_batches()]


def test_a_kept_layout_is_used_for_its_step_and_epoch_alone():
    """Goes red if it leaks into another epoch, or if rows of another step pass for its own."""
    drawn = list(sampler())
    whole = [sorted(row for group in step for row in group) for step in drawn]
    other = sampler(cut=Cut(1000, overhead_tokens=1000))
    assert list(other) != drawn
    other.keep(0, {2: [*drawn[2], []]})  # an empty micro-batch kept ranks in step
    again = list(other)
    assert again[2] == drawn[2] and [sorted(group) for group in again[1]] == [whole[1]]
    other.set_epoch(1)
    assert list(other)[2] != drawn[2]
    other.set_epoch(0)
    other.keep(0, {2: drawn[3]})
    with pytest.raises(RequestError, match=r"rows belong to other steps.*--allow_changed batch_sizes"):
        list(other)


def test_what_is_left_of_a_window_is_cut_as_the_checkpoint_holds_it(make_trainer, tmp_path, monkeypatch):
    """As if a later version cut in another way. Goes red if the resumed run cuts its open window anew: old log-probs
    would meet other tokens, and in bfloat16 other rounding."""
    settings = {"max_steps": 8, "save_strategy": "steps", "save_steps": 1, "max_tokens_per_micro_batch": 40}
    whole = make_trainer("whole", **settings)
    whole.train()
    shutil.copytree(whole.args.output_dir, tmp_path / "cut")
    for path in (tmp_path / "cut").glob("checkpoint-*"):
        if int(path.name.split("-")[1]) > 2:
            shutil.rmtree(path)
    cuts = []

    def one_row_each(rows, lengths, cut, *, rank, world_size):
        cuts.append(sorted(rows))
        return [[row] for row in rows]

    monkeypatch.setattr("psft.trainers.loader.deal_and_cut", one_row_each)
    again = make_trainer("cut", resume=True, **settings)
    again.train()
    assert rows_of(again)[:4] == rows_of(whole)[:4]  # the open window: steps 3 and 4
    assert len(cuts) == 2 + 4, "two steps that are passed over, and the next window"
    for one, other in zip(rows_of(again)[4:], rows_of(whole)[4:], strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
