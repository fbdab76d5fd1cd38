"""What `psft plan` says of micro-batches is what training does."""

import json

import pytest

from psft.cli.plan import run
from psft.cli.plan_batches import padding
from psft.cli.train import prepare_run, read_request
from psft.errors import RequestError
from psft.models.attention import ChosenAttention
from psft.trainers.remembered_cap import RememberedCap, caps_folder, write_cap


@pytest.fixture
def request_of(tiny_model_path, tmp_path, monkeypatch):
    """request_of(*flags) -> arguments for the tiny model and ten rows of unequal length."""
    monkeypatch.setenv("PSFT_CACHE", str(tmp_path / "cache"))
    data = tmp_path / "data.jsonl"
    rows = ({"question": "How many clips? " * (n % 5 + 1), "answer": "It is 3. " * (n % 3 + 1)} for n in range(10))
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    request = ["--model_name_or_path", str(tiny_model_path), "--dataset", str(data), "--train_batch_size", "8"]
    request += ["--mini_batch_size", "4", "--output_dir", str(tmp_path / "run"), "--report_to", "none"]
    return lambda *flags: [*request, *flags]


def line_of(out, name):
    (line,) = [line.strip() for line in out.splitlines() if line.strip().startswith(name)]
    return line.removeprefix(name).strip()


def test_plan_shows_the_rule_and_a_cap_that_a_run_has_lowered(request_of, capsys):
    """Goes red if plan and trainer name the model, the data or the objective differently."""
    assert run(request_of()) == 0
    out = capsys.readouterr().out
    assert line_of(out, "largest micro-batch").startswith("auto: 1024 padded tokens on this CPU")
    trainer = prepare_run(read_request(request_of(), command="train")).trainer
    trainer.micro_batch_cap.begin()
    write_cap(caps_folder(), RememberedCap(77, trainer.micro_batch_cap.depends_on, lowered_from=1024))
    capsys.readouterr()
    assert run(request_of()) == 0
    out = capsys.readouterr().out
    assert line_of(out, "largest micro-batch") == "auto: 77 padded tokens, lowered since memory ran out on cpu"
    for other in (["--objective", "gem"], ["--gradient_checkpointing", "false"], ["--mini_batch_size", "8"]):
        assert run(request_of(*other)) == 0
        assert "77 padded tokens" not in capsys.readouterr().out, other
    assert run(request_of("--max_tokens_per_micro_batch", "200")) == 0
    assert line_of(capsys.readouterr().out, "largest micro-batch") == "200 padded tokens"


def test_the_padding_shown_is_the_padding_of_training(make_trainer, request_of, capsys):
    """Goes red if plan cuts in another way or order than the trainer, or counts a rank twice."""
    trainer = make_trainer(max_tokens_per_micro_batch=60, train_batch_size=16, mini_batch_size=8)
    loader = trainer.get_train_dataloader()
    loader.set_epoch(0)
    micro_batches = [micro_batch for batch in loader for micro_batch in batch["micro_batches"]]
    computed = sum(micro_batch["input_ids"].numel() for micro_batch in micro_batches)
    real = sum(int(micro_batch["attention_mask"].sum()) for micro_batch in micro_batches)
    share, number = padding(trainer.row_lengths, trainer.args, 60, on_cpu=True, num_ranks=1)
    assert share == 1 - real / computed > 0
    assert number == len(micro_batches) / 4 > 1
    assert padding(trainer.row_lengths, trainer.args, 60, on_cpu=True, num_ranks=4)[1] < number
    assert run(request_of()) == 0
    out = capsys.readouterr().out
    assert "slower on a CPU" in line_of(out, "padding  ") and "at 8192 tokens" in line_of(out, "on an accelerator")
    assert run(request_of("--padding_free", "true")) == 0
    assert line_of(capsys.readouterr().out, "padding  ").startswith("none")


def test_the_layout_and_its_attention_are_said(request_of, capsys, monkeypatch):
    """Goes red if plan and training would choose differently: both ask choose_attention the same."""
    assert run(request_of()) == 0
    assert line_of(capsys.readouterr().out, "layout").startswith("padded rows; attention: as transformers chooses")
    assert run(request_of("--padding_free", "true", "--attn_implementation", "eager")) == 0
    layout = line_of(capsys.readouterr().out, "layout")
    assert layout.startswith("joined rows (padding_free); attention: eager; on a CPU it computes the whole square")
    asked = []

    def choose(requested, folder, **how):
        asked.append((requested, folder, how))
        return ChosenAttention("psft_varlen", "padding_free: attention is psft_varlen (torch 2.13)")

    monkeypatch.setattr("psft.models.attention.choose_attention", choose)
    assert run(request_of("--padding_free", "true")) == 0
    layout = line_of(capsys.readouterr().out, "layout")
    assert layout == "joined rows (padding_free); attention is psft_varlen (torch 2.13)"
    trainer = prepare_run(read_request(request_of("--padding_free", "true"), command="train")).trainer
    assert asked[0] == asked[1] and trainer.attention == "psft_varlen"
    assert "attention is psft_varlen" in capsys.readouterr().out


def test_an_attention_that_the_machine_cannot_train_is_refused_by_plan_too(request_of):
    with pytest.raises(RequestError, match="attn_implementation=flash_attention_2 cannot be trained on a CPU"):
        run(request_of("--attn_implementation", "flash_attention_2"))
