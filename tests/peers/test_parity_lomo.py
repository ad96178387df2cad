"""(c) LOMO and AdaLomo beside published packages: equal nets of two layers trained inside the backward pass, on equal batches in float32."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from optimizers import LOMO, AdaLomo, per_layer
from tests.peers.side_by_side import ROUNDING, STEPS

PACKAGES = {"lomo_optim": {"lomo": "Lomo", "adalomo": "AdaLomo"}, "pytorch_optimizer": {"lomo": "LOMO", "adalomo": "AdaLOMO"}}


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """lomo-optim puts what it collects on a GPU."""
    monkeypatch.setattr(Tensor, "cuda", lambda self, *_, **__: self)


def nets() -> tuple[nn.Sequential, nn.Sequential]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(40, 24), nn.Tanh(), nn.Linear(24, 11))
    return net, copy.deepcopy(net)


def apart(ours: nn.Sequential, step: Any, theirs: nn.Sequential, peer_step: Any) -> float:
    """Largest difference of two weights or biases after any step, in units of the largest distance that one has moved at the end."""
    start, worst, moved = [p.detach().clone() for p in theirs.parameters()], 0.0, 0.0
    for t in range(STEPS):
        X = torch.randn(16, 40, generator=torch.Generator().manual_seed(t))
        for net, once in ((theirs, peer_step), (ours, step)):
            once(lambda net=net: (net(X) - X[:, :11].sin() * 3).square().mean())
        worst = max(worst, *(float((p - q).detach().abs().max()) for p, q in zip(ours.parameters(), theirs.parameters(), strict=True)))
    moved = max(float((q.detach() - before).abs().max()) for q, before in zip(theirs.parameters(), start, strict=True))
    assert moved > 0.01
    return worst / moved


@pytest.mark.parametrize("package", PACKAGES)
@pytest.mark.parametrize("decay, clip", [(0.0, None), (0.1, None), (0.1, 0.3)])
@pytest.mark.parametrize(
    "name, kind, lr",
    [
        pytest.param("lomo", LOMO, 0.1, marks=pytest.mark.check("c", "lomo")),
        pytest.param("adalomo", AdaLomo, 0.02, marks=pytest.mark.check("c", "adalomo")),
    ],
)
def test_published_packages(name: str, kind: Any, lr: float, decay: float, clip: float | None, package: str) -> None:
    """Clipped by the norm of all gradients, which takes two passes there too. pytorch_optimizer's LOMO has no decay, whatever it is given."""
    ours, theirs = nets()
    decay = 0.0 if (package, name) == ("pytorch_optimizer", "lomo") else decay
    made = getattr(pytest.importorskip(package), PACKAGES[package][name])
    peer = made(theirs, lr=lr, clip_grad_norm=clip, **({"weight_decay": decay} if decay else {}))
    optimizer = kind(ours.named_parameters(), lr, weight_decay=decay)
    handle = per_layer(optimizer, clip_total=clip)

    def step(loss: Any) -> None:
        handle.backward(loss())
        optimizer.step()

    def peer_step(loss: Any) -> None:
        if clip is not None:
            peer.grad_norm(loss())
        peer.fused_backward(loss(), lr)

    assert apart(ours, step, theirs, peer_step) < ROUNDING
