"""Benchmarks while training: the training never notices, nothing is done twice, and the best checkpoint is kept."""

import json
import os
import random
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig

from psft.errors import RequestError
from psft.evaluation.backends.live import LiveBackend, live_identity
from psft.models.decoding import decode
from psft.runs import RunFolder
from psft.trainers.undisturbed import undisturbed

TIMINGS = {"tokens_per_second", "peak_memory_bytes"}
ITEMS = [{"id": f"q{i}", "q": "clips " * (1 + 2 * i) + "?", "o": ["robe", "fiber"], "a": 0} for i in range(4)]
SUITE = """
defaults:
  kind: choice
  file: items.jsonl
  fields: {id: id, question: q, options: o, gold_index: a}
  template: "{question} {options}"
benchmarks:
  greedy: {k: 1, title: Greedy, sampling: {preset: greedy, max_tokens: 6}}
  drawn: {k: 3, limit: 3, sampling: {temperature: 1.0, max_tokens: 6}}
"""


@pytest.fixture
def suite(tmp_path):
    """Path of a suite of two benchmarks: 4 items answered greedily, 3 of them three times at temperature 1."""
    folder = tmp_path / "suite"
    folder.mkdir()
    (folder / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in ITEMS))
    (folder / "tiny.yaml").write_text(SUITE)
    return str(folder / "tiny.yaml")


@pytest.fixture
def taught(tiny_tokenizer, suite):
    """Rows that answer the suite's questions rightly, so that a run learns to."""
    rows = []
    for item in ITEMS:
        text = f"{item['q']} A) robe\nB) fiber"
        prompt = tiny_tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, tokenize=False
        )
        ids = tiny_tokenizer(prompt, add_special_tokens=False)["input_ids"]
        answer = tiny_tokenizer("Answer: A<|im_end|>", add_special_tokens=False)["input_ids"]
        rows += [{"input_ids": ids + answer, "labels": [-100] * len(ids) + answer}] * 4
    return Dataset.from_list(rows)


@pytest.fixture
def start(make_trainer, suite, taught):
    """start(name, **settings) -> trainer of 12 steps that learn the answers, with a checkpoint every 3rd."""

    def make(name="run", **settings):
        defaults = {
            "eval_suite": [suite], "train_dataset": taught, "objective": "sft", "learning_rate": 3e-3, "max_steps": 12,
            "save_strategy": "steps", "save_steps": 3, "max_tokens_per_micro_batch": 256,
        }  # fmt: skip
        return make_trainer(name, **{**defaults, **settings})

    return make


def rows_of(trainer, name="eval.jsonl"):
    rows = RunFolder(trainer.args.output_dir).read_rows(name)
    return [{key: value for key, value in row.items() if key not in TIMINGS} for row in rows]


def scores_of(trainer, benchmark="greedy"):
    return {
        row["step"]: row["value"]
        for row in rows_of(trainer)
        if (row["benchmark"], row["metric"]) == (benchmark, "accuracy")
    }


def weights_of(trainer):
    return {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}


def same_bits(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def answers_at(trainer, step):
    folder = Path(trainer.args.output_dir) / "evaluation" / f"step-{step}"
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]


FORMS = {
    "psft": {"objective": "psft"},
    "dropout": {"attention_dropout": 0.3},
    "lora": {"lora_dropout": 0.3},
    "checkpointing": {"gradient_checkpointing": True},
    "padding-free": {"padding_free": True, "max_length": None, "objective": "psft"},
}


SLOW = {"checkpointing", "padding-free"}


@pytest.mark.parametrize("form", [pytest.param(f, marks=[pytest.mark.slow] if f in SLOW else []) for f in FORMS])
def test_the_training_does_not_notice_by_a_bit(form, start, make_tiny_model):
    """Goes red if a random state is not put back, if dropout stays off, or on while answers are drawn."""
    ends = []
    for name, other in (("with", {}), ("without", {"eval_suite": None})):
        settings = {"max_steps": 7, "save_strategy": "no", "eval_suite_steps": 2, **FORMS[form], **other}
        model = make_tiny_model(attention_dropout=settings.pop("attention_dropout", 0.0))
        if "lora_dropout" in settings:
            adapter = LoraConfig(r=4, lora_dropout=settings.pop("lora_dropout"), target_modules="all-linear")
            settings["peft_config"] = adapter
        if other:
            del settings["eval_suite_steps"]  # without effect
        torch.manual_seed(5)  # of the adapter
        trainer = start(name, model=model, **settings)
        random.seed(5), np.random.seed(5)
        trainer.train()
        states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
        ends.append((weights_of(trainer), rows_of(trainer, "metrics.jsonl"), states, trainer))
    (weights, rows, states, trainer), (weights2, rows2, states2, _) = ends
    assert same_bits(weights, weights2) and rows == rows2 and states == states2
    assert sorted(scores_of(trainer)) == [0, 2, 4, 6, 7] and len(answers_at(trainer, 4)) == 4 + 9


def test_everything_about_the_model_is_as_it_was(tiny_model):
    """Goes red if a module's mode, a note it keeps of lengths, or a buffer that was stretched stays."""
    model = tiny_model.train()
    model.model.layers[0].eval()
    rotary = model.model.rotary_emb
    before = [module.training for module in model.modules()], rotary.max_seq_len_cached, rotary.inv_freq
    content, state = rotary.inv_freq.clone(), torch.get_rng_state()
    with undisturbed(model):
        assert not any(module.training for module in model.modules())
        rotary.max_seq_len_cached = 9999
        rotary.register_buffer("inv_freq", rotary.inv_freq * 2, persistent=False)
        before[2].mul_(3)
        torch.rand(1), random.random(), np.random.rand()
    assert ([module.training for module in model.modules()], rotary.max_seq_len_cached) == before[:2]
    assert rotary.inv_freq is before[2] and torch.equal(rotary.inv_freq, content)
    assert torch.equal(torch.get_rng_state(), state)


def test_scores_rise_as_the_answers_are_learnt_and_are_recorded(start):
    """Goes red if the model that answers is not the one of the step, or rows lack a benchmark, k or n."""
    trainer = start()
    trainer.train()
    scores = scores_of(trainer)
    assert sorted(scores) == [0, 3, 6, 9, 12] and scores[0] == 0 and scores[12] == 1
    last = {(row["benchmark"], row["metric"]): row for row in rows_of(trainer) if row["step"] == 12}
    assert set(last) == {("greedy", "accuracy"), *(("drawn", m) for m in ("accuracy", "pass@3", "maj@3"))}
    assert (last["greedy", "accuracy"]["n"], last["drawn", "accuracy"]["n"]) == (4, 3)
    assert (last["greedy", "accuracy"]["k"], last["drawn", "accuracy"]["k"]) == (1, 3)
    folder = Path(trainer.args.output_dir) / "evaluation" / "step-12"
    content = json.loads((folder / "run-step-12.tiny.json").read_text())
    assert content["model"]["step"] == 12 and content["benchmarks"][0]["accuracy"]["value"] == 1
    assert {row["model"] for row in answers_at(trainer, 12)} == {content["model"]["identity"]}
    assert {row["response"] for row in answers_at(trainer, 12) if row["benchmark"] == "greedy"} == {"Answer: A"}
    summary = json.loads((Path(trainer.args.output_dir) / "summary.json").read_text())
    assert summary["last"]["greedy_accuracy"] == summary["best"]["greedy_accuracy"] == 1


def test_answers_are_those_of_psft_eval_on_the_checkpoint(start, tiny_tokenizer):
    """Greedily, by transformers' `generate`. Goes red if the model in memory answers in another way than its files."""
    from psft.evaluation.backends import Request
    from psft.evaluation.backends.hf import HFBackend

    trainer = start(max_steps=3)
    trainer.train()
    backend = HFBackend(str(Path(trainer.args.output_dir) / "checkpoint-3"), dtype="float32", device="cpu")
    data = trainer.benchmarks.data[0]
    asked = [Request(i.id, "b", i.id, 0, 0, i.messages, data.benchmark.sampling) for i in data.items]
    theirs = {request.item: answer.text for batch in backend.generate(asked, ()) for request, answer in batch}
    ours = {row["item"]: row["response"] for row in answers_at(trainer, 3) if row["benchmark"] == "greedy"}
    assert ours == theirs and any(ours.values())


@pytest.mark.parametrize("by", ["greedy", "tiny", "mean"])
def test_the_best_checkpoint_is_kept_and_linked(by, start, monkeypatch):
    """Scores by step: 3 and 9 tie. Goes red if the later one wins, the best is rotated away, or the newest is."""
    scores = {0: 0.9, 3: 0.6, 6: 0.2, 9: 0.6, 12: 0.5}
    trainer = start(select_best=by, save_total_limit=1)
    monkeypatch.setattr(type(trainer.benchmarks), "_evaluate", scored(trainer, scores))
    trainer.train()
    run = Path(trainer.args.output_dir)
    assert os.readlink(run / "best") == "checkpoint-3" and (run / "best" / "model.safetensors").exists()
    assert {path.name for path in run.glob("checkpoint-*")} == {"checkpoint-3", "checkpoint-12"}
    best = json.loads((run / "summary.json").read_text())["best_checkpoint"]
    assert best == {"step": 3, "by": by, "score": pytest.approx(0.6)}
    assert trainer.state.best_model_checkpoint == str(run / "checkpoint-3")
    assert (by == "greedy") == (scores_of(trainer, by) == {}) or by == "greedy"
    if by != "greedy":
        assert scores_of(trainer, by) == {step: pytest.approx(score) for step, score in scores.items()}


def scored(trainer, scores):
    """An evaluation that gives each step's score without asking the model."""

    def evaluate(self, model, backend):
        value = scores[self.trainer.state.global_step]
        entry = {"value": value, "stderr": 0.1, "low": 0, "high": 1, "n": 4}
        return [
            {"benchmark": b.name, "title": b.shown_name, "k": 1, "n": 4, "accuracy": entry}
            for b in self.suite.benchmarks
        ]

    return evaluate


def cut(trainer, name, step):
    """A copy of the run as a kill right after the checkpoint of this step was written leaves it, or later."""
    run = Path(trainer.args.output_dir)
    copy = run.with_name(name)
    shutil.copytree(run, copy, symlinks=True)
    for path in copy.glob("checkpoint-*"):
        if int(path.name.split("-")[1]) > step:
            shutil.rmtree(path)
    return copy


@pytest.mark.parametrize("strategy", ["steps", "epoch"])
def test_a_resumed_run_generates_nothing_twice_and_ends_alike(strategy, start, monkeypatch):
    """Cut after the first, a middle and the last checkpoint. Goes red if samples of this run are made again, if rows
    of eval.jsonl are lost or doubled, or if the best before the cut is forgotten."""
    settings = {"select_best": "drawn", "save_strategy": strategy}
    whole = start("whole", **settings)
    whole.train()
    steps = [3, 6, 9, 12] if strategy == "steps" else [4, 8, 12]
    assert sorted(scores_of(whole)) == [0, *steps] and len(set(scores_of(whole, "drawn").values())) > 2
    best = os.readlink(Path(whole.args.output_dir) / "best")
    asked = []
    answer = LiveBackend._answer
    monkeypatch.setattr(LiveBackend, "_answer", lambda self, *args: asked.append(1) or answer(self, *args))
    for step in (steps[0], steps[-2], steps[-1]):
        copy = cut(whole, f"cut-{step}", step)
        again = start(copy.name, resume=True, **settings)
        again.train()
        assert rows_of(again) == rows_of(whole), step
        assert os.readlink(copy / "best") == best
        assert json.loads((copy / "summary.json").read_text())["best_checkpoint"]["step"] == int(best.split("-")[1])
    assert asked == []


def test_samples_of_other_weights_are_not_taken(start, monkeypatch):
    """The run is trained again with another learning rate in a folder that has the former's samples. Goes red if a
    step's name is what they are found by."""
    first = start("first", max_steps=3)
    first.train()
    cut(first, "again", 0)
    again = start("again", max_steps=3, resume=True, learning_rate=1e-2)
    again.train()
    models = {step: [row["model"] for row in answers_at(again, step)] for step in (0, 3)}
    assert len(set(models[0])) == 1 and len(models[0]) == 13
    assert len(set(models[3])) == 2 and len(models[3]) == 26


def send_signal(trainer, step, monkeypatch):
    """SIGTERM while the model answers at a step."""
    answer = LiveBackend._answer

    def and_signal(backend, *args):
        if trainer.state.global_step == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return answer(backend, *args)

    monkeypatch.setattr(LiveBackend, "_answer", and_signal)


@pytest.mark.parametrize("step", [0, 6, pytest.param(12, marks=pytest.mark.slow)])
def test_a_signal_stops_an_evaluation_and_the_resumed_run_finishes_it(step, start, monkeypatch):
    """Goes red if a stop waits for the rest of the samples, if those made are lost, or if the score is."""
    settings = {"eval_suite_batch_size": 2, "select_best": "drawn"}
    whole = start("whole", **settings)
    whole.train()
    with monkeypatch.context() as patch:
        stopped = start("stopped", **settings)
        send_signal(stopped, step, patch)
        stopped.train()
    assert stopped.stop_signal.number == signal.SIGTERM and stopped.state.global_step == step
    assert len(answers_at(stopped, step)) == 2 and step not in scores_of(stopped)
    again = start("stopped", resume=True, **settings)
    again.train()
    assert rows_of(again) == rows_of(whole) and same_bits(weights_of(again), weights_of(whole))
    assert os.readlink(Path(again.args.output_dir) / "best") == os.readlink(Path(whole.args.output_dir) / "best")


def test_a_rule_about_a_score_ends_the_run_with_its_checkpoint(start):
    """Goes red if scores reach no rule, or the rule's checkpoint is lost because the step's was saved before."""
    trainer = start(stop_when=["greedy_accuracy>=1"], eval_suite_steps=2, save_steps=100)
    trainer.train()
    step = trainer.state.global_step
    assert 0 < step < 12 and step % 2 == 0 and scores_of(trainer)[step] == 1
    assert (Path(trainer.args.output_dir) / f"checkpoint-{step}").is_dir()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"eval_suite": ["mth"]}, "no suite, benchmark or file named mth"),
        ({"eval_suite": None, "eval_suite_k": 2}, "eval_suite_k has no effect without eval_suite"),
        ({"eval_suite": None, "select_best": "math"}, "select_best has no effect without eval_suite"),
        ({"eval_suite_steps": 0}, "eval_suite_steps=0 must be 1 or more"),
        ({"eval_suite_k": 4}, "Greedy: 4 greedy samples of an item would be the same; set eval_suite_k=1"),
        ({"select_best": "drwn"}, "select_best=drwn is nothing that eval_suite evaluates. Use one of tiny, greedy"),
        ({"select_best": "drawn", "save_strategy": "no"}, "save_strategy=no saves none"),
        ({"select_best": "drawn", "eval_suite_steps": 4}, "eval_suite_steps=4 does not coincide with save_steps=3"),
        ({"select_best": "drawn", "eval_suite_steps": 4, "save_strategy": "epoch"}, "with save_strategy=epoch"),
        ({"select_best": "drawn", "metric_for_best_model": "nll"}, "each choose a best checkpoint"),
        ({"eval_suite": ["aime24"]}, "AIME24: math/aime24.jsonl: no --eval_suite_data_dir was given"),
        ({"eval_suite_data_dir": "nowhere"}, "eval_suite_data_dir=nowhere is no folder"),
    ],
)
def test_what_cannot_be_evaluated_is_refused_before_the_first_step(settings, words, start, tmp_path, monkeypatch):
    """Goes red if it is found out hours later, or a checkpoint is missing for a score that selects."""
    monkeypatch.delenv("PSFT_DATA_DIR", raising=False)
    with pytest.raises(RequestError) as refused:
        start(**settings)
    assert words in str(refused.value) and not (tmp_path / "run" / "run.json").exists()


def test_a_prompt_that_the_model_cannot_hold_is_refused_before_the_first_step(start, make_tiny_model):
    """Goes red if prompts are rendered when their turn comes."""
    with pytest.raises(RequestError, match="greedy item q1 has .* tokens; the model's context holds 24"):
        start(model=make_tiny_model(max_position_embeddings=24))


def test_a_run_that_replaces_another_takes_its_samples_and_link_away(start):
    """Goes red if `best` leads to nothing, or what psft eval made is deleted."""
    start(select_best="greedy", max_steps=3).train()
    trainer = start(overwrite_output_dir=True, eval_suite=None, max_steps=3, save_strategy="no")
    run = Path(trainer.args.output_dir)
    (run / "evaluation" / "checkpoint-3").mkdir()
    trainer.train()
    assert not (run / "best").is_symlink() and [p.name for p in (run / "evaluation").iterdir()] == ["checkpoint-3"]


def test_an_identity_is_that_of_every_weight(tiny_model, tiny_tokenizer):
    """Goes red if it is sampled from the weights, or from their sum."""
    how = {"num_ranks": 1, "is_shared": False}
    before = live_identity(tiny_model, tiny_tokenizer, **how)
    assert before == live_identity(tiny_model, tiny_tokenizer, **how)
    with torch.no_grad():
        weight = tiny_model.model.layers[1].mlp.down_proj.weight
        weight[3, 5], weight[3, 6] = weight[3, 6].clone(), weight[3, 5].clone()
    assert before != live_identity(tiny_model, tiny_tokenizer, **how)


def test_decoding_goes_on_as_long_as_others_do(tiny_model):
    """Ranks with parts of one model call it equally often. Goes red if what follows an end changes what came before."""
    ids, mask = torch.tensor([[0, 5, 6, 7], [9, 10, 11, 12]]), torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])
    how = {"max_new_tokens": 5, "end_ids": []}
    alone = decode(tiny_model, ids, mask, lambda logits: logits.argmax(-1), **how)
    said = []
    along = decode(
        tiny_model,
        ids,
        mask,
        lambda logits: logits.argmax(-1),
        is_over=lambda d: said.append(d) or len(said) == 9,
        **how,
    )
    assert alone.shape == (2, 5) and torch.equal(along[:, :5], alone) and along.shape == (2, 9)
    assert said == [False] * 4 + [True] * 5


def test_the_command_says_what_an_evaluation_takes_and_where_the_best_is(
    suite, tiny_model_path, tmp_path, capsys, monkeypatch
):
    """Goes red if a setting does not reach the trainer from the command line, or plan is silent about absent data."""
    from psft.cli.main import main

    monkeypatch.delenv("PSFT_DATA_DIR", raising=False)
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"question": f"1 + {n}?", "answer": str(n + 1)}) + "\n" for n in range(4)))
    words = [
        "--model_name_or_path", str(tiny_model_path), "--dataset", str(data), "--train_batch_size", "4",
        "--mini_batch_size", "2", "--max_steps", "2", "--bf16", "false", "--report_to", "none", "--probe_every", "0",
        "--output_dir", str(tmp_path / "run"), "--save_steps", "1",
    ]  # fmt: skip
    ours = ["--eval_suite", suite, "--eval_suite_max_new_tokens", "3", "--select_best", "mean"]
    assert main(["plan", *words, *ours]) == 0
    assert "each evaluation: Greedy, drawn: 13 samples of at most 3 tokens" in capsys.readouterr().out
    assert main(["plan", *words, "--eval_suite", "aime24"]) == 0
    assert "psft train will refuse: benchmarks of eval_suite are not here" in capsys.readouterr().out
    assert main(["train", *words, *ours]) == 0
    assert f"Best checkpoint: step 1, mean 0.0 %: {tmp_path / 'run' / 'best'}" in capsys.readouterr().out
    assert {row["step"] for row in RunFolder(tmp_path / "run").read_rows("eval.jsonl")} == {0, 1, 2}
