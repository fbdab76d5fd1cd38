"""Laws of an evaluation from request to results, with answers from a file: no model, no torch."""

from __future__ import annotations

import json
import subprocess
import sys
import threading

import pytest
from openai_server import FAULTS, FakeServer, completion

from psft.cli.main import main
from psft.evaluation.samples import KeyedFile, seed_of
from psft.runs import RunFolder

ITEMS = [{"id": f"q{i}", "q": f"Which letter is number {i} of the alphabet, please?", "o": list("WXYZ"), "a": i % 4}
         for i in range(6)]  # fmt: skip
FIELDS = "{id: id, question: q, options: o, gold_index: a}"


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with data, a suite of k = 4, and answers: sample j of item i is right if j <= i % 3."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PSFT_DATA_DIR", raising=False)
    (tmp_path / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in ITEMS))
    (tmp_path / "suite.yaml").write_text(
        "benchmarks:\n  letters:\n    {kind: choice, file: items.jsonl, k: 4, title: Letters, fields: " + FIELDS + ",\n"
        '     template: "{question}\\n{options}"}\n'
    )
    write_answers(tmp_path / "answers.jsonl")
    return tmp_path


def write_answers(path, skip=(), right=lambda i, j: j <= i % 3):
    rows = []
    for i, item in enumerate(ITEMS):
        for j in range(4):
            letter = "ABCD"[item["a"] if right(i, j) else (item["a"] + 1) % 4]
            text = "I do not know." if (i, j) == (0, 3) else f"Answer: {letter}"
            end = "length" if j == 3 else "stop"
            if (i, j) not in skip:
                rows.append({"benchmark": "letters", "item": item["id"], "index": j, "response": text,
                             "finish_reason": end, "num_tokens": 10 + j})  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def evaluate(*more: str) -> int:
    return main(["eval", "m", "--suite", "suite.yaml", "--backend", "replay", "--replay_file", "answers.jsonl", *more])


def results(place, name="m.suite.json"):
    return json.loads((place / "evals" / "m" / name).read_text())


def test_the_numbers_are_those_of_the_answers(place, capsys):
    """By hand: items 0 and 3 have 1 of 4 right, 1 and 4 two, 2 and 5 three. Goes red if k or n is another's."""
    assert evaluate() == 0
    (found,) = results(place)["benchmarks"]
    assert (found["n"], found["k"], found["samples"], found["missing_samples"]) == (6, 4, 24, 0)
    assert found["accuracy"]["value"] == 0.5 and found["accuracy"]["stderr"] == pytest.approx((0.05 / 6) ** 0.5)
    assert {k: entry["value"] for k, entry in found["pass"].items()} == {
        "1": 0.5, "2": pytest.approx((1 / 2 + 5 / 6 + 1) / 3), "4": 1.0,
    }  # fmt: skip
    # item 0: 1 right, 2 wrong, 1 without an answer; item 3: 1 of 4; 1 and 4: two each, a tie; 2 and 5: three of four
    assert found["majority"]["value"] == pytest.approx((0 + 0.5 + 1 + 0 + 0.5 + 1) / 6)
    assert found["truncation_rate"] == 0.25 and found["no_answer_rate"] == pytest.approx(1 / 24)
    assert found["tokens"] == {"mean": 11.5, "p50": 11.5, "p90": 13, "p95": 13, "max": 13}
    assert found["items"]["q2"] == [1, 1, 1, 0]
    content = results(place)
    assert content["environment"]["versions"]["psft"] and found["data"]["sha256"] and found["prompt"]["sha256"]
    shown = capsys.readouterr().out
    assert "Letters" in shown and "50.0 ± 9.1" in shown and "25% of the answers were cut off" in shown


def test_what_is_there_is_not_asked_again(place):
    """The answers are gone the second time. Goes red if resume looks at anything but the sample file."""
    assert evaluate() == 0
    before = (place / "evals" / "m" / "samples.jsonl").read_bytes(), results(place)["benchmarks"]
    assert evaluate("--k", "2") == 0  # fewer samples: the first two
    assert results(place)["benchmarks"][0]["items"]["q0"] == [1, 0]
    assert evaluate() == 0
    assert ((place / "evals" / "m" / "samples.jsonl").read_bytes(), results(place)["benchmarks"]) == before
    assert results(place)["samples_made"] == 0


def test_a_sample_without_an_answer_is_reported_and_asked_again(place, capsys):
    """Goes red if it is kept as an empty answer, counted as wrong, or the exit code is 0."""
    write_answers(place / "answers.jsonl", skip={(1, 2), (5, 0)})
    assert evaluate("--output_dir", "out") == 1
    shown = capsys.readouterr()
    assert "2 samples are missing (2 of letters: answers.jsonl has no such answer)" in shown.err
    found = json.loads((place / "out" / "m.suite.json").read_text())["benchmarks"][0]
    assert (found["samples"], found["missing_samples"], len(found["items"]["q1"])) == (22, 2, 3)
    assert len(KeyedFile(place / "out" / "samples.jsonl", is_writer=False)) == 22


def test_grading_can_be_done_again_without_generating(place):
    """Goes red if --regrade keeps old grades, or asks the backend."""
    assert evaluate() == 0
    folder = place / "evals" / "m"
    rows = [json.loads(line) for line in (folder / "grades.jsonl").read_text().splitlines()]
    (folder / "grades.jsonl").write_text("".join(json.dumps({**row, "score": 0.0}) + "\n" for row in rows))
    assert evaluate() == 0
    assert results(place)["benchmarks"][0]["accuracy"]["value"] == 0  # grades that are there are used
    assert evaluate("--regrade") == 0
    assert results(place)["benchmarks"][0]["accuracy"]["value"] == 0.5
    assert len((folder / "samples.jsonl").read_text().splitlines()) == 24


def test_a_torn_sample_is_made_again(place):
    """Goes red if the torn line is kept, or the file refused."""
    assert evaluate() == 0
    path = place / "evals" / "m" / "samples.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[:-25])
    assert evaluate() == 0 and sorted(path.read_bytes().splitlines()) == sorted(whole.splitlines())


def test_a_run_gets_its_rows_once(place):
    """Goes red if a row has other fields than eval.jsonl's, stands there twice, or if a partial score is recorded."""
    run = RunFolder(place / "run")
    run.write_json("run.json", {"seed": 0})
    write_answers(place / "answers.jsonl", skip={(5, 0)})
    assert evaluate("--run_dir", "run", "--step", "40", "--output_dir", "a") == 1
    assert run.read_rows("eval.jsonl") == []
    write_answers(place / "answers.jsonl")
    for _ in range(2):
        assert evaluate("--run_dir", "run", "--step", "40") == 0
    rows = run.read_rows("eval.jsonl")
    assert [(row["metric"], row["value"]) for row in rows] == [("accuracy", 0.5), ("pass@4", 1.0), ("maj@4", 0.5)]
    assert rows[0] == {"step": 40, "benchmark": "letters", "metric": "accuracy", "k": 4, "value": 0.5, "n": 6,
                       "stderr": pytest.approx((0.05 / 6) ** 0.5)}  # fmt: skip


def test_two_models_are_compared_on_the_same_items(place, capsys):
    """Goes red if items are not paired by id, or the sign is turned."""
    assert evaluate() == 0
    write_answers(place / "answers.jsonl", right=lambda i, j: j <= i % 3 + 1)
    assert evaluate("--output_dir", "better", "--compare_to", "evals/m/m.suite.json") == 0
    compared = json.loads((place / "better" / "m.suite.json").read_text())["benchmarks"][0]["compared"]
    assert compared["difference"] == pytest.approx(0.25) and compared["n"] == 6 and compared["same_settings"]
    assert "+25.0 points against the other model" in capsys.readouterr().out


def test_items_in_the_training_data_are_named_and_left_out_of_a_second_score(place, capsys):
    """Goes red if hits are looked for in one field only, or the second score still holds them."""
    chat = {
        "messages": [
            {"role": "user", "content": f"Hello. {ITEMS[2]['q']} Think."},
            {"role": "assistant", "content": "Y"},
        ]
    }
    (place / "train.jsonl").write_text(json.dumps(chat) + "\n" + json.dumps({"question": ITEMS[5]["q"].upper()}) + "\n")
    assert evaluate("--contamination_against", "train.jsonl") == 0
    content = results(place)
    found = content["benchmarks"][0]["contamination"]
    assert found["hits"] == ["q2", "q5"] and found["without_hits"]["value"] == 0.375
    assert content["contamination_against"]["kinds"]["letters"] == {"q2": "13-gram", "q5": "normalised"}
    assert "2 of 6 items are in the training data; without them 37.5" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--temperature", "0"], "4 greedy samples of an item would be the same; set --k 1"),
        (["--backend", "hff"], "--backend hff is not known; use hf, vllm, openai, replay"),
        (["--backend", "openai"], "needs --base_url"),
        (["--top_p", "1.5"], "top_p=1.5 must be above 0, at most 1"),
        (["--step", "3"], "--run_dir and --step go together"),
        (["--compare_to", "none.json"], "holds no results of psft eval"),
        (["--data_dir", "nowhere"], "is no folder"),
        (["--suit", "math"], "Did you mean --suite?"),
        (["--base_url", "http://h/v1"], "--base_url has no effect with --backend replay, only with openai"),
        (["--dtype", "float32"], "--dtype has no effect with --backend replay, only with hf and vllm"),
    ],
)
def test_a_wrong_request_is_one_message_and_nothing_is_written(place, capsys, arguments, message):
    """Goes red if it is found out after generating."""
    assert evaluate(*arguments) == 2
    assert message in capsys.readouterr().err and not (place / "evals").exists()


def test_sets_that_are_absent_are_named_with_how_to_get_them(place, capsys):
    """Goes red if the rest goes on unasked, or one set at a time is named."""
    (place / "arc_challenge").mkdir()
    assert main(["eval", "m", "--suite", "ood", "--data_dir", ".", "--backend", "replay", "--replay_file", "x"]) == 2
    error = capsys.readouterr().err
    assert "GPQA: gpqa/gpqa_diamond.csv: not in ." in error and "accept the terms" in error
    assert "HeadQA: headqa/test_hfschema.jsonl: not in .. Add --download to fetch it from the hub" in error
    words = ["--suite", "suite.yaml", "gpqa", "--skip_missing", "--backend", "replay", "--replay_file", "answers.jsonl"]
    assert main(["eval", "m", *words, "--data_dir", "."]) == 0
    assert "left out: GPQA" in capsys.readouterr().err


def test_answers_from_elsewhere_need_no_torch(place):
    """Goes red if anything but the backend for a model here imports torch."""
    code = "import sys; from psft.cli.main import main; code = main(sys.argv[1:]); print('torch' in sys.modules, code)"
    words = ["eval", "m", "--suite", "suite.yaml", "--backend", "replay", "--replay_file", "answers.jsonl"]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines()[-1] == "False 0", done.stderr


def test_a_server_that_breaks_loses_no_sample(place, capsys, monkeypatch):
    """429, 500, garbage, half an answer, none at all; one sample fails for good the first time.

    Goes red if a failure is kept as an answer, or the second call asks for more than what is missing.
    """
    monkeypatch.setattr("psft.evaluation.backends.openai._FIRST_PAUSE_S", 0.001)
    monkeypatch.setattr("psft.evaluation.backends.openai._LONGEST_RETRY_AFTER_S", 0.001)
    is_broken, refused = True, []

    def script(attempt, body):
        refused[:] = refused or [body["seed"]]
        if is_broken and body["seed"] == refused[0]:
            return 500, {}, b""
        fault = FAULTS[(attempt + body["seed"]) % len(FAULTS)]
        return fault if attempt <= 3 else (200, {}, completion(f"Answer: {'ABCD'[body['seed'] % 4]}"))

    server = FakeServer(script)
    words = ["eval", "m", "--suite", "suite.yaml", "--backend", "openai", "--base_url", server.url]
    words += ["--concurrency", "3", "--max_retries", "4"]
    assert main(words) == 1
    assert "1 samples are missing (1 of letters: answers 500:  (5 tries))" in capsys.readouterr().err
    is_broken, before = False, len(server.bodies)
    assert main(words) == 0
    assert {body["seed"] for body in server.bodies[before:]} == {refused[0]}
    server.shutdown()
    server.server_close()
    rows = [json.loads(line) for line in (place / "evals" / "m" / "samples.jsonl").read_text().splitlines()]
    assert len(rows) == 24 == len({(row["item"], row["index"]) for row in rows})
    assert all(row["response"] == f"Answer: {'ABCD'[seed_of(row['key']) % 4]}" for row in rows)
    assert results(place)["benchmarks"][0]["missing_samples"] == 0


def test_another_model_of_the_same_name_is_said(place, capsys):
    """Goes red if results of one model quietly take the place of another's; or are said to at every resumption."""
    assert evaluate() == 0 and evaluate() == 0
    assert "will be replaced" not in capsys.readouterr().err
    path = place / "evals" / "m" / "m.suite.json"
    path.write_text(path.read_text().replace('"identity": "replay:m"', '"identity": "another"'))
    assert evaluate() == 0
    assert "holds another model of this name (m) and will be replaced" in capsys.readouterr().err


def test_ctrl_c_keeps_what_was_made(place, capsys, monkeypatch):
    """Goes red if samples are written at the end, the exit code is another than 130, or the grader's thread goes on."""
    from psft.evaluation.backends.replay import ReplayBackend

    whole = ReplayBackend.generate

    def interrupted(self, requests, done):
        yield next(iter(whole(self, requests[:5], done)))
        raise KeyboardInterrupt

    monkeypatch.setattr(ReplayBackend, "generate", interrupted)
    assert evaluate() == 130
    assert "5 samples are kept" in capsys.readouterr().err
    assert not [thread for thread in threading.enumerate() if "_work" in thread.name]
    monkeypatch.setattr(ReplayBackend, "generate", whole)
    assert evaluate() == 0 and results(place)["samples_made"] == 19
