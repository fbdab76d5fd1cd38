"""The retention probe: drift is zero at first, an estimate of the exact KL later, and the training never notices."""

import json

import pytest
import torch

from psft.data.probe_prompts import load_probe_prompts
from psft.errors import RequestError
from psft.models.answers import sample_answers
from psft.trainers.probe import RetentionProbe


@pytest.fixture
def moved():
    """moved(model, size) -> the same model, its weights changed at random."""

    def move(model, size):
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += size * torch.randn(parameter.shape, generator=generator)
        return model

    return move


def make_probe(make_trainer, prompts=None, **settings):
    trainer = make_trainer(probe_max_new_tokens=24, **settings)
    return RetentionProbe(trainer, prompts or load_probe_prompts())


def exact_kl(probe, base, current):
    """Mean over answer positions of KL(base || current) over the whole vocabulary, in nats, float64."""
    total, count = 0.0, 0
    for prompt, answer in zip(probe.prompts, probe.answers, strict=True):
        ids = torch.tensor([prompt + answer])
        with torch.no_grad():
            p, q = (m(input_ids=ids).logits[0, len(prompt) - 1 : -1].double().log_softmax(-1) for m in (base, current))
        total += (p.exp() * (p - q)).sum().item()
        count += len(answer)
    return total / count


def test_the_base_model_has_not_drifted_by_a_bit(make_trainer):
    """Goes red if answers are scored by another path than they are measured by."""
    probe = make_probe(make_trainer)
    probe.sample()
    rows = probe.measure()
    assert [row["group"] for row in rows[:2]] == ["all", "knowledge"] and len(rows) == 9
    assert all(row["drift_nats_per_token"] == 0.0 and row["stderr"] == 0.0 for row in rows)
    assert rows[0]["prompts"] == 84 and rows[0]["tokens"] == sum(map(len, probe.answers))
    assert sum(row["tokens"] for row in rows[1:]) == rows[0]["tokens"]


@pytest.mark.parametrize("size", [0.02, 0.05])
def test_drift_is_the_exact_kl_within_three_standard_errors(make_trainer, make_tiny_model, moved, size):
    """Goes red if answers follow anything but the base model at temperature 1 (top-k, greedy, a shifted label)."""
    probe = make_probe(make_trainer)
    base = make_tiny_model()  # the same weights
    probe.sample()
    moved(probe.trainer.model, size)
    row = probe.measure()[0]
    exact = exact_kl(probe, base, probe.trainer.model)
    assert exact > 0.005 and 0 < row["stderr"] < exact
    assert abs(row["drift_nats_per_token"] - exact) < 3 * row["stderr"], (row, exact)


def test_entropy_is_that_of_the_current_model_at_the_answers(make_trainer, moved):
    probe = make_probe(make_trainer)
    probe.sample()
    model = moved(probe.trainer.model, 0.05)
    total = 0.0
    for prompt, answer in zip(probe.prompts, probe.answers, strict=True):
        with torch.no_grad():
            q = model(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        total += -(q.exp() * q).sum().item()
    row = probe.measure()[0]
    assert row["entropy"] == pytest.approx(total / row["tokens"], rel=1e-4)


def test_answers_are_drawn_from_the_plain_softmax(tiny_model, tiny_tokenizer):
    """3,000 first tokens against the model's distribution. Goes red with top-k, a temperature, or a biased draw."""
    prompt = [5, 6, 7, 8]
    answers = sample_answers(
        tiny_model, [prompt] * 3000, list(range(3000)), max_new_tokens=1, end_ids=[2], device=torch.device("cpu")
    )
    seen = torch.bincount(torch.tensor(answers)[:, 0], minlength=len(tiny_tokenizer)).double()
    with torch.no_grad():
        expected = tiny_model(input_ids=torch.tensor([prompt])).logits[0, -1].double().softmax(-1) * 3000
    common = expected >= 5
    observed = torch.cat([seen[common], seen[~common].sum()[None]])
    wanted = torch.cat([expected[common], expected[~common].sum()[None]])
    chi2, freedom = ((observed - wanted) ** 2 / wanted).sum().item(), len(wanted) - 1
    assert abs(chi2 - freedom) < 4 * (2 * freedom) ** 0.5, (chi2, freedom)


@pytest.fixture(params=["rotary", "learned"])
def model_by_positions(request, tiny_model, tiny_tokenizer):
    """A shift of all positions changes nothing where they are rotary; where they are learned it does."""
    if request.param == "rotary":
        return tiny_model
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "initializer_range": 0.5}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return GPT2LMHeadModel(GPT2Config(vocab_size=len(tiny_tokenizer), **sizes)).eval()


def test_an_answer_depends_on_prompt_and_seed_alone(model_by_positions):
    """Goes red if padding is seen, positions count it, or random numbers are shared by the batch."""
    tiny_model = model_by_positions
    prompts, seeds, how = [[5, 6, 7], [9], [11, 12, 13, 14, 15, 16]], [1, 2, 3], {"max_new_tokens": 12, "end_ids": [2]}
    device = torch.device("cpu")
    together = sample_answers(tiny_model, prompts, seeds, device=device, **how)
    alone = [sample_answers(tiny_model, [p], [s], device=device, **how)[0] for p, s in zip(prompts, seeds, strict=True)]
    assert together == alone
    assert sample_answers(tiny_model, prompts, [4, 5, 6], device=device, **how) != together
    state = torch.get_rng_state()
    sample_answers(tiny_model, prompts, seeds, device=device, **how)
    assert torch.equal(torch.get_rng_state(), state)


def test_an_answer_ends_with_its_end_token(tiny_model):
    """Goes red if the end token is left out, or if what follows it is kept."""
    prompts, device = [[5, 6, 7]] * 40, torch.device("cpu")
    free = sample_answers(tiny_model, prompts, list(range(40)), max_new_tokens=8, end_ids=[], device=device)
    end = free[0][2]
    cut = sample_answers(tiny_model, prompts, list(range(40)), max_new_tokens=8, end_ids=[end], device=device)
    expected = [answer[: answer.index(end) + 1] if end in answer else answer for answer in free]
    assert cut == expected and {len(a) for a in cut} != {8}
    whole = sample_answers(
        tiny_model, prompts, list(range(40)), max_new_tokens=8, end_ids=[end], device=device, runs_full_length=True
    )
    assert whole == expected


def test_state_survives_json_and_other_prompts_are_refused(make_trainer, moved):
    probe = make_probe(make_trainer)
    probe.sample()
    state = json.loads(json.dumps(probe.state_dict()))
    moved(probe.trainer.model, 0.05)
    again = RetentionProbe(probe.trainer, load_probe_prompts())
    again.load_state_dict(state)
    assert again.is_ready and again.measure() == probe.measure()
    with pytest.raises(RequestError, match="other prompts.*probe_every=0"):
        RetentionProbe(probe.trainer, load_probe_prompts()[:-1]).load_state_dict(state)


def test_the_model_is_left_in_the_mode_each_module_had(make_trainer):
    probe = make_probe(make_trainer)
    model = probe.trainer.model.train()
    model.model.layers[0].eval()
    before = [module.training for module in model.modules()]
    probe.sample(), probe.measure()
    assert [module.training for module in model.modules()] == before and True in before and False in before


def test_the_bundled_prompts_are_many_and_of_several_kinds():
    prompts = load_probe_prompts()
    assert len(prompts) >= 64 and len({p.kind for p in prompts}) >= 6
    assert len({p.messages[-1]["content"] for p in prompts}) == len(prompts)
    assert sum(not p.messages[-1]["content"].isascii() for p in prompts) >= 10  # other languages


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"text": "x"}, "prompts.jsonl:2: no prompt here"),
        ({"prompt": ""}, "no prompt here"),
        ({"prompt": 3}, "no prompt here"),
        ({"prompt": "x", "kind": ""}, "'kind' must be text"),
        ({"prompt": "x", "kind": "all"}, "the kind 'all'"),
        ({"messages": []}, "no prompt here"),
        (
            {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]},
            "end with role 'user'",
        ),
        ({"messages": [{"role": "tool", "content": "x"}]}, "no prompt here"),
        ([1], "must be an object"),
    ],
)
def test_a_row_that_is_no_prompt_is_refused_with_file_and_line(tmp_path, row, words):
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(json.dumps(r) for r in ({"prompt": "fine"}, row)) + "\n")
    with pytest.raises(RequestError) as refused:
        load_probe_prompts(str(path))
    assert words in str(refused.value)


def test_prompts_of_ones_own_are_answered_without_a_chat_template_too(tmp_path, make_trainer, make_tiny_tokenizer):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "Count to three", "kind": "mine"}\n{"prompt": "Say hello"}\n')
    probe = make_probe(make_trainer, load_probe_prompts(str(path)))
    probe.trainer.processing_class.chat_template, template = None, probe.trainer.processing_class.chat_template
    try:
        plain = RetentionProbe(probe.trainer, load_probe_prompts(str(path)))
    finally:
        probe.trainer.processing_class.chat_template = template
    assert len(plain.prompts[0]) < len(probe.prompts[0])
    plain.sample()
    assert [row["group"] for row in plain.measure()] == ["all", "mine", "prompts"]


def test_a_prompt_longer_than_the_model_is_refused_by_name(tmp_path, make_trainer):
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps({"prompt": "one two three " * 2000}) + "\n")
    with pytest.raises(RequestError, match="prompts.jsonl:1: the prompt has .* more than the 4096"):
        make_probe(make_trainer, load_probe_prompts(str(path)))
