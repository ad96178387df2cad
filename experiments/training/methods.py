"""How a model is trained: which parameters move, what happens after each optimizer step, and what is left when it is over.

``lowrank`` is LowRank-IPA with any law; ``adamw`` trains every weight; ``lora`` is the frozen subspace (peft); ``relora`` merges and restarts
LoRA every K steps (2307.05695). All run in one loop, with the same data order, schedule and clipping; embeddings, head and norms are
always trained in full, so methods differ only in the linear layers inside the blocks.
"""

from __future__ import annotations

import abc
import math
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, cast

import torch
from torch import Tensor, nn

from estimators import keyed, processes, selection
from estimators.convert import Conversion, convert
from estimators.transport import Policy
from estimators.writing import Lift

if TYPE_CHECKING:
    from peft.tuners.lora import LoraLayer

PRUNED = 0.999  # share of ReLoRA's optimizer state that a restart sets to zero
REWARM = 50  # steps over which its learning rate comes back, at most half a period


class Settings(Protocol):
    """The fields of a configuration that methods read."""

    @property
    def law(self) -> str: ...
    @property
    def rank(self) -> int | float: ...
    @property
    def c(self) -> float: ...
    @property
    def seed(self) -> int: ...
    @property
    def lift_every(self) -> int: ...
    @property
    def refresh_every(self) -> int: ...
    @property
    def state(self) -> Policy: ...
    @property
    def lift(self) -> Lift: ...
    @property
    def store(self) -> bool: ...
    @property
    def keep(self) -> int | float: ...
    @property
    def basis_every(self) -> int: ...
    @property
    def online(self) -> float: ...
    @property
    def lora_scale(self) -> float: ...


class Method(abc.ABC):
    """A prepared model. ``handle``: the conversion behind it, if there is one; ``left_alone``: what keeps its plain gradient, and why."""

    handle: Conversion | None = None
    needs: ClassVar[tuple[str, ...]] = ()  # fields that only this method reads

    def __init__(self, model: nn.Module, settings: Settings) -> None:
        self.model, self.settings = model, settings
        self.left_alone: dict[str, str] = {}
        self.touched_share = 0.0
        self.steps = 0

    @abc.abstractmethod
    def matrices(self) -> list[nn.Parameter]:
        """The trained parameters that stand for the linear layers of the blocks."""

    def others(self) -> list[nn.Parameter]:
        """All other trained parameters."""
        mine = {id(p) for p in self.matrices()}
        return [p for p in self.model.parameters() if p.requires_grad and id(p) not in mine]

    def after_step(self, optimizer: torch.optim.Optimizer, decay: float) -> None:
        """Called once after every optimizer step with the optimizer of ``matrices`` and the factor 1 − ηλ of this step."""
        del optimizer, decay
        self.steps += 1

    def lr_factor(self, step: int) -> float:
        """What the method does to the learning rate of ``matrices`` at this step, beside the common schedule."""
        del step
        return 1.0

    def state_dict(self) -> dict[str, Any]:
        """What belongs in a checkpoint beside the model and the optimizers."""
        return {"steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse."""
        self.steps = state["steps"]

    def finalize(self) -> nn.Module:
        """The plain model again; training is over."""
        return self.model

    def facts(self) -> dict[str, Any]:
        """Sizes that a result should carry: trained and touched weights."""
        return {
            "trained_parameters": sum(p.numel() for p in self.model.parameters() if p.requires_grad),
            "matrix_parameters": sum(p.numel() for p in self.matrices()),
            "touched_share": self.touched_share,
        }


class Full(Method):
    """Every weight by its full gradient."""

    def matrices(self) -> list[nn.Parameter]:
        chosen, _ = selection.choose(self.model, None, 1)
        return [cast(nn.Parameter, layer.weight) for layer in chosen.values()]


class LowRank(Method):
    """LowRank-IPA: ``estimators.convert``."""

    needs = ("law", "rank", "c", "lift_every", "refresh_every", "state", "lift", "store", "keep", "basis_every", "online")

    def __init__(self, model: nn.Module, settings: Settings) -> None:
        super().__init__(model, settings)
        self.handle = handle = convert(model, seed=settings.seed, **{name: getattr(settings, name) for name in self.needs})
        self.conversion, self.left_alone, self.touched_share = handle, handle.left_alone, handle.touched_share

    def matrices(self) -> list[nn.Parameter]:
        return self.conversion.subspace_parameters()

    def after_step(self, optimizer: torch.optim.Optimizer, decay: float) -> None:
        super().after_step(optimizer, decay)
        self.conversion.step(optimizer, decay=decay)

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"handle": self.conversion.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.conversion.load_state_dict(state["handle"])

    def finalize(self) -> nn.Module:
        return self.conversion.finalize()


class Lora(Method):
    """W + s·BA with W frozen: A (r×n) random, B (m×r) zero at the start, both trained; s is ``lora_scale`` (α/r in the paper)."""

    needs = ("rank", "lora_scale")

    def __init__(self, model: nn.Module, settings: Settings) -> None:
        import peft  # not above: the other methods need none of it

        super().__init__(model, settings)
        chosen, self.left_alone = selection.choose(model, None, settings.rank)
        if not chosen:
            raise ValueError(f"lora(rank={settings.rank}): no layer of {type(model).__name__} can be adapted")
        total = sum(p.numel() for p in model.parameters())
        self.touched_share = sum(layer.weight.numel() for layer in chosen.values()) / total
        ranks = {name: selection.rank_of(layer.in_features, settings.rank) for name, layer in chosen.items()}
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


METHODS: dict[str, type[Method]] = {"lowrank": LowRank, "adamw": Full, "lora": Lora, "relora": ReLora}
