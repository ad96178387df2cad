"""What every law in the registry must do, whatever it is. A new law is tested here by its line in LAWS alone."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from estimators import LAWS, keyed
from estimators.law import Law

FLOOR = ("haar_stiefel", "coordinate", "dct", "hadamard")  # VᵀV = (cn/r)I
UNBIASED = [name for name, law in LAWS.items() if law.unbiased]
SIZES = [(1, 1), (5, 1), (5, 5), (8, 3), (12, 6)]


def second_moment(n: int) -> Tensor:
    g = torch.Generator().manual_seed(n)
    Q = torch.linalg.qr(torch.randn(n, n, generator=g, dtype=torch.float64))[0]
    S = (Q * torch.logspace(0, -3, n, dtype=torch.float64)) @ Q.mT
    return (S + S.mT) / 2


def make(name: str, n: int, rank: int, c: float = 0.8) -> Law:
    return LAWS[name].from_second_moment(second_moment(n), rank, c)


@pytest.mark.parametrize("name", LAWS)
@pytest.mark.parametrize(("n", "rank"), SIZES)
def test_shapes_dtypes_and_finiteness(name: str, n: int, rank: int, generator: torch.Generator) -> None:
    law = make(name, n, rank)
    for batch in [(), (3,), (2, 3), (0,)]:
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            V = law.sample(*batch, generator=generator, dtype=dtype)
            assert V.shape == (*batch, n, rank) and V.dtype == dtype and bool(torch.isfinite(V).all())
    assert law.sample(generator=generator).dtype == torch.float32


@pytest.mark.parametrize("name", LAWS)
def test_the_generator_is_the_only_randomness(name: str) -> None:
    law = make(name, 8, 3)
    state = torch.random.get_rng_state()
    a = law.sample(16, generator=torch.Generator().manual_seed(1))
    b = law.sample(16, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert torch.equal(state, torch.random.get_rng_state())
    if law.unbiased:
        assert not torch.equal(a, law.sample(16, generator=torch.Generator().manual_seed(2)))
        assert not torch.equal(a, a[:1].expand_as(a))


@pytest.mark.parametrize("name", FLOOR)
@pytest.mark.parametrize(("n", "rank"), SIZES)
def test_columns_are_orthogonal_and_of_one_length(name: str, n: int, rank: int, generator: torch.Generator) -> None:
    V = make(name, n, rank).sample(50, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(V.mT @ V, (0.8 * n / rank * torch.eye(rank, dtype=torch.float64)).expand(50, -1, -1), rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", [*FLOOR, "spectral"])
@pytest.mark.parametrize("n", [1, 5, 8])
def test_full_rank_loses_nothing(name: str, n: int, generator: torch.Generator) -> None:
    V = make(name, n, n).sample(20, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(V @ V.mT, (0.8 * torch.eye(n, dtype=torch.float64)).expand(20, -1, -1), rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", ["haar_stiefel", "dct", "hadamard", "spectral"])
def test_float32_draws_keep_their_identities(name: str, generator: torch.Generator) -> None:
    """Single precision reaches single-precision accuracy, at the hardest point r = n."""
    n = 96
    V = make(name, n, n).sample(4, generator=generator).double()
    assert float((V @ V.mT - 0.8 * torch.eye(n, dtype=torch.float64)).abs().max()) < 2e-5


@pytest.mark.parametrize("name", ["rademacher", "haar_stiefel", "coordinate", "coordinate_replacement", "dct", "hadamard"])
def test_the_trace_is_constant(name: str, generator: torch.Generator) -> None:
    V = make(name, 8, 3).sample(50, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(V.square().sum((-2, -1)), torch.full((50,), 0.8 * 8, dtype=torch.float64), rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", LAWS)
def test_draws_depend_on_their_key_only(name: str) -> None:
    law = make(name, 8, 3)
    first = keyed.draw(law, 7, "layers.0.q", 5, dtype=torch.float64)
    many = [keyed.draw(law, 7, "layers.0.q", index) for index in range(16)]
    keyed.draw(law, 7, "layers.0.q", 4)
    torch.testing.assert_close(first, keyed.draw(law, 7, "layers.0.q", 5, dtype=torch.float64), rtol=0, atol=0)
    if law.unbiased:  # draws of a sampling law may coincide, sixteen of them do not
        assert any(not torch.equal(many[0], V) for V in many)
        for seed, name_ in ((8, "layers.0.q"), (7, "layers.0.k")):
            assert any(not torch.equal(V, keyed.draw(law, seed, name_, index)) for index, V in enumerate(many))


def test_another_process_draws_the_same() -> None:
    code = (
        "import torch; from estimators import LAWS, keyed\n"
        "for name in ('gaussian', 'haar_stiefel', 'dct', 'spectral'):\n"
        "    V = keyed.draw(LAWS[name](n=6, rank=2), 3, 'w', 1, dtype=torch.float64)\n"
        "    print(V.flatten().tolist())"
    )
    seen = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.splitlines()
    for name, line in zip(("gaussian", "haar_stiefel", "dct", "spectral"), seen, strict=True):
        V = keyed.draw(LAWS[name](n=6, rank=2), 3, "w", 1, dtype=torch.float64)
        assert V.flatten().tolist() == eval(line)


@pytest.mark.parametrize("name", LAWS)
@pytest.mark.usefixtures("unchecked")
def test_wrong_parameters_are_named(name: str) -> None:
    cls, S = LAWS[name], second_moment(4)
    with pytest.raises(ValueError, match=rf"{cls.__name__}\(n=4, r=5, c=1.*\): rank must be at most n"):
        cls.from_second_moment(S, 5)
    with pytest.raises(ValueError, match=r"r=0, c=1.*\): rank must be at least 1"):
        cls.from_second_moment(S, 0)
    for c in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="c must be positive and finite"):
            cls.from_second_moment(S, 2, c)
    bad = {
        "NaN or infinite": torch.full((4, 4), math.nan),
        "must be symmetric": torch.triu(torch.ones(4, 4)),
        "non-empty square": torch.ones(3, 4),
        "no positive eigenvalue|indefinite": -torch.eye(4),
    }
    for message, matrix in bad.items():
        with pytest.raises(ValueError, match=message):
            cls.from_second_moment(matrix, 2)


@pytest.mark.parametrize("name", UNBIASED)
def test_a_law_is_frozen(name: str) -> None:
    with pytest.raises(AttributeError):
        make(name, 4, 2).rank = 3  # pyright: ignore[reportAttributeAccessIssue]
