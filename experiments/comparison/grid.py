"""Many training runs, some at a time, in worker processes that take one after another; what is done stays done."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any

import torch

from experiments import pretrain, runs
from experiments.training import feed

ORPHAN_SECONDS = 0.5  # until a worker sees that its parent is gone


@dataclass(frozen=True)
class Job:
    """What a cell is: ``opened`` gives its run directory, ``main`` trains it, ``prepare`` is called once with the first open cell: it builds what
    all need, and refuses what does not fit, before processes start. Functions of a module, so that workers find them."""

    opened: Callable[[Any], runs.Run]
    main: Callable[[Any], runs.Run]
    prepare: Callable[[Any], Any]


PRETRAINING = Job(pretrain.opened, pretrain.main, feed.open_data)


def cores() -> int:
    """That this process may use; with more threads than these, products wait for a thread that waits for a core."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def train(cells: Sequence[Any], workers: int, description: str, quiet: bool, job: Job = PRETRAINING) -> None:
    """Train every cell that is not done, ``workers`` at a time with an equal share of the cores.

    A run that diverges is an outcome and stays unfinished; an interruption raises ``runs.Stopped`` with code 130.
    """
    open_cells = [cell for cell in dict.fromkeys(cells) if not job.opened(cell).done]  # never one directory by two processes
    if not open_cells:
        return
    job.prepare(open_cells[0])
    threads = max(1, cores() // workers)
    context = multiprocessing.get_context("spawn")
    with (
        runs.progress(len(open_cells), description, quiet) as bar,
        ProcessPoolExecutor(workers, mp_context=context, initializer=_begin, initargs=(threads, os.getpid())) as pool,
    ):
        futures = [pool.submit(_cell, job.main, cell) for cell in open_cells]
        try:
            for future in as_completed(futures):
                if future.result() == 130:
                    raise KeyboardInterrupt
                bar.update()
        except BrokenProcessPool:
            raise runs.Stopped("a training process was killed, perhaps for memory; with fewer --workers the same command goes on") from None
        except KeyboardInterrupt:
            pool.shutdown(cancel_futures=True)
            raise runs.Stopped("interrupted; the same command continues with the runs that are not done", code=130) from None


def _begin(threads: int, parent: int) -> None:
    """In a worker: its share of the cores, and an end with its parent, even one that was killed; another could begin the same run meanwhile."""
    torch.set_num_threads(threads)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(ORPHAN_SECONDS)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _cell(main: Callable[[Any], runs.Run], cell: Any) -> int:
    """0; 1 for a run that diverged, whose rows stay in its directory; 130 for an interrupted one. Raises what else stopped it."""
    try:
        main(cell)
    except runs.Diverged:
        return 1
    except runs.Stopped as stop:
        if stop.code == 130:
            return 130
        raise
    return 0
