"""Quantities of the whole vocabulary: chunked against plain, their limits, and what they refuse."""

import math

import pytest
import torch

from psft.ops import GemGap, ReferenceLogits, RefKl, TopKEntropy, lm_head, reference, token_statistics

QUANTITIES = [
    GemGap(), GemGap(gem_beta=2.0, gem_weighting="logsigmoid"), GemGap(gem_beta=0.2), RefKl(), RefKl("reverse"),
    TopKEntropy(), TopKEntropy(eaft_top_k=3),
]  # fmt: skip


def case(num_tokens=10, num_words=37, width=8, dtype=torch.float64):
    generator = torch.Generator().manual_seed(num_tokens * 1000 + num_words)

    def draw(*shape, scale=1.0):
        return torch.randn(*shape, generator=generator, dtype=dtype) * scale

    hidden, weight, bias = draw(num_tokens, width, scale=2), draw(num_words, width), draw(num_words)
    frozen = ReferenceLogits(draw(num_tokens, width + 1), draw(num_words, width + 1), draw(num_words), 0.5, 6.0)
    labels = torch.randint(0, num_words, (num_tokens,), generator=generator)
    return hidden.requires_grad_(), weight.requires_grad_(), bias.requires_grad_(), labels, frozen


@pytest.mark.parametrize("quantity", QUANTITIES, ids=repr)
@pytest.mark.parametrize("chunk_rows", [1, 4, 64])
@pytest.mark.parametrize(("logit_scale", "softcap"), [(1.0, None), (0.5, 5.0)])
def test_values_and_gradients_are_those_of_the_plain_twin(quantity, chunk_rows, logit_scale, softcap, monkeypatch):
    """Goes red if a weight gets a gradient, S is taken as 1, the KL's own value is left out of its gradient, the soft
    cap's derivative is skipped, or the reference's rows are not those of the chunk."""
    monkeypatch.setattr(lm_head, "_BLOCK_ROWS", 3)
    hidden, weight, bias, labels, frozen = case()
    assert chunk_rows == 1 or len(hidden) % chunk_rows != 0, "there must be a leftover chunk"
    assert len(hidden) % 3 and 4 % 3, "and leftovers of blocks"
    pull = torch.randn(3, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = []
    for function in (reference.token_statistics, token_statistics):
        out = function(
            hidden, weight, labels, bias=bias, logit_scale=logit_scale, softcap=softcap, chunk_rows=chunk_rows,
            quantities=(quantity,), reference=frozen,
        )  # fmt: skip
        value = out.quantities[quantity.name]
        mixed = (out.logps * pull[0] + out.entropies * pull[1]).sum()
        if quantity.is_differentiable:
            mixed = mixed + (value * pull[2]).sum()
        found.append([value, *torch.autograd.grad(mixed, (hidden, weight, bias))])
        assert value.requires_grad == quantity.is_differentiable
    for plain, fused in zip(*found, strict=True):
        torch.testing.assert_close(fused, plain, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("quantity", [RefKl(), RefKl("reverse")], ids=repr)
def test_gradcheck_of_the_kl(quantity):
    hidden, weight, bias, labels, frozen = case(5, 7, 3)
    assert torch.autograd.gradcheck(
        lambda h, w, b: token_statistics(
            h, w, labels, bias=b, softcap=4.0, chunk_rows=2, quantities=(quantity,), reference=frozen
        ).quantities["ref_kls"],
        (hidden, weight, bias),
    )


def test_several_quantities_come_from_one_pass_and_an_unused_one_costs_no_gradient():
    """Goes red if outputs are paired with the wrong names."""
    hidden, weight, _, labels, frozen = case()
    every = (TopKEntropy(), GemGap(), RefKl())
    together = token_statistics(hidden, weight, labels, chunk_rows=3, quantities=every, reference=frozen)
    for one in every:
        alone = token_statistics(hidden, weight, labels, chunk_rows=3, quantities=(one,), reference=frozen)
        assert torch.equal(together.quantities[one.name], alone.quantities[one.name])
    (gradient,) = torch.autograd.grad(together.quantities["ref_kls"].sum(), hidden)
    (wanted,) = torch.autograd.grad(alone.quantities["ref_kls"].sum(), hidden)
    assert torch.equal(gradient, wanted)


def gradient_of(quantity, hidden, weight, labels):
    out = token_statistics(hidden, weight, labels, chunk_rows=4, quantities=(quantity,))
    return torch.autograd.grad(out.quantities[quantity.name].sum(), hidden)[0]


def test_gem_meets_its_published_limits():
    """beta = 1: the gradient of plain SFT. beta -> 0: q is one on the most likely token. beta -> inf: q = 1/V.

    Goes red if q keeps its gradient, or beta multiplies the logits instead of dividing them.
    """
    hidden, weight, _, labels, _ = case()
    sft = torch.autograd.grad(token_statistics(hidden, weight, labels).logps.sum(), hidden)[0]
    torch.testing.assert_close(gradient_of(GemGap(1.0), hidden, weight, labels), sft, rtol=1e-10, atol=1e-12)
    top = (hidden @ weight.T).argmax(-1)
    cold = weight[labels] - weight[top]
    torch.testing.assert_close(gradient_of(GemGap(1e-4), hidden, weight, labels), cold, rtol=1e-9, atol=1e-9)
    hot = weight[labels] - weight.mean(0)
    torch.testing.assert_close(gradient_of(GemGap(1e9), hidden, weight, labels), hot, rtol=1e-6, atol=1e-6)
    half = GemGap(0.7, "logsigmoid")  # with tiny logits sigmoid(0.01 * gap) is 1/2: half of linear
    small = (hidden * 1e-6).detach().requires_grad_()
    ratio = gradient_of(half, small, weight, labels) / gradient_of(GemGap(0.7), small, weight, labels)
    torch.testing.assert_close(ratio, torch.full_like(ratio, 0.5), rtol=1e-5, atol=0)


def test_the_kl_worked_by_hand():
    """p = (1/2, 1/4, 1/4), ref = (1/4, 1/2, 1/4): forward = 1/4 ln(1/2) + 1/2 ln 2 = 1/4 ln 2, and so is reverse.

    With ref = (1/2, 1/2, 0): forward = 1/2 ln 2 (0 ln 0 = 0), reverse is infinite.
    """
    hidden = torch.tensor([[0.5, 0.25, 0.25]], dtype=torch.float64).log()
    eye, label = torch.eye(3, dtype=torch.float64), torch.tensor([0])

    def kl(direction, ref):
        frozen = ReferenceLogits(torch.tensor([ref], dtype=torch.float64).log().clamp(min=-1e4), eye)
        out = token_statistics(hidden, eye, label, quantities=(RefKl(direction),), reference=frozen)
        return out.quantities["ref_kls"].item()

    assert kl("forward", [0.25, 0.5, 0.25]) == pytest.approx(0.25 * math.log(2), rel=1e-12)
    assert kl("reverse", [0.25, 0.5, 0.25]) == pytest.approx(0.25 * math.log(2), rel=1e-12)
    assert kl("forward", [0.5, 0.25, 0.25]) == 0.0
    assert kl("forward", [0.5, 0.5, 0.0]) == pytest.approx(0.5 * math.log(2), rel=1e-12)
    assert kl("reverse", [0.5, 0.5, 0.0]) > 1000


def test_the_top_k_entropy_is_that_of_the_largest_logits_among_themselves():
    """Four equal logits of five: ln 4 for k = 4, ln 2 for k = 2; a vocabulary below k is taken whole."""
    hidden = torch.tensor([[1.0, 1.0, 1.0, 1.0, -50.0]], dtype=torch.float64)
    eye, label = torch.eye(5, dtype=torch.float64), torch.tensor([4])
    for k, want in {4: math.log(4), 2: math.log(2), 20: math.log(4)}.items():
        out = token_statistics(hidden, eye, label, quantities=(TopKEntropy(k),))
        assert out.quantities["topk_entropies"].item() == pytest.approx(want, abs=1e-12)


def test_the_full_matrix_of_logits_is_never_held(monkeypatch):
    """Goes red if any tensor of a forward or backward pass has as many elements as tokens x vocabulary."""
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, tuple | list) else [out]:
                if isinstance(tensor, torch.Tensor):
                    largest.append(tensor.numel())
            return out

    hidden, weight, _, labels, frozen = case(num_tokens=200, num_words=300, width=8)
    with Watch():
        every = (GemGap(), RefKl("reverse"), TopKEntropy())
        out = token_statistics(hidden, weight, labels, chunk_rows=16, quantities=every, reference=frozen)
        (out.logps + out.entropies + out.quantities["gem_gaps"] + out.quantities["ref_kls"]).sum().backward()
    assert 16 * 300 <= max(largest) < 200 * 300 / 4


def test_second_derivatives_are_refused_instead_of_wrong():
    hidden, weight, _, labels, _ = case()
    out = token_statistics(hidden, weight, labels).logps.square().sum()
    (gradient,) = torch.autograd.grad(out, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_what_cannot_be_computed_is_named():
    hidden, weight, _, labels, frozen = case()
    with pytest.raises(ValueError, match="ref_kls needs the reference"):
        token_statistics(hidden, weight, labels, quantities=(RefKl(),))
    with pytest.raises(ValueError, match="the reference has 10 tokens and 37 words; the policy 9 and 37"):
        token_statistics(hidden[:9], weight, labels[:9], quantities=(RefKl(),), reference=frozen)
    for wrong, message in {
        "gem_beta": lambda: GemGap(0.0), "gem_weighting": lambda: GemGap(0.7, "square"),
        "kl_direction": lambda: RefKl("sideways"), "eaft_top_k": lambda: TopKEntropy(1),
    }.items():  # fmt: skip
        with pytest.raises(ValueError, match=wrong):
            message()
