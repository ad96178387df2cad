"""A run is a directory: ``config.json``, ``env.json``, ``metrics.jsonl``, result files, and ``DONE`` last.

The directory's name holds a hash of the configuration, so the same question asked again finds its answer: a finished run is not computed
twice, an unfinished one continues from its recorded rows.
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from estimators import processes
from experiments.provenance import environment

NOT_IDENTITY = (  # fields that say where and how loudly, not what
    "compare", "runs_dir", "shard", "quiet", "workers", "operations", "checkpoint_every", "keep_checkpoints", "max_skipped", "save_model",
    "tensorboard", "ranks",
)  # fmt: skip
LATER = {  # fields that came later; at these values a run is what it was without them, and so is a comparison that lists nothing else
    "alpha": None, "variant": "paper", "other_lr": None, "random_from": 0, "layers": None, "search": "grid", "trials": 5, "cost_steps": 0,
    "data_sha256": "", "fused": False, "recompute": False, "feedback": "ef14", "residual": "bf16", "inner": "adam", "second_moment": None,
    "coupled": 0.0, "init": "plain", "lift_every": None, "spike_steps": 0, "ranks_sha256": "",
}  # fmt: skip
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class WrongInput(ValueError):
    """What the user asked for cannot be had; the message says what and what instead. Other errors are ours and keep their traceback."""


class Stopped(Exception):
    """Work that ended early for a reason the user should read; ``code`` is the command's exit code."""

    def __init__(self, message: str, code: int = 1) -> None:
        super().__init__(message)
        self.code = code


class Diverged(Stopped):
    """A training run without a finite loss: an outcome of a comparison, not a fault of it."""


@dataclasses.dataclass(frozen=True)
class Run:
    """One run directory. ``config`` is its configuration as plain values; ``recording``: whether this process writes, one of several does."""

    path: Path
    config: dict[str, Any]
    recording: bool = True

    @property
    def done(self) -> bool:
        """Whether the run finished."""
        return (self.path / "DONE").exists()

    def rows(self) -> list[dict[str, Any]]:
        """All complete lines of ``metrics.jsonl``; a line cut short by a crash is dropped."""
        return read_rows(self.path)

    def frame(self, kind: str) -> Any:
        """The rows of one kind as a pandas frame, one column a field: ``runs.load(path).frame("eval").plot("step", "loss")``."""
        import pandas as pd  # not needed by a training, and not everywhere

        return pd.DataFrame([row for row in self.rows() if row["kind"] == kind])

    def log(self, *rows: dict[str, Any]) -> None:
        """Append rows to ``metrics.jsonl`` in one write."""
        if not self.recording:
            return
        with (self.path / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))

    def keep(self, rows: list[dict[str, Any]]) -> None:
        """Rewrite ``metrics.jsonl`` with these rows only, atomically: what an interrupted part left behind goes."""
        if self.recording:
            _atomic(self.path / "metrics.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))

    def renew(self) -> None:
        """Forget all rows, and with them the environment that they were made in."""
        if self.recording:
            (self.path / "DONE").unlink(missing_ok=True)
            write_json(self.path / "env.json", environment())
        self.keep([])

    def write(self, name: str, value: Any) -> None:
        """Write ``value`` as JSON, atomically."""
        if self.recording:
            write_json(self.path / name, value)

    def read(self, name: str) -> Any:
        """Read a JSON file of this run."""
        return json.loads((self.path / name).read_text(encoding="utf-8"))

    def finish(self) -> None:
        """Mark the run as complete; how long the process that completed it was at it goes to its environment, as ``seconds``."""
        if not self.recording:
            return
        if not self.done and (begun := self.path / "env.json").exists():
            told = self.read(begun.name)
            told.get("continued", told)["seconds"] = round(time.time() - begun.stat().st_mtime, 1)
            write_json(begun, told)
        (self.path / "DONE").touch()


def start(question: str, label: str, config: Any) -> Run:
    """Open the run of ``config`` (a dataclass with ``runs_dir``), creating its directory, configuration and environment.

    Rows of an unfinished run stay; a line that was cut short is removed so that new rows start on a line of their own.
    """
    values = plain(config)
    digest = hashlib.sha256(json.dumps([question, identity(config)], sort_keys=True).encode()).hexdigest()[:8]
    path = Path(config.runs_dir) / f"{question}-{label}-{digest}"
    run = Run(path, {"question": question, **values}, recording=processes.rank() == 0)
    if run.recording:
        path.mkdir(parents=True, exist_ok=True)
    if run.recording and not run.done:
        write_json(path / "config.json", run.config)
        if (path / "env.json").exists():  # rows of before keep the environment they were made in
            write_json(path / "env.json", {**run.read("env.json"), "continued": environment()})
        else:
            write_json(path / "env.json", environment())
        run.keep(run.rows())
    processes.barrier()
    return run


def discard_empty(run: Run) -> None:
    """Remove the directory of a run that never began: nothing but its configuration, environment and an empty record."""
    names = {path.name for path in run.path.iterdir()} if run.recording else set()
    if run.recording and not run.rows() and names <= {"config.json", "env.json", "metrics.jsonl", "init.json"}:
        shutil.rmtree(run.path)


def trained(run: Run, begin: Callable[[], Any]) -> Run:
    """A run that is done as it is, otherwise the same after ``begin().train()``; one that cannot begin leaves no directory."""
    if run.done:
        return run
    try:
        begin().train()
    except WrongInput:
        discard_empty(run)
        raise
    return run


def load(path: str | Path) -> Run:
    """Open an existing run. Raises ``WrongInput`` when ``path`` is not a finished run directory."""
    path = Path(path)
    if not (path / "config.json").exists():
        raise WrongInput(f"{path} is not a run directory (no config.json); they lie in runs/, or where --runs-dir was")
    if not (path / "DONE").exists():
        raise WrongInput(f"{path} is an unfinished run; the command in its env.json continues it")
    return Run(path, json.loads((path / "config.json").read_text(encoding="utf-8")))


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The complete rows of ``path``/metrics.jsonl."""
    file = path / "metrics.jsonl"
    if not file.exists():
        return []
    rows = []
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def plain(config: Any) -> dict[str, Any]:
    """A dataclass as JSON values."""
    return json.loads(json.dumps(dataclasses.asdict(config), default=str))


def identity(config: Any) -> dict[str, Any]:
    """The fields of a configuration that decide its results, as JSON values."""
    return {
        name: value
        for name, value in plain(config).items()
        if name not in NOT_IDENTITY and not (name in LATER and value in (LATER[name], [LATER[name]]))
    }


def device(name: str) -> torch.device:
    """The device called ``name``; auto is a GPU where there is one, of several processes each its own. Raises ``WrongInput`` for one that
    does not exist."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        started, found = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
        if started > max(found, 1):
            raise WrongInput(f"{started} processes were started for {found} devices")
        name = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    try:
        torch.empty(0, device=name)
        return torch.device(name)
    except (RuntimeError, AssertionError) as error:
        why = str(error).splitlines()[0].partition(" device type at start")[0]
        raise WrongInput(f"device {name!r} cannot be used: {why}; cpu always can, auto finds a GPU") from None


@contextmanager
def interruptible() -> Iterator[threading.Event]:
    """An event that the first SIGINT or SIGTERM sets, so that work can come to a good end; a SIGINT after it interrupts at once.

    More SIGTERMs change nothing: who stops a whole group of processes sends several.
    """
    asked = threading.Event()
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def note(number: int, frame: Any) -> None:
        del number, frame
        signal.signal(signal.SIGINT, before[signal.SIGINT])
        asked.set()

    try:
        for number in before:
            signal.signal(number, note)
    except ValueError:  # not the main thread: nobody can interrupt it this way
        yield asked
        return
    try:
        yield asked
    finally:
        restore()


@contextmanager
def progress(total: int, description: str, quiet: bool = False, done: int = 0) -> Iterator[Any]:
    """A tqdm bar on standard error that is silent when ``quiet`` or when nobody is watching."""
    from tqdm import tqdm

    with tqdm(
        total=total, initial=done, desc=description, disable=quiet or not sys.stderr.isatty(), dynamic_ncols=True, leave=False
    ) as bar:
        yield bar


def sha256(path: Path) -> str:
    """The SHA-256 of a file's bytes, as hexadecimal digits. Raises ``OSError`` when it cannot be read."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path, value: Any) -> None:
    """Write JSON to ``path``, atomically."""
    _atomic(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def _atomic(path: Path, text: str) -> None:
    part = path.with_suffix(f"{path.suffix}.{os.getpid()}.part")
    with part.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)
