"""The one way to test a mean by simulation: fixed N, one look, z against its own standard error, and a resolution asserted first."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Z_LIMIT, WIDTH = 5.0, 8.0


def assert_mean(
    draw: Callable[[int, torch.Generator], Tensor],
    expected: float | Tensor,
    *,
    draws: int,
    resolution: float,
    generator: torch.Generator,
) -> None:
    """E[draw] equals ``expected``: |z| < 5 for each of its k statistics, and a defect of ``resolution`` would have been seen.

    ``draw(size, generator)`` gives (size, k) or (size,) float64 values; ``resolution`` is absolute, in their units, and must hold 8 standard
    errors, so that noise can only make this fail.
    """
    values = draw(draws, generator)
    assert values.dtype == torch.float64 and len(values) == draws
    values = values.reshape(draws, -1)
    target = torch.as_tensor(expected, dtype=torch.float64).reshape(-1)
    error = values.std(0) / draws**0.5
    assert float(WIDTH * error.max()) <= resolution, (
        f"resolution {resolution} needs more than {draws} draws: 8 SE = {WIDTH * error.max():.3g}"
    )
    z = (values.mean(0) - target) / error.clamp_min(1e-14)
    assert float(z.abs().max()) < Z_LIMIT, f"z = {z.tolist()}, mean {values.mean(0).tolist()}, expected {target.tolist()}"
