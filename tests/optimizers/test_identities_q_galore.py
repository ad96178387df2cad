"""(a) Q-GaLore's refreshes: when they are, what they compare, and how near 4 bits are. Its codes and weights: test_quantized."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from optimizers import QGaLore
from optimizers.bases import Draw, top_right_singular
from optimizers.q_galore import FourBit, Lazy, likeness_of
from optimizers.quantized import pack, quantize
from tests.monte_carlo import assert_mean
from tests.optimizers.test_identities import gradients, matrices
from tests.optimizers.test_identities_family import orthonormal, random

pytestmark = pytest.mark.check("a", "q_galore")


def four_bits(V: Tensor, gap: int = 4, kept: int = 2) -> FourBit:
    coded = quantize(V, 4)
    return FourBit(pack(coded.codes), coded.scale, coded.zero, gap, torch.full((kept,), -torch.inf))


def refreshed(G: Tensor, previous: FourBit | None, **options: Any) -> FourBit:
    draw = Draw(names=("w",), seed=0, index=0, clock=0, turn=0, place=0, group=("w",), previous=previous)
    found = Lazy(rank=3, every=4, kept=2, **options).choose(G, draw)
    assert isinstance(found, FourBit)
    return found


@pytest.mark.parametrize("signs", [(1, 1, 1), (-1, -1, -1)])
def test_likeness_of_equal_subspaces_is_one_whatever_the_signs(signs: tuple[int, ...]) -> None:
    """Exactly, where 4 bits hold the vectors; the published cosine of first vectors is −1 for the same vector with another sign."""
    G = torch.diag(torch.tensor([5.0, 4, 3, 1, 1, 0.5])).double()
    old = torch.eye(6, 3).double() * torch.tensor(signs)
    assert torch.equal(four_bits(old).dense(G).V, old)
    assert float(refreshed(G, four_bits(old)).likeness[-1]) == 1
    assert float(refreshed(G, four_bits(old), by="vector").likeness[-1]) == signs[0]
    apart = refreshed(G, four_bits(torch.eye(6).double()[:, 3:]))
    assert float(apart.likeness[-1]) == pytest.approx(-1)  # ‖V_oldᵀV‖² = 0, half of what chance gives at r = n/2
    turned = random(12, 6)
    V = top_right_singular(turned, 3) @ orthonormal(3, 3)
    assert float(refreshed(turned, four_bits(V)).likeness[-1]) == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("n, r", [(12, 3), (12, 6), (12, 11)])
def test_chance_is_no_likeness(n: int, r: int, generator: torch.Generator) -> None:
    """The mean over uniform subspaces is 0 at any rank; the share itself is r/n on average, above any threshold for a large r."""
    old = orthonormal(n, r)

    def likeness(size: int, generator: torch.Generator) -> Tensor:
        new = torch.linalg.qr(torch.randn(size, n, r, generator=generator, dtype=old.dtype))[0]
        return torch.stack([likeness_of(old, V) for V in new]).unsqueeze(-1)

    assert_mean(likeness, torch.zeros(1).double(), draws=4000, resolution=0.1, generator=generator)
    assert float(likeness_of(old, old)) == pytest.approx(1) and float(likeness_of(orthonormal(4, 4), orthonormal(4, 4, seed=8))) == 1


@pytest.mark.parametrize("threshold, doubled", [(1.0, True), (1.0000002, False)])
def test_the_gap_doubles_at_the_threshold(threshold: float, doubled: bool) -> None:
    """Once as many likenesses as are averaged are there."""
    G = torch.diag(torch.tensor([5.0, 4, 3, 1, 1, 0.5])).double()
    first = refreshed(G, None, threshold=threshold)
    second = refreshed(G, first, threshold=threshold)
    third = refreshed(G, second, threshold=threshold)
    assert [first.gap, second.gap, third.gap] == [4, 4, 8 if doubled else 4]
    assert third.likeness.tolist() == [1, 1]


@pytest.mark.parametrize("variant", ["paper", "reference-code"])
@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
def test_refreshes_are_at_multiples_of_a_gap_that_grows_by_the_rule(variant: str, shape: tuple[int, int]) -> None:
    """Gradients of one subspace, then of ever new ones; V is within half a code of the singular vectors."""
    (p,) = matrices([shape])
    optimizer = QGaLore([p], lr=0.01, rank=3, every=2, kept=2, threshold=0.5, variant=variant)
    low = orthonormal(shape[0], 3) @ torch.diag(torch.tensor([3.0, 2, 1]).double()) @ orthonormal(shape[1], 3, seed=4).mT
    gap, likeness, draws, V, gaps = 2, [-float("inf")] * 2, 0, torch.zeros(0), []
    for t, noise in enumerate(gradients(shape, 40)):
        p.grad = low + 0.01 * noise if t < 20 else noise
        optimizer.step()
        state = optimizer.state[p]
        if t % gap == 0:
            G = p.grad if shape[0] >= shape[1] else p.grad.mT
            new, draws = top_right_singular(G, 3), draws + 1
            if t:
                share, chance = float((V.mT @ new).square().sum()) / 3, 3 / min(shape)
                first = float(V[:, 0] @ new[:, 0] / V[:, 0].norm())
                likeness = [likeness[1], (share - chance) / (1 - chance) if variant == "paper" else first]
                gap *= 2 if sum(likeness) / 2 >= 0.5 else 1
            frame = FourBit.of(state)
            assert frame is not None
            V = frame.dense(G).V
            assert float((V - new).abs().max()) <= 0.5001 * float(state["scale"].max())
        assert (state["gap"], state["draws"]) == (gap, draws)
        assert state["likeness"].tolist() == pytest.approx(likeness)
        gaps.append(gap)
    assert gaps[0] == 2 and gaps[19] >= 8
