"""Telling expressions apart by their values: only what is certain, and never against math-verify."""

from __future__ import annotations

import json
import random
import re

import pytest

pytest.importorskip("math_verify", reason="the graders' library is in the extra `eval`")

from psft.rewards.disproof import surely_differ  # noqa: E402
from psft.rewards.notation import spelt  # noqa: E402
from psft.rewards.symbolic import load, parse_answer  # noqa: E402


@pytest.fixture(scope="module", autouse=True)
def _loaded():
    load()


def told_apart(gold: str, answer: str) -> bool:
    return surely_differ(parse_answer(gold)[0], parse_answer(answer)[0])


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        ("x^2+2x+1", "x^2+2x+2"), ("x+1", "y+1"), (r"\sin 3x", r"\sqrt{22}"), (r"\sqrt{x^2}", "-x"), ("2^x", "x^2"),
        ("x^{698}+1", "x^4+1"), ("3-2f(x)", "3-4f(x)"), (r"\frac{1}{x}", "2x"), (r"2\pi", r"3\pi"),
        ("2x+10^{-3}", "2x"), ("y=-3x+30", "y=-3x+31"), (r"\tan\theta=2\theta", r"\tan\theta=3\theta"), ("x=1", "y=1"),
        ("x^2+y^2=25", "x^2+y^2=26"),
        ("[2,3]", "[2,4]"), (r"(-\infty,3)", r"(-\infty,2)"), (r"(2,\infty)", "(2,5)"), (r"\{1,2,3\}", r"\{1,2,4\}"),
        (r"\{1,2\}", r"\{1,2,3\}"), ("(2,5)", "2, 6"),
    ],
)  # fmt: skip
def test_what_has_other_values_is_told_apart(gold, answer):
    """Goes red if a kind of expression is no longer looked at: the grade stays right and takes 40 times as long."""
    assert told_apart(gold, answer)


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        ("(x+1)^2", "x^2+2x+1"), (r"\sin^2 x", r"1-\cos^2 x"), (r"\sqrt{x^2}", "x"), ("3-2f(x)", "3-f(x)-f(x)"),
        (r"\frac{x}{3}", "0.3333333x"), ("x+10^{-7}", "x"), (r"10^{-8}x", r"2\cdot 10^{-8}x"),  # too close to say
        ("N", "n"), ("abc", "x"), (r"\{a,b\}", r"\{a,c\}"),  # names
        (r"\sum_{n=1}^{3} x", "2x"), (r"\lfloor x \rfloor", "x+1"), (r"9^{9^{9^9}}+x", r"8^{8^{8^8}}+x"),  # no reach
        (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{pmatrix} 1 \\ 3 \end{pmatrix}"), (r"\frac{x}{0}", "x"),
        ("y=-3x+30", "2y=60-6x"), ("y=-3x+30", "y+3x-30=0"), (r"y=\sqrt{x}", "y^2=x"), ("E=mc^2", "m=E/c^2"),
        ("x=0.333333", "x=1/3"), ("x^2+1=0", "x^2+4=0"), ("0=0", "1=1"), ("x=y", "x"), ("x>1", "x>2"),
        (r"\{x=1,2\}", r"\{x=3,2\}"), ("x=1,y=2", "x=1,y=3"), (r"\{3,1,2\}", r"\{1,2,3\}"), ("[2,3)", "(2,3)"),
    ],
)  # fmt: skip
def test_what_may_be_equal_or_has_no_value_is_left_to_others(gold, answer):
    """Goes red if it guesses: a difference of rounding, of a name or of a branch counts, or nan passes for a value."""
    assert not told_apart(gold, answer)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["math500", "minerva", "olympiadbench_test"])
def test_what_is_told_apart_is_unequal_to_math_verify(name, shared_data):
    """Gold answers against their rewritings and others: wherever this says "differ", math-verify says so, too."""
    from math_verify import verify

    lines = (shared_data / "math" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    golds = [spelt(str(json.loads(line)["answer"])) for line in lines]
    golds = sorted({gold for gold in golds if re.search(r"[A-Za-z(\[]", gold)})
    rng = random.Random(0)
    num_told = 0
    for gold in rng.sample(golds, min(60, len(golds))):
        for answer in (rf"\frac{{2 \cdot ({gold})}}{{2}}", f"({gold}) + 1", rng.choice(golds), gold.replace("2", "3")):
            one, other = parse_answer(gold), parse_answer(answer)
            if one and other and surely_differ(one[0], other[0]):
                num_told += 1
                is_equal = verify(list(one), list(other), allow_set_relation_comp=True, timeout_seconds=None)
                assert not is_equal, (gold, answer)
    assert num_told > 30
