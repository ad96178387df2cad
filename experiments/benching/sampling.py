"""V of every law: single matrices over torch.linalg.qr and other peers, all matrices of a model, and XV by fast transforms.

The floor of Haar–Stiefel is drawing Z, its Gram matrix and one triangular solve, measured in pairs with it and also by operations; of the
Gaussian law drawing Z. Other laws draw too few numbers for these rates to bound them. Drawing Z counts on both sides of torch.linalg.qr.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import scipy.stats
import torch
from torch import Tensor, nn

from estimators import LAWS, keyed
from estimators.haar_stiefel import cholesky_qr
from estimators.law import Law
from estimators.subsampled_transform import SubsampledTransform
from experiments.benching.limits import Limits
from experiments.training import models
from experiments.training.timing import pairs

if TYPE_CHECKING:
    from experiments.bench import Config

SHAPES = ((2048, 256), (4096, 128))  # n, r
FLOOR_LIMIT = 3.0  # of Haar–Stiefel over its floor
FASTER = {"cpu": 5.0, "cuda": 10.0}  # than torch.linalg.qr, at least
TOKENS = 2048  # rows of X in XV
SQUARE_LIMIT = 2048  # scipy draws whole orthogonal matrices, n³ operations


def sampling(config: Config, device: torch.device, limits: Limits) -> list[dict[str, Any]]:
    """Rows of one V a law and shape, of all layers of ``config.sampled``, and of a frame that is applied and not formed."""
    generator = keyed.generator(config.seed, "bench sampling", 0, device)
    rows = [row for n, r in SHAPES for row in _single(n, r, generator, device, limits, config.repeats)]
    return (
        rows
        + _model(config, generator, device, limits)
        + [row for n, r in SHAPES for row in _applied(n, r, generator, device, config.repeats)]
    )


def made(name: str, n: int, rank: int, generator: torch.Generator) -> Law:
    """A law of this shape; one that is fitted knows 2r directions of a decaying spectrum."""
    kind: Any = LAWS[name]
    if name == "fixed_basis" or not kind.fitted:
        return kind(n=n, rank=rank)
    keep = min(n, 2 * rank)
    Q = torch.linalg.qr(torch.randn(n, keep, generator=generator, device=generator.device))[0]
    sigma = torch.logspace(0, -2, keep, device=generator.device)
    return kind.from_basis(Q, sigma, 1e-2, rank, 1.0)


def floor(name: str, n: int, rank: int, limits: Limits) -> float | None:
    """Seconds by operations and normal numbers, half of Gram matrix and solve counted; None where none is derived."""
    if name == "haar_stiefel":
        return limits.seconds(operations=2 * n * rank**2, normals=n * rank)
    return limits.seconds(normals=n * rank) if name == "gaussian" else None


def _single(n: int, r: int, generator: torch.Generator, device: torch.device, limits: Limits, repeats: int) -> list[dict[str, Any]]:
    draw = lambda: torch.randn(n, r, generator=generator, device=device)  # noqa: E731
    laws = {name: made(name, n, r, generator) for name in LAWS}
    calls: dict[str, Callable[[], Any]] = {name: lambda law=law: law.sample(generator=generator) for name, law in laws.items()}
    calls["haar_stiefel by two passes"] = lambda: cholesky_qr(draw())
    empty = torch.empty(n, r, device=device)
    calls["torch.nn.init.orthogonal_"] = lambda: nn.init.orthogonal_(empty, generator=generator)
    if n <= SQUARE_LIMIT and device.type == "cpu":
        calls["scipy.stats.ortho_group, square"] = lambda: scipy.stats.ortho_group.rvs(n, random_state=0)
    try:
        from geotorch import Stiefel  # pyright: ignore[reportMissingImports]

        calls["geotorch.Stiefel"] = partial(Stiefel(size=(n, r)).to(device).sample, "uniform")
    except ImportError:
        pass
    qr = lambda: torch.linalg.qr(draw())  # noqa: E731
    rows = pairs(qr, calls, device, repeats)[1:]
    for row in rows:
        row |= {"over": "torch.linalg.qr", "shape": f"{n}x{r}"} | _share(floor(row["name"], n, r, limits), row["seconds"])
    limit = 1 / FASTER["cuda" if device.type == "cuda" else "cpu"]
    own = next(row for row in rows if row["name"] == "haar_stiefel")
    own |= {"target": limit, "holds": own["ratio"] <= limit}
    least, beside = pairs(lambda: _floor(draw()), {"haar_stiefel": calls["haar_stiefel"], "torch.linalg.qr": qr}, device, repeats)[1:]
    least |= {"over": "its floor, measured", "shape": f"{n}x{r}", "target": FLOOR_LIMIT, "holds": least["ratio"] <= FLOOR_LIMIT}
    return [*rows, least, beside | {"over": "the floor of haar_stiefel", "shape": f"{n}x{r}"}]


def _share(least: float | None, seconds: float) -> dict[str, float]:
    return {} if least is None else {"floor_seconds": least, "share": least / seconds}


def _floor(Z: Tensor) -> Tensor:
    return torch.linalg.solve_triangular(torch.eye(Z.shape[1], device=Z.device) + (Z.mT @ Z).triu(), Z, upper=True, left=False)


def _model(config: Config, generator: torch.Generator, device: torch.device, limits: Limits) -> list[dict[str, Any]]:
    """V for all matrices of the blocks of a model, r = n/8 each, one after the other as training draws them."""
    shapes = model_shapes(config.sampled)
    every = [shape for shape, count in shapes.items() for _ in range(count)]
    laws = {name: {shape: made(name, *shape, generator) for shape in shapes} for name in LAWS}
    calls = {name: lambda mine=mine: [mine[shape].sample(generator=generator) for shape in every] for name, mine in laws.items()}
    peer = lambda: [torch.linalg.qr(torch.randn(shape, generator=generator, device=device)) for shape in every]  # noqa: E731
    rows = pairs(peer, calls, device, max(5, config.repeats // 2))[1:]
    for row in rows:
        floors = [floor(row["name"], n, rank, limits) for n, rank in every]
        least = None if None in floors else sum(one for one in floors if one is not None)
        row |= {
            "over": "torch.linalg.qr",
            "shape": f"LLaMA-{config.sampled.upper()}, r = n/8",
            "numbers": sum(n * rank for n, rank in every),
        }
        row |= _share(least, row["seconds"])
    return rows


def model_shapes(model: str) -> dict[tuple[int, int], int]:
    """(n, n/8) of the matrices of the blocks of a preset, and how many there are of each."""
    preset = models.PRESETS[model]
    h, f, blocks = preset["hidden_size"], preset["intermediate_size"], preset["num_hidden_layers"]
    return {(h, h // 8): 6 * blocks, (f, f // 8): blocks}


def _applied(n: int, r: int, generator: torch.Generator, device: torch.device, repeats: int) -> list[dict[str, Any]]:
    """XV in O(n log n) from signs and places, over the product with a V that is stored; bytes of both."""
    X = torch.randn(TOKENS, n, generator=generator, device=device)
    rows = []
    for name in ("dct", "hadamard"):
        law = LAWS[name](n=n, rank=r)
        assert isinstance(law, SubsampledTransform)
        V, frame = law.sample(generator=generator), law.frame(generator=generator, device=device)
        _, row = pairs(lambda V=V: X @ V, {name: lambda frame=frame: frame.sketch(X)}, device, repeats)
        sizes = {"kept_bytes": frame.bytes(), "V_bytes": V.numel() * V.element_size()}
        rows.append(row | {"over": "XV with V stored", "shape": f"X {TOKENS}x{n}, r={r}"} | sizes)
    return rows
