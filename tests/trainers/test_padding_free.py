"""Joined rows: the same numbers as padded ones with an attention that keeps them apart, a refusal of any other."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from forms import FORMS, needs_cache
from trainers import fake_attention

from psft.errors import RequestError
from psft.trainers.kept_apart import check_rows_kept_apart

TIMINGS = {"tokens_per_second", "peak_memory_bytes"}
JOINED = {"padding_free": True, "max_length": None}
APART = ("sdpa", "eager", *fake_attention.KERNELS)


def rows_of(trainer, name="metrics.jsonl"):
    rows = [json.loads(line) for line in (Path(trainer.args.output_dir) / name).read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in TIMINGS} for row in rows]


@pytest.fixture
def with_attention(make_trainer, make_tiny_model, tmp_path, monkeypatch):
    """with_attention(attention, name, form, dtype, **settings) -> trainer of a tiny model with that attention."""
    fake_attention.install(monkeypatch)

    def make(attention, name="run", form="psft", dtype=torch.float64, config=None, **settings):
        model = fake_attention.use(make_tiny_model(**config or {}).to(dtype), attention)
        folder = {"ref_cache_dir": str(tmp_path / f"refs-{name}")} if needs_cache(form) else {}
        return make_trainer(name, model=model, objective=form.split("-")[0], **folder, **FORMS[form], **settings)

    return make


def ids_of(*lengths, seed=0):
    """Rows of made-up tokens, all trained."""
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(3, 400, (length,), generator=generator).tolist() for length in lengths]
    return [{"input_ids": ids, "labels": ids} for ids in rows]


# What the model computes


@pytest.mark.parametrize("attention", APART)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_joined_row_has_the_log_probs_and_gradients_of_a_padded_one(attention, dtype, with_attention):
    """Goes red if positions go on, a border is lost or shifted, or a kernel is told another scale or window."""
    rows = ids_of(5, 1, 9, 2)
    results = []
    for kind, name, settings in (("sdpa", "padded", {}), (attention, "joined", JOINED)):
        trainer = with_attention(kind, name, dtype=dtype, **settings)
        scored = trainer._score(trainer.model, trainer.data_collator(rows))
        weight = trainer.model.model.layers[0].self_attn.k_proj.weight
        (gradient,) = torch.autograd.grad(scored.logps.sum(), weight)
        results.append((scored.logps[scored.mask], gradient))
    atol = 2e-6 if dtype == torch.float64 else 1e-4  # the head's logits are float32 in both
    for want, got in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=atol)


@pytest.mark.parametrize("attention", APART)
def test_the_models_body_agrees_to_the_last_digits_of_float64(attention, with_attention, make_tiny_model):
    """Without the float32 head between; Llama's norms compute in float32. Goes red at 1e-6 of another position."""
    rows = ids_of(7, 3, 11)
    trainer = with_attention(attention, **JOINED)
    seen = []
    trainer.model.model.register_forward_hook(lambda module, args, output: seen.append(output.last_hidden_state[0]))
    with torch.no_grad():
        trainer._score(trainer.model, trainer.data_collator(rows))
        model = make_tiny_model().double()
        alone = [model.model(torch.tensor([row["input_ids"]])).last_hidden_state[0] for row in rows]
    torch.testing.assert_close(seen[0], torch.cat(alone), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("attention", APART)
def test_no_bit_of_a_row_changes_with_its_neighbours(attention, with_attention):
    """Neighbours on both sides have other tokens. Goes red if attention looks one token across a border; also in the
    gradient: nothing flows from a row into its neighbours' embeddings."""
    (row,) = ids_of(6, seed=9)
    trainer = with_attention(attention, **JOINED)
    embedded = []
    trainer.model.get_input_embeddings().register_forward_hook(lambda m, a, output: embedded.append(output))
    found = []
    for seed in (1, 2):
        before, after = ids_of(4, 5, seed=seed)
        scored = trainer._score(trainer.model, trainer.data_collator([before, row, after]))
        logps = scored.logps[0, 4:9]
        (gradient,) = torch.autograd.grad(logps.sum(), embedded[-1])
        assert not gradient[0, :4].any() and not gradient[0, 10:].any() and gradient[0, 4:9].any()
        found.append((logps, gradient[0, 4:10]))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def test_positions_start_again_and_the_first_token_of_a_row_is_no_target(with_attention):
    trainer = with_attention("sdpa", **JOINED)
    joined = trainer.data_collator(ids_of(3, 1, 2))
    assert joined["position_ids"].tolist() == [[0, 1, 2, 0, 0, 1]]
    assert (joined["labels"] == -100).tolist() == [[True, False, False, True, True, False]]
    assert joined["cu_seq_lens_q"].tolist() == [0, 3, 4, 6] and "attention_mask" not in joined


def test_a_sliding_window_is_kept_inside_its_row(with_attention):
    """Of 3 tokens, itself included: what transformers means by it. Goes red if the kernel is told one more."""
    from transformers import MistralConfig, MistralForCausalLM

    config = MistralConfig(
        vocab_size=400, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        intermediate_size=64, sliding_window=3, initializer_range=0.3,
    )  # fmt: skip
    torch.manual_seed(0)
    model = MistralForCausalLM(config).double().eval()
    trainer = with_attention("sdpa", **JOINED)
    joined = {name: x for name, x in trainer.data_collator(ids_of(7, 9)).items() if name != "labels"}
    joined["use_cache"] = False  # with a cache transformers 5.23 does not look for joined rows
    with torch.no_grad():
        want = model(**joined).logits
        for attention in fake_attention.KERNELS:
            got = fake_attention.use(model, attention)(**joined).logits
            torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


def test_calls_without_borders_are_those_of_sdpa(with_attention, tiny_model):
    """Padded on the left with a cache, as in sampling. Goes red if the mask is lost outside joined rows."""
    ids = torch.tensor([[0, 0, 5, 6, 7], [8, 9, 10, 11, 12]])
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    how = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "output_logits": True}
    answers = []
    with_attention("psft_varlen", **JOINED)
    for attention in ("sdpa", "psft_varlen"):
        model = fake_attention.use(tiny_model, attention)
        answers.append(model.generate(ids, attention_mask=mask, return_dict_in_generate=True, **how))
    assert torch.equal(answers[0].sequences, answers[1].sequences)
    for one, other in zip(answers[0].logits, answers[1].logits, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("attention", fake_attention.KERNELS)
def test_a_padded_row_alone_is_not_looked_into(attention, with_attention, monkeypatch):
    """transformers' flash attention asks in every layer whether it is several joined rows. Goes red without borders."""

    def ask(*args):
        raise AssertionError("the device was asked")

    monkeypatch.setattr("transformers.modeling_flash_attention_utils._is_packed_sequence", ask)
    scored = []
    for kind, name in (("sdpa", "plain"), (attention, "kernel")):
        trainer = with_attention(kind, name)
        scored.append(trainer._score(trainer.model, trainer.data_collator(ids_of(9))).logps)
    torch.testing.assert_close(scored[1], scored[0], rtol=1e-5, atol=2e-6)


def test_no_square_mask_is_made_for_pytorchs_kernel(with_attention, monkeypatch):
    def square(*args, **kwargs):
        raise AssertionError("a T x T mask was made")

    trainer = with_attention("psft_varlen", **JOINED)
    monkeypatch.setattr("psft.models.varlen.sdpa_mask", square)
    trainer._score(trainer.model, trainer.data_collator(ids_of(5, 6)))


def test_joined_rows_that_come_without_borders_are_still_found(with_attention):
    """From a collator of one's own that gives positions alone. Goes red if no borders are taken for one row."""
    trainer = with_attention("sdpa", **JOINED)
    joined = trainer.data_collator(ids_of(5, 6))
    bare = {name: joined[name] for name in ("input_ids", "labels", "position_ids")}
    with torch.no_grad():
        want, got = (trainer._score(trainer.model, inputs).logps for inputs in (joined, bare))
    assert torch.equal(got, want)


def test_the_trainer_alone_makes_psft_varlen_known():
    """In a process of its own. Goes red if nothing that the trainer imports registers the name."""
    code = (
        "from psft import PSFTTrainer; from transformers import AttentionInterface as A; "
        "raise SystemExit('psft_varlen' not in A._global_mapping)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    "lacked", [{"softcap": 5.0}, {"s_aux": torch.zeros(1)}, {"dropout": 0.1}, {"is_causal": False}]
)
def test_what_the_kernel_lacks_is_refused_and_not_left_out(lacked):
    from psft.models.varlen import attention

    x = torch.zeros(1, 2, 4, 8)
    borders = {"cu_seq_lens_q": torch.tensor([0, 4], dtype=torch.int32), "max_length_q": 4}
    with pytest.raises(RequestError, match="attn_implementation=psft_varlen has no .*flash_attention_2"):
        attention(torch.nn.Module(), x, x, x, None, **borders, **lacked)


def test_pytorchs_kernel_takes_what_it_is_given():
    """The real function with its own rules, on tensors without numbers. Goes red if an argument has another name,
    half precision is lost under autocast, or values of another size than the keys come back in the wrong one."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    from psft.models.varlen import attention

    module = torch.nn.Linear(4, 4)
    module.config = None
    with FakeTensorMode(), torch.autocast("cpu", torch.bfloat16):
        query, key = torch.zeros(1, 4, 10, 16, requires_grad=True), torch.zeros(1, 2, 10, 16, requires_grad=True)
        value = torch.zeros(1, 2, 10, 8, dtype=torch.bfloat16, requires_grad=True)
        borders = {"cu_seq_lens_q": torch.zeros(3, dtype=torch.int32), "max_length_q": 6}
        out, _ = attention(module, query, key, value, None, scaling=0.25, **borders)
        assert out.shape == (1, 10, 4, 8) and out.dtype == torch.bfloat16
        gradients = torch.autograd.grad(out.sum(), (query, key, value))
        assert [g.dtype for g in gradients] == [torch.float32, torch.float32, torch.bfloat16]


@pytest.mark.slow  # compiles
def test_flex_attention_scores_joined_rows_as_sdpa_scores_padded_ones(make_trainer, make_tiny_model):
    """Forward only: it has no backward pass on a CPU. Goes red if its block mask is not made from the positions."""
    model = make_tiny_model(hidden_size=64)  # heads of 16, the least it takes
    padded, rows = make_trainer("padded", model=model), ids_of(5, 1, 9, 20)
    other = make_tiny_model(hidden_size=64)
    other.set_attn_implementation("flex_attention")
    joined = make_trainer("joined", model=other, **JOINED)
    with torch.no_grad():
        want = padded._score(model, padded.data_collator(rows))
        got = joined._score(other, joined.data_collator(rows))
    torch.testing.assert_close(got.logps[got.mask], want.logps[want.mask], rtol=1e-4, atol=1e-4)


# How it trains


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
@pytest.mark.parametrize("attention", APART)
def test_both_passes_give_the_same_bits_at_equal_weights(attention, gradient_checkpointing, with_attention):
    """With a learning rate of 0 every ratio of mini-batches 2 to 4 is 1.0 to the bit. Goes red if the old pass has
    another layout, order or kernel than the training pass."""
    trainer = with_attention(
        attention, dtype=torch.float32, learning_rate=0.0, gradient_checkpointing=gradient_checkpointing, max_steps=4,
        max_tokens_per_micro_batch=90, **JOINED,
    )  # fmt: skip
    trainer.train()
    rows = rows_of(trainer)
    assert [row["mini_batch"] for row in rows] == [1, 2, 3, 4]
    assert [row["log_ratio_abs_max"] for row in rows] == [0.0] * 4


@pytest.mark.parametrize(
    ("form", "attention", "gradient_checkpointing"),
    [
        ("psft", "psft_varlen", False), ("psft", "flash_attention_2", True), ("iw_sft-sequence", "psft_varlen", False),
        ("sft_kl-full", "psft_varlen", True), ("sft_kl-k3", "flash_attention_2", False),
    ],
)  # fmt: skip
def test_kernels_by_row_borders_train_as_padded_rows_do(form, attention, gradient_checkpointing, with_attention):
    """What a kernel is told reaches it in both passes, in the reference and under checkpointing. Goes red if borders
    are lost on the way, belong to another micro-batch, or sequences of an objective are told apart in another way."""
    settings = {"gradient_checkpointing": gradient_checkpointing, "max_steps": 6, "max_tokens_per_micro_batch": 90}
    padded = with_attention("sdpa", "padded", form, **settings)
    padded.train()
    before = fake_attention.calls[attention]
    joined = with_attention(attention, "joined", form, **JOINED, **settings)
    joined.train()
    assert fake_attention.calls[attention] > before
    info = json.loads((Path(joined.args.output_dir) / "run.json").read_text())
    assert info["attention"] == attention
    for one, other in zip(rows_of(padded), rows_of(joined), strict=True):
        for field in ("loss", "nll", "entropy", "grad_norm", "tokens", "clip_fraction", "log_ratio_abs_max"):
            if one.get(field) is not None:
                # old and reference log-probs are kept in float32
                assert other[field] == pytest.approx(one[field], rel=1e-5, abs=1e-6), (form, one["step"], field)


def test_a_run_with_it_resumes_to_the_same_bits(with_attention, tmp_path):
    """Cut inside a window: the joined rows of its old log-probs are joined again. Goes red if they are joined anew."""
    settings = {"max_steps": 8, "save_strategy": "steps", "save_steps": 1, **JOINED}
    whole = with_attention("psft_varlen", "whole", **settings)
    whole.train()
    shutil.copytree(whole.args.output_dir, tmp_path / "cut")
    for path in (tmp_path / "cut").glob("checkpoint-*"):
        if int(path.name.split("-")[1]) > 2:
            shutil.rmtree(path)
    again = with_attention("psft_varlen", "cut", resume=True, **settings)
    again.train()
    assert rows_of(again) == rows_of(whole)


def test_a_resumed_run_says_that_its_attention_is_another(with_attention, caplog):
    settings = {"save_strategy": "steps", "save_steps": 1, **JOINED}
    with_attention("psft_varlen", max_steps=1, **settings).train()
    with_attention("sdpa", max_steps=2, resume=True, **settings).train()
    assert "attention was psft_varlen and is sdpa now" in caplog.text


# What is refused


def test_an_attention_that_looks_across_borders_is_refused_by_name(with_attention):
    """Goes red if the check compares a row with itself, or looks at the first row, which nothing can leak into."""
    trainer = with_attention(fake_attention.LEAKY, "leaky", **JOINED)
    with pytest.raises(RequestError, match="attn_implementation=fake_leaky does not keep them apart.*row in front"):
        trainer.train()
    with_attention(fake_attention.LEAKY, "padded").train()  # it needs no borders there


def test_a_small_leak_is_refused_too(with_attention):
    """A thousandth of the first token gets into all others: far less than rounding is allowed to move. Goes red if the
    leak is held against the looser of the two limits."""
    trainer = with_attention("psft_varlen", **JOINED)
    trainer.model.get_input_embeddings().register_forward_hook(lambda m, args, out: out + 0.001 * out[:, :1])
    with pytest.raises(RequestError, match="another row in front changes log-probs by 0.0[1-9]"):
        trainer.train()


def test_positions_that_go_on_are_refused(with_attention):
    """Rows apart but numbered through, where a model would learn a position: its embedding is added to a token's."""
    trainer = with_attention("psft_varlen", **JOINED)
    places = torch.nn.Embedding(100, 32).double()
    embed = trainer.model.get_input_embeddings()
    embed.register_forward_hook(lambda m, args, out: out + 20 * places(torch.arange(out.shape[1])))
    with pytest.raises(RequestError, match="as if positions went on"):
        trainer.train()


@pytest.mark.parametrize("attention", ["sdpa", "psft_varlen"])
def test_the_check_leaves_no_trace(attention, with_attention):
    trainer = with_attention(attention, **JOINED)
    trainer.model.train()
    trainer.model.model.layers[0].eval()
    modes, drawn = [m.training for m in trainer.model.modules()], torch.get_rng_state()
    check_rows_kept_apart(trainer)
    assert modes == [m.training for m in trainer.model.modules()] and torch.equal(drawn, torch.get_rng_state())
