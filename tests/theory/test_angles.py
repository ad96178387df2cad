"""Principal angles: known ones, invariance, and the overlap of chance by exact integration over a circle."""

from __future__ import annotations

import numpy as np
import pytest

from theory import angles


def frame(n: int, r: int, seed: int) -> np.ndarray:
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(n, r)))[0]


@pytest.mark.parametrize("turned", [1e-9, 1e-4, 0.3, 1.2, np.pi / 2])
def test_a_known_rotation_is_found(turned: float) -> None:
    """Also where the cosine is 1 to the last bit: 1e-9 radians."""
    n, r = 6, 2
    basis = frame(n, n, 0)
    other = np.stack([basis[:, 0], np.cos(turned) * basis[:, 1] + np.sin(turned) * basis[:, 4]], axis=1)
    found = angles.principal_angles(basis[:, :r], other)
    assert found == pytest.approx([0.0, turned], rel=1e-6, abs=1e-14)
    assert angles.overlap(basis[:, :r], other) == pytest.approx((1 + np.cos(turned) ** 2) / 2, rel=1e-12)


def test_overlap_is_the_mean_squared_cosine_and_depends_on_the_spans_alone() -> None:
    Q, other = frame(9, 4, 1), frame(9, 4, 2)
    cosines = np.cos(angles.principal_angles(Q, other))
    assert angles.overlap(Q, other) == pytest.approx(float(np.mean(cosines**2)), rel=1e-12)
    R, S = frame(4, 4, 3), frame(4, 4, 4)
    assert angles.principal_angles(Q @ R, other @ S) == pytest.approx(angles.principal_angles(Q, other), rel=1e-10)
    assert angles.principal_angles(other, Q) == pytest.approx(angles.principal_angles(Q, other), rel=1e-10)
    assert angles.overlap(Q, Q @ R) == pytest.approx(1.0, rel=1e-12)


def test_chance_is_exact_on_the_circle() -> None:
    """St(2, 1): the mean of cos² over equally spaced angles is the integral, to the last digits."""
    at = 2 * np.pi * np.arange(8) / 8
    mean = np.mean([angles.overlap(np.array([[np.cos(t)], [np.sin(t)]]), np.array([[1.0], [0.0]])) for t in at])
    assert mean == pytest.approx(angles.chance(2, 1), rel=1e-12)


def test_chance_is_exact_over_all_subsets_of_coordinates() -> None:
    """A coordinate subspace drawn without replacement has E[QQᵀ] = (r/n)I too: the same mean, by counting."""
    from itertools import combinations

    n, r = 6, 2
    Q = frame(n, r, 5)
    found = [angles.overlap(np.eye(n)[:, list(chosen)], Q) for chosen in combinations(range(n), r)]
    assert np.mean(found) == pytest.approx(angles.chance(n, r), rel=1e-12)


@pytest.mark.parametrize(
    ("Q", "other", "what"),
    [(np.eye(3)[:, :2], np.eye(3)[:, :1], "one shape"), (2 * np.eye(3)[:, :2], np.eye(3)[:, :2], "orthonormal")],
)
def test_what_is_no_pair_of_frames_is_refused(Q: np.ndarray, other: np.ndarray, what: str) -> None:
    with pytest.raises(ValueError, match=what):
        angles.principal_angles(Q, other)
