"""GradLite as a training method: layers that keep XV and follow the directions of their error signals, and the optimizer that steps in those.

``gradlite`` is the method: V of Haar–Stiefel at c = 1, drawn anew in every call, so that what the residual sees is unbiased; U by running power
iteration on Δ; ef14. Its published ablations are ``gradlite_no_feedback`` and ``gradlite_static``; ``gradlite_inputs`` keeps all of X, so that the
gradient that is compressed is exact. In several processes, whose Δ differ, U follows the averaged gradient.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from torch import nn

from estimators import processes, selection
from estimators.compressed import Keeper
from estimators.error_basis import ErrorBasis, Inputs
from estimators.on_features import LawOnFeatures
from experiments.training.methods.compressed import Compressed
from experiments.training.methods.projected import Projected
from optimizers import GradLite, Subspace
from optimizers.frames import Dense, Frame

if TYPE_CHECKING:
    from experiments.training.options import Options


class LowRankJacobian(Compressed, Projected):
    """Compressed linear layers under ``GradLite``."""

    kind = GradLite
    options: ClassVar[dict[str, str]] = {"rank": "rank"}
    static: ClassVar[bool] = False
    whole: ClassVar[bool] = False  # whether all of X is kept

    def keeper(self, linear: nn.Linear) -> Keeper:
        rank = self.settings.rank
        inputs = Inputs() if self.whole else LawOnFeatures("haar_stiefel", rank)
        return ErrorBasis(inputs, selection.rank_of(linear.out_features, rank), static=self.static)

    def matrices(self) -> list[nn.Parameter]:
        return Projected.matrices(self)  # of the layers that were replaced, whose parameters are the same

    def updates(self, config: Options) -> Subspace:
        optimizer = super().updates(config)
        if processes.size() == 1:
            optimizer.inject = self._frame
        return optimizer

    def _frame(self, name: str, clock: int) -> Frame | None:
        del clock
        layer = self.compression.layers.get(name.removesuffix(".weight"))
        if layer is None or not isinstance(layer.keeper, ErrorBasis) or layer.keeper.U is None:
            return None
        return Dense(layer.keeper.U)

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

    fixed: ClassVar[dict[str, Any]] = {"basis": "static"}
    static = True


class WholeInputs(LowRankJacobian):
    """The gradient that is compressed is exact."""

    whole = True


VARIANTS: dict[str, type[LowRankJacobian]] = {
    "gradlite": LowRankJacobian,
    "gradlite_no_feedback": NoFeedback,
    "gradlite_static": StaticBasis,
    "gradlite_inputs": WholeInputs,
}
