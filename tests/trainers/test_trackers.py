"""Trackers are sent what the run folder holds, under the names documented, drift included."""

import json
import sys
from collections import defaultdict

import pytest
from transformers import TrainerCallback

from psft import PSFTConfig
from psft.errors import RequestError
from psft.runs import RunFolder

NAMES = (
    "loss nll entropy mean_token_accuracy clip_fraction clippable_fraction gradient_kept log_ratio_mean "
    "log_ratio_abs_mean log_ratio_abs_max token_weight epsilon_high grad_norm learning_rate tokens_per_second "
    "peak_memory_bytes"
).split()
FAKES = {
    "trackio": """
import contextvars
__version__ = "1.0.0"
sent, config = [], {}
class context_vars:
    current_space_id = contextvars.ContextVar("space", default=None)
def init(**settings): pass
def log(numbers): sent.append((numbers["train/global_step"], numbers))
def finish(): pass
""",
    "wandb": """
sent = []
class Config(dict):
    def update(self, values, **how): dict.update(self, values)
class run:
    summary = {}
    _label = staticmethod(lambda **how: None)
config = Config()
def init(**settings): pass
def define_metric(*names, **how): pass
def termwarn(*words, **how): pass
def log(numbers): sent.append((numbers["train/global_step"], numbers))
""",
    "wandb/sdk": "",
    "wandb/sdk/lib": "",
    "wandb/sdk/lib/config_util": "class ConfigError(Exception): pass",
    "mlflow": """
from types import SimpleNamespace
__version__ = "3.0.0"
utils = SimpleNamespace(
    validation=SimpleNamespace(MAX_PARAM_VAL_LENGTH=500, MAX_PARAMS_TAGS_PER_BATCH=100))
sent, runs = [], []
def is_tracking_uri_set(): return False
def active_run(): return runs[-1] if runs else None
def start_run(**how): runs.append(SimpleNamespace(info=SimpleNamespace(run_id="1")))
def end_run(): runs.pop()
def log_params(params, **how): pass
def log_metrics(metrics, step, **how): sent.append((step, {f"train/{name}": v for name, v in metrics.items()}))
""",
}


@pytest.fixture
def fake_packages(tmp_path, monkeypatch):
    """Trackers that keep what they are sent in `sent`: (step, {tag: number})."""
    for name, code in FAKES.items():
        folder = tmp_path / "packages" / name
        folder.mkdir(parents=True)
        (folder / "__init__.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path / "packages"))
    yield
    for name in [name for name in sys.modules if name.split(".")[0] in ("trackio", "wandb", "mlflow")]:
        del sys.modules[name]


class Noted(TrainerCallback):
    """As a tracker of one's own would see it."""

    def __init__(self):
        self.sent = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.sent.append((state.global_step, {f"train/{name}": value for name, value in logs.items()}))


def from_events(folder):
    """{tag: {step: number}} of a TensorBoard event file, which holds float32."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return {tag: {event.step: event.value for event in events.Scalars(tag)} for tag in events.Tags()["scalars"]}


def by_tag(sent):
    numbers = defaultdict(dict)
    for step, values in sent:
        for tag, value in values.items():
            numbers[tag][step] = value
    return numbers


def train(make_trainer, tracker, **settings):
    """(run folder, {tag: {step: number}}) after 16 steps; the probe looks at steps 0, 5, 10, 15 and 16."""
    callbacks = [Noted()] if tracker == "a callback" else []
    report_to = [] if callbacks else [tracker]
    trainer = make_trainer(
        report_to=report_to, callbacks=callbacks, max_steps=16, probe_every=5, learning_rate=3e-2, **settings
    )
    trainer.train()
    folder = RunFolder(trainer.args.output_dir)
    if tracker == "tensorboard":
        return folder, from_events(next(folder.path.glob("runs/*")))
    return folder, by_tag(callbacks[0].sent if callbacks else sys.modules[tracker].sent)


@pytest.mark.parametrize("tracker", ["tensorboard", "trackio", "wandb", "mlflow", "a callback"])
def test_a_tracker_is_sent_the_numbers_of_the_run_folder(make_trainer, fake_packages, demonstrations, tracker):
    """Goes red if a name is left out or changed, if drift waits for the next log, or if its step 0 is not sent."""
    folder, sent = train(make_trainer, tracker, eval_dataset={"held": demonstrations.select(range(4))},
                         eval_strategy="steps", eval_steps=8)  # fmt: skip
    rows = folder.read_rows("metrics.jsonl")
    for name in NAMES:
        values = sent[f"train/{name}"]
        expected = {row["step"]: row[name] for row in rows}
        assert set(values) == set(expected) == set(range(1, 17)), name
        for step, value in expected.items():
            assert values[step] == pytest.approx(value, rel=1e-6, abs=1e-9), (name, step)
    assert any(row["clip_fraction"] > 0 for row in rows)
    for row in folder.read_rows("probe.jsonl"):
        is_all = row["group"] == "all"
        tags = {"drift" if is_all else f"drift_{row['group']}": "drift_nats_per_token"}
        tags |= {"drift_stderr": "stderr", "probe_entropy": "entropy"} if is_all else {}
        for tag, field in tags.items():
            assert sent[f"train/{tag}"][row["step"]] == pytest.approx(row[field], rel=1e-6, abs=1e-9), tag
    assert sorted(sent["train/drift"]) == [0, 5, 10, 15, 16] and sent["train/drift"][0] == 0.0
    prefix = "train/eval_" if tracker in ("mlflow", "a callback") else "eval/"
    for row in folder.read_rows("eval.jsonl"):
        tag = f"{prefix}{row['benchmark']}_{row['metric']}"
        assert sent[tag][row["step"]] == pytest.approx(row["value"], rel=1e-6), tag
    assert not any("histogram" in tag or "mini_batch" in tag for tag in sent)


def test_between_logs_means_are_sent_and_of_a_maximum_the_largest(make_trainer):
    """Goes red if a log holds one step of several, or if drift waits for it."""
    folder, sent = train(make_trainer, "a callback", logging_steps=4)
    rows = folder.read_rows("metrics.jsonl")
    for name in ("nll", "entropy", "clip_fraction", "log_ratio_mean", "token_weight", "log_ratio_abs_max"):
        assert sorted(sent[f"train/{name}"]) == [4, 8, 12, 16]
        for step, value in sent[f"train/{name}"].items():
            values = [row[name] for row in rows[step - 4 : step]]
            assert value == pytest.approx(max(values) if name.endswith("max") else sum(values) / 4), (name, step)
    assert [sent["train/grad_norm"][step] for step in (4, 8)] == [rows[3]["grad_norm"], rows[7]["grad_norm"]]
    assert sorted(sent["train/drift"]) == [0, 5, 10, 15, 16]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("trackio", "report_to=trackio needs a package that is not installed: pip install trackio"),
        ("flyte", "pip install flytekit"),
        ("tensorbord", "report_to=tensorbord is no tracker. Did you mean 'tensorboard'?"),
    ],
)
def test_a_tracker_that_is_not_there_is_refused_before_anything_is_loaded(tmp_path, monkeypatch, name, words):
    """Goes red if transformers is left to fail in its own words once the model is loaded, or if a folder of that name,
    such as a run leaves in the working directory, is taken for the package."""
    (tmp_path / "trackio").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(RequestError) as refused:
        PSFTConfig(output_dir=str(tmp_path / "run"), report_to=["tensorboard", name])
    assert words in str(refused.value) and "report_to=tensorboard " not in str(refused.value)
    assert not (tmp_path / "run").exists()


def test_every_tracker_that_transformers_knows_is_known_here():
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    from psft.trainers.trackers import _MODULES

    assert set(_MODULES) == set(INTEGRATION_TO_CALLBACK)


def test_the_log_history_of_a_checkpoint_has_the_drift(make_trainer):
    """Where no tracker is: `trainer.state.log_history`, as TRL's users read it."""
    trainer = make_trainer(max_steps=4, probe_every=4)
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "drift" in entry]
    assert [entry["step"] for entry in entries] == [0, 4] and json.dumps(entries)
