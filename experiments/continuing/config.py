"""What one sequence of tasks is."""

from __future__ import annotations

from dataclasses import dataclass

from experiments import allowed
from experiments.continuing.methods import METHODS
from experiments.training.options import Options


@dataclass(frozen=True, kw_only=True)
class Sequence(Options):
    """One model, one method, one seed, one learning rate. ``steps`` and the schedule of the learning rate are of each task; so is ``refresh_every``
    of gorp, whose frames begin anew, while lowrank knows nothing of tasks: its V goes on until K steps are over."""

    model: str = "minilm"
    """minilm, a folder or a hub name of transformers."""
    task: tuple[str, ...] = ("rotten-tomatoes", "r8", "imdb")
    """Labelled sets in the order in which they are learnt."""
    data_sha256: str = ""
    """Of the files of local tasks, so that other data are another run."""
    examples: int = 128
    """Training examples a task, and as many for validation, the same number of each of its classes."""
    tests: int = 400
    """Test examples a task at most; 0 for none, and scores on validation examples after the last task instead."""
    length: int = 64
    """Tokens a text is cut to."""
    method: str = "gorp"
    """adamw, protected, lora, gorp, lowrank, joint."""
    energy: float = 0.9
    """ε: share of the energy of first moments that is protected after a task."""

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"unknown method {self.method!r}, known are {', '.join(METHODS)}")
        super().__post_init__()
        if not self.task:
            raise ValueError("task needs at least one value")
        if len(set(self.task)) < len(self.task):
            raise ValueError(f"a task is named twice: {', '.join(self.task)}")
        if not 0 < self.energy <= 1:
            raise ValueError(f"energy must be in (0, 1], got {self.energy}")
        if self.length < 4:
            raise ValueError(f"length must be at least 4 tokens, got {self.length}")
        allowed.at_least(self, 2, "examples")
