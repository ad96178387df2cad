"""Draws one by one: their squared errors are those of the estimates, their mean and that of their means are what theory says."""

from __future__ import annotations

import pytest
import torch

from estimators import HaarStiefel, TopSVD, keyed
from experiments.validation.checks import exact
from experiments.validation.draws import errors_of_means, estimates, squared_errors
from experiments.validation.synthetic import gradients
from experiments.validation.verdict import Z_LIMIT
from theory import mse

G = gradients("6x10", "power", noise=1.0, seed=0)


def test_squared_errors_are_those_of_the_estimates_themselves() -> None:
    law = HaarStiefel(n=10, rank=3)
    plain = (estimates(law, G, 50, generator=keyed.generator(0, "draws", 0)) - G.mean(0)).square().sum((-2, -1))
    found = squared_errors(law, G, 50, generator=keyed.generator(0, "draws", 0))
    torch.testing.assert_close(found, plain, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", [HaarStiefel, TopSVD])
def test_the_error_of_a_mean_is_bias_and_a_share_of_the_variance(kind: type[HaarStiefel] | type[TopSVD]) -> None:
    law = kind.from_second_moment((G.mT @ G).mean(0), 3)
    _, noise, signal = mse.gradient_moments(G.numpy())
    parts = mse.ipa(exact(law), noise, signal)
    counts = (1, 10, 100)
    for count, seen in zip(counts, errors_of_means(law, G, counts, 2000, generator=keyed.generator(0, "means", 0)), strict=True):
        theory = parts.bias + (parts.projection + parts.noise) / count
        assert 8 * seen.standard_error < 0.4 * theory  # a mean taken over 10 for 100, or a bias that is left out, would be seen
        assert abs(seen.value - theory) < Z_LIMIT * seen.standard_error


def test_of_one_sequence_there_is_no_standard_error() -> None:
    with pytest.raises(ValueError, match="2 replicas"):
        errors_of_means(HaarStiefel(n=10, rank=3), G, (1,), 1, generator=keyed.generator(0, "means", 0))
