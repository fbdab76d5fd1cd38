"""`psft train` as a person meets it: model folder, demonstrations, run folder; and every kind of bad input."""

import json
from pathlib import Path

import pytest

from psft.cli.main import main

ROW = {
    "messages": [{"role": "user", "content": "How many clips?"}, {"role": "assistant", "content": "The answer is 3."}]
}


@pytest.fixture
def demonstrations_path(tmp_path: Path) -> Path:
    path = tmp_path / "clips.jsonl"
    path.write_text("".join(json.dumps(ROW) + "\n" for _ in range(12)))
    return path


@pytest.fixture
def train(tiny_model_path, demonstrations_path, tmp_path):
    """train(*flags) -> exit code of `psft train` on the tiny model; later flags win."""

    def call(*flags: str) -> int:
        return main(
            ["train", "--model_name_or_path", str(tiny_model_path), "--dataset", str(demonstrations_path)]
            + ["--output_dir", str(tmp_path / "run"), "--max_steps", "4", "--train_batch_size", "4"]
            + ["--mini_batch_size", "1", "--learning_rate", "1e-2", "--bf16", "false", "--report_to", "none"]
            + ["--save_strategy", "no", "--disable_tqdm", "true", *flags]
        )

    return call


def test_a_run_learns_and_leaves_everything_in_its_folder(train, demonstrations_path, tmp_path):
    """Goes red if a file of the run folder is missing, or if the model saved is not the one trained."""
    assert train("--eval_dataset", f"clips={demonstrations_path}") == 0
    folder = tmp_path / "run"
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    fields = "step window mini_batch epoch tokens loss nll entropy clip_fraction clippable_fraction log_ratio_mean"
    fields += " log_ratio_abs_max grad_norm learning_rate tokens_per_second peak_memory_bytes"
    assert [row["step"] for row in rows] == [1, 2, 3, 4] and all(set(fields.split()) <= set(row) for row in rows)
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["exit_reason"] == "finished" and summary["last"]["clips_nll"] < summary["first"]["clips_nll"]
    info = json.loads((folder / "run.json").read_text())
    assert info["config"]["objective"] == "psft" and info["config"]["train_batch_size"] == 4
    assert info["data_reports"]["train"]["end_token"] == "<|im_end|>"
    assert (folder / "model.safetensors").exists() and "PSFT" in (folder / "README.md").read_text()
    again = tmp_path / "again"
    onward = ["--model_name_or_path", str(folder), "--output_dir", str(again), "--max_steps", "1"]
    assert train(*onward, "--eval_dataset", f"clips={demonstrations_path}") == 0
    start = json.loads((again / "summary.json").read_text())["first"]["clips_nll"]
    assert start == pytest.approx(summary["last"]["clips_nll"], rel=1e-6)


def test_a_run_that_diverges_stops_with_a_reason_and_no_model(train, capsys, tmp_path):
    """Goes red if it goes on for ever, exits with 0, or prints a traceback."""
    assert train("--learning_rate", "1e30", "--max_grad_norm", "0") == 1
    error = capsys.readouterr().err
    assert "3 steps in a row" in error and "Traceback" not in error
    assert not (tmp_path / "run" / "model.safetensors").exists()


def test_a_value_that_is_no_number_is_shown_in_words():
    """JSON has no NaN: summary.json says null. Goes red if that is formatted as a number."""
    from psft.cli.train import _shown

    assert _shown(None) == "not finite" and _shown(1.5).strip() == "1.5000"


def test_a_lora_run_saves_an_adapter(train, tmp_path):
    assert train("--use_peft") == 0
    assert (tmp_path / "run" / "adapter_model.safetensors").exists()


def test_command_and_python_give_the_same_losses(train, tmp_path, tiny_model_path, demonstrations_path, tiny_tokenizer):
    """Goes red if the command changes a default, the order of rows, or the labels."""
    from psft import PSFTConfig, PSFTTrainer
    from psft.data import prepare_dataset
    from psft.models import load_model

    assert train() == 0
    args = PSFTConfig(
        output_dir=str(tmp_path / "python"), max_steps=4, train_batch_size=4, mini_batch_size=1, learning_rate=1e-2,
        bf16=False, report_to="none", save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    data = prepare_dataset(str(demonstrations_path), tokenizer=tiny_tokenizer, max_length=args.max_length)
    PSFTTrainer(load_model(str(tiny_model_path)), args, None, data.dataset, processing_class=tiny_tokenizer).train()
    series = [
        [(row["loss"], row["grad_norm"]) for row in map(json.loads, (tmp_path / name / "metrics.jsonl").open())]
        for name in ("run", "python")
    ]
    assert series[0] == series[1]


@pytest.mark.parametrize(
    ("content", "flags", "message"),
    [
        (None, ["--dataset", "no_such.jsonl"], "no_such.jsonl"),
        ("", [], "empty"),
        ('{"messages": [}\n', [], "clips.jsonl:1"),
        (json.dumps({"messages": ROW["messages"][:1]}) + "\n", [], "clips.jsonl:1.*user"),
        (None, ["--max_length", "5"], "max_length"),
        (None, ["--learing_rate", "1"], "learning_rate"),
        (None, ["--mini_batch_size", "3"], "does not divide train_batch_size=4"),
        (None, ["--model_name_or_path", "."], "config.json"),
        (None, ["--objective", "pfst"], "psft"),
        (None, ["--dtype", "bfloat16"], "force_pure_bf16"),
        (None, ["--on_bad_row", "ignore"], "one of error, skip"),
        (None, ["--label_smoothing_factor", "0.1"], "label_smoothing_factor"),
    ],
)
def test_bad_input_is_one_clear_error_with_exit_code_2(
    train, capsys, demonstrations_path, tmp_path, content, flags, message
):
    """Goes red if an exception of a library gets through, or if a model is written."""
    import re

    if content is not None:
        demonstrations_path.write_text(content)
    assert train(*flags) == 2
    error = capsys.readouterr().err
    assert re.search(message, error, re.DOTALL) and "Traceback" not in error
    assert error.startswith("psft train: error:") or "psft train: error:" in error
    assert not (tmp_path / "run" / "model.safetensors").exists() and not (tmp_path / "run" / "run.json").exists()


def test_padding_free_rows_train_the_same_and_packing_is_refused(train, tmp_path, capsys):
    """Goes red if TRL's refusal of max_length comes through, or if packed sequences see each other."""
    assert train() == 0
    assert train("--padding_free", "--output_dir", str(tmp_path / "free")) == 0
    padded, free = (
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").open()] for name in ("run", "free")
    )
    for one, other in zip(padded, free, strict=True):
        assert other["nll"] == pytest.approx(one["nll"], rel=1e-5) and other["tokens"] == one["tokens"]
    assert json.loads((tmp_path / "free" / "run.json").read_text())["config"]["max_length"] == 1024
    assert train("--packing", "--output_dir", str(tmp_path / "packed")) == 2
    assert "padding_free" in capsys.readouterr().err


def test_an_output_folder_with_a_run_is_not_touched(train, tmp_path, capsys):
    assert train("--max_steps", "1") == 0
    before = {path: path.read_bytes() for path in (tmp_path / "run").iterdir() if path.is_file()}
    assert train() == 2
    assert "holds another run" in capsys.readouterr().err
    assert before == {path: path.read_bytes() for path in (tmp_path / "run").iterdir() if path.is_file()}


def test_an_output_folder_that_cannot_be_is_refused_before_anything_is_loaded(train, tmp_path, capsys, monkeypatch):
    """Goes red if a person waits for data and weights first."""
    monkeypatch.setattr("psft.models.load_tokenizer", lambda *args, **kwargs: pytest.fail("loaded"))
    (tmp_path / "file").write_text("x")
    assert train("--output_dir", str(tmp_path / "file" / "run")) == 2
    assert "file is a file. Choose another --output_dir" in capsys.readouterr().err


def test_a_misspelt_key_of_a_recipe_gets_the_nearest_name(train, tmp_path, capsys):
    (tmp_path / "mine.yaml").write_text("epsilon_hihg: 0.2\n")
    assert main(["train", str(tmp_path / "mine.yaml")]) == 2
    assert "epsilon_high" in capsys.readouterr().err


def test_skipped_rows_are_recorded_with_line_and_reason(train, demonstrations_path, tmp_path):
    with demonstrations_path.open("a") as file:
        file.write("not json\n")
    assert train("--on_bad_row", "skip") == 0
    (row,) = map(json.loads, (tmp_path / "run" / "rejected.jsonl").open())
    assert row["line"] == 13 and row["reason"]


def test_the_second_run_reads_what_the_first_has_prepared_and_says_so(train, demonstrations_path, tmp_path, capsys):
    """Goes red if the cache is not used, not mentioned, used against the flag, or gives other rows."""
    cache = ["--data_cache_dir", str(tmp_path / "cache"), "--eval_dataset", f"clips={demonstrations_path}"]
    once = f"prepared before, read from {tmp_path / 'cache'}"
    assert train(*cache, "--max_steps", "1") == 0
    first = capsys.readouterr().out
    assert first.count(once) == 1  # the held-out rows are the training rows here
    for flags, count in (cache, 2), (["--no_data_cache", *cache[2:]], 0):
        folder = ["--output_dir", str(tmp_path / f"again{count}")]
        assert train(*flags, *folder, "--max_steps", "1") == 0
        assert capsys.readouterr().out.count("prepared before") == count
    rows = [(tmp_path / name / "metrics.jsonl").read_text() for name in ("run", "again2", "again0")]
    losses = [[json.loads(line)["loss"] for line in text.splitlines()] for text in rows]
    assert losses[0] == losses[1] == losses[2]
    assert train("--no_data_cache", *cache, "--output_dir", str(tmp_path / "no")) == 2
    assert "data_cache_dir has no effect with no_data_cache" in capsys.readouterr().err
