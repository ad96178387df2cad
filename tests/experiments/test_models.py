"""The presets: their sizes and what a low-rank update touches of them; and the configurations and data that are refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from estimators import convert
from experiments import cli, pretrain, runs
from experiments.training import models
from experiments.training.methods import METHODS

SIZES = {
    "83k": 83_232,
    "267k": 266_816,
    "935k": 935_040,
    "tiny": 1_459_328,
    "9m": 8_995_968,
    "20m": 19_548_416,
    "60m": 58_073_600,
    "100m": 100_117_120,
    "130m": 134_105_856,
    "350m": 367_969_280,
    "1b": 1_339_082_752,
    "7b": 6_738_415_616,
    "70b": 68_976_648_192,
}


def parts(preset: str) -> tuple[int, int, int]:
    """(embeddings and head, linear layers of the blocks, norms) by the formulas of the architecture."""
    p = models.PRESETS[preset]
    h, i, layers = p["hidden_size"], p["intermediate_size"], p["num_hidden_layers"]
    return (
        2 * p["vocab_size"] * h,
        layers * ((2 + 2 * p["num_key_value_heads"] / p["num_attention_heads"]) * h * h + 3 * h * i),
        (2 * layers + 1) * h,
    )


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
    trained = {"lowrank": B, "compact": B, "lora": A + B, "relora": A + B}.get(method, linear)  # all others train the weights themselves
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


# what is refused

WRONG = {
    "--model x": "unknown model 'x'",
    "--method x": "unknown method 'x', known are lowrank, adamw, lora, relora",
    "--law x": "unknown law 'x'",
    "--optimizer x": "unknown --optimizer 'x', known are ",
    "--precision fp8": "unknown --precision 'fp8', known are ",
    "--sequences 3 --accumulate 2": "sequences=3 must be a multiple of accumulate=2",
    "--length 1": "length must be between 2 and the model's 512, got 1",
    "--length 513": "got 513",
    "--rank 352": "rank=352 must be below the width 352 of tiny",
    "--state x": "unknown --state 'x', known are ",
    **{f"--rank {value}": "rank must be a positive integer or a fraction in (0, 1)" for value in ("0", "-1", "1.0", "-0.5")},
    **{
        f"--{name} {value}": "must be positive and finite"
        for name, value in (("lr", "0"), ("c", "nan"), ("lora-scale", "-1"), ("keep", "inf"))
    },
    **{
        f"--{name} 0": "must be at least 1, got 0"
        for name in ("steps", "sequences", "accumulate", "refresh-every", "lift-every", "basis-every", "keep-checkpoints")
    },
    **{
        f"--{name} -1": "must be at least 0, got -1"
        for name in ("weight-decay", "clip", "eval-every", "measure-every", "checkpoint-every", "max-skipped")
    },
    **{
        f"--{name} {value}": f"must be in [0, 1], got {value}"
        for name, value in (("warmup", "1.5"), ("final-lr", "-0.1"), ("online", "2.0"))
    },
    "--rank 200": "no layer of LlamaForCausalLM can be converted",  # from here on after the data was opened
    "--method lora --rank 200": "no layer of LlamaForCausalLM can be adapted",
    "--online 0.5": "is for laws fitted to the gradient",
    "--eval-tokens 15": "eval_tokens must be at least length=16, got 15",
    "--length 500": "the stream holds only",
    "--data /nowhere": "/nowhere is not a token folder",
    "--tokenizer /nowhere": "there is no tokenizer /nowhere",
}


@pytest.mark.parametrize("flags", WRONG)
def test_wrong_values_are_one_line_and_exit_code_2(flags: str, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = "" if "--data" in flags else f"--data {text}"
    assert cli.main(f"pretrain tiny {data} --runs-dir {tmp_path} --length 16 --quiet {flags}".split()) == 2
    told = capsys.readouterr().err
    assert WRONG[flags] in told and len(told.splitlines()) == 1 and told.startswith("lowrank: pretrain: ")


@pytest.fixture
def copied(text: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "copied"
    folder.mkdir()
    for file in text.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def test_damaged_or_ill_fitting_tokens_are_one_line(copied: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(message: str) -> None:
        assert cli.main(f"pretrain tiny --data {copied} --runs-dir {tmp_path} --quiet".split()) == 2
        told = capsys.readouterr().err
        assert message in told and len(told.splitlines()) == 1

    data = bytearray((copied / "training.bin").read_bytes())
    data[100] ^= 1
    (copied / "training.bin").write_bytes(data)
    refused("is damaged (its sha256 is not the one in the manifest)")
    (copied / "training.bin").unlink()
    refused("training.bin is damaged (it is missing)")
    facts = json.loads((copied / "manifest.json").read_text())
    data[100] ^= 1
    (copied / "training.bin").write_bytes(data)
    (copied / "manifest.json").write_text(json.dumps(facts | {"vocabulary": 2561}))
    refused("the tokens have 2561 entries and tiny has 2560; build them with --vocabulary 2560")


def test_attention_is_torchs_own() -> None:
    assert models.build("tiny", 0).config._attn_implementation == "sdpa"


def test_a_refused_run_leaves_no_directory(tmp_path: Path) -> None:
    with pytest.raises(runs.WrongInput):
        pretrain.main(pretrain.Config(data=str(tmp_path / "missing"), runs_dir=tmp_path / "runs", quiet=True))
    assert not list((tmp_path / "runs").iterdir())
