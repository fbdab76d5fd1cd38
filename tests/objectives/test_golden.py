"""Every objective on one 2x3 batch worked by hand: loss, gradients and metrics, with the settings' defaults where none
is given.

        token            1       2       3       4       5       (6: padding)
        p                1/2     1/2     1/20    1/4     7/8
        p_old            1/2     1/4     1/10    1/4     7/8
        r = p / p_old    1       2       1/2     1       1
        p_ref            1/4     1/8     1/20    1       7/8
        p / p_ref        2       4       1       1/4     1
        ref_kls          0.1     0.2     0.3     0.4     0.5     sum 1.5
        entropies        ln 2    0       ln 4    ln 2    ln 4
        gem_gaps         1       2       -3      0.5     0.25    sum 0.75

Tokens 1 to 3 are row 0 (and sequence 0), 4 and 5 row 1. N = 10: another micro-batch holds the other five tokens.
The negative log-likelihoods are ln 2, ln 2, ln 20, ln 4, ln 8/7, in all ln 2560/7. All sums below are before / N.
"""

import math

import pytest
import torch

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

LN2, LN4, LN20, LN8_7, NLL = (math.log(x) for x in (2, 4, 20, 8 / 7, 2560 / 7))
NAN = math.nan


def log(*probabilities):
    return [math.log(p) for p in probabilities] + [NAN]


BATCH = {
    "logps": log(1 / 2, 1 / 2, 1 / 20, 1 / 4, 7 / 8),
    "old_logps": log(1 / 2, 1 / 4, 1 / 10, 1 / 4, 7 / 8),
    "ref_logps": log(1 / 4, 1 / 8, 1 / 20, 1, 7 / 8),
    "ref_kls": [0.1, 0.2, 0.3, 0.4, 0.5, NAN],
    "topk_entropies": [LN2, 0, LN4, LN2, LN4, NAN],
    "gem_gaps": [1, 2, -3, 0.5, 0.25, NAN],
}
DFT = LN2 / 2 + LN2 / 2 + LN20 / 20 + LN4 / 4 + LN8_7 * 7 / 8  # sum of -p log p
GOLDEN = [  # function, settings, sum of the loss, coefficients on -d logps (or on -d gem_gaps), sums of the metrics
    (sft_loss, {}, NLL, [1, 1, 1, 1, 1], {}),
    # 2 is above 1.28; only tokens 1 to 4 were below 1 / 1.28 = 0.78
    (
        psft_loss,
        {},
        -(1 + 1.28 + 0.5 + 1 + 1),
        [1, 0, 0.5, 1, 1],
        {"clip_fraction": 1, "clippable_fraction": 4, "token_weight": 3.5},
    ),
    (
        psft_loss,
        {"epsilon_high": math.inf},
        -5.5,
        [1, 2, 0.5, 1, 1],
        {"clip_fraction": 0, "clippable_fraction": 0, "token_weight": 5.5},
    ),
    # bounds 1 + 0.2 / p_old: 1.4, 1.8, 3, 1.8, 1.23; only tokens 1 to 4 were below 1 - 0.2
    (
        psft_tv_loss,
        {},
        -(1 + 1.8 + 0.5 + 1 + 1),
        [1, 0, 0.5, 1, 1],
        {"clip_fraction": 1, "clippable_fraction": 4, "token_weight": 3.5},
    ),
    # tau = ln 9, sigmoid(tau (r - 1)) = 1 / (1 + 9^(1 - r)): 1/2, 9/10, 1/4, 1/2, 1/2, in all 2.65
    # and 4 s (1 - s) r: 1, 4 * 0.09 * 2 = 0.72, 4 * 3/16 / 2 = 0.375, 1, 1, in all 4.095
    (
        psft_soft_loss,
        {"soft_temperature": math.log(9)},
        -4 / math.log(9) * 2.65,
        [1, 0.72, 0.375, 1, 1],
        {"token_weight": 4.095},
    ),
    # 0.9 r + 0.1: 1, 1.9, 0.55, 1, 1
    (psft_smoothed_loss, {}, -5.45, [0.9, 1.8, 0.45, 0.9, 0.9], {"token_weight": 4.95}),
    (sft_kl_loss, {}, NLL + 0.5 * 1.5, [1, 1, 1, 1, 1], {"kl_ref_forward_full": 1.5}),
    # k1 is log(p / p_ref) reverse, minus that forward: ln 2, ln 4, 0, -ln 4, 0
    (
        sft_kl_target_loss,
        {"kl_estimator": "k1", "kl_direction": "reverse"},
        NLL + 0.5 * LN2,
        [0.5, 0.5, 0.5, 0.5, 0.5],
        {"kl_ref_reverse_k1": LN2, "token_weight": 2.5},
    ),
    (
        sft_kl_target_loss,
        {"kl_estimator": "k1"},
        NLL - 0.5 * LN2,
        [1.5, 1.5, 1.5, 1.5, 1.5],
        {"kl_ref_forward_k1": -LN2, "token_weight": 7.5},
    ),
    # (1 + 4 + 0 + 4 + 0) ln(2)^2 / 2
    (
        sft_kl_target_loss,
        {"kl_estimator": "k2"},
        NLL + 2.25 * LN2**2,
        [1 - LN2 / 2, 1 - LN2, 1, 1 + LN2, 1],
        {"kl_ref_forward_k2": 4.5 * LN2**2, "token_weight": 5 - LN2 / 2},
    ),
    # reverse k3: 1/2 - 1 + ln 2, 1/4 - 1 + ln 4, 0, 4 - 1 - ln 4, 0; coefficient 1/2 + 1/2 p_ref / p
    (
        sft_kl_target_loss,
        {"kl_direction": "reverse"},
        NLL + 0.5 * (1.75 + LN2),
        [0.75, 0.625, 1, 2.5, 1],
        {"kl_ref_reverse_k3": 1.75 + LN2, "token_weight": 5.875},
    ),
    # forward k3: 2 - 1 - ln 2, 4 - 1 - ln 4, 0, 1/4 - 1 + ln 4, 0; coefficient 3/2 - 1/2 p / p_ref: token 2 turns back
    (
        sft_kl_target_loss,
        {},
        NLL + 0.5 * (3.25 - LN2),
        [0.5, -0.5, 1, 1.375, 1],
        {"kl_ref_forward_k3": 3.25 - LN2, "token_weight": 3.375},
    ),
    (dft_loss, {}, DFT, [0.5, 0.5, 0.05, 0.25, 0.875], {"token_weight": 2.175}),
    # p (1 - p)
    (
        chord_phi_loss,
        {},
        0.25 * LN2 + 0.25 * LN2 + 0.0475 * LN20 + 0.1875 * LN4 + 0.109375 * LN8_7,
        [0.25, 0.25, 0.0475, 0.1875, 0.109375],
        {"token_weight": 0.844375},
    ),
    # geometric means of p / p_ref: (2 * 4 * 1)^(1/3) = 2 and (1/4 * 1)^(1/2) = 1/2
    (
        iw_sft_loss,
        {},
        2 * (LN2 + LN2 + LN20) + (LN4 + LN8_7) / 2,
        [2, 2, 2, 0.5, 0.5],
        {"token_weight": 7},
    ),
    # to the fifth power: 32, held at 16, and 1/32
    (
        iw_sft_loss,
        {"iw_temperature": 5},
        16 * (LN2 + LN2 + LN20) + (LN4 + LN8_7) / 32,
        [16, 16, 16, 1 / 32, 1 / 32],
        {"token_weight": 48.0625},
    ),
    # 2 and 4 are held at 1.8
    (
        iw_sft_token_loss,
        {},
        1.8 * LN2 + 1.8 * LN2 + LN20 + LN4 / 4 + LN8_7,
        [1.8, 1.8, 1, 0.25, 1],
        {"token_weight": 5.85},
    ),
    (gem_loss, {}, -0.75, [1, 1, 1, 1, 1], {}),
    (
        asft_loss,
        {},
        DFT + 0.1 * 1.5,
        [0.5, 0.5, 0.05, 0.25, 0.875],
        {"token_weight": 2.175, "kl_ref_forward_full": 1.5},
    ),
    # entropies over ln 4: 1/2, 0, 1, 1/2, 1
    (
        eaft_loss,
        {"eaft_top_k": 4},
        LN2 / 2 + LN20 + LN4 / 2 + LN8_7,
        [0.5, 0, 1, 0.5, 1],
        {"token_weight": 3},
    ),
    (
        eaft_loss,
        {"eaft_top_k": 4, "eaft_alpha": 2},
        LN2 / 4 + LN20 + LN4 / 4 + LN8_7,
        [0.25, 0, 1, 0.25, 1],
        {"token_weight": 2.5},
    ),
    # entropies over 3: ln 2 / 3, 0, 2 ln 2 / 3, ln 2 / 3, 2 ln 2 / 3
    (
        eaft_loss,
        {"eaft_scaling": "llama_factory"},
        LN2 / 3 * (LN2 + 2 * LN20 + LN4 + 2 * LN8_7),
        [LN2 / 3, 0, 2 * LN2 / 3, LN2 / 3, 2 * LN2 / 3],
        {"token_weight": 2 * LN2},
    ),
]


def batch(function):
    """The tensors `function` takes, (2, 3) each; token 6 does not count."""
    tensors = {name: torch.tensor(values, dtype=torch.float64).view(2, 3) for name, values in BATCH.items()}
    tensors["sequence_ids"] = torch.tensor([[0, 0, 0], [1, 1, 1]])
    tensors["completion_mask"] = torch.tensor([[True, True, True], [True, True, False]])
    names = function.__code__.co_varnames[: function.__code__.co_argcount]
    return {name: tensors[name] for name in names}


@pytest.mark.parametrize(("function", "settings", "loss", "coefficients", "metrics"), GOLDEN)
def test_worked_by_hand(function, settings, loss, coefficients, metrics):
    """Goes red if a default changes, a sign or direction is turned round, or a constant (0.2, 1.8, 16, 3.0) is."""
    tensors = batch(function)
    leaves = [tensors[name].requires_grad_() for name in ("logps", "ref_kls", "gem_gaps") if name in tensors]
    output = function(**tensors, normalizer=10, **settings)
    first, *others = torch.autograd.grad(output.loss, leaves)
    assert output.loss.item() == pytest.approx(loss / 10, rel=1e-12)
    assert first.flatten().tolist() == pytest.approx([-c / 10 for c in coefficients] + [0], rel=1e-12)
    for grad in others:
        kl_coef = {sft_kl_loss: 0.5, asft_loss: 0.1}[function]
        assert grad.flatten().tolist() == pytest.approx([kl_coef / 10] * 5 + [0], rel=1e-12)
    assert {k: x.item() for k, x in output.metrics.items()} == pytest.approx({k: x / 10 for k, x in metrics.items()})
