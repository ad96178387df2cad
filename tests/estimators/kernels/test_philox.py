"""The generator: published vectors, what Triton makes of the same counters, and the law of its uniforms and normals."""

from __future__ import annotations

import math
from typing import no_type_check

import torch

from estimators import keyed
from estimators.kernels import philox
from estimators.kernels.launch import jit, tl
from tests.estimators.kernels.device import DEVICE

# counter, key → words: the known answers that Random123 is distributed with
KNOWN = [
    ((0, 0, 0, 0), 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, 0xFFFFFFFFFFFFFFFF, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), 0x299F31D0A4093822, (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
]


@jit
@no_type_check
def _all(key, made, uniform, normal, SIZE: tl.constexpr):
    """Words, uniforms and normals of the counters (i, 7, 2, 0)."""
    i = tl.arange(0, SIZE)
    a, b, c, d = tl.philox(key, i, i * 0 + 7, i * 0 + 2, i * 0)
    tl.store(made + 4 * i, a.to(tl.int32, bitcast=True))
    tl.store(made + 4 * i + 1, b.to(tl.int32, bitcast=True))
    tl.store(made + 4 * i + 2, c.to(tl.int32, bitcast=True))
    tl.store(made + 4 * i + 3, d.to(tl.int32, bitcast=True))
    u, v = tl.uint_to_uniform_float(a), tl.uint_to_uniform_float(b)
    x, y = tl.pair_uniform_to_normal(u, v)
    tl.store(uniform + 2 * i, u)
    tl.store(uniform + 2 * i + 1, v)
    tl.store(normal + 2 * i, x)
    tl.store(normal + 2 * i + 1, y)


def test_known_answers() -> None:
    for (c0, c1, c2, c3), key, expected in KNOWN:
        assert tuple(philox.words(key, torch.tensor(c0), torch.tensor(c1), c2, c3).tolist()) == expected


def test_triton_makes_the_same() -> None:
    key, size = philox.key(3, "layers.0.q_proj", 5), 256
    made = torch.zeros(size, 4, dtype=torch.int32, device=DEVICE)
    uniform, normal = torch.zeros(size, 2, device=DEVICE), torch.zeros(size, 2, device=DEVICE)
    _all[(1,)](key, made, uniform, normal, SIZE=size)
    words = philox.words(key, torch.arange(size), torch.tensor(7), 2)
    assert torch.equal(philox.signed(words), made.cpu().long())
    assert torch.equal(philox.uniforms(words)[:, :2], uniform.cpu())
    torch.testing.assert_close(philox.normals(words)[:, :2], normal.cpu(), rtol=1e-5, atol=1e-5)


def test_the_key_is_the_seed_of_the_draw() -> None:
    key = philox.key(3, "layers.0.q_proj", 5)
    assert key == keyed.generator(3, "layers.0.q_proj", 5).initial_seed() and 0 <= key < 2**63
    assert len({philox.key(s, n, i) for s in (0, 1) for n in "ab" for i in (0, 1)}) == 8


def test_uniforms_lie_below_one_and_normals_are_finite_at_the_ends() -> None:
    ends = torch.tensor([0, 1, 2**31 - 1, 2**31, 2**32 - 1])
    u = philox.uniforms(ends)
    assert float(u.min()) == 0.0 and 0.999999 < float(u.max()) < 1.0
    largest = philox.normals(torch.tensor([0, 0, 2**32 - 1, 2**32 - 1]))
    assert bool(torch.isfinite(largest).all()) and float(largest.abs().max()) <= math.sqrt(-2 * math.log(1e-7)) + 1e-4


def test_normals_have_the_moments_of_a_normal() -> None:
    """Integrated over a grid of both words: mean 0, variance 1, fourth moment 3, to the error of the midpoint rule near u = 0."""
    cells = 512
    grid = ((torch.arange(cells, dtype=torch.float64) + 0.5) * (2**32 / cells)).long()
    words = torch.stack([*torch.meshgrid(grid, grid, indexing="ij")] * 2, dim=-1)
    z = philox.normals(words).double()
    for part in (z[..., 0], z[..., 1]):
        assert abs(float(part.mean())) < 1e-3
        assert abs(float(part.square().mean()) - 1) < 3e-3
        assert abs(float(part.pow(4).mean()) - 3) < 0.1
    assert abs(float((z[..., 0] * z[..., 1]).mean())) < 1e-3
