"""What a label says beside a token id. Imports nothing, so that data can be prepared by a process without torch."""

IGNORE_INDEX = -100
"""Label of a position that is not trained, as in `torch.nn.functional.cross_entropy` and transformers."""
