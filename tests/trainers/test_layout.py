"""Sequences within a micro-batch, and the two ways to average a loss."""

import json
from pathlib import Path

import pytest
import torch

from psft.errors import RequestError
from psft.trainers.layout import aggregation_normalizer, row_sums, sequence_ids


def test_a_padded_row_is_one_sequence_and_a_padding_free_row_holds_several():
    """Goes red if targets are numbered by the token before them: the first of a sequence would join its neighbour."""
    padded = {"labels": torch.zeros(2, 4), "attention_mask": torch.ones(2, 4)}
    assert sequence_ids(padded).tolist() == [[0, 0, 0], [1, 1, 1]]
    packed = {"labels": torch.zeros(1, 6), "position_ids": torch.tensor([[0, 1, 2, 0, 1, 0]])}
    assert sequence_ids(packed).tolist() == [[0, 0, 1, 1, 2]]
    both = {**padded, "position_ids": torch.tensor([[0, 1, 2, 3], [0, 1, 2, 3]])}
    assert torch.equal(sequence_ids(both), sequence_ids(padded))


def test_the_two_aggregations_give_what_was_worked_out_for_verl():
    """Four sequences of 10, 10, 10 and 1000 tokens in two micro-batches, losses 2 (short) and 1 (long) per token.

    Global: (30 x 2 + 1000) / 1030 = 1.029. verl 0.5: mean of 2 and (20 + 1000) / 1010 ... = (2 + 1.0099) / 2 = 1.505
    for pairs of equal rows; with the three short rows together and the long one alone, 3/4 x 2 + 1/4 x 1 = 1.75.
    Goes red if shares are counted in tokens, or a micro-batch of rows is not weighted by them.
    """
    tokens = torch.tensor(1030)
    short, long = torch.ones(3, 10, dtype=torch.bool), torch.ones(1, 1000, dtype=torch.bool)

    def total(aggregation):
        parts = [(2.0 * short.sum(), short, 0.75), (1.0 * long.sum(), long, 0.25)]
        return sum(
            value / aggregation_normalizer(aggregation, mask, num_tokens=tokens, share=share, world_size=1)
            for value, mask, share in parts
        ).item()

    assert total("token_mean_global") == pytest.approx(1060 / 1030)
    assert total("micro_batch_token_mean") == pytest.approx(1.75)


def rows_of(trainer, name="metrics.jsonl"):
    return [json.loads(line) for line in (Path(trainer.args.output_dir) / name).read_text().splitlines()]


def test_the_mean_of_micro_batches_depends_on_the_cut_and_its_metrics_do_not(make_trainer):
    """Goes red if the option changes nothing, or if NLL, entropy and clip fraction are averaged that way too."""
    runs = {}
    for cap in (32, 256):
        for aggregation in ("token_mean_global", "micro_batch_token_mean"):
            trainer = make_trainer(
                f"{aggregation}{cap}", max_tokens_per_micro_batch=cap, loss_aggregation=aggregation, objective="sft",
                max_steps=1,
            )  # fmt: skip
            trainer.train()
            runs[aggregation, cap] = rows_of(trainer)[0]
    whole = runs["token_mean_global", 256]
    assert runs["token_mean_global", 32]["loss"] == pytest.approx(whole["loss"], rel=1e-6)
    assert runs["micro_batch_token_mean", 256]["loss"] == pytest.approx(whole["loss"], rel=1e-6)  # one micro-batch
    cut = runs["micro_batch_token_mean", 32]
    assert abs(cut["loss"] - whole["loss"]) > 1e-3
    assert cut["nll"] == pytest.approx(whole["nll"], rel=1e-6)


def test_the_mean_of_micro_batches_is_the_formula_of_verl(make_trainer, make_tiny_model):
    """loss = sum over micro-batches of (rows of it / rows) x (mean over its tokens), from full logits in float64."""
    trainer = make_trainer(
        max_tokens_per_micro_batch=40, loss_aggregation="micro_batch_token_mean", objective="sft", max_steps=1
    )
    trainer.train()
    loader = trainer.get_train_dataloader()
    loader.set_epoch(0)
    batch = next(iter(loader))
    model = make_tiny_model().double()
    want = 0.0
    for micro in batch["micro_batches"]:
        logits = model(input_ids=micro["input_ids"], attention_mask=micro["attention_mask"]).logits[:, :-1]
        mean = torch.nn.functional.cross_entropy(logits.flatten(0, 1), micro["labels"][:, 1:].flatten())
        want += mean.item() * len(micro["input_ids"]) / batch["num_rows"]
    assert len(batch["micro_batches"]) > 1
    assert rows_of(trainer)[0]["loss"] == pytest.approx(want, rel=1e-5)


def test_an_unknown_aggregation_is_refused(make_trainer):
    with pytest.raises(RequestError, match="loss_aggregation=mean must be one of token_mean_global"):
        make_trainer(loss_aggregation="mean")


@pytest.mark.parametrize("multiple", [None, 16])
def test_held_out_rows_are_counted_one_by_one(multiple, make_trainer, demonstrations):
    """Goes red if a joined row of five counts as one: its standard error would be of batches."""
    results = {}
    for name, settings in {
        "padded": {},
        "joined": {"padding_free": True, "max_length": None, "pad_to_multiple_of": multiple},
    }.items():
        trainer = make_trainer(name, eval_dataset=demonstrations, per_device_eval_batch_size=5, **settings)
        trainer.recorder.is_claimed = True
        trainer.recorder.folder.path.mkdir(exist_ok=True)
        trainer.evaluate()
        results[name] = rows_of(trainer, "eval.jsonl")
    for one, other in zip(results["padded"], results["joined"], strict=True):
        assert other["n"] == one["n"]
        assert other["value"] == pytest.approx(one["value"]) and other["stderr"] == pytest.approx(one["stderr"])


def test_sums_by_row_leave_out_what_fills_a_joined_row_up():
    """A last row of one token is a row, unless zeros follow that fill the joined row up."""
    joined = {"position_ids": torch.tensor([[0, 1, 2, 0, 1, 0, 0]]), "labels": torch.zeros(1, 7)}
    values = torch.tensor([[1.0, 2.0, 0.0, 4.0, 0.0, 0.0]])
    assert row_sums(values, joined, is_filled_up=True).tolist() == [3.0, 4.0]
    assert row_sums(values, joined).tolist() == [3.0, 4.0, 0.0, 0.0]
    assert row_sums(values, {"attention_mask": None}).tolist() == [7.0]
