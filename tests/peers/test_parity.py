"""(c) The published packages and ours side by side: the same float32 gradients, weights compared after every step.

``make peers`` installs the packages, at the versions in pyproject.toml; without one of them its tests are skipped. Methods without a
package are verified in the other ways (tests/optimizers).
"""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from optimizers import Apollo, ApolloMini, Fira, Flora, GaLore
from optimizers.frames import Dense
from tests.optimizers.replays import SIDES, FullAdafactor
from tests.peers.side_by_side import EVERY, RANK, ROUNDING, SHAPES, apart, frame, group, pair, projector_of

CODE: dict[str, Any] = {"variant": "reference-code"}
ADAMW: list[dict[str, Any]] = [
    {"lr": 0.01, "eps": 1e-6},
    {"lr": 0.02, "eps": 1e-6, "weight_decay": 0.1, "betas": (0.8, 0.95)},
    {"lr": 0.003, "eps": 1e-2, "correct_bias": False},
]

pytestmark = pytest.mark.filterwarnings("ignore:This implementation of AdamW is deprecated:FutureWarning")

GALORE = [
    *(pytest.param(shape, "std", h, id=f"{shape}-{i}") for shape in SHAPES for i, h in enumerate(ADAMW)),
    *(pytest.param((24, 40), side, {"weight_decay": 0.1} | ADAMW[0], id=side) for side in ("left", "right", "reverse_std", "full")),
]


@pytest.mark.check("c", "galore")
@pytest.mark.parametrize("shape, side, h", GALORE)
def test_galore_torch_adamw(shape: tuple[int, int], side: str, h: dict[str, Any]) -> None:
    p, q = pair(shape)
    peer = pytest.importorskip("galore_torch").GaLoreAdamW(group(q, proj_type=side, scale=0.25), **h)
    ours = GaLore([p], rank=RANK, every=EVERY, scale=0.25, side=SIDES[side], **h, **CODE)
    ours.inject = projector_of(peer, q)
    assert apart(ours, p, peer, q) < ROUNDING


@pytest.mark.check("c", "galore")
@pytest.mark.parametrize("shape", SHAPES)
def test_galore_torch_adamw_and_our_own_projector(shape: tuple[int, int]) -> None:
    """In the first period the signs of singular vectors do not matter."""
    p, q = pair(shape)
    peer = pytest.importorskip("galore_torch").GaLoreAdamW(group(q, scale=1.0, update_proj_gap=1000), lr=0.01)
    ours = GaLore([p], lr=0.01, rank=RANK, every=1000, scale=1.0, eps=1e-6, **CODE)
    assert apart(ours, p, peer, q) < ROUNDING


@pytest.mark.check("c", "galore")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("h", [{"relative": None, "beta1": None}, {"relative": 1e-3, "beta1": 0.9}, {"relative": 1e-3, "beta1": None}])
def test_galore_torch_adafactor(shape: tuple[int, int], h: dict[str, Any]) -> None:
    p, q = pair(shape)
    common = {"lr": 0.05, "weight_decay": 0.1}
    options = {"relative_step": False, "scale_parameter": h["relative"] is not None, "beta1": h["beta1"]}
    peer = pytest.importorskip("galore_torch").GaLoreAdafactor(group(q, scale=1.0), **common, **options)
    ours = GaLore([p], rank=RANK, every=EVERY, scale=1.0, inner="adafactor", **common, **h, **CODE)
    ours.inject = projector_of(peer, q)
    assert apart(ours, p, peer, q) < ROUNDING


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    "name, method",
    [
        pytest.param("GaLore", GaLore, marks=pytest.mark.check("c", "galore")),
        pytest.param("Fira", Fira, marks=pytest.mark.check("c", "fira")),
    ],
)
def test_pytorch_optimizer(shape: tuple[int, int], name: str, method: type[GaLore] | type[Fira]) -> None:
    """It counts steps from 1, so that its projector changes a step earlier: ours asks for it at every step. Its APOLLO is another method, which
    lifts the scaled sketch in the place of the full gradient."""
    p, q = pair(shape)
    theirs = {"params": [q], "rank": RANK, "update_proj_gap": EVERY, "scale": 0.25, "projection_type": "std"}
    peer = getattr(pytest.importorskip("pytorch_optimizer"), name)([theirs], **ADAMW[1])
    ours = method([p], rank=RANK, every=1, scale=0.25, **ADAMW[1], **CODE)
    ours.inject = projector_of(peer, q)
    assert apart(ours, p, peer, q) < ROUNDING


@pytest.mark.check("c", "fira")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("alpha", [0.25, 1.0])
@pytest.mark.parametrize("h", ADAMW)
def test_fira(shape: tuple[int, int], alpha: float, h: dict[str, Any]) -> None:
    p, q = pair(shape)
    peer = pytest.importorskip("fira").FiraAdamW(group(q, alpha=alpha), **h)
    ours = Fira([p], rank=RANK, every=EVERY, scale=alpha, **h, **CODE)
    ours.inject = projector_of(peer, q)
    assert apart(ours, p, peer, q) < ROUNDING


@pytest.mark.check("c", "apollo")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["channel", "tensor"])
@pytest.mark.parametrize("limited", [True, False])
@pytest.mark.parametrize("h", ADAMW)
def test_apollo_torch(shape: tuple[int, int], kind: str, limited: bool, h: dict[str, Any]) -> None:
    p, q = pair(shape)
    theirs = group(q, scale=2.0, proj="random", scale_type=kind)
    peer = pytest.importorskip("apollo_torch").APOLLOAdamW(theirs, disable_nl=not limited, **h)
    own = {"rank": RANK, "every": EVERY, "scale": 2.0, "whole": kind == "tensor", "limit": 1.01 if limited else None}
    ours = Apollo([p], **own, **h, **CODE)
    ours.inject = projector_of(peer, q)
    assert apart(ours, p, peer, q) < ROUNDING


@pytest.mark.check("c", "apollo_mini")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("front", [True, False])
def test_apollo_torch_mini(shape: tuple[int, int], front: bool) -> None:
    p, q = pair(shape)
    theirs = group(q, rank=1, scale=128.0, proj="random", scale_type="tensor")
    peer = pytest.importorskip("apollo_torch").APOLLOAdamW(theirs, scale_front=front, **ADAMW[1])
    ours = ApolloMini([p], every=EVERY, **ADAMW[1], **CODE)
    ours.inject = projector_of(peer, q)
    assert apart(ours, p, peer, q) < ROUNDING


@pytest.mark.check("c", "flora")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("h", [{"relative": 1e-3}, {"relative": None, "weight_decay": 0.1}, {"relative": None, "clip": 0.5, "beta": 0.5}])
def test_flora_opt(shape: tuple[int, int], h: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Its projectors are drawn from seeds at every use; the last draw of a step is the one that the momentum goes on with."""
    flora = pytest.importorskip("flora_opt").Flora
    module, drawn = sys.modules[flora.__module__], []
    draw = module.stable_randn  # pyright: ignore[reportAttributeAccessIssue]

    def recorded(*arguments: Any, **options: Any) -> Tensor:
        drawn.append(draw(*arguments, **options))
        return drawn[-1]

    monkeypatch.setattr(module, "stable_randn", recorded)
    p, q = pair(shape)
    own = {"beta": 0.9, "clip": 1.0, "weight_decay": 0.0} | h
    theirs = {"beta1": own["beta"], "clip_threshold": own["clip"], "weight_decay": own["weight_decay"]}
    peer = flora([q], lr=0.05, rank=RANK, kappa=EVERY, scale_parameter=h["relative"] is not None, **theirs)
    ours = Flora([p], lr=0.05, rank=RANK, every=EVERY, **own, **CODE)
    ours.inject = lambda *_: frame(drawn[-1] / RANK**0.5)
    assert apart(ours, p, peer, q) < ROUNDING


@pytest.mark.check("c", "galore")
@pytest.mark.parametrize("shape", SHAPES)
def test_torch_adafactor(shape: tuple[int, int]) -> None:
    """Its learning rate is at most 1/√t and its decay is not multiplied by RMS(W): a small one, and none. Ours: on the whole gradient, and in
    GaLore with the identity for a projector."""
    n = min(shape)
    p, q = pair(shape)
    peer = torch.optim.Adafactor([q], lr=0.15, weight_decay=0.0, eps=(1e-30, 1e-3), foreach=False)
    assert apart(FullAdafactor([p], lr=0.15), p, peer, q) < ROUNDING
    p, q = pair(shape)
    peer = torch.optim.Adafactor([q], lr=0.15, weight_decay=0.0, eps=(1e-30, 1e-3), foreach=False)
    ours = GaLore([p], lr=0.15, rank=n, every=1000, scale=1.0, inner="adafactor", relative=1e-3)
    ours.inject = lambda *_: Dense(torch.eye(n))
    assert apart(ours, p, peer, q) < ROUNDING
