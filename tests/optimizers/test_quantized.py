"""(a) Codes of numbers, and layers whose weight is codes, which Q-GaLore trains."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from optimizers import GaLore, Int8Linear, QGaLore, float_weights, int8_weights, quantized, split_parameters
from optimizers.quantized import dequantize, nearest_grid, pack, quantize, unpack, whole_grid
from tests.monte_carlo import assert_mean
from tests.optimizers.test_identities_family import random

pytestmark = pytest.mark.check("a", "q_galore")

NUMBERS = {
    "both signs": random(4, 16),
    "one sign": random(4, 16).abs() + 0.2,
    "the other": -random(4, 16).abs(),
    "far from even": random(4, 16) - 1.7,
    "zeros": torch.zeros(4, 16).double(),
    "tiny": 1e-9 * random(4, 16),
}
CASES = [pytest.param(x, id=name) for name, x in NUMBERS.items()]


# codes


@pytest.mark.parametrize("count", [1, 2, 255, 256])
def test_packed_codes_are_two_a_byte_and_come_back(count: int) -> None:
    codes = (torch.arange(count) * 7 % 16).to(torch.uint8)
    packed = pack(codes)
    assert packed.dtype == torch.uint8 and len(packed) == (count + 1) // 2
    assert torch.equal(unpack(packed, count), codes)


@pytest.mark.parametrize("x", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group", [16, 64, 48])
def test_the_nearest_code_is_within_half_a_code(x: Tensor, dtype: torch.dtype, bits: int, group: int) -> None:
    """In groups that do not divide the numbers, of fewer; zero is a code, and codes have their own codes, but where zero is a tie."""
    x = x.to(dtype)
    coded = quantize(x, bits, group)
    size = {16: 16, 48: 32, 64: 64}[group]
    assert coded.codes.shape == (64 // size, size)
    error = (dequantize(coded, x.shape, torch.float64) - x.double()).reshape(coded.codes.shape).abs()
    assert bool((error <= coded.scale.double() * (0.5 + 1e-4)).all())
    assert not dequantize(coded._replace(codes=coded.zero.expand_as(coded.codes)), x.shape).any()
    if float(x.abs().max()) > 1e-5:
        again = quantize(dequantize(coded, x.shape, torch.float64), bits, group)
        ideal = -x.double().view(error.shape).amin(1).clamp_max(0) / coded.scale.double()[:, 0]
        clear = (ideal - ideal.floor() - 0.5).abs() > 1e-3
        assert torch.equal(again.codes[clear], coded.codes[clear]) and torch.equal(again.zero[clear], coded.zero[clear])


@pytest.mark.parametrize("x", CASES)
@pytest.mark.parametrize("bits", [4, 8])
def test_stochastic_codes_are_exact_in_expectation(x: Tensor, bits: int) -> None:
    """A code is ⌊at⌋ + [u < at − ⌊at⌋], at = x/scale + zero, with no end cut: for uniform u its mean is ⌊at⌋ + (at − ⌊at⌋) = at."""
    coded = quantize(x, bits, 16, uniform=torch.full((4, 16), 0.5).double())
    at = x / coded.scale
    floor, share = torch.floor(at), at - torch.floor(at)
    for uniform, up in ((share, 0), (torch.nextafter(share, torch.zeros(())), 1), (torch.zeros(()), 1), (torch.ones(()), 0)):
        found = quantize(x, bits, 16, uniform=uniform.double().expand(4, 16))
        assert torch.equal(found.scale, coded.scale) and torch.equal(found.zero, coded.zero)
        inside = (share > 1e-9) & (share < 1 - 1e-9)  # at the very end rounding errors of x/scale are cut
        assert torch.equal((found.codes - found.zero.double())[inside], (floor + up)[inside])
    assert float((at + coded.zero).min()) > -1e-9 and float((at + coded.zero).max()) < 2**bits - 1 + 1e-9


def ends(size: int, generator: torch.Generator) -> Tensor:
    """The least number, the largest, and the mean of a group, as stochastic codes in 4 bits have them."""
    x = NUMBERS["both signs"][0]
    back = dequantize(quantize(x.expand(size, 16), 4, 16, generator), (size, 16), torch.float64)
    return torch.stack([back[:, x.argmin()], back[:, x.argmax()], back.mean(1)], 1)


def test_stochastic_codes_are_right_on_average(generator: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also at the ends; in the grid of nearest codes one of them is always rounded inwards."""
    x = NUMBERS["both signs"][0]
    expected = torch.stack([x.min(), x.max(), x.mean()])
    check: Callable[[], None] = lambda: assert_mean(ends, expected, draws=20_000, resolution=0.01, generator=generator)  # noqa: E731
    check()
    monkeypatch.setattr(quantized, "whole_grid", nearest_grid)
    with pytest.raises(AssertionError, match="z ="):
        check()


@pytest.mark.parametrize("bits", [4, 8])
def test_the_grid_with_both_ends_is_hardly_coarser(bits: int) -> None:
    top = 2**bits - 1
    low, high = -torch.rand(1000, 1, generator=torch.Generator().manual_seed(1)).double(), torch.ones(1000, 1).double()
    (first, _), (second, zero) = nearest_grid(low, high, top), whole_grid(low, high, top)
    ratio = second / first
    assert float(ratio.min()) >= 1 - 1e-12 and float(ratio.max()) <= top / (top - 1) + 1e-12
    assert torch.equal(zero, zero.round()) and bool((-zero * second <= low + 1e-12).all() & ((top - zero) * second >= high - 1e-12).all())


@pytest.mark.parametrize("count, size", [(512, 256), (5000, 250), (96, 96), (257, 257), (2 * 257, 2 * 257), (300, 150)])
def test_groups_are_as_large_as_they_can_be(count: int, size: int) -> None:
    """An eighth of what was asked for at least, or one of all: a large number spoils the grid of its own group only."""
    assert quantized.group_size(count, 256) == size
    x = torch.rand(count, generator=torch.Generator().manual_seed(0))
    x[0] = 50.0
    error = (dequantize(quantize(x, 8), x.shape) - x).abs()
    assert bool((error[size:] <= 0.501 / 255).all())


# layers in codes


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 24, bias=False), nn.ReLU(), nn.Linear(24, 4))


def in_codes() -> nn.Sequential:
    made = model()
    assert int8_weights(made, {"0", "2"}) == ["0", "2"]
    return made


def bytes_of(module: nn.Module) -> list[int]:
    return [
        layer.weight.untyped_storage().nbytes() // layer.weight.element_size()
        for layer in module.modules()
        if isinstance(layer, Int8Linear)
    ]


def loss_of(module: nn.Module, t: int) -> Tensor:
    X = torch.randn(64, 16, generator=torch.Generator().manual_seed(t))
    return (module(X) - X[:, :4].square()).square().mean()


def train(module: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> list[float]:
    losses = []
    for t in steps:
        optimizer.zero_grad()
        loss = loss_of(module, t)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def q_galore(module: nn.Module, **options: Any) -> QGaLore:
    return QGaLore(split_parameters(module, rank=8), **({"lr": 0.01, "every": 5, "scale": 1.0} | options))


@pytest.mark.parametrize("shape", [(16,), (5, 16), (3, 5, 16), (0, 16)])
@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_in_codes_is_the_plain_layer_of_its_numbers(shape: tuple[int, ...], bias: bool) -> None:
    layer = Int8Linear(nn.Linear(16, 8, bias=bias))
    plain = copy.deepcopy(float_weights(nn.Sequential(copy.deepcopy(layer)))[0])  # pyright: ignore[reportIndexIssue]
    assert type(plain) is nn.Linear and torch.equal(plain.weight, layer.read())
    X = random(*shape).float()
    inputs = [X.clone().requires_grad_() for _ in range(2)]
    outputs = [module(x) for module, x in zip((layer, plain), inputs, strict=True)]
    for y in outputs:
        (y * torch.arange(8)).sum().backward()
    torch.testing.assert_close(*outputs, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(layer.weight.grad, plain.weight.grad, rtol=1e-6, atol=1e-6)
    if bias:
        torch.testing.assert_close(layer.bias.grad, plain.bias.grad, rtol=1e-6, atol=1e-6)


def test_a_layer_in_codes_under_autocast() -> None:
    """Forward inside, backward outside, as trainers do."""
    layer = Int8Linear(nn.Linear(16, 8))
    plain: Any = float_weights(nn.Sequential(copy.deepcopy(layer)))
    X = random(5, 16).float().requires_grad_()
    outputs, gradients = [], []
    for module, weight in ((layer, layer.weight), (plain, plain[0].weight)):
        with torch.autocast("cpu", torch.bfloat16):
            outputs.append(module(X))
        gradients.append(torch.autograd.grad(outputs[-1].square().sum(), (X, weight)))
    assert outputs[0].dtype == outputs[1].dtype == torch.bfloat16
    torch.testing.assert_close(*outputs, rtol=0.02, atol=0.02)
    for a, b in zip(*gradients, strict=True):
        assert a.dtype == b.dtype == torch.float32
        torch.testing.assert_close(a, b, rtol=0.05, atol=0.05)


def test_the_parameter_takes_no_memory_wherever_its_layer_goes() -> None:
    """One number is behind it, also in copies, in another precision, and after a load; codes and scales are what they were."""
    made = in_codes()
    layer: Any = made[0]
    assert layer.weight.untyped_storage().nbytes() == 4 and layer.weight.shape == (32, 16)
    weights = layer.read()
    file = io.BytesIO()
    torch.save(made.state_dict(), file)
    file.seek(0)
    loaded = in_codes()
    loaded[0].store(torch.zeros(32, 16))  # pyright: ignore[reportCallIssue]
    loaded.load_state_dict(torch.load(file, weights_only=True))
    train(made, q_galore(made, lr=0.0, rounding="nearest"), range(2))
    assert layer.weight.grad.shape == (32, 16)
    others = [copy.deepcopy(made), pickle.loads(pickle.dumps(made)), loaded, copy.deepcopy(made).double(), copy.deepcopy(made).bfloat16()]
    for other in [made, *others]:
        assert bytes_of(other) == [1, 1]
        first: Any = other[0]
        assert first.weight.quantized is first and first.scale.dtype == torch.float32
        assert torch.equal(first.read(torch.float32), weights)
    assert "0.weight" not in made.state_dict() and "4.weight" in made.state_dict()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_a_step_of_length_zero_changes_no_code(dtype: torch.dtype, rounding: Any) -> None:
    made = in_codes().to(dtype)
    before = copy.deepcopy(made.state_dict())
    optimizer = q_galore(made, lr=0.0, rounding=rounding)
    for _ in range(3):
        made(torch.ones(2, 16, dtype=dtype)).sum().backward()
        optimizer.step()
    after = made.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before if key.endswith(("codes", "zero")))
    for key in (key for key in before if key.endswith("scale")):
        torch.testing.assert_close(after[key], before[key], rtol=1e-6, atol=0)


def test_training_in_codes_lowers_the_loss_and_stays_near_training_in_floats() -> None:
    made, plain = in_codes(), model()
    losses = train(made, q_galore(made), range(150))
    beside = train(plain, q_galore(plain), range(150))
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])
    assert sum(losses[-10:]) < 1.5 * sum(beside[-10:])  # each step rounds anew; of the start it is a quarter
    X = random(7, 16).float()
    expected = made(X)
    made[0].weight.requires_grad_(False)  # pyright: ignore[reportCallIssue]
    names = [name for name, _ in model().named_parameters()]
    restored = float_weights(made)
    assert not any(isinstance(layer, Int8Linear) for layer in restored.modules())
    assert [name for name, _ in restored.named_parameters()] == names and not restored[0].weight.requires_grad  # pyright: ignore
    torch.testing.assert_close(restored(X), expected, rtol=1e-6, atol=1e-6)


def test_a_step_in_codes_is_the_step_in_floats_on_average(generator: torch.Generator) -> None:
    """E[SR₈(W)] = W over the seeds of the optimizer: two directions of a layer, and the number of largest magnitude."""
    G, start = random(8, 16).float(), Int8Linear(nn.Linear(16, 8, bias=False))
    plain = nn.Parameter(start.read())
    plain.grad = G
    options: dict[str, Any] = {"rank": 4, "lr": 0.01, "states": "float", "weight_decay": 0.1}
    QGaLore([("w", plain)], **options).step()
    W = plain.detach().double()
    at = int(W.abs().argmax())

    def draw(size: int, _: torch.Generator) -> Tensor:
        found = []
        for seed in range(size):
            layer = copy.deepcopy(start)
            layer.weight.grad = G
            QGaLore([("w", layer.weight)], seed=seed, **options).step()
            found.append(layer.read().double())
        D = torch.stack(found)
        return torch.stack([(D * G.sign()).mean((1, 2)), D.mean((1, 2)), D.flatten(1)[:, at]], 1)

    expected = torch.stack([(W * G.sign()).mean(), W.mean(), W.flatten()[at]])
    scale = float(torch.as_tensor(start.scale).max())
    assert_mean(draw, expected, draws=600, resolution=0.2 * scale, generator=generator)


@pytest.mark.parametrize("way", ["copied", "saved"])
def test_a_model_in_codes_goes_on_as_the_original(way: str) -> None:
    made = in_codes()
    optimizer = q_galore(made)
    train(made, optimizer, range(7))
    if way == "copied":
        twin, other = copy.deepcopy((made, optimizer))
    else:
        twin = in_codes()
        train(twin, q_galore(twin), range(90, 92))
        other = q_galore(twin, seed=3)
        twin.load_state_dict(copy.deepcopy(made.state_dict()))
        other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert train(twin, other, range(7, 20)) == train(made, optimizer, range(7, 20))
    first, second = made.state_dict(), twin.state_dict()
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def test_what_cannot_be_converted_is_refused() -> None:
    """Weights that two modules or two places share; and an optimizer that knows nothing of codes cannot write them."""
    tied = nn.ModuleDict({"embed": nn.Embedding(8, 4), "up": nn.Linear(4, 4), "head": nn.Linear(4, 8, bias=False)})
    tied["head"].weight = tied["embed"].weight  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(ValueError, match="weight of head is shared"):
        int8_weights(tied)
    assert type(tied["up"]) is nn.Linear and int8_weights(tied, {"up"}) == ["up"]
    twice = nn.Linear(4, 4)
    with pytest.raises(ValueError, match="weight of 0 is shared"):
        int8_weights(nn.Sequential(twice, nn.ReLU(), twice))
    layer = Int8Linear(nn.Linear(16, 8))
    layer(torch.ones(1, 16)).sum().backward()
    with pytest.raises(RuntimeError, match="single memory location"):
        torch.optim.SGD([layer.weight], lr=0.1).step()
    GaLore([layer.weight], rank=2, lr=0.1).step()
    assert float((layer.read() - dequantize(quantize(layer.read(), 8), (8, 16))).abs().max()) < 1e-6
