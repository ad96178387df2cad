"""(c) The rest of the family beside published packages: Muon, Q-GaLore, DCT-AdamW, Trion, BAdam.

The other methods are verified in the other ways (tests/optimizers).
"""

from __future__ import annotations

import copy
import itertools
import sys
from functools import partial
from importlib.util import find_spec
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from experiments.training.packages import part_of
from optimizers import BAdam, DCTAdamW, Int8Linear, Muon, QGaLore, Trion, orthogonal, quantized
from optimizers.frames import Cosines
from optimizers.q_galore import FourBit
from optimizers.quantized import pack
from tests.optimizers.replays import CosineRows, by_directions
from tests.peers.side_by_side import EVERY, RANK, ROUNDING, SHAPES, STEPS, apart, gradients, pair
from tests.peers.test_eight_bit import ONE_CODE_STEP

MUON: list[dict[str, Any]] = [
    {"lr": 0.01, "weight_decay": 0.0},
    {"lr": 0.01, "weight_decay": 0.1, "nesterov": False},
    {"lr": 0.01, "weight_decay": 0.1, "momentum": 0.8},
]
WIDE = [shape for shape in SHAPES if shape[0] < shape[1]]


@pytest.fixture
def in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Newton–Schulz of others, who call ``bfloat16()``, in float32: on a copy as there, since they go on in place."""
    monkeypatch.setattr(torch.Tensor, "bfloat16", Tensor.clone)


# Muon


@pytest.mark.check("c", "muon")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("adjust", ["original", "match_rms_adamw"])
@pytest.mark.parametrize("h", MUON)
@pytest.mark.parametrize("precision", ["full", "bfloat16"])
def test_torch_muon(
    shape: tuple[int, int],
    adjust: str,
    h: dict[str, Any],
    precision: str,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if precision == "full":
        request.getfixturevalue("in_float32")
    monkeypatch.setattr(orthogonal, "multiplies_sixteen_bit", lambda _: True)  # the plain way, as torch's
    p, q = pair(shape)
    peer = torch.optim.Muon([q], adjust_lr_fn=adjust, **h)
    assert apart(Muon([p], adjust=adjust, precision=precision, **h), p, peer, q) < ROUNDING


@pytest.mark.check("c", "muon")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("adjust", ["original", "match_rms_adamw"])
@pytest.mark.parametrize("h", MUON)
@pytest.mark.parametrize("name", ["Muon", "DistributedMuon"])
def test_pytorch_optimizer_muon(name: str, shape: tuple[int, int], adjust: str, h: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Newton–Schulz in float32: in bfloat16 it depends on the layout of tall matrices, which it copies. The distributed one as the only process."""
    package: Any = pytest.importorskip("pytorch_optimizer")
    muon = package.optimizer.muon
    monkeypatch.setattr(muon.base, "zero_power_via_newton_schulz_5", partial(muon.base.zero_power_via_newton_schulz_5, dtype=torch.float32))
    for function, result in (("get_world_size", 1), ("get_rank", 0), ("all_gather", None)):
        monkeypatch.setattr(muon.distributed_muon, function, lambda *_, result=result: result)
    p, q = pair(shape)
    peer = getattr(package, name)([{"params": [q], "use_muon": True}], use_adjusted_lr=adjust == "match_rms_adamw", **h)
    assert apart(Muon([p], adjust=adjust, precision="full", **h), p, peer, q) < ROUNDING


# Q-GaLore


def q_galore(q: nn.Parameter, monkeypatch: pytest.MonkeyPatch, smallest: int = 4096, **options: Any) -> torch.optim.Optimizer:
    """The form that keeps codes of weights as float32: the other hands bitsandbytes by position what has moved since, and fails. This one too waits
    for a GPU at every parameter, and needs ``args`` for what moved."""
    pytest.importorskip("bitsandbytes")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
    if q.shape[0] >= q.shape[1]:
        monkeypatch.setattr(FourBit, "dense", by_directions)
    arguments = SimpleNamespace(optim_bits=8, min_8bit_size=smallest, max_unorm=0.0, skip_zeros=False)
    own = {"lr": 0.01, "weight_decay": 0.0, "rank": RANK, "update_proj_gap": EVERY, "proj_type": "std", "scale": 0.25} | options
    lazy = {"quant": True, "quant_n_bit": 4, "quant_group_size": 32, "cos_threshold": 0.4, "gamma_proj": 2, "queue_size": 5}
    return pytest.importorskip("q_galore_torch").QGaLoreAdamW8bit_simulate([{"params": [q]} | lazy | own], args=arguments)


def codes_of(peer: torch.optim.Optimizer, q: nn.Parameter) -> FourBit:
    """Its codes as they are: a group whose numbers have one sign has another zero there."""
    P = peer.state[q]["projector"]
    codes = P.ortho_matrix.to(torch.uint8)
    return FourBit(pack(codes), P.ortho_matrix_scales, P.ortho_matrix_zeros.to(torch.uint8), P.update_proj_gap, torch.zeros(0))


@pytest.mark.check("c", "q_galore")
@pytest.mark.parametrize("shape", [*SHAPES, (64, 96)])
@pytest.mark.parametrize("smallest", [4096, 0])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_q_galore_torch(shape: tuple[int, int], smallest: int, decay: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Moments of these sizes are float32 by default."""
    p, q = pair(shape)
    peer = q_galore(q, monkeypatch, smallest, weight_decay=decay)
    common: dict[str, Any] = {"lr": 0.01, "rank": RANK, "every": EVERY, "scale": 0.25, "weight_decay": decay}
    ours = QGaLore([p], smallest_8bit=smallest, variant="reference-code", **common)
    ours.inject = lambda *_: codes_of(peer, q)
    assert apart(ours, p, peer, q) < (ROUNDING if smallest else ONE_CODE_STEP)


@pytest.mark.check("c", "q_galore")
@pytest.mark.parametrize("shape", SHAPES)
def test_q_galore_torch_doubles_its_period(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """After any cosine, with a threshold below all of them: refreshes at 0, 3, 6, 12 and 24, from the package's gaps; by our rule too."""
    p, q = pair(shape)
    peer = q_galore(q, monkeypatch, update_proj_gap=3, queue_size=1, cos_threshold=-1.0)
    ours, asked = QGaLore([p], lr=0.01, rank=RANK, every=3, scale=0.25, kept=1, threshold=-1.0, variant="reference-code"), []

    def given(_: str, step: int) -> FourBit:
        asked.append(step)
        return codes_of(peer, q)

    ours.inject = given
    assert apart(ours, p, peer, q) < ROUNDING
    assert asked == [0, 3, 6, 12, 24]
    (r,) = (torch.nn.Parameter(torch.zeros(shape)),)
    alone, gaps = QGaLore([r], lr=0.01, rank=RANK, every=3, kept=1, threshold=-1.0, variant="reference-code"), []
    for G in gradients(shape)[:25]:
        r.grad = G
        alone.step()
        gaps.append(alone.state[r]["gap"])
    assert [t for t, (old, new) in enumerate(itertools.pairwise([0, *gaps])) if old != new] == [0, 3, 6, 12, 24]


@pytest.mark.check("c", "q_galore")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("stochastic", [True, False])
def test_q_galore_torch_with_weights_in_codes(shape: tuple[int, int], stochastic: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A code apart where rounding of the update decides, in less than one number of 200. In its grid, which cuts one end of every group."""
    monkeypatch.setattr(quantized, "whole_grid", quantized.nearest_grid)
    linear = nn.Linear(shape[1], shape[0], bias=False)
    linear.weight = nn.Parameter(pair(shape)[0].detach())
    layer = Int8Linear(linear, 32)
    q: Any = nn.Parameter(layer.read())
    q.group_size, q.stochastic_round = 32, stochastic
    start, drawn = layer.read(), []
    generator = torch.Generator().manual_seed(3)
    monkeypatch.setattr(torch, "rand_like", lambda x: drawn.append(torch.rand(x.shape, generator=generator)) or drawn[-1])
    peer = q_galore(q, monkeypatch)
    ours = QGaLore([layer.weight], lr=0.01, rank=RANK, every=EVERY, scale=0.25, rounding="nearest", variant="reference-code")
    ours.inject = lambda *_: codes_of(peer, q)
    store: Any = layer.store
    layer.__dict__["store"] = lambda W, _: store(W, uniform=drawn[-1] if stochastic else None)
    for G in gradients(shape):
        q.grad, layer.weight.grad = G.clone(), G.clone()
        peer.step()
        ours.step()
        difference = (layer.read() - q).detach().abs()
        step = float(torch.as_tensor(layer.scale).max())
        assert float((difference > 1e-6).float().mean()) < 0.005 and float(difference.max()) < 1.01 * step
    assert float((layer.read() - start).abs().max()) > 0.01 and len(drawn) == (STEPS if stochastic else 0)


# DCT-AdamW and Trion


def ista(name: str) -> Any:
    """A module of a package whose others need a GPU."""
    if find_spec("ista_daslab_optimizers") is None:
        pytest.skip("ista_daslab_optimizers is not installed")
    return part_of("ista_daslab_optimizers", f"fft_low_rank.{name}")


@pytest.mark.check("c", "dct_adamw")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("every", [1, 5])
@pytest.mark.parametrize("rotate", [True, False])
@pytest.mark.parametrize("feedback", [True, False])
@pytest.mark.parametrize("norm", [1, 2])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_ista_dct_adamw(
    shape: tuple[int, int], every: int, rotate: bool, feedback: bool, norm: int, decay: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It writes a product over its own factor, which leaves zeros on a CPU, of a permutation that is rounded: here beside it, and exact. Columns are
    our own choice, except where moments are kept by place: it has them in no order. With a large ε: a small one makes steps of the roundings that
    error feedback leaves in columns just chosen."""
    package = ista("dct_adamw")
    projector, rotation = package.FFTLowRankProjector, package.FFTLowRankProjector.get_subspace_rotation_matrix

    def rotated(self: Any, R: Tensor, w: Tensor) -> None:
        w.copy_(w @ R if self.is_right_proj else R @ w)

    monkeypatch.setattr(projector, "rotate_subspace", rotated)
    monkeypatch.setattr(projector, "get_subspace_rotation_matrix", lambda self, Q: rotation(self, Q).round())
    p, q = pair(shape)
    common: dict[str, Any] = {"lr": 0.01, "weight_decay": decay, "rank": RANK, "eps": 0.1}
    options = {"use_ef": feedback, "rotate_subspace": rotate, "ell_norm": norm, "update_proj_gap": every}
    peer = package.DCTAdamW([q], proj="dct", **options, **common)
    own: dict[str, Any] = {"rotate": rotate, "feedback": feedback, "norm": f"l{norm}", "every": every, "variant": "reference-code"}
    ours = DCTAdamW([p], **own, **common)
    if not rotate:
        ours.inject = lambda *_: Cosines(peer.state[q]["fft-low-rank-projector"].indices_crt.long())
    assert apart(ours, p, peer, q) < ROUNDING


@pytest.mark.check("c", "trion")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scaling, adjust", [("kj", "original"), ("none", "none"), ("kimi", "match_rms_adamw"), ("dion", "spectral")])
@pytest.mark.parametrize("h", [{"momentum": 0.95, "weight_decay": 0.0}, {"momentum": 0.8, "weight_decay": 0.1}])
@pytest.mark.usefixtures("in_float32")
def test_ista_trion(shape: tuple[int, int], scaling: str, adjust: str, h: dict[str, float], monkeypatch: pytest.MonkeyPatch) -> None:
    """It cannot run as it stands: it gets the three names that it uses and does not define, and stand-ins for wandb, for its Triton kernel, which
    are not used, and for other processes. Columns are our own choice, except of wide matrices, where it takes rows."""
    for absent in ("wandb", "ista_daslab_optimizers.utils.newton_schulz_triton"):
        monkeypatch.setitem(sys.modules, absent, ModuleType(absent))
    monkeypatch.setattr(sys.modules["ista_daslab_optimizers.utils.newton_schulz_triton"], "newton_schulz_triton", None, raising=False)
    package = ista("trion")
    alone = SimpleNamespace(get_world_size=lambda: 1, get_rank=lambda: 0, all_gather=lambda **_: None)
    dct = lambda size, dtype, device, **_: package.dct3_matrix(size, dtype, device)  # noqa: E731
    for name, value in {"dist": alone, "get_dct_matrix": dct, "device": torch.device("cpu"), "dtype": torch.float32}.items():
        monkeypatch.setattr(package, name, value, raising=False)
    p, q = pair(shape)
    theirs = {"params": [q], "use_muon": True, "lr": 0.01, "rank": RANK, "ns_type": "torch", "scaling_type": scaling}
    peer = package.Trion([theirs | h])
    ours = Trion([p], lr=0.01, rank=RANK, mu=h["momentum"], weight_decay=h["weight_decay"], adjust=adjust, precision="full")
    if shape in WIDE:
        ours.inject = lambda *_: CosineRows(peer.param_groups[0]["lowrank_indices"][0].long())
    assert apart(ours, p, peer, q) < ROUNDING


# BAdam


class Residual(nn.Module):
    """Three blocks of two matrices."""

    def __init__(self) -> None:
        super().__init__()
        block = lambda: nn.ModuleDict({"up": nn.Linear(12, 20, bias=False), "down": nn.Linear(20, 12, bias=False)})  # noqa: E731
        self.layers = nn.ModuleList(block() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            parts: Any = layer
            x = x + parts["down"](torch.tanh(parts["up"](x)))
        return x


@pytest.mark.check("c", "badam")
@pytest.mark.parametrize("order", ["descending", "ascending", "random"])
@pytest.mark.parametrize("h", [{"lr": 0.01, "weight_decay": 0.0}, {"lr": 0.003, "weight_decay": 0.1, "betas": (0.8, 0.95)}])
@pytest.mark.filterwarnings("ignore:BAdam expect model:UserWarning")
def test_badam(order: str, h: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The same weights to the last bit, and the same blocks open at every step. Its first turn is a step shorter: our clock begins at 1."""
    package = pytest.importorskip("badam")
    mine = Residual()
    theirs = copy.deepcopy(mine)
    torch.manual_seed(0)  # of its order
    base = torch.optim.AdamW(theirs.parameters(), foreach=False, **h)
    peer = package.BlockOptimizer(base, list(theirs.named_parameters()), switch_block_every=5, switch_mode=order, verbose=0)
    if order == "random":
        monkeypatch.setattr("optimizers.sampling.in_turn", lambda *_: {int(peer.active_param_prefixs[0].split(".")[1])})
    ours = BAdam([{"params": list(mine.named_parameters())}], every=5, order=order, **h)
    ours.param_groups[0]["clock"] = 1
    start = [p.detach().clone() for p in mine.parameters()]
    generator = torch.Generator().manual_seed(7)
    for x, y in torch.randn(STEPS, 2, 16, 12, generator=generator):
        for model, optimizer in ((theirs, peer), (mine, ours)):
            model.zero_grad()
            (model(x) - y).square().mean().backward()
            optimizer.step()
        for p, q in zip(mine.parameters(), theirs.parameters(), strict=True):
            assert torch.equal(p, q) and p.requires_grad == q.requires_grad
    assert all(float((p - before).detach().abs().max()) > 0.005 for p, before in zip(mine.parameters(), start, strict=True))
