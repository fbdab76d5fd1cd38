"""Mathematics: what equals a gold answer and what does not, by both policies; every trap that graders fall into."""

from __future__ import annotations

import json
from fractions import Fraction

import pytest

from psft.errors import RequestError
from psft.rewards import get_grader, grade_rows
from psft.rewards.boxed import is_box, last_box
from psft.rewards.notation import gold_texts
from psft.rewards.numbers import parse_number

pytest.importorskip("math_verify", reason="the graders' library is in the extra `eval`")


def scores(response: str, gold: object, **settings: object) -> tuple[float, float]:
    """(strict, psft)."""
    details = get_grader("math", **settings)({"response": response, "gold": gold}).details
    return details["strict"], details["psft"]


def boxed(answer: str) -> str:
    return rf"Some steps. The answer is $\boxed{{{answer}}}$."


@pytest.mark.parametrize(
    ("answer", "gold"),
    [
        ("42", 42), ("42", 42.0), ("42.0", "42"), (r"\frac{1}{2}", "0.5"), (r"\dfrac12", r"\frac{1}{2}"),
        ("1/2", r"\frac{1}{2}"), (r"1\frac{4}{5}", "1.8"), ("10,080", r"10,\!080"), ("10{,}000", "10000"),
        ("−3", "-3"), ("6.6e-34", r"6.6\times10^{-34}"), (r"4.5 \times 10^{33}", "4.5e33"), ("0.333333", r"\frac13"),
        (r"50\%", "50"), (r"50\%", r"50\%"), ("50", r"50\%"), (r"50\%", "0.5"),
        ("0.5", r"50\%"), (r"\$18.90", "18.90"), (r"864\text{ inches}^2", "864"),
        (r"90^\circ", "90"), (r"12\text{ cm}", r"12 \mathrm{cm}"), ("x = 5", "5"), ("5", "x=5"), (r"52_8", "52"),
        ("(0, 1]", r"\left(0,1\right]"), (r"\{3, 1, 2\}", r"\{1,2,3\}"), ("1, 2", r"2 \text{ and } 1"),
        (r"3 \pm 1", "2, 4"), (r"(-\infty, 2) \cup (3, \infty)", r"(3,\infty)\cup(-\infty,2)"),
        (r"2\sqrt{3}", r"\sqrt{12}"), (r"x^2+2x+1", r"(x+1)^2"), (r"\text{east}", "East"), (r"\text{(C)}", "C"),
        (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{pmatrix} 1\\2 \end{pmatrix}"), ("17", ["16", "17"]),
        ("2<x<5", "(2,5)"), (r"-2 \le x \le 7", "[-2,7]"), ("5 joules", "5"), ("E_2 + E_1", "E_{1}+E_{2}"),
        (r"-1+\gamma^2", r"\gamma^{2}-1"), (r"m c^2 \gamma", r"\gamma m c^2"),
    ],
)  # fmt: skip
def test_equivalent_writings_are_right(answer, gold):
    """Goes red if a notation that occurs in the six sets is not read."""
    assert scores(boxed(answer), gold) == (1.0, 1.0)


@pytest.mark.parametrize(
    ("answer", "gold"),
    [
        ("0.5", "50"), ("2700", "27"), ("50", "0.5"),  # off by 100: right to the paper's script
        (r"0.5\%", "0.5"), ("9" * 5000, "3"),
        (r"(2, \infty)", "(2, 5)"), (r"(-\infty, 3)", r"(-\infty, 2)"), (r"\infty", r"-\infty"), ("6", "6m"),
        (r"\frac{1}{0}", r"\frac{2}{0}"), (r"\gamma^2-5", r"\gamma^2-1"),  # without a value to math-verify: all one
        ("9.1e-31", "6.6e-34"), (r"9.1\times10^{-31}", r"6.6\times10^{-34}"),  # equal to math-verify
        ("1.001e40", "1e40"), ("41", "42"), ("-42", "42"), ("0.33", r"\frac13"), ("[0, 1)", "(0, 1)"),
        ("(1, 2)", "(2, 1)"), ("1, 2", "1, 2, 3"), (r"\{1,2\}", r"\{1,3\}"),
        ("x = 5", "y = 6"), ("A", "B"), (r"\text{west}", r"\text{east}"), ("x+1", "x+2"), ("", "3"),
    ],
)  # fmt: skip
def test_other_answers_are_wrong_by_both_policies(answer, gold):
    """Goes red if a comparison is absolute, forgives a factor of 100, or forgets order, brackets or units."""
    assert scores(boxed(answer), gold) == (0.0, 0.0)


def test_another_base_or_unit_is_another_number():
    """math-verify looks at neither; its reading of the whole response belongs to the paper's policy alone."""
    assert scores(boxed(r"12\text{ cm}"), r"12\text{ m}")[0] == 0.0
    assert scores(boxed("52_8"), "52_9")[0] == 0.0
    assert scores(boxed("N=n+5"), "N=n")[0] == 0.0  # math-verify reads N and n as one letter


def test_a_relative_tolerance_belongs_to_the_papers_policy_or_is_asked_for():
    """Goes red if strict rounds, or the paper's tolerance is absolute or another."""
    assert scores(boxed("1.60005"), "1.6") == (0.0, 1.0)
    assert scores(boxed("1.6005"), "1.6") == (0.0, 0.0)
    assert scores(boxed("1.60005e-20"), "1.6e-20") == (0.0, 1.0)
    assert scores(boxed("1.605"), "1.6", relative_tolerance=0.01) == (1.0, 1.0)  # psft takes what strict takes


def test_the_last_whole_box_is_the_answer():
    """Goes red if two boxes in a line become a set, as in math-verify, or a box that is cut off counts."""
    assert scores(r"It is \boxed{41}, no, wait: \boxed{42}.", "42") == (1.0, 1.0)
    assert scores(r"It is \boxed{42}, no, wait: \boxed{41}.", "42")[0] == 0.0
    assert last_box(r"\boxed{\frac{1}{2}} then \boxed{\frac{3}{") == r"\frac{1}{2}"
    assert last_box(r"\boxed{1} and \boxed{2}") == "1, 2"
    assert is_box(r"$\boxed{5}$", "5") and is_box("5", "5") and is_box(r"\(\boxed{\frac{1}{2}}\)", r"\frac{1}{2}")
    assert not is_box(r"\boxed{5} or 6", "5") and not is_box(r"\boxed{6}", "5") and not is_box("5", None)
    assert last_box("nothing") is None and last_box(r"\boxed{}") is None


def test_a_truncated_response_that_ends_in_the_right_number_has_no_answer():
    """Goes red if strict falls back on the last number; the paper's script does, which stands beside it."""
    grade = get_grader("math")({"response": "so we try 40 + 2, which gives 42", "gold": "42"})
    assert (grade.score, grade.extracted, grade.details["psft"]) == (0.0, None, 1.0)
    loose = get_grader("math", policy="psft")({"response": "so we try 40 + 2, which gives 42", "gold": "42"})
    assert loose.score == 1.0 and loose.extracted is not None
    stated = {"response": "steps\n#### 1,234", "gold": "1234"}
    assert get_grader("math")(stated).score == 0.0
    assert get_grader("math", require_boxed=False)(stated).score == 1.0


@pytest.mark.parametrize("gold", [None, "", [], {}, True, float("nan"), ["1", None]])
def test_a_gold_answer_that_is_none_is_refused(gold):
    with pytest.raises(RequestError, match="gold"):
        get_grader("math").check({"response": "x", "gold": gold})


def test_settings_are_checked():
    with pytest.raises(RequestError, match="strict, psft"):
        get_grader("math", policy="lenient")
    with pytest.raises(RequestError, match="relative_tolerance"):
        get_grader("math", relative_tolerance=-1)
    with pytest.raises(RequestError, match="Did you mean policy"):
        get_grader("math", polcy="strict")
    with pytest.raises(RequestError, match="Did you mean math"):
        get_grader("maths")


def test_an_endless_expression_is_given_up_and_the_rows_after_it_are_graded():
    """Goes red if a row can hold up a worker, or takes its neighbours with it."""
    rows = [{"response": boxed("1"), "gold": "1"} for _ in range(4)]
    rows[1] = {"response": boxed(r"9^{9^{9^{9}}} + x"), "gold": r"8^{8^{8^{8}}} + x"}
    grades = list(grade_rows("math", rows, num_workers=1, time_limit=1.0))
    assert [grade.score for grade in grades] == [1.0, 0.0, 1.0, 1.0]
    assert grades[1].is_timed_out or "memory" in grades[1].reason or "could not" in grades[1].reason, grades[1]


SETS = {"aime24": 30, "aime25": 30, "amc23": 40, "math500": 500, "minerva": 272, "olympiadbench_test": 675}


def golds_of(shared_data, name: str) -> list[list[str]]:
    lines = (shared_data / "math" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    golds = [gold_texts(json.loads(line)["answer"]) for line in lines]
    assert len(golds) == SETS[name]
    return golds


@pytest.mark.slow
@pytest.mark.parametrize("name", SETS)
def test_every_gold_answer_is_itself_another_writing_of_itself_and_nothing_else(name, shared_data):
    """Goes red if a gold answer of the six sets cannot be read, or a wrong one passes for it."""
    rows, wanted = [], []
    for golds in golds_of(shared_data, name):
        gold = golds[0]
        for answer, score in _variants(gold):
            rows.append({"response": boxed(answer), "gold": golds})
            wanted.append(score)
    grades = list(grade_rows("math", rows, time_limit=20.0))
    wrong = [
        (row["gold"], row["response"], grade.reason)
        for row, score, grade in zip(rows, wanted, grades, strict=True)
        if grade.score != score
    ]
    assert not wrong, (len(wrong), wrong[:10])


def _variants(gold: str) -> list[tuple[str, float]]:
    """The gold answer, another writing of it, and what is wrong."""
    plain = gold.strip().strip("$")
    variants = [(gold, 1.0), (rf"\displaystyle {plain}\,.", 1.0)]
    if not plain.startswith("("):  # math-verify compares a tuple plus a number with the tuple as it likes
        variants.append((rf"{plain} + 1234567", 0.0))
    if (number := parse_number(plain)) is not None:
        value = number.value
        variants += [(rf"\dfrac{{{value.numerator * 3}}}{{{value.denominator * 3}}}", 1.0)]
        variants += [(_fraction(value * Fraction(101, 100) + Fraction(1, 7)), 0.0)]
        variants += [(_fraction(-value), 0.0)] if value else []
        variants += [(_fraction(value * 100), 0.0)] if value else []
    return variants


def _fraction(value: Fraction) -> str:
    return rf"\frac{{{value.numerator}}}{{{value.denominator}}}"


@pytest.mark.slow
def test_labels_of_two_data_sets_are_met(shared_data):
    """GSM8K's example solutions, all 5,276; 480 labelled answers of MATH, 99.7 %. Goes red if an answer is lost."""
    rows, labels = [], []
    for line in (shared_data / "gsm8k" / "example_model_solutions.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        for name in ("6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification"):
            rows.append({"response": row[name]["solution"], "gold": row["ground_truth"].rpartition("A: ")[2]})
            labels.append(bool(row[name]["is_correct"]))
    grades = list(grade_rows("math", rows, require_boxed=False))
    same = sum(bool(grade.score) == label for grade, label in zip(grades, labels, strict=True))
    print(f"GSM8K example solutions: {same} of {len(labels)}")
    assert same == len(labels) == 5276
    rows, labels = [], []
    for line in (shared_data / "math" / "math_cot_60x8_labelled.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        rows += [{"response": response, "gold": row["gt"]} for response in row["response"]]
        labels += row["score"]
    grades = list(grade_rows("math", rows, time_limit=20.0))
    differ = [(r["gold"], g.extracted, label) for r, g, label in zip(rows, grades, labels, strict=True)
              if bool(g.score) != bool(label)]  # fmt: skip
    print(f"math_cot: {len(labels) - len(differ)} of {len(labels)}; {differ}")
    assert len(labels) == 480 and len(differ) <= 1
