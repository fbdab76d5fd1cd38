"""The view of a running run: curves in a terminal, plain lines elsewhere, warnings kept."""

import io
import logging

import pytest
from rich.console import Console

from psft.cli.live_view import LiveView, live_view, sparkline


def test_a_sparkline_runs_from_its_lowest_to_its_highest_value():
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7], 8) == "▁▂▃▄▅▆▇█"
    assert sparkline(list(range(1000)), 8) == "▁▂▃▄▅▆▇█"
    assert sparkline([1.0, 1.0], 8) == "▁▁" and sparkline([], 8) == "" == sparkline([float("nan")], 8)
    assert len(sparkline(list(range(1001)), 10)) <= 10


def filled(num_steps=20, max_steps=40):
    view = LiveView(max_steps, every=10)
    for step in range(1, num_steps + 1):
        row = {"step": step, "nll": 2.0 - step / 20, "entropy": 1.0, "clip_fraction": 0.03, "grad_norm": None,
               "learning_rate": 1e-6, "tokens_per_second": 812.4}  # fmt: skip
        view.row("metrics", row)
        view.row("probe", {"step": step, "group": "code", "drift_nats_per_token": 9.0})
    view.row("probe", {"step": num_steps, "group": "all", "drift_nats_per_token": 0.0123})
    view.row("eval", {"step": num_steps, "benchmark": "heldout", "metric": "nll", "value": 1.5})
    return view


@pytest.mark.parametrize("width", [60, 80, 200])
def test_a_terminal_shows_curves_with_first_and_last_value(width):
    """Goes red if a group's drift is taken for the whole, or a line is wider than the terminal."""
    console = Console(file=io.StringIO(), force_terminal=True, width=width, legacy_windows=False)
    console.print(filled().render(width))
    text = console.file.getvalue()
    for words in ("step 20/40", "1.950 > 1.000", "3.00%", "0.0123", "heldout nll 1.500", "812 tokens/s", "left"):
        assert words in text, (words, text)
    assert "9.0" not in text and "gradient" not in text  # never measured
    assert len(text.splitlines()) == 6


def test_a_file_gets_one_plain_line_every_so_many_steps():
    view = filled()
    assert view.line().startswith(
        "step 20/40  NLL 1.000  entropy 1.000  clipped 3.00%  drift 0.0123  lr 1e-06  812 tok"
    )
    due = [step for step in range(1, 41) if view.is_line_due("metrics", {"step": step})]
    assert due == [1, 10, 20, 30, 40] and not view.is_line_due("eval", {"step": 10})


def test_the_time_left_is_told_once_a_step_has_been_timed(monkeypatch):
    """Goes red if the first step, which nobody timed, counts: then "0:00 left" stands there at once."""
    now = [100.0]
    monkeypatch.setattr("psft.cli.live_view.time.monotonic", lambda: now[0])
    view = LiveView(11)
    view.row("metrics", {"step": 1, "nll": 1.0})
    assert "left" not in view.line()
    now[0] += 6
    view.row("metrics", {"step": 2, "nll": 1.0})
    assert view.line().endswith("0:54 left")


def test_a_long_run_keeps_a_bounded_curve():
    view = LiveView(50_000)
    for step in range(1, 20_001):
        view.row("metrics", {"step": step, "nll": 1.0 + 1.0 / step})
    assert len(view._curves["nll"]) <= 4096 and sparkline(view._curves["nll"], 40)[0] == "█"


def test_training_in_a_terminal_is_drawn_and_what_is_logged_meanwhile_is_kept(make_trainer, demonstrations):
    console = Console(file=io.StringIO(), force_terminal=True, width=100, legacy_windows=False)
    trainer = make_trainer(disable_tqdm=False, eval_dataset={"held": demonstrations}, eval_on_start=True, probe_every=4)
    with live_view(trainer, console):
        trainer.train()
    text = console.file.getvalue()
    assert "step 8/8" in text and "NLL" in text and "drift" in text and "held nll" in text
    assert trainer.recorder.listeners == []


def test_training_into_a_file_prints_lines_and_no_dictionaries(make_trainer, capsys):
    trainer = make_trainer(disable_tqdm=False, logging_steps=4)
    with live_view(trainer, Console(file=io.StringIO())):
        trainer.train()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines] == ["step 1/8", "step 4/8", "step 8/8"]


def test_quiet_stays_quiet(make_trainer, capsys):
    trainer = make_trainer(max_steps=2, logging_steps=100)
    with live_view(trainer):
        trainer.train()
    assert "step 1/2" not in capsys.readouterr().out


def test_handlers_write_where_they_wrote_before():
    """Goes red if a handler keeps rich's stream after the area is gone."""
    from psft.cli.live_view import _live_area

    handler = logging.StreamHandler(io.StringIO())
    stream = handler.stream
    logging.getLogger().addHandler(handler)
    try:
        with _live_area(Console(file=io.StringIO(), force_terminal=True)):
            assert handler.stream is not stream
        assert handler.stream is stream
    finally:
        logging.getLogger().removeHandler(handler)
