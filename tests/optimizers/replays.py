"""What was recorded of the published implementations (tests/golden/index.json), and each run's hyperparameters as options of ours.

``variant="reference-code"`` where the published code leaves the paper. ``LEFT_OUT``: runs that nothing here repeats, and why.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from optimizers import (
    COAP,
    AdaLomo,
    Apollo,
    DCTAdamW,
    Dion,
    Fira,
    Flora,
    Frugal,
    GaLore,
    GoLore,
    LDAdam,
    MoFaSGD,
    Muon,
    OnlineSubspaceDescent,
    QGaLore,
    Subspace,
    Trion,
)
from optimizers.bases import Identity
from optimizers.dion import Iterate
from optimizers.frames import Columns, Cosines, Dense, Entries, Frame, TwoSided, dct_matrix
from optimizers.inner import Adafactor
from optimizers.mofasgd import Factors, followed
from optimizers.q_galore import FourBit
from optimizers.quantized import Codes, dequantize, pack, unpack
from optimizers.subspace import Rule

FOLDER = Path(__file__).parent.parent / "golden"
INDEX = json.loads((FOLDER / "index.json").read_text())
ARRAYS = np.load(FOLDER / "trajectories.npz")
SIDES = {"std": "smaller", "left": "left", "right": "right", "reverse_std": "larger", "full": "both"}
CODE = {"variant": "reference-code"}
ADAFACTOR_ONLY = "Flora__adafactor_nomom__A"
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


# the rest of the family


def coap(run: Run, h: dict[str, Any]) -> tuple[type[Subspace], dict[str, Any]]:
    options = {"rank": run["rank"], "every": h["update_interval"], "recalibrate": h["reproject_factor"], "scale": h["scale"]}
    options |= {"carry": h["restore_state"]} | CODE
    if "adafactor" in run["method"]:
        return COAP, options | {"inner": "adafactor", "beta1": h["beta1"]}
    return COAP, options | {"eps": h["eps"]}


def osd(run: Run, h: dict[str, Any]) -> tuple[type[Subspace], dict[str, Any]]:
    if h["proj_type"] == "random":  # singular vectors of a random matrix in the place of the gradient's
        return GaLore, {"rank": run["rank"], "every": h["update_proj_gap"], "scale": h["scale"], "eps": h["eps"]} | CODE
    basis = "sgd" if h["proj_type"].endswith("sgd") else "adam"
    return OnlineSubspaceDescent, {
        "rank": run["rank"],
        "every": h["update_proj_gap"],
        "scale": h["scale"],
        "basis": basis,
        "eps": h["eps"],
    } | CODE


def qgalore(run: Run, h: dict[str, Any]) -> tuple[type[Subspace], dict[str, Any]]:
    if not h["quant"]:
        return GaLore, {"rank": run["rank"], "every": h["update_proj_gap"], "scale": h["scale"], "eps": h["eps"]}
    return QGaLore, {"rank": run["rank"], "every": h["update_proj_gap"], "scale": h["scale"], "eps": h["eps"]} | CODE


def dct(run: Run, h: dict[str, Any]) -> tuple[type[Subspace], dict[str, Any]]:
    options = {"rank": run["rank"], "every": h["update_proj_gap"], "norm": f"l{h['ell_norm']}"}
    return DCTAdamW, options | CODE | {"rotate": h["rotate_subspace"], "feedback": h["use_ef"], "eps": h["eps"]}


ADJUSTED = {"kj": "original", "none": "none", None: "original", "match_rms_adamw": "match_rms_adamw"}


def trion(run: Run, h: dict[str, Any]) -> tuple[type[Subspace], dict[str, Any]]:
    precision = "bfloat16" if "bf16" in run["variant"] else "full"
    return Trion, {"rank": run["rank"], "mu": h["momentum"], "adjust": ADJUSTED[h["scaling_type"]], "precision": precision}


def muon(run: Run, h: dict[str, Any]) -> tuple[type[Subspace], dict[str, Any]]:
    precision = "bfloat16" if "bf16" in run["variant"] else "full"
    adjust = ADJUSTED[h["adjust_lr_fn"]]
    return Muon, {"momentum": h["momentum"], "nesterov": h["nesterov"], "adjust": adjust, "precision": precision}


def mofasgd(run: Run, h: dict[str, Any]) -> tuple[type[Subspace], dict[str, Any]]:
    spectrum = "ones" if h["use_ones_for_nonzero_s"] else "reciprocal"
    rest = h["eta2"] or None
    return MoFaSGD, {"rank": run["rank"], "beta": h["beta"], "spectrum": spectrum, "largest": h["max_value"], "rest_scale": rest}


def adalomo(run: Run, h: dict[str, Any]) -> tuple[type[Subspace], dict[str, Any]]:  # noqa: ARG001
    assert h["eps"][0] == 1e-30 and h["decay_rate"] == -0.8
    return AdaLomo, {"clip": h["clip_threshold"], "relative": h["eps"][1]}


def dion(run: Run, h: dict[str, Any]) -> tuple[type[Subspace], dict[str, Any]]:
    side = "left" if "simple" in run["method"] else "larger"
    return Dion, {"rank": run["rank"], "mu": h["mu"], "side": side, "eps": h["epsilon"]}


OPTIONS: dict[str, Callable[[Run, dict[str, Any]], tuple[type[Subspace], dict[str, Any]]]] = {
    "galore": galore,
    "golore": golore,
    "flora": flora,
    "fira": fira,
    "apollo": apollo,
    "frugal": frugal,
    "ldadam": ldadam,
    "coap": coap,
    "osd": osd,
    "qgalore": qgalore,
    "dct": dct,
    "trion": trion,
    "torchmuon": muon,
    "mofasgd": mofasgd,
    "dion": dion,
    "adalomo": adalomo,
}
OURS = {"osd": "online_subspace", "qgalore": "q_galore", "dct": "dct_adamw", "torchmuon": "muon"}  # where the name is another
LEFT_OUT = {
    "Flora__accumulation_sketch": "no trajectory; test_sketched_accumulation",
    "torchMuon__newton_schulz_reference": "no trajectory; test_newton_schulz",
    "Trion__ns_schedule5": "no trajectory; test_newton_schulz",
    "osd_adamw__continuous_lion_gap200__24x40_r4": "Lion for the projector is left out",
    "osd_adamw__continuous_adafactor_gap200__24x40_r4": "Adafactor for the projector is left out",
    "qgalore__int8P__24x40_r4": "the projector has 4 bits here",
    "qgalore_int8w__sr__24x40_r4": "weights in codes; test_int8_weights",
    "qgalore_int8w__round__24x40_r4": "weights in codes; test_int8_weights",
    "DCTAdamW__gap5_rot_ef_makhoul__A": "rows of the cosine matrix in the place of its columns",
    "DCTAdamW__gap5_rot_ef_rqr__A": "a random orthogonal matrix in the place of the cosines",
    "DCTAdamW__gap5_rot_ef_q8__A": "an error in 16 levels",
    "DCTAdamW__gap5_rot_ef_q4__A": "an error whose codes are unpacked in another order than packed",
    "MoFaSGD__ones_nesterov__A": "a gradient that enters the momentum twice",
    "MoFaSGD__recip_eta2_cur__A": "the rest of the gradient outside the new factors, not those that met it",
}


def method_of(run: Run) -> str:
    """The key of OPTIONS."""
    return next(method for method in OPTIONS if run["method"].lower().startswith(method))


def name_of(run: Run) -> str:
    """The method in the registry whose rule the run is: some of another method's options are GaLore."""
    method = method_of(run)
    if OPTIONS[method](run, run["hyper"])[0] is GaLore:
        return "galore"
    return "apollo_mini" if run["method"].startswith("apollo_mini") else OURS.get(method, method)


class CosineRows(Cosines):
    """Trion's code takes rows of the cosine matrix where a matrix has fewer rows than columns."""

    def dense(self, like: Tensor) -> Dense:
        return Dense(dct_matrix(like.shape[-1], like.dtype, like.device)[self.J].mT)


def by_directions(self: FourBit, like: Tensor) -> Dense:
    """In the place of ``FourBit.dense``: codes in the layout of the published code where it projects the right side, (r, n)."""
    N = like.shape[-1]
    codes = Codes(unpack(self.packed, 2 * len(self.packed)).reshape(len(self.scale), -1), self.scale, self.zero)
    return Dense(dequantize(codes, (-1, N)).mT)


def coded(run: Run, t: int) -> FourBit:
    scale, zero = latest(run, "Pscale", t), latest(run, "Pzero", t)
    gap = int(array(run, "gap")[t]) if "gap" in run["keys"] else run["hyper"]["update_proj_gap"]
    return FourBit(pack(latest(run, "Pcode", t).to(torch.uint8)), scale, zero.to(torch.uint8), gap, torch.zeros(0))


def injected(run: Run, G: Tensor, W0: Tensor) -> Callable[[str, int], Frame | None] | None:
    """The frames that must be given: all where the published code drew them, the first where it began in a way of its own."""
    method, h = method_of(run), run["hyper"]
    tall = run["shape"][0] >= run["shape"][1]
    if method == "coap":
        period = h["update_interval"] * h["reproject_factor"]
        return lambda _, t: frame(run, t) if t % period == 0 else None  # signs of singular vectors; ours takes the steps between
    if method == "osd" and h["proj_type"] != "random":
        return lambda _, t: frame(run, t) if t == 0 else None
    if method == "qgalore" and h["quant"]:
        return lambda _, t: coded(run, t)
    if method == "dct":
        return lambda _, t: Cosines(array(run, "idx")[t].long())
    if method == "trion":
        return lambda _, t: (Cosines if tall else CosineRows)(array(run, "idx")[t].long())
    if method == "mofasgd":
        U, s, Vh = torch.linalg.svd(W0, full_matrices=False)
        r = run["rank"]
        first = followed(Factors(U[:, :r], Vh[:r].mT, s[:r]), G, h["beta"])
        return lambda _, t: first if t == 0 else None
    if method == "dion":
        oriented = G.mT if "simple" in run["method"] or tall else G
        Q = array(run, "Q0")
        iterate = Iterate(torch.linalg.qr(oriented.mT @ Q)[0], Q)
        return lambda _, t: iterate if t == 0 else None
    if any(key.startswith(("P", "I")) for key in run["keys"]) and method != "ldadam":
        return lambda _, t: frame(run, t)
    return None
