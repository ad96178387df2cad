"""Levels are the eigenvalues of the moment matrices, and the error from them is the error from the matrices."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from theory import levels, moments, mse

N = 9
Q = np.linalg.qr(np.random.default_rng(3).standard_normal((N, N)))[0]
CASES: list[tuple[str, dict[str, Any]]] = [
    ("gaussian", {}),
    ("rademacher", {}),
    ("sparse_sign", {"sparsity": 5.0}),
    ("haar_stiefel", {}),
    ("coordinate", {}),
    ("coordinate", {"replacement": True}),
    ("subsampled_transform", {}),
    ("spectral", {"basis": Q, "sigma": np.geomspace(1, 1e-3, N)}),
    ("spectral", {"basis": Q[:, :5], "sigma": np.geomspace(1, 1e-1, 5), "tail": 0.02}),
    ("spectral", {}),
    ("truncated", {"basis": Q[:, :3]}),
]


@pytest.mark.parametrize("c", [1.0, 0.3])
@pytest.mark.parametrize("stem, parameters", CASES)
def test_levels_are_the_eigenvalues_of_the_moments(stem: str, parameters: dict[str, Any], c: float) -> None:
    law, truth = levels.levels(stem, N, 3, c, **parameters), moments(stem, N, 3, c, **parameters)
    known = parameters.get("basis", Q[:, :0])
    rest = np.eye(N) - known @ known.T
    np.testing.assert_allclose((known * law.mean) @ known.T + law.mean_rest * rest, truth.mean, atol=1e-12)
    np.testing.assert_allclose((known * law.square) @ known.T + law.square_rest * rest, truth.square, atol=1e-10)
    generator = np.random.default_rng(0)
    g = generator.standard_normal((4, N))
    noise = np.cov(generator.standard_normal((N, 40)))
    second = g.T @ g + noise
    error = levels.ipa(law, np.trace(second), np.sum(g**2), np.diag(known.T @ second @ known), np.sum((g @ known) ** 2, axis=0))
    assert error == pytest.approx(mse.ipa(truth, noise, g.T @ g).total, rel=1e-10)


def test_wrong_input_is_named() -> None:
    with pytest.raises(ValueError, match="unknown law"):
        levels.levels("nothing", 4, 2)
    with pytest.raises(ValueError, match="known directions"):
        levels.ipa(levels.levels("gaussian", 4, 2), 1.0, 1.0, (1.0,), (1.0,))
