"""Gradients travel as their sketches: a communication hook of ``DistributedDataParallel``, drawn from a law where PowerSGD follows the gradient.

    worker w of p, matrix G_w, m×n with n ≤ m (else its transpose):   B = (1/p)Σ_w G_wV;   Ĝ = BVᵀ,   V n×r of the law, equal everywhere

    from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook
    model.register_comm_hook(PowerSGDState(None, matrix_approximation_rank=4, start_powerSGD_iter=100), powerSGD_hook)  # torch's own
    model.register_comm_hook(LawState.of(model, HaarStiefel, rank=32), law_hook)                                        # or this

Unbiased because Ĝ = ḠVVᵀ with Ḡ the mean gradient, V does not look at gradients and E[VVᵀ] = cI, c = 1; not after Adam, which is not linear. The
draw adds ‖Ḡ‖²(n/r − 1) for laws with orthonormal columns (theory/haar_stiefel.py), for any p; as many numbers of the other side would add as much.
Sent: mr numbers in the place of mn, in one all-reduce with all that is not compressed. Kept: nothing; V comes from its key (seed, name, draw).

``feedback`` takes c = r/n, so that VVᵀ projects where the law's columns are orthonormal, as they must be for it, and on each worker v = G_w + e;  B =
(1/p)Σ_w vV;  e ← v − vVVᵀ: biased at every step and repaired, Σ_t Ĝ = Σ_t Ḡ − (mean of e); mn numbers a worker (float32), and V must be drawn anew.
An unbiased law needs none of it. Steps η on ½‖x‖² with noise σ² end at E‖x‖² = ησ²/(2 − η(2/κ − 1)), κ = r/n; without feedback at ησ²/(2κ − η): it
has the noise of whole gradients for small steps, and is stable below η = 2κ/(2 − κ) only, not 2κ.

PowerSGD (arXiv 1905.13727): P = orth(Σ_w vQ), Q ← (1/p)Σ_w vᵀP, Ĝ = PQᵀ, Q of the step before. Biased, so it needs feedback; sends (m + n)r in two
all-reduces, one after the other, and keeps mn + (m + n)r. torch's e is v − Ĝ, by bucket; here it is the worker's own, by name, so ``start`` may be 0.

Refused: fitted laws, which look at gradients before they were sent, and biased ones. Sharded parameters (``fully_shard``) have no such hook; there
estimators.convert trains B itself. Feedback is in units of the gradient: not for a loss scale that changes. NaN passes through, and with feedback
it stays. Workers must draw alike: one kind of device, as many threads (estimators/keyed.py).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Self, cast

import torch
from torch import Tensor, distributed, nn

from estimators import keyed
from estimators.law import Law
from estimators.selection import rank_of
from estimators.sketch import lift


@dataclass(eq=False)
class LawState:
    """What ``law_hook`` knows; make it with ``of``. ``rank``: r, or a fraction in (0, 1) of n, at most n; ``every``: steps between draws;
    ``min_compression``: a matrix is compressed if n/r is above it; ``start``: first step that compresses. Tensors of more dimensions are matrices of
    the first against the rest. ``step`` and ``errors`` are its state, ``errors`` the worker's own. Raises ``ValueError`` for wrong values.
    """

    names: dict[Tensor, str] = field(repr=False)
    law: type[Law]
    rank: int | float
    c: float = 1.0
    seed: int = 0
    every: int = 1
    feedback: bool = False
    min_compression: float = 1.0
    start: int = 0
    process_group: distributed.ProcessGroup | None = None
    step: int = 0
    errors: dict[str, Tensor] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, model: nn.Module, law: type[Law], rank: int | float, **options: Any) -> Self:
        """For the parameters of a model, wrapped already or not: their names key the draws."""
        own = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
        return cls({p: name for name, p in own.named_parameters()}, law, rank, **options)

    def __post_init__(self) -> None:
        call = f"LawState(law={getattr(self.law, '__name__', self.law)}, rank={self.rank})"
        if not (isinstance(self.law, type) and issubclass(self.law, Law) and self.law.unbiased and not self.law.fitted):
            raise ValueError(f"{call}: law must be a class of estimators that is unbiased and not fitted to gradients, such as HaarStiefel")
        if isinstance(self.rank, bool) or not (self.rank >= 1 if isinstance(self.rank, int) else 0 < self.rank < 1):
            raise ValueError(f"{call}: rank must be a positive integer, or a fraction of the smaller side in (0, 1)")
        if self.every < 1:
            raise ValueError(f"{call}: every={self.every} must be at least 1")
        if self.start < 0 or not self.min_compression >= 0:
            raise ValueError(f"{call}: start={self.start} and min_compression={self.min_compression} must not be negative")
        if self.feedback and self.every > 1:
            raise ValueError(
                f"{call}: every={self.every} with feedback, which needs a new V at every step: a held one leaves errors out for good"
            )
        if self.feedback and self.c != 1:
            raise ValueError(f"{call}: c={self.c:g} with feedback, which sets c = r/n itself")
        if self.feedback and not _projects(self.law):
            raise ValueError(
                f"{call}: feedback with a law whose VVᵀ is no projection at c = r/n; take HaarStiefel, Coordinate, or a transform"
            )
        if not any(self.law_of(p.shape) for p in self.names):
            raise ValueError(f"{call}: no matrix to compress (min_compression={self.min_compression:g}, {len(self.names)} parameters)")

    def law_of(self, shape: torch.Size) -> Law | None:
        """The law of a parameter, on its smaller side; None for one that travels whole."""
        n = min(shape[0], shape[1:].numel()) if len(shape) > 1 else 0
        r = min(n, rank_of(n, self.rank))
        return self.law(n, r, r / n if self.feedback else self.c) if n > self.min_compression * r else None

    def draw(self, parameter: Tensor) -> Tensor | None:
        """V (n×r) of this step, None if the parameter travels whole."""
        if parameter not in self.names:
            raise ValueError(f"law_hook: a parameter of shape {tuple(parameter.shape)} is not of the model that LawState.of was given")
        law, past = self.law_of(parameter.shape), self.step - self.start
        if law is None or past < 0:
            return None
        exact = torch.promote_types(parameter.dtype, torch.float32)
        return keyed.draw(law, self.seed, self.names[parameter], past // self.every, device=parameter.device, dtype=exact)

    def outgoing(self, parameter: Tensor, G: Tensor, V: Tensor) -> Tensor:
        """GV (m×r) in the precision of G; with feedback (G + e)V, and e is what that leaves. Not checked for NaN: loss scaling looks for it later."""
        v, name = upright(G).to(V.dtype), self.names[parameter]
        if not self.feedback:
            return (v @ V).to(G.dtype)
        v = v + self.errors.get(name, 0)
        B = (v @ V).to(G.dtype)
        self.errors[name] = v - lift(B.to(V.dtype), V)
        return B

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint; with feedback each worker has its own."""
        return {"step": self.step, "errors": dict(self.errors)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there, with the same draws."""
        self.step, self.errors = state["step"], dict(state["errors"])


def upright(G: Tensor) -> Tensor:
    """A tensor as its matrix m×n with n ≤ m."""
    M = G.flatten(1)
    return M if M.shape[0] >= M.shape[1] else M.mT


def _projects(law: type[Law]) -> bool:
    """Whether VᵀV = I at c = r/n, in a draw of as many columns as there are dimensions: repeated or slanted ones show."""
    V = law(n=8, rank=8, c=1.0).sample(generator=keyed.generator(0, "projects", 0), dtype=torch.float64)
    return bool(torch.allclose(V.mT @ V, torch.eye(8, dtype=torch.float64)))


def law_hook(
    state: LawState,
    bucket: distributed.GradBucket,  # pyright: ignore[reportPrivateImportUsage]
) -> torch.futures.Future[Tensor]:
    """The bucket with Ĝ in the place of each matrix and the mean of everything else, after one all-reduce."""
    gradients, whole = bucket.gradients(), bucket.buffer()
    draws = [state.draw(p) for p in bucket.parameters()]
    pieces = [G if V is None else state.outgoing(p, G, V) for p, G, V in zip(bucket.parameters(), gradients, draws, strict=True)]
    shapes = [piece.shape for piece in pieces]  # the pieces themselves are not needed later
    flat = torch.cat([piece.flatten() for piece in pieces]).div_(distributed.get_world_size(state.process_group))
    state.step += bucket.is_last()

    def arrived(future: torch.futures.Future[list[Tensor]]) -> Tensor:
        means = future.value()[0].split([shape.numel() for shape in shapes])
        for G, V, mean, shape in zip(gradients, draws, means, shapes, strict=True):
            if V is None:
                G.copy_(mean.view(shape))
            else:
                if V.is_cuda:
                    V.record_stream(torch.cuda.current_stream(V.device))  # this runs on another stream than the one V was made on
                X = lift(mean.view(shape).to(V.dtype), V)
                G.copy_((X if len(G) == len(X) else X.mT).reshape(G.shape))
        return whole

    return cast(distributed.Work, distributed.all_reduce(flat, group=state.process_group, async_op=True)).get_future().then(arrived)


if distributed.is_available():  # the model compares them, and would find their names
    law_hook.__annotations__.update({"bucket": distributed.GradBucket, "return": torch.futures.Future[Tensor]})  # pyright: ignore[reportPrivateImportUsage]
