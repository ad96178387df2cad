"""Section of the report on dynamics: exact expected loss curves, stable steps and error feedback, against simulation."""

from __future__ import annotations

from typing import Any

import pandas as pd

from experiments.pages import figures
from experiments.pages.page import every, figure, records, table, verdict


def section(rows: list[dict[str, Any]]) -> str:
    """Loss curves and stable steps of every law, lazy subspaces, and error feedback, simulated and exact."""
    checked = [row for row in rows if "holds" in row]
    kinds = {kind: pd.DataFrame([row for row in rows if row["kind"] == kind]) for kind in ("curve", "stability", "lazy")}
    curve, stability, lazy = kinds["curve"], kinds["stability"], kinds["lazy"]
    feedback = [row for row in rows if row["kind"] == "feedback"]
    steps = [
        {
            "law": law,
            "largest stable step": float(group.largest_stable_step.iloc[0]),
            "step used": float(group.eta.iloc[0]),
            "stationary loss, exact": float(group.stationary.iloc[0]),
            "last loss, exact": float(group.theory.iloc[-1]),
            "last loss, simulated": float(group.estimate.iloc[-1]),
            "± SE": float(group.standard_error.iloc[-1]),
            "largest |z| on the curve": float(group.z.abs().max()),
            "hold": every(group.holds),
        }
        for law, group in curve.groupby("law", sort=False)
    ]
    literal = [row for row in feedback if row["law"] == "literal"]
    text = "".join(
        f"<p>Held basis, discarded direction, λ = 1, η = {row['eta']:g}: the literal recursion grows by {row['held']:.12g} a step; "
        f"√(1+ηλ) = {row['modulus']:.12g}. It diverges for every η.</p>"
        for row in literal
    )
    return (
        verdict(sum(row["holds"] for row in checked), len(checked), "simulated means against exact values")
        + table(steps)
        + figure(
            lambda: figures.loss_curves(curve),
            "Every law starts at the same point and runs at the same fraction of its own largest stable step.",
        )
        + figure(lambda: figures.stability(stability), "Above 1 the second moment of the iterate grows without bound.")
        + (
            "<h3>Lazy subspaces</h3><p>E‖Θ‖² after one outer step of K inner steps, over before; H = I.</p>"
            + table(records(pd.DataFrame(lazy[["law", "inner", "eta", "estimate", "standard_error", "theory", "z", "holds"]])))
            if len(lazy)
            else ""
        )
        + "<h3>Error feedback</h3>"
        + figure(lambda: figures.feedback(feedback), "One sequence of fresh rank-r Haar compressors for all.")
        + text
    )
