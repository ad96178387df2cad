"""GradInit: before training, a scale for every matrix, so that one virtual step of the optimizer in use reduces the loss most (2102.08098).

For scales α, weights αW, gradient g on a mini-batch, as the optimizer sees it (gV for a matrix that moves in the subspace of V):

    ‖g‖ > γ:  α goes down ‖g‖;      otherwise:  α goes down L(αW − η·step(g)), L on a mini-batch of which one half was in the first

Under Adam the first step is sign(g) and ‖·‖ the sum of absolute values, under SGD the step is g and ‖·‖ Euclidean; a step in a subspace is lifted,
step(gV)Vᵀ. α is moved by Adam, never below ``FLOOR``; vectors keep their values.

Differs from the paper: γ is the norm at α = 1, so that nothing needs tuning where gradients have another size; and η is the peak learning rate.
Where ‖g‖ is minimised, and under SGD always, the second derivative of the model is needed; attention is then computed without fused kernels.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from estimators import processes
from experiments import runs
from experiments.training import feed
from experiments.training.methods import METHODS, Full, LowRank, Method

if TYPE_CHECKING:
    from experiments.training.config import Config

ROUNDS = 40  # virtual steps; fixed, like the next three, before any training was looked at
RATE = 0.02  # of Adam on α
FLOOR = 0.1  # smallest scale
GAMMA = 1.0  # γ over the norm at α = 1
FRESH = 8  # pairs of mini-batches not used before, on which what was found is judged
FILE = "init.json"

Weights = dict[str, Tensor]
Loss = Callable[[Mapping[str, Tensor], Tensor], Tensor]  # of weights by name on a mini-batch


@dataclass(frozen=True)
class FirstStep:
    """What the optimizer does first. ``rates``: η by name; ``bases``: V (n×r) of the matrices that move in a subspace; ``signs``: Adam, else SGD."""

    rates: Mapping[str, float]
    bases: Mapping[str, Tensor]
    signs: bool = True

    def seen(self, gradients: Weights) -> Weights:
        """Of the gradients, what the optimizer gets."""
        return {name: g @ self.bases[name] if name in self.bases else g for name, g in gradients.items()}

    def norm(self, seen: Weights) -> Tensor:
        """Sum of absolute values, or Euclidean."""
        if self.signs:
            return torch.stack([g.abs().sum() for g in seen.values()]).sum()
        return torch.stack([g.square().sum() for g in seen.values()]).sum().sqrt()

    def moved(self, weights: Weights, seen: Weights) -> Weights:
        """The weights after the step."""
        steps = {name: g.sign() if self.signs else g for name, g in seen.items()}
        lifted = {name: D @ self.bases[name].mT if name in self.bases else D for name, D in steps.items()}
        return {name: W - self.rates[name] * lifted[name] for name, W in weights.items()}


def scales(
    loss: Loss,
    weights: Weights,
    batches: Iterator[Tensor],
    first: FirstStep,
    rounds: int = ROUNDS,
    rate: float = RATE,
    gamma: float = GAMMA,
) -> tuple[dict[str, float], dict[str, float]]:
    """α by name of the matrices among ``weights``, and what they change: the mean loss after a virtual step ``before`` (all α = 1) and ``after``,
    step and loss on mini-batches not used before, and the ``standard_error`` of the difference."""
    names = [name for name, W in weights.items() if W.ndim == 2]
    alpha = torch.ones_like(weights[names[0]][0, 0].expand(len(names)), memory_format=torch.contiguous_format).requires_grad_()
    optimizer = torch.optim.Adam([alpha], lr=rate)
    batch = next(batches)
    limit = gamma * float(_gradients(loss, _scaled(weights, names, alpha.detach()), batch, first, float("inf"))[1].detach())
    for _ in range(rounds):
        following = next(batches)
        scaled = _scaled(weights, names, alpha)
        seen, norm = _gradients(loss, scaled, batch, first, limit)
        objective = norm if float(norm.detach()) > limit else loss(first.moved(scaled, seen), _half_new(batch, following))
        (alpha.grad,) = torch.autograd.grad(objective, alpha)
        optimizer.step()
        with torch.no_grad():
            alpha.clamp_(min=FLOOR)
        batch = following
    found = alpha.detach()
    fresh = [(next(batches), next(batches)) for _ in range(FRESH)]
    losses = np.array(
        [[_after_step(loss, _scaled(weights, names, x), two, first) for x in (torch.ones_like(found), found)] for two in fresh]
    )
    before, after = losses.mean(0).tolist()
    error = float((losses[:, 1] - losses[:, 0]).std(ddof=1) / FRESH**0.5)
    return dict(zip(names, found.tolist(), strict=True)), {"before": before, "after": after, "standard_error": error}


def knows(kind: type[Method]) -> bool:
    """Whether the first step of a method is known here."""
    return kind is Full or issubclass(kind, LowRank)


def apply(model: nn.Module, config: Config, run: runs.Run) -> None:
    """Scale the matrices of a plain model in place, as its run recorded it, or as is found now, and then recorded.

    Raises ``WrongInput`` for methods and optimizers whose first step is not known here, and for several processes.
    """
    if not knows(METHODS[config.method]) or config.optimizer == "muon":
        raise runs.WrongInput(
            f"init=gradinit knows the first step of adamw, lowrank and compact under adamw, adamw8bit and sgd; not of method={config.method} "
            f"under optimizer={config.optimizer}"
        )
    if processes.size() > 1:
        raise runs.WrongInput("init=gradinit is found by one process; start it with one, and continue with several from its checkpoint")
    if not (run.path / FILE).exists():
        batches, _, _ = feed.open_data(config)
        weights = {name: p.detach() for name, p in model.named_parameters()}
        device = next(iter(weights.values())).device

        def loss(weights: Mapping[str, Tensor], ids: Tensor) -> Tensor:
            return functional_call(model, dict(weights), (), {"input_ids": ids.to(device), "labels": ids.to(device)}).loss

        with sdpa_kernel(SDPBackend.MATH):
            found, losses = scales(loss, weights, (batches.next() for _ in itertools.count()), _first_step(model, config), ROUNDS)
        run.write(FILE, {"scales": found, **losses})
    with torch.no_grad():
        for name, scale in run.read(FILE)["scales"].items():
            model.get_parameter(name).mul_(scale)


def _first_step(model: nn.Module, config: Config) -> FirstStep:
    method = METHODS[config.method](copy.deepcopy(model), config)
    trained = {id(p) for p in method.matrices()}
    bases = {}
    if isinstance(method, LowRank):
        bases = {f"{name}.weight": layer.basis() for name, layer in method.conversion.layers.items()}
    matrices = bases.keys() | {name for name, p in method.model.named_parameters() if id(p) in trained}
    others = config.lr if config.other_lr is None else config.other_lr
    rates = {name: config.lr if name in matrices else others for name, _ in model.named_parameters()}
    return FirstStep(rates, bases, config.optimizer != "sgd")


def _scaled(weights: Weights, names: list[str], alpha: Tensor) -> Weights:
    factors = dict(zip(names, alpha, strict=True))
    now = {name: W * factors[name] if name in factors else W for name, W in weights.items()}
    return {name: W if W.requires_grad else W.detach().requires_grad_() for name, W in now.items()}


def _gradients(loss: Loss, scaled: Weights, batch: Tensor, first: FirstStep, limit: float) -> tuple[Weights, Tensor]:
    """What the optimizer sees, and its norm; with a history where α goes down a function of it: signs have no derivative."""
    value, weights = loss(scaled, batch), list(scaled.values())
    for second in (not first.signs, True):
        gradients = torch.autograd.grad(value, weights, create_graph=second, retain_graph=True)
        seen = first.seen(dict(zip(scaled, gradients, strict=True)))
        norm = first.norm(seen)
        if second or float(norm.detach()) <= limit:
            break
    return seen, norm


def _half_new(batch: Tensor, following: Tensor) -> Tensor:
    half = len(batch) // 2
    return torch.cat([batch[len(batch) - half :], following[: len(following) - half]])


def _after_step(loss: Loss, scaled: Weights, batches: tuple[Tensor, Tensor], first: FirstStep) -> float:
    seen, _ = _gradients(loss, scaled, batches[0], first, float("inf"))
    with torch.no_grad():
        return float(loss(first.moved(scaled, seen), batches[1]))
