"""Laws that every objective obeys, in float64. A new objective is covered by its line in `CASES`."""

import dataclasses
import importlib
import inspect
import math
import pkgutil
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

import psft.objectives
from psft.objectives.asft import asft_loss
from psft.objectives.chord_phi import chord_phi_loss
from psft.objectives.dft import dft_loss
from psft.objectives.eaft import eaft_loss
from psft.objectives.gem import gem_loss
from psft.objectives.iw_sft import iw_sft_loss, iw_sft_token_loss
from psft.objectives.psft import psft_loss
from psft.objectives.psft_soft import psft_smoothed_loss, psft_soft_loss
from psft.objectives.psft_tv import psft_tv_loss
from psft.objectives.sft import sft_loss
from psft.objectives.sft_kl import sft_kl_loss, sft_kl_target_loss

N = 7.0  # a normalizer that is not the number of counted tokens
FREE = 20.0  # nats: where an unbounded log-ratio is held
LEAVES = ("logps", "ref_kls", "gem_gaps")


class Batch(NamedTuple):
    """Everything an objective may ask for, (B, T) each. The fields have the names of the objectives' parameters."""

    logps: Tensor
    old_logps: Tensor
    ref_logps: Tensor
    ref_kls: Tensor
    topk_entropies: Tensor
    gem_gaps: Tensor
    sequence_ids: Tensor
    completion_mask: Tensor

    @property
    def p(self) -> Tensor:
        return self.logps.exp()

    @property
    def log_ratio(self) -> Tensor:
        return self.logps - self.old_logps

    @property
    def ref_log_ratio(self) -> Tensor:
        return self.logps - self.ref_logps

    def map(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        return Batch(*map(change, self))


@dataclasses.dataclass(frozen=True)
class Case:
    """One objective with settings, and what is known of its gradient.

    coefficient: -N * d loss / d logps of a counted token. others: the same for other leaves, by name.
    is_weighted: a stop-gradient weight stands in it, so finite differences do not see its gradient.
    at_rest: the coefficient where neither the old policy nor the reference differs from the policy.
    log_bound: nats; the log-ratio beyond which there is no gradient.
    """

    name: str
    function: Callable[..., Any]
    coefficient: Callable[[Batch], Any] | None
    metrics: str
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    others: dict[str, float] = dataclasses.field(default_factory=dict)
    is_weighted: bool = False
    at_rest: float | None = None
    log_bound: Callable[[Batch], Tensor] | None = None

    @property
    def needs(self) -> list[str]:
        return [name for name in inspect.signature(self.function).parameters if name in Batch._fields]


def bounded(is_inside: Tensor, ratio: Tensor) -> Tensor:
    return torch.where(is_inside, ratio, 0.0)


def free(b: Batch, scale: float = 1.0) -> Tensor:
    return bounded(b.log_ratio <= FREE, scale * b.log_ratio.exp())


def sapo(b: Batch, tau: float) -> Tensor:
    """4 s (1 - s) is 1 / cosh^2 of half the argument."""
    ratio = b.log_ratio.exp()
    return bounded(b.log_ratio <= FREE, ratio / torch.cosh(tau * (ratio - 1) / 2).square())


def one_weight_a_sequence(b: Batch, tau: float) -> Tensor:
    weights = torch.zeros_like(b.logps)
    for number in set(b.sequence_ids[b.completion_mask].tolist()):
        members = b.completion_mask & (b.sequence_ids == number)
        weights[members] = (tau * b.ref_log_ratio[members].mean()).exp().clamp(max=16)
    return weights


def tv_bound(b: Batch, delta: float) -> Tensor:
    return ((b.old_logps.exp() + delta).log() - b.old_logps).clamp(max=FREE)


WEIGHT, CLIP = "token_weight", "clip_fraction clippable_fraction token_weight"
TARGET_KLS = [  # (direction, estimator, coefficient at kl_coef 0.5, the same where policy = reference)
    ("reverse", "k1", lambda b: 0.5, 0.5),
    ("forward", "k1", lambda b: 1.5, 1.5),
    ("reverse", "k2", lambda b: 1 - 0.5 * b.ref_log_ratio, 1),
    ("forward", "k2", lambda b: 1 - 0.5 * b.ref_log_ratio, 1),
    ("reverse", "k3", lambda b: 0.5 + 0.5 * bounded(-b.ref_log_ratio <= FREE, (-b.ref_log_ratio).exp()), 1),
    ("forward", "k3", lambda b: 1.5 - 0.5 * bounded(b.ref_log_ratio <= FREE, b.ref_log_ratio.exp()), 1),
]
CASES = [
    Case("sft", sft_loss, lambda b: 1.0, "", at_rest=1),
    Case(
        "psft",
        psft_loss,
        lambda b: bounded(b.log_ratio.exp() <= 1.28, b.log_ratio.exp()),
        CLIP,
        at_rest=1,
        log_bound=lambda b: torch.full_like(b.logps, math.log(1.28)),
    ),
    Case(
        "psft-0.01",
        psft_loss,
        lambda b: bounded(b.log_ratio.exp() <= 1.01, b.log_ratio.exp()),
        CLIP,
        {"epsilon_high": 0.01},
        at_rest=1,
        log_bound=lambda b: torch.full_like(b.logps, math.log(1.01)),
    ),
    Case(
        "psft-inf",
        psft_loss,
        free,
        CLIP,
        {"epsilon_high": math.inf},
        at_rest=1,
        log_bound=lambda b: torch.full_like(b.logps, FREE),
    ),
    Case(
        "psft_tv",
        psft_tv_loss,
        lambda b: bounded((b.p - b.old_logps.exp() <= 0.2) & (b.log_ratio <= FREE), b.log_ratio.exp()),
        CLIP,
        at_rest=1,
        log_bound=lambda b: tv_bound(b, 0.2),
    ),
    Case(
        "psft_tv-0.01",
        psft_tv_loss,
        lambda b: bounded((b.p - b.old_logps.exp() <= 0.01) & (b.log_ratio <= FREE), b.log_ratio.exp()),
        CLIP,
        {"tv_delta": 0.01},
        at_rest=1,
        log_bound=lambda b: tv_bound(b, 0.01),
    ),
    Case("psft_soft-sapo", psft_soft_loss, lambda b: sapo(b, 1.0), WEIGHT, at_rest=1),
    Case("psft_soft-sapo-2.5", psft_soft_loss, lambda b: sapo(b, 2.5), WEIGHT, {"soft_temperature": 2.5}, at_rest=1),
    Case("psft_soft-pspo", psft_smoothed_loss, lambda b: free(b, 0.9), WEIGHT, at_rest=0.9),
    Case("psft_soft-pspo-0.4", psft_smoothed_loss, lambda b: free(b, 0.6), WEIGHT, {"soft_alpha": 0.4}, at_rest=0.6),
    Case("sft_kl-full", sft_kl_loss, lambda b: 1.0, "kl_ref_forward_full", others={"ref_kls": -0.5}),
    Case(
        "sft_kl-full-reverse",
        sft_kl_loss,
        lambda b: 1.0,
        "kl_ref_reverse_full",
        {"kl_direction": "reverse", "kl_coef": 0.2},
        others={"ref_kls": -0.2},
    ),
    *[
        Case(
            f"sft_kl-{estimator}-{direction}",
            sft_kl_target_loss,
            coefficient,
            f"kl_ref_{direction}_{estimator} token_weight",
            {"kl_direction": direction, "kl_estimator": estimator},
            at_rest=at_rest,
        )
        for direction, estimator, coefficient, at_rest in TARGET_KLS
    ],
    Case("dft", dft_loss, lambda b: b.p, WEIGHT, is_weighted=True),
    Case("chord_phi", chord_phi_loss, lambda b: b.p * (1 - b.p), WEIGHT, is_weighted=True),
    Case("iw_sft", iw_sft_loss, lambda b: one_weight_a_sequence(b, 1), WEIGHT, is_weighted=True, at_rest=1),
    Case(
        "iw_sft-0.3",
        iw_sft_loss,
        lambda b: one_weight_a_sequence(b, 0.3),
        WEIGHT,
        {"iw_temperature": 0.3},
        is_weighted=True,
        at_rest=1,
    ),
    Case(
        "iw_sft-token",
        iw_sft_token_loss,
        lambda b: b.ref_log_ratio.exp().clamp(0.2, 1.8),
        WEIGHT,
        is_weighted=True,
        at_rest=1,
    ),
    Case("gem", gem_loss, None, "", others={"gem_gaps": 1.0}),
    Case(
        "asft",
        asft_loss,
        lambda b: b.p,
        "token_weight kl_ref_forward_full",
        others={"ref_kls": -0.1},
        is_weighted=True,
    ),
    Case(
        "asft-reverse",
        asft_loss,
        lambda b: b.p,
        "token_weight kl_ref_reverse_full",
        {"kl_direction": "reverse", "kl_coef": 3.0},
        others={"ref_kls": -3.0},
        is_weighted=True,
    ),
    Case("eaft", eaft_loss, lambda b: b.topk_entropies / math.log(20), WEIGHT, is_weighted=True),
    Case(
        "eaft-0.5",
        eaft_loss,
        lambda b: (b.topk_entropies / math.log(50)).sqrt(),
        WEIGHT,
        {"eaft_alpha": 0.5, "eaft_top_k": 50},
        is_weighted=True,
    ),
    Case(
        "eaft-llama_factory",
        eaft_loss,
        lambda b: b.topk_entropies / 3,
        WEIGHT,
        {"eaft_scaling": "llama_factory"},
        is_weighted=True,
    ),
    Case("eaft-axolotl", eaft_loss, lambda b: b.topk_entropies, WEIGHT, {"eaft_scaling": "axolotl"}, is_weighted=True),
]
REFUSED = {  # (function, setting) -> wrong values
    (psft_loss, "epsilon_high"): (0, -0.1, math.nan),
    (psft_tv_loss, "tv_delta"): (0, -0.1, math.nan),
    (psft_soft_loss, "soft_temperature"): (0, -1, math.nan),
    (psft_smoothed_loss, "soft_alpha"): (-0.1, 1, math.nan),
    (sft_kl_loss, "kl_coef"): (-0.1, math.inf, math.nan),
    (sft_kl_loss, "kl_direction"): ("backward",),
    (sft_kl_target_loss, "kl_coef"): (-0.1, math.inf, math.nan),
    (sft_kl_target_loss, "kl_direction"): ("backward",),
    (sft_kl_target_loss, "kl_estimator"): ("full", "k4"),
    (iw_sft_loss, "iw_temperature"): (0, -1, math.nan),
    (asft_loss, "kl_coef"): (-0.1, math.inf, math.nan),
    (asft_loss, "kl_direction"): ("backward",),
    (eaft_loss, "eaft_alpha"): (-0.1, math.inf, math.nan),
    (eaft_loss, "eaft_scaling"): ("3.0",),
    (eaft_loss, "eaft_top_k"): (1, 0),
}
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
few = settings(max_examples=20, deadline=None)


@st.composite
def batches(draw, lowest=-12.0):
    """Log-probs in [lowest, 0] nats, some of them exactly 0; some entropies 0. Packed rows; ids are never in two rows.

    At least one token counts and one does not.
    """
    rows, length = draw(st.integers(1, 4)), draw(st.integers(2, 5))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def uniform(low, high, zeros=0.0):
        values = low + (high - low) * torch.rand(rows, length, generator=generator, dtype=torch.float64)
        return values * (torch.rand(rows, length, generator=generator) >= zeros)

    mask = uniform(0, 1) < draw(st.sampled_from([0.2, 0.5, 0.9]))
    mask[0, 0], mask[-1, -1] = True, False
    starts = (uniform(0, 1) < 0.3).cumsum(1)
    return Batch(
        logps=uniform(lowest, 0, zeros=0.1),
        old_logps=uniform(lowest, 0, zeros=0.1),
        ref_logps=uniform(lowest, 0, zeros=0.1),
        ref_kls=uniform(0, 5),
        topk_entropies=uniform(0, math.log(20), zeros=0.1),
        gem_gaps=uniform(-5, 5),
        sequence_ids=(starts + (length + 1) * torch.arange(rows)[:, None]) * draw(st.sampled_from([1, 10**9 + 7])),
        completion_mask=mask,
    )


def far(dtype=torch.float64):
    """Log-ratios of -1e4, 1e4 and 0 to the old policy and to the reference, each token a sequence of its own."""
    low = -1e4
    other = [[low, 0.0, low, 0.0]]
    return Batch(
        *(
            torch.tensor(x, dtype=dtype)
            for x in (
                [[0.0, low, low, 0.0]],
                other,
                other,
                [[0.0, 1e4, 1.0, 1e4]],
                [[0.0, math.log(20), 1.0, 0.0]],
                [[-1e4, 1e4, 0.0, 1.0]],
            )
        ),
        sequence_ids=torch.arange(4)[None],
        completion_mask=torch.ones(1, 4, dtype=torch.bool),
    )


class Result(NamedTuple):
    loss: Tensor
    grads: dict[str, Tensor]
    metrics: dict[str, Tensor]


def evaluate(case: Case, batch: Batch, normalizer: Any = N) -> Result:
    tensors = {name: getattr(batch, name) for name in case.needs}
    leaves = {name: x.clone().requires_grad_() for name, x in tensors.items() if name in LEAVES}
    output = case.function(**{**tensors, **leaves}, normalizer=normalizer, **case.settings)
    grads = torch.autograd.grad(output.loss, list(leaves.values()))
    return Result(output.loss.detach(), dict(zip(leaves, grads, strict=True)), output.metrics)


def assert_same(got: Result, want: Result, **tolerance: float) -> None:
    torch.testing.assert_close(got._asdict(), want._asdict(), **(tolerance or {"rtol": 1e-11, "atol": 1e-13}))


def counted(batch: Batch, coefficient: Any) -> Tensor:
    """The coefficient of each token, 0 where it does not count."""
    return torch.where(batch.completion_mask, torch.as_tensor(coefficient, dtype=torch.float64), 0.0)


def test_every_objective_and_every_setting_has_its_line():
    """Goes red if an objective's file is added, or a setting to one, without a line in CASES or REFUSED."""
    found = set()
    for info in pkgutil.iter_modules(psft.objectives.__path__, "psft.objectives."):
        module = importlib.import_module(info.name)
        functions = inspect.getmembers(module, inspect.isfunction)
        found |= {f for name, f in functions if name.endswith("_loss") and f.__module__ == info.name}
    assert {case.function for case in CASES} == found
    quantities = {*Batch._fields, "normalizer"}
    assert set(REFUSED) == {(f, s) for f in found for s in inspect.signature(f).parameters if s not in quantities}


@every_case
@few
@given(batch=batches())
def test_the_gradient_is_the_closed_form(case, batch):
    """Goes red if a weight is not detached, a clamp is dropped, or a token takes another sequence's weight."""
    grads = evaluate(case, batch).grads
    expected = {**({} if case.coefficient is None else {"logps": case.coefficient(batch)}), **case.others}
    assert set(grads) == set(expected)
    for name, coefficient in expected.items():
        torch.testing.assert_close(grads[name], -counted(batch, coefficient) / N, rtol=1e-10, atol=1e-12)


@every_case
def test_log_ratios_of_ten_thousand_stay_finite_and_keep_the_closed_form(case):
    """Goes red if any exp is taken before its clamp: inf forward, nan backward. Float32 overflows sooner.

    Or if token_weight counts a ratio that is held and has no gradient.
    """
    for batch in (far(), far(torch.float32)):
        result = evaluate(case, batch)
        for value in (result.loss, *result.grads.values(), *result.metrics.values()):
            assert torch.isfinite(value).all(), result
        if case.coefficient is not None:
            want = -counted(batch, case.coefficient(batch)).to(batch.logps.dtype) / N
            torch.testing.assert_close(result.grads["logps"], want, rtol=1e-5, atol=1e-7)
        if "token_weight" in result.metrics:
            weight = -result.grads["logps"].sum()
            torch.testing.assert_close(result.metrics["token_weight"], weight, rtol=1e-5, atol=1e-3)  # +-5e3 cancel


@pytest.mark.parametrize(
    "case",
    [case for case in CASES if case.is_weighted and {"ref_logps", "topk_entropies"} & set(case.needs)],
    ids=lambda case: case.name,
)
def test_a_weight_passes_no_gradient_to_what_it_is_made_of(case):
    """Goes red if `.detach()` is left out at the entropies, or `no_grad` around the reference's log-probs."""
    names = [name for name in ("ref_logps", "topk_entropies") if name in case.needs]
    made_of = {name: getattr(far(), name).requires_grad_() for name in names}
    tensors = {name: getattr(far(), name).requires_grad_(name in LEAVES) for name in case.needs}
    output = case.function(**{**tensors, **made_of}, normalizer=N, **case.settings)
    for name, tensor in made_of.items():
        assert torch.autograd.grad(output.loss, tensor, retain_graph=True, allow_unused=True) == (None,), name


@pytest.mark.parametrize("case", [case for case in CASES if not case.is_weighted], ids=lambda case: case.name)
@settings(max_examples=10, deadline=None)
@given(batch=batches(lowest=-2.0))
def test_finite_differences_agree(case, batch):
    """Goes red if a ratio or an estimator is detached. Away from the kink: a difference across it means nothing."""
    if case.log_bound is not None:
        assume(bool(((batch.log_ratio - case.log_bound(batch)).abs() > 1e-4).all()))
    leaves = [getattr(batch, name).clone().requires_grad_() for name in case.needs if name in LEAVES]
    names = [name for name in case.needs if name in LEAVES]
    fixed = {name: getattr(batch, name) for name in case.needs if name not in LEAVES}

    def loss(*values: Tensor) -> Tensor:
        return case.function(**dict(zip(names, values, strict=True)), **fixed, normalizer=N, **case.settings).loss

    assert torch.autograd.gradcheck(loss, leaves)


@pytest.mark.parametrize("case", [case for case in CASES if case.log_bound], ids=lambda case: case.name)
@few
@given(batch=batches())
def test_beyond_the_bound_there_is_no_gradient_and_the_metrics_count_it(case, batch):
    """Goes red if the clip passes a gradient, acts on the lower side, or clippable counts what can never reach it."""
    mask, bound = batch.completion_mask, case.log_bound(batch)
    beyond = mask & (batch.log_ratio > bound)
    result = evaluate(case, batch)
    assert not result.grads["logps"][beyond | ~mask].any() and result.grads["logps"][mask & ~beyond].all()
    assert result.metrics["clip_fraction"].item() == pytest.approx(beyond.sum().item() / N)
    reachable = mask & (bound < -batch.old_logps)  # at p = 1 the log-ratio is -old_logps
    assert result.metrics["clippable_fraction"].item() == pytest.approx(reachable.sum().item() / N)
    assert result.metrics["clip_fraction"] <= result.metrics["clippable_fraction"]


@pytest.mark.parametrize(
    ("function", "arguments", "log_bound"),
    [
        (psft_loss, {}, math.log1p(0.28)),
        (psft_loss, {"epsilon_high": math.inf}, FREE),
        (psft_tv_loss, {"tv_delta": math.inf}, FREE),
        (psft_smoothed_loss, {"soft_alpha": 0.0}, FREE),
    ],
)
def test_at_the_bound_itself_the_gradient_is_the_inner_one(function, arguments, log_bound):
    """Goes red if `torch.minimum` holds the ratio: at a tie it halves the gradient. Or if > becomes >= in a metric."""
    logps = torch.zeros(1, 1, dtype=torch.float64, requires_grad=True)
    mask = torch.ones(1, 1, dtype=torch.bool)
    output = function(logps, torch.full_like(mask, -log_bound, dtype=torch.float64), mask, normalizer=1, **arguments)
    assert torch.autograd.grad(output.loss, logps)[0].item() == pytest.approx(-math.exp(log_bound))
    assert output.metrics["token_weight"].item() == pytest.approx(math.exp(log_bound))


@pytest.mark.parametrize("case", [case for case in CASES if case.at_rest is not None], ids=lambda case: case.name)
@few
@given(batch=batches())
def test_where_nothing_has_moved_the_gradient_is_that_of_sft(case, batch):
    """Goes red if `- old_logps` or `- ref_logps` is dropped, or a temperature scales the gradient at a ratio of 1.

    k1 and the smoothed ratio have another constant there, as their equations say.
    """
    batch = batch._replace(old_logps=batch.logps, ref_logps=batch.logps)
    sft = evaluate(CASES[0], batch).grads["logps"]
    torch.testing.assert_close(evaluate(case, batch).grads["logps"], case.at_rest * sft, rtol=1e-14, atol=0)


@every_case
@few
@given(batch=batches())
def test_metrics_have_no_graph_and_token_weight_is_minus_the_summed_gradient(case, batch):
    """Goes red if a metric keeps the graph, counts padding, forgets the normalizer, or weighs clipped tokens."""
    result = evaluate(case, batch)
    assert set(result.metrics) == set(case.metrics.split())
    for value in result.metrics.values():
        assert value.shape == () and not value.requires_grad
    if "token_weight" in result.metrics:
        want = -result.grads["logps"].sum()
        torch.testing.assert_close(result.metrics["token_weight"], want, rtol=1e-10, atol=1e-12)


@every_case
@few
@given(batch=batches(), poison=st.sampled_from([-math.inf, math.inf, math.nan]), number=st.sampled_from([-1, 10**15]))
def test_anything_behind_the_mask_changes_nothing(case, batch, poison, number):
    """Goes red if the mask comes after exp or after a product: the loss is nan, or the gradient alone is."""
    mask = batch.completion_mask
    poisoned = batch.map(lambda x: x.where(mask, poison) if x.is_floating_point() else x)
    poisoned = poisoned._replace(sequence_ids=batch.sequence_ids.where(mask, number))
    assert_same(evaluate(case, poisoned), evaluate(case, batch), rtol=0, atol=0)


@every_case
@few
@given(batch=batches(), seed=st.integers(0, 2**31))
def test_the_order_of_rows_and_of_tokens_changes_nothing(case, batch, seed):
    """Goes red if a weight depends on a token's place, e.g. sequences are found by their borders or row numbers."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = (torch.randperm(size, generator=generator) for size in batch.logps.shape)
    shuffled = evaluate(case, batch.map(lambda x: x[rows][:, columns]))
    whole = evaluate(case, batch)
    grads = {name: grad[rows][:, columns] for name, grad in whole.grads.items()}
    assert_same(shuffled, whole._replace(grads=grads))


@every_case
@few
@given(batch=batches(), at=st.integers(0, 4))
def test_the_cut_into_micro_batches_changes_nothing(case, batch, at):
    """Goes red if anything is divided by the tokens or rows of the micro-batch instead of the step's normalizer."""
    parts = [evaluate(case, batch.map(lambda x, s=s: x[s]), 8) for s in (slice(at), slice(at, None))]
    whole = evaluate(case, batch, 8)
    summed = Result(
        parts[0].loss + parts[1].loss,
        {name: torch.cat([part.grads[name] for part in parts]) for name in whole.grads},
        {name: parts[0].metrics[name] + parts[1].metrics[name] for name in whole.metrics},
    )
    assert_same(summed, whole)


@every_case
@few
@given(batch=batches())
def test_everything_is_divided_by_the_normalizer_once(case, batch):
    """Goes red if the loss or a metric is not divided by the normalizer, or divided twice."""
    once = evaluate(case, batch, 1.0)
    divided = Result(once.loss / 8, *({k: x / 8 for k, x in d.items()} for d in (once.grads, once.metrics)))
    assert_same(evaluate(case, batch, torch.tensor(8)), divided)


@every_case
def test_no_counted_token_gives_zero_and_keeps_the_graph(case):
    """Goes red if the loss divides by a count of its own (0 / 0), or is a constant when nothing counts."""
    for values in (far(), far().map(lambda x: x * math.nan if x.is_floating_point() else x)):
        result = evaluate(case, values._replace(completion_mask=torch.zeros(1, 4, dtype=torch.bool)))
        for value in (result.loss, *result.grads.values(), *result.metrics.values()):
            assert not value.any()


@every_case
def test_tensors_of_unequal_shape_are_refused_by_name(case):
    """Goes red if a tensor is left out of the check: broadcasting then hides a shifted or missing column."""
    for name in case.needs:
        batch = far()._replace(**{name: getattr(far(), name)[:, :1]})
        with pytest.raises(ValueError, match=rf"one shape.*{name} \(1, 1\)"):
            evaluate(case, batch)


@pytest.mark.parametrize(("function", "name"), REFUSED, ids=lambda x: getattr(x, "__name__", x))
def test_wrong_settings_are_refused_by_name(function, name):
    """Goes red if a check is dropped, or lets nan through."""
    (case, *_) = [case for case in CASES if case.function is function]
    for value in REFUSED[function, name]:
        with pytest.raises(ValueError, match=name):
            evaluate(dataclasses.replace(case, settings={**case.settings, name: value}), far())
