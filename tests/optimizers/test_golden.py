"""(d) Recorded trajectories of the published implementations, replayed with the draws they used (tests/golden/index.json).

Each method maps the recorded hyperparameters to its own options; ``variant="reference-code"`` where the published code leaves the paper.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from estimators import lift, sketch
from optimizers import Apollo, Fira, Flora, Frugal, GaLore, GoLore, LDAdam, Subspace
from optimizers.bases import Identity
from optimizers.frames import Columns, Dense, Entries, Frame, TwoSided
from optimizers.inner import Adafactor
from optimizers.subspace import Rule

FOLDER = Path(__file__).parent.parent / "golden"
INDEX = json.loads((FOLDER / "index.json").read_text())
ARRAYS = np.load(FOLDER / "trajectories.npz")
SIDES = {"std": "smaller", "left": "left", "right": "right", "reverse_std": "larger", "full": "both"}
CODE = {"variant": "reference-code"}
ADAFACTOR_ONLY, SKETCHED_SUM = "Flora__adafactor_nomom__A", "Flora__accumulation_sketch"
Run = dict[str, Any]


def array(run: Run, key: str) -> Tensor:
    return torch.tensor(ARRAYS[run["keys"][key]])


def latest(run: Run, stem: str, t: int) -> Tensor:
    """What was recorded for step t: a table with a row a step, or entries for the steps at which it changed."""
    if stem in run["keys"]:
        return array(run, stem)[t]
    return array(
        run, f"{stem}_{max(int(key.split('_')[1]) for key in run['keys'] if key.startswith(f'{stem}_') and int(key.split('_')[1]) <= t)}"
    )


def upright(P: Tensor) -> Tensor:
    return P.mT if P.shape[0] < P.shape[1] else P


def frame(run: Run, t: int) -> Frame:
    """The recorded projector in our layout: acting on the projected dimension, (n, r)."""
    keys = {key.split("_")[0] for key in run["keys"]}
    if "PA" in keys:
        return TwoSided(latest(run, "PA", t), upright(latest(run, "PB", t)))
    if "I" in keys:
        return Columns(latest(run, "I", t))
    if "Irow" in keys:
        return Entries(latest(run, "Irow", t) * run["shape"][1] + latest(run, "Icol", t))
    return Dense(upright(latest(run, "P_down" if "P_down" in run["keys"] else "P", t)))


class FullAdafactor(Subspace):
    """Adafactor on the whole gradient: Flora without a rank."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, lr, {"rank": 1})

    def rule(self, group: dict[str, Any]) -> Rule:  # noqa: ARG002
        return Rule(basis=Identity(), inner=Adafactor(), side="right", relative=1e-3)


def galore(run: Run, h: dict[str, Any]) -> tuple[type[Subspace], dict[str, Any]]:
    options = {"rank": run["rank"], "every": h["update_proj_gap"], "scale": h["scale"], "side": SIDES[h["proj_type"]]}
    if "adafactor" in run["method"]:
        return GaLore, options | CODE | {"inner": "adafactor", "beta1": h["beta1"], "relative": 1e-3 if h["scale_parameter"] else None}
    if "8bit" in run["method"]:  # its Adam is bitsandbytes', with ε where the paper has it
        return GaLore, options | {"states": "8bit", "smallest_8bit": h["min_8bit_size"], "eps": h["eps"]}
    return GaLore, options | CODE | {"eps": h["eps"], "correct_bias": h["correct_bias"]}


def golore(run: Run, h: dict[str, Any]) -> tuple[type[Subspace], dict[str, Any]]:
    options = {"rank": run["rank"], "every": h["update_proj_gap"], "random_from": h["rand_epoch"], "scale": h["scale"]}
    return GoLore, options | CODE | ({"inner": "sgd", "momentum": h["momentum"]} if "sgd" in run["method"] else {"eps": h["eps"]})


def flora(run: Run, h: dict[str, Any]) -> tuple[type[Subspace], dict[str, Any]]:
    if run["name"] == ADAFACTOR_ONLY:
        return FullAdafactor, {}
    options = {"rank": run["rank"], "every": h["kappa"], "beta": h["beta1"], "clip": h["clip_threshold"]}
    return Flora, options | CODE | {"relative": 1e-3 if h["scale_parameter"] else None}


def fira(run: Run, h: dict[str, Any]) -> tuple[type[Subspace], dict[str, Any]]:
    options = {"rank": run["rank"], "every": h["update_proj_gap"], "scale": h["alpha"], "side": SIDES[h["proj_type"]]}
    return Fira, options | CODE | {"eps": h["eps"], "correct_bias": h["correct_bias"]}


def apollo(run: Run, h: dict[str, Any]) -> tuple[type[Subspace], dict[str, Any]]:  # noqa: ARG001
    options = {"rank": h["rank"], "every": h["update_proj_gap"], "scale": h["scale"], "side": SIDES[h["proj_type"]]}
    options |= {"whole": h["scale_type"] == "tensor", "limit": None if h["disable_nl"] else 1.01}
    return Apollo, options | CODE | {"eps": h["eps"], "correct_bias": h["correct_bias"]}


def frugal(run: Run, h: dict[str, Any]) -> tuple[type[Subspace], dict[str, Any]]:  # noqa: ARG001
    part = h.get("coord_choice") or h.get("proj_type") or "blocks"
    part = {"randk": "entries", "randperm": "random"}.get(part, part)  # a permutation is recorded as a matrix
    options = {"rank": h["density"], "every": h["update_gap"], "part": part, "order": h.get("block_order", "descending"), "eps": h["eps"]}
    rest = {"sign_sgd": "sign", "sgd": "sgd", "no": "drop"}[h["inactive_update_rule"]]
    scales = {"scale": h["proj_params_lr_scale"], "rest_scale": h["inactive_lr_scale"]}
    return Frugal, options | scales | {"rest": rest, "reset": h["reset_statistics"]}


def ldadam(run: Run, h: dict[str, Any]) -> tuple[type[Subspace], dict[str, Any]]:
    side = "left" if run["shape"][0] == run["shape"][1] else "smaller"
    exact = h["proj_method"] == "svd"
    return LDAdam, {
        "rank": run["rank"],
        "rho": h["rho"],
        "feedback": h["error_feedback"],
        "exact": exact,
        "side": side,
        "betas": h["betas"],
    }


OPTIONS: dict[str, Callable[[Run, dict[str, Any]], tuple[type[Subspace], dict[str, Any]]]] = {
    "galore": galore,
    "golore": golore,
    "flora": flora,
    "fira": fira,
    "apollo": apollo,
    "frugal": frugal,
    "ldadam": ldadam,
}


def method_of(run: Run) -> str:
    name = run["method"].lower()
    return "apollo_mini" if name.startswith("apollo_mini") else next(method for method in OPTIONS if name.startswith(method))


CASES = [pytest.param(run, id=run["name"], marks=pytest.mark.check("d", method_of(run))) for run in INDEX if run["name"] != SKETCHED_SUM]


@pytest.mark.parametrize("run", CASES)
def test_replays(run: Run) -> None:
    h = run["hyper"]
    make, options = OPTIONS[method_of(run).removesuffix("_mini")](run, h)
    decay = {} if make is FullAdafactor or "sgd" in run["method"] else {"weight_decay": h["weight_decay"]}
    suffixes = [""] if "W0" in run["keys"] else [f"__{i}" for i in range(len(run["shape"]))]
    parameters = [nn.Parameter(array(run, f"W0{suffix}")) for suffix in suffixes]
    gradients = [array(run, f"grads{suffix}") for suffix in suffixes]
    optimizer = make(parameters, lr=h["lr"], **options, **decay)
    if any(key.startswith(("P", "I")) for key in run["keys"]) and make is not LDAdam:
        optimizer.inject = lambda _, t: frame(run, t)
    for t in range(len(gradients[0])):
        for p, G in zip(parameters, gradients, strict=True):
            p.grad = G[t].clone()
        optimizer.step()
        if t in run["steps"]:
            for p, suffix in zip(parameters, suffixes, strict=True):
                expected = array(run, f"Ws{suffix}")[run["steps"].index(t)]
                assert float((p.detach() - expected).abs().max()) <= run["tolerance"], f"step {t}"
    assert all(
        float((p.detach() - array(run, f"W0{s}")).abs().max()) > 20 * run["tolerance"] for p, s in zip(parameters, suffixes, strict=True)
    )


@pytest.mark.check("d", "flora")
@pytest.mark.parametrize("case", "ABCD")
def test_sketched_accumulation(case: str) -> None:
    """Flora's accumulated gradient is a sum of sketches, lifted once."""
    run = next(run for run in INDEX if run["name"] == SKETCHED_SUM)
    grads, A = array(run, f"grads_{case}"), array(run, f"A_{case}")
    wide = grads.shape[-2] < grads.shape[-1]
    G, V = (grads.mT, A.mT) if wide else (grads, A)
    total = sketch(G, V).sum(0)
    expected, lifted = array(run, f"pack_{case}"), array(run, f"lift_{case}")
    torch.testing.assert_close(total.mT if wide else total, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lift(total, V).mT if wide else lift(total, V), lifted, rtol=1e-5, atol=1e-4)
