"""`psft report` as a person types it: where the page goes, errors in words, and watching a run to its end."""

import glob
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from reports.made_results import write_results
from reports.made_runs import make_run
from reports.read_page import Page

from psft.cli import report as command
from psft.cli.main import main
from psft.reports import write_report
from psft.runs import RunFolder

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def no_images(monkeypatch):
    """Image files take seconds and have tests of their own."""
    monkeypatch.setattr("psft.reports.write.has_matplotlib", lambda: False)


def test_one_run_has_its_report_inside_it(tmp_path, capsys):
    """Goes red if the default folder moves, or the path of the page is not the last line."""
    make_run(tmp_path / "run")
    assert main(["report", str(tmp_path / "run")]) == 0
    page = tmp_path / "run" / "report" / "index.html"
    assert page.exists() and capsys.readouterr().out.strip() == str(page)


def test_several_runs_have_it_where_the_command_stands(tmp_path, monkeypatch, capsys):
    for name in ("a", "b"):
        make_run(tmp_path / name, num_steps=4, parts=())
    monkeypatch.chdir(tmp_path)
    assert main(["report", "a", "b"]) == 0
    assert [run["label"] for run in Page(tmp_path / "report" / "index.html").data["runs"]] == ["a", "b"]


def test_a_report_inside_a_folder_of_runs_is_no_run(tmp_path):
    """Goes red if a second report of the folder takes the first for a run."""
    make_run(tmp_path / "runs" / "a", num_steps=4, parts=())
    for _ in range(2):
        assert main(["report", str(tmp_path / "runs"), f"--out={tmp_path / 'runs' / 'report'}"]) == 0
    assert len(Page(tmp_path / "runs" / "report" / "index.html").data["runs"]) == 1


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["report", "nowhere"], "there is no folder nowhere"),
        (["report", "empty"], "empty holds no run"),
        (["report", "run", "--ot", "x"], "unknown option --ot"),
        (["report", "run", "--out"], "--out needs a value"),
        (["report", "run", "--every", "5"], "--every has no effect without --watch"),
        (["report", "run", "--base"], "--base needs a value, e.g. --base evals/MODEL"),
        (["report", "run", "--watch", "--every", "soon"], "--every soon must be a number of seconds"),
        (["report", "--watch"], "no run was named"),
        (["report", "run", "--out", "run/run.json"], "cannot be written"),
    ],
)
def test_a_wrong_request_is_told_in_one_line(tmp_path, monkeypatch, capsys, argv, words):
    """Goes red if an error is a traceback or says nothing of what to do."""
    make_run(tmp_path / "run", num_steps=1, parts=())
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert error.startswith("psft report: error: ") and words in error and error.count("\n") == 1


def test_help_names_every_option(capsys):
    assert main(["report", "--help"]) == 0
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("--base", "--out", "--watch", "--every", "RUN/report"))
    page = (ROOT / "docs" / "report.md").read_text(encoding="utf-8")
    assert all(word in page for word in ("--base", "--out", "--watch", "--every", "RUN/report"))


def test_the_documented_commands_are_what_the_command_takes(tmp_path, monkeypatch, capsys):
    """Goes red if a documented option is refused."""
    text = "".join((ROOT / name).read_text(encoding="utf-8") for name in ("docs/report.md", "README.md"))
    commands = re.findall(r"^    (?:\.venv/bin/)?psft report (.*?)(?:\s+#.*)?$", text, re.MULTILINE)
    assert len(commands) >= 5
    for name in ("quickstart", "sft", "psft-seed1", "psft-seed2", "watched"):
        make_run(tmp_path / "runs" / name, num_steps=2, parts=("summary",))
    write_results(tmp_path / "evals" / "BASE" / "base.math.json", {"amc": 0.5})
    monkeypatch.chdir(tmp_path)
    for arguments in commands:
        words = [path for word in arguments.split() for path in (glob.glob(word) if "*" in word else [word])]
        assert main(["report", *words]) == 0, arguments
        assert Path(capsys.readouterr().out.split(":")[0].strip()).exists()


def test_watching_follows_a_run_to_its_end(tmp_path, monkeypatch, capsys):
    """Goes red if the page is written once, if the last one still reloads, or if the end is not noticed."""
    folder = make_run(tmp_path / "run", num_steps=8, parts=())
    pages = []

    def sleep(seconds):
        assert seconds == 2
        pages.append(Page(tmp_path / "out" / "index.html").data)
        folder.append("metrics.jsonl", {"step": 9 + len(pages), "nll": 1.0, "entropy": 1.0})
        if len(pages) == 3:
            folder.write_json("summary.json", {"exit_reason": "finished", "steps": 9 + len(pages)})

    monkeypatch.setattr(command.time, "sleep", sleep)
    assert main(["report", str(folder.path), "--out", str(tmp_path / "out"), "--watch", "--every", "2"]) == 0
    assert [page["runs"][0]["num_steps"] for page in pages] == [8, 9, 10]
    assert all(page["refresh_s"] == 2 for page in pages)
    assert Page(tmp_path / "out" / "index.html").data["refresh_s"] is None
    assert "complete" in capsys.readouterr().out and (tmp_path / "out" / "tables" / "runs.csv").exists()


def test_watching_waits_for_a_run_that_has_not_begun(tmp_path, monkeypatch, capsys):
    """Goes red if a folder that is not there yet is an error, or is waited for in silence or at length."""
    sleeps = []

    def sleep(seconds):
        sleeps.append(seconds)
        if len(sleeps) == 2:
            make_run(tmp_path / "run", num_steps=2, parts=("summary",))

    monkeypatch.setattr(command.time, "sleep", sleep)
    assert main(["report", str(tmp_path / "run"), "--watch"]) == 0
    assert sleeps == [command.EVERY_S] * 2 and capsys.readouterr().err.count("waiting: ") == 1


def test_a_reader_never_sees_half_a_page(tmp_path):
    """Goes red if the file is opened for writing in place: a browser reloads while it is being written."""
    folder = make_run(tmp_path / "run", num_steps=8, parts=())
    page, is_over, seen = tmp_path / "out" / "index.html", threading.Event(), []
    write_report([folder.path], page.parent, images=False)

    def read():
        while not is_over.is_set():
            seen.append(page.read_text(encoding="utf-8").rstrip().endswith("</html>"))

    reader = threading.Thread(target=read)
    reader.start()
    try:
        for _ in range(5):
            write_report([folder.path], page.parent, images=False)
    finally:
        is_over.set()
        reader.join()
    assert len(seen) > 20 and all(seen)


def test_ctrl_c_ends_the_watch_and_leaves_the_page(tmp_path):
    """A process of its own, stopped by SIGINT. Goes red if the interrupt is a traceback or removes the page."""
    folder = make_run(tmp_path / "run", num_steps=2, parts=())
    words = [sys.executable, "-m", "psft.cli.main", "report", str(folder.path), "--watch", "--every", "60"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    process = subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # a shell's "&" has it ignored
    )  # fmt: skip
    assert process.stdout is not None and process.stderr is not None
    assert "at step 2" in process.stdout.readline()
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 0
    assert process.stderr.read().strip() == "stopped watching; the page stays as it was last written."
    assert Page(folder.path / "report" / "index.html").data["runs"][0]["num_steps"] == 2


def test_a_run_of_the_trainer_is_reported(make_trainer, tmp_path):
    """A real run, not a made one. Goes red if the trainer's field names and the report's part ways."""
    import torch
    from datasets import Dataset

    torch.manual_seed(0)
    rows = [{"input_ids": list(range(3, 12 + i)), "labels": list(range(3, 12 + i))} for i in range(6)]
    trainer = make_trainer(
        eval_dataset={"held": Dataset.from_list(rows)}, eval_strategy="steps", eval_steps=4, probe_every=4
    )
    trainer.train()
    folder = RunFolder(tmp_path / "run")
    assert main(["report", str(folder.path)]) == 0
    data = Page(folder.path / "report" / "index.html").data
    (run,) = data["runs"]
    assert run["exit_reason"] == "finished" and run["num_steps"] == 8 and run["notes"] == []
    lines = {line["label"]: line for line in data["figures"]["likelihood"]["charts"][0]["lines"]}
    assert lines["training NLL"]["y"] == [row["nll"] for row in folder.read_rows("metrics.jsonl")]
    held = [row["value"] for row in folder.read_rows("eval.jsonl") if row["metric"] == "nll"]
    assert lines["held-out NLL: held"]["y"] == held and len(held) >= 2
    assert [c["title"] for c in data["figures"]["clip"]["charts"]][1] == "Clipped tokens by mini-batch of the window"
    drift = data["figures"]["drift"]["charts"][0]["lines"][0]
    probed = [row for row in folder.read_rows("probe.jsonl") if row["group"] == "all"]
    assert drift["y"] == [row["drift_nats_per_token"] for row in probed] and drift["x"] == [0, 4, 8]
    assert data["figures"]["clipped_tokens"]["clouds"] and data["figures"]["log_ratios"]["charts"]
    assert data["settings"]["common"]["config.epsilon_high"] == "0.28"
    settings = json.loads((folder.path / "run.json").read_text())["config"]
    assert {f"config.{name}" for name in settings if not isinstance(settings[name], dict)} <= set(
        data["settings"]["common"]
    )


def test_the_page_names_only_settings_there_are():
    """Every --flag in the words of the report is a setting or an option. Goes red if one is misspelt."""
    from psft.cli.arguments import collect_settings
    from psft.config import DataArguments, LaunchArguments, ModelArguments
    from psft.trainers.psft_config import PSFTConfig

    known = set(collect_settings((DataArguments, ModelArguments, PSFTConfig, LaunchArguments)))
    known |= {"out", "watch", "every", "base", "resume", "suite", "run_dir", "step"}
    sources = (ROOT / "src" / "psft" / "reports").rglob("*.py")
    named = {flag for path in sources for flag in re.findall(r"--([a-z_]{2,})", path.read_text(encoding="utf-8"))}
    assert len(named) > 5 and named - known == set()
