"""Models whose matrices are products of two: truncated in place, factorised for export, saved, and loaded again.

``factorise`` puts W_r = AB, A = U√s (m×r) and B = √s Vᵀ (r×n), in the place of a linear layer, as two, where the factors hold fewer numbers than W:
the low-rank components of arXiv 2407.11239; other layers stay as they are. The saved folder is one of transformers with ``factors.json``, r by layer
name; ``load`` builds the model of its config.json, puts empty factors where that file says, and reads the weights.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from estimators import selection
from experiments.runs import WrongInput, write_json
from experiments.training import models
from theory.truncation import factors_are_smaller

FACTORS = "factors.json"


Factors = Mapping[str, tuple[Tensor, Tensor]]


@torch.no_grad()
def factors(W: Tensor) -> tuple[Tensor, Tensor]:
    """(A, B) of W = AB, (m, k) and (k, n) with k = min(m, n), float64: the first r columns and rows are those of W_r, and sᵢ is the square of the
    length of the i-th column."""
    U, s, Vt = torch.linalg.svd(W.double(), full_matrices=False)
    return U * s.sqrt(), s.sqrt()[:, None] * Vt


def of_layers(model: nn.Module, names: Iterable[str]) -> dict[str, tuple[Tensor, Tensor]]:
    """``factors`` of every named layer: one decomposition for all ranks."""
    return {name: factors(cast(nn.Linear, model.get_submodule(name)).weight) for name in names}


@torch.no_grad()
def truncate(model: nn.Module, ranks: Mapping[str, int], known: Factors | None = None) -> None:
    """W ← W_r of every named layer, in place; of rank 0 nothing is left. ``known``: their factors, where these were computed before."""
    known = known or of_layers(model, ranks)
    for name, rank in ranks.items():
        A, B = known[name]
        cast(nn.Linear, model.get_submodule(name)).weight.copy_(A[:, :rank] @ B[:rank])


def components(model: nn.Module, ranks: Mapping[str, int]) -> dict[str, int]:
    """Those of ``ranks`` whose factors hold fewer numbers than their matrix."""
    found = {}
    for name, rank in ranks.items():
        m, n = cast(nn.Linear, model.get_submodule(name)).weight.shape
        if factors_are_smaller(m, n, rank):
            found[name] = rank
    return found


@torch.no_grad()
def factorise(model: nn.Module, ranks: Mapping[str, int], known: Factors | None = None) -> dict[str, int]:
    """Replace the low-rank components among ``ranks`` by their factors, in place; returns them, layer → r. ``known``: as for ``truncate``."""
    found = components(model, ranks)
    known = known or of_layers(model, found)
    for name, rank in found.items():
        layer = cast(nn.Linear, model.get_submodule(name))
        A, B = known[name]
        product = _empty(layer, rank)
        for factor, value in ((product[0], B[:rank]), (product[1], A[:, :rank])):
            cast(nn.Linear, factor).weight = nn.Parameter(value.to(layer.weight.dtype, copy=True).contiguous())
        if layer.bias is not None:
            cast(nn.Linear, product[1]).bias = layer.bias
        selection.replace(model, name, product)
    return found


def _empty(layer: nn.Linear, rank: int) -> nn.Sequential:
    """Two layers in the place of one."""
    place = {"device": layer.weight.device, "dtype": layer.weight.dtype}
    first = nn.Linear(layer.in_features, rank, bias=False, **place)
    return nn.Sequential(first, nn.Linear(rank, layer.out_features, bias=layer.bias is not None, **place))


def save(model: Any, found: Mapping[str, int], folder: Path) -> int:
    """Write a factorised model of transformers; the bytes of its tensor files."""
    with models.quietly():
        model.save_pretrained(folder)
    write_json(folder / FACTORS, dict(found))
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def load(folder: Path) -> nn.Module:
    """The model that ``save`` wrote, a language model of transformers. Raises ``WrongInput`` for a folder without factors, or of which weights are
    missing."""
    if not (folder / FACTORS).exists():
        raise WrongInput(f"{folder} is no factorised model: it has no {FACTORS}")
    model: Any = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    for name, rank in json.loads((folder / FACTORS).read_text(encoding="utf-8")).items():
        selection.replace(model, name, _empty(model.get_submodule(name), rank))
    tensors: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= {name: value.clone() for name, value in load_file(file).items()}  # aligned, and no longer one mapping of the file
    missing, unexpected = model.load_state_dict(tensors, strict=False, assign=True)
    model.tie_weights()
    uses = {name: id(p) for name, p in model.named_parameters(remove_duplicate=False)}
    read = {uses[name] for name in tensors if name in uses}
    lost = [name for name in missing if uses.get(name) not in read]
    if unexpected or lost:
        raise WrongInput(f"{folder}: its tensors do not fit its configuration and {FACTORS}: {', '.join([*unexpected, *lost][:3])}")
    return model
