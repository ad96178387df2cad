"""Adam's second moment at a change of frame by a policy of its own: the formulas, batches and loops, resumed runs, and who has none."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from estimators import keyed
from estimators.transport import SECONDS
from optimizers import OPTIMIZERS, GaLore, Subspace
from optimizers.frames import Dense
from optimizers.inner import Adam
from optimizers.outputs import Context
from optimizers.transports import KEEP, ReprojectBoth, ReprojectFirst, Reset, SecondMoment, Transport

BASES: dict[str, Transport] = {"keep": KEEP, "reset": Reset(), "first": ReprojectFirst()}


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("policy", SECONDS)
def test_each_policy_is_its_formula_beside_whatever_happens_to_the_first_moment(base: str, policy: Any) -> None:
    g = torch.Generator().manual_seed(3)
    Q = torch.linalg.qr(torch.randn(12, 8, generator=g, dtype=torch.float64))[0]
    old, new, G = Dense(Q[:, :4]), Dense(Q[:, 2:6]), torch.randn(10, 12, generator=g, dtype=torch.float64)
    M = 0.1 * torch.randn(10, 4, generator=g, dtype=torch.float64)
    N = M.square() + torch.rand(10, 4, generator=g, dtype=torch.float64)
    before: dict[str, Any] = {"step": 50, "draws": 3, "exp_avg": M, "exp_avg_sq": N}
    state = {key: copy.deepcopy(value) for key, value in before.items()}
    SecondMoment(BASES[base], policy, ("w",), 7, G).carry(Adam(), state, old, new)
    if (base, policy) == ("reset", "zero"):
        assert state == {"step": 0, "draws": 3}
        return
    both = dict(before)
    ReprojectBoth().carry(Adam(), both, old, new)
    z = torch.randn(10, 4, generator=keyed.generator(7, "w.second_moment", 3), dtype=torch.float64)
    rows = N.mean(1, keepdim=True)
    expected = {
        "zero": 0 * N,
        "keep": N,
        "reproject": both["exp_avg_sq"],
        "row_scale": rows.expand(10, 4),
        "random": rows * z.square(),
        "first_batch": (G @ new.V).square(),
    }
    assert set(expected) == set(SECONDS)
    close(state["exp_avg_sq"], expected[policy])
    close(state["exp_avg"], {"keep": M, "reset": 0 * M, "first": M @ Q[:, :4].mT @ Q[:, 2:6]}[base])
    assert state["step"] == 50 and bool((state["exp_avg_sq"] >= 0).all())


def parameters(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    g = torch.Generator().manual_seed(1)
    return [nn.Parameter(torch.randn(shape, generator=g).to(dtype)) for shape in ((24, 40), (40, 24), (24, 40))]


def steps(optimizer: Subspace, some: list[nn.Parameter], first: int, last: int) -> None:
    for t in range(first, last):
        g = torch.Generator().manual_seed(100 + t)
        for p in some:
            p.grad = torch.randn(p.shape, generator=g).to(p.dtype)
        optimizer.step()


@pytest.mark.parametrize("policy", SECONDS)
@pytest.mark.parametrize("method", ["galore", "grass", "golore", "plumage", "spectral_adam", "fira"])
def test_a_resumed_run_is_the_uninterrupted_one_and_a_batch_is_the_loop(method: str, policy: str) -> None:
    options: dict[str, Any] = {"rank": 4, "every": 3, "lr": 0.01, "second_moment": policy}
    if (method, policy) == ("grass", "reproject"):
        with pytest.raises(
            ValueError, match=r"Grass\(second_moment='reproject'\): nothing can be re-projected in its frame, ScaledColumns"
        ):
            OPTIMIZERS[method](parameters(), **options)
        return
    whole, halves, batched = (parameters(torch.float64) for _ in range(3))
    one = OPTIMIZERS[method](whole, **options)
    steps(one, whole, 0, 8)
    begun = OPTIMIZERS[method](halves, **options)
    steps(begun, halves, 0, 4)
    resumed = OPTIMIZERS[method](halves, **options)
    resumed.load_state_dict(copy.deepcopy(begun.state_dict()))
    steps(resumed, halves, 4, 8)
    assert all(torch.equal(a, b) for a, b in zip(whole, halves, strict=True))
    together = OPTIMIZERS[method](batched, **options, foreach=True)
    steps(together, batched, 0, 8)
    for a, b in zip(whole, batched, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)
    plain, own = parameters(torch.float64), {"grass": "zero", "plumage": "reproject", "spectral_adam": None}.get(method, "keep")
    options["second_moment"] = None
    steps(OPTIMIZERS[method](plain, **options), plain, 0, 8)
    assert all(torch.equal(a, b) for a, b in zip(whole, plain, strict=True)) == (policy == own)


def test_the_first_batch_is_the_sketch_at_which_the_frame_changes() -> None:
    p = parameters(torch.float64)[:1]
    optimizer = GaLore(p, rank=4, every=3, second_moment="first_batch", betas=(0.9, 0.95))
    seen: list[Context] = []
    optimizer.watch = lambda _, context: seen.append(context)
    equal = []
    for t in range(7):
        steps(optimizer, p, t, t + 1)
        equal.append(torch.allclose(optimizer.state[p[0]]["exp_avg_sq"].double(), seen[-1].B.double().square(), rtol=1e-6, atol=0))
    assert [t for t, same in enumerate(equal) if same] == [3, 6]


def test_eight_bits() -> None:
    for policy in SECONDS:
        p = [nn.Parameter(torch.randn(96, 128, generator=torch.Generator().manual_seed(1)))]
        optimizer = GaLore(p, rank=64, every=2, states="8bit", second_moment=policy)
        steps(optimizer, p, 0, 5)
        assert bool(p[0].isfinite().all()) and optimizer.state_bytes() < 4 * (2 * 64 * 128 + 96 * 64)


def test_who_has_no_adam_is_told() -> None:
    kinds: list[tuple[str, dict[str, Any]]] = [("muon", {}), ("galore", {"inner": "adafactor"}), ("flora", {})]
    for method, options in kinds:
        with pytest.raises(ValueError, match=r"\(second_moment='zero'\): the method has no Adam whose second moment this could be"):
            OPTIMIZERS[method](parameters(), rank=4, second_moment="zero", **options)
    with pytest.raises(ValueError, match=r"GaLore\(second_moment='forget'\): unknown, known are None, zero, keep"):
        GaLore(parameters(), rank=4, second_moment="forget")


def test_a_checkpoint_from_before_there_was_a_policy_goes_on() -> None:
    some = parameters()
    optimizer = GaLore(some, rank=4, every=2)
    steps(optimizer, some, 0, 3)
    saved = copy.deepcopy(optimizer.state_dict())
    for group in saved["param_groups"]:
        del group["second_moment"]
    resumed = GaLore(some, rank=4, every=2)
    resumed.load_state_dict(saved)
    steps(resumed, some, 3, 6)
