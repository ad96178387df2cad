"""Collects the recorded trajectories that the tests replay: ``python tests/golden/collect.py FOLDER`` with FOLDER/one and FOLDER/two.

Of every run: weights after a few steps, and what was random or ambiguous in sign. Gradients and first weights are kept once a problem.
The numbers were recorded from the published implementations named in ``index.json``; they are numbers only.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

import numpy as np

METHODS = ("galore", "golore", "flora", "fira", "apollo", "frugal", "ldadam", "coap", "osd", "qgalore")  # beginnings of their names
METHODS += ("dct", "trion", "newtonschulz", "mofasgd", "dion", "torchmuon")
ALSO = ("AdaLomo__fixedgrad__A",)  # of a method whose other runs are read in place (tests/optimizers/test_golden_lomo.py)
WITHOUT = ("coap_adamw__ui2_rf3_grad30__24x40_r4",)  # the rule of another run, at 60 kB
KEPT = (0, 5, 10, 11)  # steps whose weights are compared: the first, after two refreshes, the last
DROPPED = ("M_last", "V_last", "limnorm", "state_dtype", "ef_after", "seed_after", "queue_last", "O_lowrank", "Q", "D")
DROPPED += ("ef", "bf16", "Wcode0", "Wscale0", "Wzero0", "Pfloat")  # or the name before an underscore
HERE = Path(__file__).parent


def main(source: Path) -> None:
    """Write ``trajectories.npz`` and ``index.json`` beside this file."""
    arrays: dict[str, np.ndarray] = {}
    index = []
    shared = np.load(source / "two" / "problems.npz")
    for folder in ("one", "two"):
        for run in json.loads((source / folder / "index.json").read_text())["runs"]:
            name = run["file"].removesuffix(".npz")
            if not (run["method"].lower().startswith(METHODS) or name in ALSO) or name in WITHOUT:
                continue
            held = np.load(source / folder / run["file"])
            data = {
                name: held[name]
                for name in held.files
                if name not in DROPPED and not name.endswith("_state") and name.split("_")[0] not in DROPPED
            }
            if "case" in run:
                data |= {"W0": shared[f"W0_{run['case']}"], "grads": shared[f"grads_{run['case']}"]}
            entry = {"name": name, "folder": folder, "steps": list(KEPT), "keys": {}}
            entry |= {key: run[key] for key in ("method", "variant", "shape", "rank", "hyper", "refresh") if key in run}
            entry["tolerance"] = run.get("tolerance_suggestion", 5e-6)
            entry["source"] = run.get("implementation") or {key: run[key] for key in ("package", "commit", "cls") if key in run}
            for key, value in data.items():
                some = value[list(KEPT)] if key.startswith("Ws") else value
                digest = hashlib.sha256(some.tobytes() + str(some.shape).encode()).hexdigest()[:12]
                arrays[digest] = some
                entry["keys"][key] = digest
            index.append(entry)
    np.savez_compressed(HERE / "trajectories.npz", **arrays)  # pyright: ignore[reportArgumentType]
    (HERE / "index.json").write_text(json.dumps(index, indent=1) + "\n")
    print(f"{len(index)} runs, {(HERE / 'trajectories.npz').stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
