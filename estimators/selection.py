"""Which modules of a model can be projected, which are left alone and why, and the exchange of a module in its parent."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import cast

from torch import nn

Targets = str | Iterable[str] | Callable[[str, nn.Module], bool] | None
Ranks = int | float | Mapping[str, int]  # r of every layer, a fraction of its in-features, or r by layer name
FUSED = (nn.MultiheadAttention, nn.TransformerEncoderLayer)
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
HEADS = (
    "lm_head",
    "embed_out",
    "classifier",
    "pre_classifier",
    "classification_head",
    "logits_proj",
    "cls",
    "score",
    "qa_outputs",
)  # output layers by the names transformers gives them


def rank_of(n: int, rank: int | float) -> int:
    """r of a matrix with n columns: ``rank`` itself, or that fraction of n, at least 1."""
    return rank if isinstance(rank, int) else max(1, round(rank * n))


def of_layer(name: str, n: int, rank: Ranks) -> int:
    """r of the layer ``name`` with n in-features; of a mapping 0 where it has no entry."""
    return rank.get(name, 0) if isinstance(rank, Mapping) else rank_of(n, rank)


def choose(model: nn.Module, targets: Targets, rank: Ranks | None) -> tuple[dict[str, nn.Linear], dict[str, str]]:
    """(the layers to convert by name, the reason by name of every parameter or module that is left alone). ``rank``: None if any size will do."""
    if isinstance(rank, Mapping):
        _check_names(model, rank)
    else:
        possible = rank is None or (isinstance(rank, int) and rank >= 1) or (isinstance(rank, float) and 0 < rank < 1)
        if isinstance(rank, bool) or not possible:
            raise ValueError(f"convert(rank={rank!r}): rank must be a positive integer, or a fraction of in_features in (0, 1)")
    wanted = _predicate(model, targets)
    uses = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    places = Counter(id(module) for _, module in model.named_modules(remove_duplicate=False))
    # in evaluation these pass the weights of their layers to one fused kernel
    fused = {id(child): type(module).__name__ for module in model.modules() if isinstance(module, FUSED) for child in module.children()}
    chosen: dict[str, nn.Linear] = {}
    reasons: dict[str, str] = {}
    for name, module in model.named_modules():
        for local, parameter in module.named_parameters(recurse=False):
            full = f"{name}.{local}" if name else local
            if local == "bias" and isinstance(module, nn.Linear):
                continue
            if not isinstance(module, nn.Linear):
                reasons[full] = "1-D" if parameter.ndim < 2 else f"{type(module).__name__} is not nn.Linear"
            elif id(module) in fused:
                reasons[full] = f"{fused[id(module)]} may use its weight without calling forward"
            elif (reason := _reason(name, module, wanted, uses, places, rank)) is not None:
                reasons[full] = reason
            else:
                chosen[name] = module
    return chosen, reasons


def _reason(
    name: str,
    module: nn.Linear,
    wanted: Callable[[str, nn.Module], bool],
    uses: Counter[int],
    places: Counter[int],
    rank: Ranks | None,
) -> str | None:
    """Why this linear layer cannot be converted, None if it can."""
    if type(module) is not nn.Linear:
        return f"{type(module).__name__} may use its weight without calling forward"
    if not name:
        return "the model itself is the layer; wrap it in nn.Sequential"
    if places[id(module)] > 1:
        return "shared module"
    if uses[id(module.weight)] > 1:
        return "tied weight"
    if "forward" in vars(module) or any(getattr(module, hooks) for hooks in HOOKS) or module.weight._backward_hooks:
        return "has hooks"
    if not module.weight.requires_grad:
        return "frozen"
    if not module.weight.is_floating_point():
        return "quantised weight"
    if not wanted(name, module):
        return "not targeted"
    if rank is None:
        return None
    if (r := of_layer(name, module.in_features, rank)) == 0:
        return "no rank is given for it"
    return f"min(m, n) = {min(module.weight.shape)} is not above the rank {r}" if min(module.weight.shape) <= r else None


def _check_names(model: nn.Module, ranks: Mapping[str, int]) -> None:
    """Raise ``ValueError`` for a name that is no linear layer, a rank that is none, or no ranks at all."""
    if not ranks:
        raise ValueError("convert(rank={}): no layer has a rank")
    modules = dict(model.named_modules())
    for name, r in ranks.items():
        if not isinstance(modules.get(name), nn.Linear):
            raise ValueError(f"convert(rank=…): {name!r} is no nn.Linear of {type(model).__name__}")
        if isinstance(r, bool) or not isinstance(r, int) or r < 1:
            raise ValueError(f"convert(rank=…): the rank of {name!r} must be a positive integer, got {r!r}")


def _predicate(model: nn.Module, targets: Targets) -> Callable[[str, nn.Module], bool]:
    if targets is None:
        outputs = getattr(model, "get_output_embeddings", None)
        head = outputs() if callable(outputs) else None
        return lambda name, module: module is not head and not set(name.split(".")) & set(HEADS)
    if isinstance(targets, str):
        pattern = re.compile(targets)
        return lambda name, _: pattern.search(name) is not None
    if callable(targets):
        return cast(Callable[[str, nn.Module], bool], targets)
    names = tuple(targets)
    return lambda name, _: any(name == t or name.endswith(f".{t}") for t in names)


def replace(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put ``module`` where ``name`` points; training mode is taken over."""
    parent, _, local = name.rpartition(".")
    owner = model.get_submodule(parent)
    module.train(owner.training)
    setattr(owner, local, module)
