"""Which model a name means, where its files are, and in what form its weights are trained."""

from psft.models.resolve import load_model, load_tokenizer, resolve_model

__all__ = ["load_model", "load_tokenizer", "resolve_model"]
