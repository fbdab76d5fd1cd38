"""DPO as a stage: the loss against equations written out in float64, however a step is cut, and its records."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from psft.errors import RequestError, RunFailed

BETA = 0.3
TIMINGS = {"tokens_per_second", "peak_memory_bytes"}


def make_pairs(number: int = 12, seed: int = 4) -> Any:
    """Pairs of unequal length, already tokenised: prompts of 2 to 6 tokens, answers of 1 to 11."""
    from datasets import Dataset

    generator = torch.Generator().manual_seed(seed)

    def ids(low: int, high: int) -> list[int]:
        length = int(torch.randint(low, high, (), generator=generator))
        return torch.randint(3, 400, (length,), generator=generator).tolist()

    return Dataset.from_list(
        [{"prompt_ids": ids(2, 7), "chosen_ids": ids(1, 12), "rejected_ids": ids(1, 12)} for _ in range(number)]
    )


@pytest.fixture
def make_dpo(tmp_path, make_tiny_model, tiny_tokenizer):
    """make_dpo(name="run", model=None, ...) -> DPOStageTrainer, tiny, float32, CPU, 12 pairs in steps of 4."""

    def make(name: str = "run", model: Any = None, train_dataset: Any = None, **settings: Any) -> Any:
        from psft import DPOStageConfig, DPOStageTrainer

        own = {
            key: settings.pop(key)
            for key in ("ref_model", "peft_config", "callbacks", "eval_dataset")
            if key in settings
        }
        defaults = {
            "output_dir": str(tmp_path / name), "train_batch_size": 4, "learning_rate": 1e-2, "beta": BETA,
            "lr_scheduler_type": "constant", "max_steps": 6, "bf16": False, "gradient_checkpointing": False,
            "report_to": "none", "logging_steps": 1, "save_strategy": "no", "disable_tqdm": True, "seed": 3,
            "max_tokens_per_micro_batch": 80, "probe_every": 0,
        }  # fmt: skip
        return DPOStageTrainer(
            model=make_tiny_model() if model is None else model,
            args=DPOStageConfig(**{**defaults, **settings}),
            train_dataset=make_pairs() if train_dataset is None else train_dataset,
            processing_class=tiny_tokenizer,
            **own,
        )

    return make


def rows_of(trainer: Any, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    lines = (Path(trainer.args.output_dir) / name).read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key not in TIMINGS} for line in lines]


def weights_of(trainer: Any) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}


def plain_dpo(model: Any, reference: Any, pairs: Any, beta: float) -> dict[str, Any]:
    """DPO from the paper's equation (Rafailov et al. 2023, eq. 7), one sequence and one token at a time, in float64.

    loss = mean over pairs of -log(1 / (1 + exp(-beta * ((log p/q of chosen) - (log p/q of rejected)))))
    """

    def logp(policy: Any, prompt: list[int], answer: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        ids = torch.tensor([prompt + answer])
        logits = policy(input_ids=ids).logits[0]
        total, entropy = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
        for place in range(len(prompt), ids.shape[1]):
            z = logits[place - 1].double()
            log_p = z - z.exp().sum().log()
            total = total + log_p[ids[0, place]]
            entropy = entropy - (log_p.exp() * log_p).sum().detach()
        return total, entropy

    losses, rewards, entropies, tokens = [], [], 0.0, 0
    for pair in pairs:
        sides = []
        for name in ("chosen_ids", "rejected_ids"):
            policy, entropy = logp(model, pair["prompt_ids"], pair[name])
            with torch.no_grad():
                base, _ = logp(reference, pair["prompt_ids"], pair[name])
            sides.append(beta * (policy - base))
            entropies, tokens = entropies + float(entropy), tokens + len(pair[name])
        losses.append(torch.log1p(torch.exp(-(sides[0] - sides[1]))))
        rewards.append((sides[0].item(), sides[1].item()))
    number = len(losses)
    return {
        "loss": torch.stack(losses).mean(),
        "rewards_chosen": sum(c for c, _ in rewards) / number,
        "rewards_rejected": sum(r for _, r in rewards) / number,
        "rewards_margin": sum(c - r for c, r in rewards) / number,
        "rewards_accuracy": sum(c > r for c, r in rewards) / number,
        "entropy": entropies / tokens,
        "tokens": tokens,
        "pairs": number,
    }


@pytest.mark.parametrize("precompute", [True, False])
@pytest.mark.parametrize("cap", [44, 80, 10_000])
def test_loss_gradient_and_metrics_are_those_of_the_equation(make_dpo, make_tiny_model, cap, precompute):
    """One step on 12 pairs of unequal length, the policy another than its reference, in float64.

    Goes red if a micro-batch weighs by its number instead of its pairs, the reference is the policy, prompts count,
    chosen and rejected change places, beta is left out, or padding is scored.
    """
    pairs = make_pairs()
    policy, reference = make_tiny_model(seed=1).double(), make_tiny_model(seed=0).double()
    expected = plain_dpo(policy, reference, pairs, BETA)
    expected["loss"].backward()
    gradients = {name: p.grad.clone() for name, p in policy.named_parameters()}
    policy.zero_grad()
    trainer = make_dpo(
        model=policy, ref_model=reference, train_dataset=pairs, train_batch_size=12, max_steps=1,
        max_tokens_per_micro_batch=cap, precompute_ref_log_probs=precompute, max_grad_norm=0.0,
    )  # fmt: skip
    found = {}

    class Gradients(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            found.update({name: p.grad.clone() for name, p in model.named_parameters()})

    trainer.add_callback(Gradients())
    trainer.train()
    (row,) = rows_of(trainer)
    for name in ("rewards_chosen", "rewards_rejected", "rewards_margin", "entropy"):
        assert row[name] == pytest.approx(expected[name], rel=1e-4), name
    assert row["loss"] == pytest.approx(expected["loss"].item(), rel=1e-4)
    assert row["rewards_accuracy"] == pytest.approx(expected["rewards_accuracy"])
    assert (row["pairs"], row["tokens"]) == (expected["pairs"], expected["tokens"])
    assert 0 < row["rewards_accuracy"] < 1 and abs(row["rewards_margin"]) > 1  # a case that could show a mistake
    for name, gradient in gradients.items():  # float32 training against float64: sums of a thousand terms
        assert torch.allclose(found[name].double(), gradient, rtol=1e-3, atol=1e-5 * gradient.abs().max()), name


def test_the_same_reference_scored_once_or_beside_the_policy(make_dpo):
    """Over two epochs the records agree, up to the rounding of other paddings. Goes red if log-probs are looked up
    under another pair's number, or the copy beside the policy is trained along with it."""
    runs = [make_dpo(f"run-{once}", precompute_ref_log_probs=once) for once in (True, False)]
    for trainer in runs:
        trainer.train()
    once, beside = map(rows_of, runs)
    assert len(once) == 6
    for one, other in zip(once, beside, strict=True):
        assert one.keys() == other.keys()
        for name, value in one.items():
            assert value == (
                pytest.approx(other[name], rel=1e-3, abs=1e-4) if isinstance(value, float) else other[name]
            )
    assert once[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)  # policy and reference are one
    assert once[-1]["rewards_margin"] > 1 and once[-1]["rewards_accuracy"] == 1


def test_under_lora_the_reference_is_the_model_without_its_adapter(make_dpo, make_tiny_model):
    """Goes red if the adapter is left on for the reference: the loss would stay at log 2 in both ways."""
    from peft import LoraConfig

    losses = []
    for once in (True, False):
        torch.manual_seed(5)
        lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
        trainer = make_dpo(f"run-{once}", peft_config=lora, precompute_ref_log_probs=once, learning_rate=5e-2)
        trainer.train()
        assert trainer.ref_model is None
        losses.append([row["loss"] for row in rows_of(trainer)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3) and losses[0][0] == pytest.approx(math.log(2), abs=1e-6)
    assert losses[0][-1] < 0.6


def test_every_pair_is_trained_once_an_epoch_whatever_is_left_over(make_dpo):
    """11 pairs in steps of 4: 4, 4, 3. Goes red if the last step weighs its pairs as if it were full, or drops them."""
    trainer = make_dpo(train_dataset=make_pairs(11), max_steps=-1, num_train_epochs=2.0)
    trainer.train()
    rows = rows_of(trainer)
    assert [row["pairs"] for row in rows] == [4, 4, 3, 4, 4, 3]
    assert [row["epoch"] for row in rows] == pytest.approx([1 / 3, 2 / 3, 1, 4 / 3, 5 / 3, 2])


def test_a_resumed_run_ends_in_the_same_bits(make_dpo, tmp_path):
    """Cut after step 1 and 3 (an epoch's end). Goes red if pairs are drawn in another order, the reference is scored by
    the checkpoint's weights, the schedule or the moments start anew, or rows of repeated steps stay."""
    settings = {"save_strategy": "steps", "save_steps": 1, "lr_scheduler_type": "cosine", "probe_every": 3}
    settings |= {
        "probe_max_new_tokens": 4,
        "eval_dataset": make_pairs(5, seed=9),
        "eval_strategy": "steps",
        "eval_steps": 2,
    }
    whole = make_dpo("whole", **settings)
    whole.train()
    for step in (1, 3):
        folder = tmp_path / f"cut{step}"
        shutil.copytree(whole.args.output_dir, folder)
        for path in folder.glob("checkpoint-*"):
            if int(path.name.split("-")[1]) > step:
                shutil.rmtree(path)
        again = make_dpo(f"cut{step}", resume=True, **settings)
        again.train()
        for name in ("metrics.jsonl", "probe.jsonl", "eval.jsonl"):
            assert rows_of(again, name) == rows_of(whole, name), (step, name)
        one, other = weights_of(again), weights_of(whole)
        assert all(torch.equal(one[name], other[name]) for name in other)
    assert {row["step"] for row in rows_of(whole, "eval.jsonl")} == {2, 4, 6}


def test_a_signal_writes_a_checkpoint_to_go_on_from(make_dpo):
    """Goes red if SIGTERM ends the run without one, or the run that goes on counts a step twice."""

    class Signalled(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 1:
                os.kill(os.getpid(), signal.SIGTERM)

    settings = {"save_strategy": "steps", "save_steps": 100}
    whole = make_dpo("whole", **settings)
    whole.train()
    stopped = make_dpo("stopped", callbacks=[Signalled()], **settings)
    stopped.train()
    assert stopped.state.global_step == 2 and stopped.stop_signal.exit_code == 143
    folder = Path(stopped.args.output_dir)
    assert json.loads((folder / "summary.json").read_text())["exit_reason"] == "interrupted"
    again = make_dpo("stopped", resume=True, **settings)
    again.train()
    assert rows_of(again) == rows_of(whole)


def test_another_run_is_not_resumed(make_dpo):
    """Goes red if a changed beta, batch size or data set goes unnoticed."""
    make_dpo(max_steps=2, save_strategy="steps", save_steps=1).train()
    changes = {"beta": 0.1, "train_batch_size": 6, "train_dataset": make_pairs(12, seed=8)}
    for name, value in changes.items():
        with pytest.raises(RequestError, match="not the run"):
            make_dpo(max_steps=4, resume=True, save_strategy="steps", **{name: value}).train()


def test_a_step_that_is_not_finite_is_passed_over_and_its_pairs_are_named(make_dpo):
    """Goes red if such a step changes weights, or a run of them goes on for ever."""
    trainer = make_dpo(learning_rate=1e30, max_grad_norm=0.0, max_bad_steps=2)
    with pytest.raises(RunFailed, match="2 steps in a row"):
        trainer.train()
    bad = json.loads((Path(trainer.args.output_dir) / "run.json").read_text())["bad_steps"]
    assert len(bad) == 2 and all(len(step["rows"]) == 4 for step in bad)


def test_rules_and_the_probe_see_a_stage(make_dpo):
    """Goes red if a metric of DPO cannot be asked for by a rule, or the probe is never measured."""
    trainer = make_dpo(probe_every=2, probe_max_new_tokens=4, stop_when=["rewards_margin>0.5"], max_steps=12)
    trainer.train()
    summary = json.loads((Path(trainer.args.output_dir) / "summary.json").read_text())
    assert summary["exit_reason"].startswith("stopped: rewards_margin>0.5") and summary["steps"] < 12
    probed = [row for row in rows_of(trainer, "probe.jsonl") if row["group"] == "all"]
    assert probed[0]["step"] == 0 and probed[0]["drift_nats_per_token"] == 0 and probed[-1]["drift_nats_per_token"] > 0


def test_the_run_folder_says_what_was_trained(make_dpo):
    trainer = make_dpo(max_steps=2, eval_dataset={"held": make_pairs(5, seed=9)}, eval_strategy="steps", eval_steps=1)
    trainer.train()
    info = json.loads((Path(trainer.args.output_dir) / "run.json").read_text())
    assert info["stage"] == "dpo"
    assert info["objective"] == {"name": "dpo", "settings": {"beta": BETA, "loss_type": ["sigmoid"]}}
    assert info["config"]["train_batch_size"] == 4 and info["reference"]["is_precomputed"]
    held = rows_of(trainer, "eval.jsonl")
    assert [(row["benchmark"], row["metric"], row["n"]) for row in held[:3]] == [
        ("held", "loss", 5), ("held", "rewards_margin", 5), ("held", "rewards_accuracy", 5)
    ]  # fmt: skip
    fields = (
        "step stage epoch pairs tokens loss entropy rewards_chosen rewards_rejected rewards_margin rewards_accuracy"
    )
    fields += " logps_chosen logps_rejected mean_token_accuracy grad_norm learning_rate"
    assert set(fields.split()) == set(rows_of(trainer)[0])


def test_held_out_values_are_those_of_the_equation(make_dpo, make_tiny_model):
    """Goes red if held-out pairs get the reference of the training pairs, or only the first micro-batch is counted."""
    held = make_pairs(7, seed=9)
    policy, reference = make_tiny_model(seed=1), make_tiny_model(seed=0)
    expected = plain_dpo(policy, reference, held, BETA)
    trainer = make_dpo(model=policy, ref_model=reference, eval_dataset=held, eval_strategy="steps", eval_steps=9,
                       eval_on_start=True, max_steps=1)  # fmt: skip
    trainer.train()
    found = {row["metric"]: row["value"] for row in rows_of(trainer, "eval.jsonl") if row["step"] == 0}
    assert found["loss"] == pytest.approx(expected["loss"].item(), rel=1e-4)
    for name in ("rewards_margin", "rewards_accuracy"):
        assert found[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-5)


def test_settings_of_the_paper_are_the_defaults():
    """Table 9. Goes red if a default of TRL's comes through."""
    from psft import DPOStageConfig

    config = DPOStageConfig(output_dir="unused")
    assert (config.beta, config.learning_rate, config.train_batch_size) == (0.01, 5e-7, 64)
    assert (config.num_train_epochs, config.max_length, config.loss_type) == (1.0, 4096, ["sigmoid"])
    assert DPOStageConfig(per_device_train_batch_size=4, gradient_accumulation_steps=8).train_batch_size == 32


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"train_batch_size": 32, "per_device_train_batch_size": 4}, "contradicts"),
        ({"truncation": "middle"}, "keep_start, llama_factory"),
        ({"loss_type": ["sft"]}, "mixes the pairs"),
        ({"beta": 0.0}, "greater than 0"),
        ({"padding_free": True}, "padding_free"),
        ({"sync_ref_model": True, "precompute_ref_log_probs": False}, "sync_ref_model"),
    ],
)
def test_settings_that_cannot_be_combined_are_refused(settings, message):
    from psft import DPOStageConfig

    with pytest.raises(RequestError, match=message):
        DPOStageConfig(output_dir="unused", **settings)


def test_a_pair_over_a_hard_cap_is_refused_before_the_first_step(make_dpo):
    with pytest.raises(RequestError, match="hard cap"):
        make_dpo(max_tokens_per_micro_batch=8).train()
