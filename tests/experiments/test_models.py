"""The presets: their sizes, what a low-rank update touches of them, and how they are built."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from estimators import convert
from experiments import models, pretrain
from experiments.methods import METHODS

SIZES = {
    "tiny": 1_459_328,
    "9m": 8_995_968,
    "20m": 19_548_416,
    "60m": 58_073_600,
    "100m": 100_117_120,
    "130m": 134_105_856,
    "350m": 367_969_280,
    "1b": 1_339_082_752,
    "7b": 6_738_415_616,
}


def parts(preset: str) -> tuple[int, int, int]:
    """(embeddings and head, linear layers of the blocks, norms) by the formulas of the architecture."""
    p = models.PRESETS[preset]
    h, i, layers = p["hidden_size"], p["intermediate_size"], p["num_hidden_layers"]
    return 2 * p["vocab_size"] * h, layers * (4 * h * h + 3 * h * i), (2 * layers + 1) * h


@pytest.mark.parametrize("preset", SIZES)
def test_sizes(preset: str) -> None:
    assert sum(parts(preset)) == SIZES[preset] == models.parameters(preset)
    assert preset in models.PRESETS and set(SIZES) == set(models.PRESETS) == set(pretrain.PRESETS)
    assert pretrain.PRESETS[preset].model == preset


@pytest.mark.parametrize("preset", ["tiny", "9m", "20m"])
def test_the_touched_share(preset: str) -> None:
    """Embeddings and head are most of a small model: 84 % of 20m, which leaves 16 % to low-rank updates."""
    handle = convert(models.build(preset, 0), rank=4)
    embeddings, linear, norms = parts(preset)
    total = embeddings + linear + norms
    assert handle.touched_share == pytest.approx(linear / total, abs=1e-12)
    expected = {"tiny": (0.45, 0.55), "9m": (0.91, 0.09), "20m": (0.84, 0.16)}[preset]
    assert (embeddings / total, linear / total) == pytest.approx(expected, abs=0.005)
    assert sum(layer.weight.numel() for layer in handle.layers.values()) == linear
    assert len(handle.layers) == 7 * models.PRESETS[preset]["num_hidden_layers"]


@pytest.mark.parametrize("method", METHODS)
def test_facts_count_what_is_trained(method: str, tmp_path: Path) -> None:
    config = pretrain.Config(method=method, rank=0.25, runs_dir=tmp_path)
    facts = METHODS[method](models.build("tiny", 0), config).facts()
    embeddings, linear, norms = parts("tiny")
    # of each m×n layer: B is m×32, or m×88 where n = 352; A is as large as V, which is not trained
    B = 4 * (4 * 128 * 32 + 2 * 352 * 32 + 128 * 88)
    A = 4 * (4 * 128 * 32 + 2 * 128 * 32 + 352 * 88)
    trained = {"lowrank": B, "adamw": linear, "lora": A + B, "relora": A + B}[method]
    touched = 0.0 if method == "adamw" else linear / (embeddings + linear + norms)
    assert facts["matrix_parameters"] == trained and facts["trained_parameters"] == trained + embeddings + norms
    assert facts["touched_share"] == pytest.approx(touched, abs=1e-12)


def test_initial_weights_depend_on_the_seed_only() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    one, two, other = (models.build("tiny", seed).state_dict() for seed in (5, 5, 6))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not torch.equal(one["lm_head.weight"], other["lm_head.weight"])
    assert one["lm_head.weight"].data_ptr() != one["model.embed_tokens.weight"].data_ptr()  # not tied
