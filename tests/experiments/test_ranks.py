"""``lowrank ranks``: factors against truncated matrices, overlaps against angles, equal budgets, ranks from a file, the question in small."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import replace
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from estimators import HaarStiefel, LowRankLinear, convert, keyed
from estimators.law import Constant
from experiments import cli, finetune, pretrain, publish, ranks, report, runs
from experiments.advising import choice
from experiments.comparison import grid
from experiments.finetuning import contenders, summary, tuner
from experiments.pages import page, ranking
from experiments.ranking import allotment, contest, correlation, export, factors, spectra, training
from experiments.text import tokens
from experiments.training import models
from experiments.training.methods import METHODS
from tests.experiments.test_pretrain import few
from tests.monte_carlo import assert_mean
from theory import angles, optimal, truncation

SIZE: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48, "vocab_size": 60}
Q0, UP0, DOWN1 = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj", "model.layers.1.mlp.down_proj"
RANKS = {Q0: 5, UP0: 7, DOWN1: 25}  # the last is no low-rank component: 25·(32 + 48) > 32·48
IDS = torch.randint(0, 60, (3, 10), generator=torch.Generator().manual_seed(0))


def llama(**fields: Any) -> LlamaForCausalLM:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(**SIZE, **fields)).eval()


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


# factors


@pytest.mark.parametrize("fields", [{}, {"attention_bias": True, "mlp_bias": True}, {"tie_word_embeddings": True}])
def test_a_factorised_model_is_the_truncated_one_and_loads_to_the_last_bit(fields: dict[str, Any], tmp_path: Path) -> None:
    truncated, mine = llama(**fields).double(), llama(**fields).double()
    found = factors.factorise(mine, RANKS)
    assert found == {Q0: 5, UP0: 7}
    factors.truncate(truncated, found)
    assert torch.allclose(logits(mine), logits(truncated), rtol=0, atol=1e-10)
    assert not torch.allclose(logits(truncated), logits(llama(**fields).double()), atol=1e-4)  # truncation has changed it
    size = factors.save(mine, found, tmp_path)
    again = factors.load(tmp_path).eval()
    assert torch.equal(logits(again), logits(mine))
    tensors = sum(p.numel() * p.element_size() for p in mine.parameters())
    assert tensors < size < tensors + 16_384  # and a header of names and shapes
    saved = sum(np.prod(shape) - r * sum(shape) for shape, r in (((32, 32), 5), ((48, 32), 7)))
    assert sum(p.numel() for p in llama(**fields).parameters()) - sum(p.numel() for p in mine.parameters()) == saved


def test_what_truncation_loses_is_the_tail() -> None:
    model, before = llama().double(), llama().double()
    factors.truncate(model, RANKS)
    for name, r in RANKS.items():
        W, truncated = before.get_parameter(f"{name}.weight").detach(), model.get_parameter(f"{name}.weight").detach()
        lost = truncation.tails(spectra.singular_values(W))[r - 1]
        assert float((W - truncated).square().sum()) == pytest.approx(lost, rel=1e-10)
        assert int(torch.linalg.matrix_rank(truncated)) == r


def test_of_rank_0_nothing_is_left() -> None:
    model = llama()
    factors.truncate(model, {Q0: 0})
    assert not model.get_parameter(f"{Q0}.weight").any()


def test_full_rank_changes_nothing_and_is_not_factorised() -> None:
    model = llama().double()
    factors.truncate(model, {Q0: 32, UP0: 32})
    assert torch.allclose(logits(model), logits(llama().double()), rtol=0, atol=1e-10)
    assert factors.factorise(model, {Q0: 16, UP0: 32}) == {}  # 16·(32 + 32) = 32·32: no fewer numbers


def test_a_folder_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    model = llama()
    model.save_pretrained(tmp_path)
    with pytest.raises(runs.WrongInput, match=r"it has no factors\.json"):
        factors.load(tmp_path)
    found = factors.factorise(model, RANKS)
    factors.save(model, found, tmp_path)
    (tmp_path / factors.FACTORS).write_text(json.dumps({Q0: 5}))
    with pytest.raises(runs.WrongInput, match="do not fit"):
        factors.load(tmp_path)


# subspaces


def frames(count: int, n: int, r: int, seed: int) -> Tensor:
    V = HaarStiefel(n=n, rank=r).sample(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return V * (r / n) ** 0.5


def test_overlaps_are_those_of_principal_angles() -> None:
    some, others = frames(3, 12, 4, 0), frames(3, 12, 4, 1)
    table = spectra.overlaps(some, others)
    for i in range(3):
        for j in range(3):
            assert table[i, j] == pytest.approx(angles.overlap(some[i].numpy(), others[j].numpy()), rel=1e-10)


def test_the_mean_leaves_out_pairs_of_one_batch() -> None:
    table = np.random.default_rng(0).normal(size=(5, 5))
    mean, without = spectra.off_diagonal(table)
    pairs = [(i, j) for i in range(5) for j in range(5) if i != j]
    assert mean == pytest.approx(np.mean([table[pair] for pair in pairs]), rel=1e-12)
    for left in range(5):
        assert without[left] == pytest.approx(np.mean([table[pair] for pair in pairs if left not in pair]), rel=1e-12)


def test_subspaces_of_noise_overlap_by_chance_alone() -> None:
    """The noise floor of batches that have nothing in common; with pairs of a batch and itself it would be far above."""
    n, r, count = 10, 3, 4

    def floors(size: int, generator: torch.Generator) -> Tensor:
        V = HaarStiefel(n=n, rank=r).sample(size, count, generator=generator, dtype=torch.float64) * (r / n) ** 0.5
        return torch.tensor([spectra.off_diagonal(spectra.overlaps(Q, Q))[0] for Q in V], dtype=torch.float64)

    assert_mean(floors, angles.chance(n, r), draws=3000, resolution=0.01, generator=torch.Generator().manual_seed(0))
    Q = frames(count, n, r, 0)
    assert spectra.overlaps(Q, Q).mean() > angles.chance(n, r) + 0.1


def made(step: int, Q: Tensor, m: int = 20) -> spectra.Moment:
    """A moment of one layer, of which nothing but the frames (N, n, r) is known."""
    return spectra.Moment(step, {"a": (m, Q.shape[-2])}, {}, {}, {"a": Q}, [])


def test_unrelated_moments_share_nothing_above_chance() -> None:
    """The mini-batches of a moment are a subspace in common and noise; the subspaces of the two moments are drawn apart, uniformly."""
    n, r, count = 12, 3, 4

    def relative(size: int, generator: torch.Generator) -> Tensor:
        common = HaarStiefel(n=n, rank=r).sample(size, 2, generator=generator, dtype=torch.float64) * (r / n) ** 0.5
        noise = 0.2 * torch.randn(size, 2, count, n, r, generator=generator, dtype=torch.float64)
        Q = torch.linalg.qr(common[:, :, None] + noise).Q
        return torch.tensor([spectra.angle_rows(made(0, a), made(1, b), r)[-1]["relative"] for a, b in Q], dtype=torch.float64)

    assert_mean(relative, 0.0, draws=1500, resolution=0.05, generator=torch.Generator().manual_seed(0))


def test_where_a_noise_floor_is_at_chance_nothing_is_told() -> None:
    Q = torch.eye(12, dtype=torch.float64).view(12, 4, 3).movedim(1, 0)  # four mini-batches with no direction in common
    (row, _) = spectra.angle_rows(made(0, Q), made(1, frames(4, 12, 3, 0)), 3)
    assert math.isnan(row["relative"]) and math.isnan(row["relative_se"]) and row["overlap"] > 0
    assert ranking.angle_lines({"angle": pd.DataFrame([{**row, "layer": "all"}])})[0]["above chance, over that of the noise floor"] == (
        "noise floor at chance"
    )


def linear(model: nn.Module) -> list[str]:
    return [name for name, layer in model.get_submodule("model").named_modules(prefix="model") if isinstance(layer, nn.Linear)]


def batch(number: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 60, (2, 12), generator=keyed.generator(seed, "test", number))


def moment(step: int, model: nn.Module, count: int = 5) -> spectra.Moment:
    return spectra.moment(step, model, linear(model), batch, count, 4)


def turned(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """Other weights, not far away."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * p.std() * torch.randn(p.shape, generator=keyed.generator(0, "turned", p.numel())))
    return model


def test_the_rows_of_two_moments_are_those_of_a_plain_loop() -> None:
    earlier, later, r = moment(0, llama()), moment(7, turned(llama())), 3
    rows = {row["layer"]: row for row in spectra.angle_rows(earlier, later, r)}
    count, layers = 5, list(earlier.frames)

    def overlap(one: spectra.Moment, other: spectra.Moment, names: list[str], left: int | None) -> float:
        found = [
            angles.overlap(one.frames[name][i, :, :r].numpy(), other.frames[name][j, :, :r].numpy())
            for name in names
            for i in range(count)
            for j in range(count)
            if i != j and left not in (i, j)
        ]
        return float(np.mean(found))

    for name in (*layers[:2], "all"):
        names = layers if name == "all" else [name]
        chance = float(np.mean([r / earlier.shapes[layer][1] for layer in names]))

        def relative(left: int | None, names: list[str] = names, chance: float = chance) -> float:
            above = overlap(earlier, later, names, left) - chance
            floors = [overlap(one, one, names, left) - chance for one in (earlier, later)]
            return above / math.sqrt(floors[0] * floors[1])

        row = rows[name]
        assert (row["step"], row["other"]) == (0, 7) and row["chance"] == pytest.approx(chance, rel=1e-12)
        assert row["overlap"] == pytest.approx(overlap(earlier, later, names, None), rel=1e-9)
        assert row["relative"] == pytest.approx(relative(None), rel=1e-8)
        for of, stated in (
            (relative, row["relative_se"]),
            (lambda left, names=names: overlap(earlier, later, names, left), row["overlap_se"]),
        ):
            left_out = np.array([of(left) for left in range(count)])
            assert stated == pytest.approx(np.sqrt((count - 1) * left_out.var()), rel=1e-7)
        pairs = [(layer, i, (i + 1) % count) for layer in names for i in range(count)]
        found = [angles.principal_angles(earlier.frames[layer][i, :, :r], later.frames[layer][j, :, :r]) for layer, i, j in pairs]
        assert row["median_degrees"] == pytest.approx(np.degrees(np.median(found)), rel=1e-9)
    assert rows["all"]["relative"] < 1


def test_frames_are_leading_right_singular_vectors() -> None:
    model = llama()
    now = moment(0, model)
    for name in (Q0, DOWN1):
        for number, Q in enumerate(now.frames[name]):
            (G,) = torch.autograd.grad(models.loss_of(model, batch(number)), [model.get_parameter(f"{name}.weight")])
            Vt = np.linalg.svd(G.double().numpy(), full_matrices=False)[2][:4]
            assert Q.shape == (now.shapes[name][1], 4) and np.abs((Vt * Q.numpy().T).sum(1)) == pytest.approx(np.ones(4), abs=1e-4)


def test_of_one_moment_with_itself_nothing_has_turned() -> None:
    now = moment(0, llama())
    rows = spectra.angle_rows(now, now, 4)
    assert len(rows) == 15 and rows[-1]["layer"] == "all"
    assert all(row["relative"] == pytest.approx(1, rel=1e-12) and row["relative_se"] < 1e-12 for row in rows)
    layers = [row["overlap"] for row in rows[:-1]]
    assert rows[-1]["overlap"] == pytest.approx(np.mean(layers), rel=1e-10) and all(0 < value < 1 for value in layers)
    assert all(1 < row["median_degrees"] <= 90 for row in rows)  # of different mini-batches; of each with itself 0


def test_a_moment_has_the_spectra_of_weights_and_of_all_gradients() -> None:
    model = llama()
    now = moment(3, model)
    W = model.get_parameter(f"{UP0}.weight").detach().numpy()
    assert now.weights[UP0] == pytest.approx(np.linalg.svd(W, compute_uv=False), rel=1e-5)
    (layer,) = (layer for layer in now.layers if layer.name == UP0)
    assert now.shapes[UP0] == (48, 32) and now.gradients[UP0].shape == (32,)
    second = now.gradients[UP0] ** 2
    assert (np.diff(second) <= 1e-18).all()
    squares = [
        float(torch.autograd.grad(models.loss_of(model, batch(number)), [model.get_parameter(f"{UP0}.weight")])[0].double().square().sum())
        for number in range(5)
    ]
    assert second.sum() == pytest.approx(np.mean(squares), rel=1e-5)
    # the first batch shows the directions; errors are about the others
    assert float(layer.sums.second[0]) == pytest.approx(np.mean(squares[1:]), rel=1e-5)
    rows = spectra.spectrum_rows(now)
    assert len(rows) == 28 and all(row["values"][0] == 1 and 1 <= row["effective_rank"] <= min(row["m"], row["n"]) for row in rows)


# whether effective ranks of weights and gradients go together


def named(*kinds: str) -> list[str]:
    return [f"model.layers.{number}.{kind}" for kind in kinds for number in range(3)]


def spearman(some: Any, others: Any) -> float:
    found: Any = stats.spearmanr(some, others)
    return float(found.statistic)


def test_the_correlation_within_kinds_has_the_p_of_all_their_permutations() -> None:
    """Enumerated: 3!² orders, none of them across the two kinds, which differ in how far their layers lie apart."""
    weights, gradients = [0.4, 0.8, 0.5, 5.2, 8.0, 7.9], [0.8, 0.2, 0.1, 17.0, 0.5, 11.0]
    found = correlation.correlation(weights, gradients, named("a.q_proj", "b.up_proj"))
    left = [np.concatenate([np.array(part) - np.mean(part) for part in (values[:3], values[3:])]) for values in (weights, gradients)]
    of = lambda order: spearman(left[0], left[1][order])  # noqa: E731
    every = np.array([of([*one, *(3 + i for i in other)]) for one in permutations(range(3)) for other in permutations(range(3))])
    assert found["within"] == pytest.approx(of(list(range(6))), abs=1e-12)
    assert found["pooled"] == pytest.approx(spearman(weights, gradients), abs=1e-12)
    p, across = (
        np.mean(np.abs(some) >= abs(found["within"]) - 1e-9) for some in (every, [of(list(order)) for order in permutations(range(6))])
    )
    assert (found["layers"], found["kinds"]) == (6, 2) and 0 < across < p - 0.1 < 0.9
    assert abs(found["p"] - p) < 1e-4 + 5 * np.sqrt(p * (1 - p) / correlation.PERMUTATIONS)
    assert correlation.correlation(weights, gradients, named("a.q_proj", "b.up_proj")) == found


def test_how_kinds_differ_is_no_correlation_within_them() -> None:
    layers, generator = [f"model.layers.{number}.{kind}" for number in range(4) for kind in "abcdefg"], np.random.default_rng(0)
    kinds = np.array([ord(correlation.kind(layer)) for layer in layers], dtype=float)
    weights, gradients = (kinds + 0.1 * generator.normal(size=28) for _ in range(2))
    found = correlation.correlation(weights, gradients, layers)
    assert found["pooled"] > 0.9 and abs(found["within"]) < 0.4 and found["p"] > 0.05
    assert (found["layers"], found["kinds"]) == (28, 7)
    opposed = correlation.correlation(weights, 2 * kinds - weights, layers)
    assert opposed["pooled"] > 0.9 and opposed["within"] == pytest.approx(-1) and opposed["p"] == 1 / (1 + correlation.PERMUTATIONS)


def test_of_one_layer_a_kind_there_is_no_correlation_within_kinds() -> None:
    found = correlation.correlation([0.1, 0.2, 0.3], [0.3, 0.1, 0.2], ["a.q", "a.k", "a.v"])
    assert math.isnan(found["within"]) and math.isnan(found["p"]) and found["pooled"] == pytest.approx(-0.5)


def test_the_page_tells_the_correlation_of_the_spectra() -> None:
    kinds = committed()
    spectrum = kinds["spectrum"][kinds["spectrum"].step == kinds["spectrum"].step.max()]
    of = {
        name: (rows.effective_rank / rows[["m", "n"]].min(axis=1)).set_axis(rows.layer).sort_index()
        for name, rows in spectrum.groupby("of")
    }
    found = correlation.correlation(list(of["weights"]), list(of["gradient"]), list(of["weights"].index))
    within = f"{found['within']:+.2f} (p = {found['p']:.2g} by permutation)"
    assert ranking.rank_lines(kinds)[-1]["within kinds"] == within and within in ranking.findings(kinds)[1]
    assert f"{found['pooled']:+.2f} over all 28 layers" in ranking.findings(kinds)[1]


# budgets


@pytest.mark.parametrize("rank", [4, 0.25])
def test_all_choices_have_one_budget_and_gradients_have_the_least_error(rank: int | float) -> None:
    now, tokens = moment(0, llama()), 64
    found = allotment.for_training(now, "haar_stiefel", rank, tokens)
    rows = [row for row in allotment.budget_rows("pretrain", now, "haar_stiefel", found, tokens) if row["kind"] == "budget"]
    told = {row["by"]: row for row in rows}
    dearest = max(choice.growing_bytes(layer, tokens) for layer in now.layers)
    for by in allotment.TRAINING:
        assert told["uniform"]["bytes"] - dearest < told[by]["bytes"] <= told["uniform"]["bytes"]
        assert all(1 <= found[by][layer.name] < layer.smaller for layer in now.layers)
        handle = convert(llama(), rank=found[by])
        assert {name: layer.rank for name, layer in handle.layers.items()} == found[by]
    assert told["gradients"]["error"] <= told["uniform"]["error"] * (1 + 1e-12)


def test_a_uniform_rank_that_a_layer_cannot_have_is_refused() -> None:
    with pytest.raises(ValueError, match="rank=32 is not below min"):
        allotment.for_training(moment(0, llama()), "haar_stiefel", 32, 64)


def test_export_budgets_are_numbers_and_least_error_has_the_least() -> None:
    now = moment(0, llama())
    for reduction in (0.3, 0.6, 0.9):
        found = allotment.for_export(now.weights, now.shapes, reduction)
        numbers = {by: sum(r * sum(now.shapes[name]) for name, r in some.items()) for by, some in found.items()}
        lost = {by: sum(float((now.weights[name][r:] ** 2).sum()) for name, r in some.items()) for by, some in found.items()}
        assert all(numbers["uniform"] - 80 < value <= numbers["uniform"] for value in numbers.values())
        assert lost["least_error"] <= lost["uniform"] * (1 + 1e-12) and set(found) == set(allotment.EXPORT)


# export


def test_a_perplexity_is_exp_of_the_mean_loss_however_large() -> None:
    of = lambda *losses: export.perplexity(torch.tensor(losses, dtype=torch.float64))  # noqa: E731
    assert of(1.0, 3.0) == pytest.approx(math.exp(2.0), rel=1e-12)
    assert of(60.0, 80.0) == pytest.approx(math.exp(70.0), rel=1e-12)
    assert of(1000.0) == math.inf and math.isnan(of(math.nan))
    row = {
        "model": "a",
        "reduction": 0.5,
        "by": "uniform",
        "numbers_share": 0.5,
        "lost_energy": 0.1,
        "components": 1,
        "layers": 2,
        "bytes": 1,
    }
    row |= dict.fromkeys(("loss_minus_whole", "loss_minus_whole_se", "loss_minus_uniform", "loss_minus_uniform_se"), 0.0) | {
        "bytes_dense": 2
    }
    row |= {"perplexity": of(2.0), "perplexity_zero": of(1000.0), "perplexity_truncated": of(70.0), "perplexity_exported": of(12.0)}
    (told,) = ranking.export_lines({"export": pd.DataFrame([row])})
    assert told["perplexity whole (matrices zero)"] == "7.39 (>1.8e+308)"
    assert (told["truncated"], told["exported"]) == ("2.5e+30", "1.6e+05")


def test_differences_of_an_export_are_of_its_folder_and_paired_by_sequence(tmp_path: Path) -> None:
    model, names = llama(), linear(llama())
    held_out = [IDS, torch.randint(0, 60, (2, 10), generator=torch.Generator().manual_seed(1))]
    rows = export.rows("a", model, held_out, (0.3, 0.8), tmp_path, True)
    shapes = {name: (len(W), W.shape[1]) for name in names for W in (model.get_parameter(f"{name}.weight"),)}
    singular = {name: spectra.singular_values(model.get_parameter(f"{name}.weight")) for name in names}
    whole = export.losses(factors.load(tmp_path / "dense"), held_out).numpy()
    assert len(rows) == 2 * len(allotment.EXPORT) and whole.shape == (5,)
    kept = {row["reduction"]: row["components"] for row in rows if row["by"] == "uniform"}
    assert kept[0.3] < len(names) == kept[0.8]  # what is exported is what is truncated at the second only
    truncated: dict[tuple[float, str], np.ndarray] = {}
    for row in rows:
        one = llama()
        factors.truncate(one, allotment.for_export(singular, shapes, row["reduction"])[row["by"]])
        mine = truncated[row["reduction"], row["by"]] = export.losses(one, held_out).numpy()
        loaded = export.losses(factors.load(tmp_path / f"{row['by']}-{row['reduction']:g}"), held_out).numpy()
        assert row["perplexity_exported"] == pytest.approx(np.exp(loaded.mean()), rel=1e-12)
        for name, each in (
            ("exported_minus_whole", loaded - whole),
            ("loss_minus_whole", mine - whole),
            ("loss_minus_uniform", mine - truncated[row["reduction"], "uniform"]),
        ):
            assert row[name] == pytest.approx(each.mean(), rel=1e-10, abs=1e-15)
            assert row[f"{name}_se"] == pytest.approx(np.sqrt(each.var(ddof=1) / 5), rel=1e-10, abs=1e-15)
        if row["components"] < len(names):
            assert abs(loaded - mine).max() > 1e-3


# ranks from a file


def written(folder: Path, content: Any, name: str = "ranks.json") -> Path:
    path = folder / name
    path.write_text(json.dumps(content))
    return path


@pytest.mark.parametrize("method", ["lowrank", "compact", "lora", "relora"])
def test_a_method_takes_every_layer_its_rank_and_leaves_others_whole(method: str, tmp_path: Path) -> None:
    asked = {"model.layers.0.self_attn.q_proj": 3, "model.layers.3.mlp.down_proj": 9}
    model = models.build("tiny", 0)
    made = METHODS[method](model, pretrain.Config(method=method, ranks=written(tmp_path, asked)))
    if "lora" in method:
        found = {name: layer.r["default"] for name, layer in made.adapters().items()}  # pyright: ignore[reportAttributeAccessIssue]
    else:
        found = {name: layer.rank for name, layer in model.named_modules() if isinstance(layer, LowRankLinear)}
    assert found == asked
    whole = model.get_submodule("model.layers.1.self_attn.q_proj").weight
    assert whole.requires_grad and any(p is whole for p in made.others())


def test_other_methods_and_other_models_are_refused(text: Path, tmp_path: Path) -> None:
    ranks = written(tmp_path, {"model.layers.0.self_attn.q_proj": 3})
    for fields, what in (
        ({"method": "adamw", "ranks": ranks}, "is for lowrank, compact, lora and relora"),
        ({"ranks": written(tmp_path, {"encoder.0": 3}, "other.json")}, r"'encoder.0' is no nn.Linear of LlamaForCausalLM"),
    ):
        with pytest.raises(runs.WrongInput, match=what):
            pretrain.main(few(text, tmp_path / "runs", **fields))


@pytest.mark.parametrize("content", [[], {}, {"a": 0}, {"a": 1.5}, {"a": True}, 3])
def test_a_file_that_holds_no_ranks_is_refused(content: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must hold positive integers by layer name"):
        pretrain.Config(ranks=written(tmp_path, content))


def test_other_ranks_are_another_run_and_another_place_of_the_file_is_not(tmp_path: Path) -> None:
    one = pretrain.Config(ranks=written(tmp_path, {"a": 1, "b": 2}))
    same, other = (
        replace(one, ranks=written(tmp_path, {"b": 2, "a": 1}, "same.json")),
        replace(one, ranks=written(tmp_path, {"a": 2}, "b.json")),
    )
    assert runs.identity(one) == runs.identity(same) != runs.identity(other)
    assert "ranks_sha256" not in runs.identity(pretrain.Config()) and "ranks" not in runs.identity(one)


def test_ranks_in_training_are_those_of_convert(text: Path, tmp_path: Path) -> None:
    """A file with one rank for all layers trains as that rank does."""
    names = list(convert(models.build("tiny", 0), rank=8).layers)
    uniform = pretrain.main(few(text, tmp_path, rank=8))
    by_file = pretrain.main(few(text, tmp_path, rank=0.5, ranks=written(tmp_path, dict.fromkeys(names, 8))))
    losses = [[row["loss"] for row in run.rows() if row["kind"] in ("train", "eval")] for run in (uniform, by_file)]
    assert uniform.path != by_file.path and losses[0] == losses[1]


def test_a_contender_of_fine_tuning_has_ranks_of_its_own(tmp_path: Path) -> None:
    path = written(tmp_path, {"a": 2})
    config = finetune.Config(method=("lowrank:haar_stiefel", "lora+ranks"), ranks=path)
    plain, mine = (contenders.trial(config, label, 1e-3) for label in config.method)
    assert (plain.ranks, mine.ranks) == (None, path) and plain.ranks_sha256 == "" != mine.ranks_sha256 == config.ranks_sha256
    with pytest.raises(ValueError, match=r"\+ranks is for"):
        finetune.Config(method=("galore+ranks",), ranks=path)


# the question


@pytest.fixture
def smoke(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ranks.Config:
    """In small; cells are trained in this process, and the pretrained model is a small one."""

    def train(cells: Sequence[Any], *rest: Any) -> None:
        job: grid.Job = rest[3] if len(rest) > 3 else grid.PRETRAINING
        for cell in dict.fromkeys(cells):
            assert grid._cell(job.main, cell) == 0

    monkeypatch.setattr(grid, "train", train)
    monkeypatch.setattr(models, "smollm2_files", lambda: None)
    monkeypatch.setattr(models, "smollm2", lambda: (llama(tie_word_embeddings=True), np.arange(100) % 60))
    return replace(
        ranks.PRESETS["smoke"], data=str(text), smollm2_reduction=(0.5,), smollm2_tokens=64, runs_dir=tmp_path / "runs", quiet=True
    )


@pytest.fixture
def run(smoke: ranks.Config) -> runs.Run:
    return ranks.main(replace(smoke, tasks=("pretrain",)))


def test_moments_are_the_models_on_the_way(smoke: ranks.Config) -> None:
    run = ranks.main(smoke := replace(smoke, tasks=(), smollm2_reduction=()))
    whole = training.source(smoke, run.path / "cells")
    found = [training.model_at(whole, step).get_parameter(f"{Q0}.weight").detach() for step in training.moments(smoke)]
    assert training.moments(smoke) == [0, 2, 4] and torch.equal(found[0], models.build("tiny", 1000).get_parameter(f"{Q0}.weight"))
    assert not torch.equal(found[0], found[1]) and not torch.equal(found[1], found[2])
    spectrum = run.frame("spectrum").query("layer == @Q0 and of == 'weights'").set_index("step").effective_rank
    for step, W in zip((0, 2, 4), found, strict=True):
        assert spectrum[step] == pytest.approx(optimal.effective_rank(spectra.singular_values(W) ** 2), rel=1e-9)


def test_gradients_are_of_text_that_no_loss_is_of(smoke: ranks.Config) -> None:
    config = replace(smoke, batches=9)  # 18 of 23 held-out sequences, of which 4 are evaluated
    mine, evaluated = ranks._batches(config, training.source(config, smoke.runs_dir))
    told = [{tuple(ids) for ids in some.view(-1, smoke.length).tolist()} for some in (mine, torch.cat(evaluated))]
    assert mine.shape == (9, 2, 16) and len(told[0]) == 18 and len(told[1]) == 4 and not told[0] & told[1]


def test_ranks_in_fine_tuning(smoke: ranks.Config, bert: Path, folder: Path) -> None:
    config = replace(smoke, tasks=("finetune",), finetune_model=str(bert), finetune_task=str(folder), finetune_rank=4, smollm2_reduction=())
    run = ranks.main(config)
    kinds = ranking.frames(run.rows())
    assert set(kinds["final"].task) == {"finetune"} and set(kinds["paired"]["of"]) == {"loss", "accuracy"}
    assert kinds["trial"].groupby("label").lr.nunique().to_dict() == dict.fromkeys(allotment.TRAINING, 3)
    assert sorted(zip(kinds["final"].label, kinds["final"].seed, strict=True)) == sorted(
        (by, seed) for by in allotment.TRAINING for seed in (0, 1)
    )
    cells = [cell.read("config.json") for cell in map(runs.load, (config.runs_dir / "cells").iterdir())]
    assert {(c["c"], c["rank"], c["tests"]) for c in cells} == {(1.0, 4, 1), (1.0, 4, 8)}
    table = kinds["rank"].set_index("layer")
    assert set(table.uniform) == {4} and all(run.read(f"finetune-{by}.json") == table[by].to_dict() for by in ("weights", "gradients"))
    cell = contest.finetuning(config)
    tested = {row["seed"]: row for row in page.records(kinds["final"]) if row["label"] == "weights"}
    by_hand = replace(cell.compared(cell.trial(tested[1]["lr"]), 1), ranks=run.path / "finetune-weights.json")
    assert (tested[1]["loss"], tested[1]["accuracy"]) == tuple(summary.tested("", by_hand)[name] for name in ("loss", "accuracy"))
    assert any("finetune, ranks by" in line and "accuracy" in line for line in ranking.findings(kinds))


def test_the_moment_of_fine_tuning_is_without_dropout(smoke: ranks.Config, bert: Path, folder: Path) -> None:
    """Of a model that has it: whatever the random state, the gradients are the same."""
    one = contest.finetuning(replace(smoke, finetune_model=str(bert), finetune_task=str(folder)))
    model: Any = tuner.asked(one.base)[0].model
    assert model.config.hidden_dropout_prob > 0

    def found(seed: int) -> spectra.Moment:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return contest.finetuned_moment(one, 4, ranks.TUNING_SEED)

    first, second = found(0), found(1)
    assert first.gradients and all(s.max() > 0 for s in first.gradients.values())
    assert all(np.array_equal(s, second.gradients[name]) for name, s in first.gradients.items())


def test_other_data_in_the_same_place_are_another_run(
    smoke: ranks.Config, text: Path, jsonl: str, bert: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the text and of the task; what is not local, or not asked, changes nothing."""

    class Begun(Exception):
        """The run directory is there."""

    def begun(*asked: Any) -> None:
        config: ranks.Config = asked[-1]
        found.append((runs.identity(config), contest.pretraining(config).base.runs_dir, contest.finetuning(config).base.data_sha256))
        raise Begun

    def ask(config: ranks.Config) -> tuple[Any, ...]:
        with pytest.raises(Begun):
            ranks.main(config)
        return found[-1]

    found: list[tuple[Any, ...]] = []
    monkeypatch.setattr(runs, "start", begun)
    data, task = Path(shutil.copytree(text, tmp_path / "text")), Path(shutil.copytree(folder, tmp_path / "task"))
    config = replace(smoke, data=str(data), finetune_model=str(bert), finetune_task=str(task))
    before, alone = ask(config), ask(replace(config, tasks=("pretrain",)))
    assert before == ask(config) and before[0]["data_sha256"] != alone[0]["data_sha256"]
    with (task / "train.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"text": "w0 w2", "label": "great"}) + "\n")
    other = ask(config)
    assert other[0]["data_sha256"] != before[0]["data_sha256"] and other[1] == before[1] and other[2] != before[2]
    assert ask(replace(config, tasks=("pretrain",))) == (*alone[:2], other[2])
    shutil.rmtree(data)
    tokens.build(data, (jsonl,), 300)
    last = ask(config)
    assert last[0]["data_sha256"] not in (before[0]["data_sha256"], other[0]["data_sha256"]) and last[1] != other[1] and last[2] == other[2]
    assert "data_sha256" not in ask(replace(config, data="movie-reviews", finetune_task="rotten-tomatoes"))[0]


def test_a_biased_law_has_columns_of_length_1_too(smoke: ranks.Config) -> None:
    assert [contest.pretraining(replace(smoke, c="r/n", law=law)).base.c for law in ("gaussian", "top_svd")] == ["r/n", 1.0]
    assert contest.pretraining(replace(smoke, c=0.5, law="top_svd")).base.c == 0.5
    with pytest.raises(ValueError, match="c=r/n is for lowrank and compact"):
        replace(contest.finetuning(replace(smoke, c="r/n")).base, method="mezo")


def test_what_c_makes_of_a_rank_is_said_of_the_run() -> None:
    config = json.loads((publish.RESULTS / "ranks" / f"{ranking.COMMITTED}.json").read_text(encoding="utf-8"))["config"]
    for c, law, shorter in ((1.0, "gaussian", False), (0.5, "haar_stiefel", False), ("r/n", "haar_stiefel", True), (1.0, "top_svd", True)):
        told = ranking.asked({**config, "c": c, "law": law})
        assert f"{law}, c = {c if c == 'r/n' else f'{c:g}'}, " in told
        assert ("layers of smaller rank took shorter steps" in told, "as far at every rank" in told) == (shorter, not shorter)


def moved(rank: int, c: Constant) -> float:
    """‖ΔW‖ of a layer of m = 40 and n = 24 after one step of Adam at η = 0.01."""
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 40, bias=False, dtype=torch.float64))
    W = torch.randn(40, 24, generator=generator, dtype=torch.float64)
    model.load_state_dict({"0.weight": W})
    handle = convert(model, rank=rank, c=c)
    optimizer = torch.optim.Adam(handle.parameters(), lr=0.01, eps=0.0)
    model(torch.randn(50, 24, generator=generator, dtype=torch.float64)).exp().mean().backward()
    optimizer.step()
    handle.step(optimizer)
    return float((handle.finalize().get_parameter("0.weight").detach() - W).norm())


def test_a_rank_is_a_step_length_at_r_over_n_and_none_at_one_c() -> None:
    """‖ΔW‖ = η√(c·mn); at c = r/n η√(mr)."""
    for c in (1.0, 0.25):
        assert [moved(rank, c) for rank in (3, 12)] == pytest.approx([0.01 * math.sqrt(c * 40 * 24)] * 2, rel=1e-10)
    assert [moved(rank, "r/n") for rank in (3, 12)] == pytest.approx([0.01 * math.sqrt(40 * rank) for rank in (3, 12)], rel=1e-10)
    assert moved(3, "r/n") / moved(12, "r/n") == pytest.approx(math.sqrt(3 / 12), rel=1e-10)


def committed() -> dict[str, pd.DataFrame]:
    return publish.committed_kinds(f"ranks/{ranking.COMMITTED}", ranking.KINDS)


def test_learning_rates_that_differ_are_said_and_intervals_are_not_corrected() -> None:
    kinds = committed()
    final = kinds["final"].assign(lr=0.003)
    final.loc[(final.task == "pretrain") & (final.label == "uniform"), "lr"] = 0.00548
    told = ranking.findings({**kinds, "final": final})
    compared = [line for line in told if " minus uniform ones" in line]
    assert len(compared) == len(kinds["paired"]) == 6
    assert [", at learning rates 0.003 and 0.00548: loss " in line for line in compared] == ["pretrain" in line for line in compared]
    assert told[-1].startswith(f"the {6 + 2 * 6 + 2 * 2} intervals of differences are not corrected for their number")
    alone = ranking.findings({kind: frame for kind, frame in kinds.items() if kind not in ("trial", "final", "paired")})
    assert alone[-1].startswith("the 16 intervals") and not any("minus uniform ones" in line for line in alone)


def test_a_noise_floor_at_chance_is_no_number_in_the_findings() -> None:
    kinds = committed()
    angle = kinds["angle"].copy()
    angle.loc[(angle.layer == "all") & (angle.step == 0), ["relative", "relative_se"]] = math.nan
    told = ranking.findings({**kinds, "angle": angle})
    assert sum("noise floor: noise floor at chance at step 0, " in line for line in told) == 2 and "nan" not in " ".join(told)
    assert not any("at chance" in line for line in ranking.findings(kinds))


def test_what_exporting_did_is_said_with_bytes_and_students_intervals() -> None:
    def row(reduction: float, by: str, share: float, whole: float, uniform: float, error: float, size: int) -> dict[str, Any]:
        told = {"model": "a", "reduction": reduction, "by": by, "numbers_share": share, "sequences": 3, "bytes": size, "bytes_dense": 1000}
        return told | {
            "exported_minus_whole": whole,
            "exported_minus_whole_se": error,
            "loss_minus_uniform": uniform,
            "loss_minus_uniform_se": 1.0,
        }

    export = [
        row(0.3, "uniform", 1.11, 0.01, 0.0, 0.001, 950), row(0.3, "weights", 1.1, 0.02, 4.2, 0.001, 940),
        row(0.5, "uniform", 0.8, 0.5, 0.0, 0.1, 800), row(0.5, "weights", 0.8, 9.0, 4.4, 0.1, 800),
        row(0.9, "uniform", 0.2, 0.03, 0.0, 0.001, 300), row(0.9, "weights", 0.2, -0.04, -4.4, 0.001, 290),
    ]  # fmt: skip
    told = ranking.findings({**committed(), "export": pd.DataFrame(export)})
    (truncated,), (exported,) = ([line for line in told if line.startswith(word)] for word in ("truncated by", "exported at"))
    assert 4.2 < stats.t.ppf(0.975, 2) < 4.4  # and two standard errors are 2
    assert "a loss above that of uniform ranks at 1 of 3 reductions, below at 1, by Student's" in truncated
    assert exported.startswith("exported at reduction 0.3 to 0.9, loss of a minus that of the whole model, ")
    assert ": uniform +0.0100 ± 0.0043 (0.950×) to +0.0300 ± 0.0043 (0.300×); weights +0.0200 ± 0.0043 (0.940×) to -0.0400 " in exported
    assert exported.endswith("; at 0.3 (1.11×) the factors of all matrices hold more numbers than these, and truncating compresses nothing")
    (one,) = (line for line in ranking.findings({**committed(), "export": pd.DataFrame(export[2:4])}) if line.startswith("exported at"))
    assert one.startswith("exported at reduction 0.5, ") and one.endswith(
        "uniform +0.5000 ± 0.4303 (0.800×); weights +9.0000 ± 0.4303 (0.800×)"
    )


def test_a_choice_at_the_edge_is_said() -> None:
    kinds = committed()
    chosen = kinds["trial"].chosen
    for at in (True, False):
        told = ranking.findings({**kinds, "trial": kinds["trial"].assign(at_edge=chosen & at)})
        assert sum(line.count("(edge)") for line in told) == 2 * len(kinds["paired"]) * at  # both sides of each difference


def test_the_question_in_small(run: runs.Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kinds = ranking.frames(run.rows())
    assert set(kinds) == set(ranking.KINDS)
    assert list(dict.fromkeys(kinds["spectrum"].step)) == [0, 2, 4] and len(kinds["spectrum"]) == 3 * 2 * 28
    assert set(zip(kinds["angle"].step, kinds["angle"].other, strict=True)) == {(0, 0), (2, 2), (4, 4), (0, 2), (2, 4), (0, 4)}
    export = kinds["export"]
    assert export.groupby("model", sort=False).size().to_dict() == {"tiny": 2 * 3, "smollm2": 3}
    assert {folder.name for folder in (run.path / "factorised" / "smollm2").iterdir()} == {
        "dense",
        *(f"{by}-0.5" for by in allotment.EXPORT),
    }
    assert set(export.query("model == 'smollm2'").sequences) == {4}
    pretrained, export = export.query("model == 'smollm2'"), export.query("model == 'tiny'")
    assert (pretrained.perplexity - export.perplexity.iloc[0]).abs().min() > 1
    whole = export[export.components == export.layers]
    assert len(whole) and whole.perplexity_exported.to_numpy() == pytest.approx(whole.perplexity_truncated.to_numpy(), rel=1e-5)
    assert (export.bytes < export.bytes_dense).all() and export.perplexity_zero.nunique() == 1
    added = np.log(export.perplexity_truncated / export.perplexity).to_numpy()
    assert export.loss_minus_whole.to_numpy() == pytest.approx(added, rel=1e-6, abs=1e-9)
    uniform = export[export.by == "uniform"].set_index("reduction").loss_minus_whole
    beside = export.loss_minus_whole - export.reduction.map(uniform)
    assert export.loss_minus_uniform.to_numpy() == pytest.approx(beside.to_numpy(), rel=1e-6, abs=1e-9)
    assert kinds["trial"].groupby("label").lr.nunique().to_dict() == dict.fromkeys(allotment.TRAINING, 3)
    assert (kinds["final"].seconds > 0).all()
    assert set(kinds["final"].label) == set(allotment.TRAINING) and set(kinds["paired"].label) == {"weights", "gradients"}
    (place,) = (run.path.parent / "cells").iterdir()  # of this text
    cells = [cell.read("config.json") for cell in map(runs.load, place.iterdir())]
    assert {(c["steps"], c["seed"]) for c in cells} == {(2, 1000), (3, 0), (3, 1)}
    for by in ("weights", "gradients"):
        asked = run.read(f"pretrain-{by}.json")
        table = kinds["rank"].set_index("layer")[by].to_dict()
        assert asked == table and convert(models.build("tiny", 0), rank=asked).layers.keys() == asked.keys()
    rows = run.rows()
    again = ranks.main(ranks.Config(**{name: _value(run.config[name], name) for name in ranks.Config.__dataclass_fields__}))
    assert again.path == run.path and again.rows() == rows
    written = publish.main(publish.Config(run=(run.path,), out=tmp_path / "results"))
    assert {path.stem for path in written} == {"tiny", *(f"tiny-{kind}" for kind in ranking.KINDS)}
    told = ranking.markdown("tiny", tmp_path / "results")
    assert told.count("| uniform |") == 1 + 3 and "noise floor" in told and "c = 1, K = 20" in told and "as far at every rank" in told
    page = report.main(report.Config(run=(run.path,), out=tmp_path / "report.html")).read_text(encoding="utf-8")
    assert "A rank for every layer: tiny" in page and "<svg" in page
    assert cli.main(["report", str(run.path), "--out", str(tmp_path / "again.html")]) == 0
    capsys.readouterr()


def _value(value: Any, name: str) -> Any:
    return Path(value) if name == "runs_dir" else tuple(value) if isinstance(value, list) else value


def test_text_that_is_too_short_is_refused(text: Path, tmp_path: Path) -> None:
    config = replace(ranks.PRESETS["smoke"], data=str(text), batches=40, tasks=(), runs_dir=tmp_path, quiet=True)
    with pytest.raises(runs.WrongInput, match="has 19 held-out sequences beside the 4 of eval_tokens=64; batches=40"):
        ranks.main(config)
