"""Steps whose numbers are not finite change nothing, are named, and in the end stop the run."""

import json
import uuid
from pathlib import Path

import pytest
import torch

from psft.errors import RequestError, RunFailed
from psft.trainers.bad_steps import BadSteps

SPOILER = """
import torch
def spoiled(logps, completion_mask, *, normalizer, at=(2,), what="nan", _count=[0]):
    _count[0] += 1
    factor = float(what) if _count[0] in at else 1.0
    return -(torch.where(completion_mask, logps, 0.0).sum() * factor) / normalizer
"""


@pytest.fixture
def spoiled(make_trainer, tmp_path, monkeypatch):
    """spoiled(name, at, what, **settings) -> trainer whose loss is multiplied by `what` at the calls `at`."""
    monkeypatch.syspath_prepend(tmp_path)
    # one micro-batch a step, so that calls are steps
    monkeypatch.setattr("psft.trainers.micro_batch_cap.CPU_OVERHEAD_TOKENS", 4096)

    def make(name, at, what="nan", **settings):
        module = f"spoiler_{uuid.uuid4().hex}"  # a module of its own counts its own calls
        (tmp_path / f"{module}.py").write_text(SPOILER)
        return make_trainer(
            name, objective=f"{module}:spoiled", objective_settings={"at": at, "what": what},
            max_tokens_per_micro_batch=4096, **settings,
        )  # fmt: skip

    return make


def rows_of(trainer):
    return [json.loads(line) for line in (Path(trainer.args.output_dir) / "metrics.jsonl").open()]


def weights_of(trainer):
    return {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}


@pytest.mark.parametrize("what", ["nan", "inf"])
@pytest.mark.parametrize("max_grad_norm", [1.0, 0.0])
def test_a_bad_step_changes_no_weight_and_no_moment_and_its_rows_are_named(spoiled, what, max_grad_norm):
    """Goes red if the gradient is zeroed instead of dropped (weight decay and moments still act), or the NaN hidden."""
    trainer = spoiled("run", (3,), what, max_steps=3, max_grad_norm=max_grad_norm, weight_decay=0.1)
    trainer.train()
    stopped = spoiled("stopped", (), max_steps=2, max_grad_norm=max_grad_norm, weight_decay=0.1)
    stopped.train()
    one, other = weights_of(trainer), weights_of(stopped)
    assert all(torch.equal(one[name], other[name]) for name in one)
    rows = rows_of(trainer)
    assert [row["loss"] is None for row in rows] == [False, False, True]
    (bad,) = json.loads((Path(trainer.args.output_dir) / "run.json").read_text())["bad_steps"]
    order = list(trainer.get_train_dataloader().batch_sampler.mini_batches())
    assert bad["step"] == 3 and bad["rows"] == sorted(order[2])


def test_an_engine_that_gives_no_gradient_norm_is_judged_by_its_loss():
    """Goes red if None is taken for a number: an error where DeepSpeed does not compute the norm."""
    steps = BadSteps(limit=3)
    assert not steps.is_bad(torch.tensor(1.0), None) and steps.is_bad(torch.tensor(float("nan")), None)
    steps.skip(1, torch.tensor(float("nan")), None, [4])
    assert steps.found == [{"step": 1, "loss": "nan", "grad_norm": None, "rows": [4]}]


def test_single_bad_steps_do_not_add_up(spoiled):
    trainer = spoiled("run", (2, 4, 6), max_steps=8, max_bad_steps=2)
    trainer.train()
    assert len(rows_of(trainer)) == 8 and trainer.bad_steps.in_a_row == 0


def test_bad_steps_in_a_row_stop_the_run_with_a_reason(spoiled):
    """Goes red if the count is not reset by a good step, or the run goes on for ever."""
    trainer = spoiled("run", (2, 4, 5, 6), max_steps=8, max_bad_steps=3)
    with pytest.raises(RunFailed, match="3 steps in a row.*rows.*max_bad_steps"):
        trainer.train()
    folder = Path(trainer.args.output_dir)
    assert [bad["step"] for bad in json.loads((folder / "run.json").read_text())["bad_steps"]] == [2, 4, 5, 6]
    assert json.loads((folder / "summary.json").read_text())["exit_reason"].startswith("failed: RunFailed")


def test_a_limit_below_one_is_refused(make_trainer):
    with pytest.raises(RequestError, match="max_bad_steps=0"):
        make_trainer(max_bad_steps=0)
