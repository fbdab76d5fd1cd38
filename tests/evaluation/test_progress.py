"""Laws of the line a person sees while an evaluation goes on."""

from __future__ import annotations

import io

from psft.evaluation.progress import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def progress(stream, seconds, total=40, done=0):
    return Progress("AIME24", total, done, stream=stream, clock=lambda: seconds[0])


def test_the_line_says_score_speed_and_time_left():
    """By hand: 10 of 40 were there; 5 more take 20 s, so 25 take 100 s; one asked in vain is not waited for.

    Goes red if samples that were there count as made, the answers of an item as independent, or failures as left.
    """
    seconds = [100.0]
    line = progress(io.StringIO(), seconds, done=10)
    for item, score in (("a", 1.0), ("a", 0.0), ("b", 0.0), ("b", 0.0)):
        line.scored(item, score)
    assert line.line() == "AIME24 10/40 · avg 25.0 ± 25.0 %"
    seconds[0] = 120.0
    for _ in range(5):
        line.made(200)
    assert line.line() == "AIME24 15/40 · avg 25.0 ± 25.0 % · 50 tok/s · 1:40 left"
    line.failed()
    assert line.line().endswith("50 tok/s · 1:36 left · 1 without an answer")


def test_a_file_gets_a_line_now_and_then_and_a_terminal_one_that_is_drawn_over():
    """Goes red if a log gets a line a sample, or nothing is said before the first."""
    for stream, start, times in ((io.StringIO(), "", 4), (Terminal(), "\r\x1b[K", 103)):
        seconds = [0.0]
        line = progress(stream, seconds, total=101)
        line.begin()
        for _ in range(101):
            seconds[0] += 0.7
            line.made(None)
            line.show()
        line.finish()
        shown = stream.getvalue()
        assert shown.startswith(f"{start}AIME24 0/101") and shown.endswith("AIME24 101/101 · took 1:11\n")
        assert shown.count("AIME24") == times and shown.count("\n") == (1 if start else 4)


def test_the_samples_of_a_batch_are_taken_in_before_the_line_is_drawn():
    """Goes red if the first of a batch is shown alone: what is left would seem to take a batch's time each."""
    stream, seconds = io.StringIO(), [0.0]
    line = progress(stream, seconds)
    seconds[0] = 60.0
    for _ in range(20):
        line.made(10)
    line.show()
    assert stream.getvalue() == "AIME24 20/40 · 3 tok/s · 1:00 left\n"
