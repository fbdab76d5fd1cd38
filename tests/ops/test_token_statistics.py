"""The chunked head against its plain twin, in value and in the gradient of every differentiable output."""

import pytest
import torch

from psft.ops import GemGap, lm_head, reference, token_statistics
from psft.ops.checks import check_positive, check_same_shape


def peaked(n, v, h, dtype=torch.float64):
    generator = torch.Generator().manual_seed(n * 1000 + v)
    hidden = torch.randn(n, h, generator=generator, dtype=dtype) * 2
    weight = torch.randn(v, h, generator=generator, dtype=dtype)
    bias = torch.randn(v, generator=generator, dtype=dtype)
    labels = torch.randint(0, v, (n,), generator=generator)
    return hidden, weight, bias, labels


@pytest.mark.parametrize("chunk_rows", [1, 4, 64])
@pytest.mark.parametrize(
    ("logit_scale", "softcap", "with_bias"), [(1.0, None, False), (0.25, None, True), (2.0, 5.0, True)]
)
def test_values_and_gradients_are_those_of_the_plain_twin(chunk_rows, logit_scale, softcap, with_bias, monkeypatch):
    """Goes red if the bias is scaled differently, the cap's derivative is left out, or a leftover is dropped."""
    monkeypatch.setattr(lm_head, "_BLOCK_ROWS", 3)
    hidden, weight, bias, labels = peaked(10, 37, 8)
    assert len(hidden) % 3 and 4 % 3, "there must be leftovers of blocks"
    assert chunk_rows == 1 or len(hidden) % chunk_rows != 0, "there must be a leftover chunk"
    leaves = [hidden, weight] + ([bias] if with_bias else [])
    for leaf in leaves:
        leaf.requires_grad_()
    settings = {"bias": bias if with_bias else None, "logit_scale": logit_scale, "softcap": softcap}
    pulls = torch.randn(2, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    outcomes = []
    for function in (reference.token_statistics, token_statistics):
        out = function(hidden, weight, labels, chunk_rows=chunk_rows, **settings)
        for pulled in (out.logps * pulls[0], out.entropies * pulls[1], out.logps * pulls[0] + out.entropies * pulls[1]):
            outcomes.append(
                [out.logps, out.entropies, out.is_top1, *torch.autograd.grad(pulled.sum(), leaves, retain_graph=True)]
            )
    for want, got in zip(outcomes[:3], outcomes[3:], strict=True):
        for one, other in zip(want, got, strict=True):
            torch.testing.assert_close(other, one, rtol=1e-10, atol=1e-10)


def test_gradcheck_in_float64():
    hidden, weight, bias, labels = (x.requires_grad_() if x.is_floating_point() else x for x in peaked(5, 7, 3))
    assert torch.autograd.gradcheck(
        lambda h, w, b: token_statistics(h, w, labels, bias=b, softcap=4.0, chunk_rows=2)[:2], (hidden, weight, bias)
    )


def test_half_precision_hidden_states_give_float32_statistics_close_to_the_truth():
    """Goes red if logits or their sum are rounded to bfloat16: the error is then a hundred times larger."""
    hidden, weight, _, labels = peaked(40, 500, 16, torch.float32)
    low_hidden, low_weight = hidden.bfloat16(), weight.bfloat16()
    truth = reference.token_statistics(low_hidden.double(), low_weight.double(), labels)
    got = token_statistics(low_hidden, low_weight, labels)
    assert got.logps.dtype == torch.float32
    assert (got.logps - truth.logps).abs().max() < 1e-4


def test_gradients_with_and_without_grad_mode_share_their_forward_to_the_bit():
    hidden, weight, _, labels = peaked(300, 50, 16, torch.float32)
    with torch.no_grad():
        quiet = token_statistics(hidden, weight, labels)
    loud = token_statistics(hidden.requires_grad_(), weight.requires_grad_(), labels)
    assert torch.equal(quiet.logps, loud.logps)


def test_no_row_at_all_keeps_the_graph_and_gives_zero_gradients():
    hidden = torch.zeros(0, 4, requires_grad=True)
    weight = torch.ones(5, 4, requires_grad=True)
    token_statistics(hidden, weight, torch.zeros(0, dtype=torch.long)).logps.sum().backward()
    assert weight.grad is not None and not weight.grad.any()


def test_huge_logits_stay_finite():
    """Logits of +-1000: exp overflows at 89 in float32. Goes red if a softmax forgets to subtract its maximum."""
    hidden = torch.tensor([[1000.0, -1000.0, 999.0]], requires_grad=True)
    out = token_statistics(hidden, torch.eye(3), torch.tensor([1]))
    assert out.logps.item() == pytest.approx(-2000.0, abs=1) and 0 <= out.entropies.item() < 1
    (out.logps + out.entropies).sum().backward()
    assert torch.isfinite(hidden.grad).all()


def test_a_label_as_likely_as_another_token_is_no_top_1_hit():
    """Goes red if a head of zeros, which knows nothing, is counted as right everywhere."""
    hidden = torch.tensor([[2.0, 2.0, 1.0], [0.0, 0.0, 0.0], [1.0, 3.0, 2.0], [1.0, 3.0, 2.0]])
    labels = torch.tensor([0, 2, 1, 2])
    for function in (token_statistics, reference.token_statistics):
        assert function(hidden, torch.eye(3), labels).is_top1.tolist() == [False, False, True, False]


def test_wrong_shapes_are_named():
    labels = torch.zeros(2, dtype=torch.long)
    with pytest.raises(ValueError, match=r"labels \(N,\)"):
        token_statistics(torch.zeros(3, 4), torch.zeros(5, 4), labels)
    with pytest.raises(ValueError, match="logps_only leaves the quantities out"):
        token_statistics(
            *peaked(4, 5, 3)[:2], torch.zeros(4, dtype=torch.long), quantities=(GemGap(),), logps_only=True
        )
    with pytest.raises(ValueError, match=r"a \(2,\), b \(3,\)"):
        check_same_shape(a=torch.zeros(2), b=torch.zeros(3))
    with pytest.raises(ValueError, match="x=nan"):
        check_positive(x=float("nan"), y=1.0)
