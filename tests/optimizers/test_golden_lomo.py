"""(d) Recorded runs of LOMO and AdaLomo, read in place: fused into the backward pass of a net of two layers, clipped by the norm of all
gradients in two passes where they were, and AdaLomo on given gradients. One of the latter is also in tests/golden."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from optimizers import LOMO, AdaLomo, Subspace, per_layer
from tests.optimizers.replays import adalomo
from tests.optimizers.test_communication import RECORDED

METHODS: dict[str, tuple[str, type[Subspace]]] = {
    "LOMO": ("lomo", LOMO),
    "AdaLomo": ("adalomo", AdaLomo),
    "AdaLOMO_pytorch_optimizer": ("adalomo", AdaLomo),
}
TOLERANCE = 5e-6  # of the index
Run = dict[str, Any]


@cache
def recorded() -> list[Run]:
    """The index's entries, none where the runs are not at hand."""
    if not (RECORDED / "index.json").exists():
        return []
    return [run for run in json.loads((RECORDED / "index.json").read_text())["runs"] if run["method"] in METHODS]


def cases(nets: bool) -> list[Any]:
    found = [run for run in recorded() if isinstance(run["shape"], dict) == nets]
    marks = [pytest.mark.check("d", METHODS[run["method"]][0]) for run in found]
    held = [pytest.param(run, id=run["file"].removesuffix(".npz"), marks=mark) for run, mark in zip(found, marks, strict=True)]
    return held or [pytest.param({}, id="none", marks=pytest.mark.skip(f"the recorded runs are not at hand: {RECORDED} does not exist"))]


def arrays(file: str) -> dict[str, Tensor]:
    with np.load(RECORDED / file) as held:
        return {key: torch.tensor(held[key]) for key in held.files}


def net_of(data: dict[str, Tensor]) -> nn.Sequential:
    """y = W₂(W₁x + b₁) + b₂, with biases where there are some."""
    biased = "b1_0" in data
    layers = [nn.Linear(data[f"W{i}_0"].shape[1], data[f"W{i}_0"].shape[0], bias=biased) for i in (1, 2)]
    for i, layer in enumerate(layers, 1):
        layer.weight = nn.Parameter(data[f"W{i}_0"].clone())
        if biased:
            layer.bias = nn.Parameter(data[f"b{i}_0"].clone())
    return nn.Sequential(*layers)


@pytest.mark.parametrize("run", cases(nets=True))
def test_nets_trained_inside_the_backward_pass(run: Run) -> None:
    """Weights, biases, losses and norms of all gradients, and the factors of the clipping, at every step."""
    data, h = arrays(run["file"]), run["hyper"]
    net = net_of(data)
    optimizer = METHODS[run["method"]][1](net.named_parameters(), h["lr"], weight_decay=h.get("weight_decay", 0.0))
    clip = h.get("clip_grad_norm")
    handle, clipped = per_layer(optimizer, clip_total=clip), 0
    names = {"0.weight": "W1", "1.weight": "W2", "0.bias": "b1", "1.bias": "b2"}
    for t in range(run["T"]):
        loss = F.mse_loss(net(data["X"][t]), data["Y"][t])
        assert abs(float(loss.detach()) - float(data["losses"][t])) <= TOLERANCE
        norm = handle.backward(loss)
        assert all(p.grad is None for p in net.parameters())
        optimizer.step()
        assert (norm is None) == (clip is None)
        if norm is not None:
            factor = min(1.0, clip / (norm + 1e-6))
            assert abs(norm - float(data["gnorm_pre"][t])) <= TOLERANCE and abs(factor - float(data["clip_coef"][t])) <= TOLERANCE
            clipped += factor < 1
        for name, p in net.named_parameters():
            assert float((p.detach() - data[f"{names[name]}s"][t]).abs().max()) <= TOLERANCE, f"{name}, step {t}"
    assert clip is None or clipped > 0
    for name, p in net.named_parameters():
        assert float((p.detach() - data[f"{names[name]}_0"]).abs().max()) > 100 * TOLERANCE


@pytest.mark.parametrize("run", cases(nets=False))
def test_given_gradients(run: Run) -> None:
    """Their means of rows and columns too."""
    shared, data, h = arrays("problems.npz"), arrays(run["file"]), run["hyper"]
    start = shared[f"W0_{run['case']}"]
    p = nn.Parameter(start.clone())
    made, options = adalomo(run, h)
    optimizer = made([p], lr=h["lr"], weight_decay=h.get("weight_decay", 0.0), **options)
    per_layer(optimizer)
    for t, G in enumerate(shared[f"grads_{run['case']}"]):
        (p * G).sum().backward()
        optimizer.step()
        assert float((p.detach() - data["Ws"][t]).abs().max()) <= TOLERANCE, f"step {t}"
    assert float((p.detach() - start).abs().max()) > 100 * TOLERANCE
    for name, key in (("exp_avg_sq_row", "row_state"), ("exp_avg_sq_col", "col_state")):
        torch.testing.assert_close(optimizer.state[p][name], data[key], rtol=1e-5, atol=0)
