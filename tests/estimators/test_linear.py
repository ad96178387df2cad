"""``LowRankLinear`` against autograd of the plain expression, and what it keeps, computes and skips."""

from __future__ import annotations

import copy
import importlib.util
import inspect
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from estimators import HaarStiefel, LowRankLinear, keyed

T, M, N, R = 5, 4, 6, 2


def make(
    *,
    moved: bool,
    bias: bool = True,
    store: bool = True,
    dtype: torch.dtype = torch.float64,
    sizes: tuple[int, int, int] = (M, N, R),
    kind: type[LowRankLinear] = LowRankLinear,
) -> LowRankLinear:
    """A layer with V of the Haar law, stored or drawn from its key; ``moved``: B is not zero."""
    m, n, r = sizes
    with torch.random.fork_rng():
        torch.manual_seed(1)
        layer = kind(nn.Linear(n, m, bias=bias, dtype=dtype), r)

        def draw() -> Tensor:
            return keyed.draw(HaarStiefel(n=n, rank=r), 0, "layer", 0, dtype=layer.B.dtype)

        layer.hold(draw() if store else None, draw)
        if moved:
            with torch.no_grad():
                layer.B.normal_()
    return layer


def plain(layer: LowRankLinear, X: Tensor) -> Tensor:
    """The expression itself, differentiated by autograd."""
    Y = X @ layer.weight.mT + (X @ layer.basis()) @ layer.B.mT
    return Y if layer.bias is None else Y + layer.bias


def tensor(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def gradients(function: Callable[[Tensor], Tensor], layer: LowRankLinear, X: Tensor) -> list[Tensor]:
    """Y, then ∂/∂(X, B, bias) of a fixed linear function of Y."""
    X = X.clone().requires_grad_()
    wanted = [X, layer.B] + ([] if layer.bias is None else [layer.bias])
    Y = function(X)
    return [Y.detach(), *torch.autograd.grad((Y * tensor(*Y.shape, seed=7).to(Y.dtype)).sum(), wanted)]


@pytest.mark.parametrize("moved", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("store", [False, True])
@pytest.mark.parametrize("shape", [(N,), (T, N), (2, 3, N), (0, N)])
def test_forward_and_gradients_are_those_of_the_expression(moved: bool, bias: bool, store: bool, shape: tuple[int, ...]) -> None:
    layer = make(moved=moved, bias=bias, store=store)
    assert layer.at_zero is not moved
    X = tensor(*shape)
    for ours, oracle in zip(gradients(layer, layer, X), gradients(lambda X: plain(layer, X), layer, X), strict=True):
        torch.testing.assert_close(ours, oracle, rtol=0, atol=1e-10)


@pytest.mark.parametrize("moved", [False, True])
def test_gradcheck(moved: bool) -> None:
    layer = make(moved=moved)

    def function(X: Tensor, B: Tensor, bias: Tensor) -> Tensor:
        return torch.func.functional_call(layer, {"B": B, "bias": bias}, (X,))

    assert layer.bias is not None
    layer.moved()  # a perturbed B is not zero
    assert torch.autograd.gradcheck(function, (tensor(3, N).requires_grad_(), layer.B, layer.bias))


def test_the_gradient_of_B_is_the_sketch_and_the_weight_gets_none() -> None:
    layer, X, D = make(moved=True), tensor(T, N), tensor(T, M, seed=2)
    layer(X).backward(D)
    assert layer.B.grad is not None and layer.bias is not None and layer.bias.grad is not None
    torch.testing.assert_close(layer.B.grad, (D.mT @ X) @ layer.basis(), rtol=0, atol=1e-10)
    assert layer.weight.grad is None and not layer.weight.requires_grad
    layer(X).backward(D)  # gradients accumulate
    torch.testing.assert_close(layer.B.grad, 2 * (D.mT @ X) @ layer.basis(), rtol=0, atol=1e-10)
    torch.testing.assert_close(layer.bias.grad, 2 * D.sum(0), rtol=0, atol=1e-10)


def test_a_second_derivative_is_refused_rather_than_wrong() -> None:
    layer, X = make(moved=True), tensor(T, N).requires_grad_()
    first = torch.autograd.grad(layer(X).square().sum(), X, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.square().sum().backward()


@pytest.mark.parametrize("moved", [False, True])
def test_stored_and_regenerated_V_agree_to_the_last_bit(moved: bool) -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        kept, keyed_ = make(moved=moved, dtype=dtype), make(moved=moved, dtype=dtype, store=False)
        X = tensor(T, N).to(dtype)
        assert keyed_.V is None and kept.V is not None
        for a, b in zip(gradients(kept, kept, X), gradients(keyed_, keyed_, X), strict=True):
            assert torch.equal(a, b)


def saved_bytes(layer: nn.Module, X: Tensor) -> int:
    """Bytes kept for the backward pass beside parameters and buffers, each storage once."""
    mine = {t.data_ptr() for t in (*layer.parameters(), *layer.buffers())}
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        kept[t.data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        Y = layer(X)
    assert Y.requires_grad
    return sum(size for pointer, size in kept.items() if pointer not in mine)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("store", [False, True])
@pytest.mark.parametrize("moved", [False, True])
def test_it_saves_XV_and_nothing_else(dtype: torch.dtype, store: bool, moved: bool) -> None:
    layer = make(moved=moved, store=store, dtype=dtype)
    X = tensor(7, 3, N).to(dtype).requires_grad_()
    assert saved_bytes(layer, X) == 21 * R * dtype.itemsize
    layer.observer = lambda X, D: None  # noqa: ARG005
    assert saved_bytes(layer, X) == 21 * (R + N) * dtype.itemsize  # only for who asks


class Operations(TorchDispatchMode):
    """Counts two operations a multiply-add of every matrix product, in place or not."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if "mm" in name or "matmul" in name:
            left, right = [a for a in args if isinstance(a, Tensor)][-2:]
            self.count += 2 * left.shape[0] * left.shape[1] * right.shape[1]
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("moved", [False, True])
@pytest.mark.parametrize("needs_dX", [False, True])
def test_operations_are_those_of_theory(moved: bool, needs_dX: bool) -> None:
    t, m, n, r = 64, 48, 32, 8
    layer = make(moved=moved, sizes=(m, n, r))
    X = tensor(t, n).requires_grad_(needs_dX)
    with Operations() as forward:
        Y = layer(X)
    assert forward.count == 2 * t * m * n + 2 * t * r * (n + (m if moved else 0))
    with Operations() as backward:
        Y.sum().backward()
    expected = 2 * t * m * r + (2 * t * m * n + (2 * t * r * (m + n) if moved else 0) if needs_dX else 0)
    assert backward.count == expected
    if needs_dX:
        whole = 4 * t * m * n + 2 * t * r * ((2 * n + 3 * m) if moved else (m + n))
        assert forward.count + backward.count == whole


WRITES: dict[str, Callable[[LowRankLinear], Any]] = {
    "in place": lambda layer: layer.B.add_(1),
    "optimizer": lambda layer: (layer(tensor(T, N)).sum().backward(), torch.optim.SGD([layer.B], 1.0).step()),
    "foreach": lambda layer: torch._foreach_add_([layer.B], 1.0),  # pyright: ignore[reportPrivateImportUsage]
    "fused": lambda layer: (layer(tensor(T, N)).sum().backward(), torch.optim.AdamW([layer.B], fused=True).step(), layer.moved()),
    "state dict": lambda layer: layer.load_state_dict(layer.state_dict() | {"B": torch.ones(M, R).double()}),
    "assigned": lambda layer: layer.load_state_dict(layer.state_dict() | {"B": torch.ones(M, R).double()}, assign=True),
    "announced": lambda layer: (layer.B.data.add_(1), layer.moved()),
}


@pytest.mark.parametrize("how", WRITES)
def test_the_shortcut_ends_with_a_write_to_B(how: str) -> None:
    layer = make(moved=False)
    assert layer.at_zero
    with torch.set_grad_enabled(how in ("optimizer", "fused")):
        WRITES[how](layer)
    assert not layer.at_zero and bool(layer.B.any())
    torch.testing.assert_close(layer(tensor(T, N)), plain(layer, tensor(T, N)), rtol=0, atol=1e-10)
    layer.zero()
    assert layer.at_zero and not bool(layer.B.any())


def test_copies_know_their_own_B() -> None:
    """A copy counts writes from zero again, and must not take an old count for its own."""
    layer = make(moved=True)
    layer.redraw = None
    X = tensor(T, N)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        torch.testing.assert_close(twin(X), layer(X), rtol=0, atol=0)
    layer.zero()
    twin = copy.deepcopy(layer)
    with torch.no_grad():
        twin.B.add_(1)
        twin.B.mul_(2)
    torch.testing.assert_close(twin(X), plain(twin, X), rtol=0, atol=1e-10)


@pytest.mark.parametrize("moved", [False, True])
def test_autocast(moved: bool) -> None:
    layer = make(moved=moved, dtype=torch.float32)
    X = tensor(T, N, dtype=torch.float32).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert saved_bytes(layer, X) == T * R * 2  # XV in bfloat16, no cast weight
        Y = layer(X)
    assert Y.dtype == torch.bfloat16
    torch.testing.assert_close(Y.float(), plain(layer, X), rtol=0.03, atol=0.05)
    Y.backward(torch.ones_like(Y))
    assert layer.B.grad is not None and layer.bias is not None and layer.bias.grad is not None and X.grad is not None
    assert layer.B.grad.dtype == layer.bias.grad.dtype == X.grad.dtype == torch.float32
    B, bias, dX = torch.autograd.grad(plain(layer, X).sum(), [layer.B, layer.bias, X])
    for ours, oracle in ((layer.B.grad, B), (layer.bias.grad, bias), (X.grad, dX)):
        torch.testing.assert_close(ours, oracle, rtol=0.03, atol=0.1)


@pytest.mark.parametrize("moved", [False, True])
def test_autocast_leaves_float64_alone_as_it_does_in_nn_Linear(moved: bool) -> None:
    layer, X = make(moved=moved), tensor(T, N)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert nn.Linear(N, M, dtype=torch.float64)(X).dtype == torch.float64
        ours = gradients(layer, layer, X)
    assert {t.dtype for t in ours} == {torch.float64}
    for a, b in zip(ours, gradients(lambda X: plain(layer, X), layer, X), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


def test_sixteen_bit_weights_have_a_wide_B() -> None:
    layer = make(moved=True, dtype=torch.bfloat16)
    assert layer.B.dtype == layer.basis().dtype == torch.float32 and layer.weight.dtype == torch.bfloat16
    X = tensor(T, N).bfloat16().requires_grad_()
    Y = layer(X)
    Y.backward(torch.ones_like(Y))
    assert Y.dtype == torch.bfloat16 and layer.B.grad is not None and layer.B.grad.dtype == torch.float32
    wide = copy.deepcopy(layer).double()
    torch.testing.assert_close(Y.double(), plain(wide, X.double()), rtol=0.03, atol=0.05)
    assert X.grad is not None and X.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("moved", [False, True])
@pytest.mark.parametrize("store", [False, True])
@pytest.mark.parametrize("observed", [False, True])
def test_activation_checkpointing_changes_nothing(reentrant: bool, moved: bool, store: bool, observed: bool) -> None:
    layer = make(moved=moved, store=store)
    seen: list[Tensor] = []
    if observed:
        layer.observer = lambda X, D: seen.append(D.mT @ X)

    def run(function: Callable[[Tensor], Tensor]) -> list[Tensor]:
        X = tensor(T, N).requires_grad_()
        layer.zero_grad()
        Y = function(X).tanh()
        Y.sum().backward()
        assert X.grad is not None and layer.B.grad is not None
        return [Y.detach(), X.grad, layer.B.grad.clone()]

    direct = run(layer)
    through = run(lambda X: checkpoint(layer, X, use_reentrant=reentrant))  # pyright: ignore[reportArgumentType]
    assert all(torch.equal(a, b) for a, b in zip(direct, through, strict=True))
    assert len(seen) == 2 * observed and (not seen or torch.equal(seen[0], seen[1]))


def without_shape_checks() -> type[LowRankLinear]:
    """The class as a user has it: the compiler cannot look through the checks that tests add at import."""
    spec = importlib.util.spec_from_file_location("unchecked_linear", inspect.getfile(LowRankLinear))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.LowRankLinear


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_whole_graph_equals_eager_before_and_after_B_moves(backend: str) -> None:
    torch._dynamo.reset()
    layer = make(moved=False, dtype=torch.float32, kind=without_shape_checks())
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    X = tensor(T, N, dtype=torch.float32)
    for _ in range(2):
        for ours, oracle in zip(gradients(compiled, layer, X), gradients(layer, layer, X), strict=True):
            torch.testing.assert_close(ours, oracle, rtol=1e-5, atol=1e-5)
        with torch.no_grad():
            layer.B.add_(1)
        layer.moved()
    torch.testing.assert_close(compiled(X), plain(layer, X), rtol=1e-5, atol=1e-5)
    layer.zero()
    torch.testing.assert_close(compiled(X), plain(layer, X), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rank", [0, M, N])
@pytest.mark.usefixtures("unchecked")
def test_wrong_input_is_named(rank: int) -> None:
    with pytest.raises(ValueError, match=rf"LowRankLinear\(m={M}, n={N}, rank={rank}\): rank must be"):
        LowRankLinear(nn.Linear(N, M), rank)
    with pytest.raises(RuntimeError, match="has no V yet"):
        LowRankLinear(nn.Linear(N, M), R)(torch.ones(N))
    assert repr(make(moved=False)) == "LowRankLinear(in_features=6, out_features=4, rank=2, bias=True)"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_step_on_a_gpu_waits_for_nothing() -> None:
    """Forward, backward, optimizer step and lift without a synchronisation or a copy between host and device."""
    layer = LowRankLinear(torch.nn.Linear(64, 96, bias=False, device="cuda", dtype=torch.bfloat16), 8)
    layer.hold(torch.randn(64, 8, device="cuda", dtype=torch.bfloat16))
    X = torch.randn(32, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    optimizer = torch.optim.AdamW([layer.B], lr=1e-3, fused=True)

    def step() -> None:
        layer(X).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            layer.weight.addmm_(layer.B, layer.basis().mT)
            layer.zero()

    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
