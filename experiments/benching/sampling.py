"""V of every law: single matrices over torch.linalg.qr and other peers, all matrices of a model, and XV by fast transforms.

The floor of Haar–Stiefel is drawing Z, its Gram matrix and one triangular solve; of every other law, writing V once. What Haar–Stiefel is held
against, torch.linalg.qr, includes drawing Z on both sides.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import scipy.stats
import torch
from torch import Tensor, nn

from estimators import LAWS, keyed
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


def floor(name: str, n: int, rank: int, limits: Limits) -> float:
    """Seconds: for Haar–Stiefel by operations and normal numbers, half of a symmetric Gram matrix and half of a triangular solve counted."""
    if name == "haar_stiefel":
        return limits.seconds(operations=2 * n * rank**2, normals=n * rank)
    if name == "gaussian":
        return limits.seconds(normals=n * rank)
    return limits.seconds(moved=4 * n * rank)


def _single(n: int, r: int, generator: torch.Generator, device: torch.device, limits: Limits, repeats: int) -> list[dict[str, Any]]:
    draw = lambda: torch.randn(n, r, generator=generator, device=device)  # noqa: E731
    laws = {name: made(name, n, r, generator) for name in LAWS}
    calls: dict[str, Callable[[], Any]] = {name: lambda law=law: law.sample(generator=generator) for name, law in laws.items()}
    calls["floor of haar_stiefel"] = lambda: _floor(draw())
    empty = torch.empty(n, r, device=device)
    calls["torch.nn.init.orthogonal_"] = lambda: nn.init.orthogonal_(empty)
    if n <= SQUARE_LIMIT and device.type == "cpu":
        calls["scipy.stats.ortho_group, square"] = lambda: scipy.stats.ortho_group.rvs(n, random_state=0)
    try:
        from geotorch import Stiefel  # pyright: ignore[reportMissingImports]

        calls["geotorch.Stiefel"] = lambda: Stiefel(size=(n, r)).sample("uniform")
    except ImportError:
        pass
    rows = pairs(lambda: torch.linalg.qr(draw()), calls, device, repeats)[1:]
    seconds = {row["name"]: row["seconds"] for row in rows}
    for row in rows:
        name = row["name"]
        row |= {"over": "torch.linalg.qr", "shape": f"{n}x{r}"}
        if name in LAWS:
            row |= {"floor_seconds": floor(name, n, r, limits), "share": floor(name, n, r, limits) / row["seconds"]}
        if name == "haar_stiefel":
            limit = 1 / FASTER["cuda" if device.type == "cuda" else "cpu"]
            row |= {"target": limit, "holds": row["ratio"] <= limit}
    ratio = seconds["haar_stiefel"] / seconds["floor of haar_stiefel"]
    own = {"name": "haar_stiefel", "seconds": seconds["haar_stiefel"], "ratio": ratio, "repeats": repeats, "over": "its floor, measured"}
    return [*rows, own | {"shape": f"{n}x{r}", "target": FLOOR_LIMIT, "holds": ratio <= FLOOR_LIMIT}]


def _floor(Z: Tensor) -> Tensor:
    return torch.linalg.solve_triangular(torch.eye(Z.shape[1], device=Z.device) + (Z.mT @ Z).triu(), Z, upper=True, left=False)


def _model(config: Config, generator: torch.Generator, device: torch.device, limits: Limits) -> list[dict[str, Any]]:
    """V for all matrices of the blocks of a model, r = n/8 each, drawn by shape as training does."""
    shapes = model_shapes(config.sampled)
    numbers = sum(count * n * rank for (n, rank), count in shapes.items())

    def all_of(draw: Callable[[int, int, int], Any]) -> Callable[[], None]:
        def call() -> None:
            for (n, rank), count in shapes.items():
                for _ in range(count):
                    draw(n, rank, count)

        return call

    laws = {name: {shape: made(name, *shape, generator) for shape in shapes} for name in LAWS}
    calls = {name: all_of(lambda n, r, _, mine=mine: mine[n, r].sample(generator=generator)) for name, mine in laws.items()}
    peer = all_of(lambda n, r, _: torch.linalg.qr(torch.randn(n, r, generator=generator, device=device)))
    rows = pairs(peer, calls, device, max(5, config.repeats // 2))[1:]
    for row in rows:
        least = sum(count * floor(row["name"], n, rank, limits) for (n, rank), count in shapes.items())
        row |= {"over": "torch.linalg.qr", "shape": f"LLaMA-{config.sampled.upper()}, r = n/8", "numbers": numbers}
        row |= {"floor_seconds": least, "share": least / row["seconds"]}
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
