"""A loss with its gradients computed in the forward pass, against autograd through full logits."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from psft.ops import GemGap, ReferenceLogits, RefKl, TopKEntropy, lm_head, reference, token_loss, token_statistics

QUANTITIES = {
    "none": (),
    "gem": (GemGap(gem_weighting="logsigmoid"),),
    "kl-forward": (RefKl(),),
    "kl-reverse": (RefKl("reverse"),),
    "all": (GemGap(), RefKl("reverse"), TopKEntropy(eaft_top_k=3)),
}
HEADS = {
    "plain": {},
    "scale": {"logit_scale": 0.5},
    "all": {"logit_scale": 0.5, "softcap": 5.0, "with_bias": True},
}


class Case:
    """Peaked logits over 37 words; `loss` mixes every statistic it is given, with a weight of each token's own."""

    def __init__(self, num_tokens=11, num_words=37, width=8, dtype=torch.float64, with_bias=False, **head):
        generator = torch.Generator().manual_seed(num_tokens * 1000 + num_words)

        def draw(*shape, scale=1.0):
            return (torch.randn(*shape, generator=generator, dtype=torch.float64) * scale).to(dtype)

        self.hidden, self.weight = draw(num_tokens, width, scale=2).requires_grad_(), draw(num_words, width)
        self.weight.requires_grad_()
        self.bias = draw(num_words).requires_grad_() if with_bias else None
        self.reference = ReferenceLogits(draw(num_tokens, width + 1), draw(num_words, width + 1), None, 0.5, 6.0)
        self.labels = torch.randint(0, num_words, (num_tokens,), generator=generator)
        self.pulls = torch.randn(4, num_tokens, generator=generator, dtype=torch.float64)
        self.head = {"bias": self.bias, **head}

    @property
    def leaves(self):
        return [x for x in (self.hidden, self.weight, self.bias) if x is not None]

    def loss(self, statistics, rows, uses=("logps", "entropies")):
        values = {"logps": statistics.logps, "entropies": statistics.entropies, **statistics.quantities}
        total = sum(
            (pull[rows].to(x.dtype) * x.square()).sum()
            for pull, (name, x) in zip(self.pulls, values.items(), strict=False)
            if name in uses or name in statistics.quantities
        )
        return total, {"tokens": torch.tensor(len(statistics.logps)), "hits": statistics.is_top1.sum()}

    def run(self, function=token_loss, loss=None, **how):
        quantities = how.get("quantities", ())
        how = {"reference": self.reference if quantities else None, **self.head, **how}
        return function(self.hidden, self.weight, self.labels, loss or self.loss, **how)


@pytest.mark.parametrize("quantities", QUANTITIES.values(), ids=QUANTITIES)
@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("uses", [("logps",), ("entropies",), ("logps", "entropies")], ids="+".join)
def test_values_metrics_and_gradients_are_those_of_the_plain_twin(quantities, head, uses, monkeypatch):
    """Goes red if a row's coefficient meets another row, the scale or the cap's derivative is left out, the first chunk
    is not kept, a leftover of a chunk or of a block is dropped, or probabilities are read after they were used up.
    """
    monkeypatch.setattr(lm_head, "_BLOCK_ROWS", 2)
    case = Case(**head)

    def loss(statistics, rows):
        return case.loss(statistics, rows, uses)

    want = case.run(reference.token_loss, loss, quantities=quantities)
    wanted = torch.autograd.grad(want.loss, case.leaves)
    assert len(case.hidden) % 5 and 5 % 2 and len(case.hidden) % 2, "leftovers of chunks and of blocks"
    for chunk_rows in (1, 5, 64):
        got = case.run(loss=loss, chunk_rows=chunk_rows, quantities=quantities)
        torch.testing.assert_close(got.loss, want.loss, rtol=1e-10, atol=1e-12)
        assert got.metrics == want.metrics and got.metrics["tokens"] == 11
        for one, other in zip(wanted, torch.autograd.grad(got.loss, case.leaves), strict=True):
            torch.testing.assert_close(other, one, rtol=1e-10, atol=1e-11)
        for name in ("logps", "entropies", "is_top1"):
            torch.testing.assert_close(
                getattr(got.statistics, name), getattr(want.statistics, name).detach(), rtol=1e-10, atol=1e-11
            )
        assert not got.statistics.logps.requires_grad


def test_gradcheck_in_float64():
    case = Case(5, 7, 3, logit_scale=0.5, softcap=4.0, with_bias=True)

    class Again(torch.autograd.Function):
        """Computes the loss anew for every backward pass: gradcheck makes several, and gradients are given once."""

        @staticmethod
        def forward(ctx, *leaves):
            ctx.save_for_backward(*leaves)
            return Again.loss(*leaves)

        @staticmethod
        def backward(ctx, grad):
            with torch.enable_grad():
                leaves = [leaf.detach().requires_grad_() for leaf in ctx.saved_tensors]
                return torch.autograd.grad(Again.loss(*leaves), leaves, grad)

        @staticmethod
        def loss(hidden, weight, bias):
            how = {**case.head, "bias": bias, "chunk_rows": 2, "quantities": (RefKl(),), "reference": case.reference}
            return token_loss(hidden, weight, case.labels, case.loss, **how).loss

    assert torch.autograd.gradcheck(Again.apply, case.leaves)


@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_way_to_the_log_probs_gives_the_same_bits(head, dtype):
    """Goes red if one of them normalises in another way, or projects chunks of another size."""
    case = Case(150, 50, 16, dtype, **head)
    how = {"chunk_rows": 70, **case.head}
    assert 150 % 70 % lm_head._BLOCK_ROWS != 0 and 70 % lm_head._BLOCK_ROWS != 0, "leftovers in chunks and blocks"
    found = [case.run(chunk_rows=70).statistics, case.run(chunk_rows=70, quantities=QUANTITIES["all"]).statistics]
    for logps_only in (False, True):
        found.append(token_statistics(case.hidden, case.weight, case.labels, logps_only=logps_only, **how))
        with torch.no_grad():
            found.append(token_statistics(case.hidden, case.weight, case.labels, logps_only=logps_only, **how))
    with torch.no_grad():
        found.append(case.run(chunk_rows=70).statistics)
    for other in found:
        assert torch.equal(other.logps, found[0].logps) and other.logps.dtype == torch.float32
        if other.entropies is not None:
            assert torch.equal(other.entropies, found[0].entropies)
    assert found[-2].entropies is None and found[-3].entropies is None


class Products(TorchDispatchMode):
    """Counts matrix products in which the whole vocabulary takes part."""

    def __init__(self, num_words):
        super().__init__()
        self.num_words, self.count = num_words, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm):
            self.count += any(self.num_words in x.shape for x in args if isinstance(x, torch.Tensor))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("frozen", "quantities", "products"),
    [((), (), 3), (("weight",), (), 2), (("hidden",), (), 2), (("hidden", "weight"), (), 1), ((), (RefKl(),), 4)],
)
def test_it_takes_three_matrix_products(frozen, quantities, products):
    """One more for a reference, one less for a frozen head (LoRA). Goes red if the logits are projected again, or a
    gradient is computed that nobody wants."""
    case = Case()
    for name in frozen:
        getattr(case, name).requires_grad_(False)
    with Products(37) as counted:
        loss = case.run(quantities=quantities).loss
        if loss.requires_grad:
            loss.backward()
    assert counted.count == products
    with Products(37) as counted, torch.no_grad():
        assert not case.run(quantities=quantities).loss.requires_grad
    assert counted.count == 1 + bool(quantities)


def test_no_token_at_all_gives_zero_gradients_and_every_metric():
    """Goes red if the loss is not called then (ranks would differ in the names of their metrics), or the graph ends."""
    case = Case(0, with_bias=True)
    out = case.run()
    assert out.loss.item() == 0 and set(out.metrics) == {"tokens", "hits"} and out.statistics.logps.shape == (0,)
    out.loss.backward()
    assert all(x.grad is not None and not x.grad.any() for x in case.leaves)


def test_what_comes_from_above_scales_the_gradients_before_they_are_rounded():
    """A gradient of 1e-9 is 0 in float16 and 6.5e-5 times a loss scaler's 2^16. Goes red if it is rounded first."""
    case = Case(dtype=torch.float16)
    loss = case.run(loss=lambda statistics, rows: (statistics.logps.sum() * 1e-9, {})).loss
    got = torch.autograd.grad(loss * 2.0**16, case.leaves)
    exact = Case()
    exact.hidden, exact.weight = (x.detach().double().requires_grad_() for x in (case.hidden, case.weight))
    want = torch.autograd.grad(exact.run(loss=lambda s, rows: (s.logps.sum() * 1e-9 * 2.0**16, {})).loss, exact.leaves)
    for one, other in zip(got, want, strict=True):
        assert one.dtype == torch.float16
        torch.testing.assert_close(one.double(), other, rtol=2e-3, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_in_low_precision_the_gradients_are_no_worse_than_the_plain_ones(dtype):
    """Root mean square error over that of the float64 truth. Seen on a CPU: float32 6e-7, as the plain op; bfloat16
    1.7e-3, which is what storing the exact gradient costs, the plain op's 1.3e-2. Goes red if probabilities or sums are
    rounded."""
    case = Case(300, 700, 32, dtype)
    truth = Case(300, 700, 32)
    truth.hidden, truth.weight = (x.detach().double().requires_grad_() for x in (case.hidden, case.weight))
    wanted = torch.autograd.grad(truth.run(reference.token_loss).loss, truth.leaves)
    plain = torch.autograd.grad(case.run(reference.token_loss).loss, case.leaves)
    got = torch.autograd.grad(case.run(chunk_rows=128).loss, case.leaves)

    def error(value, exact):
        return ((value.double() - exact).square().mean() / exact.square().mean()).sqrt().item()

    for exact, one, other in zip(wanted, plain, got, strict=True):
        rounding = error(exact.to(dtype), exact)
        assert error(other, exact) <= 1.2 * rounding + 1e-5 if dtype == torch.bfloat16 else 3e-6
        assert error(other, exact) <= 1.5 * error(one, exact)


class Memory(TorchDispatchMode):
    """Largest number of bytes that tensors made under it have held at one time."""

    def __init__(self):
        super().__init__()
        self.held, self.peak = {}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self.held[storage.data_ptr()] = (torch.multiprocessing.reductions.StorageWeakRef(storage), len(storage))
        self.held = {key: value for key, value in self.held.items() if not value[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.held.values()))
        return out


@pytest.mark.parametrize("name", ["none", "all"])
def test_memory_does_not_grow_with_the_tokens(name, monkeypatch):
    """From 3 chunks to 20 the peak stays within 5 %, beside 80 bytes for each token's own numbers. Goes red if anything
    as wide as the vocabulary outlives its chunk, or a chunk needs more than one buffer (three with logits to keep and a
    reference) and a few blocks.
    """
    monkeypatch.setattr(lm_head, "_BLOCK_ROWS", 4)
    chunk_rows, num_words, peaks = 16, 4000, []
    for num_tokens in (48, 320):
        case = Case(num_tokens, num_words, 1, torch.float32)
        with Memory() as memory:
            case.run(quantities=QUANTITIES[name], chunk_rows=chunk_rows).loss.backward()
        peaks.append(memory.peak - 80 * num_tokens)
    chunk = chunk_rows * num_words * 4  # bytes
    assert peaks[1] < 1.05 * peaks[0], peaks
    assert 1 < peaks[0] / chunk < (1.6 if name == "none" else 5)


def test_the_gradients_are_handed_over_once():
    """Goes red if a second backward pass returns what the first has scaled."""
    case = Case()
    loss = case.run().loss
    torch.autograd.grad(loss, case.hidden, retain_graph=True)
    with pytest.raises(RuntimeError, match="handed over"):
        torch.autograd.grad(loss, case.hidden)
    (gradient,) = torch.autograd.grad(case.run().loss.square(), case.hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_a_loss_without_gradient_is_refused():
    case = Case()
    with pytest.raises(ValueError, match="has no gradient"):
        case.run(loss=lambda statistics, rows: (statistics.logps.detach().sum(), {}))
    with pytest.raises(ValueError, match=r"labels \(N,\)"):
        token_loss(case.hidden[:3], case.weight, case.labels, case.loss)


def test_logits_that_overflow_exp_and_words_that_cannot_be_stay_finite():
    """Logits of +-1000 and a bias of -inf. Goes red if a maximum is not subtracted, or 0 * -inf is added up."""
    hidden = torch.tensor([[1000.0, -1000.0, 999.0], [0.0, 0.0, 0.0]], requires_grad=True)
    weight = torch.cat([torch.eye(3), torch.zeros(1, 3)]).requires_grad_()
    bias = torch.tensor([0.0, 0.0, 0.0, -torch.inf])
    for quantities in ((), (GemGap(), RefKl("reverse"))):
        frozen = ReferenceLogits(hidden.detach() / 2, weight.detach(), bias)
        out = token_loss(
            hidden, weight, torch.tensor([1, 0]), lambda s, rows: ((s.logps + s.entropies).sum(), {}), bias=bias,
            quantities=quantities, reference=frozen if quantities else None,
        )  # fmt: skip
        assert out.statistics.logps.tolist() == pytest.approx([-2000.3132, -1.0986], abs=1e-3)
        assert out.statistics.entropies.tolist() == pytest.approx([0.5823, 1.0986], abs=1e-3)
        for gradient in torch.autograd.grad(out.loss, [hidden, weight]):
            assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_on_cuda_products_read_half_precision_and_gradients_stay_float32(dtype, monkeypatch):
    """What CUDA does under autocast, its products emulated; hidden states and head are float32. Goes red if a
    coefficient is applied twice or not at all, or a gradient is rounded to the type of the products."""

    def product(left, right, *, out, is_added=False):
        value = left.to(right.dtype).to(out.dtype) @ right.to(out.dtype)
        return out.add_(value) if is_added else out.copy_(value)

    case = Case(300, 70, 16, torch.float32, with_bias=True, logit_scale=0.5)
    plain = case.run(chunk_rows=128)
    wanted = torch.autograd.grad(plain.loss, case.leaves)
    monkeypatch.setattr("psft.ops.products.product", product)
    monkeypatch.setattr(lm_head, "product", product)
    monkeypatch.setattr(lm_head, "product_dtype", lambda hidden: dtype)
    low = case.run(chunk_rows=128)
    torch.testing.assert_close(low.loss, plain.loss, rtol=2e-2, atol=0)
    for got, want in zip(torch.autograd.grad(low.loss, case.leaves), wanted, strict=True):
        assert got.dtype == torch.float32 and not torch.equal(got, got.to(dtype).float())
        assert (got - want).square().mean().sqrt() < 0.02 * want.square().mean().sqrt()
