"""``convert``: make the linear layers of any torch model move only in random low-rank subspaces, and turn them back when done.

    handle = convert(model, law="haar_stiefel", rank=64, refresh_every=200)
    optimizer = torch.optim.AdamW(handle.parameters(), lr=1e-3)
    for batch in batches:
        loss(model, batch).backward(); optimizer.step(); handle.step(optimizer); optimizer.zero_grad()
    handle.finalize()

Two clocks: every ``lift_every`` steps W ← W + BVᵀ, B ← 0; every ``refresh_every`` steps (K) V is drawn again. V is a pure function of (seed,
layer name, draw number). With ``lift_every=1`` the forward pass is one plain product, and the iteration is the same for any
optimizer whose step does not look at the value of B. Unbiased under every law of ``LAWS`` but the truncated ones. Reference: arXiv 2603.20632.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, cast, get_args

import torch
from torch import Tensor, nn

from estimators import keyed, processes, selection
from estimators.fitting import Fitting
from estimators.law import Constant, Law
from estimators.linear import LowRankLinear
from estimators.transport import Policy, Second, Transport
from estimators.writing import Lift, Writer


def _shown(look: Callable[[str, Tensor, Tensor], None], name: str, layer: LowRankLinear, earlier: Any, X: Tensor, D: Tensor) -> None:
    """To an observer that was there before and to this one, which is then over."""
    layer.observer = None
    if earlier is not None:
        earlier(X, D)
    look(name, X, D)


class Conversion:
    """Replace the targeted ``nn.Linear`` modules of ``model`` in place; the handle that drives them.

    ``layers``: name → ``LowRankLinear``; ``left_alone``: parameter or module name → why it was not converted.

    ``law``: a name of ``LAWS`` or a law class, ``options``: its other fields; ``rank``: r of every layer, as a fraction
    in (0, 1) of its n, or by layer name; ``c``: isotropy constant, or "r/n", that of each layer, at which columns of V of an unbiased law have
    length 1; ``targets``: None (every ``nn.Linear`` outside the output head), a regular expression searched in the module's name, a list of names or
    name endings, or a predicate (name, module) → bool; ``state``: what happens to the optimizer's state when V changes, and ``second_moment`` to
    Adam's N, where that is not as ``state`` says (estimators/transport.py); "first_batch" needs ``attach``;
    ``lift``: how small lifts reach 16-bit weights, by a float32 ``master`` copy, by ``stochastic`` rounding, or to the ``nearest`` (they get lost);
    ``store``: keep V (n×r numbers a layer) or draw it from its key at each use.

    For laws fitted to the gradient: ``keep``: directions known a layer, an integer k or, as a float, a multiple of its rank, never fewer than r;
    ``basis_every``: redraws between two full gradients; ``online``: weight in (0, 1] of what the sketches ĜV of the last K steps showed, 0 to
    learn from full gradients only. Their first draw, made before any gradient was seen, is Haar–Stiefel, replaced after the first step.

    Move the model to its device and dtype first. With several processes convert before ``DistributedDataParallel`` or ``fully_shard``: draws are
    equal everywhere, W is lifted where its rows lie, and only gradients of B travel. Raises ``ValueError`` for impossible values or when
    nothing is left to convert.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        law: str | type[Law] = "haar_stiefel",
        rank: selection.Ranks,  # r
        targets: selection.Targets = None,
        c: Constant = 1.0,
        seed: int = 0,
        lift_every: int = 1,
        refresh_every: int = 200,  # K
        state: Policy = "reset",
        second_moment: Second | None = None,
        lift: Lift = "master",
        store: bool = True,
        keep: int | float = 2.0,
        basis_every: int = 1,
        online: float = 0.0,
        **options: Any,
    ) -> None:
        from estimators import LAWS  # the registry imports every law; it cannot be imported before them

        shown = "…" if isinstance(rank, Mapping) else rank
        told = c if isinstance(c, str) else f"{c:g}"
        call = f"convert(law={law!r}, rank={shown}, c={told}, lift_every={lift_every}, refresh_every={refresh_every})"
        if isinstance(law, str) and law not in LAWS:
            raise ValueError(f"{call}: unknown law, known are {', '.join(LAWS)}")
        if lift_every < 1 or refresh_every < 1 or basis_every < 1:
            raise ValueError(f"{call}: lift_every, refresh_every and basis_every must be at least 1")
        self.transport = Transport(call, state, second_moment, seed)
        if lift not in get_args(Lift):
            raise ValueError(f"{call}: unknown lift {lift!r}, known are {', '.join(get_args(Lift))}")
        if not 0 <= online <= 1:
            raise ValueError(f"{call}: online={online} is a weight and must be in [0, 1]")
        if not keep > 0:
            raise ValueError(f"{call}: keep={keep} must be positive")
        if c != "r/n" and (isinstance(c, str) or not 0 < c < math.inf):
            raise ValueError(f"{call}: c must be positive and finite, or 'r/n'")
        self.model, self.seed = model, seed
        self.law = LAWS[law] if isinstance(law, str) else law
        if online and not self.law.fitted:
            raise ValueError(f"{call}: online={online} is for laws fitted to the gradient, {self.law.__name__} is not")
        self.lift_every, self.refresh_every, self.basis_every = lift_every, refresh_every, basis_every
        self.writer, self.store = Writer(lift, seed), store
        self.fitting = Fitting(self.law, c, options, keep, online, seed)
        chosen, self.left_alone = selection.choose(model, targets, rank)
        if not chosen:
            reasons = sorted(set(self.left_alone.values()))
            raise ValueError(f"{call}: no layer of {type(model).__name__} can be converted ({'; '.join(reasons) or 'no parameters'})")
        self.layers = {name: LowRankLinear(module, selection.of_layer(name, module.in_features, rank)) for name, module in chosen.items()}
        for layer in {(layer.in_features, layer.out_features): layer for layer in self.layers.values()}.values():
            self.fitting.check(layer)  # impossible options are refused before the model is touched
        for name, layer in self.layers.items():
            selection.replace(model, name, layer)
        self.steps, self.draws = 0, 0
        self._laws: dict[str, Law] = {}
        self._asked: set[str] = set()  # layers whose full gradient is awaited; one that the model does not use keeps waiting
        for name, layer in self.layers.items():
            self._hold(name, layer)
            if online:
                layer.B.register_hook(lambda sketch, name=name: self._accumulate(name, sketch))
        self._arm()

    # parameters

    def parameters(self) -> Iterator[nn.Parameter]:
        """Everything that is trained: the B of every converted layer, and all other parameters of the model that require a gradient."""
        return (p for p in self.model.parameters() if p.requires_grad)

    def subspace_parameters(self) -> list[nn.Parameter]:
        """The B (m×r) of the converted layers, in the model's order."""
        return [layer.B for layer in self.layers.values()]

    def other_parameters(self) -> list[nn.Parameter]:
        """The trained parameters that are not projected: embeddings, head, norms, biases."""
        mine = {id(p) for p in self.subspace_parameters()}
        return [p for p in self.parameters() if id(p) not in mine]

    @property
    def touched_share(self) -> float:
        """Weights that move through a low-rank estimate, as a share of all weights of the model."""
        mine = {id(layer.B) for layer in self.layers.values()}
        total = sum(p.numel() for p in self.model.parameters() if id(p) not in mine)
        return sum(layer.weight.numel() for layer in self.layers.values()) / total

    # the two clocks

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Call once for the optimizer of the subspace where its state is made from gradients not yet seen: ``second_moment="first_batch"``."""
        self.transport.attach(optimizer)

    @torch.no_grad()
    def step(self, optimizer: torch.optim.Optimizer | None = None, *, decay: float = 1.0) -> None:
        """Call once after every ``optimizer.step()``.

        ``decay``: factor 1 − ηλ of decoupled weight decay, applied to W here because the optimizer sees only B. ``optimizer`` is needed when
        V changes under a policy other than ``keep``.
        """
        redraw = (self.steps + 1) % self.refresh_every == 0 or (not self.fitting.known and bool(self.fitting.pending))
        if redraw and optimizer is None and self.transport.needs_optimizer:
            raise ValueError(f"Conversion.step(): the state policy {self.transport.policy!r} needs the optimizer")
        self.steps += 1
        lift = redraw or self.steps % self.lift_every == 0
        if decay != 1.0:
            for name, layer in self.layers.items():
                self.writer.write(name, layer.weight, self.steps, "decay", lambda W: W.mul_(decay))
        for layer in self.layers.values():
            layer.moved()
        if lift:
            self.lift()
        if redraw:
            self.redraw(optimizer)
        self._arm()

    @torch.no_grad()
    def lift(self) -> None:
        """W ← W + BVᵀ and B ← 0 in every layer; the function that the model computes does not change beyond rounding."""
        for name, layer in self.layers.items():
            B, V = processes.local(layer.B), layer.basis()
            self.writer.write(name, layer.weight, self.steps, "rounding", lambda W: W.addmm_(B, V.mT))
            layer.zero()

    @torch.no_grad()
    def redraw(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Draw every V anew (B must be zero: ``lift`` first) and carry the optimizer's state by the policy."""
        self.draws += 1
        for name, layer in self.layers.items():
            if self.fitting.online and processes.local(layer.B) is not layer.B:
                raise ValueError(f"convert(online={self.fitting.online}): sketches of sharded parameters cannot be seen; use online=0")
            old = layer.basis()
            self.fitting.advance(name, old)
            self._hold(name, layer)
            if optimizer is not None:
                self.transport.carry(name, self.draws, optimizer, layer.B, old, layer.basis())
        sums = [layer.V.double().sum() for layer in self.layers.values() if layer.V is not None]
        if sums and not processes.agree(torch.stack(sums)):
            raise RuntimeError(f"convert: draw {self.draws} differs between processes; they need the same kind of device and of libraries")

    # what the backward pass shows

    def observe(self, look: Callable[[str, Tensor, Tensor], None], names: Iterable[str] | None = None) -> None:
        """Have ``look(name, X, Δ)`` called for every layer (of ``names``) in the next backward pass, with X (T, n) and Δ (T, m); Ĝ = ΔᵀX.

        Only that pass keeps X. Under ``torch.compile`` the pass must be made by the uncompiled model.
        """
        for name in self.layers if names is None else names:
            layer = self.layers[name]
            earlier = layer.observer
            layer.observer = lambda X, D, name=name, layer=layer, earlier=earlier: _shown(look, name, layer, earlier, X, D)

    @property
    def watching(self) -> bool:
        """Whether the next backward pass keeps X and forms full gradients."""
        return any(layer.observer is not None for layer in self.layers.values())

    def _arm(self) -> None:
        """Before the last step of a period the fitted laws ask for the full gradient of one micro-batch."""
        due = (self.steps + 1) % self.refresh_every == 0 and self.draws % self.basis_every == 0
        if self.law.fitted and (due or not self.fitting.known):
            self._ask(self.layers.keys() - self._asked)

    def _ask(self, names: Iterable[str]) -> None:
        self._asked |= set(names)
        self.observe(self._learn, names)

    def _learn(self, name: str, X: Tensor, D: Tensor) -> None:
        self._asked.discard(name)
        self.fitting.reduce(name, self.layers[name], X, D, self.draws)

    def _accumulate(self, name: str, sketch: Tensor) -> None:
        if self.draws:  # in the first subspace there is nothing yet that a sketch could refine
            self.fitting.accumulate(name, sketch)

    def law_of(self, name: str) -> Law:
        """The law that V of the named layer was drawn from."""
        return self._laws[name]

    def _hold(self, name: str, layer: LowRankLinear) -> None:
        law, index = self.fitting.law_of(name, layer), self.draws
        self._laws[name] = law

        redraw = lambda: keyed.draw(law, self.seed, name, index, device=layer.weight.device, dtype=layer.B.dtype)  # noqa: E731
        layer.hold(redraw() if self.store else None, cast(Callable[[], Tensor], torch.compiler.disable(redraw)))

    # checkpoints and the way back

    def state_dict(self) -> dict[str, Any]:
        """Counters, known directions and master weights: what the model's own ``state_dict`` does not hold. V is drawn again from its key."""
        counters = {"steps": self.steps, "draws": self.draws}
        return counters | {
            "made_of": self._made_of(),
            "asked": sorted(self._asked),
            "waiting": sorted(self.transport.waiting),
            "fitting": self.fitting.state_dict(),
            "masters": dict(self.writer.masters),
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where ``state_dict`` was taken; load the model's own state first. Raises ``ValueError`` if V or the masters would differ."""
        if different := [key for key, value in self._made_of().items() if state["made_of"][key] != value]:
            raise ValueError(f"Conversion.load_state_dict: the state is of a conversion that differs in {', '.join(different)}")
        self.steps, self.draws = state["steps"], state["draws"]
        self.fitting.load_state_dict(state["fitting"], {name: layer.weight.device for name, layer in self.layers.items()})
        self.writer.load(state["masters"], {name: layer.weight for name, layer in self.layers.items()})
        for name, layer in self.layers.items():
            layer.observer = None
            layer.moved()
            if not processes.anywhere(layer.B):
                layer.zero()
            self._hold(name, layer)
        self._asked = set()
        self._ask(state["asked"])
        self.transport.waiting = {name: self.layers[name].B for name in state.get("waiting", ())}  # none in older checkpoints

    def _made_of(self) -> dict[str, Any]:
        """What V and the masters are a function of, beside counters and known directions."""
        ranks = {name: layer.rank for name, layer in self.layers.items()}
        kinds = sorted({layer.weight.device.type for layer in self.layers.values()})  # their generators differ
        law = {"law": self.law.__name__, "c": self.fitting.c, "seed": self.seed}
        masters = sorted(name for name, layer in self.layers.items() if self.writer.has_master(layer.weight))
        return law | {"ranks": ranks, "masters": masters, "device": kinds}

    def finalize(self) -> nn.Module:
        """Lift what is left, put plain ``nn.Linear`` modules back in place, and return the model; the handle is then spent."""
        self.lift()
        for name, layer in self.layers.items():
            linear = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
            linear.weight = nn.Parameter(layer.weight.detach())
            linear.register_parameter("bias", layer.bias)
            selection.replace(self.model, name, linear)
        self.layers, self._laws, self.writer.masters = {}, {}, {}
        return self.model


convert = Conversion  # reads as the verb it is: handle = convert(model, law=…)
