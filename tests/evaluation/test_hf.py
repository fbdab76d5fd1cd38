"""Laws of the backend on this machine: what a sample is depends on its request, not on what was done before."""

import json
import shutil
import time

import pytest
import torch
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from psft.errors import RequestError
from psft.evaluation.backends import Request
from psft.evaluation.backends.hf import HFBackend
from psft.evaluation.backends.sampling import draw_tokens
from psft.evaluation.benchmarks import Sampling

SAMPLING = Sampling(temperature=0.9, top_p=0.95, max_tokens=12)


def requests(num_items: int = 5, k: int = 3, sampling: Sampling = SAMPLING) -> list[Request]:
    """Items of unequal length, k samples each."""
    found = []
    for i in range(num_items):
        messages = ({"role": "user", "content": "clips " * (1 + 3 * i)},)
        found += [Request(f"{i}-{j}", "b", f"item{i}", j, 1000 * i + j, messages, sampling) for j in range(k)]
    return found


@pytest.fixture(scope="module")
def backend(tiny_model_path):
    return HFBackend(str(tiny_model_path), dtype="float32", device="cpu", batch_size=4)


def answers(backend, asked, done=()):
    return {request.key: answer for batch in backend.generate(asked, done) for request, answer in batch}


def test_a_resumed_evaluation_has_the_samples_of_an_uninterrupted_one(backend):
    """Cut at every place. Goes red if batches are cut over what is missing, or if rows share random numbers."""
    asked = requests()
    whole = answers(backend, asked)
    assert len(whole) == 15 and len({answer.text for answer in whole.values()}) > 8
    keys = list(whole)
    for cut in (1, 4, 7, 14):
        rest = answers(backend, asked, done=set(keys[:cut]))
        assert set(keys[cut:]) <= set(rest)
        assert all(rest[key] == whole[key] for key in rest)
    assert answers(backend, asked, done=set(keys)) == {}


def test_the_samples_of_an_item_differ_and_their_order_does_not_matter(backend):
    """Goes red if the seed is the item's, or drawn as work goes on."""
    asked = requests(num_items=1, k=4)
    forward, backward = answers(backend, asked), answers(backend, asked[::-1])
    assert forward == backward and len({answer.text for answer in forward.values()}) == 4


def test_greedy_is_what_generate_says(backend, tiny_model_path):
    """Goes red if temperature 0 draws, or left padding is not masked."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    asked = requests(num_items=3, k=1, sampling=Sampling(temperature=0.0, top_p=1.0, max_tokens=8))
    found = answers(backend, asked)
    model = AutoModelForCausalLM.from_pretrained(tiny_model_path)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_path)
    for request in asked:
        text = tokenizer.apply_chat_template(list(request.messages), add_generation_prompt=True, tokenize=False)
        ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
        tokens = model.generate(ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :]
        assert found[request.key].text == tokenizer.decode(tokens, skip_special_tokens=True)


def test_an_answer_says_how_it_ended(backend, tiny_tokenizer):
    """Goes red if the end token is not looked for, not counted, or padding is counted."""
    backend._load()
    end, pad = tiny_tokenizer.eos_token_id, tiny_tokenizer.pad_token_id
    stopped, cut = backend._read([50, 60, end, pad, pad]), backend._read([50, 60, 70, 80, 90])
    assert (stopped.finish_reason, stopped.num_tokens) == ("stop", 3)
    assert (cut.finish_reason, cut.num_tokens) == ("length", 5)
    assert "<|im_end|>" not in stopped.text


def test_the_models_own_generation_settings_do_not_act(tiny_model_path, tmp_path):
    """Qwen's folders set repetition_penalty 1.05. Goes red if `generation_config` is left as it is loaded."""
    folder = shutil.copytree(tiny_model_path, tmp_path / "model")
    plain = answers(HFBackend(str(folder), dtype="float32", device="cpu"), requests(2, 2))
    config = json.loads((folder / "generation_config.json").read_text())
    config |= {"repetition_penalty": 5.0, "top_k": 1, "do_sample": True, "temperature": 0.01}
    (folder / "generation_config.json").write_text(json.dumps(config))
    assert answers(HFBackend(str(folder), dtype="float32", device="cpu"), requests(2, 2)) == plain


def test_the_models_context_ends_an_answer_and_it_is_said(tmp_path, make_tiny_model, tiny_tokenizer):
    """Goes red if positions beyond the model's are asked of it, or cut without a word."""
    make_tiny_model(max_position_embeddings=40).save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    backend = HFBackend(str(tmp_path), dtype="float32", device="cpu")
    found = answers(backend, requests(1, 1, Sampling(max_tokens=1000)))
    assert found["0-0"].num_tokens < 40 and "the model's context of 40" in backend.describe().notes[0]
    with pytest.raises(RequestError, match="item item9 has .* tokens; the model's context holds 40"):
        answers(backend, requests(10, 1, Sampling(max_tokens=1000)))


def test_a_template_of_its_own_file_is_part_of_the_key(tiny_model_path, tmp_path):
    """It decides the prompt. Goes red if samples of one template are taken for those of another."""
    path = tmp_path / "own.jinja"
    found = {HFBackend("m", dtype="float32", device="cpu").numerics}
    for text in ("{{ 1 }}", "{{ 2 }}"):
        path.write_text(text)
        found.add(HFBackend("m", dtype="float32", device="cpu", chat_template_path=str(path)).numerics)
    assert len(found) == 3 and "hf/float32" in found


def test_a_device_that_is_not_there_is_said(tiny_model_path):
    """Goes red if torch's own error comes through."""
    with pytest.raises(RequestError, match="--device cuda:77 cannot be used"):
        answers(HFBackend(str(tiny_model_path), dtype="float32", device="cuda:77"), requests(1, 1))


def test_a_model_without_a_chat_template_is_refused(make_tiny_model, make_tiny_tokenizer, tmp_path):
    """Goes red if prompts are then joined in some way of our own."""
    tokenizer = make_tiny_tokenizer()
    tokenizer.chat_template = None
    make_tiny_model().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(RequestError, match="has no chat template. Give one: --chat_template_path"):
        answers(HFBackend(str(tmp_path), dtype="float32", device="cpu"), requests())


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(0.7, 0.95), Sampling(1.0, 1.0), Sampling(1.3, 0.5), Sampling(1.0, 0.9, top_k=7),
        Sampling(2.0, 1.0, top_k=3), Sampling(5.0, 0.99),
    ],
)  # fmt: skip
def test_tokens_are_drawn_from_the_distribution_transformers_has(sampling):
    """Over a grid of uniform numbers each token's share is its probability. The last case needs the full sort.

    Goes red if top_p drops the token that passes the bound, or if top_k acts after top_p.
    """
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1, 1000, generator=generator, dtype=torch.float64) * 2
    wanted = TemperatureLogitsWarper(sampling.temperature)(None, logits)
    wanted = TopKLogitsWarper(sampling.top_k)(None, wanted) if sampling.top_k else wanted
    wanted = TopPLogitsWarper(sampling.top_p)(None, wanted) if sampling.top_p < 1 else wanted
    num = 20_000
    grid = (torch.arange(num, dtype=torch.float64) + 0.5) / num
    drawn = torch.cat([draw_tokens(logits.expand(500, -1), part, sampling) for part in grid.split(500)])
    shares = torch.bincount(drawn, minlength=1000) / num
    assert (shares - wanted.softmax(-1)[0]).abs().max() <= 1.01 / num
    assert set(drawn.tolist()) <= set(torch.isfinite(wanted[0]).nonzero()[:, 0].tolist())


def test_a_row_draws_the_same_token_whoever_its_neighbours_are():
    """Peaked, flat and flattest rows of 6,000 tokens: sets within 256, 4,096, and all tokens. Drawn from the top down.

    Goes red if rows that are looked at again get another's random number, or keep the token of the first look.
    """
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(12, 6000, generator=generator) * torch.tensor([4.0, 1.0, 0.05]).repeat(4)[:, None]
    uniforms = torch.linspace(0, 0.999, 12, dtype=torch.float64)
    together = draw_tokens(logits, uniforms, SAMPLING)
    alone = [int(draw_tokens(logits[i : i + 1], uniforms[i : i + 1], SAMPLING)) for i in range(12)]
    assert together.tolist() == alone
    for row, number, token in zip(logits, uniforms, alone, strict=True):
        probs, ids = (row.double() / SAMPLING.temperature).softmax(-1).sort(descending=True)
        before = probs.cumsum(-1) - probs
        kept = torch.where(before < SAMPLING.top_p, probs, 0.0)
        cumulated = kept.cumsum(-1)
        near = torch.searchsorted(cumulated, torch.stack([number - 1e-6, number + 1e-6]) * cumulated[-1], right=True)
        assert token in ids[near[0] : near[1] + 1].tolist()


def test_the_last_random_number_draws_a_token_that_may_be_drawn():
    """Goes red without the bound on the index: rounding of the sums may run past the kept tokens."""
    logits = torch.tensor([[0.0, 1.0, -50.0, -torch.inf]])
    almost_one = torch.tensor([1 - 2**-53], dtype=torch.float64)
    for sampling in (Sampling(1.0, 1.0), Sampling(1.0, 0.9), Sampling(1.0, 0.3), Sampling(1.0, 1.0, top_k=1)):
        token = int(draw_tokens(logits, almost_one, sampling))
        assert token in ((1,) if sampling.top_p < 0.5 or sampling.top_k else (0, 1, 2))


@pytest.mark.slow
def test_a_batch_of_16_is_at_least_three_times_one_at_a_time(tiny_model_path):
    """Goes red if rows are generated one after the other."""
    asked = requests(num_items=8, k=4, sampling=Sampling(temperature=1.0, top_p=0.95, max_tokens=48))
    speeds = []
    for size in (1, 16):
        backend = HFBackend(str(tiny_model_path), dtype="float32", device="cpu", batch_size=size)
        answers(backend, asked[:1])  # loads
        start = time.perf_counter()
        made = answers(backend, asked)
        speeds.append(sum(answer.num_tokens for answer in made.values()) / (time.perf_counter() - start))
    assert speeds[1] >= 3 * speeds[0]
