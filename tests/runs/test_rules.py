"""Rules such as `drift>0.05`: what is read, what is refused, when they are met."""

import pytest

from psft.errors import RequestError
from psft.runs.rules import Rule, RuleBook, parse_rule


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("drift>0.05", Rule("drift", ">", 0.05)),
        (" grad_norm >= 1e2 ", Rule("grad_norm", ">=", 100.0)),
        ("clip_fraction<0.01 for 24", Rule("clip_fraction", "<", 0.01, 24)),
        ("heldout_nll<=-1", Rule("heldout_nll", "<=", -1.0)),
        ("nll<inf", Rule("nll", "<", float("inf"))),
    ],
)
def test_a_rule_is_read_and_written_alike(text, rule):
    assert parse_rule(text, setting="stop_when", measured=["heldout_nll"]) == rule
    assert parse_rule(str(rule), setting="stop_when", measured=["heldout_nll"]) == rule


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("drift", "no rule"),
        ("drift=0.05", "no rule"),
        ("drift>", "no rule"),
        ("drift>0.05 for three", "no rule"),
        ("drift>0.05 and nll>1", "no rule"),
        ("drfit>0.05", "Did you mean 'drift'"),
        ("stage>1", "no metric 'stage'"),
        ("drift>low", "'low' is no number"),
        ("drift>nan", "nan"),
        ("drift>0.05 for 0", "1 or more"),
        ("", "no rule"),
    ],
)
def test_what_is_no_rule_is_refused_with_setting_and_text(text, words):
    with pytest.raises(RequestError, match="stop_when=") as refused:
        parse_rule(text, setting="stop_when")
    assert words in str(refused.value)


def test_a_rule_is_met_once_it_held_so_many_measurements_in_a_row():
    """Goes red if rows without the metric break the row, if a value that is not finite counts, or if it repeats."""
    book = RuleBook([Rule("nll", ">", 2.0, times=2)])
    seen = [bool(book.met({"nll": value})) for value in (3.0, 1.0, 3.0)]
    assert seen == [False, False, False]
    assert book.met({"entropy": 0.0}) == []
    assert book.met({"nll": 3.0}) == book.rules
    assert book.met({"nll": 3.0}) == []  # still so: said once
    assert book.met({"nll": None}) == [] and book.met({"nll": 3.0}) == []
    assert book.met({"nll": 3.0}) == book.rules


def test_a_resumed_book_counts_on_and_a_changed_rule_starts_anew():
    rule = Rule("nll", ">", 2.0, times=3)
    book = RuleBook([rule])
    book.met({"nll": 3.0}), book.met({"nll": 3.0})
    resumed, changed = RuleBook([rule]), RuleBook([Rule("nll", ">", 2.5, times=3)])
    resumed.load_state_dict(book.state_dict()), changed.load_state_dict(book.state_dict())
    assert resumed.met({"nll": 3.0}) == [rule] and changed.met({"nll": 3.0}) == []
