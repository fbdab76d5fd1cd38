"""PSFT is SFT for one mini-batch a window and PPO's surrogate otherwise; objectives are found; windows hand out."""

import pytest
import torch
from hypothesis import given
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


def test_a_huge_ratio_is_clipped_without_overflow():
    """Goes red if the clip is applied after exp: exp(2000) is inf and its gradient nan."""
    logps = torch.tensor([[0.0]], dtype=torch.float64, requires_grad=True)
    out = psft_loss(
        logps, torch.tensor([[-2000.0]], dtype=torch.float64), torch.tensor([[True]]), epsilon_high=0.28, normalizer=1
    )
    assert out.loss.item() == pytest.approx(-1.28) and grad(out.loss, logps).item() == 0.0


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
