"""The README's law table: facts of each law from its class, numbers from committed results, nothing typed by hand.

``python -m experiments.readme`` rewrites the table between its markers; a test fails when README and results disagree.
"""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from estimators import LAWS
from experiments.publish import RESULTS

README = Path(__file__).parent.parent / "README.md"
BEGIN, END = "<!-- laws: begin, written by python -m experiments.readme -->", "<!-- laws: end -->"
RATIO = 0.25

FORMULAS = {  # E‖ĜVVᵀ − g‖² at c = 1; t = tr S, S = E[ĜᵀĜ]
    "gaussian": "(n+r+1)/r · t − ‖g‖²",
    "rademacher": "(n+r−1)/r · t − ‖g‖²",
    "sparse_sign": "(n+r+s−2)/r · t − ‖g‖²",
    "haar_stiefel": "n/r · t − ‖g‖²",
    "coordinate": "n/r · t − ‖g‖²",
    "coordinate_replacement": "(n+r−1)/r · t − ‖g‖²",
    "dct": "n/r · t − ‖g‖²",
    "hadamard": "n/r · t − ‖g‖²",
    "spectral": "Σ σᵢ/πᵢ − ‖g‖²",
    "top_svd": "tr(QQᵀS) − 2‖gQ‖² + ‖g‖²",
    "fixed_basis": "tr(QQᵀS) − 2‖gQ‖² + ‖g‖²",
}


def law_table(results: Path = RESULTS) -> str:
    """The table as Markdown: law, unbiased?, formula, file, and error relative to ‖g‖² on the gradients of the tiny LLaMA."""
    frame = pd.read_csv(results / "validate" / "tiny-model.csv")
    frame = frame[frame.ratio == RATIO].set_index("law")
    lines = [
        "| law | unbiased | E‖ĜVVᵀ − g‖² at c = 1 | file | exact / ‖g‖² | measured / ‖g‖² |",
        "|---|---|---|---|---|---|",
    ]
    for name, law in LAWS.items():
        row = frame.loc[name]
        signal = float(row["signal_norm2"])
        exact, measured, error = (float(row[key]) / signal for key in ("predicted", "measured", "standard_error"))
        lines.append(
            f"| `{name}` | {'yes' if law.unbiased else 'no'} | {FORMULAS[name]} | `{law.stem}.py` | "
            f"{exact:.2f} | {measured:.2f} ± {error:.2f} |"
        )
    return "\n".join(lines)


def updated(text: str) -> str:
    """``text`` with a fresh table between its markers. Raises ``ValueError`` when a marker is missing."""
    if BEGIN not in text or END not in text:
        raise ValueError(f"README has no markers {BEGIN!r} and {END!r}")
    head, _, rest = text.partition(BEGIN)
    return f"{head}{BEGIN}\n{law_table()}\n{END}{rest.partition(END)[2]}"


if __name__ == "__main__":
    README.write_text(updated(README.read_text(encoding="utf-8")), encoding="utf-8")
