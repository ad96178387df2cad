"""How a process leaves its group."""

from __future__ import annotations

import time

import pytest
from torch import distributed

from estimators import processes


@pytest.mark.parametrize(("backend", "waits"), [("gloo", [processes.FREED]), ("cpu:gloo,cuda:nccl", [processes.FREED]), ("nccl", [])])
def test_it_waits_for_the_threads_of_gloo_when_the_group_is_gone(backend: str, waits: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the interpreter's end may overtake them, which aborts a process that is done."""
    waited = []

    def sleep(seconds: float) -> None:
        assert not distributed.is_initialized()
        waited.append(seconds)

    monkeypatch.setattr(time, "sleep", sleep)
    monkeypatch.setattr(distributed, "get_backend", lambda: backend)
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)  # pyright: ignore[reportPrivateImportUsage]
    processes.leave()
    assert waited == waits
    assert not distributed.is_initialized()
