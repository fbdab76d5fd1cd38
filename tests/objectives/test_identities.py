"""Where two objectives must agree, they do: loss and gradient, in float64."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from psft.objectives.asft import asft_loss
from psft.objectives.chord_phi import chord_phi_loss
from psft.objectives.dft import dft_loss
from psft.objectives.eaft import eaft_loss
from psft.objectives.iw_sft import iw_sft_loss, iw_sft_token_loss
from psft.objectives.psft import psft_loss
from psft.objectives.psft_soft import psft_smoothed_loss, psft_soft_loss
from psft.objectives.psft_tv import psft_tv_loss
from psft.objectives.sft import sft_loss
from psft.objectives.sft_kl import sft_kl_loss, sft_kl_target_loss

N = 5.0
few = settings(max_examples=30, deadline=None)


@st.composite
def batches(draw, lowest=-30.0):
    """(logps with gradient, another policy's logps, something positive, mask); nats, log-ratios beyond 20 included."""
    shape = draw(st.integers(1, 4)), draw(st.integers(1, 6))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    logps, other, positive = (torch.rand(shape, generator=generator, dtype=torch.float64) for _ in range(3))
    mask = torch.rand(shape, generator=generator) < 0.8
    return (lowest * logps).requires_grad_(), lowest * other, 3 * positive, mask


def grad(output, logps):
    return torch.autograd.grad(output.loss, logps, retain_graph=True)[0]


def assert_equal(one, other, logps, rtol=1e-11):
    """Loss and gradient agree."""
    torch.testing.assert_close(one.loss, other.loss, rtol=rtol, atol=1e-13)
    torch.testing.assert_close(grad(one, logps), grad(other, logps), rtol=rtol, atol=1e-13)


@few
@given(batches())
def test_without_their_coefficient_the_kl_objectives_are_what_they_penalise(batch):
    """Goes red if the coefficient scales anything but the KL: asft is then not dft, sft_kl not sft."""
    logps, ref, kls, mask = batch
    sft = sft_loss(logps, mask, normalizer=N)
    assert_equal(sft_kl_loss(logps, kls, mask, kl_coef=0, normalizer=N), sft, logps)
    assert_equal(asft_loss(logps, kls, mask, kl_coef=0, normalizer=N), dft_loss(logps, mask, normalizer=N), logps)
    for direction in ("forward", "reverse"):
        for estimator in ("k1", "k2", "k3"):
            names = {"kl_direction": direction, "kl_estimator": estimator}
            assert_equal(sft_kl_target_loss(logps, ref, mask, kl_coef=0, normalizer=N, **names), sft, logps)


@few
@given(batches())
def test_without_a_bound_the_clipped_objectives_are_one(batch):
    """Goes red if one of them does not hold an infinite bound at e^20, metrics included, or alpha = 0 shrinks."""
    logps, old, _, mask = batch
    psft = psft_loss(logps, old, mask, epsilon_high=math.inf, normalizer=N)
    for other in (
        psft_tv_loss(logps, old, mask, tv_delta=math.inf, normalizer=N),
        psft_smoothed_loss(logps, old, mask, soft_alpha=0, normalizer=N),
    ):
        assert_equal(other, psft, logps)
        for name in other.metrics:
            torch.testing.assert_close(other.metrics[name], psft.metrics[name])


@few
@given(batches())
def test_a_wide_gate_is_the_unclipped_ratio(batch):
    """Goes red if the gate's slope is not 4 / tau, or a held ratio has a weight: for tau -> 0 the gradient is r."""
    logps, old, _, mask = batch
    sapo = psft_soft_loss(logps, old, mask, soft_temperature=1e-15, normalizer=N)
    psft = psft_loss(logps, old, mask, epsilon_high=math.inf, normalizer=N)
    torch.testing.assert_close(grad(sapo, logps), grad(psft, logps), rtol=1e-6, atol=0)
    torch.testing.assert_close(sapo.metrics["token_weight"], psft.metrics["token_weight"], rtol=1e-6, atol=0)


@few
@given(batches(lowest=-3.0), st.floats(0.05, 0.95), st.floats(0.01, 1.5))
def test_where_all_old_probabilities_are_equal_both_trust_regions_are_one(batch, p_old, epsilon):
    """Goes red if the bound on the ratio is not 1 + delta / p_old, e.g. 1 + delta."""
    logps, _, _, mask = batch
    old = torch.full_like(logps, math.log(p_old)).detach()
    tv = psft_tv_loss(logps, old, mask, tv_delta=epsilon * p_old, normalizer=N)
    assert_equal(tv, psft_loss(logps, old, mask, epsilon_high=epsilon, normalizer=N), logps)


@few
@given(batches(lowest=-3.0), st.floats(0.01, 0.5))
def test_psft_tv_has_the_gradient_of_dppos_masked_weight(batch, delta):
    """Goes red if the region is on p / p_old or |p - p_old|: DPPO's is sg(r) log p where p - p_old <= delta."""
    logps, old, _, mask = batch
    is_inside = mask & (logps.exp() - old.exp() <= delta)
    dppo = -((logps - old).exp().detach() * logps * is_inside).sum() / N
    got = grad(psft_tv_loss(logps, old, mask, tv_delta=delta, normalizer=N), logps)
    torch.testing.assert_close(got, torch.autograd.grad(dppo, logps)[0], rtol=1e-11, atol=0)


@few
@given(batches())
def test_a_policy_that_is_its_reference_is_trained_by_sft(batch):
    """Goes red if iw_sft's weight is not 1 there, or k2 and k3 are not 0."""
    logps, _, _, mask = batch
    sft, ref = sft_loss(logps, mask, normalizer=N), logps.detach()
    ids = torch.arange(len(logps))[:, None].expand_as(logps)
    assert_equal(iw_sft_loss(logps, ref, ids, mask, iw_temperature=3.0, normalizer=N), sft, logps)
    assert_equal(iw_sft_token_loss(logps, ref, mask, normalizer=N), sft, logps)
    for direction in ("forward", "reverse"):
        for estimator in ("k2", "k3"):
            names = {"kl_direction": direction, "kl_estimator": estimator}
            assert_equal(sft_kl_target_loss(logps, ref, mask, normalizer=N, **names), sft, logps)


def test_a_certain_token_has_the_sft_gradient_under_dft_and_none_under_chord():
    """Goes red if the weight is p's complement, or log p, instead of p."""
    logps = torch.zeros(2, 3, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[True, True, False], [True, False, True]])
    assert_equal(dft_loss(logps, mask, normalizer=N), sft_loss(logps, mask, normalizer=N), logps)
    assert not grad(chord_phi_loss(logps, mask, normalizer=N), logps).any()


@few
@given(batches(), st.sampled_from([0.5, 1.0, 2.0]), st.integers(2, 50))
def test_eaft_scalings_differ_by_a_constant_factor(batch, alpha, top_k):
    """Goes red if the scale is outside the power, or llama_factory divides by ln 20 instead of 3.0."""
    logps, _, entropies, mask = batch
    common = {"eaft_alpha": alpha, "eaft_top_k": top_k, "normalizer": N}
    axolotl = eaft_loss(logps, entropies, mask, eaft_scaling="axolotl", **common)
    for scaling, scale in {"paper": math.log(top_k), "llama_factory": 3.0}.items():
        other = eaft_loss(logps, entropies, mask, eaft_scaling=scaling, **common)
        assert_equal(axolotl._replace(loss=axolotl.loss / scale**alpha), other, logps)


@few
@given(batches())
def test_eaft_without_a_power_is_sft(batch):
    """Goes red if entropies of 0 give 0 / 0 or log 0 there."""
    logps, _, entropies, mask = batch
    entropies[:, 0] = 0
    got = eaft_loss(logps, entropies, mask, eaft_alpha=0, normalizer=N)
    assert_equal(got, sft_loss(logps, mask, normalizer=N), logps)


def test_an_entropy_rounded_below_zero_counts_as_zero():
    """Goes red if the entropy is not clamped: (-1e-9)^0.5 is nan."""
    logps = torch.full((1, 2), -1.0, requires_grad=True)
    mask = torch.ones(1, 2, dtype=torch.bool)
    out = eaft_loss(logps, torch.tensor([[-1e-9, 0.0]]), mask, eaft_alpha=0.5, normalizer=1)
    assert out.loss.item() == 0 and not grad(out, logps).any() and out.metrics["token_weight"].item() == 0


@few
@given(st.lists(st.integers(1, 6), min_size=1, max_size=4), st.integers(0, 2**31))
def test_sequences_packed_into_one_row_weigh_as_they_do_padded(lengths, seed):
    """Goes red if a weight is the mean over a row, or over padding too, instead of over a sequence's counted tokens."""
    generator = torch.Generator().manual_seed(seed)
    inside = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    logps, ref = (-3 * torch.rand(inside.shape, generator=generator, dtype=torch.float64) for _ in range(2))
    mask = inside & (torch.rand(inside.shape, generator=generator) < 0.7)  # prompts do not count either
    ids = torch.arange(len(lengths))[:, None].expand_as(inside)

    padded = logps.clone().requires_grad_()
    by_rows = iw_sft_loss(padded, ref, ids, mask, normalizer=N)
    packed = logps[inside][None].requires_grad_()
    in_one = iw_sft_loss(packed, ref[inside][None], ids[inside][None], mask[inside][None], normalizer=N)
    torch.testing.assert_close(in_one.loss, by_rows.loss)
    torch.testing.assert_close(grad(in_one, packed)[0], grad(by_rows, padded)[inside])
    torch.testing.assert_close(in_one.metrics, by_rows.metrics)


@few
@given(batches(), st.floats(0, 1))
def test_reverse_k3_on_demonstrations_only_rescales_sft(batch, coefficient):
    """Goes red if the directions are swapped: at most 1 - c is left of a token's pull, but it is never pushed back."""
    logps, ref, _, mask = batch
    got = grad(
        sft_kl_target_loss(
            logps, ref, mask, kl_coef=coefficient, kl_direction="reverse", kl_estimator="k3", normalizer=1
        ),
        logps,
    )
    assert (got[mask] <= -(1 - coefficient) + 1e-12).all() and not got[~mask].any()


@pytest.mark.parametrize(
    ("estimator", "ratio"), [("k2", math.exp(1 / 0.4)), ("k3", 1 + 1 / 0.4)], ids=["k2 at e^(1/c)", "k3 at 1 + 1/c"]
)
def test_forward_k3_and_k2_turn_where_the_docstring_says(estimator, ratio):
    """Goes red if the direction is swapped or the exponential is detached."""
    logps = torch.tensor([[-0.3]], dtype=torch.float64, requires_grad=True)
    mask = torch.ones(1, 1, dtype=torch.bool)
    for factor, sign in {0.99: -1, 1.0: 0, 1.01: 1}.items():
        ref = logps.detach() - math.log(ratio * factor)
        out = sft_kl_target_loss(logps, ref, mask, kl_coef=0.4, kl_estimator=estimator, normalizer=1)
        slope = grad(out, logps).item()
        assert abs(slope) < 1e-12 if sign == 0 else slope * sign > 1e-4
