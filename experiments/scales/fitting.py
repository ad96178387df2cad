"""From points to rows: parameters with intervals, how well the law lies, tokens saved inside and beyond the runs, and runs held back, predicted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import stats

from experiments import runs
from experiments.training import models
from theory import scaling
from theory.scaling import Fit, ScalingLaw

if TYPE_CHECKING:
    from experiments.scaling import Config

REFERENCE = "adamw"
LEVEL = 0.95
WIDE = 10.0  # an interval of a factor that reaches over a decade says that the runs do not tell it
SHARED = ("E", "A", "B", "alpha", "beta")
Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Fitted:
    """A fit, its bootstrap laws, and the points it is of."""

    fit: Fit
    laws: list[ScalingLaw]
    points: Rows

    def interval(self, of: Callable[[ScalingLaw], float]) -> dict[str, float]:
        """``value`` and the bounds of its bootstrap interval."""
        low, high = scaling.interval([of(law) for law in self.laws], LEVEL)
        return {"value": of(self.fit.law), "low": low, "high": high}


def rows(points: Rows, config: Config) -> Rows:
    """Rows ``parameter``, ``quality``, ``tokens`` and ``check``; points that diverged are left out and counted.

    The variant "N and D" has two factors a method; where those cannot be told apart the variant "D", one factor a method, is there too, and is what
    ``tokens`` and ``check`` are of. Raises ``WrongInput`` for too few points.
    """
    kept = [point for point in points if np.isfinite(point["loss"])]
    first = fitted(kept, config, size_factors=True)
    variants = {"N and D": first}
    told = parameters(first)
    unclear = first.fit.doubts or any(row["name"].startswith("rho") and row["high"] > WIDE * row["low"] for row in told)
    if unclear and first.fit.model.terms[1]:
        variants["D"] = fitted(kept, config, size_factors=False)
    if not first.fit.model.terms[0]:
        del variants["N and D"]  # with one size it is the same fit
    name, best = list(variants.items())[-1]
    found: Rows = []
    for variant, some in variants.items():
        found += [{"kind": "parameter", "variant": variant, **row} for row in parameters(some)]
        found.append(
            {"kind": "quality", "variant": variant, "chosen": variant == name, "left_out": len(points) - len(kept), **quality(some)}
        )
    return found + tokens(best, config) + check(kept, config, size_factors=name == "N and D")


def fitted(points: Rows, config: Config, size_factors: bool) -> Fitted:
    """The law of these points and its bootstrap; blocks are runs of one size, token count and seed."""
    N, D, L, labels = ([point[name] for point in points] for name in ("weights", "tokens", "loss", "label"))
    try:
        fit = scaling.fit(N, D, L, labels, REFERENCE, size_factors=size_factors)
        blocks = [(point["model"], point["tokens"], point["seed"]) for point in points]
        return Fitted(fit, scaling.bootstrap(fit, blocks, config.resamples, 0), points)
    except ValueError as error:
        raise runs.WrongInput(str(error)) from None


def parameters(found: Fitted) -> Rows:
    """One row a parameter; factors of every method but the reference."""
    law, model = found.fit.law, found.fit.model
    lost = {name for names, term in zip((("A", "alpha"), ("B", "beta")), model.terms, strict=True) if not term for name in names}
    told = [{"name": name, "label": "", **found.interval(lambda law, name=name: getattr(law, name))} for name in SHARED if name not in lost]
    for name, factor in zip(("rho_N", "rho_D"), model.factors, strict=True):
        factors = getattr(law, name) if factor else {}
        told += [
            {"name": name, "label": label, **found.interval(lambda law, name=name, label=label: getattr(law, name)[label])}
            for label in factors
        ]
    return told


def quality(found: Fitted) -> dict[str, Any]:
    """Spread about the law beside the spread between seeds, and the test of lack of fit: whether the first is more than the second explains."""
    fit, groups = found.fit, {}
    for point in found.points:
        groups.setdefault((point["label"], point["model"], point["tokens"]), []).append(np.log(point["loss"]))
    pure = sum(float(np.sum((np.array(some) - np.mean(some)) ** 2)) for some in groups.values())
    n, p, cells = len(found.points), len(fit.theta), len(groups)
    total = float(np.sum(fit.residuals**2))
    between = {"seed_spread": float("nan"), "lack_of_fit_F": float("nan"), "lack_of_fit_p": float("nan")}
    if n > cells > p and pure > 0:
        F = ((total - pure) / (cells - p)) / (pure / (n - cells))
        between = {
            "seed_spread": (pure / (n - cells)) ** 0.5,
            "lack_of_fit_F": F,
            "lack_of_fit_p": float(stats.f.sf(F, cells - p, n - cells)),
        }
    worst = int(np.argmax(np.abs(fit.residuals)))
    where = found.points[worst]
    return {
        "points": n,
        "parameters": p,
        "resamples": len(found.laws),
        "explained": fit.explained,
        "spread": fit.spread,
        **between,
        "largest_residual": float(fit.residuals[worst]),
        "largest_at": f"{where['label']}, {where['model']}, {where['tokens']:,} tokens, seed {where['seed']}",
        "delta": fit.delta,
        "doubts": "; ".join(fit.doubts),
    }


def tokens(found: Fitted, config: Config) -> Rows:
    """Tokens that full AdamW needs for a method's loss over the method's own: at every size and its largest D, and extrapolated.

    ``interpolated``: the same without a law, between AdamW's own mean losses of that size, at the method's mean loss; NaN outside of them.
    """
    if not found.fit.model.terms[1]:
        return []
    sizes = {point["model"]: point["weights"] for point in found.points}
    places = [
        (model, weights, D, False)
        for model, weights in sizes.items()
        for D in sorted({p["tokens"] for p in found.points if p["model"] == model})
    ]
    if found.fit.model.terms[0]:
        for model in config.extrapolate:
            weights = models.parameters(model)
            places.append((model, weights, round(config.tokens_per_weight * weights), True))
    told: Rows = []
    for label in (REFERENCE, *found.fit.runs.others):
        for model, weights, D, beyond in places:
            loss = found.interval(lambda law: float(law.loss(weights, D, label)))
            saved = found.interval(lambda law: float(law.saved(weights, D, label))) if label != REFERENCE else dict.fromkeys(loss, 1.0)
            told.append(
                {
                    "kind": "tokens",
                    "label": label,
                    "model": model,
                    "weights": weights,
                    "tokens": D,
                    "extrapolated": beyond,
                    "saved": saved["value"],
                    "saved_low": saved["low"],
                    "saved_high": saved["high"],
                    "loss": loss["value"],
                    "loss_low": loss["low"],
                    "loss_high": loss["high"],
                    "interpolated": interpolated(found.points, label, model, D),
                }
            )
    return told


def interpolated(points: Sequence[dict[str, Any]], label: str, model: str, D: int) -> float:
    """Tokens AdamW needs for the mean loss of ``label`` at ``D`` over D, on the line through its own mean losses against ln D."""
    full: dict[int, list[float]] = {}
    for point in points:
        if point["label"] == REFERENCE and point["model"] == model:
            full.setdefault(point["tokens"], []).append(point["loss"])
    mine = [p["loss"] for p in points if (p["label"], p["model"], p["tokens"]) == (label, model, D)]
    at, losses = sorted(full), [float(np.mean(full[d])) for d in sorted(full)]
    if not mine or len(at) < 2 or not min(losses) <= np.mean(mine) <= max(losses) or any(np.diff(losses) >= 0):
        return float("nan")
    return float(np.exp(np.interp(float(np.mean(mine)), losses[::-1], np.log(at)[::-1])) / D)


def check(points: Rows, config: Config, size_factors: bool) -> Rows:
    """A law fitted without the runs of the largest D, or of the largest model, beside what those ended at: one row a method, size and D.

    The interval is for the mean over seeds: of the law by its bootstrap, and of runs about it by the spread. Nothing where too few points are left.
    """
    told: Rows = []
    generator = np.random.default_rng(1)
    for what, largest in (("tokens", max(p["tokens"] for p in points)), ("weights", max(p["weights"] for p in points))):
        kept, held = ([p for p in points if (p[what] == largest) == back] for back in (False, True))
        try:
            found = fitted(kept, config, size_factors)
        except (runs.WrongInput, ValueError):
            continue
        if found.fit.doubts:
            continue
        groups: dict[tuple[str, str, int], Rows] = {}
        for point in held:
            groups.setdefault((point["label"], point["model"], point["tokens"]), []).append(point)
        for (label, model, D), some in groups.items():
            if label != REFERENCE and label not in found.fit.runs.others:
                continue
            N, noise = some[0]["weights"], found.fit.spread / len(some) ** 0.5
            drawn = [float(law.loss(N, D, label)) * np.exp(noise * generator.standard_normal()) for law in found.laws]
            low, high = scaling.interval(drawn, LEVEL)
            measured = float(np.mean([point["loss"] for point in some]))
            told.append(
                {
                    "kind": "check",
                    "held_back": f"largest {'D' if what == 'tokens' else 'N'}",
                    "label": label,
                    "model": model,
                    "tokens": D,
                    "measured": measured,
                    "predicted": float(found.fit.law.loss(N, D, label)),
                    "low": low,
                    "high": high,
                    "inside": low <= measured <= high,
                }
            )
    return told
