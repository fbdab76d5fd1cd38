"""Every number a report shows is the run folder's: the page's JSON and the tables, held against the files."""

import csv
import json
import math
from pathlib import Path

import numpy as np
import pytest
from reports.made_runs import make_run
from reports.read_page import Page

from psft.reports import write_report
from psft.runs import RunFolder

FIELD_FIGURES = ("likelihood", "entropy", "gradient", "clip", "reinforcement", "preference")


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """A run of 400 steps, longer than its lines have points, and its report."""
    root = tmp_path_factory.mktemp("one")
    folder = make_run(root / "run", num_steps=2600)
    written = write_report([folder.path], root / "report", images=False)
    return folder, Page(written.page).data, root / "report"


def lines_of(figure):
    return [(chart, line) for chart in figure["charts"] for line in chart["lines"]]


def truth(folder: RunFolder, line) -> dict[float, float | None]:
    """x -> y as the files say, for a line whose source is a field of metrics.jsonl or a metric of eval.jsonl."""
    file, _, what = line["source"].partition(": ")
    if file == "metrics.jsonl":
        return {row["step"]: row.get(what) for row in folder.read_rows(file)}
    metric, _, name = what.partition(" of ")
    if file == "probe.jsonl":
        return {row["step"]: row[metric] for row in folder.read_rows(file) if row["group"] == name}
    rows = folder.read_rows(file)
    return {row["step"]: row["value"] for row in rows if (row["metric"], row["benchmark"]) == (metric, name)}


def test_every_point_is_a_row_of_the_folder(one):
    """Goes red if a value is rounded, smoothed in place, or stands at another step."""
    folder, data, _ = one
    num_points = 0
    for name in ("likelihood", "entropy", "drift", "gradient", "in_domain", "out_of_domain", "other_scores"):
        for _, line in lines_of(data["figures"][name]):
            if "mean of" in line["source"]:
                continue
            rows = truth(folder, line)
            assert rows and len(line["x"]) >= min(len(rows), 500), line["source"]
            for x, y in zip(line["x"], line["y"], strict=True):
                assert rows[x] == y, (line["source"], x)
                num_points += 1
    assert num_points > 4000


def test_the_extremes_of_every_series_are_shown(one):
    """Goes red if thinning loses the largest or smallest of 2,600 steps, or an end."""
    folder, data, _ = one
    for name in ("entropy", "gradient", "clip"):
        for _, line in lines_of(data["figures"][name]):
            if line["source"].startswith("metrics.jsonl") and "by mini_batch" not in line["source"]:
                values = [y for y in truth(folder, line).values() if y is not None]
                assert max(values) in line["y"] and min(values) in line["y"], line["source"]
                assert line["num_points"] == len(values) == 2600 and line["x"][0] == 1 and line["x"][-1] == 2600


def test_standard_errors_are_the_rows_own(one):
    """Goes red if errors lose their place."""
    folder, data, _ = one
    ((_, line),) = [(c, x) for c, x in lines_of(data["figures"]["drift"]) if x["source"].endswith(" of all")]
    rows = [row for row in folder.read_rows("probe.jsonl") if row["group"] == "all"]
    assert line["error"] == [row["stderr"] for row in rows]


def test_the_bold_line_is_the_mean_of_the_last_steps(one):
    """Goes red if the mean looks ahead or is over another number of steps than the page says."""
    folder, data, _ = one
    line = data["figures"]["entropy"]["charts"][0]["lines"][0]
    values = [row["entropy"] for row in folder.read_rows("metrics.jsonl")]
    width = line["smooth_width"]
    assert width % 8 == 0
    for x, y in zip(line["smooth_x"], line["smooth_y"], strict=True):
        assert y == pytest.approx(np.mean(values[max(0, x - width) : x]), rel=1e-12)


def test_clip_by_mini_batch_is_weighted_by_tokens(one):
    """Goes red if steps count alike, or positions are shifted."""
    folder, data, _ = one
    ((_, line),) = [(c, x) for c, x in lines_of(data["figures"]["clip"]) if "by mini_batch" in x["source"]]
    rows = folder.read_rows("metrics.jsonl")
    for x, y in zip(line["x"], line["y"], strict=True):
        here = [row for row in rows if row["mini_batch"] == x]
        clipped = sum(row["clip_fraction"] * row["tokens"] for row in here)
        assert y == pytest.approx(clipped / sum(row["tokens"] for row in here), rel=1e-12)
    assert line["x"] == list(range(1, 9)) and line["y"][0] == 0


def test_log_ratio_shares_are_the_summed_histograms(one):
    """Goes red if first mini-batches, where every ratio is 1, count."""
    folder, data, _ = one
    ((_, line),) = lines_of(data["figures"]["log_ratios"])
    counts = np.sum(
        [row["log_ratio_histogram"] for row in folder.read_rows("metrics.jsonl") if row["mini_batch"] > 1], 0
    )
    assert line["y"] == pytest.approx((counts / counts.sum()).tolist(), rel=1e-12)


def test_scores_stand_against_the_entropy_of_their_window(one):
    """Goes red if the entropy is that of one mini-batch, or of the window after the evaluation."""
    folder, data, _ = one
    rows = folder.read_rows("metrics.jsonl")
    charts = [chart for chart in data["figures"]["score_entropy"]["charts"] if chart["title"].startswith("AIME24")]
    (line,) = charts[0]["lines"]
    assert len(line["x"]) == 5
    for x, y, note in zip(line["x"], line["y"], line["notes"], strict=True):
        step = int(note.removeprefix("step "))
        window = [r["entropy"] for r in rows if (r["step"] <= 8 if step == 0 else step - 8 < r["step"] <= step)]
        assert x == pytest.approx(np.mean(window), rel=1e-12)
        assert y in [
            r["value"] for r in folder.read_rows("eval.jsonl") if (r["step"], r["benchmark"]) == (step, "aime24")
        ]


def test_the_mean_score_is_the_mean_of_its_benchmarks(one):
    """Goes red if a benchmark is left out, or errors add up linearly."""
    folder, data, _ = one
    chart = data["figures"]["in_domain"]["charts"][0]
    assert chart["title"] == "Mean in-domain score (2 benchmarks)"
    (line,) = chart["lines"]
    for step, y, error in zip(line["x"], line["y"], line["error"], strict=True):
        rows = [
            r for r in folder.read_rows("eval.jsonl") if r["step"] == step and r["benchmark"] in ("aime24", "MATH-500")
        ]
        assert y == pytest.approx(np.mean([r["value"] for r in rows]), rel=1e-12)
        assert error == pytest.approx(math.hypot(*(r["stderr"] for r in rows)) / 2, rel=1e-12)


def test_alignment_tax_holds_the_first_and_the_last_value(one):
    """Goes red if `before training` and `after` are swapped."""
    folder, data, _ = one
    chart = data["figures"]["alignment_tax"]["charts"][0]
    rows = {(r["benchmark"], r["step"]): r for r in folder.read_rows("eval.jsonl")}
    names = ["gsm8k_cot", "mmlu_flan", "truthfulqa_mc1", "cmmlu", "gpqa_cot"]
    for line, step in zip(chart["lines"], (0, 2600), strict=True):
        assert line["y"] == [rows[name, step]["value"] for name in names]
        assert line["error"] == [rows[name, step]["stderr"] for name in names]


def test_a_score_before_training_alone_is_no_result(tmp_path):
    """Goes red if the untrained model's score is drawn as the run's."""
    folder = make_run(tmp_path / "run", num_steps=8, parts=("tax",))
    rows = [row for row in folder.read_rows("eval.jsonl") if row["step"] == 0]
    (folder.path / "eval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = Page(write_report([folder.path], tmp_path / "out", images=False).page).data
    lines = data["figures"]["alignment_tax"]["charts"][0]["lines"]
    assert [line["label"] for line in lines] == ["before training"]


def test_clipped_tokens_are_the_most_clipped_of_the_file(one):
    """Goes red if tokens are sorted by how often they were seen, or their counts are mixed up."""
    import pyarrow.parquet

    folder, data, _ = one
    rows = pyarrow.parquet.read_table(folder.path / "clipped_tokens.parquet").to_pylist()
    clouds = data["figures"]["clipped_tokens"]["clouds"]
    assert [cloud["epoch"] for cloud in clouds] == [1, 2, 3, 4]
    for cloud in clouds:
        here = [row for row in rows if row["epoch"] == cloud["epoch"]]
        assert cloud["clipped"] == sum(row["clipped"] for row in here)
        assert cloud["tokens"] == sorted((r for r in here if r["clipped"]), key=lambda row: -row["clipped"])


def test_numbers_of_the_verdict_are_the_folders(one):
    """Goes red if first, best or last of held-out NLL or the drift is another row's."""
    folder, data, _ = one
    found = data["runs"][0]["findings"]
    nll = {r["step"]: r["value"] for r in folder.read_rows("eval.jsonl") if r["metric"] == "nll"}
    assert [found["learned"]["values"][key] for key in ("first", "best", "last")] == [
        nll[0], min(nll.values()), nll[2600],
    ]  # fmt: skip
    last = [r for r in folder.read_rows("probe.jsonl") if r["group"] == "all"][-1]
    assert found["forgot"]["values"]["drift"] == last["drift_nats_per_token"]
    rows = [r for r in folder.read_rows("metrics.jsonl") if r["mini_batch"] > 1]
    share = sum(r["clip_fraction"] * r["tokens"] for r in rows) / sum(r["tokens"] for r in rows)
    assert found["clip"]["values"]["share"] == pytest.approx(share, rel=1e-12)


def test_settings_are_those_of_run_json(one):
    folder, data, _ = one
    config = json.loads((folder.path / "run.json").read_text())["config"]
    shown = data["settings"]["common"]
    assert shown["config.learning_rate"] == repr(config["learning_rate"]) and shown["objective.name"] == "psft"
    assert set(f"config.{name}" for name in config) <= set(shown)
    assert (
        data["data"]["common"]["train.num_used"] == "158" and data["environment"]["common"]["git.commit"] == "abc1234"
    )


def test_tables_hold_every_row_at_full_resolution(one):
    """Goes red if the thinned lines are written, or a float loses digits on its way into the file."""
    folder, _, out = one
    with open(out / "tables" / "metrics" / "run.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    expected = folder.read_rows("metrics.jsonl")
    assert len(rows) == len(expected)
    for row, whole in zip(rows, expected, strict=True):
        for name in ("step", "entropy", "grad_norm", "learning_rate", "clip_fraction"):
            assert float(row[name]) == whole[name]
        assert int(row["log_ratio_histogram_14"]) == whole["log_ratio_histogram"][14] and row["stage"] == "train"
    for name in ("eval", "probe"):
        with open(out / "tables" / f"{name}.csv", newline="") as file:
            assert len(list(csv.DictReader(file))) == len(folder.read_rows(f"{name}.jsonl"))
    with open(out / "tables" / "clipped_tokens" / "run.csv", newline="") as file:
        tokens = list(csv.DictReader(file))
    assert (
        len(tokens) == 36 and "\u6570" in {row["token"] for row in tokens} and tokens[0]["contexts_1"].startswith("<b>")
    )


def test_seeds_are_one_line_with_the_band_from_smallest_to_largest(tmp_path):
    """Goes red if the band is a standard error, runs of another setting join it, or a shorter run ends the line."""
    folders = [make_run(tmp_path / f"s{i}", num_steps=48 if i else 40, seed=i) for i in range(3)]
    other = make_run(tmp_path / "other", objective="sft")
    data = Page(write_report([f.path for f in folders] + [other.path], tmp_path / "out", images=False).page).data
    assert [group["runs"] for group in data["groups"]] == [["s0", "s1", "s2"], ["other"]]
    band, plain = data["figures"]["entropy"]["charts"][0]["lines"]
    values = {}
    for folder in folders:
        for row in folder.read_rows("metrics.jsonl"):
            values.setdefault(row["step"], []).append(row["entropy"])
    assert band["runs"] == ["s0", "s1", "s2"] and band["x"] == sorted(values) and "low" not in plain
    for x, y, low, high in zip(band["x"], band["y"], band["low"], band["high"], strict=True):
        assert (low, high) == (min(values[x]), max(values[x])) and y == pytest.approx(np.mean(values[x]), rel=1e-12)


def test_later_stages_are_shown_from_their_own_numbers(tmp_path):
    """Goes red if a reward is drawn under another's name, or runs without rewards join the figure."""
    rl = make_run(
        tmp_path / "rl", parts=(), change=lambda r: {**r, "reward_mean": r["step"] / 100, "kept_group_share": 0.5}
    )
    rewards = {"rewards_chosen": 0.25, "rewards_rejected": -0.5, "rewards_margin": 0.75, "rewards_accuracy": 1}
    dpo = make_run(tmp_path / "dpo", parts=(), num_train_rows=2, change=lambda r: {**r, **rewards})
    sft = make_run(tmp_path / "sft", parts=(), num_train_rows=3)
    data = Page(write_report([rl.path, dpo.path, sft.path], tmp_path / "out", images=False).page).data
    for name, label, field in (("reinforcement", "rl", "reward_mean"), ("preference", "dpo", "rewards_margin")):
        lines = {line["source"]: line for _, line in lines_of(data["figures"][name])}
        assert {line["label"] for line in lines.values()} == {label}
        folder = RunFolder(Path(tmp_path / label))
        line = lines[f"metrics.jsonl: {field}"]
        assert line["y"] == [row[field] for row in folder.read_rows("metrics.jsonl")]


def made_stage(path, stage, model, num_steps=48):
    """A run of a later stage, begun from `model`."""
    command = ["psft", stage, "recipe", "--output_dir", str(path)]
    named = {"model_name_or_path": str(model)}
    return make_run(path, parts=(), num_steps=num_steps, command=command, model=named, num_train_rows=num_steps)


def test_stages_of_a_model_stand_one_after_the_other(tmp_path):
    """Goes red if a stage begins at 0, or at the end of a run it took an earlier checkpoint of."""
    first = make_run(tmp_path / "psft", parts=(), model={"model_name_or_path": "some/base"})
    second = made_stage(tmp_path / "dpo", "dpo", tmp_path / "psft" / "checkpoint-40", num_steps=10)
    third = made_stage(tmp_path / "grpo", "grpo", tmp_path / "dpo", num_steps=6)
    alone = make_run(tmp_path / "alone", objective="sft", parts=())
    paths = [run.path for run in (third, alone, first, second)]
    figure = Page(write_report(paths, tmp_path / "out", images=False).page).data["figures"]["stages"]
    lines = {line["label"]: line for _, line in lines_of(figure)}
    assert set(lines) == {"psft", "dpo", "grpo"}
    for name, folder, before in (("psft", first, 0), ("dpo", second, 40), ("grpo", third, 50)):
        rows = folder.read_rows("metrics.jsonl")
        assert lines[name]["x"] == [before + row["step"] for row in rows]
        assert lines[name]["y"] == [row["entropy"] for row in rows]


def test_a_stage_without_its_beginning_says_what_to_report_on(tmp_path):
    """Goes red if the figure is left out without a word, or a first stage is asked for another."""
    later = made_stage(tmp_path / "grpo", "grpo", tmp_path / "psft")
    missing = Page(write_report([later.path], tmp_path / "out", images=False).page).data["figures"]["stages"]["missing"]
    assert missing["command"] == f"psft report {tmp_path / 'psft'} {later.path}"
    only = Page(write_report([make_run(tmp_path / "psft").path], tmp_path / "other", images=False).page).data
    assert "stages" not in only["figures"]


def test_runs_that_name_each_other_as_their_beginning_do_not_hang(tmp_path):
    a = made_stage(tmp_path / "a", "dpo", tmp_path / "b")
    b = made_stage(tmp_path / "b", "dpo", tmp_path / "a")
    assert "stages" in Page(write_report([a.path, b.path], tmp_path / "out", images=False).page).data["figures"]


def test_a_sweep_is_of_runs_that_differ_in_epsilon_alone(tmp_path):
    """Goes red if null in run.json is not read as no clipping, or another difference passes."""
    paths = []
    for name, epsilon, extra in (
        ("a", 0.1, {}),
        ("b", math.inf, {}),
        ("c", 0.28, {}),
        ("d", 0.2, {"num_train_rows": 7}),
    ):
        paths.append(make_run(tmp_path / name, epsilon=epsilon, parts=("heldout",), **extra).path)
    data = Page(write_report(paths, tmp_path / "out", images=False).page).data
    entropy, norms, last = data["figures"]["epsilon_sweep"]["charts"]
    labels = ["epsilon_high = 0.1", "epsilon_high = 0.28", "epsilon_high = no clipping"]
    assert [line["label"] for line in entropy["lines"]] == [line["label"] for line in norms["lines"]] == labels
    ends = {
        p.name: [r for r in RunFolder(p).read_rows("eval.jsonl") if r["metric"] == "nll"][-1]["value"] for p in paths
    }
    assert last["categories"] == ["0.1", "0.28", "no clipping"]
    assert last["lines"][0]["y"] == [ends["a"], ends["c"], ends["b"]]
