"""Each objective over the fused head: in float64 against `plain.py` on full logits, value and gradients; in float32
and bfloat16 no worse than the plain op at the same precision.
"""

from __future__ import annotations

import math

import pytest
import torch
from plain import plain_loss

from psft.objectives import objective_names, resolve_objective
from psft.ops import GemGap, ReferenceLogits, RefKl, TopKEntropy, reference, token_loss, token_statistics

CASES = [  # (objective, settings)
    ("sft", {}),
    ("psft", {}),
    ("psft", {"epsilon_high": 0.05}),
    ("psft", {"epsilon_high": math.inf}),
    ("psft_tv", {}),
    ("psft_tv", {"tv_delta": 0.02}),
    ("psft_tv", {"tv_delta": math.inf}),
    ("psft_soft", {}),
    ("psft_soft", {"soft_temperature": 2.5}),
    ("psft_soft", {"soft_form": "pspo"}),
    ("psft_soft", {"soft_form": "pspo", "soft_alpha": 0.4}),
    ("sft_kl", {}),
    ("sft_kl", {"kl_direction": "reverse", "kl_coef": 0.2}),
    *[
        ("sft_kl", {"kl_estimator": estimator, "kl_direction": direction})
        for estimator in ("k1", "k2", "k3")
        for direction in ("forward", "reverse")
    ],
    ("dft", {}),
    ("chord_phi", {}),
    ("iw_sft", {}),
    ("iw_sft", {"iw_temperature": 10.0}),
    ("iw_sft", {"iw_level": "token"}),
    ("gem", {}),
    ("gem", {"gem_beta": 1.3}),
    ("gem", {"gem_weighting": "logsigmoid"}),
    ("asft", {}),
    ("asft", {"kl_direction": "reverse", "kl_coef": 0.7}),
    ("eaft", {}),
    ("eaft", {"eaft_top_k": 5, "eaft_alpha": 0.5}),
    ("eaft", {"eaft_scaling": "llama_factory"}),
    ("eaft", {"eaft_scaling": "axolotl", "eaft_alpha": 2.0}),
]
IDS = ["-".join([name, *(f"{key}={value}" for key, value in settings.items())]) for name, settings in CASES]
CHUNK_ROWS = 4
NORMALIZER = 29.0  # more than the batch's counted tokens, as if another micro-batch held the rest
HEADS = pytest.mark.parametrize(
    "head",
    [{"scale": 1.0, "softcap": None, "with_bias": False}, {"scale": 0.5, "softcap": 6.0, "with_bias": True}],
    ids=["plain-head", "bias-scale-softcap"],
)


class Batch:
    """Rows of unequal length over a vocabulary of 31, labels drawn from policy and reference, every tensor float64.

    Old policy and reference are the policy with other weights, so that log-ratios of both signs occur; the
    reference's hidden states are wider, as a larger model's would be. Old and reference logits are constants.
    """

    def __init__(self, *, scale=1.0, softcap=None, with_bias=False):
        generator = torch.Generator().manual_seed(11)

        def normal(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        rows, length, vocabulary, width = 4, 9, 31, 8
        self.settings = {"logit_scale": scale, "softcap": softcap}
        self.hidden = (normal(rows, length, width) * 1.1 / scale).requires_grad_()
        self.weight = normal(vocabulary, width).requires_grad_()
        self.bias = normal(vocabulary).requires_grad_() if with_bias else None
        self.old_weight = self.weight.detach() + 0.5 * normal(vocabulary, width)
        self.ref_hidden = torch.cat([self.hidden.detach(), 0.3 * normal(rows, length, 3) / scale], dim=-1)
        self.ref_weight = torch.cat([self.weight.detach() + 0.5 * normal(vocabulary, width), normal(vocabulary, 3)], 1)
        policies = self.policies()
        probs = (policies["new"].softmax(-1) + policies["ref"].softmax(-1)) / 2
        self.labels = torch.multinomial(probs.flatten(0, 1), 1, generator=generator).view(rows, length)
        for row, (first, last) in enumerate([(0, 9), (2, 6), (1, 8), (4, 5)]):  # 9, 4, 7 and 1 counted tokens
            self.labels[row, :first] = self.labels[row, last:] = -100
        self.mask = self.labels != -100
        self.num_counted = int(self.mask.sum())
        assert self.num_counted > 2 * CHUNK_ROWS and self.num_counted % CHUNK_ROWS != 0, "there must be a leftover"

    def logits(self, hidden, weight):
        """(B, T, V): the head of transformers models, bias, then scale (Cohere), then soft cap (Gemma 2)."""
        logits = hidden @ weight.T
        if self.bias is not None:
            logits = logits + self.bias
        logits = logits * self.settings["logit_scale"]
        cap = self.settings["softcap"]
        return logits if cap is None else cap * (logits / cap).tanh()

    def policies(self):
        """(B, T, V) logits of the three policies, constants."""
        with torch.no_grad():
            return {
                "new": self.logits(self.hidden, self.weight),
                "old": self.logits(self.hidden, self.old_weight),
                "ref": self.logits(self.ref_hidden, self.ref_weight),
            }

    @property
    def leaves(self):
        return [self.hidden, self.weight] + ([] if self.bias is None else [self.bias])

    def plain(self, name, settings):
        constants = self.policies()
        logits = self.logits(self.hidden, self.weight)
        old_logits, ref_logits = constants["old"], constants["ref"]
        return plain_loss(
            name, logits, self.labels, old_logits=old_logits, ref_logits=ref_logits, normalizer=NORMALIZER, **settings
        )

    def fused(self, name, settings, *, is_packed=False):
        """The objective's output, and the log-probs it was given: (B, T), or (1, B T) with all sequences in one row."""
        objective = resolve_objective(name, settings)
        scored = token_statistics(*self.scored, **self.asked(objective))
        per_token = {"logps": scored.logps, **self.constants(), **scored.quantities}
        available = {key: self.scattered(value) for key, value in per_token.items()}
        available["sequence_ids"] = torch.arange(len(self.labels))[:, None].expand_as(self.labels)
        available["completion_mask"] = self.mask
        if is_packed:
            available = {key: value.reshape(1, -1) for key, value in available.items()}
        needed = {key: value for key, value in available.items() if key in objective.needs}
        return objective(**needed, normalizer=NORMALIZER), available["logps"]

    def in_forward(self, name, settings):
        """The loss by the op that computes gradients in the forward pass, or None where it cannot."""
        objective, constants = resolve_objective(name, settings), self.constants()
        if not objective.is_token_local:
            return None

        def chunk_loss(scored, rows):
            per_token = {"logps": scored.logps, **{k: x[rows] for k, x in constants.items()}, **scored.quantities}
            per_token["completion_mask"] = torch.ones_like(scored.logps, dtype=torch.bool)
            needed = {key: value[None] for key, value in per_token.items() if key in objective.needs}
            return objective(**needed, normalizer=NORMALIZER)

        return token_loss(*self.scored, chunk_loss, **self.asked(objective)).loss

    @property
    def scored(self):
        return self.hidden[self.mask], self.weight, self.labels[self.mask]

    @property
    def frozen_head(self):
        return {**self.settings, "bias": None if self.bias is None else self.bias.detach()}

    def asked(self, objective):
        """How the head is called for an objective."""
        reference_logits = ReferenceLogits(self.ref_hidden[self.mask], self.ref_weight, **self.frozen_head)
        return {
            "chunk_rows": CHUNK_ROWS, "quantities": objective.vocabulary, "bias": self.bias, **self.settings,
            "reference": reference_logits if objective.needs_ref_vocabulary else None,
        }  # fmt: skip

    def constants(self):
        """(N,) log-probs of the old policy and of the reference at the counted tokens."""
        with torch.no_grad():
            return {
                name: token_statistics(
                    hidden[self.mask], weight, self.labels[self.mask], chunk_rows=CHUNK_ROWS, **self.frozen_head
                ).logps
                for name, hidden, weight in (
                    ("old_logps", self.hidden, self.old_weight),
                    ("ref_logps", self.ref_hidden, self.ref_weight),
                )  # fmt: skip
            }

    def scattered(self, values):
        """(B, T) from one value per counted token; nan elsewhere, which nothing may see."""
        behind = torch.full(self.labels.shape, math.nan, dtype=values.dtype)
        return behind.masked_scatter(self.mask, values)


def gradients(loss, leaves):
    """Gradient for each leaf, zero where the loss does not depend on it."""
    found = torch.autograd.grad(loss, leaves, allow_unused=True)
    return [torch.zeros_like(leaf) if grad is None else grad for leaf, grad in zip(leaves, found, strict=True)]


@HEADS
@pytest.mark.parametrize(("name", "settings"), CASES, ids=IDS)
def test_loss_and_gradients_are_those_of_the_equation_on_full_logits(name, settings, head):
    """Goes red if the clip sits at e^epsilon, a stop-gradient is dropped, a KL direction or sign is swapped, a mean
    counts padding, the top k are not renormalised, the last chunk is lost, or the reference's soft cap is.
    """
    batch = Batch(**head)
    want = batch.plain(name, settings)
    wanted = gradients(want, batch.leaves)
    assert all(grad.any() for grad in wanted)
    for got in (batch.fused(name, settings)[0].loss, batch.in_forward(name, settings)):
        if got is None:
            assert name == "iw_sft" and settings.get("iw_level") != "token"
            continue
        assert got.dtype == torch.float64
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-14)
        for one, other in zip(wanted, gradients(got, batch.leaves), strict=True):
            torch.testing.assert_close(other, one, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("iw_temperature", [1.0, 10.0])
def test_sequences_packed_into_one_row_keep_their_own_importance_weight(iw_temperature):
    """Goes red if the mean runs over the row, or over the batch, and not over the sequence."""
    batch, settings = Batch(), {"iw_temperature": iw_temperature}
    got = batch.fused("iw_sft", settings, is_packed=True)[0].loss
    torch.testing.assert_close(got, batch.plain("iw_sft", settings), rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize(("name", "settings"), CASES, ids=IDS)
def test_token_weight_is_the_mean_coefficient_on_the_gradient_of_log_p(name, settings):
    """Goes red if clipped tokens keep their ratio in it, a factor is forgotten, or the KL's part has the wrong sign."""
    output, logps = Batch().fused(name, settings)
    weight = output.metrics.get("token_weight")
    if weight is None:
        assert name in ("sft", "gem", "sft_kl") and settings.get("kl_estimator", "full") == "full"
        return
    (coefficients,) = torch.autograd.grad(-output.loss, logps)
    assert not weight.requires_grad
    torch.testing.assert_close(weight, coefficients.sum(), rtol=1e-10, atol=1e-14)


def test_every_registered_objective_has_a_case():
    """Goes red if an objective is registered and not compared here."""
    assert {name for name, _ in CASES} == set(objective_names())


@HEADS
def test_the_batch_meets_every_bound_from_both_sides(head):
    """Goes red if a bound is never, or always, reached in the batch; or if clip_fraction counts something else."""
    batch = Batch(**head)
    index = batch.labels.clamp(min=0)[..., None]
    p = {name: logits.softmax(-1).gather(-1, index)[..., 0] for name, logits in batch.policies().items()}
    ratio, weight = p["new"] / p["old"], p["new"] / p["ref"]
    sequence_weight = torch.stack([weight.log()[b][batch.mask[b]].mean().mul(10.0).exp() for b in range(len(p["new"]))])
    bounds = {
        "psft": (ratio > 1.28)[batch.mask],
        "psft_tv": (p["new"] - p["old"] > 0.2)[batch.mask],
        "iw_sft, token, below": (weight < 0.2)[batch.mask],
        "iw_sft, token, above": (weight > 1.8)[batch.mask],
        "iw_sft, sequence": sequence_weight > 16.0,
    }
    for name, is_beyond in bounds.items():
        assert is_beyond.any() and not is_beyond.all(), name
    for name, clippable in {"psft": p["old"] < 1 / 1.28, "psft_tv": p["old"] < 0.8}.items():
        metrics = batch.fused(name, {})[0].metrics
        assert metrics["clip_fraction"].item() == pytest.approx(bounds[name].sum().item() / NORMALIZER)
        assert metrics["clippable_fraction"].item() == pytest.approx(clippable[batch.mask].sum().item() / NORMALIZER)


LN2, LN4 = math.log(2), math.log(4)
KL_FORWARD = math.log(1 / 4) / 8 + 3 * math.log(3 / 2) / 8 + LN2 / 2
KL_REVERSE = LN4 / 2 + math.log(2 / 3) / 4 - LN2 / 4
SIGMOID_1, SIGMOID_2 = 1 / (1 + math.exp(-1)), 1 / (1 + math.exp(-2))
TILT = 1 / (1 + 2**0.01)  # sigmoid(0.01 (z_v - z_y)), z_v = z_y - ln 2
TOP_2 = math.log(3) - 2 * LN2 / 3  # entropy of (2/3, 1/3)


@pytest.mark.parametrize(
    ("name", "settings", "loss", "gradient"),
    [
        ("sft", {}, LN2, -1 / 2),
        ("psft", {}, -1.28, 0),
        ("psft", {"epsilon_high": 1.5}, -2, -1),
        ("psft_tv", {}, -1.8, 0),
        ("psft_tv", {"tv_delta": 0.3}, -2, -1),
        ("psft_soft", {}, -4 * SIGMOID_1, -4 * SIGMOID_1 * (1 - SIGMOID_1)),
        ("psft_soft", {"soft_temperature": 2}, -2 * SIGMOID_2, -4 * SIGMOID_2 * (1 - SIGMOID_2)),
        ("psft_soft", {"soft_form": "pspo"}, -1.9, -0.9),
        ("sft_kl", {}, LN2 + KL_FORWARD / 2, -1 / 2 + 3 / 16),
        ("sft_kl", {"kl_direction": "reverse"}, LN2 + KL_REVERSE / 2, -1 / 2 + (LN4 - KL_REVERSE) / 4),
        ("sft_kl", {"kl_estimator": "k1"}, LN2 - LN4 / 2, -3 / 4),
        ("sft_kl", {"kl_estimator": "k1", "kl_direction": "reverse"}, LN2 + LN4 / 2, -1 / 4),
        ("sft_kl", {"kl_estimator": "k2"}, LN2 + LN4**2 / 4, -(1 - LN4 / 2) / 2),
        ("sft_kl", {"kl_estimator": "k2", "kl_direction": "reverse"}, LN2 + LN4**2 / 4, -(1 - LN4 / 2) / 2),
        ("sft_kl", {"kl_estimator": "k3"}, LN2 + (3 - LN4) / 2, -(1 - 3 / 2) / 2),
        ("sft_kl", {"kl_estimator": "k3", "kl_direction": "reverse"}, LN2 + (LN4 - 3 / 4) / 2, -(1 - 3 / 8) / 2),
        ("dft", {}, LN2 / 2, -1 / 4),
        ("chord_phi", {}, LN2 / 4, -1 / 8),
        ("iw_sft", {}, 4 * LN2, -2),
        ("iw_sft", {"iw_temperature": 3}, 16 * LN2, -8),
        ("iw_sft", {"iw_level": "token"}, 1.8 * LN2, -0.9),
        ("gem", {"gem_beta": 1}, -LN2 / 2, -1 / 2),
        ("gem", {"gem_beta": 0.5}, -LN2 / 3, -1 / 3),
        ("gem", {"gem_beta": 1, "gem_weighting": "logsigmoid"}, -TILT * LN2 / 2, -TILT / 2),
        ("asft", {}, LN2 / 2 + KL_FORWARD / 10, -1 / 4 + 3 / 80),
        ("asft", {"kl_direction": "reverse"}, LN2 / 2 + KL_REVERSE / 10, -1 / 4 + (LN4 - KL_REVERSE) / 20),
        ("eaft", {"eaft_top_k": 2}, TOP_2, -TOP_2 / LN2 / 2),
        ("eaft", {"eaft_top_k": 2, "eaft_scaling": "llama_factory"}, TOP_2 * LN2 / 3, -TOP_2 / 6),
        ("eaft", {"eaft_top_k": 3, "eaft_scaling": "axolotl", "eaft_alpha": 2}, 2.25 * LN2**3, -1.125 * LN2**2),
    ],
)
def test_the_plain_objectives_worked_by_hand(name, settings, loss, gradient):
    """Goes red if `plain.py` itself loses a `.detach()`, swaps a direction, or multiplies by gem_beta.

    One token: p = (1/2, 1/4, 1/4), old p = (1/4, 1/2, 1/4), ref = (1/8, 3/8, 1/2), label 0, N = 1. Ratio 2, p/ref 4.

    `gradient` is the one of z_0: for a loss of coefficient c on -grad log p it is -c (1 - p_0) = -c / 2.
    """
    policy, old, ref = (
        torch.tensor([[p]], dtype=torch.float64).log()
        for p in ([1 / 2, 1 / 4, 1 / 4], [1 / 4, 1 / 2, 1 / 4], [1 / 8, 3 / 8, 1 / 2])
    )
    policy.requires_grad_()
    got = plain_loss(name, policy, torch.tensor([[0]]), old_logits=old, ref_logits=ref, normalizer=1, **settings)
    assert got.item() == pytest.approx(loss, rel=1e-12)
    assert torch.autograd.grad(got, policy)[0][0, 0, 0].item() == pytest.approx(gradient, rel=1e-12, abs=1e-15)


OUTPUTS = {  # output -> what the head is asked for
    "logps": (),
    "entropies": (),
    "gem_gaps": (GemGap(),),
    "gem_gaps, logsigmoid": (GemGap(gem_weighting="logsigmoid"),),
    "ref_kls, forward": (RefKl(),),
    "ref_kls, reverse": (RefKl(kl_direction="reverse"),),
    "topk_entropies": (TopKEntropy(),),
}


def score_in(dtype, function, inputs, output):
    """[values, gradient of hidden, gradient of weight] of one output, computed by `function` in `dtype`."""
    *floats, labels = inputs
    hidden, weight, ref_hidden, ref_weight = (x.detach().to(dtype) for x in floats)
    hidden.requires_grad_(), weight.requires_grad_()
    reference_logits = ReferenceLogits(ref_hidden, ref_weight) if output.startswith("ref_kls") else None
    scored = function(hidden, weight, labels, chunk_rows=64, quantities=OUTPUTS[output], reference=reference_logits)
    key = output.split(",")[0]
    values = getattr(scored, key) if key in ("logps", "entropies") else scored.quantities[key]
    if key == "topk_entropies":
        assert not values.requires_grad
        return [values]
    pull = torch.randn(len(labels), generator=torch.Generator().manual_seed(9), dtype=torch.float64).to(values.dtype)
    return [values.detach(), *torch.autograd.grad((values * pull).sum(), [hidden, weight])]


def relative_error(values, truth):
    """Root mean square of the error over that of the truth: one wrong element of hundreds still shows."""
    return ((values.double() - truth).square().mean() / truth.square().mean()).sqrt().item()


@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_in_low_precision_the_fused_op_is_no_worse_than_the_plain_one(dtype, output):
    """Goes red if the fused op rounds logits, the reference's distribution or a sum to half precision, stores a value
    in the type of its input, or adds up the weight's gradient in bfloat16.

    Seen on a CPU (root mean square error over that of the float64 truth on the same rounded inputs). float32: 2e-7
    (log-probs) to 2e-6 (KL), 0.95 to 1.02 times the plain op's. bfloat16: values 1e-7 to 7e-7, the plain op's 3e-3 to
    3e-2; gradients 1.7e-3, which is what rounding the exact gradient costs, the plain op's 5e-3 to 3e-2.
    """
    generator = torch.Generator().manual_seed(3)
    hidden, weight = (torch.randn(*shape, generator=generator) for shape in ((200, 64), (1000, 64)))
    hidden = hidden * 3 / 8  # logits of standard deviation 3
    ref_hidden, ref_weight = (x + 0.1 * torch.randn(x.shape, generator=generator) for x in (hidden, weight))
    labels = torch.multinomial((hidden @ weight.T).softmax(-1), 1, generator=generator)[:, 0]
    inputs = [*(x.to(dtype) for x in (hidden, weight, ref_hidden, ref_weight)), labels]
    assert len(labels) % 64 != 0, "there must be a leftover chunk"

    truths = score_in(torch.float64, reference.token_statistics, inputs, output)
    plains = score_in(dtype, reference.token_statistics, inputs, output)
    fused = score_in(dtype, token_statistics, inputs, output)
    floor = torch.finfo(torch.float32).eps
    for what, truth, plain, got in zip(("value", "hidden", "weight"), truths, plains, fused, strict=False):
        error, allowed = relative_error(got, truth), 1.5 * relative_error(plain, truth) + floor
        assert error <= allowed, (what, error, allowed)
        rounding = relative_error(truth.to(got.dtype), truth)  # what storing the exact result would cost
        if dtype is torch.bfloat16:
            assert got.dtype == (torch.float32 if what == "value" else dtype)
            assert error <= 1.2 * rounding + 1e-5, (what, error, rounding)
