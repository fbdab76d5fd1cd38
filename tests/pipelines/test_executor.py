"""Which stages of a pipeline run, and what is kept when one, or `psft run` itself, is killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from psft.errors import RequestError, RunFailed
from psft.pipelines import Executor, read_pipeline

HERE = Path(__file__).parent
FAKE = (sys.executable, str(HERE / "fake_psft.py"))
PIPELINE = """
pipeline: fake
shared:
  eval: {suite: math}
stages:
  - name: psft
    command: train
    model: some/base
    settings: {dataset: DATA, max_steps: 2, learning_rate: 0.1}
  - name: scores
    command: eval
    model: ${psft.model}
  - name: grpo
    command: grpo
    model: ${psft.model}
    settings: {max_steps: 3}
  - name: report
    command: report
"""


class Fake:
    """A pipeline over fake commands in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.file, self.out, self.data = folder / "pipeline.yaml", folder / "out", folder / "data.jsonl"
        self.data.write_text("one")
        self.text = PIPELINE.replace("DATA", str(self.data))
        self.lines: list[str] = []

    def change(self, old: str, new: str) -> None:
        assert old in self.text
        self.text = self.text.replace(old, new)

    def executor(self, **options: Any) -> Executor:
        self.file.write_text(self.text)
        say: Callable[[str], None] = self.lines.append
        return Executor(read_pipeline(str(self.file)), self.out, program=FAKE, say=say, **options)

    def run(self, **options: Any) -> int:
        return self.executor(**options).run()

    def actions(self, **options: Any) -> dict[str, str]:
        return {decision.stage.name: decision.action for decision in self.executor(**options).decide()}

    def calls(self) -> list[str]:
        path = self.out / "calls.jsonl"
        return [json.loads(line)[0] for line in path.read_text().splitlines()] if path.exists() else []

    def state(self, stage: str) -> dict[str, Any]:
        return dict(json.loads((self.out / "pipeline.json").read_text())["stages"][stage])

    def steps(self, stage: str) -> list[int]:
        path = self.out / stage / "metrics.jsonl"
        return [json.loads(line)["step"] for line in path.read_text().splitlines()] if path.exists() else []


@pytest.fixture
def fake(tmp_path: Path) -> Fake:
    return Fake(tmp_path)


def test_stages_run_in_order_and_are_skipped_when_they_are_done(fake: Fake) -> None:
    """Goes red if a stage that is done runs again, or a reference leads to another folder than its stage's."""
    assert fake.run() == 0
    assert fake.calls() == ["train", "eval", "grpo", "report"]
    assert (fake.out / "grpo" / "model.safetensors").read_text() == "<psft 0.1<grpo None"
    assert json.loads((fake.out / "psft" / "evaluation" / "scores" / "model.math.json").read_text())["k"] is None
    assert (fake.out / "report" / "index.html").read_text() == f"{fake.out / 'psft'} {fake.out / 'grpo'}"
    assert fake.state("grpo")["status"] == "done" and fake.state("grpo")["attempts"] == 1
    assert "fake train begins" in (fake.out / "psft" / "stage.log").read_text()
    assert fake.run() == 0
    assert fake.calls() == ["train", "eval", "grpo", "report"]
    assert set(fake.actions().values()) == {"skip"}


def test_what_changes_no_result_repeats_nothing(fake: Fake) -> None:
    """Goes red if the number of processes, the file's name or a comment makes another key."""
    assert fake.run() == 0
    fake.change("max_steps: 2,", "max_steps: 2, num_processes: 8,  ")
    moved = fake.data.with_name("moved.jsonl")
    moved.write_text("one")
    fake.change(str(fake.data), str(moved))
    assert set(fake.actions().values()) == {"skip"}


def test_a_changed_setting_is_refused_until_it_is_asked_for_and_nothing_is_lost(fake: Fake) -> None:
    """Goes red if a finished folder is written over, if what follows is not made again, or the old and new values are
    not said."""
    assert fake.run() == 0
    fake.change("learning_rate: 0.1", "learning_rate: 0.2")
    with pytest.raises(
        RequestError, match=r"psft: it is done, and has changed since: learning_rate: .*0\.1.* -> .*0\.2"
    ):
        fake.run()
    assert fake.calls() == ["train", "eval", "grpo", "report"]
    assert fake.run(redo=["psft"]) == 0
    assert fake.calls()[4:] == ["train", "eval", "grpo", "report"]
    assert (fake.out / "grpo" / "model.safetensors").read_text() == "<psft 0.2<grpo None"
    assert (fake.out / "aside" / "psft-1" / "model.safetensors").read_text() == "<psft 0.1"
    scores = fake.out / "aside" / "psft-1" / "evaluation" / "scores" / "model.math.json"
    assert json.loads(scores.read_text())["model"] == "<psft 0.1"
    assert set(fake.actions().values()) == {"skip"}


def test_changed_data_are_seen_by_content(fake: Fake) -> None:
    """Goes red if data are known by name, size or date."""
    assert fake.run() == 0
    status = fake.data.stat()
    fake.data.write_text("two")
    os.utime(fake.data, ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(RequestError, match=f"content of {fake.data} has changed"):
        fake.run()
    assert fake.run(redo=["changed"]) == 0
    assert fake.calls()[4:] == ["train", "eval", "grpo", "report"]


def test_an_evaluation_that_changed_is_made_again_by_itself_and_training_stays(fake: Fake) -> None:
    """Goes red if an evaluation's change reaches a training stage, or its old results are lost."""
    assert fake.run() == 0
    fake.change("suite: math", "suite: math, k: 4")
    assert fake.actions() == {"psft": "skip", "scores": "redo", "grpo": "skip", "report": "skip"}
    assert fake.run() == 0
    assert fake.calls()[4:] == ["eval"]
    assert json.loads((fake.out / "aside" / "scores-1" / "model.math.json").read_text())["k"] is None


def test_the_best_checkpoint_is_what_later_stages_start_from(fake: Fake) -> None:
    """Goes red if `model` is the last step's although `best` leads elsewhere."""
    fake.change("learning_rate: 0.1", "learning_rate: 0.1, best: 1")
    fake.change("    model: ${psft.model}\n    settings", "    model: ${psft.last}\n    settings")
    assert fake.run() == 0
    calls = [json.loads(line) for line in (fake.out / "calls.jsonl").read_text().splitlines()]
    assert calls[1][1] == str(fake.out / "psft" / "checkpoint-1")
    assert f"--output_dir={fake.out / 'psft' / 'evaluation' / 'scores'}" in calls[1]
    assert f"--model_name_or_path={fake.out / 'psft'}" in calls[2]


@pytest.mark.parametrize("how", ["fail: 7", "kill: true"])
def test_a_stage_that_fails_leaves_the_ones_before_and_goes_on(
    fake: Fake, how: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Goes red if the exit code is lost, the log is not named, or stages before or the steps done are repeated."""
    fake.change("{max_steps: 3}", f"{{max_steps: 3, {how}}}")
    assert fake.run() == (7 if how == "fail: 7" else 1)
    told = capsys.readouterr().err
    assert str(fake.out / "grpo" / "stage.log") in told and "the same command goes on" in told
    assert ("it went wrong: out of luck" in told) if how == "fail: 7" else ("runs out of memory" in told)
    assert fake.state("grpo")["status"] == "failed" and fake.steps("grpo") == [1]
    fake.change(f", {how}", "")
    assert fake.actions() == {"psft": "skip", "scores": "skip", "grpo": "go on", "report": "run"}
    assert fake.run() == 0
    assert fake.calls() == ["train", "eval", "grpo", "grpo", "report"]
    assert fake.steps("grpo") == [1, 2, 3] and fake.state("grpo")["attempts"] == 2


def _wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.01)


def _start(fake: Fake) -> subprocess.Popen[bytes]:
    fake.file.write_text(fake.text)
    return subprocess.Popen([sys.executable, str(HERE / "run_fake.py"), str(fake.file), str(fake.out)])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_goes_to_the_stage_which_goes_on_with_the_next_command(fake: Fake, number: int) -> None:
    """Goes red if the signal ends `psft run` alone, if the exit code is another, or done stages run again."""
    fake.change("{max_steps: 3}", "{max_steps: 1000}")
    process = _start(fake)
    _wait_for(lambda: len(fake.steps("grpo")) >= 2)
    process.send_signal(number)
    assert process.wait(timeout=60) == 128 + number
    reached = len(fake.steps("grpo"))
    assert fake.state("grpo")["status"] == "stopped" and 2 <= reached < 1000
    fake.change("{max_steps: 1000}", f"{{max_steps: {reached + 1}}}")
    assert fake.run() == 0
    assert fake.steps("grpo") == list(range(1, reached + 2))
    assert fake.calls() == ["train", "eval", "grpo", "grpo", "report"]


def test_where_psft_run_is_killed_its_stage_saves_and_the_next_waits_for_it(fake: Fake) -> None:
    """Goes red if the stage goes on without anyone, or two processes train in one folder."""
    fake.change("{max_steps: 3}", "{max_steps: 1000}")
    process = _start(fake)
    _wait_for(lambda: len(fake.steps("grpo")) >= 2)
    process.kill()
    process.wait()
    assert fake.state("grpo")["status"] == "running"
    fake.change("{max_steps: 1000}", "{max_steps: 200}")
    assert fake.run() == 0
    rows = [json.loads(line) for line in (fake.out / "grpo" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    assert len({row["pid"] for row in rows}) <= 2
    assert fake.state("grpo")["status"] == "done" and set(fake.actions().values()) == {"skip"}


def test_a_stage_that_ended_after_psft_run_was_killed_is_done(fake: Fake) -> None:
    """Goes red if the result is known to pipeline.json alone, and a finished run is trained again."""
    assert fake.run() == 0
    path = fake.out / "pipeline.json"
    content = json.loads(path.read_text())
    content["stages"]["grpo"] |= {"status": "running", "exit_code": None, "outputs": {}}
    path.write_text(json.dumps(content))
    assert fake.actions()["grpo"] == "skip"
    assert fake.run() == 0
    assert fake.calls() == ["train", "eval", "grpo", "report"] and fake.state("grpo")["status"] == "done"
    (fake.out / "grpo" / "stage.json").unlink()
    path.write_text(json.dumps(content))
    assert fake.actions()["grpo"] == "go on"


def test_two_at_once_are_refused(fake: Fake) -> None:
    """Goes red if the folder is not locked."""
    fake.change("max_steps: 2,", "max_steps: 1000,")
    process = _start(fake)
    try:
        _wait_for(lambda: len(fake.steps("psft")) >= 1)
        with pytest.raises(RequestError, match=f"process {process.pid}"):
            fake.run()
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(timeout=60)


def test_from_and_only_leave_out_the_rest_and_refuse_what_lacks_its_start(fake: Fake) -> None:
    """Goes red if a stage runs that was not asked for, or starts from a model that is not there."""
    with pytest.raises(RequestError, match=r"grpo needs psft \(not asked for; not begun\)"):
        fake.run(first="grpo")
    assert fake.run(only="psft") == 0
    assert fake.calls() == ["train"]
    assert fake.run(first="grpo") == 0
    assert fake.calls() == ["train", "grpo", "report"]
    assert fake.actions() == {"psft": "skip", "scores": "run", "grpo": "skip", "report": "skip"}
    with pytest.raises(RequestError, match="Did you mean grpo"):
        fake.run(only="grop")


def test_a_model_that_is_gone_is_made_again(fake: Fake) -> None:
    """Goes red if only the key counts."""
    assert fake.run() == 0
    (fake.out / "grpo" / "model.safetensors").unlink()
    assert fake.actions() == {"psft": "skip", "scores": "skip", "grpo": "run", "report": "skip"}


def test_a_stage_that_leaves_nothing_has_failed(fake: Fake) -> None:
    """Goes red if the exit code alone says that a stage is done."""
    fake.change("max_steps: 2, learning_rate: 0.1", "max_steps: 0, fail: 0")
    fake.change("max_steps: 0", "max_steps: 1")
    with pytest.raises(RunFailed, match="left no model"):
        fake.run()
    assert fake.state("psft")["status"] == "failed"


def test_a_run_that_is_not_the_pipelines_own_is_left_alone(fake: Fake) -> None:
    """Goes red if a folder of somebody else's is resumed or written over."""
    (fake.out / "psft").mkdir(parents=True)
    (fake.out / "psft" / "run.json").write_text("mine")
    with pytest.raises(RequestError, match="holds a run that pipeline.json does not know"):
        fake.run()
    assert fake.run(redo=["psft"]) == 0
    assert (fake.out / "aside" / "psft-1" / "run.json").read_text() == "mine"


def test_another_pipeline_is_not_mixed_in(fake: Fake) -> None:
    """Goes red if two pipelines may share a folder."""
    assert fake.run() == 0
    fake.change("pipeline: fake", "pipeline: other")
    with pytest.raises(RequestError, match="holds the pipeline fake, not other"):
        fake.run()
