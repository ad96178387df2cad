"""How long 100 000 draws of mean squared error and alignment take, of every law, beside a loop over single draws."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from estimators import LAWS, keyed
from estimators.measure import BUDGET_BYTES, measure
from experiments.benching.limits import Limits
from experiments.benching.sampling import floor
from experiments.training.timing import pairs

if TYPE_CHECKING:
    from experiments.bench import Config

M, N, RANK = 64, 256, 32
DRAWS, LOOP = 100_000, 100  # draws that are judged; draws of the loop
SECONDS_LIMIT, LOOP_LIMIT = {"cpu": 30.0, "cuda": 30.0}, 0.1


def measuring(config: Config, device: torch.device, limits: Limits) -> list[dict[str, Any]]:
    """Each repeat measures 1/repeats of the draws, so that all together are the DRAWS that are judged; seconds are of all.

    The floor is the products, and for laws whose draw has one that of drawing V; ``floor_ratio``: over the loop, what no measurement can undercut."""
    generator = keyed.generator(config.seed, "bench measure", 0, device)
    G = torch.randn(M, N, generator=generator, device=device) * torch.logspace(0, -2, N, device=device)
    size = -(-DRAWS // config.repeats)
    rows = []
    for name, kind in LAWS.items():
        law = kind.from_second_moment(G.mT @ G, RANK)

        def loop(law: Any = law) -> None:
            for _ in range(LOOP):
                V = law.sample(generator=generator)
                D = G @ V @ V.mT
                _ = float((D - G).square().sum()), float(D.square().sum()), float((D * G).sum())

        call = lambda law=law: measure(law, G, size, generator=generator)  # noqa: E731
        peer, row = pairs(loop, {name: call}, device, config.repeats)
        share = LOOP / size  # both per draw
        row |= {key: row[key] * share for key in ("ratio", "ratio_q1", "ratio_q3")}
        seconds = row["seconds"] * DRAWS / size
        least = DRAWS * (limits.seconds(operations=operations()) + (floor(name, N, RANK, limits) or 0.0))
        loops = peer["seconds"] * DRAWS / LOOP
        limit = SECONDS_LIMIT["cuda" if device.type == "cuda" else "cpu"]
        rows.append(
            row
            | {
                "seconds": seconds,
                "over": "a loop over draws",
                "shape": f"m={M}, n={N}, r={RANK}, {DRAWS} draws",
                "budget_bytes": BUDGET_BYTES,
            }
            | {
                "loop_seconds": loops,
                "floor_seconds": least,
                "floor_ratio": least / loops,
                "share": least / seconds,
                "seconds_target": limit,
            }
            | {"target": LOOP_LIMIT, "holds": row["ratio"] <= LOOP_LIMIT and seconds <= limit}
        )
    return rows


def operations() -> int:
    """Of one draw: the sketch ĜV, two Gram matrices r×r, and the mean of ĜVVᵀ."""
    return 2 * M * N * RANK + 2 * (M + N) * RANK**2 + 2 * M * N * RANK
