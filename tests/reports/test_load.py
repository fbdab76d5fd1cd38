"""Run folders of every state are read: finished, going on, crashed, torn, damaged, empty; and found by their paths."""

import datetime
import json
import os

import numpy as np
import pytest
from reports.made_runs import make_run

from psft.errors import RequestError
from psft.reports.load import find_runs, labels, load_run
from psft.runs import RunFolder


def load(path):
    return load_run(RunFolder(path), "run")


def test_a_whole_run_is_there_to_the_bit(tmp_path):
    """Goes red if a column is rounded or shifted, or warm-up rows are taken for training."""
    folder = make_run(tmp_path, change=lambda row: {**row, "stage": "warmup" if row["step"] <= 8 else "train"})
    run, rows = load(tmp_path), folder.read_rows("metrics.jsonl")
    for name in ("step", "entropy", "nll", "clip_fraction", "grad_norm", "tokens"):
        assert run.column(name).tolist() == [row[name] for row in rows], name
    assert run.is_warmup.tolist() == [row["step"] <= 8 for row in rows]
    assert run.evals == folder.read_rows("eval.jsonl") and run.probes == folder.read_rows("probe.jsonl")
    counts = [row["log_ratio_histogram"] for row in rows if row["mini_batch"] > 1 and row["step"] > 8]
    assert run.log_ratio_counts.tolist() == np.sum(counts, axis=0).tolist()
    assert run.exit_reason == "finished" and run.is_over and run.notes == []


def test_an_empty_folder_is_a_run_of_no_steps(tmp_path):
    """Goes red if a missing file raises."""
    run = load(tmp_path)
    assert run.num_steps == 0 and run.exit_reason == "nothing recorded yet" and not run.is_over
    assert np.isnan(run.column("nll")).all() and "run.json is missing" in run.notes[0]


def test_a_run_that_wrote_run_json_alone_has_not_ended(tmp_path):
    make_run(tmp_path, num_steps=0, parts=())
    run = load(tmp_path)
    assert run.num_steps == 0 and run.exit_reason.startswith("not ended")


def test_a_killed_run_keeps_its_whole_rows(tmp_path):
    """Goes red if a torn end spoils the file, or a run without summary.json counts as ended."""
    make_run(tmp_path, parts=("heldout",))
    for name in ("metrics.jsonl", "eval.jsonl"):
        path = tmp_path / name
        path.write_bytes(path.read_bytes()[:-20])
    run = load(tmp_path)
    assert run.num_steps == 47 and not run.is_over and len(run.evals) == 9
    assert sum("half a row" in note for note in run.notes) == 2


def test_damage_is_named_and_the_rest_is_read(tmp_path):
    """Goes red if one broken file makes the run unreadable."""
    make_run(tmp_path)
    lines = (tmp_path / "metrics.jsonl").read_bytes().split(b"\n")
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join([*lines[:3], b'{"step": 4, "nll": 0.', *lines[4:]]))
    (tmp_path / "run.json").write_text('{"config": ')
    (tmp_path / "clipped_tokens.parquet").write_bytes(b"PAR1")
    run = load(tmp_path)
    assert run.num_steps == 47 and run.config == {} and run.clipped == []
    told = "\n".join(run.notes)
    assert "metrics.jsonl:4: " in told and "run.json is not valid JSON" in told and "clipped_tokens.parquet" in told


def test_rows_that_stand_there_twice_or_make_no_sense_count_once_or_not(tmp_path):
    """Goes red if a repeated step is drawn twice, or a value that is no number reaches a figure."""
    folder = make_run(tmp_path, parts=("heldout",))
    folder.append("metrics.jsonl", {"step": 48, "nll": 9.5})
    folder.append("metrics.jsonl", {"nll": 9.5})
    folder.append("eval.jsonl", {"step": 48, "benchmark": "heldout", "metric": "nll", "k": None, "value": 0.25})
    folder.append("eval.jsonl", {"step": "late", "benchmark": "heldout", "metric": "nll", "value": 1.0})
    folder.append("eval.jsonl", {"step": 48, "benchmark": "x", "metric": "accuracy", "value": "high"})
    (tmp_path / "probe.jsonl").write_text('{"step": 0, "group": "all", "drift_nats_per_token": 1e999}\n')
    run = load(tmp_path)
    assert run.num_steps == 48 and run.column("nll")[-1] == 9.5 and run.probes == []
    assert [row["value"] for row in run.evals if row["metric"] == "nll"][-1] == 0.25 and len(run.evals) == 10
    assert len(run.notes) == 4


def test_a_summary_of_before_the_last_resume_says_nothing(tmp_path):
    """Goes red if a run that was taken up again counts as ended while it goes on."""
    make_run(tmp_path)
    info = json.loads((tmp_path / "run.json").read_text())
    later = datetime.datetime.now(datetime.timezone.utc) + datetime.timedelta(minutes=1)
    info["resumed"] = [{"step": 40, "at": later.isoformat()}]
    (tmp_path / "run.json").write_text(json.dumps(info))
    assert not load(tmp_path).is_over
    stat = later.timestamp() + 60
    os.utime(tmp_path / "summary.json", (stat, stat))
    assert load(tmp_path).exit_reason == "finished"
    (tmp_path / "summary.json").write_text('{"exit_reason": "interrupted", "steps": 40}')
    os.utime(tmp_path / "summary.json", (stat, stat))
    assert not load(tmp_path).is_over  # metrics go beyond it


def test_alerts_are_those_of_run_json_and_of_the_rows(tmp_path):
    """Goes red if the replay feeds evaluations after all steps, or if run.json's alerts are dropped."""
    folder = make_run(
        tmp_path,
        parts=(),
        change=lambda row: {**row, "clip_fraction": 0.001, "nll": 2 - row["step"] / 48},
        alerts=[{"step": 5, "name": "of_the_run", "message": "said while it went on"}],
    )
    for step, value in ((0, 1.0), (16, 0.8), (32, 0.9), (48, 1.0)):
        folder.append("eval.jsonl", {"step": step, "benchmark": "h", "metric": "nll", "k": None, "value": value})
    alerts = {alert.name: alert for alert in load(tmp_path).alerts}
    assert set(alerts) == {"of_the_run", "clip_inactive", "overfitting"}
    assert (
        alerts["clip_inactive"].step == 24
        and alerts["overfitting"].step == 48
        and "step 16" in alerts["overfitting"].message
    )
    assert alerts["of_the_run"].message == "said while it went on"


def test_nulls_are_no_reason_to_stop_the_replay(tmp_path):
    """Goes red if a null mini_batch or epoch reaches a comparison with a number."""
    nulls = (
        "mini_batch",
        "num_mini_batches",
        "epoch",
        "grad_norm",
        "clip_fraction",
        "entropy",
        "nll",
        "tokens",
        "stage",
    )
    make_run(tmp_path, change=lambda row: {**row, nulls[row["step"] % len(nulls)]: None})
    assert load(tmp_path).num_steps == 48


def test_a_path_is_a_run_or_a_folder_of_runs(tmp_path):
    """Goes red if runs inside a folder come in the order of the disk, or a run that is named twice counts twice."""
    for name in ("b", "a", "c/deep"):
        make_run(tmp_path / name, num_steps=0, parts=())
    assert find_runs([str(tmp_path)]) == [tmp_path / "a", tmp_path / "b"]
    assert find_runs([str(tmp_path / "b"), str(tmp_path / "c" / ".." / "b")]) == [tmp_path / "b"]


def test_what_is_no_run_is_named_all_together(tmp_path):
    """Goes red if the first problem hides the others."""
    (tmp_path / "file").write_text("")
    (tmp_path / "hollow").mkdir()
    with pytest.raises(RequestError) as caught:
        find_runs([str(tmp_path / "gone"), str(tmp_path / "file"), str(tmp_path / "hollow")])
    message = str(caught.value)
    assert "there is no folder" in message and "is a file" in message and "holds no run" in message
    assert "output_dir" in message


def test_labels_tell_runs_apart(tmp_path):
    """Goes red if two runs of one folder name get one label."""
    assert labels([tmp_path / "x" / "s0", tmp_path / "y" / "s0"]) == ["x/s0", "y/s0"]
    assert labels([tmp_path / "x" / "s0", tmp_path / "x" / "s1"]) == ["s0", "s1"]
