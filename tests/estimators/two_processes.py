"""Started by ``torchrun``: gradients of a small model with compressed inputs, each process on its half of a batch; process 0 writes the means."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from estimators import CompressedLinear, ErrorBasis, Keeper, LawOnFeatures, LawOnTokens, VeLoRA, compress, processes

RULES: dict[str, Callable[[nn.Linear], Keeper]] = {
    "features": lambda _: LawOnFeatures("rademacher", 2),
    "tokens": lambda _: LawOnTokens("coordinate", 5),
    "every token": lambda _: LawOnTokens("haar_stiefel", 10**6),
    "velora": lambda _: VeLoRA(2),
    "errors": lambda _: ErrorBasis(LawOnFeatures("rademacher", 2), 2),
}
X = torch.randn(8, 10, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def made(rule: str) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Sequential(nn.Linear(6, 8), nn.Tanh()), nn.Linear(8, 4)).double()
    compress(model, keeper=RULES[rule])
    return model


def gradients(model: nn.Module, inputs: Tensor, wrapped: nn.Module | None = None) -> list[Tensor]:
    """Whole, of every parameter; and the projectors of the bases that followed the errors."""
    (wrapped or model)(inputs).square().mean().backward()
    grads: list[Any] = [p.grad for p in model.parameters()]
    bases = [layer.keeper.U for layer in model.modules() if isinstance(layer, CompressedLinear) and isinstance(layer.keeper, ErrorBasis)]
    return [G.full_tensor() if isinstance(G, DTensor) else G for G in grads] + [U @ U.mT for U in bases if U is not None]


def main(folder: Path) -> None:
    distributed.init_process_group("gloo")
    rank = distributed.get_rank()
    found = {}
    for rule in RULES:
        for how in ("ddp", "fsdp"):
            model = made(rule)
            wrapped: nn.Module = model
            if how == "ddp":
                wrapped = DistributedDataParallel(model)
            else:
                for part in (*model.children(), model):
                    if len(list(part.children())):
                        fully_shard(part)
            found[rule, how] = gradients(model, X[4 * rank : 4 * rank + 4], wrapped)
    if rank == 0:
        torch.save(found, folder / "gradients.pt")
    processes.leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
