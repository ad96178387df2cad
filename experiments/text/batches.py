"""Batches of token ids (sequences, length), int64. Where an iterator stands is a small JSON value, part of a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any, Protocol

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from estimators import keyed
from experiments.runs import WrongInput
from experiments.text.tokens import end_of

DOCUMENTS = 32  # of a stream, encoded at a time


def batch(stream: np.ndarray, seed: int, name: str, index: int, sequences: int, length: int) -> Tensor:
    """Token ids (sequences, length), int64, at offsets that depend on (seed, name, index) only."""
    generator = keyed.generator(seed, name, index)
    if len(stream) <= length:
        raise ValueError(f"batch(length={length}): the stream holds only {len(stream)} tokens")
    offsets = torch.randint(len(stream) - length, (sequences,), generator=generator)
    return torch.stack([_ids(stream[o : o + length]) for o in offsets.tolist()])


def held_out_batches(stream: np.ndarray, sequences: int, length: int, limit_tokens: int | None = None) -> Iterator[Tensor]:
    """The first ``limit_tokens`` tokens in order, as batches that do not overlap; the last may have fewer sequences."""
    chunks = (len(stream) if limit_tokens is None else min(len(stream), limit_tokens)) // length
    if chunks < 1:
        raise ValueError(f"held_out_batches(length={length}, limit_tokens={limit_tokens}): the stream holds only {len(stream)} tokens")
    return (
        _ids(stream[first * length : min(first + sequences, chunks) * length]).view(-1, length) for first in range(0, chunks, sequences)
    )


class Batches:
    """Each non-overlapping chunk of ``length`` tokens once an epoch, in an order that depends on (seed, epoch) only.

    The position counts sequences, so a resumed run may take them in batches of another size. A batch may reach into the next epoch.
    ``part`` = (k, parts): of every batch of ``sequences`` only the k-th of equal parts is given out; the position is the same for all parts.
    """

    def __init__(self, stream: np.ndarray, seed: int, sequences: int, length: int, part: tuple[int, int] = (0, 1)) -> None:
        self.chunks = len(stream) // length
        if self.chunks < 1:
            raise ValueError(f"Batches(length={length}): the stream holds only {len(stream)} tokens")
        self.stream, self.seed, self.sequences, self.length = stream, seed, sequences, length
        self._part = _slice(sequences, part)
        self._index = 0
        self._order: tuple[int, Tensor] = (-1, torch.empty(0))

    def next(self) -> Tensor:
        """The next token ids (sequences, length)."""
        rows = [self._row(index) for index in range(self._index, self._index + self.sequences)[self._part]]
        self._index += self.sequences
        return torch.stack(rows)

    @property
    def epochs(self) -> float:
        """How often the data was seen."""
        return self._index / self.chunks

    def planned(self, batches: int) -> float | None:
        """How often this many batches see the data."""
        return batches * self.sequences / self.chunks

    def state_dict(self) -> dict[str, Any]:
        """The position: ``index`` sequences were taken."""
        return {"index": self._index}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue at a position."""
        if not isinstance(state["index"], int) or state["index"] < 0:
            raise ValueError(f"Batches.load_state_dict(index={state['index']!r}): index counts sequences")
        self._index = state["index"]

    def _row(self, index: int) -> Tensor:
        epoch, place = divmod(index, self.chunks)
        if self._order[0] != epoch:
            self._order = (epoch, torch.randperm(self.chunks, generator=keyed.generator(self.seed, "batches", epoch)))
        start = int(self._order[1][place]) * self.length
        return _ids(self.stream[start : start + self.length])


class Resumable(Protocol):
    """A stream of rows with a field ``text`` that knows its position, as `datasets` streams do."""

    def __iter__(self) -> Iterator[Any]: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> None: ...


class StreamBatches:
    """Documents tokenised on the fly, in stream order, each closed by the end token and packed without gaps; at its end it begins again.

    The position holds the stream's own and the tokens read but not yet taken, those of up to 32 documents. ``part`` as for ``Batches``.
    """

    def __init__(self, documents: Resumable, tokenizer: Tokenizer, sequences: int, length: int, part: tuple[int, int] = (0, 1)) -> None:
        self._part = _slice(sequences, part)
        self.documents, self.tokenizer, self.sequences, self.length = documents, tokenizer, sequences, length
        self._end = end_of(tokenizer)
        self._start = self._position = documents.state_dict()
        self._rows = iter(documents)
        self._buffer: list[int] = []
        self._epoch = 0
        self._nothing = False

    def next(self) -> Tensor:
        """The next token ids (sequences, length). Raises ``WrongInput`` when the stream has no documents."""
        count = self.sequences * self.length
        while len(self._buffer) < count:
            self._fill()
        taken, self._buffer = self._buffer[:count], self._buffer[count:]
        return torch.tensor(taken, dtype=torch.int64).view(self.sequences, self.length)[self._part]

    @property
    def epochs(self) -> float:
        """How often the stream came to its end."""
        return float(self._epoch)

    def planned(self, batches: int) -> float | None:
        """Unknown of a stream: None."""
        del batches
        return None

    def state_dict(self) -> dict[str, Any]:
        """The position, as JSON values."""
        return {"documents": self._position, "buffer": list(self._buffer), "epoch": self._epoch}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue at a position."""
        self._seek(state["documents"])
        self._buffer, self._epoch, self._nothing = list(state["buffer"]), state["epoch"], False

    def _seek(self, position: dict[str, Any]) -> None:
        self._position = position  # the stream reports a position it was given only after the next document
        self.documents.load_state_dict(position)
        self._rows = iter(self.documents)

    def _fill(self) -> None:
        texts = [row.get("text") for row in islice(self._rows, DOCUMENTS)]
        if not texts:
            if self._nothing:
                raise WrongInput("the stream holds no documents")
            self._nothing = True
            self._epoch += 1
            self._seek(self._start)
            return
        if not all(isinstance(text, str) for text in texts):
            raise WrongInput("a row of the stream has no field 'text'")
        self._nothing = False
        self._position = self.documents.state_dict()
        for encoding in self.tokenizer.encode_batch_fast(texts, add_special_tokens=False):
            self._buffer += [*encoding.ids, self._end]


def _slice(sequences: int, part: tuple[int, int]) -> slice:
    k, parts = part
    if sequences % parts or not 0 <= k < parts:
        raise ValueError(f"{sequences} sequences have no {k}-th of {parts} equal parts")
    return slice(k * sequences // parts, (k + 1) * sequences // parts)


def _ids(stream: np.ndarray) -> Tensor:
    return torch.from_numpy(np.array(stream, dtype=np.int64))
