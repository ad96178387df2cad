"""A gradient in tokens, and what estimators keep of it: Backward Lens on G = Σ_i δ_i x_iᵀ, the sum over the tokens of a prompt.

The loss is the mean next-token cross-entropy of the prompt. Of every layer the side in the residual stream is projected on the vocabulary, through
final norm and unembedding as in the logit lens: the inputs of q, k, v, gate and up, the outputs of o and down; nothing else has a place there.

``direction``: the top tokens of the prompt's heaviest x_i, or −δ_i (what a step of descent moves the output to), and of the leading singular
directions of G. ``layer``: rank of G, and how far Σ_i δ_i x_iᵀ is from autograd's gradient. ``kept``: what every estimator of rank r keeps of the
top tokens and of their scores, beside the exact value where there is one (experiments/lensing/keeping.py). ``estimator``: means over the layers.

    lowrank lens
    lowrank lens tiny
    lowrank lens --prompt "Water boils at a hundred degrees." --layers 0 29.mlp.down_proj --rank 4
    lowrank lens --model FOLDER --law haar_stiefel tokens:coordinate wta_crs
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerFast

from estimators import keyed
from estimators.law import Spectrum, eigenbasis
from estimators.selection import rank_of
from experiments import allowed, runs
from experiments.finetuning import pretrained
from experiments.lensing.estimates import KNOWN, estimator
from experiments.lensing.factors import Factors, contributions, factors, side_of
from experiments.lensing.keeping import MEASURED, STATISTICS, exactly, keeps
from experiments.lensing.vocabulary import Lens
from experiments.text import tokens
from experiments.training import models
from experiments.validation.gradients import linear_layers
from experiments.validation.verdict import Verdict
from theory.grams import Side

BLOCKS = 6  # that are looked at where no layers are named, first and last among them
SHORTEST = 3  # tokens: the query of the first sees one key, and the last has nothing to predict, so of two no query or key has an error


@dataclass(frozen=True, kw_only=True)
class Config:
    """Gradients in tokens: of the tokens of a prompt, of singular directions, and of estimates."""

    model: str = "smollm2"
    """smollm2 (SmolLM2-135M-Instruct), tiny (trained here), a folder or a hub name of transformers, of the LLaMA family."""
    prompt: str = "The film was shot in Paris, but the story begins in Rome and its hero dreams of Tokyo."
    """Text whose next-token loss has the gradient."""
    layers: tuple[str, ...] = ()
    """Linear layers: numbers of blocks, or ends of names such as down_proj or 29.mlp.down_proj; six blocks, evenly, if none."""
    law: tuple[str, ...] = ("haar_stiefel", "gaussian", "coordinate", "spectral", "top_svd", "tokens:coordinate", "wta_crs")
    """Estimators: names from LAWS on the features, tokens:LAW on the tokens, wta_crs."""
    rank: int | float = 8
    """r of every estimate, or a fraction of the features n; on the tokens at most as many as there are."""
    top: int = 10
    """Tokens that count as the top ones."""
    directions: int = 3
    """Leading singular directions, and heaviest tokens of the prompt."""
    draws: int = 128
    """Draws of every estimator and layer."""
    resolution: float = 1.0
    """Relative defect in a mean over the layers that must be visible."""
    steps: int = 300
    """Tiny: training steps before the gradient is taken."""
    lr: float = 3e-3
    """Tiny: peak learning rate of AdamW."""
    seed: int = 0
    """Seed of everything random."""
    runs_dir: Path = Path("runs")
    """Where run directories go."""
    quiet: bool = False
    """No progress bars."""

    def __post_init__(self) -> None:
        for name in self.law:
            if name not in KNOWN:
                raise ValueError(f"unknown law {name!r}, known are {', '.join(KNOWN)}")
        if not self.law:
            raise ValueError("law needs at least one value")
        if not self.prompt.strip():
            raise ValueError("the prompt is empty")
        if not (self.rank >= 1 if isinstance(self.rank, int) else 0 < self.rank <= 1):
            raise ValueError(f"rank must be a positive integer, or a fraction of n in (0, 1], got {self.rank}")
        allowed.at_least(self, 1, "top", "directions")
        allowed.at_least(self, 2, "draws")
        allowed.at_least(self, 0, "steps")
        for name in ("resolution", "lr"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be positive and finite, got {getattr(self, name)}")


PRESETS = {
    "smollm2": Config(),
    "tiny": Config(model="tiny"),
    "smoke": Config(model="tiny", steps=2, layers=("0.self_attn.q_proj", "0.mlp.down_proj"), draws=16, resolution=100.0),
}


def main(config: Config) -> runs.Run:
    """Fill and return the run directory."""
    run = runs.start("lens", Path(config.model).name, config)
    if run.done:
        return run
    try:
        model, tokenizer = _loaded(config, run)
        lens = Lens.of(model, tokenizer)
        names = chosen(model, config.layers)
        ids = _encoded(config, model, tokenizer)
        for name in names:
            _check_rank(config, name, model.get_submodule(name))
    except runs.WrongInput:
        runs.discard_empty(run)
        raise
    finished = {row["layer"] for row in run.rows() if row["kind"] == "layer"}
    run.keep([row for row in run.rows() if row.get("layer") in finished])  # what an interrupted layer or summary left behind goes
    left = [name for name in names if name not in finished]
    found = factors(model, ids, left) if left else {}
    with runs.progress(len(names), "layers", config.quiet, done=len(finished)) as bar:
        for name, parts in found.items():
            bar.set_postfix_str(name)
            run.log(*_layer(config, name, parts, lens, ids))
            bar.update()
    run.log(*_means(config, run.rows()))
    run.finish()
    return run


def _loaded(config: Config, run: runs.Run) -> tuple[Any, Any]:
    """(model in float64, tokenizer of transformers)."""
    if config.model == "tiny":
        model, text = models.tiny(run, seed=config.seed, steps=config.steps, lr=config.lr, quiet=config.quiet)
        tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(text.folder / "tokenizer.json"), eos_token=tokens.END)
    else:
        model, tokenizer = pretrained.load(config.model, "response", 0, config.seed)
    return model.double().eval(), tokenizer


def chosen(model: nn.Module, wanted: tuple[str, ...]) -> list[str]:
    """Names of the layers, in the order of the model. Raises ``WrongInput`` for a word that is the end of no name and the number of no block."""
    known = [name for name in linear_layers(model) if side_of(name) and ".layers." in name]
    blocks = sorted({_block(name) for name in known})
    if not known:
        raise runs.WrongInput(f"{type(model).__name__} has no layers q_proj, …, down_proj in blocks; the lens knows the LLaMA family")
    if not wanted:
        last = len(blocks) - 1
        some = {blocks[round(i * last / (BLOCKS - 1))] for i in range(BLOCKS)}
        return [name for name in known if _block(name) in some]
    found: set[str] = set()
    for word in wanted:
        matching = {name for name in known if name == word or name.endswith(f".{word}") or str(_block(name)) == word}
        if not matching:
            raise runs.WrongInput(
                f"no layer {word!r}: blocks are {blocks[0]} to {blocks[-1]}, names end as {blocks[-1]}.mlp.down_proj does"
            )
        found |= matching
    return [name for name in known if name in found]


def _block(name: str) -> int:
    return int(name.split(".layers.")[1].split(".")[0])


def _encoded(config: Config, model: Any, tokenizer: Any) -> torch.Tensor:
    """Token ids (1, T)."""
    ids = tokenizer(config.prompt)["input_ids"]
    most = model.config.max_position_embeddings
    if not SHORTEST <= len(ids) <= most:
        raise runs.WrongInput(f"the prompt has {len(ids)} tokens; it must have between {SHORTEST} and the {most} of the model")
    if config.top > model.config.vocab_size:
        raise runs.WrongInput(f"top={config.top} is more than the {model.config.vocab_size} tokens of the vocabulary")
    return torch.tensor([ids])


def _check_rank(config: Config, name: str, layer: Any) -> None:
    if rank_of(layer.in_features, config.rank) > layer.in_features:
        raise runs.WrongInput(f"rank={config.rank} is more than the {layer.in_features} features of {name}")


def _layer(config: Config, name: str, parts: Factors, lens: Lens, ids: torch.Tensor) -> list[dict[str, Any]]:
    """The rows of one layer, its own last."""
    side: Side | None = side_of(name)
    assert side is not None
    X, D, G = parts
    size = float(G.abs().max())
    if not size > 0:
        raise runs.WrongInput(f"{name} has no gradient for this prompt; name other layers, or a prompt of different tokens")
    exact = exactly(parts, side, lens, config.directions, config.top)
    rows = contributions(X, D, side)
    weights = rows.norm(dim=1)
    singular = torch.linalg.svdvals(G)
    shares = singular.square() / singular.square().sum()
    told: list[dict[str, Any]] = []
    heaviest = weights.argsort(descending=True)[: config.directions]
    for number, (i, best) in enumerate(zip(heaviest.tolist(), lens.top(rows[heaviest].mT, config.top), strict=True), 1):
        what = {"what": "x" if side == "input" else "−δ", "number": number, "word": lens.word(int(ids.flatten()[i]))}
        told.append(what | {"share": float(weights[i] / weights.sum()), "tokens": lens.words(best)})
    for number, best in enumerate(exact.tokens, 1):
        told.append({"what": "direction", "number": number, "word": "", "share": float(shares[number - 1]), "tokens": lens.words(best)})
    told = [{"kind": "direction", "layer": name, "side": side} | row for row in told]
    spectrum: Spectrum = eigenbasis(name, G.mT @ G)
    for label in config.law:
        made = estimator(label, parts, spectrum, rank_of(G.shape[1], config.rank), side)
        generator = keyed.generator(config.seed, f"{name} {label}", 0)
        told.append({"kind": "kept", "layer": name, "side": side} | keeps(made, exact, lens, config.draws, generator))
    return [
        *told,
        {
            "kind": "layer",
            "layer": name,
            "block": _block(name),
            "side": side,
            "m": len(G),
            "n": G.shape[1],
            "tokens": len(X),
            "rank": int(torch.linalg.matrix_rank(G)),
            "stable_rank": float(1 / shares[0]),
            "signal": float(G.square().sum()),
            "defect": float((D.mT @ X - G).abs().max()) / size,
            "top_share": exact.kept / exact.energy,
        },
    ]


def _means(config: Config, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of every estimator over the layers, and whether what has an exact value agrees with it."""
    found = []
    for label in config.law:
        mine = [row for row in rows if row["kind"] == "kept" and row["law"] == label]
        count, draws = len(mine), mine[0]["draws"]
        row: dict[str, Any] = {"kind": "estimator", "law": label, "layers": count, "rank": mine[0]["rank"], "draws": draws}
        verdicts = []
        for name in (*MEASURED, *STATISTICS, "cosine"):
            row[name] = math.fsum(r[name] for r in mine) / count
            row[f"{name}_error"] = math.sqrt(math.fsum(r[f"{name}_error"] ** 2 for r in mine)) / count
            if name not in MEASURED:
                row[f"{name}_exact"] = math.fsum(r[f"{name}_exact"] for r in mine) / count
            if name in STATISTICS:
                verdicts.append(
                    Verdict(
                        name=name,
                        estimate=row[name],
                        standard_error=row[f"{name}_error"],
                        theory=row[f"{name}_exact"],
                        scale=abs(row[f"{name}_exact"]),
                        required=config.resolution,
                        draws=draws,
                    )
                )
        worst = max(verdicts, key=lambda v: abs(v.z))
        row |= {"z": worst.z, "resolution": max(v.resolution for v in verdicts), "holds": all(v.holds for v in verdicts)}
        found.append(row)
    return found
