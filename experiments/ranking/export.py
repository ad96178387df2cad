"""A model with truncated and with factorised matrices: perplexity before and after, and bytes.

Truncated: every matrix has its rank, at one budget of Σ r(m+n) numbers. Exported: as it is written and loaded again, low-rank components factorised
and the others as they were. Beside them the whole model, and one whose matrices are zero. Differences of losses are paired by held-out sequence.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from estimators import selection
from experiments import runs
from experiments.ranking import allotment, factors


def rows(
    name: str, model: nn.Module, held_out: Sequence[Tensor], reductions: Sequence[float], folder: Path, quiet: bool
) -> list[dict[str, Any]]:
    """``export``: one a reduction and choice of ranks; the models stay in ``folder``, the whole one in ``dense``. ``held_out``: batches of token ids.

    The matrices are the linear layers of the blocks, decomposed once for all ranks.
    """
    known = factors.of_layers(model, selection.choose(model, None, 1)[0])
    singular = {layer: A.square().sum(0).cpu().numpy() for layer, (A, _) in known.items()}
    shapes = {layer: (len(A), B.shape[1]) for layer, (A, B) in known.items()}
    before = losses(model, held_out)
    nothing = copy.deepcopy(model)
    factors.truncate(nothing, dict.fromkeys(known, 0), known)
    same = {"perplexity": perplexity(before), "perplexity_zero": perplexity(losses(nothing, held_out))}
    same |= {"sequences": len(before), "bytes_dense": factors.save(model, {}, folder / "dense")}
    numbers, energy = sum(m * n for m, n in shapes.values()), sum(float((s**2).sum()) for s in singular.values())
    found = []
    with runs.progress(len(reductions) * len(allotment.EXPORT), f"export of {name}", quiet) as bar:
        for reduction in reductions:
            uniform = before
            for by, ranks in allotment.for_export(singular, shapes, reduction).items():
                truncated, exported, place = copy.deepcopy(model), copy.deepcopy(model), folder / f"{by}-{reduction:g}"
                factors.truncate(truncated, ranks, known)
                mine = losses(truncated, held_out)
                uniform = mine if by == "uniform" else uniform
                components = factors.factorise(exported, ranks, known)
                size = factors.save(exported, components, place)
                loaded = losses(factors.load(place).to(next(model.parameters()).device), held_out)
                kept = sum(r * sum(shapes[layer]) for layer, r in ranks.items())
                lost = sum(float((singular[layer][r:] ** 2).sum()) for layer, r in ranks.items())
                found.append(
                    {"kind": "export", "model": name, "reduction": reduction, "by": by}
                    | {"numbers_share": kept / numbers, "lost_energy": lost / energy, **same}
                    | {"perplexity_truncated": perplexity(mine), **_difference("loss_minus_whole", mine, before)}
                    | _difference("loss_minus_uniform", mine, uniform)
                    | {"perplexity_exported": perplexity(loaded), **_difference("exported_minus_whole", loaded, before)}
                    | {"bytes": size, "components": len(components), "layers": len(ranks)}
                )
                bar.update()
    return found


@torch.no_grad()
def losses(model: nn.Module, held_out: Sequence[Tensor]) -> Tensor:
    """Mean loss of every held-out sequence, in nats, float64."""
    model.eval()
    device = next(model.parameters()).device
    found = []
    for ids in held_out:
        logits = model(input_ids=ids.to(device)).logits[:, :-1].float()
        found.append(nn.functional.cross_entropy(logits.mT, ids[:, 1:].to(device), reduction="none").double().mean(1).cpu())
    return torch.cat(found)


def perplexity(losses: Tensor) -> float:
    """exp of their mean, infinite where float64 has no such number."""
    return float(losses.double().mean().exp())


def _difference(name: str, losses: Tensor, others: Tensor) -> dict[str, float]:
    """Mean, and standard error over sequences; NaN for one sequence."""
    each = losses - others
    return {name: float(each.mean()), f"{name}_se": float(each.std() / len(each) ** 0.5)}
