"""Between two optimizer steps the host does not wait for the device: what it has to know, it reads off its own data."""

import sys

import pytest
import torch
from forms import FORMS, needs_cache
from torch.utils._python_dispatch import TorchDispatchMode

from psft.trainers.clipped_tokens import ClippedTokens
from psft.trainers.layout import TrainedTokens, hides_right_padding_only

READS = {
    f"aten::{name}"
    for name in (
        "_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "_unique2", "unique_consecutive",
        "repeat_interleave",
    )
}  # fmt: skip
INDEXED = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}


class HostReads(TorchDispatchMode):
    """Counts the operations for which, on an accelerator, the host waits until it is told a number or a size."""

    def __init__(self):
        super().__init__()
        self.found, self.is_paused = [], False

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket._qualified_op_name
        by_mask = name in INDEXED and any(x is not None and x.dtype == torch.bool for x in args[1])
        if (name in READS or by_mask) and not self.is_paused:
            self.found.append(name)
        return function(*args, **(kwargs or {}))

    def paused(self, function):
        """`function`, not watched."""

        def call(*args, **kwargs):
            self.is_paused, before = True, self.is_paused
            try:
                return function(*args, **kwargs)
            finally:
                self.is_paused = before

        return call


@pytest.mark.parametrize("layout", [{}, {"padding_free": True, "max_length": None}], ids=["padded", "padding-free"])
@pytest.mark.parametrize("form", ["psft", "sft_kl-full", "sft_kl-k3", "iw_sft-sequence", "gem-linear", "eaft-paper"])
def test_no_micro_batch_makes_the_host_wait(form, layout, make_trainer, tmp_path, monkeypatch):
    """Watched: the old pass and the training step with the model's body, but for what is read off the host's own data,
    and once a run the comparison of passes.

    Goes red if hidden states or labels are picked by a mask, a loss, a count or a factor is read in between, sequences
    are counted, or transformers asks whether rows are joined.
    """
    monkeypatch.setattr(sys.modules["psft.ops.token_loss"], "_is_one", lambda factor: False)  # as on an accelerator
    cache = {"ref_cache_dir": str(tmp_path / "cache")} if needs_cache(form) else {}
    trainer = make_trainer(
        objective=form.split("-")[0], max_steps=3, train_batch_size=8, mini_batch_size=4, max_tokens_per_micro_batch=32,
        allow_ratio_noise=form == "psft" or None, **cache, **FORMS[form], **layout,
    )  # fmt: skip
    reads, forwards = HostReads(), []
    models = [trainer.model, *([trainer.reference._model] if trainer.objective.needs_ref_vocabulary else [])]

    def watched(function):
        def call(*args, **kwargs):
            with reads:
                return function(*args, **kwargs)

        return call

    for model in models:
        model.model.register_forward_pre_hook(lambda *_: forwards.append(1))
    for name in ("_model_inputs", "_compare_passes"):
        setattr(trainer, name, reads.paused(getattr(trainer, name)))
    if trainer.reference is not None:
        trainer.reference.target_logps = reads.paused(trainer.reference.target_logps)
    for name in ("training_step", "_score_old_policy"):
        setattr(trainer, name, watched(getattr(trainer, name)))
    trainer.train()
    assert reads.found == [] and len(forwards) > 6


class Copies(TorchDispatchMode):
    """Copies from the CPU to the meta device, which stands for an accelerator: whether the host would wait for each."""

    def __init__(self):
        super().__init__()
        self.is_blocking = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.ops.aten._to_copy.default and str(kwargs.get("device")) == "meta":
            self.is_blocking.append(not kwargs.get("non_blocking"))
        return function(*args, **kwargs)


@pytest.mark.parametrize("form", ["iw_sft-sequence", "sft_kl-k3"])
def test_no_copy_to_the_device_makes_the_host_wait(form, make_trainer, tmp_path, monkeypatch):
    """Inputs, cached reference log-probs, sequence numbers, labels for the clip counts. Goes red at a plain `.to`."""
    trainer = make_trainer(
        objective=form.split("-")[0], ref_cache_dir=str(tmp_path), max_steps=1, padding_free=True, max_length=None,
        **FORMS[form],
    )  # fmt: skip
    trainer.train()
    micro_batch = next(iter(trainer.get_train_dataloader()))["micro_batches"][0]
    mask = (micro_batch["labels"][:, 1:] != -100).to("meta")
    counts = ClippedTokens(trainer)
    monkeypatch.setattr(type(trainer.args), "device", torch.device("meta"))
    with Copies() as copies:
        trainer._model_inputs(micro_batch)
        num_inputs = len(copies.is_blocking)
        trainer._bound_objective(0, micro_batch, torch.ones(()))
        num_constants = len(copies.is_blocking) - num_inputs
        counts.add(micro_batch, mask, mask, 1)
    assert num_inputs >= 3 and num_constants == 1 + ("sequence_ids" in trainer.objective.needs)
    assert len(copies.is_blocking) == num_inputs + num_constants + 1 and not any(copies.is_blocking)


def test_the_watch_sees_a_mask_an_item_and_a_count():
    """Goes red if the test above could not fail."""
    with HostReads() as reads:
        values, mask = torch.arange(3), torch.tensor([True, False, True])
        values[mask], values.sum().item(), mask.nonzero(), values[[0, 1]]
    assert len(reads.found) == 3


def test_trained_tokens_are_found_whatever_the_layout():
    """Against indexing by the mask, in value and gradient. Goes red if a state is taken one place too late, or a row's
    last state stands in for the next row's first."""
    labels = torch.tensor([[-100, 5, -100, 7], [1, -100, -100, 2], [3, -100, -100, -100]])
    hidden = torch.arange(12 * 2, dtype=torch.float64).view(3, 4, 2).requires_grad_()
    mask = labels[:, 1:] != -100
    tokens = TrainedTokens.of(labels)
    assert torch.equal(tokens.mask, mask) and tokens.labels_of(labels).tolist() == [5, 7, 2]
    picked, want = tokens.hidden_of(hidden), hidden[:, :-1][mask]
    pull = torch.randn_like(want)
    assert torch.equal(picked, want)
    assert torch.equal(*(torch.autograd.grad((x * pull).sum(), hidden)[0] for x in (picked, want)))
    placed = tokens.placed(picked[:, 0])
    assert torch.equal(placed, torch.zeros(3, 3).double().masked_scatter(mask, picked[:, 0]))
    assert torch.equal(tokens.values_of(placed), picked[:, 0])
    for nothing in (torch.full((2, 3), -100), torch.zeros(2, 1, dtype=torch.long), torch.zeros(0, 3, dtype=torch.long)):
        tokens = TrainedTokens.of(nothing)
        states = torch.zeros(*nothing.shape, 4, requires_grad=True)
        tokens.placed(tokens.hidden_of(states).sum(1)).sum().backward()
        assert tokens.labels_of(nothing).shape == (0,) and not states.grad.any()


@pytest.mark.parametrize(
    ("mask", "expected"),
    [([[1, 1, 0], [1, 1, 1]], True), ([[0, 1, 1]], False), ([[1, 0, 1]], False), ([[0, 0, 0]], False)],
)
def test_a_mask_is_left_out_only_where_it_hides_padding_on_the_right(mask, expected):
    assert hides_right_padding_only(torch.tensor(mask)) is expected
    assert not hides_right_padding_only(None) and not hides_right_padding_only(torch.ones(1, 1, 3, 3))


def test_without_the_mask_the_model_computes_the_same(tiny_model):
    """Goes red if padding on the right can be seen by a token. Eager attention and sdpa, float64, 1e-12."""
    ids = torch.randint(3, 90, (3, 20), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(20) < torch.tensor([[20], [13], [1]])).long()
    for attention in ("sdpa", "eager"):
        tiny_model.set_attn_implementation(attention)
        model = tiny_model.double()
        with torch.no_grad():
            with_mask, without = (model(input_ids=ids, **how).logits for how in ({"attention_mask": mask}, {}))
        torch.testing.assert_close(without[mask.bool()], with_mask[mask.bool()], rtol=1e-12, atol=1e-12)
