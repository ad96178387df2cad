"""Layers that keep a compressed input: what is exact, what is kept, which draw belongs to which call; of every rule."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from estimators import (
    LAWS,
    WTACRS,
    CompressedLinear,
    ErrorBasis,
    Inputs,
    Keeper,
    Key,
    LawOnFeatures,
    LawOnTokens,
    VeLoRA,
    compress,
    estimate,
    tokens,
)
from tests.estimators.test_linear import saved_bytes

T, M, N, R = 10, 5, 8, 3
CPU = torch.device("cpu")
Rule = Callable[[], Keeper]
RULES: dict[str, Rule] = {
    **{f"tokens {law}": lambda law=law: LawOnTokens(law, R) for law in LAWS},
    **{f"features {law}": lambda law=law: LawOnFeatures(law, R) for law in LAWS},
    "wta_crs": lambda: WTACRS(R),
    "wta_crs variance": lambda: WTACRS(R, criterion="variance"),
    "velora": lambda: VeLoRA(4),
    "errors inputs": lambda: ErrorBasis(Inputs(), 2),
    "errors haar_stiefel": lambda: ErrorBasis(LawOnFeatures("haar_stiefel", R), 2),
}
ORTHOGONAL = ("haar_stiefel", "coordinate", "dct", "hadamard", "spectral")  # exact at full rank
EXACT: dict[str, Rule] = {
    **{f"tokens {law}": lambda law=law: LawOnTokens(law, 1.0) for law in ORTHOGONAL},
    **{f"features {law}": lambda law=law: LawOnFeatures(law, 1.0) for law in ORTHOGONAL},
    "tokens spectral, as many as features": lambda: LawOnTokens("spectral", N),
    "wta_crs": lambda: WTACRS(1000),
    "velora": lambda: VeLoRA(N),
    "errors inputs": lambda: ErrorBasis(Inputs(), 2),
}


def tensor(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def make(rule: Rule, *, bias: bool = True, dtype: torch.dtype = torch.float64, seed: int = 0) -> CompressedLinear:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return CompressedLinear(nn.Linear(N, M, bias=bias, dtype=dtype), rule(), seed=seed, name="layer")


def run(layer: nn.Linear | CompressedLinear, X: Tensor, D: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Y and ∂/∂(X, W, b) of ⟨Y, D⟩."""
    X = X.clone().requires_grad_()
    layer.zero_grad()
    Y: Tensor = layer(X)
    Y.backward(tensor(*Y.shape, seed=7).to(Y.dtype) if D is None else D)
    assert X.grad is not None
    grads = [None if p is None or p.grad is None else p.grad.clone() for p in (layer.weight, layer.bias)]
    return Y.detach(), X.grad, grads[0], grads[1]  # pyright: ignore[reportReturnType]


def key(call: int = 0, *, index: int = 0, seed: int = 0, process: int = 0) -> Key:
    return Key(seed, "layer", index, call, CPU, process)


def estimated(rule: Rule, X: Tensor, D: Tensor, at: Key) -> Tensor:
    """What a rule that is new makes of one call."""
    keeper = rule()
    return keeper.gradient(keeper.keep(X, at), D, at)


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("shape", [(N,), (T, N), (2, 5, N), (0, N)], ids=str)
def test_all_but_the_gradient_of_the_weight_is_exact(name: str, shape: tuple[int, ...]) -> None:
    layer = make(RULES[name], bias=shape != (T, N))
    plain = nn.Linear(N, M, bias=layer.bias is not None, dtype=torch.float64)
    plain.load_state_dict(layer.state_dict())
    X = tensor(*shape)
    (Y, dX, dW, db), (Y_, dX_, dW_, db_) = run(layer, X), run(plain, X)
    for ours, theirs in ((Y, Y_), (dX, dX_), (db, db_)):
        assert ours is theirs is None or torch.allclose(ours, theirs, rtol=0, atol=1e-12)  # pyright: ignore[reportArgumentType]
    assert dW is not None and dW_ is not None and dW.shape == dW_.shape and dW.dtype == dW_.dtype
    assert bool(dW_.any()) is bool(dW.any()) is (shape[0] != 0)


@pytest.mark.parametrize("name", EXACT)
def test_at_full_rank_nothing_is_estimated(name: str) -> None:
    layer = make(EXACT[name])
    assert layer.bias is not None

    def function(X: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        layer.calls = 0
        return torch.func.functional_call(layer, {"weight": weight, "bias": bias}, (X,))

    assert torch.autograd.gradcheck(function, (tensor(T, N).requires_grad_(), layer.weight, layer.bias))


@pytest.mark.parametrize("law", LAWS)
def test_on_either_axis_it_is_the_estimator_with_the_V_of_its_key(law: str) -> None:
    X, D = tensor(T, N), tensor(T, M, seed=2)
    on_tokens, on_features = LawOnTokens(law, R), LawOnFeatures(law, R)
    at = key(call=3, index=5)
    if LAWS[law].fitted:
        V, W = on_tokens.sighted(X, at.generator("tokens")), on_features.sighted(X.mT, at.generator("features"))
        same = on_features.sighted(X.mT, at.generator("tokens"))  # directions of X from either side
        torch.testing.assert_close(tokens(D, X, V), estimate(D.mT @ X, same), rtol=0, atol=1e-10)
    else:
        V = LAWS[law](n=T, rank=R).sample(generator=at.generator("tokens"), dtype=torch.float64)
        W = LAWS[law](n=N, rank=R).sample(generator=at.generator("features", alike=True), dtype=torch.float64)
    torch.testing.assert_close(estimated(lambda: on_tokens, X, D, at), tokens(D, X, V), rtol=0, atol=1e-10)
    torch.testing.assert_close(estimated(lambda: on_features, X, D, at), estimate(D.mT @ X, W), rtol=0, atol=1e-10)


def test_a_rank_may_be_a_fraction_of_its_axis() -> None:
    X, D = tensor(T, N), tensor(T, M, seed=2)
    for kind, size, shape in ((LawOnTokens, T, (5, N)), (LawOnFeatures, N, (T, 4))):
        (kept,) = kind("gaussian", 0.5).keep(X, key())
        assert kept.shape == shape
        assert torch.equal(estimated(lambda: kind("gaussian", size), X, D, key()), estimated(lambda: kind("gaussian", 99), X, D, key()))
    assert VeLoRA(0.5).count(N) == 4 and VeLoRA(0.49).count(9) == 3 and VeLoRA(1.0).count(7) == 7


def test_tokens_differ_between_processes_and_features_do_not() -> None:
    """Each process has tokens of its own; one V on the features makes their mean the estimate of the whole batch."""
    X, D = tensor(T, N), tensor(T, M, seed=2)
    for name, alike in (("tokens gaussian", False), ("tokens coordinate", False), ("wta_crs", False), ("features gaussian", True)):
        one, other = (estimated(RULES[name], X, D, key(process=process)) for process in (0, 1))
        assert torch.equal(one, other) is alike


DRAWN = [name for name in RULES if "top_svd" not in name and "fixed_basis" not in name and name not in ("velora", "errors inputs")]


@pytest.mark.parametrize("name", DRAWN)
def test_every_call_of_every_step_has_its_own_draw(name: str) -> None:
    model = nn.Sequential(make_linear(), nn.Tanh())
    handle = compress(model, keeper=lambda _: RULES[name](), seed=4)
    layer = handle.layers["0"]
    X = tensor(T, N)
    D = tensor(T, M, seed=7)
    seen = []
    for step in range(2):
        for call in range(2):
            seen.append(run(layer, X)[2])
            expected = estimated(RULES[name], X, D, Key(4, "0", step, call, CPU))
            torch.testing.assert_close(seen[-1], expected, rtol=0, atol=1e-12)
        handle.step()
    different = len({tuple(dW.flatten().tolist()) for dW in seen if dW is not None})
    assert different == 4 or ("spectral" in name and different > 1)  # that law has few outcomes here
    seeds = [estimated(RULES[name], X, D, key(seed=seed)) for seed in range(4)]
    assert not all(torch.equal(seeds[0], other) for other in seeds[1:])


def make_linear(n: int = N, m: int = M, dtype: torch.dtype = torch.float64) -> nn.Linear:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return nn.Linear(n, m, dtype=dtype)


@pytest.mark.parametrize("name", RULES)
def test_a_module_used_twice_adds_up_its_calls(name: str) -> None:
    layer, X, Z = make(RULES[name]), tensor(T, N), tensor(6, N, seed=3)
    D, E = tensor(T, M, seed=7), tensor(6, M, seed=8)
    ((layer(X) * D).sum() + (layer(Z) * E).sum()).backward()
    keeper = RULES[name]()
    kept = keeper.keep(X, key(0)), keeper.keep(Z, key(1))
    expected = keeper.gradient(kept[0], D, key(0)) + keeper.gradient(kept[1], E, key(1))
    torch.testing.assert_close(layer.weight.grad, expected, rtol=0, atol=1e-12)


# what is kept


def formula(name: str, t: int, dtype: torch.dtype) -> int:
    """Bytes by hand: two counters of 8 bytes, and what the rule keeps."""
    axis, _, law = name.partition(" ")
    if axis == "velora":
        return 16 + (t * 4 + N // 4) * dtype.itemsize
    if axis == "wta_crs":
        return 16 + R * (N * dtype.itemsize + 8)
    if name == "errors inputs":
        return 16 + t * N * dtype.itemsize
    numbers = R * N if axis == "tokens" else t * R
    return 16 + dtype.itemsize * (numbers + (R * (t if axis == "tokens" else N) if LAWS[law].fitted else 0))


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_it_keeps_what_its_rule_says_and_nothing_else(name: str, dtype: torch.dtype) -> None:
    layer, X = make(RULES[name], dtype=dtype), tensor(7, 3, N).to(dtype).requires_grad_()
    assert saved_bytes(layer, X) == layer.saved_bytes == formula(name, 21, dtype)
    if dtype == torch.float32:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert saved_bytes(layer, X) == layer.saved_bytes == formula(name, 21, torch.bfloat16)  # and no cast weight


@pytest.mark.parametrize("name", RULES)
def test_a_frozen_weight_or_no_gradients_keep_nothing(name: str) -> None:
    layer, X = make(RULES[name]), tensor(T, N).requires_grad_()
    layer.weight.requires_grad_(False)
    assert saved_bytes(layer, X) == layer.saved_bytes == 0
    assert run(layer, X.detach())[2] is None
    layer.weight.requires_grad_(True)
    with torch.no_grad():
        before = layer.calls
        torch.testing.assert_close(layer(X), nn.functional.linear(X, layer.weight, layer.bias), rtol=0, atol=1e-12)
    assert layer.calls == before and saved_bytes(layer, X.detach()) == formula(name, T, torch.float64)


# dtypes, recomputation, what is not a number


@pytest.mark.parametrize("name", RULES)
def test_autocast(name: str) -> None:
    """The draws are those without autocast, also where the backward pass is inside of it; float64 is left alone, as in ``nn.Linear``."""
    layer, X = make(RULES[name], dtype=torch.float32), tensor(T, N, dtype=torch.float32)
    D = tensor(T, M, seed=7).bfloat16()
    expected = estimated(RULES[name], X.bfloat16(), D, key())
    for inside in (False, True):
        layer.calls = 0
        layer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            Y = layer(X)
            if inside:
                Y.backward(D)
        if not inside:
            Y.backward(D)
        assert Y.dtype == torch.bfloat16 and layer.weight.grad is not None and layer.weight.grad.dtype == torch.float32
        torch.testing.assert_close(layer.weight.grad, expected.float(), rtol=0, atol=0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert {t.dtype for t in run(make(RULES[name]), X.double()) if t is not None} == {torch.float64}


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputation_keeps_the_draw_with_what_was_kept(name: str, reentrant: bool) -> None:
    """The recomputed call is the call of the forward pass, so that the gradient is that of plain backpropagation; and again, in a second backward
    pass over the graph. Of two calls it cannot be said which is repeated: each has a draw of its own, with what was kept under it."""
    layer, X, D = make(RULES[name]), tensor(T, N), tensor(T, M, seed=7)
    _, dX, dW, db = run(layer, X)
    layer.calls = 0
    layer.zero_grad()
    Z = X.clone().requires_grad_()
    checkpoint(layer, Z, use_reentrant=reentrant).backward(D)  # pyright: ignore[reportOptionalMemberAccess]
    assert layer.bias is not None
    torch.testing.assert_close(Z.grad, dX, rtol=0, atol=1e-12)
    torch.testing.assert_close(layer.bias.grad, db, rtol=0, atol=1e-12)
    torch.testing.assert_close(layer.weight.grad, dW, rtol=0, atol=1e-12)
    if reentrant:
        return
    layer.zero_grad()
    layer.begin(0)
    Y = checkpoint(layer, X, use_reentrant=False)
    for _ in range(2):
        Y.backward(D, retain_graph=True)  # pyright: ignore[reportOptionalMemberAccess]
    assert dW is not None
    torch.testing.assert_close(layer.weight.grad, 2 * dW, rtol=0, atol=1e-12)
    layer.zero_grad()
    layer.begin(0)
    (checkpoint(layer, X, use_reentrant=False) + checkpoint(layer, X, use_reentrant=False)).backward(D)  # pyright: ignore
    own = sum((estimated(RULES[name], X, D, key(call)) for call in (2, 3)), torch.zeros(()))
    torch.testing.assert_close(layer.weight.grad, own, rtol=0, atol=1e-12)


def test_a_skipped_step_is_resumed_with_its_draws() -> None:
    """A backward pass that no step follows counts: the next has other draws, before and after a checkpoint."""
    for name in ("tokens coordinate", "errors haar_stiefel"):
        ends = []
        for interrupted in (False, True):
            made = model()
            handle = compress(made, keeper=lambda _, name=name: RULES[name](), seed=3)
            made(tensor(T, N, seed=1)).square().sum().backward()  # is skipped
            if interrupted:
                made, saved = model(), handle.state_dict()
                handle = compress(made, keeper=lambda _, name=name: RULES[name](), seed=3)
                handle.load_state_dict(saved)
            made.zero_grad()
            made(tensor(T, N, seed=2)).square().sum().backward()
            bases = [layer.keeper.U for layer in handle.layers.values() if isinstance(layer.keeper, ErrorBasis)]
            ends.append([p.grad for p in made.parameters()] + bases)
        assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def test_a_state_without_memory_takes_memory_away() -> None:
    handle = compress(model(), keeper=lambda _: VeLoRA(1))
    fresh = handle.state_dict()
    handle.model(tensor(T, N)).sum().backward()
    keepers: list[Any] = [layer.keeper for layer in handle.layers.values()]
    assert all(keeper.v is not None for keeper in keepers)
    handle.load_state_dict(fresh)
    assert all(keeper.v is None for keeper in keepers)


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_what_is_not_finite_shows_in_the_gradient_and_spoils_nothing(name: str, wrong: float) -> None:
    """One entry of Δ, of a token that may not have been kept; then all of X. The next gradient is finite again."""
    layer, X, D = make(RULES[name]), tensor(T, N), tensor(T, M, seed=7)
    layer.keeper.visit(torch.arange(2))
    for token in range(T):
        spoiled = D.clone()
        spoiled[token, 1] = wrong
        dW = run(layer, X, spoiled)[2]
        assert dW is not None and not bool(dW.isfinite().all())
    fresh = make(RULES[name])
    fresh.keeper.visit(torch.arange(2))
    for one in (layer, fresh):
        dW = run(one, torch.full_like(X, wrong))[2]
        assert dW is not None and not bool(dW.isfinite().all())
        dW = run(one, X)[2]
        assert dW is not None and bool(dW.isfinite().all())


@pytest.mark.parametrize("name", RULES)
def test_an_input_of_zeros_has_a_gradient_of_zeros(name: str) -> None:
    dW = run(make(RULES[name]), torch.zeros(T, N, dtype=torch.float64))[2]
    assert dW is not None and not bool(dW.any())


def test_a_second_derivative_is_refused_rather_than_wrong() -> None:
    layer, X = make(RULES["tokens gaussian"]), tensor(T, N).requires_grad_()
    first = torch.autograd.grad(layer(X).square().sum(), X, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.square().sum().backward()


def test_a_compiled_model_makes_the_same_draws() -> None:
    torch._dynamo.reset()
    X, grads = tensor(T, N), []
    for compiled in (False, True):
        made = model()
        compress(made, keeper=lambda _: LawOnTokens("haar_stiefel", R))
        (torch.compile(made, backend="aot_eager") if compiled else made)(X).square().sum().backward()
        grads.append([p.grad for p in made.parameters()])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


class KeyOfTheFirstPass(LawOnTokens):
    """As if the key had stayed an attribute of the first pass."""

    def gradient(self, kept: tuple[Tensor, ...], D: Tensor, key: Key) -> Tensor:
        return super().gradient(kept, D, Key(key.seed, key.name, key.index, 0, key.device, key.process))


def test_recomputation_under_the_key_of_the_first_pass_is_seen() -> None:
    X, D = tensor(T, N), tensor(T, M, seed=7)
    for rule, right in ((LawOnTokens, True), (KeyOfTheFirstPass, False)):
        layer = make(lambda: rule("gaussian", R))
        (checkpoint(layer, X, use_reentrant=False) + checkpoint(layer, X, use_reentrant=False)).backward(D)  # pyright: ignore
        expected = sum((estimated(RULES["tokens gaussian"], X, D, key(call)) for call in (2, 3)), torch.zeros(()))
        assert layer.weight.grad is not None and torch.allclose(layer.weight.grad, expected) is right


# the handle


def model() -> nn.Module:
    return nn.Sequential(make_linear(), nn.Tanh(), make_linear(M, 6), nn.LayerNorm(6, dtype=torch.float64))


@pytest.mark.parametrize("name", RULES)
def test_the_model_is_the_same_before_between_and_after(name: str) -> None:
    made = model()
    parameters, names, X = list(made.parameters()), list(made.state_dict()), tensor(T, N)
    before = made(X)
    small = name == "velora"  # whose groups must divide 5 as well
    handle = compress(made, keeper=lambda _: VeLoRA(1) if small else RULES[name]())
    assert list(handle.layers) == ["0", "2"] and set(handle.left_alone) == {"3.weight", "3.bias"}
    assert all(a is b for a, b in zip(parameters, made.parameters(), strict=True)) and names == list(made.state_dict())
    assert handle.touched_share == (M * N + M * 6) / sum(p.numel() for p in parameters)
    assert handle.unbiased is ("top_svd" not in name and "fixed_basis" not in name and name != "velora")
    Y = made(X)
    torch.testing.assert_close(Y, before, rtol=0, atol=1e-12)
    assert handle.saved_bytes() == sum(layer.saved_bytes for layer in handle.layers.values()) > 0
    optimizer = torch.optim.AdamW(made.parameters(), lr=1e-2)
    Y.square().sum().backward()
    optimizer.step()
    handle.step()
    layers = handle.layers
    after = made(X)
    assert handle.finalize() is made and not handle.layers and layers
    assert [type(made.get_submodule(place)) for place in ("0", "2")] == [nn.Linear, nn.Linear]
    assert all(a is b for a, b in zip(parameters, made.parameters(), strict=True))
    torch.testing.assert_close(made(X), after, rtol=0, atol=1e-12)
    assert not torch.allclose(after, before)


@pytest.mark.parametrize("name", RULES)
def test_a_state_goes_on_to_the_bit(name: str) -> None:
    def trained(handle: Any, made: nn.Module, steps: range) -> None:
        for step in steps:
            handle.visit(torch.tensor([step % 2, 5]))
            made.zero_grad()
            made(tensor(T, N, seed=step)).square().sum().backward()
            with torch.no_grad():
                for p in made.parameters():
                    assert p.grad is not None
                    p.sub_(1e-2 * p.grad)
            handle.step()

    rule = (lambda _: VeLoRA(1)) if name == "velora" else (lambda _: RULES[name]())
    whole, other = model(), model()
    handle = compress(whole, keeper=rule)
    trained(handle, whole, range(3))
    halfway = copy.deepcopy((whole.state_dict(), handle.state_dict()))
    pickle.loads(pickle.dumps(halfway[1]))
    trained(handle, whole, range(3, 6))
    resumed = compress(other, keeper=rule)
    other.load_state_dict(halfway[0])
    resumed.load_state_dict(halfway[1])
    trained(resumed, other, range(3, 6))
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), other.parameters(), strict=True))


def test_a_copy_and_a_file_are_layers_of_their_own() -> None:
    layer, X = make(RULES["tokens haar_stiefel"]), tensor(T, N)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        for a, b in zip(run(twin, X), run(copy.deepcopy(layer), X), strict=True):
            assert a is not None and b is not None and torch.equal(a, b)
    assert repr(layer) == "CompressedLinear(in_features=8, out_features=5, bias=True, keeper=LawOnTokens(HaarStiefel, rank=3))"


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    "wrong, message",
    [
        (lambda: LawOnTokens("nothing", 2), r"LawOnTokens\(law='nothing', rank=2\): unknown law, known are gaussian"),
        (lambda: LawOnFeatures("gaussian", 0), r"LawOnFeatures\(law='gaussian', rank=0\): rank must be a positive integer"),
        (lambda: LawOnTokens("gaussian", 1.5), "rank must be a positive integer, or a fraction of the axis"),
        (lambda: WTACRS(0.0), r"WTACRS\(rank=0.0, minimal=10, criterion='paper'\): rank must be"),
        (lambda: WTACRS(3, minimal=0), "minimal must be at least 1"),
        (lambda: WTACRS(3, criterion="best"), "unknown criterion, known are paper, variance"),  # pyright: ignore[reportArgumentType]
        (lambda: VeLoRA(0), r"VeLoRA\(groups=0\): groups must be"),
        (lambda: VeLoRA(3).count(8), r"VeLoRA\(groups=3\): in_features=8 is not a multiple"),
        (lambda: compress(nn.LayerNorm(4), keeper=lambda _: WTACRS(3)), r"compress\(\): no layer of LayerNorm can be replaced"),
        (
            lambda: compress(model(), keeper=lambda _: WTACRS(3)).load_state_dict(
                compress(model(), keeper=lambda _: WTACRS(4)).state_dict()
            ),
            "differs in layers",
        ),
    ],
)
def test_wrong_input_is_named(wrong: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        wrong()
