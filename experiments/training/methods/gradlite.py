"""GradLite as a training method: layers that keep XV and follow the directions of their error signals, and the optimizer that steps in those.

``gradlite`` is the method: V of Haar–Stiefel at c = 1, drawn anew in every call, so that what the residual sees is unbiased; U by running power
iteration on Δ, and one step on gradient and residual; ef14: biased at every step, repaired over time. Its published ablations are
``gradlite_no_feedback`` and ``gradlite_static``, both biased: a basis that stands still can be repaired by no feedback, so the second has none.
``gradlite_inputs`` keeps all of X, so that the gradient that is compressed is exact. ``gradlite_law`` is unbiased: both sides are drawn, and there is
no feedback.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn

from estimators import selection
from estimators.compressed import Keeper
from estimators.error_basis import ErrorBasis, Inputs
from estimators.on_features import LawOnFeatures
from experiments.training.methods.compressed import Compressed
from experiments.training.methods.projected import Projected
from optimizers import GradLite, Subspace

if TYPE_CHECKING:
    from experiments.training.options import Options


class LowRankJacobian(Compressed, Projected):
    """Compressed linear layers under ``GradLite``."""

    kind = GradLite
    options: ClassVar[dict[str, str]] = {name: name for name in ("rank", "feedback", "residual", "inner")}
    needs = tuple(options)
    static: ClassVar[bool] = False
    whole: ClassVar[bool] = False  # whether all of X is kept

    def keeper(self, linear: nn.Linear) -> Keeper:
        rank = self.settings.rank
        inputs = Inputs() if self.whole else LawOnFeatures("haar_stiefel", rank)
        smaller = min(linear.weight.shape)  # a fraction is one of it, as in every frame
        return ErrorBasis(inputs, min(smaller, selection.rank_of(smaller, rank)), static=self.static)

    def matrices(self) -> list[nn.Parameter]:
        return Projected.matrices(self)  # of the layers that were replaced, whose parameters are the same

    def updates(self, config: Options) -> Subspace:
        optimizer = super().updates(config)
        assert isinstance(optimizer, GradLite)
        optimizer.start = self._directions
        return optimizer

    def _directions(self, name: str) -> Tensor | None:
        layer = self.compression.layers.get(name.removesuffix(".weight"))
        return layer.keeper.U if layer is not None and isinstance(layer.keeper, ErrorBasis) else None

    def finalize(self) -> nn.Module:
        super().finalize()
        return Projected.finalize(self)

    def observed(self) -> dict[str, float]:
        """``captured``: mean of ‖ΔU‖²/‖Δ‖² over the layers, of the last backward pass."""
        keepers = (layer.keeper for layer in self.compression.layers.values())
        caught = [float(keeper.captured) for keeper in keepers if isinstance(keeper, ErrorBasis) and keeper.captured is not None]
        return {"captured": sum(caught) / len(caught)} if caught else {}


class NoFeedback(LowRankJacobian):
    """What U misses is lost."""

    fixed: ClassVar[dict[str, Any]] = {"feedback": "none"}


class StaticBasis(LowRankJacobian):
    """U is drawn once."""

    fixed: ClassVar[dict[str, Any]] = {"basis": "static", "feedback": "none"}
    static = True


class WholeInputs(LowRankJacobian):
    """The gradient that is compressed is exact."""

    whole = True


class Drawn(LowRankJacobian):
    """U is drawn at every step, and the step is unbiased."""

    fixed: ClassVar[dict[str, Any]] = {"basis": "law", "feedback": "none", "inner": "sgd"}


VARIANTS: dict[str, type[LowRankJacobian]] = {
    "gradlite": LowRankJacobian,
    "gradlite_no_feedback": NoFeedback,
    "gradlite_static": StaticBasis,
    "gradlite_inputs": WholeInputs,
    "gradlite_law": Drawn,
}
