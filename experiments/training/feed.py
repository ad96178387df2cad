"""The data of a run: training batches that know their position, and held-out batches that are the same for everyone."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from estimators import processes
from experiments.runs import WrongInput
from experiments.text import batches, corpus, tokens
from experiments.training import models, parallel

if TYPE_CHECKING:
    from experiments.training.config import Config


EVALUATED = 8192  # held-out tokens evaluated at a time


class Feed(Protocol):
    """Training batches (sequences, length) whose position is part of a checkpoint."""

    def next(self) -> Tensor: ...
    @property
    def epochs(self) -> float: ...
    def planned(self, batches: int) -> float | None: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def open_data(config: Config) -> tuple[Feed, list[Tensor], dict[str, Any]]:
    """(training micro-batches, held-out batches, facts for the record). Raises ``WrongInput`` where data and model do not fit."""
    sequences = config.sequences // config.accumulate
    parallel.part(sequences)
    entries = models.PRESETS[config.model]["vocab_size"]
    if config.tokenizer is not None:
        return _stream(config, sequences, entries)
    with parallel.first():
        text = _text(config)
    _fits(text.vocabulary, entries, config.model)
    try:
        feed = batches.Batches(text.training, config.seed, sequences, config.length, _part())
        held_out = _held_out(text.held_out, config)
    except ValueError as error:
        raise WrongInput(f"{config.data}: {error}") from None
    return feed, held_out, {"data": list(text.sources), "tokens_sha256": text.sha256, "vocabulary": text.vocabulary}


def tokenizer(config: Config) -> PreTrainedTokenizerFast:
    """The tokenizer of the run's text, for the folder of the model."""
    file = config.tokenizer or _text(config).folder / "tokenizer.json"
    found = tokens.load_tokenizer(file)
    return PreTrainedTokenizerFast(tokenizer_file=str(file), eos_token=found.id_to_token(tokens.end_of(found)))


def _text(config: Config) -> tokens.Tokens:
    """The token folder of a run that does not read a stream; the default corpus is built where it is not there yet."""
    if config.data != corpus.MOVIE_REVIEWS:
        return tokens.open_tokens(Path(config.data))
    return tokens.tokens(min(models.PRESETS[config.model]["vocab_size"], 32000), quiet=config.quiet)


def _stream(config: Config, sequences: int, entries: int) -> tuple[Feed, list[Tensor], dict[str, Any]]:
    assert config.tokenizer is not None
    tokenizer = tokens.load_tokenizer(config.tokenizer)
    _fits(tokenizer.get_vocab_size(), entries, config.model)
    training, source = corpus.resumable(config.data), corpus.find(config.data)
    texts = source.held_out() if source.held_out else (document.text for document in corpus.read((config.data,)) if document.held_out)
    rows: list[int] = []
    for text in texts:
        rows += [*tokenizer.encode(text, add_special_tokens=False).ids, tokens.end_of(tokenizer)]
        if len(rows) >= config.eval_tokens:
            break
    try:
        fixed = _held_out(np.array(rows), config)
    except ValueError as error:
        raise WrongInput(f"held-out documents of {config.data}: {error}") from None
    feed = batches.StreamBatches(training, tokenizer, sequences, config.length, _part())
    return (
        feed,
        fixed,
        {
            "data": [source.facts()],
            "tokenizer_sha256": corpus.file_sha256(config.tokenizer),
            "vocabulary": tokenizer.get_vocab_size(),
        },
    )


def _part() -> tuple[int, int]:
    return processes.rank(), processes.size()


def _held_out(stream: np.ndarray, config: Config) -> list[Tensor]:
    return list(batches.held_out_batches(stream, max(1, EVALUATED // config.length), config.length, config.eval_tokens))


def _fits(vocabulary: int, entries: int, model: str) -> None:
    if vocabulary > entries:
        raise WrongInput(f"the tokens have {vocabulary} entries and {model} has {entries}; build them with --vocabulary {entries}")
