"""Laws of the run folder: whole rows only, complete JSON files only, no run written over another."""

import json
import math
import os
import stat
import subprocess
import sys
from enum import Enum
from pathlib import Path

import pytest

from psft.errors import RequestError
from psft.runs import RunFolder, describe_environment


def test_rows_come_back_in_order(tmp_path):
    """Goes red if append opens with "w"."""
    run = RunFolder(tmp_path / "new" / "run")
    for step in range(1, 4):
        run.append("metrics.jsonl", {"step": step, "nll": 1 / step})
    assert run.read_rows("metrics.jsonl") == [{"step": step, "nll": 1 / step} for step in range(1, 4)]


def test_a_missing_file_has_no_rows(tmp_path):
    """Goes red if FileNotFoundError is not caught."""
    assert RunFolder(tmp_path).read_rows("metrics.jsonl") == []


@pytest.mark.parametrize("torn", ['{"step": 2, "nl', '{"step": 2}', "\xe9".encode()[:1]])
def test_a_torn_last_row_is_left_out(tmp_path, torn):
    """Goes red if the reader parses what follows the last newline."""
    torn = torn if isinstance(torn, bytes) else torn.encode()
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n' + torn)
    assert RunFolder(tmp_path).read_rows("metrics.jsonl") == [{"step": 1}]


def test_a_row_after_a_torn_one_stands_on_its_own_line(tmp_path):
    """Goes red if append does not cut the torn end off first."""
    path = tmp_path / "metrics.jsonl"
    run = RunFolder(tmp_path)
    path.write_text('{"step": 1}\n{"step": 2, "x": "' + "y" * 100_000)
    run.append("metrics.jsonl", {"step": 2})
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
    path.write_text('{"st')
    run.append("metrics.jsonl", {"step": 1})
    assert run.read_rows("metrics.jsonl") == [{"step": 1}]


@pytest.mark.parametrize("broken", ['{"step": 2, "nl', "[1, 2]"])
def test_a_broken_row_elsewhere_is_an_error_with_its_line(tmp_path, broken):
    """Goes red if the reader skips every line it cannot parse."""
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n' + broken + '\n{"step": 3}\n')
    with pytest.raises(RequestError, match=r"metrics\.jsonl:2: "):
        RunFolder(tmp_path).read_rows("metrics.jsonl")


def test_what_is_no_number_is_written_as_null(tmp_path):
    """Goes red if json.dumps sees the values unconverted (bare NaN is no JSON)."""
    numpy = pytest.importorskip("numpy")
    run = RunFolder(tmp_path)
    row = {"a": math.nan, "b": [math.inf, -math.inf, 1.5], "c": {"d": numpy.float32("nan")}, "e": numpy.int64(3)}
    expected = {"a": None, "b": [None, None, 1.5], "c": {"d": None}, "e": 3}
    run.append("metrics.jsonl", row)
    run.write_json("summary.json", row)
    assert run.read_rows("metrics.jsonl") == [expected]
    assert run.read_json("summary.json") == expected
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text() + (tmp_path / "summary.json").read_text()


def test_paths_enums_and_sets_are_written_as_text(tmp_path):
    """Goes red if a str enum is written by its name, or a Path reaches json.dumps."""

    class Kind(str, Enum):
        GOOD = "good"

    class Level(Enum):
        HIGH = 3

    row = {"path": Path("a/b"), "kind": Kind.GOOD, "level": Level.HIGH, "set": {"b", "a"}, Kind.GOOD: True}
    RunFolder(tmp_path).write_json("run.json", row)
    expected = {"path": "a/b", "kind": "good", "level": 3, "set": ["a", "b"], "good": True}
    assert RunFolder(tmp_path).read_json("run.json") == expected


def test_a_json_file_is_complete_or_as_it_was(tmp_path, monkeypatch):
    """Goes red if write_json writes into the file itself, or leaves its temporary file behind."""
    run = RunFolder(tmp_path)
    run.write_json("summary.json", {"steps": 1})

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        run.write_json("summary.json", {"steps": 2})
    assert os.listdir(tmp_path) == ["summary.json"]
    assert json.loads((tmp_path / "summary.json").read_text()) == {"steps": 1}


def test_a_json_file_is_as_readable_as_any_other(tmp_path):
    """Goes red if the temporary file keeps its private mode."""
    written = RunFolder(tmp_path).write_json("run.json", {})
    (tmp_path / "plain").write_text("")
    assert stat.S_IMODE(written.stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)


@pytest.mark.parametrize("name", ["run.json", "metrics.jsonl"])
def test_a_folder_with_another_run_is_refused_and_left_as_it_was(tmp_path, name):
    """Goes red if either file is not looked for."""
    (tmp_path / name).write_text("former\n")
    with pytest.raises(RequestError, match="holds another run.*--overwrite_output_dir"):
        RunFolder(tmp_path).claim()
    assert [path.read_text() for path in tmp_path.iterdir()] == ["former\n"]


def test_overwriting_removes_the_former_run_and_nothing_else(tmp_path):
    """Goes red if claim removes the folder, or leaves the former metrics, checkpoints or weights."""
    kept = {"notes.txt", "data.jsonl", "checkpoint-notes"}
    for name in [
        "run.json",
        "metrics.jsonl",
        "eval.jsonl",
        "model.safetensors",
        "model-00001-of-00002.safetensors",
        *kept,
    ]:
        (tmp_path / name).write_text("x")
    (tmp_path / "checkpoint-10").mkdir()
    (tmp_path / "checkpoint-10" / "model.safetensors").write_text("x")
    RunFolder(tmp_path).claim(overwrite=True)
    assert {path.name for path in tmp_path.iterdir()} == kept


def test_overwriting_a_folder_without_a_run_removes_nothing(tmp_path):
    """Goes red if overwrite removes model files of a folder that is no run (a base model, say)."""
    (tmp_path / "model.safetensors").write_text("base")
    RunFolder(tmp_path).claim(overwrite=True)
    assert (tmp_path / "model.safetensors").read_text() == "base"


def test_claim_makes_the_folder_and_may_be_repeated_until_a_run_is_there(tmp_path):
    """Goes red if mkdir is dropped or lacks exist_ok."""
    run = RunFolder(tmp_path / "a" / "b")
    run.claim()
    run.claim()
    assert run.path.is_dir() and not any(run.path.iterdir()) and not run.holds_run()


def test_an_output_folder_that_is_a_file_is_refused(tmp_path):
    """Goes red if the check for a file is dropped (mkdir then raises FileExistsError, or worse)."""
    (tmp_path / "taken").write_text("x")
    for path in (tmp_path / "taken", tmp_path / "taken" / "inside"):
        with pytest.raises(RequestError, match="output_dir"):
            RunFolder(path).claim()
        with pytest.raises(RequestError, match="output_dir.* is a file"):
            RunFolder(path).check_writable()


def test_an_output_folder_without_permission_is_refused_and_stays_as_it_is(tmp_path):
    """Goes red if it is found out by writing, or if a folder that is still to be made is asked for its own permissions."""
    closed, open_ = tmp_path / "closed", tmp_path / "open"
    closed.mkdir(mode=0o555)
    open_.mkdir()
    RunFolder(open_ / "a" / "run").check_writable()
    assert not any(open_.iterdir())
    for path in (closed, closed / "a" / "run"):
        assert "cannot be written: no permission in" in as_nobody(tmp_path, RunFolder(path).check_writable)


def as_nobody(folder, function):
    """The message of the RequestError that `function` raises where permissions count: root may write anywhere."""
    told = folder / "told.txt"
    told.write_text("nothing was raised")
    told.chmod(0o666)
    for path in (folder, *folder.parents[:3]):
        path.chmod(path.stat().st_mode | 0o011)
    child = os.fork()
    if child == 0:
        try:
            if os.geteuid() == 0:
                os.setuid(65534)
            function()
        except BaseException as error:
            told.write_text(f"{type(error).__name__}: {error}")
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    assert told.read_text().startswith("RequestError: ")
    return told.read_text()


def test_what_has_no_encoding_is_written_as_an_escape(tmp_path):
    """A file name in Latin-1 on the command line. Goes red if a run ends in UnicodeEncodeError when it records itself."""
    run = RunFolder(tmp_path)
    run.write_json("run.json", {"command": "caf\udce9 é"})
    run.append("eval.jsonl", {"benchmark": "caf\udce9 é", "step": 1})
    run.cut_back(1)
    assert run.read_json("run.json") == {"command": "caf\udce9 é"}
    assert run.read_rows("eval.jsonl") == [{"benchmark": "caf\udce9 é", "step": 1}]


def test_missing_and_broken_json_files_are_named(tmp_path):
    """Goes red if read_json lets FileNotFoundError or JSONDecodeError out."""
    with pytest.raises(RequestError, match=r"run\.json is missing"):
        RunFolder(tmp_path).read_json("run.json")
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(RequestError, match=r"run\.json is not valid JSON"):
        RunFolder(tmp_path).read_json("run.json")


def test_the_environment_names_versions_and_the_machine():
    """Goes red if a missing package raises, or a field is dropped."""
    described = describe_environment()
    assert described["versions"]["torch"] and described["versions"]["psft"] and "vllm" in described["versions"]
    assert described["cpu_count"] >= 1 and described["command"] == sys.argv
    assert json.dumps(described)


def test_a_secret_on_the_command_line_is_not_written_down(monkeypatch):
    """Goes red if sys.argv is passed on as it is."""
    monkeypatch.setattr(sys, "argv", ["psft", "train", "--hub_token", "hf_a", "--hub-token=hf_b", "--max_steps", "3"])
    shown = ["psft", "train", "--hub_token", "<hidden>", "--hub-token=<hidden>", "--max_steps", "3"]
    assert describe_environment()["command"] == shown


def test_the_room_loads_no_torch():
    """Goes red if a module of psft.runs imports torch, transformers or trl, or describe_environment does."""
    code = (
        "import sys, psft.runs; psft.runs.describe_environment();"
        "sys.exit(str([name for name in ('torch', 'transformers', 'trl', 'datasets') if name in sys.modules] or ''))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stderr.strip() in ("", "[]"), done.stderr
