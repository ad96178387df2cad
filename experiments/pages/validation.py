"""Sections of the report on the laws: against exact moments and errors on synthetic matrices, and on the gradients of a model."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd

from experiments import runs
from experiments.pages import figures
from experiments.pages.page import details_block, every, figure, records, table, verdict
from experiments.validation import layerwise


def synthetic(run: runs.Run, rows: list[dict[str, Any]]) -> str:
    """Moments and errors of every law on synthetic matrices."""
    checks = pd.DataFrame(rows)
    flat = [
        {k: row[k] for k in ("kind", "law", "shape", "spectrum", "rank", "ratio")} | verdict for row in rows for verdict in row["verdicts"]
    ]
    verdicts = pd.DataFrame(flat)
    mse = verdicts[(verdicts.kind == "ipa") & verdicts.name.str.startswith("E‖")].copy()
    mse["panel"] = mse["shape"] + ", " + mse["spectrum"]
    random = verdicts[verdicts.standard_error > 1e-9 * verdicts.scale]
    per_law = [
        {
            "law": law,
            "checks": len(group),
            "draws": int(group.draws.sum()),
            "largest |z|": float(group.z.abs().max()),
            "coarsest resolution": f"{100 * group[group.kind != 'lr'].resolution.max():.2g} %",
            "hold": every(group.holds),
        }
        for law, group in checks.groupby("law", sort=False)
    ]
    details = verdicts[
        ["kind", "law", "shape", "spectrum", "rank", "name", "estimate", "standard_error", "theory", "z", "resolution", "required", "holds"]
    ]
    return (
        verdict(int(checks.holds.sum()), len(checks), "checks of moments and of estimator error")
        + "<p>Kinds: <b>law</b> tests E[P] and M ↦ E[PMP] by contrasts; <b>ipa</b> tests ĜVVᵀ and <b>lr</b> the zeroth-order estimate "
        "against exact alignment and mean squared error. Every verdict had to be able to see a defect of the size in its row "
        f"(<em>required</em>): {100 * run.config['resolution']:g} % for means, twice that for second moments and errors, coarser where single "
        "draws are rare or noisy.</p>"
        + table(per_law)
        + figure(lambda: figures.error_against_rank(pd.DataFrame(mse), "Mean squared error of ĜVVᵀ: exact (lines), measured (points)"),
                 "Error bars: ±2 standard errors, smaller than most markers. Laws of equal exact error lie on one line.")
        + figure(lambda: figures.z_scores(random.z.to_numpy(), "All verdicts"),
                 "If theory and error bars are right, z is standard normal. Statistics that never vary, such as tr P of Haar, are left out.")
        + details_block("All verdicts", table(records(pd.DataFrame(details))))
    )  # fmt: skip


def real(run: runs.Run, rows: list[dict[str, Any]]) -> str:
    """Errors of every law on the gradients of a model, layer by layer and summed, and their order."""
    by_kind = {kind: pd.DataFrame([row for row in rows if row["kind"] == kind]) for kind in ("layer", "gradient", "model", "order")}
    layers, gradients, model, order = by_kind["layer"], by_kind["gradient"], by_kind["model"], by_kind["order"]
    signal = model.signal_norm2
    curve = model.assign(
        panel=f"all {len(layers)} layers",
        theory=model.predicted / signal,
        estimate=model.measured / signal,
        standard_error=model.standard_error / signal,
    )
    draws = run.config["draws"]
    z = np.array([layerwise.verdict_of(row, math.inf, draws).z for row in records(gradients)])
    shrunk = gradients.assign(best=gradients.mse_at_best_c).groupby(["law", "ratio"], sort=False).best.sum(min_count=1) / float(
        signal.iloc[0]
    )
    totals = [
        {
            "law": row["law"],
            "r/n": row["ratio"],
            "unbiased": "yes" if row["unbiased"] else "no",
            "exact": row["predicted"] / row["signal_norm2"],
            "measured": row["measured"] / row["signal_norm2"],
            "± SE": row["standard_error"] / row["signal_norm2"],
            "z": row["z"],
            "would have seen": f"{100 * row['resolution']:.2g} %",
            "in any layer": f"{100 * row['largest_layer_resolution']:.2g} %",
            "alignment": row["alignment"],
            "exact alignment": row["alignment_theory"],
            "layers holding": f"{row['layers_holding']}/{row['layers']}",
            "at best c per layer": shrunk.get((row["law"], row["ratio"])),
            "holds": bool(row["holds"]),
        }
        for row in records(model)
    ]
    orders = [
        {
            "claim": row["claim"],
            "r/n": row["ratio"],
            "difference": row["difference"] / float(signal.iloc[0]),
            "± SE": row["standard_error"] / float(signal.iloc[0]),
            "exact": row["predicted"] / float(signal.iloc[0]),
            "z": row["z"],
            "layers with this exact order": f"{row['layers_predicted']}/{row['layers']}",
            "layers measured against it": row["layers_against"],
            "holds": bool(row["holds"]),
        }
        for row in records(order)
    ]
    facts = [
        {
            "layer": row["layer"],
            "m": row["m"],
            "n": row["n"],
            "effective rank of S": row["effective_rank"],
            "stable rank of S": row["stable_rank"],
            "signal share": f"{100 * row['signal_share']:.2f} %",
            "beyond these batches": f"{100 * row['signal_share_beyond']:.2f} %",
        }
        for row in records(layers)
    ]
    ratios = sorted(gradients.ratio.unique())
    chosen = ("gaussian", "haar_stiefel", "coordinate", "spectral", "top_svd")
    shown = [law for law in chosen if law in set(gradients.law)] or sorted(set(gradients.law))[:5]
    middle = ratios[len(ratios) // 2]
    training = run.read("training.json")["loss"] if (run.path / "training.json").exists() else None
    return (
        verdict(int(model.holds.sum()), len(model), "law × rank cells, every layer and the sum over layers")
        + verdict(int(order.holds.sum()) if len(order) else 0, len(order), "claims about the order of the laws")
        + f"<p>{run.config['batches']} mini-batches of {run.config['sequences']} × {run.config['length']} tokens are the exact population: "
        "g, Σ_ξ and S are its moments, and the spectral law and top-r SVD know that S. Errors are relative to ‖g‖² summed over layers. "
        "Biased laws can have a smaller error than any unbiased one; <em>at best c per layer</em> is what the unbiased ones reach by "
        "shrinkage.</p>"
        + figure(lambda: figures.error_against_rank(curve, "Error of the whole gradient: exact (lines), measured (points)"),
                 "Error bars: ±2 standard errors. Haar–Stiefel, coordinate, DCT and Hadamard have one exact error.")
        + table(totals)
        + "<h3>The order of the laws</h3><p>Differences of measured errors between independent draws; “&lt;” holds when seen at 5 "
        "standard errors and equal to the exact difference, “=” when no difference is seen.</p>" + table(orders)
        + figure(lambda: figures.spectra(layers), "Eigenvalues of E[ĜᵀĜ], the curve that the spectral law samples from.")
        + figure(lambda: figures.layer_facts(layers), "Ranks as fractions of n; signal share of S in this population.")
        + figure(lambda: figures.layer_ratios(gradients, shown, middle), "Layers in model order; error bars ±2 standard errors.")
        + figure(lambda: figures.z_scores(z, "Layer by layer"), "z of every layer, law and rank.")
        + (figure(lambda: figures.training(training), "AdamW on the default corpus.") if training else "")
        + details_block("Every layer", table(facts))
    )  # fmt: skip
