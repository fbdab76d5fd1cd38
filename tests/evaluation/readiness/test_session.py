"""Readiness from request to verdict: answers from a file whose numbers are known, and tiny models end to end."""

from __future__ import annotations

import json

import pytest

from psft.cli.main import main
from psft.reports.benchmarks import NO_SCORES
from psft.runs import RunFolder

RIGHT = (0, 1, 2, 4)
"""Right answers of 4, by prompt."""
SUITE = """
benchmarks:
  sums:
    {kind: math, file: sums.jsonl, fields: {id: id, question: q, gold: a}, grader: {require_boxed: false}}
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Four prompts, and answers of one model to each: the last of each prompt was cut off."""
    monkeypatch.chdir(tmp_path)
    items = [{"id": f"q{i}", "q": f"What is {i} + 10?", "a": str(i + 10)} for i in range(len(RIGHT))]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    (tmp_path / "suite.yaml").write_text(SUITE)
    rows = [
        {
            "benchmark": "rl-readiness/sums", "item": f"q{i}", "index": j, "num_tokens": 5,
            "response": f"It is {i + 10 if j < right else 99}.", "finish_reason": "length" if j == 3 else "stop",
        }
        for i, right in enumerate(RIGHT)
        for j in range(4)
    ]  # fmt: skip
    (tmp_path / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def evaluate(*words: str) -> int:
    replay = ["--backend", "replay", "--replay_file", "answers.jsonl", "--k", "4", "--group_size", "4"]
    return main(["eval", "m", "--suite", "rl-readiness", "suite.yaml", *replay, *words])


def test_the_numbers_are_those_of_the_answers(place, capsys):
    """By hand: avg 7/16, pass@4 3/4, mixed 2/4, readable 3/4. Goes red if a number is another's, or one of what is not
    known is invented."""
    assert evaluate() == 0
    content = json.loads((place / "evals" / "m" / "m.rl-readiness-suite.json").read_text())
    found = content["readiness"]
    values = {name: found[name]["value"] for name in ("avg@4", "pass@4", "room", "mixed_groups", "readable")}
    assert values == pytest.approx({
        "avg@4": 7 / 16, "pass@4": 0.75, "room": 5 / 16, "mixed_groups": 0.5, "readable": 0.75,
    })  # fmt: skip
    assert found["entropy_nats_per_token"] is None and found["drift_nats_per_token"] is None
    assert content["benchmarks"][0]["benchmark"] == "rl-readiness/sums"
    assert content["benchmarks"][0]["sampling"]["temperature"] == 1.0
    said = capsys.readouterr().out
    assert "m is ready for RL." in said and "Entropy is not known" in said and "31.2 ±" in said


def test_a_runs_checkpoint_gets_its_rows_once(place):
    """Goes red if the numbers do not come to eval.jsonl, stand there twice, or look like a benchmark's score."""
    run = RunFolder(place / "run")
    run.write_json("run.json", {})
    for _ in range(2):
        assert evaluate("--run_dir", "run", "--step", "40") == 0
    rows = [row for row in run.read_rows("eval.jsonl") if row["benchmark"] == "rl-readiness-suite"]
    assert {row["metric"]: row["value"] for row in rows} == pytest.approx(
        {"room@4": 5 / 16, "mixed_groups@4": 0.5, "readable": 0.75}
    )
    assert len(rows) == 3 and {"sample_entropy", "drift"} <= NO_SCORES  # nats, which a chart of scores must not show
    assert all(row["step"] == 40 and row["n"] == 4 for row in rows)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["m", "n", "--suite", "math"], "2 models are named (m, n). --suite rl-readiness compares several"),
        (["m", "m", "--suite", "rl-readiness"], "a model is named twice"),
        (["m", "--suite", "math", "--base", "b"], "--base has no effect without rl-readiness"),
        (["m", "--suite", "rl-readiness", "--num_fewshot", "2"], "--num_fewshot has no effect"),
        (["m", "--suite", "rl-readiness", "--k", "4"], "--k 4 is fewer answers than a group has"),
        (["m", "n", "--suite", "rl-readiness", "--run_dir", "r", "--step", "1"], "--run_dir belongs to one model"),
        (["m", "--suite", "rl-readiness", "--base", "b", "--backend", "openai", "--base_url", "http://h/v1"],
         "--base needs the models' weights"),
        (["m", "n", "--suite", "rl-readiness", "--backend", "replay", "--replay_file", "x"], "one at a time"),
        (["--suite", "rl-readiness"], "the model comes first"),
    ],
)  # fmt: skip
def test_a_wrong_request_is_one_message_and_nothing_is_written(place, capsys, words, message):
    """Goes red if it is found out after generating, or ignored."""
    assert main(["eval", *words]) == 2
    assert message in capsys.readouterr().err and not (place / "evals").exists()


def test_tiny_models_from_prompts_to_verdict(
    place, tiny_model_path, make_tiny_model, tiny_tokenizer, capsys, monkeypatch
):
    """Entropy against whole rows of logits, drift of the base from itself 0, and nothing is made or scored twice.

    Goes red if an entropy is of other tokens, drift has the wrong base, or resuming loads a model.
    """
    import torch

    make_tiny_model(seed=1).save_pretrained(place / "other")
    tiny_tokenizer.save_pretrained(place / "other")
    (place / "base").symlink_to(tiny_model_path)
    words = ["eval", "base", "other", "--suite", "rl-readiness", "sums.jsonl", "--k", "4", "--group_size", "4"]
    rows = [{"problem": f"{i} + 1?", "answer": i + 1} for i in range(3)]
    (place / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words += ["--max_new_tokens", "6", "--dtype", "float32", "--device", "cpu"]
    assert main([*words, "--base", "base"]) == 0
    said = capsys.readouterr().out
    assert "as far as is known: see the warnings." in said and "the prompts are too hard for it" in said
    verdict = json.loads((place / "evals" / "rl-readiness-sums.json").read_text())
    assert set(verdict["ranking"]) == set(verdict["models"]) == {"base", "other"}
    assert verdict["thresholds"]["mixed_least"] == 0.1
    drift = {name: own["drift_nats_per_token"] for name, own in verdict["models"].items()}
    assert drift["base"]["value"] == 0 and drift["other"]["value"] > 5 * drift["other"]["stderr"] > 0

    folder = place / "evals" / "other"
    samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    model = make_tiny_model(seed=1)
    total, count = 0.0, 0
    for row in samples:
        number = int(row["item"].removeprefix("row#")) - 1
        question = [{"role": "user", "content": f"{number} + 1?"}]
        prompt = tiny_tokenizer.apply_chat_template(question, add_generation_prompt=True, tokenize=False)
        ids = tiny_tokenizer(prompt, add_special_tokens=False)["input_ids"]
        answer = tiny_tokenizer(row["response"], add_special_tokens=False)["input_ids"]
        answer += [tiny_tokenizer.eos_token_id] if row["finish_reason"] == "stop" else []
        with torch.no_grad():
            logps = model(torch.tensor([ids + answer])).logits[0].double().log_softmax(-1)[len(ids) - 1 : -1]
        total, count = total - (logps.exp() * logps).sum().item(), count + len(answer)
    assert verdict["models"]["other"]["entropy_nats_per_token"]["value"] == pytest.approx(total / count, rel=1e-4)

    before = (folder / "samples.jsonl").read_bytes(), (folder / "entropies.jsonl").read_bytes()
    monkeypatch.setattr("psft.models.load_model", lambda *args, **how: pytest.fail("a model was loaded"))
    assert main(words) == 0
    assert ((folder / "samples.jsonl").read_bytes(), (folder / "entropies.jsonl").read_bytes()) == before
    assert "no checkpoint of a run" in capsys.readouterr().out
