"""(d) Recorded trajectories of the published implementations, replayed with the draws they used (tests/golden/index.json)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from estimators import lift, sketch
from optimizers import Int8Linear, QGaLore, quantized
from optimizers.frames import Cosines
from optimizers.learned import sketched_directions
from optimizers.orthogonal import newton_schulz
from optimizers.q_galore import FourBit
from optimizers.selections import AlignedCosines
from tests.optimizers.replays import (
    INDEX,
    LEFT_OUT,
    OPTIONS,
    FullAdafactor,
    Run,
    array,
    by_directions,
    coded,
    frame,
    injected,
    method_of,
    name_of,
)

CASES = [pytest.param(run, id=run["name"], marks=pytest.mark.check("d", name_of(run))) for run in INDEX if run["name"] not in LEFT_OUT]
BF16 = {"torchmuon": 4e-3, "trion": 1e-3}  # Newton–Schulz in bfloat16 depends on the products of the machine; so the index


def named(name: str) -> Run:
    return next(run for run in INDEX if run["name"] == name)


def test_what_is_left_out_is_there() -> None:
    assert {run["name"] for run in INDEX} > set(LEFT_OUT)


@pytest.mark.parametrize("run", CASES)
def test_replays(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    h, method = run["hyper"], method_of(run)
    make, options = OPTIONS[method](run, h)
    tolerance = BF16[method] if "bf16" in run["variant"] else run["tolerance"]
    decays = not (make is FullAdafactor or "sgd" in run["method"].lower())
    suffixes = [""] if "W0" in run["keys"] else [f"__{i}" for i in range(len(run["shape"]))]
    parameters = [nn.Parameter(array(run, f"W0{suffix}")) for suffix in suffixes]
    gradients = [array(run, f"grads{suffix}") for suffix in suffixes]
    lrs = array(run, "lrs").tolist() if "lrs" in run["keys"] else [h["lr"]] * len(gradients[0])
    optimizer = make(parameters, lr=lrs[0], **options, **({"weight_decay": h.get("weight_decay", 0.0)} if decays else {}))
    optimizer.param_groups[0]["initial_lr"] = lrs[0] if "lrs" not in run["keys"] else 0.01
    optimizer.inject = injected(run, gradients[0][0], array(run, f"W0{suffixes[0]}"))
    if method == "qgalore" and run["shape"][0] >= run["shape"][1]:
        monkeypatch.setattr(FourBit, "dense", by_directions)
    for t, lr in enumerate(lrs):
        optimizer.param_groups[0]["lr"] = lr
        if "Rot" in run["keys"]:  # a permutation that was rounded, so that new columns begin at 1e-8 of others' second moments
            R = array(run, "Rot")[t]
            monkeypatch.setattr(Cosines, "change", lambda *_, R=R: R.mT if run["shape"][0] < run["shape"][1] else R)
        for p, G in zip(parameters, gradients, strict=True):
            p.grad = G[t].clone()
        optimizer.step()
        if t in run["steps"]:
            for p, suffix in zip(parameters, suffixes, strict=True):
                expected = array(run, f"Ws{suffix}")[run["steps"].index(t)]
                assert float((p.detach() - expected).abs().max()) <= tolerance, f"step {t}"
    assert all(float((p.detach() - array(run, f"W0{s}")).abs().max()) > 10 * tolerance for p, s in zip(parameters, suffixes, strict=True))


@pytest.mark.check("d", "coap")
@pytest.mark.parametrize("name", ["coap_adamw__ui5_rf2__24x40_r4", "coap_adamw__ui5_rf2__32x32_r8"])
def test_coaps_first_sketch(name: str) -> None:
    """From the recorded Gaussian matrix to the recorded subspace."""
    run = named(name)
    G = array(run, "grads")[0]
    G, P = (G.mT if G.shape[0] < G.shape[1] else G), frame(run, 0)
    V = sketched_directions(G, array(run, "omega_0"))
    torch.testing.assert_close(V @ V.mT, P.lift(P.sketch(torch.eye(len(V))), V), rtol=0, atol=2e-5)


@pytest.mark.check("d", "dct_adamw")
@pytest.mark.parametrize("name", ["DCTAdamW__gap5__A", "DCTAdamW__gap5__C", "DCTAdamW__gap5_rot_ef_l2__A"])
def test_the_columns_that_are_chosen(name: str) -> None:
    run = named(name)
    norm = "l2" if run["hyper"]["ell_norm"] == 2 else "l1"
    G = array(run, "grads")[0]
    chosen = AlignedCosines(run["rank"], norm).choose(G.mT if G.shape[0] < G.shape[1] else G, None)  # pyright: ignore[reportArgumentType]
    assert isinstance(chosen, Cosines)
    assert chosen.J.tolist() == sorted(array(run, "idx")[0].tolist())


@pytest.mark.check("d", "q_galore")
@pytest.mark.parametrize("kind", ["sr", "round"])
def test_int8_weights(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights that live in codes between steps, rounded with the recorded numbers."""
    run = named(f"qgalore_int8w__{kind}__24x40_r4")
    W0, h = array(run, "W0"), run["hyper"]
    linear = nn.Linear(W0.shape[1], W0.shape[0], bias=False)
    linear.weight = nn.Parameter(W0)
    layer = Int8Linear(linear, h["wgroup"])
    torch.testing.assert_close(layer.read(), array(run, "W0deq"), rtol=0, atol=1e-7)
    options = OPTIONS["qgalore"](run, h)[1]
    optimizer = QGaLore([layer.weight], lr=h["lr"], **options, rounding="nearest")
    optimizer.inject = lambda _, t: coded(run, t)
    store: Any = layer.store
    monkeypatch.setattr(quantized, "whole_grid", quantized.nearest_grid)  # there one end is cut, and rounded inwards
    for t, G in enumerate(array(run, "grads")):
        uniform = array(run, f"rand_{t}") if kind == "sr" else None
        layer.__dict__["store"] = lambda W, generator, uniform=uniform: store(W, generator, uniform)
        layer.weight.grad = G.clone()
        optimizer.step()
        if t in run["steps"]:
            difference = (layer.read() - array(run, "Ws")[run["steps"].index(t)]).abs()
            step = float(torch.as_tensor(layer.scale).max())  # a code apart where rounding of the update decides
            assert float((difference > run["tolerance"]).float().mean()) < 0.005 and float(difference.max()) < 1.01 * step, f"step {t}"
    assert float((layer.read() - W0).abs().max()) > 0.01


@pytest.mark.check("d", "muon")
@pytest.mark.check("d", "trion")
def test_newton_schulz() -> None:
    reference, schedule = named("torchMuon__newton_schulz_reference"), named("Trion__ns_schedule5")
    seen = 0
    for key in reference["keys"]:
        if key.startswith("fp32_steps"):
            steps, case = int(key.split("_")[1].removeprefix("steps")), key[-1]
            X = array(schedule, f"in_{case}")
            expected = array(reference, key)
            torch.testing.assert_close(newton_schulz(X, steps), expected, rtol=0, atol=1e-5)
            seen += 1
    assert seen >= 8


@pytest.mark.check("d", "flora")
@pytest.mark.parametrize("case", "ABCD")
def test_sketched_accumulation(case: str) -> None:
    """Flora's accumulated gradient is a sum of sketches, lifted once."""
    run = named("Flora__accumulation_sketch")
    grads, A = array(run, f"grads_{case}"), array(run, f"A_{case}")
    wide = grads.shape[-2] < grads.shape[-1]
    G, V = (grads.mT, A.mT) if wide else (grads, A)
    total = sketch(G, V).sum(0)
    expected, lifted = array(run, f"pack_{case}"), array(run, f"lift_{case}")
    torch.testing.assert_close(total.mT if wide else total, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lift(total, V).mT if wide else lift(total, V), lifted, rtol=1e-5, atol=1e-4)
