"""Which rows form which optimizer step."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from psft.errors import RequestError
from psft.window import Schedule, plan_epoch


@given(st.integers(1, 300), st.integers(1, 6), st.integers(1, 8), st.integers(0, 7), st.integers(1, 20))
def test_an_epoch_covers_every_row_once_in_whole_mini_batches(rows, minis, mini, warmup_steps, warmup_mini):
    """Goes red if a window straddles an epoch, a tail is lost, or warm-up steps are counted per epoch."""
    schedule = Schedule(rows, minis * mini, mini, warmup_steps=warmup_steps, warmup_mini_batch_size=warmup_mini)
    epochs = schedule.epochs()
    first, second = next(epochs), next(epochs)
    for steps in (first, second):
        assert [i for s in steps for i in range(s.start, s.stop)] == list(range(rows))
        for step in steps:
            assert 1 <= step.stop - step.start <= (warmup_mini if step.is_warmup else mini)
            assert 1 <= step.mini_batch <= step.num_mini_batches <= (1 if step.is_warmup else minis)
    both = [*first, *second]
    assert sum(s.is_warmup for s in both) == min(warmup_steps, len([s for s in both if s.is_warmup]))
    assert [s.window for s in both] == sorted(s.window for s in both)
    assert schedule.num_steps(2) == len(both) and schedule.num_steps(0.5) == -(-len(first) // 2)
    assert schedule.max_steps_per_epoch >= max(len(first), len(second))
    assert schedule.num_epochs(len(first)) == 1 and schedule.num_epochs(len(first) + 1) == 2


def test_openr1_math_has_178_windows_of_256():
    """The paper's 178 steps per epoch (table 6 setting) for its 45.6k rows."""
    plan = plan_epoch(45_600, train_batch_size=256, mini_batch_size=32, drop_last=True)
    assert (plan.num_windows, plan.num_steps, plan.num_rows_dropped) == (178, 178 * 8, 32)


def test_a_tail_becomes_a_short_window_unless_dropped():
    kept = plan_epoch(10, train_batch_size=8, mini_batch_size=4, drop_last=False)
    dropped = plan_epoch(10, train_batch_size=8, mini_batch_size=4, drop_last=True)
    assert (kept.num_windows, kept.num_steps, kept.num_rows_dropped) == (2, 3, 0)
    assert (dropped.num_windows, dropped.num_steps, dropped.num_rows_dropped) == (1, 2, 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((10, 8, 3), "Use mini_batch_size=2, or train_batch_size=9"),
        ((10, 8, 0), "mini_batch_size=0 must be at least 1"),
        ((0, 8, 4), "no rows"),
        ((5, 8, 4, True), "dataloader_drop_last leaves nothing"),
    ],
)
def test_impossible_sizes_say_what_would_do(arguments, message):
    with pytest.raises(RequestError, match=message):
        Schedule(*arguments)
