"""The quick reader of LaTeX gives what math-verify's own gives, and is the one in use."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("math_verify", reason="the graders' library is in the extra `eval`")

from psft.rewards import latex, symbolic  # noqa: E402
from psft.rewards.notation import spelt  # noqa: E402

TEXTS = [
    "42", "-7", "007", "-0", "4.50", "-0.125", "12345678901234567890123", "0.333333333333333333333", "- 3", "1e5", "5.",
    "1,234", "1,2", r"\frac{1}{2}", r"-\frac{11}{3}", r"2\sqrt{3}", "x^2+2x+1", r"7\pi", r"\{1,2,3\}", "(1, 2]",
    "x = 5", r"2 < x \le 7", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"50\%", r"(-\infty, 2) \cup (3, \infty)",
    "f(x) = 3 x_{1}", r"\sin^2 \theta", r"e^{2 i t}", r"3 \pm 1", r"\text{east}", r"\sum_{n=1}^{3} n", "3^{012}",
    r"4.5 \times 10^{33}",
    "-9x^3+3x^2-2x+424", "(x^2 + 1)(x^2 - 4x + 15694)", "5399x^2 - 12",  # beyond mode SLL
    "", "x +", r"\frac{1}{2", "a & b", r"\foo{3}",  # no expressions
]  # fmt: skip


def reading(reader, text: str) -> object:
    """What it is, with the precision of every number; or that it is nothing."""
    from sympy import srepr

    try:
        return srepr(reader(text, is_real=True, convert_degrees=False, normalization_config=None))
    except Exception:
        return "not read"


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_is_read_as_math_verify_reads_it(text):
    """Goes red if mode LL does not follow on mode SLL, or a number loses its sign, digits or leading zero's meaning."""
    from latex2sympy2_extended import latex2sympy

    assert reading(latex.read_latex, text) == reading(latex2sympy, text)


def test_the_quick_reader_is_in_use_and_remembers(monkeypatch):
    """Goes red if math-verify calls its parts otherwise than here, so that all would be right but slow, in silence."""
    from math_verify import parser

    symbolic.load()
    assert parser.latex2sympy is latex.read_latex
    assert parser.parse_latex_cached.cache_parameters()["maxsize"] == latex.MOST_REMEMBERED
    remembers = parser.parse_latex_cached
    latex.quicken()
    assert parser.parse_latex_cached is remembers
    read = []
    monkeypatch.setattr(parser, "latex2sympy", lambda text, **settings: read.append(text))
    symbolic.parse_answer("x^2 + 987654321")
    assert read == ["x^2 + 987654321"]
    for text in ("3", "-3", "0.5"):  # never given to the grammar
        monkeypatch.setattr(latex, "_quick_converter", lambda: pytest.fail("read as an expression"))
        latex.read_latex(text, is_real=True, convert_degrees=False, normalization_config=None)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["aime24", "aime25", "amc23", "math500", "minerva", "olympiadbench_test"])
def test_every_gold_answer_is_read_as_math_verify_reads_it(name, shared_data):
    """Goes red as above."""
    from latex2sympy2_extended import latex2sympy

    lines = (shared_data / "math" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    texts = {spelt(str(json.loads(line)["answer"])) for line in lines}
    differ = [text for text in texts if reading(latex.read_latex, text) != reading(latex2sympy, text)]
    assert not differ and len(texts) > 20
