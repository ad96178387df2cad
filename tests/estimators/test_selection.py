"""Which layers are converted, which are left alone and for what stated reason, and what wrong input says."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from estimators import HaarStiefel, LowRankLinear, convert
from estimators.selection import rank_of, replace


class Zoo(nn.Module):
    """One layer of every kind that is told apart."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = nn.Linear(8, 6)
        self.block = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 6, bias=False))
        self.embedding = nn.Embedding(10, 6)
        self.norm = nn.LayerNorm(6)
        self.conv = nn.Conv1d(6, 6, 3)
        self.small = nn.Linear(2, 6)
        self.thin = nn.Linear(8, 2)
        self.frozen = nn.Linear(6, 6)
        self.frozen.requires_grad_(False)
        self.hooked = nn.Linear(6, 6)
        self.hooked.register_forward_hook(lambda *_: None)
        self.prehooked = nn.Linear(6, 6)
        self.prehooked.register_forward_pre_hook(lambda *_: None)
        self.backhooked = nn.Linear(6, 6)
        self.backhooked.register_full_backward_hook(lambda *_: None)
        self.backprehooked = nn.Linear(6, 6)
        self.backprehooked.register_full_backward_pre_hook(lambda *_: None)
        self.weighthooked = nn.Linear(6, 6)
        self.weighthooked.weight.register_hook(lambda gradient: gradient)
        self.patched = nn.Linear(6, 6)
        self.patched.forward = lambda X: X  # pyright: ignore[reportAttributeAccessIssue]  as accelerate does
        self.tied = nn.Linear(6, 10, bias=False)
        self.tied.weight = self.embedding.weight
        self.shared = nn.Linear(6, 6)
        self.again = self.shared
        self.attention = nn.MultiheadAttention(6, 1)
        self.encoder = nn.TransformerEncoderLayer(6, 1, 8)
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(6, 6))
        self.spectral = nn.utils.spectral_norm(nn.Linear(6, 6))
        self.lm_head = nn.Linear(6, 9)
        self.classifier = nn.Sequential(nn.Linear(6, 6))
        self.free = nn.Parameter(torch.ones(6, 6))

    def forward(self, X: Tensor) -> Tensor:
        return self.lm_head(self.block(self.plain(X)))


REASONS = {
    "embedding.weight": "Embedding is not nn.Linear",
    "tied.weight": "tied weight",
    "norm.weight": "1-D",
    "norm.bias": "1-D",
    "conv.weight": "Conv1d is not nn.Linear",
    "free": "Zoo is not nn.Linear",
    "small.weight": r"min\(m, n\) = 2 is not above the rank 2",
    "thin.weight": r"min\(m, n\) = 2 is not above the rank 2",
    "frozen.weight": "frozen",
    "hooked.weight": "has hooks",
    "prehooked.weight": "has hooks",
    "backhooked.weight": "has hooks",
    "backprehooked.weight": "has hooks",
    "weighthooked.weight": "has hooks",
    "patched.weight": "has hooks",
    "shared.weight": "shared module",
    "attention.in_proj_weight": "MultiheadAttention is not nn.Linear",
    "attention.out_proj.weight": "may use its weight without calling forward",
    "encoder.linear1.weight": "TransformerEncoderLayer may use its weight without calling forward",
    "encoder.linear2.weight": "TransformerEncoderLayer may use its weight without calling forward",
    "normed.parametrizations.weight.original1": "is not nn.Linear",
    "spectral.weight_orig": "has hooks",
    "lm_head.weight": "not targeted",
    "classifier.0.weight": "not targeted",
}


@pytest.mark.filterwarnings("ignore")
def test_every_reason_is_stated_and_nothing_is_forgotten() -> None:
    model = Zoo()
    before = {name for name, p in model.named_parameters() if p.requires_grad or p.ndim > 1}
    handle = convert(model, rank=2)
    assert list(handle.layers) == ["plain", "block.0", "block.2"]
    for name, reason in REASONS.items():
        assert name in handle.left_alone, name
        assert re.search(reason, handle.left_alone[name]), f"{name}: {handle.left_alone[name]}"
    converted = {f"{name}.weight" for name in handle.layers}
    unaccounted = {name for name in before - converted - handle.left_alone.keys() if not name.endswith("bias")}
    assert not unaccounted
    for name in handle.left_alone:
        assert not isinstance(model.get_submodule(name.rpartition(".")[0]), LowRankLinear)


def test_a_tied_head_is_left_alone_and_stays_tied() -> None:
    model = nn.ModuleDict({"in": nn.Embedding(9, 6), "body": nn.Linear(6, 6), "out": nn.Linear(6, 9, bias=False)})
    out, embedding = model["out"], model["in"]
    assert isinstance(out, nn.Linear) and isinstance(embedding, nn.Embedding)
    out.weight = embedding.weight
    handle = convert(model, rank=2)
    assert list(handle.layers) == ["body"] and handle.left_alone["out.weight"] == "tied weight"
    assert out.weight is embedding.weight


def test_the_head_a_model_names_itself_is_left_alone() -> None:
    class Model(nn.Sequential):
        def get_output_embeddings(self) -> nn.Module:
            return self[1]

    handle = convert(Model(nn.Linear(6, 6), nn.Linear(6, 9)), rank=2)
    assert list(handle.layers) == ["0"] and handle.left_alone == {"1.weight": "not targeted"}
    assert list(convert(Model(nn.Linear(6, 6), nn.Linear(6, 9)), rank=2, targets=".").layers) == ["0", "1"]


def test_a_shared_parent_shares_its_layers() -> None:
    block = nn.Sequential(nn.Linear(6, 6))
    model = nn.Sequential(block, nn.Linear(6, 6), block)
    handle = convert(model, rank=2)
    assert list(handle.layers) == ["1"] and handle.left_alone == {"0.0.weight": "shared module"}


def test_fused_evaluation_paths_see_the_trained_weights() -> None:
    """PyTorch's encoder layer skips ``forward`` of its linear layers in evaluation; what it computes must not depend on that."""
    model = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), nn.Linear(8, 8))
    handle = convert(model, rank=2, lift_every=5)
    with torch.no_grad():
        for B in handle.subspace_parameters():
            B.add_(1)
    X = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))
    model.eval()
    slow = model(X).detach()
    with torch.no_grad():
        torch.testing.assert_close(model(X), slow, rtol=1e-4, atol=1e-5)


def named() -> nn.Module:
    return nn.ModuleDict(
        {
            "attn": nn.ModuleDict({"q_proj": nn.Linear(8, 8), "xq_proj": nn.Linear(8, 8)}),
            "mlp": nn.ModuleDict({"up": nn.Linear(8, 16)}),
            "score": nn.Linear(8, 8),
        }
    )


EVERY = ["attn.q_proj", "attn.xq_proj", "mlp.up"]


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (None, EVERY),
        ("q_proj", ["attn.q_proj", "attn.xq_proj"]),
        (r"^mlp\.|score", ["mlp.up", "score"]),
        (["q_proj"], ["attn.q_proj"]),
        (("attn.xq_proj", "score"), ["attn.xq_proj", "score"]),
        (lambda name, module: module.out_features == 16, ["mlp.up"]),  # noqa: ARG005
    ],
)
def test_targets(targets: Any, expected: list[str]) -> None:
    handle = convert(named(), rank=2, targets=targets)
    assert list(handle.layers) == expected
    assert all(reason == "not targeted" for reason in handle.left_alone.values())


@pytest.mark.parametrize(("rank", "expected"), [(3, [3, 3, 3]), (0.25, [2, 2, 4]), (0.01, [1, 1, 1]), (0.49, [4, 4, 8])])
def test_rank_as_a_number_and_as_a_share_of_in_features(rank: int | float, expected: list[int]) -> None:
    model = nn.Sequential(nn.Linear(8, 9), nn.Linear(8, 20), nn.Linear(16, 9))
    assert [layer.rank for layer in convert(model, rank=rank).layers.values()] == expected
    assert rank_of(16, 0.5) == 8


def test_a_rank_for_every_layer_by_its_name() -> None:
    model = nn.Sequential(nn.Linear(8, 9), nn.Linear(8, 20), nn.Linear(16, 9))
    handle = convert(model, rank={"0": 3, "2": 5})
    assert {name: layer.rank for name, layer in handle.layers.items()} == {"0": 3, "2": 5}
    assert handle.left_alone["1.weight"] == "no rank is given for it"


@pytest.mark.parametrize(
    ("rank", "said"),
    [
        ({}, "no layer has a rank"),
        ({"3": 2}, "'3' is no nn.Linear of Sequential"),
        ({"0": 0}, "rank of '0' must be a positive integer, got 0"),
    ],
)
def test_wrong_ranks_by_name(rank: dict[str, int], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        convert(nn.Sequential(nn.Linear(8, 9)), rank=rank)


def test_a_share_too_large_for_one_layer_leaves_only_that_one() -> None:
    handle = convert(nn.Sequential(nn.Linear(16, 4), nn.Linear(4, 16)), rank=0.5)
    assert list(handle.layers) == ["1"] and "min(m, n) = 4 is not above the rank 8" in handle.left_alone["0.weight"]


def test_replace_takes_over_the_training_mode() -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 4)))
    for training in (True, False):
        module = nn.Linear(4, 4)
        replace(model.train(training), "0.0", module)
        assert model.get_submodule("0.0") is module and module.training is training


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"law": "gausian"}, r"convert\(law='gausian', rank=2, c=1, .*: unknown law, known are gaussian, rademacher"),
    ({"rank": 0}, r"rank=0\): rank must be a positive integer, or a fraction"),
    ({"rank": -3}, "rank must be"),
    ({"rank": 1.0}, r"rank=1.0\): rank must be"),
    ({"rank": True}, "rank must be"),
    ({"rank": 8}, r"no layer of ModuleDict can be converted \(min\(m, n\) = 8 is not above the rank 8; not targeted\)"),
    ({"targets": "nowhere"}, r"no layer of ModuleDict can be converted \(not targeted\)"),
    ({"targets": []}, "no layer of ModuleDict"),
    ({"lift_every": 0}, "lift_every, refresh_every and basis_every must be at least 1"),
    ({"refresh_every": 0}, "must be at least 1"),
    ({"basis_every": 0}, "must be at least 1"),
    ({"state": "forget"}, "unknown state policy 'forget', known are reset, keep"),
    ({"lift": "upwards"}, "unknown lift 'upwards', known are master, stochastic, nearest"),
    ({"law": "spectral", "online": 1.5}, r"online=1.5 is a weight and must be in \[0, 1\]"),
    ({"online": 0.5}, "online=0.5 is for laws fitted to the gradient, HaarStiefel is not"),
    ({"c": 0.0}, "c must be positive and finite"),
    ({"c": float("nan")}, "c must be positive and finite"),
    ({"law": "spectral", "keep": -1}, "keep=-1 must be positive"),
    ({"law": "spectral", "floor": 2.0}, r"floor=2.0 is a share of r/n"),
    ({"law": "spectral", "design": "multinomial"}, "unknown design"),
    ({"law": "sparse_sign", "sparsity": 0.5}, "sparsity"),
]


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(("wrong", "message"), WRONG)
def test_wrong_input_is_named_and_the_model_untouched(wrong: dict[str, Any], message: str) -> None:
    model = named()
    modules, before = list(model.modules()), copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        convert(model, **{"rank": 2, **wrong})
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
    assert all(torch.equal(a, before[key]) for key, a in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: nn.Linear(8, 8), "the model itself is the layer; wrap it in nn.Sequential"),
        (lambda: nn.Sequential(), "no parameters"),
        (lambda: nn.Embedding(8, 8), "Embedding is not nn.Linear"),
        (lambda: nn.Sequential(nn.Linear(8, 8)).requires_grad_(False), "frozen"),
    ],
)
def test_models_without_a_layer_to_convert(model: Callable[[], nn.Module], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        convert(model(), rank=2)


def test_an_option_the_law_does_not_have_is_refused_before_anything_is_touched() -> None:
    for law in ("haar_stiefel", "spectral", "top_svd", HaarStiefel):
        model = named()
        with pytest.raises(TypeError, match="sparsity"):
            convert(model, law=law, rank=2, sparsity=3.0)
        assert not any(isinstance(module, LowRankLinear) for module in model.modules())


def test_parameters_and_the_touched_share() -> None:
    model = nn.Sequential(nn.Linear(8, 6), nn.LayerNorm(6), nn.Linear(6, 2))
    handle = convert(model, rank=2)
    assert handle.touched_share == 48 / (48 + 6 + 12 + 12 + 2)
    (B,) = handle.subspace_parameters()
    assert B.shape == (6, 2) and sum(p.numel() for p in handle.other_parameters()) == 6 + 12 + 12 + 2
    trained = list(handle.parameters())
    assert {id(p) for p in trained} == {id(B), *(id(p) for p in handle.other_parameters())} and len(trained) == 6
