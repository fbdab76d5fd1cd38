"""The scoring forward: every way to the log-probs, both kernels, and heads whose weight is not all there is."""

import contextlib
import functools
import json
import sys
from pathlib import Path

import pytest
import torch
from forms import FORMS, needs_cache
from peft import LoraConfig, get_peft_model

from psft.errors import RequestError
from psft.objectives import resolve_objective
from psft.ops import IGNORE_INDEX, ReferenceLogits
from psft.trainers.bound_objective import BoundObjective
from psft.trainers.head import add_token_scoring
from psft.trainers.trl_kernel import choose_head_kernel

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
both_kernels = pytest.mark.parametrize("kernel", ["torch", "trl"])


def inputs():
    """Three rows of 12 tokens, the first three of each and the last four of one not trained: 23 are."""
    ids = torch.randint(3, 90, (3, 12), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[:, :3] = labels[-1, 8:] = IGNORE_INDEX
    return {"input_ids": ids, "labels": labels}


def plain_logps(model, ids, labels):
    """(B, T - 1) from the model's own logits, 0 where nothing is trained."""
    logps = model(input_ids=ids).logits[:, :-1].log_softmax(-1).gather(-1, labels[:, 1:].clamp(min=0)[..., None])
    return torch.where(labels[:, 1:] != IGNORE_INDEX, logps[..., 0], 0.0)


def metrics_of(trainer):
    return [json.loads(line) for line in (Path(trainer.args.output_dir) / "metrics.jsonl").read_text().splitlines()]


@both_kernels
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bf16-autocast"])
@pytest.mark.parametrize("case", ["tied", "untied", "checkpointing", "softcap"])
def test_old_pass_and_training_pass_give_the_same_bits(kernel, autocast, case, make_tiny_model):
    """At equal weights, whatever else is computed. Goes red if one of them casts, cuts or normalises differently."""
    model = make_tiny_model(tie_word_embeddings=case != "untied").train()
    if case == "softcap":
        model.config.final_logit_softcapping = 7.0
    if case == "checkpointing":
        model.gradient_checkpointing_enable()
    add_token_scoring(model, kernel)
    objective = BoundObjective(resolve_objective("psft", {}), normalizer=20)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        with torch.no_grad():
            old = [model(**inputs(), score_tokens=how) for how in ("logps", "statistics")]
        new = [
            model(**inputs(), score_tokens="statistics"),
            model(**inputs(), score_tokens="objective", objective=objective),
        ]
    for scored in (*old, *new):
        assert scored.logps.dtype == torch.float32 and torch.equal(scored.logps, old[0].logps)
        assert torch.equal(scored.mask, inputs()["labels"][:, 1:] != IGNORE_INDEX)
    for scored in (old[1], *new):
        assert torch.equal(scored.entropies, old[1].entropies) and torch.equal(scored.is_top1, old[1].is_top1)
    assert old[0].entropies is None and old[0].is_top1 is None
    assert (new[1].loss.item(), new[1].loss.requires_grad) == (pytest.approx(-23 / 20), True)  # 23 tokens of ratio 1


@both_kernels
def test_log_probs_and_gradients_are_those_of_the_models_own_logits(kernel, tiny_model):
    """Goes red if labels and states are one place apart, or the kernel's gradient is scaled."""
    add_token_scoring(tiny_model, kernel)
    objective = BoundObjective(resolve_objective("dft", {}), normalizer=20)
    scored = tiny_model(**inputs(), score_tokens="objective", objective=objective)
    want = plain_logps(tiny_model, *inputs().values())
    torch.testing.assert_close(scored.logps, want, rtol=1e-5, atol=1e-5)
    plain_loss = -(want.detach().exp() * want).sum() / 20
    torch.testing.assert_close(scored.loss, plain_loss, rtol=1e-5, atol=1e-6)
    parameters = list(tiny_model.parameters())
    for one, other in zip(*(torch.autograd.grad(x, parameters) for x in (scored.loss, plain_loss)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("kernel", "name"),
    [("torch", "psft"), ("torch", "sft_kl"), ("torch", "iw_sft"), ("trl", "psft"), ("trl", "iw_sft")],
)
def test_a_micro_batch_without_a_trained_token_gives_zero_gradients_to_all(kernel, name, tiny_model):
    """Goes red if the graph ends at the loss: ranks would wait for gradients that never come."""
    add_token_scoring(tiny_model, kernel)
    empty = {**inputs(), "labels": torch.full((3, 12), IGNORE_INDEX)}
    objective, constants, reference = resolve_objective(name, {}), {}, None
    if name == "iw_sft":
        constants = {"ref_logps": torch.zeros(3, 11), "sequence_ids": torch.zeros(3, 11, dtype=torch.long)}
    if name == "sft_kl":
        with torch.no_grad():
            rows = tiny_model(**empty, score_tokens="rows")
        reference = ReferenceLogits(rows.hidden, rows.weight)
    bound = BoundObjective(objective, 20, constants, reference)
    scored = tiny_model(**empty, score_tokens="objective", objective=bound)
    assert scored.loss.item() == 0 and set(scored.metrics) and not any(scored.metrics.values())
    scored.loss.backward()
    assert all(p.grad is not None and not p.grad.any() for p in tiny_model.parameters())


@pytest.mark.parametrize(
    "form", [form for form, settings in FORMS.items() if not resolve_objective(form.split("-")[0], settings).vocabulary]
)
def test_trls_kernel_trains_as_ours(form, make_trainer, tmp_path):
    """Four steps, float32. Goes red if the kernel is called with another scale, or its outputs are mixed up."""
    runs = {}
    for kernel in ("torch", "trl"):
        cache = {"ref_cache_dir": str(tmp_path / kernel)} if needs_cache(form) else {}
        trainer = make_trainer(
            kernel, objective=form.split("-")[0], head_kernel=kernel, max_steps=4, learning_rate=1e-3, **cache,
            **FORMS[form],
        )  # fmt: skip
        trainer.train()
        assert json.loads((Path(trainer.args.output_dir) / "run.json").read_text())["head_kernel"] == kernel
        runs[kernel] = metrics_of(trainer)
    for ours, theirs in zip(runs["torch"], runs["trl"], strict=True):
        for field in ("loss", "nll", "entropy", "mean_token_accuracy", "grad_norm"):
            assert theirs[field] == pytest.approx(ours[field], rel=2e-5, abs=1e-6), (ours["step"], field)


@pytest.mark.parametrize("form", ["psft", "psft_tv", "iw_sft-token", "iw_sft-sequence", "asft"])
def test_the_heads_chunks_change_nothing(form, make_trainer, make_tiny_model, tmp_path, monkeypatch):
    """7 rows at a time, where a micro-batch has up to 60, in float64. Goes red if a chunk is held against old or
    reference log-probs of another one's tokens."""
    runs = []
    for chunk_rows in (512, 7):
        for name in ("token_loss", "token_statistics"):
            whole = getattr(sys.modules[f"psft.ops.{name}"], name)
            monkeypatch.setattr(f"psft.trainers.head.{name}", functools.partial(whole, chunk_rows=chunk_rows))
        cache = {"ref_cache_dir": str(tmp_path / f"cache{chunk_rows}")} if needs_cache(form) else {}
        trainer = make_trainer(
            f"chunks{chunk_rows}", model=make_tiny_model().double(), objective=form.split("-")[0], max_steps=4, **cache,
            **FORMS[form],
        )  # fmt: skip
        trainer.train()
        runs.append(metrics_of(trainer))
    for whole, cut in zip(*runs, strict=True):
        for field in ("loss", "nll", "entropy", "grad_norm", "token_weight", "log_ratio_abs_max"):
            assert cut[field] == (None if whole[field] is None else pytest.approx(whole[field], rel=1e-6, abs=1e-9))


def test_the_kernel_is_chosen_by_what_it_can_do(make_trainer, make_tiny_model, monkeypatch):
    """Goes red if "auto" sends TRL's kernel what it cannot compute, or a wish that cannot be met is overruled."""
    monkeypatch.setattr("psft.trainers.trl_kernel.is_triton_available", lambda: True)
    psft, gem = resolve_objective("psft", {}), resolve_objective("gem", {})
    for objective, device, dtype, kernel in [
        (psft, CPU, torch.float32, "torch"), (psft, CUDA, torch.float32, "trl"), (psft, CUDA, torch.float64, "torch"),
        (gem, CUDA, torch.float32, "torch"),
    ]:  # fmt: skip
        assert choose_head_kernel("auto", objective, device, dtype) == kernel
        assert choose_head_kernel("torch", objective, device, dtype) == "torch"
    with pytest.raises(RequestError, match="head_kernel=trl: objective 'asft' needs ref_kls.*Use head_kernel=torch"):
        make_trainer(objective="asft", head_kernel="trl")
    with pytest.raises(RequestError, match="head_kernel=trl: the model is float64"):
        make_trainer(model=make_tiny_model().double(), head_kernel="trl")
    with pytest.raises(RequestError, match="head_kernel=triton must be auto, torch or trl"):
        make_trainer(head_kernel="triton")
    monkeypatch.setattr("psft.trainers.trl_kernel.is_triton_available", lambda: False)
    assert choose_head_kernel("auto", psft, CUDA, torch.float32) == "torch"


ADAPTERS = {
    "beside": {"target_modules": ["q_proj", "v_proj"]},
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "whole head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "whole head and embedding": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]},
    "tied whole": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "on the head": {"target_modules": ["q_proj", "lm_head"]},
    "tied to the head": {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True},
    "tokens tied to the head": {"target_modules": ["q_proj"], "trainable_token_indices": [3, 4, 5]},
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_is_in_the_log_probs_or_refused(name, make_tiny_model):
    """Against the model's own logits, adapter on and off. Goes red if what is trained on the head is left out."""
    model = make_tiny_model()
    adapted = get_peft_model(model, LoraConfig(r=4, **ADAPTERS[name]))
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.3)
    if name in ("on the head", "tied to the head", "tokens tied to the head"):
        with pytest.raises(RequestError, match=r"adapter on the LM head.*modules_to_save"):
            add_token_scoring(model)
        return
    add_token_scoring(model)
    for is_off in (False, True):
        with torch.no_grad(), adapted.disable_adapter() if is_off else contextlib.nullcontext():
            scored = adapted(**inputs(), score_tokens="logps")
            want = plain_logps(adapted, *inputs().values())
        torch.testing.assert_close(scored.logps, want, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("name", ["on the head", "tied to the head", "tokens tied to the head"])
def test_an_adapter_on_the_head_is_refused_before_anything_is_trained(name, make_trainer):
    """Goes red if TRL's own refusal comes through as a crash, or the tokens' adapter as an AttributeError."""
    with pytest.raises(RequestError, match=r"adapter on the LM head.*modules_to_save"):
        make_trainer(peft_config=LoraConfig(r=4, **ADAPTERS[name]))


def test_a_whole_head_is_trained_beside_the_adapter(make_trainer):
    """Goes red if the head's copy gets no gradient."""
    trainer = make_trainer(peft_config=LoraConfig(r=4, **ADAPTERS["whole head"]), max_steps=1)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    changed = {name for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])}
    assert any("modules_to_save" in name for name in changed) and any("lora_B" in name for name in changed)
    assert not any("original_module" in name for name in changed)


def test_a_quantised_head_is_refused(tiny_model):
    head = tiny_model.get_output_embeddings()
    head.weight = torch.nn.Parameter(head.weight.detach().to(torch.uint8), requires_grad=False)
    with pytest.raises(RequestError, match=r"quantised \(torch.uint8\)"):
        add_token_scoring(tiny_model)
