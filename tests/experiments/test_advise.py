"""``lowrank advise``: unbiased estimates of errors against the law's exact error and against draws, what a step costs, the choice, the words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import BertConfig, BertForMaskedLM

from estimators import LAWS, convert
from experiments import advise, cli, runs
from experiments.advising import choice, costs, errors, subject
from experiments.advising.costs import FULL
from experiments.benching.limits import Limits
from experiments.pages import advice
from experiments.validation.checks import exact
from experiments.validation.verdict import Verdict
from tests.conftest import Once
from theory import mse

MACHINE = Limits(gemm=1e11, gemm16=1e11, copy=1e10, normals=1e9)


def population(count: int, m: int, n: int, seed: int = 0) -> Tensor:
    """Gradients (count, m, n) in float64 with a mean, noise and a decaying spectrum."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.logspace(0, -1.5, n, dtype=torch.float64)
    g = torch.randn(m, n, generator=generator, dtype=torch.float64) * scale
    return g + 2 * torch.randn(count, m, n, generator=generator, dtype=torch.float64) * scale


def layer(gradients: Tensor) -> errors.Layer:
    return next(iter(errors.layers(iter([("layer", gradients)]), 0)))


def test_sums_are_those_of_all_pairs_and_of_all_but_one() -> None:
    gradients = population(5, 6, 8)
    Q = torch.linalg.qr(torch.randn(8, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1)))[0]
    found = errors.sums(gradients, Q)
    for entry, kept in enumerate([range(5), *([i for i in range(5) if i != j] for j in range(5))]):
        some = gradients[list(kept)]
        pairs = [(some[i] * some[j]).sum() for i in range(len(some)) for j in range(len(some)) if i != j]
        on = [((some[i] @ Q) * (some[j] @ Q)).sum(0) for i in range(len(some)) for j in range(len(some)) if i != j]
        assert found.second[entry] == pytest.approx(float(some.square().sum((1, 2)).mean()), rel=1e-10)
        assert found.signal[entry] == pytest.approx(float(torch.stack(pairs).mean()), rel=1e-10)
        assert found.second_on[entry] == pytest.approx((some @ Q).square().sum(1).mean(0).numpy(), rel=1e-10)
        assert found.signal_on[entry] == pytest.approx(torch.stack(on).mean(0).numpy(), rel=1e-10, abs=1e-12)


@pytest.mark.parametrize("law", [name for name in LAWS if name != "fixed_basis"])
def test_the_error_is_the_exact_one_of_the_law_on_moments_without_noise_squared(law: str) -> None:
    """The same number from full matrices: Σ_ξ and Σ_Θ of the population, freed of the noise in its mean."""
    gradients = population(7, 10, 12)
    mine = layer(gradients)
    _, noise, signal = mse.gradient_moments(gradients[1:].numpy())
    count = len(gradients) - 1
    unbiased_noise = noise * count / (count - 1)
    made = exact(mine.law(law, 4))
    g2 = np.trace(signal - unbiased_noise / count)
    expected = np.sum(made.square * (noise + signal)) - 2 * np.sum(made.mean * (signal - unbiased_noise / count)) + g2
    assert mine.error(law, 4)[0] == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("law", ["haar_stiefel", "spectral", "top_svd"])
def test_over_many_populations_the_mean_is_the_error_of_the_distribution(law: str) -> None:
    """No bias: the law fitted to one fixed mini-batch, its error on the distribution that the others come from."""
    m, n, rank, repeats = 6, 8, 3, 1000
    first = population(1, m, n)[0]
    scale = torch.logspace(0, -1.5, n, dtype=torch.float64)
    g = torch.randn(m, n, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * scale
    made = exact(layer(torch.stack([first] * 4)).law(law, rank))
    truth = mse.ipa(made, 4 * m * torch.diag(scale.square()).numpy(), (g.mT @ g).numpy()).total
    found = []
    for seed in range(repeats):
        noise = 2 * torch.randn(4, m, n, generator=torch.Generator().manual_seed(100 + seed), dtype=torch.float64) * scale
        found.append(layer(torch.cat([first[None], g + noise])).error(law, rank)[0])
    error = float(np.std(found, ddof=1) / np.sqrt(repeats))
    seen = Verdict(name=law, estimate=float(np.mean(found)), standard_error=error, theory=truth, scale=truth, required=0.1)
    assert seen.holds, seen


def test_a_jackknife_of_a_mean_is_its_standard_error() -> None:
    values = np.random.default_rng(0).normal(size=9)
    left_out = np.array([np.delete(values, i).mean() for i in range(9)])
    estimate, error = errors.jackknife(np.concatenate([[values.mean()], left_out]))
    assert estimate == values.mean() and error == pytest.approx(values.std(ddof=1) / 3, rel=1e-12)


def candidate(law: str, error: float, peak: int, seconds: float, **fields: Any) -> dict[str, Any]:
    plain = {"kind": "candidate", "law": law, "ratio": 0.25, "error_se": 0.0, "refresh_every": 1, "pareto": False}
    return plain | {"error": error, "peak_bytes": peak, "seconds": seconds, "unbiased": True, "fits": True} | fields


def test_the_front_and_the_recommendation() -> None:
    rows = [
        candidate(FULL, 1, 100, 1.0, fits=False),
        candidate("haar_stiefel", 4, 50, 0.9),
        candidate("gaussian", 5, 50, 0.9),
        candidate("spectral", 2, 60, 2.0),
        candidate("top_svd", 0.5, 50, 0.9, unbiased=False),
    ]
    assert choice.pareto(rows) == [False, False, False, False, True]
    assert choice.pareto(rows[:4]) == [True, True, False, True]
    assert choice.recommend(rows) is rows[1]  # 4 × 0.9 below 2 × 2.0; the biased one and the one that does not fit are out
    assert choice.recommend([rows[0], rows[4]]) is None


def test_predicted_time_counts_what_is_saved_and_what_redraws_take() -> None:
    shapes = {"a": (1024, 1024, 128)}
    saved = costs.predicted_seconds(1.0, shapes, "haar_stiefel", 4096, 10**9, MACHINE)
    lifted = 2 * 1024 * 1024 * 128
    less = (0.25 * 6 * 4096 * 1024**2 - lifted) / 1e11 + 7 * 4 * (1024 * 1024 - 1024 * 128) / 1e10  # r = n/8: a quarter of the products
    assert saved == pytest.approx(1 - less, abs=1e-9)
    often = costs.predicted_seconds(1.0, shapes, "haar_stiefel", 4096, 1, MACHINE)
    assert often - saved == pytest.approx(2 * 1024 * 128**2 / 1e11 + 1024 * 128 / 1e9, rel=1e-6)
    fitted = costs.predicted_seconds(1.0, shapes, "spectral", 4096, 1, MACHINE)
    assert fitted - often > 2 * 4096 * 1024**2 / 1e11
    assert costs.refresh_every(1.0, shapes, "haar_stiefel", 4096, MACHINE, 0.05) == 1
    assert costs.refresh_every(1.001 * (often - saved), shapes, "haar_stiefel", 4096, MACHINE, 0.05) == 20


@pytest.fixture(scope="session")
def advised(once: Once) -> runs.Run:
    """The smoke preset, run once."""

    def make(folder: Path) -> None:
        assert cli.main(["advise", "smoke", "--quiet", "--runs-dir", str(folder)]) == 0

    return runs.load(next(once("advised", make).glob("advise-*")))


def test_the_question_answers(advised: runs.Run, capsys: pytest.CaptureFixture[str]) -> None:
    rows = advised.rows()
    found = {row["law"]: row for row in rows if row["kind"] == "candidate"}
    assert list(found) == [FULL, "haar_stiefel", "spectral"]
    haar = found["haar_stiefel"]
    assert haar["error"] == pytest.approx(4.0, abs=0.3)  # r/n = 1/4, and next to no signal before training
    assert haar["peak_bytes"] < found["spectral"]["peak_bytes"] < found[FULL]["peak_bytes"]
    told = next(row for row in rows if row["kind"] == "advice")
    assert told["recommended"] == FULL and told["low_rank"] in found
    assert told["error_by_layer"] <= told["error_uniform"] * (1 + 1e-9)
    assert told["error_uniform"] == pytest.approx(found[told["low_rank"]]["error"])
    ranks = advised.read("ranks.json")
    handle = convert(subject.models.build("tiny", 0), law=told["low_rank"], rank=ranks)
    assert {name: layer.rank for name, layer in handle.layers.items()} == ranks
    assert "full AdamW fits" in " ".join(advice.reasons(rows, advised.config))
    assert "Pareto" in advice.section(rows, advised.config)
    assert cli.main(["advise", "smoke", "--quiet", "--runs-dir", str(advised.path.parent), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["results"][0]["rows"] == rows


def test_a_budget_that_nothing_fits_says_so(advised: runs.Run) -> None:
    rows = [row | {"fits": False} if row["kind"] == "candidate" else row for row in advised.rows() if row["kind"] != "advice"]
    candidates = [row for row in rows if row["kind"] == "candidate"]
    assert choice.recommend(candidates) is None
    smallest = min(candidates, key=lambda row: row["peak_bytes"])
    told = {
        "kind": "advice",
        "low_rank": None,
        "smallest_law": smallest["law"],
        "smallest_bytes": smallest["peak_bytes"],
        "recommended": None,
    }
    said = advice.reasons([*rows, told], {**advised.config, "budget_gb": 0.001})
    assert said[0].startswith("nothing unbiased fits within 0.001 GB") and str(smallest["law"]) in said[0]


def test_a_masked_language_model_guesses_the_same_places_every_time() -> None:
    torch.manual_seed(0)
    small: dict[str, Any] = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = BertForMaskedLM(BertConfig(**small))
    subject._without_dropout(model)
    mine = subject.Subject(model.train(), np.arange(50).repeat(20), 3, 0, 2, 16)
    ids = mine.batch(0)
    assert float(mine.loss(model, ids)) == float(mine.loss(mine.again(), ids)) > 0
    config = advise.Config(model="bert", sequences=2, length=16)
    assert costs.peak_bytes(config, mine, "haar_stiefel", 0.25, torch.device("cpu")) > 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--law", "haar"], "unknown law 'haar', known are gaussian"),
        (["--ratio", "1.5"], "ratio is a fraction of n and must be in (0, 1), got 1.5"),
        (["--budget-gb", "0"], "budget_gb must be positive, got 0.0"),
        (["--overhead", "1"], "overhead is a share of a step and must be in (0, 1), got 1.0"),
        (["--batches", "3"], "batches must be at least 4, got 3"),
        (["--model", "no/such/folder"], "the model 'no/such/folder' cannot be loaded"),
        (["--model", "tiny", "--data", "mine.jsonl"], "for data=mine.jsonl name a model folder"),
    ],
)
def test_wrong_input_is_one_line(arguments: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["advise", *arguments, "--quiet", "--runs-dir", str(tmp_path / "runs")]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    assert not list((tmp_path / "runs").glob("*"))
