"""Which parameters of a model are projected and which are trained by AdamW: matrices inside the blocks, and everything else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from estimators.selection import HEADS

Targets = Callable[[str, nn.Parameter], bool]


def split_parameters(
    model: nn.Module, rank: int | float = 128, *, targets: Targets | None = None, others: dict[str, Any] | None = None
) -> list[dict[str, Any]]:
    """Two groups with names: the matrices that are projected, with ``rank``, and the rest with ``rank=None``, which is AdamW.

    Without ``targets`` every 2-D parameter is projected that is no embedding, not tied to one, and not the output head (by the model's own
    account, or by the names transformers gives heads); a head that trains at the rate of hidden layers is a known way to lose quality.
    ``targets(name, parameter)`` chooses otherwise, among the 2-D ones. ``others``: options of the second group, such as its own ``lr``.
    A matrix whose smaller side is not above the rank is projected all the same, with as many directions as it has.
    Raises ``ValueError`` when nothing is left to project.
    """
    left = {id(p) for module in model.modules() if isinstance(module, nn.Embedding | nn.EmbeddingBag) for p in module.parameters()}
    outputs = getattr(model, "get_output_embeddings", None)
    head = outputs() if callable(outputs) else None
    left |= {id(p) for p in head.parameters()} if isinstance(head, nn.Module) else set()

    def projected(name: str, p: nn.Parameter) -> bool:
        if p.ndim != 2:
            return False
        return targets(name, p) if targets is not None else id(p) not in left and not set(name.split(".")) & set(HEADS)

    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    matrices = [(name, p) for name, p in named if projected(name, p)]
    rest = [(name, p) for name, p in named if not projected(name, p)]
    if not matrices:
        raise ValueError(f"split_parameters({type(model).__name__}, rank={rank}): no matrix to project")
    groups: list[dict[str, Any]] = [{"params": matrices, "rank": rank}]
    return groups + ([{"params": rest, "rank": None, **(others or {})}] if rest else [])
