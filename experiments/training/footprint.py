"""Measured bytes: what the allocator has handed out, at its highest, in parts of a stretch of work.

On a CPU every allocation and release that torch's own allocator makes is an event of the profiler; their running sum is exact to the byte and
knows nothing of other processes, fragmentation or scratch memory that libraries take from the system. On CUDA it is the caching allocator's
count of bytes in tensors. Both count what was allocated inside the watch only, so everything to be counted must be built there; of a training
run that takes in the order in which its data come, one int64 a chunk of text, on the CPU.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler reports its own start and end on the terminal


@dataclass(frozen=True)
class Stretch:
    """Bytes at the start of a part, and the most that were held in it."""

    held: int
    peak: int


@dataclass
class Watch:
    """Gathers a ``Stretch`` for every named part; complete when ``watching`` ends."""

    device: torch.device
    base: int = 0
    parts: dict[str, Stretch] = field(default_factory=dict)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Measure what happens inside under this name, after garbage in cycles of references, whose life is chance, was collected.

        Raises ``ValueError`` for a name that was used before.
        """
        if name in self.parts:
            raise ValueError(f"Watch.part({name!r}): there is a part of this name already")
        gc.collect()
        if self.device.type != "cuda":
            self.parts[name] = Stretch(0, 0)
            with record_function(f"part {name}"):
                yield
            return
        torch.cuda.synchronize(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        held = torch.cuda.memory_allocated(self.device) - self.base
        yield
        torch.cuda.synchronize(self.device)
        self.parts[name] = Stretch(held, torch.cuda.max_memory_allocated(self.device) - self.base)


@contextmanager
def watching(device: torch.device) -> Iterator[Watch]:
    """Watch allocations on ``device``. Garbage of before is collected first: its release inside would count as less memory."""
    gc.collect()
    watch = Watch(device)
    if device.type == "cuda":
        watch.base = torch.cuda.memory_allocated(device)
        yield watch
        return
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        yield watch
    results: Any = recorded.profiler
    events = results.kineto_results.events()
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    spans = {event.name(): (event.start_ns(), event.end_ns()) for event in events if event.name().startswith("part ")}
    for name in watch.parts:
        watch.parts[name] = _stretch(changes, *spans[f"part {name}"])


def _stretch(changes: list[tuple[int, int]], start: int, end: int) -> Stretch:
    """From (nanosecond, bytes more or less) in order of time."""
    total = held = peak = 0
    for when, size in changes:
        if when > end:
            break
        total += size
        if when < start:
            held = peak = total
        else:
            peak = max(peak, total)
    return Stretch(held, peak)
