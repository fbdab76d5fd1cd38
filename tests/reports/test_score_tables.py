"""The paper's tables 1 and 2: their numbers are those of the results files, their differences of a paired test."""

from __future__ import annotations

import csv
import json
import math

import numpy as np
import pytest
from reports.made_results import result, write_results
from reports.made_runs import MALICIOUS, make_run
from reports.read_page import Page

from psft.errors import RequestError
from psft.evaluation.results import compare
from psft.reports import write_report
from psft.reports.evaluations import read_bases, read_evaluation
from psft.reports.page import change, score
from psft.reports.score_cells import Cell, Difference, Row, ScoreTable, correct

MODEL = {"model_name_or_path": "some/base"}
BARE = ("summary",)
MATH = {"aime24": 0.3, "amc": 0.5, "minerva": 0.4}


def scored(path, skills, *, seed=0, step=48, objective="psft", folder="final", model=MODEL, parts=BARE):
    """A run with one results file."""
    run = make_run(path, num_steps=8, seed=seed, objective=objective, parts=parts, model=model)
    write_results(path / "evaluation" / folder / "m.math.json", skills, model=str(path), step=step, seed=100 + seed)
    return run


def report(runs, out, **settings):
    settings = {"commands": {"eval"}, "images": False} | settings
    return Page(write_report([run.path for run in runs], out, **settings).page)


def entries(path):
    return {entry["benchmark"]: entry for entry in json.loads(path.read_text())["benchmarks"]}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Three seeds of psft, one of sft, and the base: (page, folder, runs)."""
    root = tmp_path_factory.mktemp("scores")
    skills = {name: skill + 0.2 for name, skill in MATH.items()}
    seeds = [scored(root / f"psft-seed{i}", skills, seed=i) for i in range(3)]
    sft = scored(root / "sft", {"aime24": 0.3, "amc": 0.2, "gpqa": 0.3}, objective="sft")
    base = write_results(root / "evals" / "base.math.json", MATH, model="some/base")
    return report([*seeds, sft], root / "page", bases=[str(base)]), root, [*seeds, sft]


def test_scores_are_those_of_the_results_files(made):
    """Goes red if a row takes another file's number, or the mean over seeds is over something else."""
    page, root, runs = made
    rows = {row["label"]: row for row in page.data["score_tables"]["table1"]["rows"]}
    files = [entries(run.path / "evaluation" / "final" / "m.math.json") for run in runs]
    for name, entry in files[3].items():
        if name != "gpqa":
            cell = rows["sft"]["cells"][name]
            assert (cell["value"], cell["stderr"]) == (entry["accuracy"]["value"], entry["accuracy"]["stderr"])
            assert (cell["n"], cell["k"], cell["steps"]) == (30, 4, [48])
    for name, cell in rows["psft (3 seeds)"]["cells"].items():
        values = [file[name]["accuracy"]["value"] for file in files[:3]]
        assert cell["value"] == pytest.approx(np.mean(values)) and (cell["low"], cell["high"]) == (
            min(values),
            max(values),
        )
        items = np.mean([[np.mean(s) for s in file[name]["items"].values()] for file in files[:3]], axis=0)
        assert cell["stderr"] == pytest.approx(items.std(ddof=1) / math.sqrt(30))  # seeds are no new problems
    (base,) = [row for row in rows.values() if row["is_base"]]
    assert base["label"] == "some/base" and list(base["cells"]) == list(MATH)


def test_differences_are_paired_by_item(made):
    """Against the comparison of `psft eval --compare_to`. Goes red if items are mismatched or errors added instead."""
    page, root, runs = made
    rows = {row["label"]: row for row in page.data["score_tables"]["table1"]["rows"]}
    ours, theirs = entries(runs[3].path / "evaluation/final/m.math.json"), entries(root / "evals/base.math.json")
    for name in ("aime24", "amc"):
        found, wanted = rows["sft"]["cells"][name]["difference"], compare(ours[name], theirs[name])
        assert (found["test"], found["n"]) == ("paired", 30)
        for key, other in (("value", "difference"), ("stderr", "stderr"), ("p_value", "p_value")):
            assert found[key] == pytest.approx(wanted[other])
    assert (
        rows["sft"]["cells"]["amc"]["difference"]["value"]
        < 0
        < rows["psft (3 seeds)"]["cells"]["amc"]["difference"]["value"]
    )


def test_the_page_shows_the_numbers_of_its_data(made):
    """Goes red if a cell is rounded from elsewhere, a column is swapped, or a star has another bound than it says."""
    page, _, _ = made
    for table in page.data["score_tables"].values():
        for row in table["rows"]:
            text = "".join(page.text.split())
            for cell in [*row["cells"].values(), *([row["mean"]] if row["mean"] else [])]:
                difference = cell.pop("difference")
                words = score(Cell(**cell))
                if difference is not None:
                    made_of = Difference(**difference)
                    words += change(made_of) + ("*" if difference["p_holm"] < 0.05 else "")
                assert "".join(words.split()) in text
    assert "Holm" in page.text and f"the {page.data['score_tables']['table1']['num_tests']} differences" in page.text


def test_the_mean_is_over_what_every_row_has(made):
    """sft lacks Minerva: means over other sets would not compare. Goes red if each row takes its own."""
    page, _, _ = made
    table = page.data["score_tables"]["table1"]
    assert table["of_mean"] == ["aime24", "amc"]
    for row in table["rows"]:
        cells = [row["cells"][name] for name in table["of_mean"]]
        assert row["mean"]["value"] == pytest.approx(np.mean([cell["value"] for cell in cells]))
        assert row["mean"]["stderr"] == pytest.approx(math.hypot(*(cell["stderr"] for cell in cells)) / 2)


def test_tables_are_there_as_csv(made):
    """Goes red if the file has other numbers than the page."""
    page, root, _ = made
    with open(root / "page" / "tables" / "table1.csv", newline="", encoding="utf-8") as file:
        rows = {row["run"]: row for row in csv.DictReader(file)}
    for row in page.data["score_tables"]["table1"]["rows"]:
        for name, title in page.data["score_tables"]["table1"]["benchmarks"].items():
            cell = row["cells"].get(name)
            assert rows[row["label"]][title] == ("" if cell is None else str(cell["value"]))
            if cell and cell["difference"]:
                assert float(rows[row["label"]][f"{title} p_holm"]) == cell["difference"]["p_holm"]


def test_what_is_missing_says_what_to_run(tmp_path):
    """Goes red if a table ends in silence: no scores, a benchmark less than another run, no base."""
    bare = make_run(tmp_path / "bare", num_steps=8, parts=BARE, model=MODEL)
    page = report([bare], tmp_path / "page0")
    assert f"psft eval {bare.path} --suite math" in page.text and f"psft eval {bare.path} --suite ood" in page.text
    one, two = scored(tmp_path / "one", MATH), scored(tmp_path / "two", {"amc": 0.5}, objective="sft")
    page = report([one, two], tmp_path / "page1")
    missing = [(m["reason"], m["command"]) for m in page.data["score_tables"]["table1"]["missing"]]
    assert ("two lacks AIME24, Minerva.", f"psft eval {two.path} --suite math") in missing
    base = f"psft eval some/base --suite math --run_dir {one.path} --step 0"
    assert any(command == base and "no differences" in reason for reason, command in missing)
    assert all(command in page.text for _, command in missing)
    page = report([one], tmp_path / "page2", commands=set())
    assert "this version does not have yet" in page.data["score_tables"]["table1"]["missing"][0]["reason"]


def test_rows_of_eval_jsonl_serve_where_no_results_file_is(tmp_path):
    """Step 0 is the base, the last step the run; errors are all there is to compare by. Goes red if steps are mixed."""
    run = make_run(tmp_path / "run", num_steps=8, parts=BARE, model=MODEL)
    for step, value in ((0, 0.2), (4, 0.9), (8, 0.5)):
        row = {
            "step": step,
            "benchmark": "aime24",
            "metric": "accuracy",
            "k": 4,
            "value": value,
            "stderr": 0.03,
            "n": 30,
        }
        run.append("eval.jsonl", row)
        run.append("eval.jsonl", row | {"metric": "pass@4", "value": 0.99})
    table = report([run], tmp_path / "page").data["score_tables"]["table1"]
    base, row = table["rows"]
    assert (base["is_base"], base["cells"]["aime24"]["value"], row["cells"]["aime24"]["value"]) == (True, 0.2, 0.5)
    found = row["cells"]["aime24"]["difference"]
    assert (found["test"], found["value"]) == ("independent", pytest.approx(0.3))
    assert found["stderr"] == pytest.approx(math.hypot(0.03, 0.03))
    assert any("standard errors alone" in note for note in table["notes"])


def test_the_checkpoint_that_the_run_chose_stands_for_it_else_the_last_whole_one(tmp_path):
    """Goes red if a slice, an earlier step or step 0 counts before the last whole results."""
    run = scored(tmp_path / "run", {"amc": 0.9}, step=8)
    write_results(run.path / "evaluation" / "checkpoint-4" / "m.math.json", {"amc": 0.1}, step=4)
    longer = [result("amc", 0.6, limit=30, k=32)]  # a slice with more samples, made later
    write_results(run.path / "evaluation" / "slice" / "m.smoke.json", longer, step=8)
    write_results(run.path / "evaluation" / "start" / "m.math.json", {"amc": 0.3}, step=0)

    def steps(out):
        rows = report([run], tmp_path / out).data["score_tables"]["table1"]["rows"]
        assert [row["is_base"] for row in rows] == [True, False]
        return rows[1]["cells"]["amc"]["steps"], rows[1]["cells"]["amc"]["sources"]

    assert steps("page0") == ([8], ["evaluation/final/m.math.json"])
    (run.path / "checkpoint-4").mkdir()
    (run.path / "best").symlink_to("checkpoint-4")
    assert steps("page1") == ([4], ["evaluation/checkpoint-4/m.math.json"])


def test_a_run_that_was_only_measured_before_training_has_no_row(tmp_path):
    """Goes red if step 0 stands for the trained model, too: the run would equal its base."""
    run = scored(tmp_path / "run", {"amc": 0.3}, step=0)
    table = report([run], tmp_path / "page").data["score_tables"]["table1"]
    assert [row["is_base"] for row in table["rows"]] == [True]
    assert any(missing["reason"] == "run lacks AMC." for missing in table["missing"])


def test_remarks_say_what_makes_a_score_doubtful(tmp_path):
    """Goes red if cut-off answers, items seen in training, a slice, missing samples or another prompt go unsaid."""
    doubtful = result("amc", 0.5, truncated=0.5, hits=["7", "8"], missing=3, limit=30, system_prompt="Other.")
    run = scored(tmp_path / "run", [doubtful, result("aime24", 0.3, data="another file")])
    base = write_results(tmp_path / "base.json", MATH, model="some/base")
    table = report([run], tmp_path / "page", bases=[str(base)]).data["score_tables"]["table1"]
    notes = " ".join(table["notes"])
    for words in (
        "answers were cut off", "2 items are in the training data", "first 30 items", "12 samples are missing",
        "not asked alike (prompt, sampling or k): AMC", "no difference is given: AIME24",
    ):  # fmt: skip
        assert words in notes, (words, notes)
    assert table["rows"][1]["cells"]["aime24"]["difference"] is None
    assert table["rows"][1]["cells"]["amc"]["difference"]["n"] == 27


def test_holms_correction_by_hand():
    """p = 0.01, 0.03, 0.04 of three: 3 x 0.01; 2 x 0.03; then not less than before. Goes red if it is Bonferroni's."""
    row = Row("run", "psft", "base", False)
    for i, p_value in enumerate((0.04, 0.01, 0.03)):
        row.cells[str(i)] = Cell(0.5, 0.1, 1, difference=Difference(0.1, 0.1, p_value, "paired", 30))
    row.cells["none"] = Cell(0.5, 0.1, 1, difference=Difference(0.1, None, None, "independent", None))
    table = ScoreTable("t", "T", "1", {}, [row])
    correct(table)
    assert table.num_tests == 3
    assert [row.cells[str(i)].difference.p_holm for i in range(3)] == [pytest.approx(p) for p in (0.06, 0.03, 0.06)]
    assert row.cells["none"].difference.p_holm is None and not row.cells["none"].difference.is_significant


BAD = {
    "torn": '{"schema": 1, "benchmarks": [{"bench',
    "deep": "[" * 100_000,
    "newer": '{"schema": 2, "benchmarks": []}',
    "bytes": b"\xff\xfe\x00",
}
USELESS = {
    "value": {"accuracy": {"value": 7, "stderr": 0.1}}, "nan": {"accuracy": {"value": float("nan"), "stderr": 0.1}},
    "text": {"accuracy": {"value": "0.5"}}, "list": {"accuracy": [1]}, "items": {"items": {"1": []}},
    "more items": {"items": [1, 2]}, "name": {"benchmark": 3}, "huge": {"accuracy": {"value": 10**400}},
    "rate": {"truncation_rate": "all"},
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_file_that_cannot_be_read_is_named_and_the_rest_is_shown(tmp_path, name):
    """Goes red if a torn or foreign file ends the report, or goes by in silence."""
    run = scored(tmp_path / "run", MATH)
    bad = run.path / "evaluation" / "bad.json"
    bad.write_bytes(BAD[name] if isinstance(BAD[name], bytes) else BAD[name].encode())
    page = report([run], tmp_path / "page")
    assert any(note.startswith("evaluation/bad.json") for note in page.data["runs"][0]["notes"])
    assert len(page.data["score_tables"]["table1"]["rows"][0]["cells"]) == 3
    with pytest.raises(RequestError, match=r"--base: .*bad\.json.*psft eval"):
        read_bases([str(bad)])


@pytest.mark.parametrize("name", USELESS)
def test_a_benchmark_that_makes_no_sense_is_left_out(tmp_path, name):
    """Goes red if any JSON value ends in a traceback or is shown as a score."""
    path = write_results(tmp_path / "r.json", [{**result("amc", 0.5), **USELESS[name]}, result("aime24", 0.5)])
    text = path.read_text().replace("null", "NaN") if name == "nan" else path.read_text()
    path.write_text(text)
    found = read_evaluation(path, "r.json")
    assert [m.benchmark for m in found.measurements] == ["aime24"] and len(found.notes) == 1


def test_json_of_other_programs_is_none_of_ours(tmp_path):
    """Results of lm-evaluation-harness lie there, too. Goes red if they are called damaged."""
    for text in ('{"results": {"arc": {"acc": 0.5}}}', "[]", "3", '{"benchmarks": []}'):
        (tmp_path / "r.json").write_text(text)
        assert read_evaluation(tmp_path / "r.json", "r.json") is None
    with pytest.raises(RequestError, match="holds no results of psft eval"):
        read_bases([str(tmp_path)])
    with pytest.raises(RequestError, match="No such file"):
        read_bases([str(tmp_path / "none.json")])


def test_names_from_results_cannot_become_markup(tmp_path):
    """Goes red if a note, a model's name or a data remark is put on the page as it is."""
    bad = result("amc", 0.5)
    bad["data"]["notes"] = [MALICIOUS]
    bad["data"]["limit"] = 5
    run = scored(
        tmp_path / "run",
        [bad, {"benchmark": MALICIOUS, "accuracy": {"value": 9}}],
        model={"model_name_or_path": MALICIOUS},
    )
    base = write_results(tmp_path / "base.json", {"amc": 0.5}, model=MALICIOUS)
    page = report([run], tmp_path / "page", bases=[str(base)])
    assert MALICIOUS not in page.html and MALICIOUS in page.text
    assert len([tag for tag, _ in page.tags if tag == "script"]) == 2
