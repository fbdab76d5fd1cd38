"""Laws of a training run, on a tiny model."""

import json
from pathlib import Path

import pytest
import torch

from psft import PSFTConfig
from psft.errors import RequestError


def rows_of(trainer, name="metrics.jsonl"):
    return [json.loads(line) for line in (Path(trainer.args.output_dir) / name).read_text().splitlines()]


def weights_of(trainer):
    return {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}


def largest_difference(one, other):
    return max((one[name] - other[name]).abs().max().item() for name in one)


def test_one_mini_batch_per_window_trains_the_weights_of_plain_sft_to_the_bit(make_trainer, caplog):
    """Goes red if the first mini-batch is scored again, or if the ratio is multiplied by anything but 1."""
    psft = make_trainer("psft", train_batch_size=8, mini_batch_size=8, max_steps=4)
    assert "plain SFT" in caplog.text
    psft.train()
    sft = make_trainer("sft", train_batch_size=8, mini_batch_size=8, max_steps=4, objective="sft")
    sft.train()
    assert largest_difference(weights_of(psft), weights_of(sft)) == 0.0
    assert largest_difference(weights_of(psft), weights_of(make_trainer("new"))) > 0.0


def test_later_mini_batches_are_clipped_against_the_policy_at_window_start(make_trainer):
    """Goes red if old log-probs are refreshed every mini-batch (clip_fraction 0) or never (windows do not matter)."""
    trainer = make_trainer(max_steps=8)
    trainer.train()
    rows = rows_of(trainer)
    assert [(r["window"], r["mini_batch"]) for r in rows] == [(w, k) for w in range(2) for k in range(1, 5)]
    for row in rows:
        if row["mini_batch"] == 1:
            assert row["log_ratio_abs_max"] == 0.0 and row["clip_fraction"] == 0.0
            assert row["loss"] == pytest.approx(-1.0, abs=1e-6)
        else:
            assert row["log_ratio_abs_max"] > 1e-3
    assert max(r["clip_fraction"] for r in rows) > 0.05


def test_the_ratio_is_that_of_a_frozen_copy_of_the_model_at_window_start(make_trainer, make_tiny_model):
    """Goes red if an old pass runs after an update, on other rows, or in another order than training."""
    trainer = make_trainer(max_steps=3, train_batch_size=12, mini_batch_size=4)
    seen = []
    bound_objective = trainer._bound_objective

    def spy(number, micro_batch, normalizer):
        bound, old_logps = bound_objective(number, micro_batch, normalizer)
        assert bound.constants.get("old_logps") is old_logps
        seen.append((micro_batch["labels"][:, 1:] != -100, None if old_logps is None else old_logps.clone()))
        return bound, old_logps

    trainer._bound_objective = spy
    trainer.train()
    frozen = make_tiny_model()
    order = trainer.get_train_dataloader()
    order.set_epoch(0)
    expected = []
    for number, batch in zip(range(3), order, strict=False):
        for micro in batch["micro_batches"]:
            logits = frozen(input_ids=micro["input_ids"], attention_mask=micro["attention_mask"]).logits[:, :-1]
            labels = micro["labels"][:, 1:]
            logps = logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
            expected.append((labels != -100, None if number == 0 else logps))
    assert len(seen) == len(expected) > 3
    for (mask, old), (want_mask, want) in zip(seen, expected, strict=True):
        assert torch.equal(mask, want_mask)
        assert (old is None) == (want is None)
        if want is not None:
            torch.testing.assert_close(old[mask], want[mask], rtol=0, atol=2e-5)


@pytest.mark.parametrize("objective", ["psft", "sft"])
def test_how_a_step_is_cut_into_micro_batches_changes_nothing(make_trainer, objective):
    """Goes red if a loss is averaged inside each micro-batch instead of over the tokens of the step."""
    runs = []
    for cap in (256, 128, 32):
        trainer = make_trainer(f"cap{cap}", max_tokens_per_micro_batch=cap, objective=objective, learning_rate=1e-3)
        trainer.train()
        runs.append(rows_of(trainer))
    for row in zip(*runs, strict=True):
        for field in ("loss", "nll", "entropy", "grad_norm"):
            assert row[1][field] == pytest.approx(row[0][field], rel=1e-6, abs=1e-7)
            assert row[2][field] == pytest.approx(row[0][field], rel=1e-5, abs=1e-7)
        assert row[0]["tokens"] == row[1]["tokens"] == row[2]["tokens"]


def test_loss_and_gradient_of_a_step_are_those_of_cross_entropy_over_its_tokens(make_trainer, make_tiny_model):
    """Goes red if labels are shifted twice, prompt tokens count, or padding counts."""
    trainer = make_trainer(objective="sft", max_steps=1, train_batch_size=8, mini_batch_size=8, max_grad_norm=1e9)
    trainer.train()
    (row,) = rows_of(trainer)
    loader = trainer.get_train_dataloader()
    loader.set_epoch(0)
    model = make_tiny_model().double()
    total, count = 0.0, 0
    for micro in next(iter(loader))["micro_batches"]:
        logits = model(input_ids=micro["input_ids"], attention_mask=micro["attention_mask"]).logits[:, :-1]
        labels = micro["labels"][:, 1:]
        total = total + torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
        count += (labels != -100).sum().item()
    (total / count).backward()
    norm = torch.sqrt(sum(p.grad.square().sum() for p in model.parameters())).item()
    assert row["tokens"] == count
    assert row["loss"] == pytest.approx((total / count).item(), rel=1e-5)
    assert row["nll"] == pytest.approx((total / count).item(), rel=1e-5)
    assert row["grad_norm"] == pytest.approx(norm, rel=1e-4)


def test_dropout_is_off_for_psft_and_a_disagreement_of_the_passes_stops_the_run(make_trainer, make_tiny_model, caplog):
    """Goes red if dropout stays on, or if the comparison of the two passes is skipped."""
    trainer = make_trainer("off", model=make_tiny_model(attention_dropout=0.5))
    assert "dropout is off" in caplog.text
    trainer.train()
    noisy = make_trainer("noisy")
    noisy.model.model.layers[0].mlp.act_fn = torch.nn.Sequential(
        noisy.model.model.layers[0].mlp.act_fn, torch.nn.Dropout(0.2)
    )
    with pytest.raises(RequestError, match=r"dropout is active.*allow_ratio_noise"):
        noisy.train()
    summary = json.loads((Path(noisy.args.output_dir) / "summary.json").read_text())
    assert summary["exit_reason"].startswith("failed") and summary["steps"] == 0
    allowed = make_trainer("allowed", allow_ratio_noise=True, max_steps=2)
    allowed.model.model.layers[0].mlp.act_fn = torch.nn.Sequential(
        allowed.model.model.layers[0].mlp.act_fn, torch.nn.Dropout(0.2)
    )
    allowed.train()
    assert "nats on average" in caplog.text


def test_a_lora_run_trains_the_adapter_and_leaves_the_base_alone(make_trainer):
    """Goes red if the head patch is put on the wrapper and bypasses the adapter."""
    from peft import LoraConfig

    trainer = make_trainer(peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"]), max_steps=8)
    before = weights_of(trainer)
    trainer.train()
    changed = {name for name, value in weights_of(trainer).items() if not torch.equal(value, before[name])}
    assert changed and all("lora_" in name for name in changed)
    rows = rows_of(trainer)
    assert rows[1]["log_ratio_abs_max"] > 0


def test_gradient_checkpointing_keeps_the_numbers(make_trainer):
    plain, checkpointed = make_trainer("plain"), make_trainer("gc", gradient_checkpointing=True)
    plain.train(), checkpointed.train()
    for one, other in zip(rows_of(plain), rows_of(checkpointed), strict=True):
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-6)


def test_held_out_nll_and_entropy_are_token_means_per_named_data_set(make_trainer, make_tiny_model, demonstrations):
    """Goes red if batches are averaged without their token counts (lengths differ, so it shows)."""
    trainer = make_trainer(
        eval_dataset={"one": demonstrations, "two": demonstrations.select(range(3))},
        eval_strategy="steps", eval_steps=4, eval_on_start=True, per_device_eval_batch_size=3, max_steps=4,
    )  # fmt: skip
    trainer.train()
    model = make_tiny_model().double()
    sums = torch.zeros(2, dtype=torch.float64)
    count = 0
    for row in demonstrations:
        logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1]
        labels = torch.tensor(row["labels"][1:])
        logp = logits.log_softmax(-1)[labels != -100]
        sums[0] -= logp.gather(1, labels[labels != -100][:, None]).sum().detach()
        sums[1] -= (logp.exp() * logp).sum().detach()
        count += (labels != -100).sum().item()
    rows = {(r["step"], r["benchmark"], r["metric"]): r for r in rows_of(trainer, "eval.jsonl")}
    assert set(rows) == {(s, b, m) for s in (0, 4) for b in ("one", "two") for m in ("nll", "entropy")}
    assert rows[0, "one", "nll"]["value"] == pytest.approx(sums[0].item() / count, rel=1e-5)
    assert rows[0, "one", "entropy"]["value"] == pytest.approx(sums[1].item() / count, rel=1e-5)
    assert rows[0, "one", "nll"]["n"] == count
    assert rows[4, "one", "nll"]["value"] < rows[0, "one", "nll"]["value"]


def test_warm_up_is_plain_sft_with_its_own_batch_and_rate_then_psft(make_trainer):
    """Goes red if warm-up steps take mini_batch_size rows, share a window, or keep their learning rate afterwards."""
    trainer = make_trainer(
        sft_warmup_steps=2, sft_warmup_mini_batch_size=8, sft_warmup_learning_rate=3e-3, learning_rate=1e-3, max_steps=6
    )
    trainer.train()
    rows = rows_of(trainer)
    assert [r["stage"] for r in rows] == ["warmup"] * 2 + ["train"] * 4
    assert [r["learning_rate"] for r in rows] == pytest.approx([3e-3] * 2 + [1e-3] * 4)
    assert rows[0]["loss"] == pytest.approx(rows[0]["nll"], rel=1e-6) and rows[2]["loss"] == pytest.approx(-1, abs=1e-6)
    assert [r["mini_batch"] for r in rows] == [1, 1, 1, 2, 3, 4]


def test_after_the_warm_up_the_optimizer_starts_anew_only_if_asked(make_trainer, make_tiny_model):
    """Against two AdamW loops in plain PyTorch, one that is made anew at the switch. Goes red if the option does
    nothing, acts at another step, or is not in run.json."""
    settings = {
        "sft_warmup_steps": 2, "sft_warmup_mini_batch_size": 8, "sft_warmup_learning_rate": 3e-3,
        "learning_rate": 1e-2, "max_steps": 4, "weight_decay": 0.1, "max_grad_norm": 1e9,
    }  # fmt: skip
    for state in ("keep", "reset"):
        trainer = make_trainer(state, model=make_tiny_model().double(), sft_warmup_optimizer_state=state, **settings)
        trainer.train()
        info = json.loads((Path(trainer.args.output_dir) / "run.json").read_text())
        assert info["warmup"] == {
            "steps": 2, "mini_batch_size": 8, "learning_rate": 3e-3, "optimizer_state": state
        }  # fmt: skip
        loader = trainer.get_train_dataloader()
        loader.set_epoch(0)
        model = make_tiny_model().double()
        decayed = [p for p in model.parameters() if p.ndim > 1]
        groups = [{"params": decayed}, {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0}]

        def new_optimizer(groups=groups):
            return torch.optim.AdamW([dict(group) for group in groups], lr=1e-2, weight_decay=0.1)

        optimizer = new_optimizer()
        old = None
        for step, batch in zip(range(4), loader, strict=False):
            if step == 2 and state == "reset":
                optimizer = new_optimizer()
            for group in optimizer.param_groups:
                group["lr"] = 3e-3 if step < 2 else 1e-2
            optimizer.zero_grad()
            logps = [logps_of(model, micro) for micro in batch["micro_batches"]]
            count = sum(len(x) for x in logps)
            if step == 2:
                old = {k: v.detach().clone() for k, v in model.state_dict().items()}
            if step == 3:
                frozen = make_tiny_model().double()
                frozen.load_state_dict(old)
                ratios = [
                    (new - logps_of(frozen, m).detach()).exp()
                    for new, m in zip(logps, batch["micro_batches"], strict=True)
                ]
                (-sum(r.clamp(max=1.28).sum() for r in ratios) / count).backward()
            else:
                (-sum(x.sum() for x in logps) / count).backward()
            optimizer.step()
        want = dict(model.named_parameters())
        assert largest_difference(weights_of(trainer), want) < 1e-5
    assert info["warmup"]["optimizer_state"] == "reset"
    reset = weights_of(trainer)
    kept = make_trainer("kept", model=make_tiny_model().double(), **settings)
    kept.train()
    assert largest_difference(reset, weights_of(kept)) > 1e-3
    assert json.loads((Path(kept.args.output_dir) / "run.json").read_text())["warmup"]["optimizer_state"] == "keep"


def logps_of(model, micro):
    """(N,) log-probs of a micro-batch's trained tokens, from full logits."""
    logits = model(input_ids=micro["input_ids"], attention_mask=micro["attention_mask"]).logits[:, :-1]
    labels = micro["labels"][:, 1:]
    return logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0][labels != -100]


def test_a_run_with_max_steps_reaches_them_although_warm_up_epochs_are_short(make_trainer):
    """Goes red if the number of epochs is reckoned from an epoch without warm-up: 32 rows, 2 warm-up steps of 16."""
    trainer = make_trainer(sft_warmup_steps=2, max_steps=9)
    trainer.train()
    rows = rows_of(trainer)
    assert [r["stage"] for r in rows] == ["warmup"] * 2 + ["train"] * 7


def test_an_objective_of_the_users_own_is_found_by_import_path(make_trainer, tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(
        "def half(logps, completion_mask, *, normalizer):\n"
        "    return -0.5 * (logps * completion_mask).sum() / normalizer\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    mine = make_trainer("mine", objective="mine:half", max_steps=1)
    mine.train()
    (row,) = rows_of(mine)
    assert row["loss"] == pytest.approx(0.5 * row["nll"], rel=1e-6)
    assert row["clip_fraction"] is None


def test_an_output_folder_that_holds_a_run_is_left_alone(make_trainer):
    make_trainer(max_steps=1).train()
    again = make_trainer(max_steps=1)
    with pytest.raises(RequestError, match="holds another run"):
        again.train()
    assert len(rows_of(again)) == 1
    make_trainer(max_steps=2, overwrite_output_dir=True).train()
    assert len(rows_of(again)) == 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mini_batch_size": 5}, "does not divide train_batch_size=16.*Use mini_batch_size=4"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor"),
        ({"loss_type": "dft"}, "objective='dft'"),
        ({"epsilon_high": 0.0}, "epsilon_high"),
        ({"train_sampling_strategy": "group_by_length"}, "train_sampling_strategy"),
        ({"objective": "psfd"}, "Did you mean 'psft'"),
        ({"sft_warmup_learning_rate": 1e-5}, "no effect without sft_warmup_steps"),
        ({"sft_warmup_optimizer_state": "reset"}, "no effect without sft_warmup_steps"),
        ({"sft_warmup_steps": 2, "sft_warmup_optimizer_state": "halve"}, "keep or reset"),
        ({"objective": "sft", "epsilon_high": 0.28}, "epsilon_high=0.28 has no effect for objective 'sft'"),
        ({"objective": "dft", "kl_coef": 0.1}, "kl_coef=0.1 has no effect for objective 'dft'"),
        ({"objective": "sft", "allow_ratio_noise": True}, "allow_ratio_noise has no effect"),
        ({"ref_model_name_or_path": "."}, "ref_model_name_or_path has no effect for objective 'psft'"),
        ({"objective": "asft", "ref_cache_dir": "."}, "streamed, not cached"),
        ({"objective_settings": {"epsilon_high": 0.2}}, "'psft' has settings by name"),
        ({"compute_loss_func": print}, "compute_loss_func"),
        ({"per_device_train_batch_size": 3, "mini_batch_size": 4}, "contradicts"),
    ],
)
def test_what_cannot_be_combined_is_refused_by_name(make_trainer, settings, message):
    with pytest.raises(RequestError, match=message):
        make_trainer(**settings)


def test_a_data_set_without_rows_is_refused_in_words(make_trainer, demonstrations):
    """Goes red if TRL looks at its first row: StopIteration, without a word."""
    with pytest.raises(RequestError, match="the training set has no rows"):
        make_trainer(train_dataset=demonstrations.select([]))


def test_a_streaming_data_set_is_refused(make_trainer, demonstrations):
    with pytest.raises(RequestError, match="streaming"):
        make_trainer(train_dataset=demonstrations.to_iterable_dataset())


def test_all_problems_of_a_configuration_come_together(tmp_path):
    with pytest.raises(RequestError, match="(?s)epsilon_high.*label_smoothing_factor"):
        PSFTConfig(
            output_dir=str(tmp_path), epsilon_high=-1.0, label_smoothing_factor=0.1, bf16=False, report_to="none"
        )


def test_pure_bfloat16_weights_are_refused_unless_forced(make_trainer, make_tiny_model):
    with pytest.raises(RequestError, match="rounded away"):
        make_trainer(model=make_tiny_model().bfloat16())
    make_trainer("forced", model=make_tiny_model().bfloat16(), force_pure_bf16=True)


def test_a_sequence_over_the_hard_cap_is_an_error_that_names_both_numbers(make_trainer):
    with pytest.raises(RequestError, match=r"max_tokens_per_micro_batch=8 .* hard cap.* tokens"):
        make_trainer(max_tokens_per_micro_batch=8).train()


def test_trl_batch_arithmetic_becomes_the_mini_batch(tmp_path):
    args = PSFTConfig(
        output_dir=str(tmp_path),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=3,
        bf16=False,
        report_to="none",
    )
    assert (args.mini_batch_size, args.train_batch_size) == (6, 48)
    default = PSFTConfig(output_dir=str(tmp_path), bf16=False, report_to="none")
    assert (default.mini_batch_size, default.train_batch_size) == (32, 256)
