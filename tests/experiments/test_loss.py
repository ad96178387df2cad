"""The chunked cross-entropy is plain cross-entropy, without its logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from experiments.training import footprint, models
from experiments.training.loss import CHUNK_BYTES, linear_cross_entropy
from experiments.training.objective import Objective

TOKENS, VOCABULARY, N = 50, 37, 12


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation gives, and how often each operation ran."""

    def __init__(self) -> None:
        super().__init__()
        self.elements, self.calls = 0, list[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.calls.append(func.overloadpacket.__name__)
        self.elements = max(self.elements, out.numel() if isinstance(out, Tensor) else 0)
        return out


def problem(
    generator: torch.Generator,
    dtype: torch.dtype = torch.float64,
    scale: float = 1.0,
    shape: tuple[int, int, int] = (TOKENS, VOCABULARY, N),
) -> tuple[Tensor, Tensor, Tensor]:
    tokens, vocabulary, n = shape
    hidden = torch.randn(tokens, n, generator=generator, dtype=torch.float64) * scale
    weight = torch.randn(vocabulary, n, generator=generator, dtype=torch.float64)
    targets = torch.randint(vocabulary, (tokens,), generator=generator)
    targets[::7] = -100
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), targets


@pytest.mark.parametrize("device", ["cpu"] + ["cuda"] * torch.cuda.is_available())
@pytest.mark.parametrize("chunk", [1, 7, TOKENS, 1024])
def test_it_is_plain_cross_entropy(generator: torch.Generator, chunk: int, device: str) -> None:
    leaves = [t.detach().to(device) for t in problem(generator)]
    hidden, weight, targets = leaves[0].requires_grad_(), leaves[1].requires_grad_(), leaves[2]
    ours = linear_cross_entropy(hidden, weight, targets, chunk=chunk)
    plain = F.cross_entropy(F.linear(hidden, weight), targets)
    assert ours.dtype == plain.dtype and abs(ours.item() - plain.item()) < 1e-12
    for a, b in zip(*(torch.autograd.grad(3 * loss, (hidden, weight)) for loss in (ours, plain)), strict=True):
        assert (a - b).abs().max() < 1e-10 and a.abs().max() > 1e-3


def test_gradcheck(generator: torch.Generator) -> None:
    hidden, weight, targets = problem(generator, shape=(9, 6, 4))
    assert torch.autograd.gradcheck(lambda h, w: linear_cross_entropy(h, w, targets, chunk=4), (hidden, weight))


def test_gradients_add_up_over_calls(generator: torch.Generator) -> None:
    hidden, weight, targets = problem(generator)
    halves = [(hidden[i : i + 25], targets[i : i + 25]) for i in (0, 25)]
    for h, t in halves:
        (linear_cross_entropy(h, weight, t, chunk=8) / 2).backward()
    expected = torch.autograd.grad(sum(F.cross_entropy(F.linear(h, weight), t) / 2 for h, t in halves), (hidden, weight))  # pyright: ignore
    for leaf, gradient in zip((hidden, weight), expected, strict=True):
        assert leaf.grad is not None and (leaf.grad - gradient).abs().max() < 1e-10


@pytest.mark.parametrize("frozen", [0, 1])
def test_what_is_frozen_costs_nothing(generator: torch.Generator, frozen: int) -> None:
    *leaves, targets = problem(generator)
    leaves[frozen].requires_grad_(False)
    with Largest() as seen:
        loss = linear_cross_entropy(leaves[0], leaves[1], targets, chunk=10)
    assert sum("mm" in call for call in seen.calls) == 2 * TOKENS // 10
    plain = F.cross_entropy(F.linear(*leaves), targets)
    a, b = (torch.autograd.grad(value, leaves[1 - frozen])[0] for value in (loss, plain))
    assert (a - b).abs().max() < 1e-10


def test_evaluation_computes_no_gradient(generator: torch.Generator) -> None:
    hidden, weight, targets = problem(generator)
    with torch.no_grad(), Largest() as seen:
        loss = linear_cross_entropy(hidden, weight, targets, chunk=10)
    assert not loss.requires_grad and sum("mm" in call for call in seen.calls) == TOKENS // 10
    detached = linear_cross_entropy(hidden.detach(), weight.detach(), targets)
    assert not detached.requires_grad and abs(detached.item() - loss.item()) < 1e-12


def test_no_logits_are_kept_or_ever_whole(generator: torch.Generator) -> None:
    hidden, weight, targets = problem(generator, torch.float32, shape=(512, 300, 8))

    def kept(loss: Any) -> tuple[int, int]:
        saved = list[Tensor]()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
            loss(hidden, weight, targets)
        return sum(t.nbytes for t in saved), max(t.numel() for t in saved)

    assert kept(lambda h, w, t: F.cross_entropy(F.linear(h, w), t))[1] == 512 * 300
    assert kept(linear_cross_entropy) == (hidden.nbytes + weight.nbytes, hidden.numel())
    with Largest() as seen:
        linear_cross_entropy(hidden, weight, targets, chunk=64)
    assert seen.elements == 64 * 300


@pytest.mark.parametrize(
    ("tokens", "vocabulary", "room", "chunks"),
    [(300, 2**16, CHUNK_BYTES, 2), (2049, VOCABULARY, CHUNK_BYTES, 3), (TOKENS, VOCABULARY, 1, TOKENS)],
    ids=["bytes", "at most 1024 tokens", "at least one"],
)
def test_the_default_chunk_bounds_the_logits(
    generator: torch.Generator, monkeypatch: pytest.MonkeyPatch, tokens: int, vocabulary: int, room: int, chunks: int
) -> None:
    monkeypatch.setattr("experiments.training.loss.CHUNK_BYTES", room)
    hidden, weight, targets = problem(generator, torch.float32, shape=(tokens, vocabulary, 2))
    with Largest() as seen:
        ours = linear_cross_entropy(hidden, weight, targets)
    assert sum("mm" in call for call in seen.calls) == 3 * chunks
    assert seen.elements <= max(room // 4, vocabulary, hidden.numel(), weight.numel())
    plain = F.cross_entropy(F.linear(hidden, weight), targets)
    assert abs(ours.item() / plain.item() - 1) < 1e-6
    for a, b in zip(*(torch.autograd.grad(value, (hidden, weight)) for value in (ours, plain)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_bfloat16_errs_no_more_than_its_rounding(generator: torch.Generator) -> None:
    """Logits carry a relative error u = 2⁻⁸, so |δz| ≤ δ = u max|z|, |δloss| ≤ 2δ and |δp| ≤ p(e²ᵟ − 1); p − e, each product and each result
    are rounded once more. Sums are in float32; its rounding and products of roundings are the 2 % on top."""
    tokens, chunk, u = 256, 32, 2.0**-8
    hidden, weight, targets = problem(generator, torch.bfloat16, 0.3, (tokens, 64, 16))
    loss = linear_cross_entropy(hidden, weight, targets, chunk=chunk)
    assert loss.dtype == torch.float32
    dh, dW = (g.double() for g in torch.autograd.grad(loss, (hidden, weight)))

    h, W = (t.detach().double().requires_grad_() for t in (hidden, weight))
    z = F.linear(h, W)
    exact = F.cross_entropy(z, targets)
    dh_exact, dW_exact = torch.autograd.grad(exact, (h, W))
    delta = u * z.abs().max().item()
    assert abs(loss.item() - exact.item()) <= 2 * delta * 1.02
    p, valid = z.detach().softmax(1), (targets != -100)[:, None]
    d = (p - F.one_hot(targets.clamp(min=0), 64)).abs()
    d_error = ((torch.tensor(2 * delta).expm1() * p + u * d) * valid).double() / valid.sum()
    d = d * valid / valid.sum()
    h, W = h.detach().abs(), W.detach().abs()
    for ours, truth, bound in (
        (dh, dh_exact, d_error @ W + 2 * u * dh_exact.abs()),
        (dW, dW_exact, (d_error + u * d).mT @ h + u * dW_exact.abs()),
    ):
        assert bool(((ours - truth).abs() <= 1.02 * bound).all())
        assert bound.norm() < 0.2 * truth.norm()


def test_the_weight_gradient_is_summed_in_float32() -> None:
    """Of 4096 equal contributions, one a chunk, a bfloat16 sum would stop growing after 256."""
    hidden, weight = torch.ones(4096, 1, dtype=torch.bfloat16), torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    loss = linear_cross_entropy(hidden, weight, torch.zeros(4096, dtype=torch.int64), chunk=1)
    assert torch.autograd.grad(loss, weight)[0].flatten().tolist() == [-0.5, 0.5]


def test_autocast_sets_the_dtype_of_the_products(generator: torch.Generator) -> None:
    hidden, weight, targets = problem(generator, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = linear_cross_entropy(hidden, weight, targets, chunk=16)
    dh, dW = torch.autograd.grad(loss, (hidden, weight))
    low = [t.detach().bfloat16().requires_grad_() for t in (hidden, weight)]
    expected = linear_cross_entropy(low[0], low[1], targets, chunk=16)
    dh_low, dW_low = torch.autograd.grad(expected, low)
    assert torch.equal(loss, expected) and torch.equal(dh, dh_low.float()) and dW.dtype == torch.float32
    assert torch.equal(dW.bfloat16(), dW_low) and not torch.equal(dW, dW_low.float())
    double = problem(generator)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert linear_cross_entropy(*double).dtype == torch.float64


def test_large_logits_and_no_targets(generator: torch.Generator) -> None:
    hidden, weight, targets = problem(generator, torch.float32, scale=1e4)
    loss, plain = (f(hidden, weight, targets) for f in (linear_cross_entropy, lambda h, w, t: F.cross_entropy(F.linear(h, w), t)))
    assert loss.isfinite() and loss > 1e3 and abs(loss / plain - 1) < 1e-6
    none = linear_cross_entropy(hidden, weight, torch.full_like(targets, -100))
    assert none.isnan() and all(not g.any() for g in torch.autograd.grad(none, (hidden, weight)))


def test_wrong_shapes_are_named(generator: torch.Generator) -> None:
    hidden, weight, targets = problem(generator)
    with pytest.raises(ValueError, match=r"hidden=\(50, 12\), weight=\(37, 11\)"):
        linear_cross_entropy(hidden, weight[:, 1:], targets)
    with pytest.raises(RuntimeError, match="out of bounds"):
        linear_cross_entropy(hidden, weight, targets + VOCABULARY)


def test_no_cast_of_a_weight_outlives_its_use(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where blocks are recomputed, a cache of 16-bit casts would hold those of all blocks at once: as many bytes more, but for rounding."""

    def peak() -> int:
        with footprint.watching(torch.device("cpu")) as watch:
            model = models.build("tiny", 0)
            model.gradient_checkpointing_enable({"use_reentrant": False})  # pyright: ignore[reportCallIssue]
            model.train()
            ids = torch.zeros(1, 9, dtype=torch.int64)
            with watch.part("forward"):
                Objective(model, torch.bfloat16)(ids)
        return watch.parts["forward"].peak

    honest, plain = peak(), torch.autocast
    monkeypatch.setattr(torch, "autocast", lambda *asked, **more: plain(*asked, **(more | {"cache_enabled": True})))
    casts = 2 * (models.parameters("tiny") - 2 * 2560 * 128 - 9 * 128)
    assert peak() - honest == pytest.approx(casts, rel=0.02)
