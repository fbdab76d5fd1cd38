"""What looks at a run while it trains: clipped tokens, histogram, probe, alerts, rules. None of it changes a bit."""

import json
import logging
import math
import os
import signal

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import TrainerCallback

from psft.errors import RequestError
from psft.runs import RunFolder
from psft.runs.clipped_tokens import read_clipped_tokens, write_clipped_tokens
from psft.runs.rows import LOG_RATIO_EDGES


def rows_of(trainer, name="metrics.jsonl"):
    return RunFolder(trainer.args.output_dir).read_rows(name)


def trained(make_trainer, name, **settings):
    trainer = make_trainer(name, **{"learning_rate": 3e-2, "max_steps": 16, **settings})
    trainer.train()
    return trainer


def test_looking_changes_no_bit_of_the_weights(make_trainer, tmp_path):
    """Goes red if the probe draws from the global random state, leaves eval mode on, or a rule acts unasked."""
    on = trained(make_trainer, "on", probe_every=3, stop_when=["nll>1e9"], save_when=["nll>1e9"])
    off = trained(make_trainer, "off", probe_every=0, track_clipped_tokens=False, drift_budget=None)
    for name, trainer in (("on", on), ("off", off)):
        trainer.save_model(str(tmp_path / name / "final"))
    one, other = (load_file(tmp_path / name / "final" / "model.safetensors") for name in ("on", "off"))
    assert all(torch.equal(one[name], other[name]) for name in other)
    assert [r["loss"] for r in rows_of(on)] == [r["loss"] for r in rows_of(off)]
    assert (tmp_path / "on" / "probe.jsonl").exists() and not (tmp_path / "off" / "probe.jsonl").exists()
    assert not (tmp_path / "off" / "clipped_tokens.parquet").exists()


def test_drift_is_measured_at_the_start_every_n_steps_and_at_the_end(make_trainer):
    trainer = trained(make_trainer, "run", probe_every=6)
    rows = [row for row in rows_of(trainer, "probe.jsonl") if row["group"] == "all"]
    assert [row["step"] for row in rows] == [0, 6, 12, 16]
    assert rows[0]["drift_nats_per_token"] == 0.0 and rows[-1]["drift_nats_per_token"] > 0.01
    summary = RunFolder(trainer.args.output_dir).read_json("summary.json")
    assert summary["last"]["drift_nats_per_token"] == rows[-1]["drift_nats_per_token"]


@pytest.mark.parametrize("settings", [{}, {"objective": "psft_tv", "tv_delta": 0.002}, {"target_clip_fraction": 0.3}])
def test_clipped_tokens_add_up_to_the_clip_fractions(make_trainer, settings):
    """Goes red if mini-batch 1 or padding is counted, if the bound is not the one in force, or an epoch is mixed up."""
    trainer = trained(make_trainer, "run", **settings)  # 16 steps: two epochs of 32 rows, 8 steps each
    table = read_clipped_tokens(RunFolder(trainer.args.output_dir).path / "clipped_tokens.parquet")
    for epoch in (1, 2):
        steps = [r for r in rows_of(trainer) if math.ceil(r["epoch"]) == epoch and r["mini_batch"] > 1]
        mine = [row for row in table if row["epoch"] == epoch]
        assert sum(row["seen"] for row in mine) == sum(r["tokens"] for r in steps)
        clipped = sum(row["clipped"] for row in mine)
        assert clipped == round(sum(r["tokens"] * r["clip_fraction"] for r in steps)) > 0
        assert all(0 <= row["clipped"] <= row["seen"] for row in mine)
        assert [row["clipped"] for row in mine] == sorted((row["clipped"] for row in mine), reverse=True)


def test_a_place_is_the_text_around_the_clipped_token(make_trainer, tiny_tokenizer, demonstrations):
    """Goes red if the token is taken one off its label, or if padding or a neighbour shows."""
    for name, settings in (("padded", {}), ("padding-free", {"padding_free": True, "max_length": None})):
        trainer = trained(make_trainer, name, **settings)
        table = read_clipped_tokens(RunFolder(trainer.args.output_dir).path / "clipped_tokens.parquet")
        places = [(row, text) for row in table for text in row["contexts"]]
        texts = [tiny_tokenizer.decode(row["input_ids"]) for row in demonstrations]
        assert len(places) > 20
        for row, place in places:
            before, rest = place.split("\u27e6")
            token, after = rest.split("\u27e7")
            assert token == row["token"] == tiny_tokenizer.decode([row["token_id"]])
            if "\ufffd" not in place:  # bytes that are no text of their own alone
                assert any(before + token + after in text for text in texts), (name, place)
        assert all(len(row["contexts"]) <= min(3, row["clipped"]) for row in table)


def test_the_histogram_counts_every_token_and_kept_gradient_is_what_the_clip_left(make_trainer):
    """Goes red if a bin is one off, if padding counts, or if clipped tokens are kept."""
    rows = rows_of(trained(make_trainer, "run"))
    edges = [-math.inf, *LOG_RATIO_EDGES, math.inf]
    for row in rows:
        counts = row["log_ratio_histogram"]
        assert sum(counts) == row["tokens"] and len(counts) == len(LOG_RATIO_EDGES) + 1
        if row["mini_batch"] == 1:
            assert counts[len(counts) // 2] == row["tokens"] and row["gradient_kept"] == 1.0
            continue
        beyond = sum(c for c, low in zip(counts, edges, strict=False) if low >= 0.25)  # ln 1.28 = 0.247
        within = sum(c for c, low in zip(counts, edges, strict=False) if low >= 0.1)
        clipped = round(row["clip_fraction"] * row["tokens"])
        assert beyond <= clipped <= within
        assert (row["gradient_kept"] < 1) == (clipped > 0)
        kept = row["token_weight"]  # the kept ratios' sum over all tokens; each clipped ratio is above 1.28
        assert row["gradient_kept"] <= kept / (kept + 1.28 * row["clip_fraction"]) + 1e-6
    assert any(row["gradient_kept"] < 0.9 for row in rows)
    plain = rows_of(trained(make_trainer, "sft", objective="sft"))
    assert all(row["log_ratio_histogram"] is None and row["gradient_kept"] is None for row in plain)


def test_a_rule_stops_the_run_with_a_checkpoint_and_says_why(make_trainer, caplog):
    trainer = trained(make_trainer, "run", stop_when=["drift>0.01"], probe_every=2)
    folder = RunFolder(trainer.args.output_dir)
    summary = folder.read_json("summary.json")
    (rule, _, step, _) = summary["exit_reason"].removeprefix("stopped: ").partition(" was met at step ")[0::1] + ("",)
    assert rule == "drift>0.01" and summary["steps"] == int(step.split()[0]) < 16
    assert (folder.path / f"checkpoint-{summary['steps']}").is_dir()
    assert "the run stops here" in caplog.text


def test_a_rule_saves_a_checkpoint_once_and_the_run_goes_on(make_trainer, demonstrations):
    trainer = trained(make_trainer, "run", save_when=["clip_fraction>0 for 2"], max_steps=8)
    steps = [row["step"] for row in rows_of(trainer)]
    met = [b["step"] for a, b in zip(rows_of(trainer), rows_of(trainer)[1:], strict=False)
           if a["clip_fraction"] > 0 and b["clip_fraction"] > 0]  # fmt: skip
    saved = sorted(int(p.name.split("-")[1]) for p in RunFolder(trainer.args.output_dir).path.glob("checkpoint-*"))
    assert steps[-1] == 8 and saved[0] == met[0]


def test_rules_on_held_out_data_know_its_name(make_trainer, demonstrations):
    held = {"heldout": demonstrations}
    trainer = trained(
        make_trainer, "run", stop_when=["heldout_nll<100"], eval_dataset=held, eval_strategy="steps", eval_steps=3
    )
    assert RunFolder(trainer.args.output_dir).read_json("summary.json")["steps"] == 3
    with pytest.raises(RequestError, match="no metric 'test_nll'.*heldout_nll"):
        make_trainer("other", stop_when=["test_nll<1"], eval_dataset=held)
    with pytest.raises(RequestError, match="needs the retention probe"):
        make_trainer("third", stop_when=["drift>1"])


def test_alerts_are_logged_once_and_kept_in_run_json(make_trainer, caplog):
    """Goes red if an alert repeats, or is lost."""
    caplog.set_level(logging.WARNING)
    trainer = trained(make_trainer, "run", learning_rate=1e-6, max_steps=24)
    alerts = RunFolder(trainer.args.output_dir).read_json("run.json")["alerts"]
    assert [(a["name"], a["step"]) for a in alerts] == [("clip_inactive", 12)]
    assert caplog.text.count("the clip never acts") == 1


def test_a_resumed_run_ends_in_the_same_probe_table_and_alerts(make_trainer, tmp_path):
    """Goes red if answers are drawn anew, a step is probed twice, or counts begin again."""
    import shutil

    how = {"save_strategy": "steps", "save_steps": 5, "probe_every": 4, "drift_budget": 1e-3, "learning_rate": 1e-2}
    whole = trained(make_trainer, "whole", **how)
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    for step in (10, 15, 16):
        shutil.rmtree(tmp_path / "cut" / f"checkpoint-{step}", ignore_errors=True)
    again = trained(make_trainer, "cut", resume=True, **how)
    assert RunFolder(tmp_path / "cut").read_json("run.json")["resumed"][0]["step"] == 5
    assert rows_of(again, "probe.jsonl") == rows_of(whole, "probe.jsonl")
    tables = [read_clipped_tokens(tmp_path / name / "clipped_tokens.parquet") for name in ("cut", "whole")]
    assert tables[0] == tables[1]
    alerts = [RunFolder(tmp_path / name).read_json("run.json")["alerts"] for name in ("cut", "whole")]
    assert alerts[0] == alerts[1] and "drift" in [a["name"] for a in alerts[0]]


@pytest.mark.parametrize("step", [8, 16])
def test_a_signal_leaves_the_probe_out_and_the_resumed_run_makes_up_for_it(make_trainer, step):
    """Goes red if a stop waits for the probe, or if the drift of its step, the last one included, is never measured."""

    class Signalled(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == step - 1:
                os.kill(os.getpid(), signal.SIGTERM)

    how = {"save_strategy": "steps", "save_steps": 20, "probe_every": 4}
    whole = trained(make_trainer, "whole", **how)
    stopped = trained(make_trainer, "run", callbacks=[Signalled()], **how)
    assert {row["step"] for row in rows_of(stopped, "probe.jsonl")} == set(range(0, step, 4))
    again = trained(make_trainer, "run", resume=True, **how)
    assert rows_of(again, "probe.jsonl") == rows_of(whole, "probe.jsonl")


def test_a_checkpoint_without_the_base_models_answers_switches_the_probe_off_in_words(make_trainer, caplog):
    how = {"save_strategy": "steps", "save_steps": 4}
    trained(make_trainer, "run", max_steps=4, **how)
    trained(make_trainer, "run", max_steps=8, resume=True, probe_every=2, **how)
    assert "the retention probe is off" in caplog.text


def test_a_table_that_is_no_parquet_is_refused_by_name(tmp_path):
    path = tmp_path / "clipped_tokens.parquet"
    assert read_clipped_tokens(path) == []
    path.write_text("no parquet")
    with pytest.raises(RequestError, match="clipped_tokens.parquet cannot be read"):
        read_clipped_tokens(path)
    row = {"epoch": 1, "token_id": 3, "token": "</script>", "clipped": 1, "seen": 2, "contexts": ["a\u27e6b\u27e7c"]}
    write_clipped_tokens(path, [row])
    assert read_clipped_tokens(path) == [row]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"probe_every": -1}, "probe_every=-1"),
        ({"probe_every": 5, "probe_max_new_tokens": 0}, "probe_max_new_tokens=0"),
        ({"probe_prompts": "x.jsonl"}, "probe_prompts has no effect"),
        ({"drift_budget": 0}, "drift_budget=0"),
        ({"stop_when": ["nothing"]}, "stop_when='nothing' is no rule"),
        ({"probe_every": 5, "probe_prompts": "missing.jsonl"}, "missing.jsonl"),
    ],
)
def test_what_cannot_be_meant_is_refused_by_name(make_trainer, settings, words):
    with pytest.raises(RequestError) as refused:
        make_trainer("run", **settings)
    assert words in str(refused.value)


def test_json_of_the_records_holds(make_trainer):
    trainer = trained(make_trainer, "run", probe_every=8, max_steps=8)
    for name in ("metrics.jsonl", "probe.jsonl"):
        for line in (RunFolder(trainer.args.output_dir).path / name).read_text().splitlines():
            json.loads(line)
    assert isinstance(trainer.train_dataset, Dataset)
