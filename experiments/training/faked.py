"""Memory of work without the numbers: operations run on fake tensors, which have shapes and storages and nothing in them, and every storage is
followed from its making to its release.

    with faked(), Ledger() as ledger:
        ... build, step once ...
        with ledger.part("step"):
            ... step ...
    ledger.peak("step")    # bytes by category, at the moment when their sum was largest

What asks fake tensors for numbers is answered as if all were well (``answer``): the one place where control flow that depends on data is decided.
Numbers of bytes are those of tensors between operations; what one operation takes and gives back inside itself is not seen, and on a real device is
part of the peak: that is what the comparison with the allocator (experiments/training/footprint.py) is for.

Differs from torch's own MemTracker, with which it agrees to the byte on a step of AdamW: that one refuses a second forward pass of the model, and
so every zeroth-order step; its categories are fixed, with none for a projector; and all that an optimizer's step makes counts as state there.
"""

from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import _lru_cache_wrapper
from typing import Any

import torch
import torch.optim.optimizer as _optimizer
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensor, FakeTensorMode
from torch.utils import _foreach_utils
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
CATEGORIES: tuple[str, ...] = ("weights", "gradients", "states", "activations", "projector", "temporaries")
OWN = ("estimators", "optimizers", "experiments")  # packages whose functions remember tables
UNKNOWN = "temporaries"  # of a storage that nobody says to be anything else
Owned = Callable[[], Iterable[tuple[str, Tensor]]]


@contextmanager
def faked() -> Iterator[None]:
    """Inside, tensors that are made have a shape, a dtype and a device, and no numbers. Tables that functions of this project remember are
    forgotten at both ends: a real one is of no use inside, a fake one outside. Fake parameters of a GPU are updated together, as real ones are."""
    _forget()
    together = (_optimizer._foreach_supported_types, _foreach_utils._foreach_supported_types)
    for kinds in together:
        kinds.append(FakeTensor)
    try:
        with _Faked():
            yield
    finally:
        for kinds in together:
            kinds.remove(FakeTensor)
        _forget()


class _Faked(FakeTensorMode):
    """Without a memory of which fake tensor stands for which: its weak references keep modules from being moved or converted."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_dispatch__(func, types, args, kwargs)
        self.fake_tensor_converter.meta_converter.tensor_memo.clear()
        return result


def _forget() -> None:
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] in OWN:
            for value in vars(module).values():
                if isinstance(value, _lru_cache_wrapper):
                    value.cache_clear()


class TooLong(ValueError):
    """Work of more operations than were allowed."""


class Ledger(TorchDispatchMode):
    """Bytes of every storage that is made while this is entered, in the order of time.

    ``owned`` gives (category, tensor) for what stands still between operations: weights, gradients, states. It is asked at the ends of a part, which
    should therefore be one step; what is never named is a temporary. After ``limit`` operations ``TooLong`` is raised. Works with real tensors too.
    """

    def __init__(self, owned: Owned = tuple, limit: int | None = None) -> None:
        super().__init__()
        self.owned, self.limit, self.operations = owned, limit, 0
        self.changes: list[tuple[int, int]] = []  # (storage, bytes more or less); storages are numbered as they come
        self.categories: list[str] = []  # of each storage
        self.parts: dict[str, tuple[int, int]] = {}  # where a part begins and ends in ``changes``
        self._live: dict[int, tuple[int, Any]] = {}  # address → number, weak reference
        self._facts: dict[int, Any] = {}  # number → what its numbers are taken to be

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self.operations += 1
        if self.limit is not None and self.operations > self.limit:
            raise TooLong(f"more than {self.limit:,} operations")
        try:
            result = func(*args, **kwargs)
        except (DataDependentOutputException, DynamicOutputShapeException):
            return self._recorded(self._answer(func, args))
        self._recorded(result)
        self._learn(func, args, result)
        return result

    # bytes

    def _recorded(self, result: Any) -> Any:
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._number(tensor)
        return result

    def _number(self, tensor: Tensor) -> int:
        """Of a tensor's storage, which is entered if it is new."""
        storage = tensor.untyped_storage()
        address = storage._cdata
        if address in self._live:
            return self._live[address][0]
        number, size = len(self.categories), storage.nbytes()
        self.categories.append(UNKNOWN)
        self.changes.append((number, size))

        def released(_: Any) -> None:
            self.changes.append((number, -size))
            self._live.pop(address, None)
            self._facts.pop(number, None)

        self._live[address] = number, weakref.ref(storage, released)
        return number

    def note(self) -> None:
        """Write down what ``owned`` says now."""
        with _disable_current_modes():
            for category, tensor in self.owned():
                self.name(tensor, category)

    def name(self, tensor: Tensor, category: str) -> None:
        """The category of one tensor's storage, for all its life."""
        self.categories[self._number(tensor)] = category

    def keeps(self, category: str) -> None:
        """All that lives now and is nothing yet is of this category."""
        for number, _ in self._live.values():
            if self.categories[number] == UNKNOWN:
                self.categories[number] = category

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Work that ``peak`` can be asked for. Garbage in cycles of references is collected first."""
        gc.collect()
        self.note()
        start = len(self.changes)
        yield
        self.note()
        self.parts[name] = start, len(self.changes)

    def peak(self, name: str) -> dict[str, int]:
        """Bytes by category at the first moment of the part at which most were held. Raises ``KeyError`` for a part that was not."""
        start, end = self.parts[name]
        total = most = when = 0
        for i, (_, size) in enumerate(self.changes[:end]):
            total += size
            if i < start or total > most:
                most, when = total, i
        held = dict.fromkeys(CATEGORIES, 0)
        for number, size in self.changes[: when + 1]:
            held[self.categories[number]] += size
        return held

    # numbers that are asked for

    def _learn(self, func: Any, args: Any, result: Any) -> None:
        """What ``answer`` has to know of a small result."""
        if not isinstance(result, Tensor) or result.numel() > 1:
            return
        packet, number = func.overloadpacket, self._live[result.untyped_storage()._cdata][0]
        if packet is aten.any:
            self._facts[number] = False
        elif packet is aten.sum and isinstance(args[0], Tensor) and args[0].dtype == torch.bool:
            self._facts[number] = args[0].numel()
        elif packet is aten.max or packet is aten.amax:
            self._facts[number] = 0.0

    def _answer(self, func: Any, args: Any) -> Any:
        """All is well: what is asked for is finite, comparisons hold everywhere, and ``any`` is asked about faults, of which there are none. A mask
        lets everything through, a count counts all. A largest value, which is asked of defects, is 0, another number 1, an index its own place."""
        tensor = args[0]
        match func.overloadpacket:
            case aten._local_scalar_dense:
                fact = self._facts.get(self._number(tensor))
                if fact is None:
                    fact = True if tensor.dtype == torch.bool else 1.0 if tensor.dtype.is_floating_point else tensor.storage_offset()
                return fact
            case aten.nonzero:
                return tensor.new_empty((tensor.numel(), tensor.ndim), dtype=torch.int64)
            case aten.index:
                return tensor.reshape(-1).clone()
            case aten.allclose | aten.equal:
                return True
        raise NotImplementedError(f"{func} asks fake tensors for numbers, and nothing is known to answer")
