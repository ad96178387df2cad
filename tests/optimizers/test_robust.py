"""What people do to optimizers: copy, load, schedule by tensors, freeze, inject, step in the backward pass; and where they refuse."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import distributed, nn
from torch.distributed.fsdp import fully_shard

from estimators import measure_estimates, processes
from optimizers import OPTIMIZERS, ApolloMini, Flora, Frugal, GaLore, GoLore, SpectralAdam, per_layer, split_parameters
from optimizers.frames import Dense, Weighted
from tests.optimizers.test_contract import METHODS, RANK, Tiny, make, parameter, steps


@pytest.mark.parametrize("method", METHODS)
def test_a_copy_goes_on_as_the_original(method: str) -> None:
    p = parameter()
    optimizer = make(method, [p], seed=3)
    steps(optimizer, [p], 2)
    for other in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        (q,) = other.param_groups[0]["params"]
        steps(other, [q], 2, start=2)
    steps(optimizer, [p], 2, start=2)
    assert torch.equal(p, q)


def test_the_seed_is_part_of_the_state() -> None:
    p, q = parameter(), parameter()
    first, second = GoLore([p], rank=RANK, every=2, seed=3), GoLore([q], rank=RANK, every=2)
    steps(first, [p], 1)
    q.data.copy_(p.data)
    second.load_state_dict(first.state_dict())
    steps(first, [p], 3, start=1)
    steps(second, [q], 3, start=1)
    assert torch.equal(p, q)


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("options", [{}, {"inner": "adafactor", "relative": 1e-3}])
def test_a_learning_rate_may_be_a_tensor(foreach: bool, options: dict[str, Any]) -> None:
    results = []
    for lr in (0.01, torch.tensor(0.01)):
        parameters = [parameter(), parameter(), nn.Parameter(torch.ones(7))]
        groups = [{"params": parameters[:2]}, {"params": parameters[2:], "rank": None}]
        optimizer = GaLore(groups, lr, rank=RANK, weight_decay=0.1, foreach=foreach, **options)  # pyright: ignore[reportArgumentType]
        steps(optimizer, parameters, 3)
        results.append(parameters)
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-7)


@pytest.mark.parametrize("dtype, size", [(torch.float16, 10.0), (torch.float32, 1e15), (torch.float64, 1e38)])
def test_large_gradients_that_can_be_squared_are_taken(dtype: torch.dtype, size: float) -> None:
    p = nn.Parameter(torch.zeros(128, 128, dtype=dtype))
    optimizer = GaLore([p], rank=8)
    for t in range(2):
        p.grad = (torch.randn(128, 128, dtype=torch.float64, generator=torch.Generator().manual_seed(t)) * size).to(dtype)
        optimizer.step()
    assert bool(torch.isfinite(p).all()) and float(p.detach().abs().max()) > 0


def test_a_model_may_become_float64() -> None:
    p = parameter()
    optimizer = GaLore([p], rank=RANK)
    steps(optimizer, [p], 2)
    p.data = p.data.double()
    steps(optimizer, [p], 2)
    assert p.dtype == torch.float64 and bool(torch.isfinite(p).all())


def test_a_refused_group_is_not_added() -> None:
    p, q = parameter(), parameter((7,))
    optimizer = GaLore([p], rank=RANK)
    with pytest.raises(ValueError, match="projects matrices"):
        optimizer.add_param_group({"params": [q]})
    optimizer.add_param_group({"params": [q], "rank": None})
    steps(optimizer, [p, q], 2)
    assert len(optimizer.param_groups) == 2


@pytest.mark.parametrize(
    "method, option, value",
    [
        ("trion", "mu", -0.5),
        ("dion", "mu", 1.5),
        ("foam", "level", -1),
        ("coap", "recalibrate", 0),
        ("online_subspace", "penalty", -1.0),
        ("q_galore", "kept", 0),
        ("q_galore", "threshold", math.nan),
        ("lisa", "layers", 0),
        ("galore", "basis", "typo"),
        ("galore", "inner", "typo"),
        ("galore", "side", "typo"),
        ("galore", "every", 0),
        ("galore", "scale", math.nan),
        ("galore", "beta1", 2.0),
        ("galore", "relative", -1.0),
        ("apollo", "basis", "typo"),
        ("frugal", "order", "mirror"),
        ("plumage", "weights", "typo"),
        ("spectral_adam", "floor", 1.0),
        ("flora", "every", 1.5),
    ],
)
def test_impossible_options_are_refused(method: str, option: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"\({option}={value!r}\): (unknown, known are|must be)"):
        make(method, [parameter()], **{option: value})


def test_a_second_backward_pass_through_changed_weights_is_refused() -> None:
    """As by torch's own optimizers: the weights know that they were written."""
    p = parameter()
    loss = (p @ p.mT).square().sum()
    loss.backward(retain_graph=True)
    GaLore([p], rank=RANK).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_draws_do_not_depend_on_wrappers() -> None:
    frames = []
    for name in ("up.weight", "module.up.weight", "_orig_mod.module.up.weight"):
        p = parameter()
        optimizer = GoLore([(name, p)], rank=RANK)
        steps(optimizer, [p], 1)
        frames.append(optimizer.state[p]["V"])
    assert all(torch.equal(V, frames[0]) for V in frames)


def test_a_frame_is_injected_for_whom_it_is_given() -> None:
    named = {"a": parameter(), "b": parameter()}
    optimizer = GaLore(list(named.items()), rank=RANK, foreach=True)
    V = torch.linalg.qr(torch.randn(24, RANK))[0]
    optimizer.inject = lambda name, _: Dense(V) if name == "a" else None
    steps(optimizer, list(named.values()), 1)
    assert torch.equal(optimizer.state[named["a"]]["V"], V) and not torch.equal(optimizer.state[named["b"]]["V"], V)


# FRUGAL's turns


def test_turns_are_those_of_the_group_even_where_gradients_are_missing() -> None:
    parameters = [parameter((6, 8)) for _ in range(4)]
    optimizer = Frugal(parameters, rank=0.25, every=2)
    active = []
    for t in range(12):
        for i, p in enumerate(parameters):
            p.grad = None if i == 1 and t in (2, 3) else torch.randn(6, 8)
        optimizer.step()
        active.append(sum(optimizer.state[p].get("active", 0) for p in parameters))
    assert active[4:] == [1] * 8  # every period has one, once all of them have been met


def test_blocks_are_reset_and_may_be_8_bit() -> None:
    with pytest.raises(ValueError, match="blocks are always reset"):
        Frugal([parameter()], part="blocks", reset=False)
    parameters = [parameter((32, 40)) for _ in range(2)]
    optimizer = Frugal(parameters, rank=1, every=2, states="8bit", smallest_8bit=0)
    steps(optimizer, parameters, 5)
    assert all(bool(torch.isfinite(p).all()) for p in parameters)
    kept = [parameter((32, 40))]
    steps(Frugal(kept, rank=0.25, part="columns", reset=False, every=2), kept, 5)


# state in other forms


@pytest.mark.parametrize(
    "method, options, elements",
    [
        ("galore", {"inner": "adafactor"}, 24 * 4 + 40 + 4),
        ("galore", {"inner": "adafactor", "beta1": 0.9}, 24 * 4 + 40 + 4 + 40 * 4),
        ("galore", {"side": "both"}, 24 * 4 + 40 * 4 + 2 * 4 * 4),
        ("golore", {"inner": "sgd"}, 24 * 4 + 40 * 4),
        ("flora", {"variant": "reference-code"}, 24 * 4 + 40 * 4 + 24 + 40),
        ("frugal", {"part": "svd"}, 24 * 4 + 2 * 40 * 4),
        ("frugal", {"part": "permutation"}, 2 * 4 + 2 * 40 * 4),  # indices of 64 bits
        ("frugal", {"part": "columns", "rank": 10}, 2 * 10 + 2 * 24 * 10),
        ("frugal", {"part": "entries", "rank": 240}, 2 * 240 + 2 * 240),
        ("ldadam", {"feedback": False}, 24 * 4 + 2 * 40 * 4),
        ("spectral_adam", {"inner": "sgd"}, 24 * 4 + 40 * 4 + 4),
    ],
)
def test_state_of_the_other_forms(method: str, options: dict[str, Any], elements: int) -> None:
    p = parameter()
    optimizer = OPTIMIZERS[method]([p], 0.01, **({"rank": RANK} | options))
    steps(optimizer, [p], 2)
    assert optimizer.state_bytes() == 4 * elements


@pytest.mark.parametrize("method, options", [(Flora, {}), (GoLore, {"inner": "sgd"}), (GaLore, {"inner": "adafactor", "beta1": 0.9})])
def test_8_bit_states_of_every_inner_rule(method: Any, options: dict[str, Any]) -> None:
    p, q = parameter((64, 80)), parameter((64, 80))
    optimizer, plain = (method([x], 0.01, rank=8, **options, **more) for x, more in ((p, {"states": "8bit", "smallest_8bit": 0}), (q, {})))
    for x, o in ((p, optimizer), (q, plain)):
        steps(o, [x], 4)
    assert any(v.dtype == torch.uint8 for v in optimizer.state[p].values() if isinstance(v, torch.Tensor))
    assert 0 < float((p - q).detach().norm() / (q - parameter((64, 80))).detach().norm()) < 0.1


def test_the_scale_of_apollo_mini_follows_the_variant_of_its_group() -> None:
    p = parameter()
    groups = [{"params": [p], "variant": "reference-code"}]
    optimizer = ApolloMini(groups)
    assert optimizer.rule(optimizer.param_groups[0]).output.alpha == pytest.approx(128**0.5)
    assert ApolloMini([p], scale=4.0, variant="reference-code").rule(optimizer.param_groups[0] | {"scale": 4.0}).output.alpha == 2.0


# what is promised of the mean


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("weights", ["both", "lift"])
@pytest.mark.parametrize("every", [1, 3])
def test_momentum_of_the_spectral_law_is_unbiased_over_its_refreshes(weights: str, every: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mean update is the mean of past gradients; carried as if frames were orthonormal, it is not."""
    generator = torch.Generator().manual_seed(8)
    U, V = (torch.linalg.qr(torch.randn(n, 8, generator=generator, dtype=torch.float64))[0] for n in (12, 8))
    G = (U * torch.arange(1, 9).double().pow(-0.5)) @ V.mT
    expected = (1 - 0.5**6) * G
    serial = iter(range(10**9))

    def draw(size: int, _: torch.Generator) -> torch.Tensor:
        named = [(f"{next(serial)}", nn.Parameter(torch.zeros_like(G))) for k in range(size)]
        parameters = [p for _, p in named]
        options: dict[str, Any] = {"inner": "sgd", "momentum": 0.5, "weights": weights, "scale": 1.0, "foreach": True}
        optimizer = SpectralAdam(named, 1.0, rank=4, every=every, keep=1.0, **options)
        before = torch.zeros(0)
        for _step in range(6):
            before = torch.stack([p.detach() for p in parameters])
            for p in parameters:
                p.grad = G
            optimizer.step()
        return before - torch.stack([p.detach() for p in parameters])

    measured = measure_estimates(draw, expected, 512, generator=generator)
    error = measured.alignment.standard_error
    assert 8 * error <= 0.6 and abs(measured.alignment.value - 1) < 5 * error
    if every == 1 and weights == "lift":
        monkeypatch.setattr(Weighted, "change", Weighted.coordinates)
        mutant = measure_estimates(draw, expected, 512, generator=generator)
        assert abs(mutant.alignment.value - 1) > 5 * mutant.alignment.standard_error


# steps inside the backward pass


def losses(model: nn.Module, t: int, accumulate: int) -> torch.Tensor:
    ids = torch.randint(0, 30, (4, 8), generator=torch.Generator().manual_seed(t))
    return model(ids).logsumexp(-1).mean() / accumulate


def test_per_layer_after_a_load() -> None:
    model = Tiny()
    optimizer = GaLore(split_parameters(model, rank=RANK))
    per_layer(optimizer)
    losses(model, 0, 1).backward()
    optimizer.step()
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    losses(model, 1, 1).backward()
    optimizer.step()
    assert {state["clock"] for state in optimizer.state.values()} == {2}


class Sometimes(nn.Module):
    """Its second layer is used in every other pass."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, X: torch.Tensor, both: bool) -> torch.Tensor:
        X = self.first(X)
        return self.second(X) if both else X


def test_a_layer_that_some_micro_batches_do_not_use_steps_at_the_boundary() -> None:
    results = []
    for inside in (False, True):
        torch.manual_seed(0)
        model = Sometimes()
        optimizer = GaLore(split_parameters(model, rank=RANK), 0.01)
        if inside:
            per_layer(optimizer, accumulate=2)
        for t in range(6):
            X = torch.randn(4, 8, generator=torch.Generator().manual_seed(t))
            model(X, t % 3 != 1).square().mean().backward()
            if t % 2:
                optimizer.step()
                optimizer.zero_grad()
        assert {state["clock"] for state in optimizer.state.values()} <= {2, 3}
        results.append([p.detach().clone() for p in model.parameters()])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_per_layer_clips_each_gradient_and_refuses_what_it_cannot_do(monkeypatch: pytest.MonkeyPatch) -> None:
    p = parameter()
    optimizer = GaLore([p], rank=RANK)
    seen: list[float] = []
    monkeypatch.setattr(optimizer, "step_of", lambda p: seen.append(float(p.grad.norm())))
    per_layer(optimizer, clip=0.5)
    (p * torch.randn(24, 40)).sum().backward()
    assert seen == [pytest.approx(0.5, rel=1e-4)] and p.grad is None
    monkeypatch.setattr(processes, "size", lambda: 2)
    with pytest.raises(ValueError, match="use one process"):
        per_layer(optimizer)


def test_per_layer_says_what_a_bad_gradient_left_alone() -> None:
    p = parameter()
    optimizer = GaLore([("w", p)], rank=RANK)
    per_layer(optimizer)
    with pytest.raises(ValueError, match=r"gradient of w is NaN.*this parameter was not changed"):
        (p * math.nan).sum().backward()


# sharded parameters


@pytest.fixture
def one_process() -> Iterator[None]:
    store = distributed.HashStore()  # pyright: ignore[reportPrivateImportUsage]
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.usefixtures("one_process")
def test_sharded_parameters_are_refused_with_what_to_use() -> None:
    model = nn.Linear(8, 12)
    fully_shard(model)
    optimizer = GaLore(split_parameters(model, rank=2), 0.01)
    model(torch.randn(3, 8)).sum().backward()
    with pytest.raises(TypeError, match=r"is sharded .* use DistributedDataParallel, or estimators.convert"):
        optimizer.step()
