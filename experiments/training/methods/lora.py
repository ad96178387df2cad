"""LoRA (2106.09685) as peft has it, and ReLoRA (2307.05695), which merges and restarts it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from estimators import keyed, processes, selection
from experiments.training.methods.method import Method, Settings, rank_of_layers

if TYPE_CHECKING:
    from peft.tuners.lora import LoraLayer

PRUNED = 0.999  # share of ReLoRA's optimizer state that a restart sets to zero
REWARM = 50  # steps over which its learning rate comes back, at most half a period


class Lora(Method):
    """W + s·BA with W frozen: A (r×n) random, B (m×r) zero at the start, both trained; s is ``lora_scale`` (α/r in the paper)."""

    needs = ("rank", "lora_scale")
    by_layer = True

    def __init__(self, model: nn.Module, settings: Settings) -> None:
        import peft  # not above: the other methods need none of it

        super().__init__(model, settings)
        asked = rank_of_layers(settings)
        chosen, self.left_alone = selection.choose(model, None, asked)
        if not chosen:
            raise ValueError(f"lora(rank={settings.rank}): no layer of {type(model).__name__} can be adapted")
        total = sum(p.numel() for p in model.parameters())
        self.touched_share = sum(layer.weight.numel() for layer in chosen.values()) / total
        ranks = {name: selection.of_layer(name, layer.in_features, asked) for name, layer in chosen.items()}
        trained = [p for p in model.parameters() if p.requires_grad and id(p) not in {id(layer.weight) for layer in chosen.values()}]
        config = peft.LoraConfig(
            target_modules=list(chosen),
            r=max(ranks.values()),
            rank_pattern={f"^{name}$": r for name, r in ranks.items()},
            alpha_pattern={f"^{name}$": settings.lora_scale * r for name, r in ranks.items()},
        )
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            torch.manual_seed(settings.seed)
            peft.inject_adapter_in_model(config, model)
        for p in trained:
            p.requires_grad_(True)

    def adapters(self) -> dict[str, LoraLayer]:
        """The adapted layers by name."""
        from peft.tuners.lora import LoraLayer

        return {name: module for name, module in self.model.named_modules() if isinstance(module, LoraLayer)}

    def matrices(self) -> list[nn.Parameter]:
        return [p for name, p in self.model.named_parameters() if "lora_" in name and p.requires_grad]

    def pairs(self) -> list[tuple[Tensor, Tensor]]:
        factors = ((layer.lora_B, layer.lora_A) for layer in self.adapters().values())
        weight = lambda linear: cast(nn.Linear, linear).weight  # noqa: E731
        return [(weight(B[adapter]), weight(A[adapter]).mT) for B, A in factors for adapter in B]

    def finalize(self) -> nn.Module:
        for name, layer in self.adapters().items():
            layer.merge()
            selection.replace(self.model, name, layer.get_base_layer())
        for p in self.model.parameters():
            p.requires_grad_(True)
        return self.model


class ReLora(Lora):
    """LoRA merged into W every ``refresh_every`` steps, then A drawn anew, B zero, optimizer state pruned, learning rate warmed up again.

    Differs from 2307.05695: no full-rank warm start (give one by starting from trained weights); the published code prunes 99.9 % of the
    state at random, and so does this.
    """

    needs = ("rank", "lora_scale", "refresh_every")

    def after_step(self, optimizer: torch.optim.Optimizer, decay: float) -> None:
        super().after_step(optimizer, decay)
        if self.steps % self.settings.refresh_every == 0:
            for name, layer in self.adapters().items():
                self._restart(name, layer, optimizer)

    def subspaces(self, optimizer: torch.optim.Optimizer) -> tuple[int, ...]:
        del optimizer
        return (self.steps // self.settings.refresh_every,)

    @torch.no_grad()
    def _restart(self, name: str, layer: LoraLayer, optimizer: torch.optim.Optimizer) -> None:
        layer.merge()
        layer.merged_adapters.clear()
        for adapter in layer.lora_A:
            A, B = (cast(nn.Linear, factor[adapter]).weight for factor in (layer.lora_A, layer.lora_B))
            generator = keyed.generator(self.settings.seed, f"{name}.relora", self.steps, A.device)
            fresh = nn.init.kaiming_uniform_(torch.empty(A.shape, dtype=A.dtype, device=A.device), a=math.sqrt(5), generator=generator)
            A.copy_(processes.like(fresh, A))
            nn.init.zeros_(B)
            for p in (A, B):
                for value in optimizer.state.get(p, {}).values():
                    if isinstance(value, Tensor) and value.ndim == 2:
                        kept = torch.rand(value.shape, generator=generator, device=value.device) >= PRUNED
                        mine, kept = processes.local(value), processes.local(processes.like(kept, value))
                        dequantize = getattr(mine, "dequantize", None) if type(mine) is not Tensor else None  # torchao's 8-bit states
                        mine.copy_((dequantize() if dequantize else mine) * kept.to(mine.dtype))

    def lr_factor(self, step: int) -> float:
        since, warm = step % self.settings.refresh_every, min(REWARM, self.settings.refresh_every // 2)
        return min(1.0, (since + 1) / max(1, warm)) if step >= self.settings.refresh_every else 1.0
