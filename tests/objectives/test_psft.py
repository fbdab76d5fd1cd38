"""Laws of the clipped objective and of plain SFT, in float64."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from psft.errors import RequestError
from psft.objectives import psft_loss, resolve_objective, sft_loss
from psft.window import Window
from psft.window.schedule import Step


@st.composite
def batches(draw):
    """(logps, old_logps, mask): unequal log-probs in nats, at least one counted token."""
    rows, length = draw(st.integers(1, 4)), draw(st.integers(1, 6))
    numbers = st.lists(st.floats(-12, 0, width=64), min_size=rows * length, max_size=rows * length)
    logps, old = (torch.tensor(draw(numbers), dtype=torch.float64).view(rows, length) for _ in range(2))
    mask = torch.tensor(draw(st.lists(st.booleans(), min_size=rows * length, max_size=rows * length))).view(
        rows, length
    )
    mask[0, 0] = True
    return logps.requires_grad_(), old, mask


def grad(loss, x):
    return torch.autograd.grad(loss, x)[0]


@given(batches())
def test_one_mini_batch_per_window_has_the_sft_gradient(batch):
    """Goes red if `ratio` is detached, or if `- old_logps` is dropped."""
    logps, _, mask = batch
    n = mask.sum().clamp(min=1)
    psft = psft_loss(logps, logps.detach(), mask, epsilon_high=0.28, normalizer=n)
    assert torch.equal(grad(psft.loss, logps), grad(sft_loss(logps, mask, normalizer=n).loss, logps))
    assert psft.loss.item() == pytest.approx(-1.0)


@given(batches(), st.floats(0, 0.99), st.floats(0.01, 3))
def test_it_is_the_ppo_surrogate_with_advantage_one_for_every_lower_bound(batch, epsilon_low, epsilon_high):
    """Goes red if the clip is two-sided or at exp(epsilon) instead of 1 + epsilon."""
    logps, old, mask = batch
    ratio = (logps - old).exp()
    surrogate = torch.minimum(ratio, ratio.clamp(1 - epsilon_low, 1 + epsilon_high))
    want = -(surrogate * mask).sum() / 7
    got = psft_loss(logps, old, mask, epsilon_high=epsilon_high, normalizer=7).loss
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


@given(batches())
def test_beyond_the_bound_and_behind_the_mask_there_is_no_gradient(batch):
    """Goes red if clipped tokens keep a gradient (a straight-through clip) or the metric counts the lower side."""
    logps, old, mask = batch
    beyond = mask & (logps - old > math.log1p(0.28))
    out = psft_loss(logps, old, mask, epsilon_high=0.28, normalizer=10)
    gradient = grad(out.loss, logps)
    assert not gradient[beyond].any() and not gradient[~mask].any()
    inside = mask & ~beyond
    torch.testing.assert_close(gradient[inside], -(logps - old).exp()[inside] / 10, rtol=1e-12, atol=0)
    assert out.metrics["clip_fraction"].item() == pytest.approx(beyond.sum().item() / 10)


@pytest.mark.parametrize("poison", [float("-inf"), float("inf"), float("nan")])
def test_anything_behind_the_mask_changes_neither_loss_nor_gradient(poison):
    """Goes red if the mask is applied after exp: the loss is then nan while the gradient stays right."""
    logps = torch.tensor([[-0.5, poison, -2.0]], dtype=torch.float64, requires_grad=True)
    old = torch.tensor([[-0.7, poison, -1.0]], dtype=torch.float64)
    mask = torch.tensor([[True, False, True]])
    for out in (psft_loss(logps, old, mask, epsilon_high=0.28, normalizer=2), sft_loss(logps, mask, normalizer=2)):
        assert math.isfinite(out.loss.item()) and torch.isfinite(grad(out.loss, logps)).all()
    clean = psft_loss(logps[:, ::2], old[:, ::2], mask[:, ::2], epsilon_high=0.28, normalizer=2).loss
    assert psft_loss(logps, old, mask, epsilon_high=0.28, normalizer=2).loss.item() == clean.item()


def test_a_huge_ratio_is_clipped_without_overflow():
    """Goes red if the clip is applied after exp: exp(2000) is inf and its gradient nan."""
    logps = torch.tensor([[0.0]], dtype=torch.float64, requires_grad=True)
    out = psft_loss(
        logps, torch.tensor([[-2000.0]], dtype=torch.float64), torch.tensor([[True]]), epsilon_high=0.28, normalizer=1
    )
    assert out.loss.item() == pytest.approx(-1.28) and grad(out.loss, logps).item() == 0.0


def test_worked_by_hand():
    """old p = 1/2, 1/4, 1/10; new p = 1/2, 1/2, 1/20: ratios 1, 2, 1/2; clipped at 1.28: 1 + 1.28 + 0.5 = 2.78."""
    old = torch.tensor([[0.5, 0.25, 0.1]], dtype=torch.float64).log()
    logps = torch.tensor([[0.5, 0.5, 0.05]], dtype=torch.float64).log().requires_grad_()
    out = psft_loss(logps, old, torch.ones(1, 3, dtype=torch.bool), epsilon_high=0.28, normalizer=3)
    assert out.loss.item() == pytest.approx(-2.78 / 3, rel=1e-12)
    assert grad(out.loss, logps).tolist()[0] == pytest.approx([-1 / 3, 0, -0.5 / 3], rel=1e-12)
    free = psft_loss(logps, old, torch.ones(1, 3, dtype=torch.bool), epsilon_high=math.inf, normalizer=3)
    assert free.loss.item() == pytest.approx(-3.5 / 3, rel=1e-12) and free.metrics["clip_fraction"].item() == 0


@settings(max_examples=30)
@given(batches(), st.integers(1, 5))
def test_the_cut_into_micro_batches_changes_nothing(batch, at):
    logps, old, mask = batch
    whole = psft_loss(logps, old, mask, epsilon_high=0.28, normalizer=5)
    parts = [
        psft_loss(logps[:, s], old[:, s], mask[:, s], epsilon_high=0.28, normalizer=5)
        for s in (slice(at), slice(at, None))
    ]
    torch.testing.assert_close(sum(p.loss for p in parts), whole.loss, rtol=1e-12, atol=1e-14)


def test_no_counted_token_gives_zero_and_keeps_the_graph():
    logps = torch.zeros(2, 2, requires_grad=True)
    nothing = torch.zeros(2, 2, dtype=torch.bool)
    for out in (
        psft_loss(logps, logps.detach(), nothing, epsilon_high=0.28, normalizer=1),
        sft_loss(logps, nothing, normalizer=1),
    ):
        assert out.loss.item() == 0 and not grad(out.loss, logps).any()


def test_wrong_shapes_and_bounds_are_refused():
    x, mask = torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match="one shape"):
        psft_loss(x, x[:, :2], mask, epsilon_high=0.28, normalizer=1)
    with pytest.raises(ValueError, match="epsilon_high=0"):
        psft_loss(x, x, mask, epsilon_high=0, normalizer=1)


def test_objectives_are_found_by_name_and_path_and_misspellings_get_a_suggestion():
    psft = resolve_objective("psft", {"epsilon_high": 0.2})
    assert psft.needs_old_logps and dict(psft.settings) == {"epsilon_high": 0.2}
    assert not resolve_objective("psft.objectives.sft:sft_loss", {}).needs_old_logps
    for name, message in {
        "pstf": "'psft'",
        "no_such.module:f": "cannot be imported",
        "math:no_such": "cannot be imported",
    }.items():
        with pytest.raises(RequestError, match=message):
            resolve_objective(name, {})
    with pytest.raises(RequestError, match="takes x"):
        resolve_objective("math:cos", {})


def test_a_window_hands_out_each_mini_batch_once_with_its_old_logps():
    steps = [Step(0, k, 3, 0, 1) for k in (1, 2, 3)]
    window = Window(steps, [[{"id": 0}], [{"id": 1}, {"id": 2}], [{"id": 3}]])
    window.store_old_logps(1, 1, torch.full((1, 2), -0.5, dtype=torch.float64))
    assert window.take()[1] == [{"id": 0}] and window.old_logps(0) is None
    assert window.take()[0].mini_batch == 2
    assert window.old_logps(1).dtype == torch.float32 and window.old_logps(0) is None
    with pytest.raises(AssertionError, match="old policy is gone"):
        window.store_old_logps(1, 0, torch.zeros(1))
    window.take()
    assert window.is_spent
