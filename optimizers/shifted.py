"""A model whose parameters stand elsewhere for a forward pass: nothing is added to them and nothing has to be taken away again.

While ``shifted`` is entered, every module computes with ``move(name, p)`` in the place of its own parameters, made when its forward pass begins and
dropped when it ends. In-place perturbation, W + εD and later − εD, leaves W rounded elsewhere (about 1e-7 of it a probe in float32) and an
interrupted one leaves it displaced; here W is never written, so it is the same to the last bit whatever happens. Memory: one module's parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from estimators.selection import FUSED


@contextmanager
def shifted(model: nn.Module, names: Mapping[nn.Parameter, str], move: Callable[[str, nn.Parameter], Tensor]) -> Iterator[set[str]]:
    """Yields the names of the parameters that were asked for so far: what no module reads in its own forward pass is missing there.

    ``names``: the parameters that stand elsewhere. A parameter that several modules share is the same for all of them; modules that read their
    children's weights themselves (nn.MultiheadAttention) have them all moved while they run.
    """
    home: dict[nn.Parameter, Tensor] = {}
    depth: dict[nn.Parameter, int] = {}
    seen: set[str] = set()

    def enter(parameters: list[nn.Parameter]) -> None:
        for p in parameters:
            if not depth.get(p):
                moved = move(names[p], p)
                home[p], p.data = p.data, moved
                seen.add(names[p])
            depth[p] = depth.get(p, 0) + 1

    def leave(parameters: list[nn.Parameter]) -> None:
        for p in parameters:
            depth[p] -= 1
            if not depth[p]:
                p.data = home.pop(p)

    before: Callable[[list[nn.Parameter]], Any] = lambda some: lambda *_: enter(some)  # noqa: E731
    after: Callable[[list[nn.Parameter]], Any] = lambda some: lambda *_: leave(some)  # noqa: E731
    hooks: list[Any] = []
    try:
        for module in model.modules():
            parameters = [p for p in module.parameters(recurse=isinstance(module, FUSED)) if p in names]
            if parameters:
                hooks.append(module.register_forward_pre_hook(before(parameters)))
                hooks.append(module.register_forward_hook(after(parameters)))
        yield seen
    finally:
        for hook in hooks:
            hook.remove()
        for p, data in home.items():
            p.data = data
