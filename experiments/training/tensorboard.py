"""TensorBoard's view of a training: the rows of ``metrics.jsonl`` as scalars, written by the same calls.

    lowrank pretrain tiny --tensorboard
    tensorboard --logdir runs

Each number of a row is the scalar KIND/FIELD at the step of the row, as in ``train/loss``; what a kind has several rows a step of stands in between:
``live/all/signal``, ``eval/test/accuracy``. A run that is continued drops the rows after its checkpoint, and purges the events of the same steps.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments import runs

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

BETWEEN = ("layer", "part", "collective")  # fields that tell the rows of a kind and step apart


class Scalars:
    """The event files in ``folder``; none is open before ``begin``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.writer: SummaryWriter | None = None

    @property
    def empty(self) -> bool:
        """Whether there are no event files yet."""
        return not any(self.folder.glob("events.out.tfevents.*"))

    def begin(self, rows: Sequence[dict[str, Any]]) -> None:
        """Go on after these rows: events of later steps are purged. Where there are none yet, as when the option is new to the run, these rows come
        first."""
        from torch.utils.tensorboard import SummaryWriter  # not above: only who asks for it needs the package

        self.close()
        new = self.empty
        following = max((row["step"] for row in rows), default=-1) + 1
        # a session has a beginning in any case: TensorBoard purges from its second one on
        self.writer = SummaryWriter(str(self.folder), purge_step=0 if new else following)
        if new:
            self.add(rows)

    def add(self, rows: Sequence[dict[str, Any]]) -> None:
        """The numbers of these rows; they are in the file when this returns, as the rows are in theirs."""
        assert self.writer is not None, "Scalars.add: begin comes first"
        for row in rows:
            name = "/".join(str(row[key]) for key in ("kind", *BETWEEN) if key in row)
            for key, value in row.items():
                if key != "step" and isinstance(value, int | float):
                    self.writer.add_scalar(f"{name}/{key}", value, row["step"])
        self.writer.flush()

    def close(self) -> None:
        """Close the file that is open, if there is one."""
        if self.writer is not None:
            with suppress(OSError):  # of a full disk: the last ``add`` has raised it, and nothing was added since
                self.writer.close()
            self.writer = None


@dataclass(frozen=True)
class Followed(runs.Run):
    """A run whose rows become scalars as they are logged."""

    scalars: Scalars = field(kw_only=True)

    def log(self, *rows: dict[str, Any]) -> None:
        super().log(*rows)
        self.scalars.add(rows)

    def keep(self, rows: list[dict[str, Any]]) -> None:
        super().keep(rows)
        self.scalars.begin(rows)


@contextmanager
def followed(run: runs.Run, asked: bool) -> Iterator[runs.Run]:
    """``run`` itself, or while this lasts the same run with its rows in ``run.path``/tensorboard too: where that is ``asked`` for and this process
    records. A run that is done without events gets those of its rows."""
    if not (asked and run.recording):
        yield run
        return
    scalars = Scalars(run.path / "tensorboard")
    try:
        if run.done and scalars.empty:
            scalars.begin(run.rows())
        yield Followed(run.path, run.config, scalars=scalars)
    finally:
        scalars.close()
