"""Every objective through the trainer: equal to a plain loop, and indifferent to how a step is cut or packed."""

import json
from pathlib import Path

import pytest
import torch
from equivalence.plain_loop import train as plain_train
from forms import FORMS, needs_cache
from pytest import approx

every_form = pytest.mark.parametrize("form", FORMS)


@pytest.fixture
def run_of(make_trainer, make_tiny_model, tmp_path):
    """run_of(form, name, **settings) -> rows of metrics.jsonl; eight steps of two windows, float64 weights."""

    def run(form, name, **settings):
        cache = {"ref_cache_dir": str(tmp_path / f"cache-{name}")} if needs_cache(form) else {}
        trainer = make_trainer(
            name, model=make_tiny_model().double(), objective=form.split("-")[0], learning_rate=1e-2,
            weight_decay=0.1, max_grad_norm=0.5, **cache, **FORMS[form], **settings,
        )  # fmt: skip
        trainer.train()
        lines = (Path(trainer.args.output_dir) / "metrics.jsonl").read_text().splitlines()
        return trainer, [json.loads(line) for line in lines]

    return run


@every_form
def test_a_run_is_that_of_the_plain_loop(form, run_of, make_tiny_model, demonstrations):
    """Forty lines of PyTorch with full logits, row by row, against windows, fused head, caches and micro-batches.

    Goes red if an old or reference log-prob meets another token, if the reference moves, or a setting is not passed.
    """
    trainer, rows = run_of(form, "trainer")
    loader = trainer.get_train_dataloader()
    loader.set_epoch(0)
    want = plain_train(
        make_tiny_model().double(), list(demonstrations), objective=form.split("-")[0], settings=FORMS[form],
        train_batch_size=16, mini_batch_size=4, learning_rate=1e-2, num_steps=8,
        order=list(loader.batch_sampler.mini_batches()), max_grad_norm=0.5,
        weight_decay=0.1,
    )  # fmt: skip
    assert len(rows) == len(want) == 8
    for got, plain in zip(rows, want, strict=True):
        for field in ("loss", "nll", "grad_norm"):
            # Old and reference log-probs are kept in float32, and Llama's norms compute in it: 1e-7 a step.
            assert got[field] == approx(plain[field], rel=1e-5, abs=1e-7), (got["step"], field)
    if form in ("psft", "psft_tv"):
        assert max(row["clip_fraction"] for row in rows) > 0.05, "the bound must act here"


@every_form
def test_micro_batch_cap_accumulation_and_layout_change_nothing(form, run_of):
    """Caps of 256, 64 and 40 tokens; TRL's accumulation over 1, 2 and 4 batches; padding-free instead of padded rows.

    Goes red if a loss is averaged inside a micro-batch, weights are spread by position, or packed sequences mix.
    """
    _, whole = run_of(form, "whole", max_tokens_per_micro_batch=256)
    others = {
        "cap64": {"max_tokens_per_micro_batch": 64},
        "cap40": {"max_tokens_per_micro_batch": 40},
        "packed": {"padding_free": True, "max_length": None, "max_tokens_per_micro_batch": 64},
    }
    for accumulation in (1, 2, 4):
        others[f"accumulation{accumulation}"] = {
            "mini_batch_size": None, "per_device_train_batch_size": 4 // accumulation,
            "gradient_accumulation_steps": accumulation,
        }  # fmt: skip
    for name, settings in others.items():
        _, rows = run_of(form, name, **settings)
        for one, other in zip(whole, rows, strict=True):
            assert one["tokens"] == other["tokens"]
            for field in ("loss", "nll", "entropy", "grad_norm", "token_weight", "clip_fraction"):
                if one.get(field) is not None:
                    assert other[field] == approx(one[field], rel=2e-6, abs=1e-7), (name, one["step"], field)


def test_the_forms_are_all_there_are():
    """Goes red if an objective is registered and not put to these tests."""
    from psft.objectives import objective_names

    assert {form.split("-")[0] for form in FORMS} == set(objective_names())
    assert torch.get_default_dtype() == torch.float32
