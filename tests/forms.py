"""Every objective in every form that is tested as a run: name-form -> settings."""

FORMS = {
    "sft": {},
    "psft": {},
    "psft-noclip": {"epsilon_high": float("inf")},
    "psft_tv": {"tv_delta": 0.002},
    "psft_soft-sapo": {"soft_temperature": 2.0},
    "psft_soft-pspo": {"soft_form": "pspo"},
    "sft_kl-full": {},
    "sft_kl-reverse": {"kl_direction": "reverse"},
    "sft_kl-k1": {"kl_estimator": "k1"},
    "sft_kl-k2": {"kl_estimator": "k2", "kl_direction": "reverse"},
    "sft_kl-k3": {"kl_estimator": "k3"},
    "dft": {},
    "iw_sft-sequence": {},
    "iw_sft-token": {"iw_level": "token"},
    "gem-linear": {},
    "gem-logsigmoid": {"gem_weighting": "logsigmoid", "gem_beta": 1.3},
    "asft": {},
    "eaft-paper": {"eaft_top_k": 8},
    "eaft-axolotl": {"eaft_scaling": "axolotl", "eaft_alpha": 0.5},
    "chord_phi": {},
}


def needs_cache(form: str) -> bool:
    """Whether the form keeps reference log-probs in a file, so that its tests name a folder for it."""
    return form.startswith("iw_sft") or form in ("sft_kl-k1", "sft_kl-k2", "sft_kl-k3")
