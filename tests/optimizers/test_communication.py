"""The communication hook: two processes against the mean gradient, its expectation and error, what it sends, feedback; and torch's PowerSGD."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor, distributed, nn

from estimators import LAWS, Coordinate, FixedBasis, Gaussian, HaarStiefel, Law, SpectralSampling, TopSVD, keyed
from estimators.error_feedback import ef14
from optimizers import LawState, law_hook
from tests.conftest import Once
from tests.experiments.launch import ENVIRONMENT, ROOT, torchrun
from tests.monte_carlo import assert_mean
from tests.optimizers.two_processes import Outcome, Scenario
from theory import mse
from theory.moments import moments

RECORDED = ROOT.parent / "shared" / "golden" / "two"  # beside the repository
SHAPES = [(24, 40), (40, 24), (16, 16), (7,), (6, 5, 3), ()]
SIDES = {0: (40, 24), 1: (40, 24), 2: (16, 16), 4: (15, 6)}  # (m, n) of those that are matrices
STEPS = 5
ORTHOGONAL = ("haar_stiefel", "coordinate", "dct", "hadamard")  # VVᵀ = I at r = n


def given(seed: int, shapes: list[tuple[int, ...]], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, STEPS, *shape, generator=generator, dtype=dtype) for shape in shapes]


HAAR: dict[str, Any] = {"law": HaarStiefel, "rank": 3}
OTHER: dict[str, Any] = {"law": Gaussian, "rank": 0.25, "c": 0.5, "seed": 7, "every": 2, "start": 1}
FEEDBACK: dict[str, Any] = {"law": HaarStiefel, "rank": 3, "feedback": True}
SCENARIOS = {
    **{law: Scenario(given(0, SHAPES), {"law": LAWS[law], "rank": 100, "min_compression": 0.5}) for law in (*ORTHOGONAL, "gaussian")},
    "haar": Scenario(given(1, SHAPES), HAAR),
    "many buckets": Scenario(given(1, SHAPES), HAAR, bucket=0.001),
    "other": Scenario(given(2, SHAPES), OTHER),
    "selective": Scenario(given(2, SHAPES), HAAR | {"min_compression": 6.0}),  # n/r is 8, 8, 5.3 and 2
    "float32": Scenario(given(2, SHAPES, torch.float32), HAAR),
    "bfloat16": Scenario(given(2, SHAPES, torch.bfloat16), HAAR),
    "feedback": Scenario(given(3, SHAPES), FEEDBACK, bucket=0.001),
    "resumed": Scenario(given(3, SHAPES), FEEDBACK, bucket=0.001, resumed=3),
    "rounded": Scenario(given(3, SHAPES, torch.bfloat16), FEEDBACK),
    "powersgd": Scenario(
        given(4, [(12, 20), (5,)]), {"matrix_approximation_rank": 2, "start_powerSGD_iter": 2, "min_compression_rate": 1}, True
    ),
}


@cache
def recorded() -> dict[str, tuple[Scenario, Tensor]]:
    """The runs of torch's hook and what they gave, none where they are not at hand."""
    if not (RECORDED / "index.json").exists():
        return {}
    found = {}
    for run in json.loads((RECORDED / "index.json").read_text())["runs"]:
        if run["method"] == "PowerSGD_ddp_hook":
            held, options = np.load(RECORDED / run["file"]), {k: v for k, v in run["hyper"].items() if k != "world_size"}
            found[run["file"]] = (Scenario([torch.tensor(held["grads"])], options, powersgd=True), torch.tensor(held["Ghat"]))
    return found


@pytest.fixture(scope="module")
def two(once: Once) -> list[dict[str, Outcome]]:
    """What each of two processes saw of all scenarios, in one launch."""

    def launch(folder: Path) -> None:
        torch.save(SCENARIOS | {name: scenario for name, (scenario, _) in recorded().items()}, folder / "scenarios.pt")
        subprocess.run(torchrun("tests.optimizers.two_processes", str(folder)), cwd=ROOT, env=ENVIRONMENT, check=True, timeout=100)

    folder = once("communication", launch)
    return [{name: Outcome(**seen) for name, seen in torch.load(folder / f"{rank}.pt").items()} for rank in (0, 1)]


def drawn(
    i: int, t: int, law: type[Law] = HaarStiefel, r: int = 3, c: float = 1.0, seed: int = 0, dtype: torch.dtype = torch.float64
) -> Tensor:
    """V as the keys say, for the parameter i and the draw t."""
    return keyed.draw(law(SIDES[i][1], r, c), seed, f"weights.{i}", t, dtype=dtype).double()


def matrix(G: Tensor) -> Tensor:
    """With at least as many rows as columns."""
    M = G.reshape(len(G), -1)
    return M.mT if M.shape[0] < M.shape[1] else M


def projected(G: Tensor, V: Tensor) -> Tensor:
    M = matrix(G) @ V @ V.mT
    return (M if len(G) >= G[0].numel() else M.mT).reshape(G.shape)


def same(seen: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(seen, expected, rtol=0, atol=tolerance)


# two processes


@pytest.mark.parametrize("name", [*SCENARIOS, "recorded"])
def test_both_processes_have_the_same_to_the_last_bit(name: str, two: list[dict[str, Outcome]]) -> None:
    mine, other = two
    for key in recorded() if name == "recorded" else [name]:
        for step, (a, b) in enumerate(zip(mine[key].gradients, other[key].gradients, strict=True)):
            assert len(a) == len(b) > 0 and all(torch.equal(x, y) for x, y in zip(a, b, strict=True)), (key, step)


@pytest.mark.parametrize("name", ORTHOGONAL)
def test_all_directions_give_the_mean_gradient(name: str, two: list[dict[str, Outcome]]) -> None:
    """VVᵀ = I at r = n. In float64, so that a missing factor or a transposed product cannot hide in rounding."""
    for t, seen in enumerate(two[0][name].gradients):
        for G, X in zip(SCENARIOS[name].gradients, seen, strict=True):
            same(X, G[:, t].mean(0))


def test_the_test_above_saw_sketches(two: list[dict[str, Outcome]]) -> None:
    """A Gaussian V is not orthogonal at r = n: the matrices are not the mean, the vector and the number are."""
    for t, seen in enumerate(two[0]["gaussian"].gradients):
        for i, (G, X) in enumerate(zip(SCENARIOS["gaussian"].gradients, seen, strict=True)):
            assert (float((X - G[:, t].mean(0)).abs().max()) > 0.1) == (i in SIDES)


def test_each_matrix_is_projected_on_its_draw_of_that_step(two: list[dict[str, Outcome]]) -> None:
    """V of the key (seed, name, draw), on the smaller side, and the mean of both workers; whatever the buckets are."""
    for t in range(STEPS):
        for i, G in enumerate(SCENARIOS["haar"].gradients):
            mean = G[:, t].mean(0)
            for name in ("haar", "many buckets"):
                same(two[0][name].gradients[t][i], projected(mean, drawn(i, t)) if i in SIDES else mean)
    assert two[0]["many buckets"].calls[-1] > two[0]["haar"].calls[-1] == 1


def test_every_and_start_and_fractions(two: list[dict[str, Outcome]]) -> None:
    """Step 0 is plain; then draws 0, 0, 1, 1. r = n/4, and c scales."""
    for t in range(STEPS):
        for i, G in enumerate(SCENARIOS["other"].gradients):
            mean = G[:, t].mean(0)
            if t and i in SIDES:
                mean = projected(mean, drawn(i, (t - 1) // 2, Gaussian, round(SIDES[i][1] / 4), 0.5, 7))
            same(two[0]["other"].gradients[t][i], mean)


def test_what_is_not_worth_it_travels_whole(two: list[dict[str, Outcome]]) -> None:
    for i, (G, X) in enumerate(zip(SCENARIOS["selective"].gradients, two[0]["selective"].gradients[0], strict=True)):
        same(X, projected(G[:, 0].mean(0), drawn(i, 0)) if i in (0, 1) else G[:, 0].mean(0))


@pytest.mark.parametrize(
    "name, compressed, size",
    [
        ("haar", set(SIDES), 8),
        ("many buckets", set(SIDES), 8),
        ("selective", {0, 1}, 8),
        ("float32", set(SIDES), 4),
        ("bfloat16", set(SIDES), 2),
    ],
)
def test_bytes_sent(name: str, compressed: set[int], size: int, two: list[dict[str, Outcome]]) -> None:
    """3m numbers a matrix and all of the others, and nothing else, counted where torch issues collectives."""
    numbers = [G[0, 0].numel() for G in SCENARIOS[name].gradients]
    sent = sum(3 * SIDES[i][0] if i in compressed else count for i, count in enumerate(numbers))
    assert sent < sum(numbers) / 2
    assert two[0][name].bytes == [size * sent] * STEPS


def test_sixteen_bits(two: list[dict[str, Outcome]]) -> None:
    """V is that of float32. Sketch, sum and result are rounded, each by at most 2⁻⁹ of numbers that are at most 3·max|B|·max|V| in a row of BVᵀ."""
    for i, G in enumerate(SCENARIOS["bfloat16"].gradients):
        if i in SIDES:
            V, given = drawn(i, 1, dtype=torch.float32), G[:, 1].double()
            largest = max(float((matrix(mine) @ V).abs().max()) for mine in given)
            bound = 3 * 2**-9 * 3 * largest * float(V.abs().max())
            same(two[0]["bfloat16"].gradients[1][i].double(), projected(given.mean(0), V), bound)


# feedback


def test_feedback_is_that_of_each_worker(two: list[dict[str, Outcome]]) -> None:
    """EF14 of each worker with its own error and the projector of the step, then the mean; and nothing is lost: Σ Ĝ = Σ Ḡ − mean of e. torch deals
    parameters out to other buckets after the first step."""
    for i in SIDES:
        G, n = SCENARIOS["feedback"].gradients[i], SIDES[i][1]
        errors = [torch.zeros_like(G[0, 0])] * 2
        for t in range(STEPS):
            V = drawn(i, t, c=3 / n)
            same(V.mT @ V, torch.eye(3, dtype=torch.float64))
            sent = [ef14(lambda v: projected(v, V), G[w, t], errors[w]) for w in (0, 1)]
            errors = [error for _, error in sent]
            same(two[0]["feedback"].gradients[t][i], (sent[0][0] + sent[1][0]) / 2)
        ends = [outcome["feedback"].errors[f"weights.{i}"] for outcome in two]
        for end, error in zip(ends, errors, strict=True):
            same(end, matrix(error))
        total = sum(step[i] for step in two[0]["feedback"].gradients)
        same(cast(Tensor, total), G.mean(0).sum(0) - (errors[0] + errors[1]) / 2)
    assert set(two[0]["feedback"].errors) == {f"weights.{i}" for i in SIDES}


def test_what_rounding_drops_is_fed_back_too(two: list[dict[str, Outcome]]) -> None:
    """eV is 0 for a projector, so what is left of it is the rounding of B to bfloat16, at most 2⁻⁹ of it; float32 would leave 1e-6."""
    for i in SIDES:
        V, e = drawn(i, STEPS - 1, c=3 / SIDES[i][1], dtype=torch.float32), two[0]["rounded"].errors[f"weights.{i}"]
        assert e.dtype == torch.float32
        assert 1e-4 < float((e.double() @ V).abs().max()) < 0.05


def test_resumed_is_uninterrupted(two: list[dict[str, Outcome]]) -> None:
    for outcome in two:
        for a, b in zip(outcome["feedback"].gradients, outcome["resumed"].gradients, strict=True):
            assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# torch's own


def test_powersgd_is_what_our_docstring_says(two: list[dict[str, Outcome]]) -> None:
    """Steps 0 and 1 are plain. Only spans matter, so QR stands for Gram–Schmidt. The first Q is drawn as torch does. Errors that each worker
    projects itself give the means of torch's, which subtract the common Ĝ."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(np.random.RandomState(0).randint(1_000_000_000)))
        Q = torch.randn(20, 2, dtype=torch.float64)
    G, vector = SCENARIOS["powersgd"].gradients
    errors = torch.zeros_like(G[:, 0])
    for t in range(STEPS):
        expected = G[:, t].mean(0)
        if t >= 2:
            v = G[:, t] + errors
            P = torch.linalg.qr(v.sum(0) @ torch.linalg.qr(Q)[0])[0]
            Q = (v.mT @ P).mean(0)
            expected, errors = P @ Q.mT, v - P @ P.mT @ v
        same(two[0]["powersgd"].gradients[t][0], expected)
        same(two[0]["powersgd"].gradients[t][1], vector[:, t].mean(0))
    assert two[0]["powersgd"].asked[2:] == [[8 * 5, 8 * 2 * 12, 8 * 2 * 20]] * (STEPS - 2)


@pytest.mark.skipif(not recorded(), reason=f"the recorded runs are not at hand: {RECORDED} does not exist")
@pytest.mark.parametrize("name", recorded() or ["none"])
def test_recorded_runs_of_powersgd(name: str, two: list[dict[str, Outcome]]) -> None:
    """Within the 2e-5 of their index, for entries up to 8.4; the first two steps are the mean."""
    scenario, expected = recorded()[name]
    assert len(expected) == 8 and float((expected[2:] - scenario.gradients[0][:, 2:].mean(0)).abs().max()) > 0.1
    for outcome in two:
        for t, (G,) in enumerate(outcome[name].gradients):
            same(G, expected[t], 2e-5)


# one process: many draws


@dataclass
class Bucket:
    """What the hook asks of torch's."""

    held: list[Tensor]
    given: list[Tensor]

    def __post_init__(self) -> None:
        self.whole = torch.cat([G.flatten() for G in self.given])

    def buffer(self) -> Tensor:
        return self.whole

    def parameters(self) -> list[Tensor]:
        return self.held

    def gradients(self) -> list[Tensor]:
        return [part.view(G.shape) for part, G in zip(self.whole.split([G.numel() for G in self.given]), self.given, strict=True)]

    def is_last(self) -> bool:
        return True


@pytest.fixture
def one_process() -> Iterator[None]:
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)  # pyright: ignore[reportPrivateImportUsage]
    yield
    distributed.destroy_process_group()


def hooked(state: LawState, parameters: list[Tensor], gradients: list[Tensor]) -> list[Tensor]:
    bucket = Bucket(parameters, gradients)
    assert law_hook(state, cast(Any, bucket)).wait() is bucket.whole
    return bucket.gradients()


def model_of(*shapes: tuple[int, ...]) -> nn.ParameterList:
    return nn.ParameterList([nn.Parameter(torch.zeros(shape, dtype=torch.float64)) for shape in shapes])


def decaying(m: int, n: int, generator: torch.Generator) -> Tensor:
    return torch.randn(m, n, generator=generator, dtype=torch.float64) * 0.7 ** torch.arange(n, dtype=torch.float64)


def statistics(law: type[Law], c: float, G: Tensor, error: float, draws: int) -> Tensor:
    """⟨Ĝ, G⟩/‖G‖², ‖Ĝ − G‖² over what is expected, and the largest number of G in Ĝ over itself; of G and of Gᵀ. Only the step tells draws apart."""
    model = model_of(tuple(G.shape), tuple(G.mT.shape))
    state = LawState.of(model, law, 4, c=c)
    k, rows = int(G.abs().argmax()), []
    for _ in range(draws):
        tall, wide = hooked(state, list(model), [G, G.mT])
        both = torch.stack([tall, wide.mT])
        rows.append(
            torch.cat(
                [(both * G).sum((1, 2)) / G.square().sum(), (both - G).square().sum((1, 2)) / error, both.flatten(1)[:, k] / G.flatten()[k]]
            )
        )
    return torch.stack(rows)


@pytest.mark.usefixtures("one_process", "unchecked")
@pytest.mark.parametrize("law", [HaarStiefel, Coordinate, Gaussian])
def test_the_mean_and_the_error_are_those_of_theory(law: type[Law], generator: torch.Generator) -> None:
    """‖G‖²(n/r − 1) for orthonormal columns and ‖G‖²(n + 1)/r for Gaussian ones. 1500 draws see every defect of a third."""
    G = decaying(24, 12, generator)
    error = mse.ipa(moments(law.stem, 12, 4), np.zeros((12, 12)), (G.mT @ G).numpy()).projection
    assert error == pytest.approx(float(G.square().sum()) * (13 / 4 if law is Gaussian else 2))
    assert_mean(lambda size, _: statistics(law, 1.0, G, error, size), 1.0, draws=1500, resolution=0.35, generator=generator)


@pytest.mark.usefixtures("one_process")
def test_a_wrong_scale_is_seen(generator: torch.Generator) -> None:
    """c = n/r in the place of 1, as if the law were scaled twice: E[Ĝ] = 3G."""
    G = decaying(24, 12, generator)
    with pytest.raises(AssertionError, match="z = "):
        assert_mean(lambda size, _: statistics(HaarStiefel, 3.0, G, 1.0, size), 1.0, draws=100, resolution=1000.0, generator=generator)


@pytest.mark.usefixtures("one_process")
def test_equal_matrices_have_their_own_draws(generator: torch.Generator) -> None:
    G, model = decaying(8, 6, generator), model_of((8, 6), (8, 6))
    state = LawState.of(model, HaarStiefel, 2, every=3)
    seen = [hooked(state, list(model), [G, G]) for _ in range(4)]
    assert not torch.equal(*seen[0]) and not torch.equal(seen[2][0], seen[3][0])
    assert torch.equal(seen[0][0], seen[1][0]) and torch.equal(seen[0][0], seen[2][0])


@pytest.mark.usefixtures("one_process", "unchecked")
@pytest.mark.parametrize("feedback", [False, True])
def test_steps_on_a_noisy_quadratic(feedback: bool, generator: torch.Generator) -> None:
    """E‖x‖² after 30 steps η = 0.1 from ‖x‖² = 0.1 on ½‖x‖², noise of variance σ² = 1 in the gradient, κ = r/n = 1/4: exactly by recursion, since
    E[P] = κI and P² = P; and near the limits that the docstring gives, 0.077 with feedback and 0.25 without. 200 matrices at once are as many draws.
    Seen are the other kind and feedback that forgets, which would end at κησ²/(2 − ηκ), a quarter of it."""
    eta, kappa, noise, steps, copies = 0.1, 0.25, 1.0, 30, 200
    a, b, c = 0.1, 0.0, 0.0  # E‖x‖², E⟨x, e⟩, E‖e‖²
    for _ in range(steps):
        v = a + noise + (2 * b + c if feedback else 0)  # E‖v‖²
        if feedback:
            a, b, c = a - 2 * eta * kappa * (a + b) + eta**2 * kappa * v, (1 - kappa) * (a + b), (1 - kappa) * v
        else:
            a = a - 2 * eta * a + eta**2 / kappa * v
    limit = eta * noise / (2 - eta * (2 / kappa - 1)) if feedback else eta * noise / (2 * kappa - eta)
    assert a == pytest.approx(limit, rel=0.01)

    def draw(size: int, generator: torch.Generator) -> Tensor:
        model = model_of(*[(6, 4)] * size)
        state = LawState.of(model, HaarStiefel, 1, feedback=feedback)
        x = torch.full((size, 6, 4), (0.1 / 24) ** 0.5, dtype=torch.float64)
        for _ in range(steps):
            gradient = x + (noise / 24) ** 0.5 * torch.randn(x.shape, generator=generator, dtype=torch.float64)
            x = x - eta * torch.stack(hooked(state, list(model), list(gradient)))
        return x.square().sum((1, 2))

    assert_mean(draw, a, draws=copies, resolution=0.5 * a, generator=generator)


@pytest.mark.usefixtures("one_process")
def test_nan_arrives(generator: torch.Generator) -> None:
    """Loss scaling looks for it after the hook, also where V does not look (Coordinate)."""
    G, model = decaying(8, 6, generator), model_of((8, 6))
    G[2, 3] = torch.inf
    (X,) = hooked(LawState.of(model, Coordinate, 2), list(model), [G])
    assert not torch.isfinite(X[2]).any() and torch.isfinite(X[[0, 1, 3, 4, 5, 6, 7]]).all()


# wrong input


@pytest.mark.parametrize(
    "options, message",
    [
        ({"law": SpectralSampling}, r"LawState\(law=SpectralSampling, rank=2\): law must be .* not fitted"),
        ({"law": TopSVD}, "not fitted"),
        ({"law": FixedBasis}, "is unbiased"),
        ({"law": "haar_stiefel"}, "must be a class"),
        ({"rank": 0}, r"rank=0\): rank must be a positive integer"),
        ({"rank": 1.0}, r"a fraction of the smaller side in \(0, 1\)"),
        ({"rank": True}, "rank must be"),
        ({"every": 0}, r"rank=2\): every=0 must be at least 1"),
        ({"start": -1}, "start=-1"),
        ({"min_compression": float("nan")}, "min_compression=nan"),
        ({"c": 0.0}, "c must be positive"),
        ({"every": 2, "feedback": True}, "every=2 with feedback, which needs a new V at every step"),
        ({"c": 0.5, "feedback": True}, "c=0.5 with feedback, which sets c = r/n itself"),
        ({"law": Gaussian, "feedback": True}, "feedback with a law whose VVᵀ is no projection"),
        ({"law": LAWS["coordinate_replacement"], "feedback": True}, "no projection at c = r/n"),
        ({"rank": 6}, "no matrix to compress .min_compression=1, 2 parameters"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LawState.of(nn.Linear(6, 8), **({"law": HaarStiefel, "rank": 2} | options))


@pytest.mark.usefixtures("one_process")
def test_parameters_of_another_model_are_refused() -> None:
    state, other = LawState.of(nn.Linear(6, 8), HaarStiefel, 2), nn.Linear(6, 8)
    with pytest.raises(ValueError, match=r"shape \(8, 6\) is not of the model that LawState.of was given"):
        hooked(state, [other.weight], [torch.ones(8, 6)])
