"""Token folders: `tokenizer.json`, `training.bin`, `held_out.bin` and, written last, `manifest.json` that says what they are made of.

A folder is built beside its place and renamed into it, so that it is there complete or not at all and concurrent builders do no harm.
Documents are encoded a few thousand at a time and appended: memory does not grow with the text, but for a hash of each document.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from experiments.runs import WrongInput, progress, write_json
from experiments.text import corpus

FORMAT = 2  # of the manifest
END = "<|endoftext|>"
ENDS = (END, "<|end_of_text|>", "</s>", "<eos>")  # what tokenizers call the end of a document, first found first
FILES = ("tokenizer.json", "training.bin", "held_out.bin")
TOKENIZER_DOCUMENTS = 100_000  # the tokenizer is trained on at most this many of the first training documents
BATCH_DOCUMENTS, BATCH_CHARACTERS = 2048, 4_000_000  # encoded at a time


@dataclass(frozen=True)
class Tokens:
    """Memory-mapped token streams, documents closed by the token ``end``; ``vocabulary`` in entries, ``sha256`` of training.bin."""

    training: np.ndarray
    held_out: np.ndarray
    vocabulary: int
    sha256: str
    folder: Path
    end: int
    training_documents: int
    held_out_documents: int
    sources: tuple[str, ...]


def cache_directory() -> Path:
    """Where built token folders live: $LOWRANK_CACHE, else ~/.cache/lowrank."""
    return Path(os.environ.get("LOWRANK_CACHE", Path.home() / ".cache" / "lowrank"))


def tokens(vocabulary: int, quiet: bool = True) -> Tokens:
    """The default corpus under its own byte-level BPE of ``vocabulary`` entries; built once (about 20 s), then memory-mapped."""
    folder = cache_directory() / f"{corpus.MOVIE_REVIEWS}-bpe{vocabulary}"
    if (folder / "manifest.json").exists() and _facts(folder).get("format") == FORMAT:
        return open_tokens(folder)
    if folder.exists():  # of an earlier version, or cut short by one
        aside = _beside(folder)
        with contextlib.suppress(FileNotFoundError):  # another builder was first
            folder.rename(aside)
        shutil.rmtree(aside, ignore_errors=True)
    return build(folder, (corpus.MOVIE_REVIEWS,), vocabulary, quiet=quiet)


def open_tokens(folder: Path, verify: bool = True) -> Tokens:
    """Memory-map a token folder. Sizes are always checked, hashes too when ``verify``; ``WrongInput`` names the file that is damaged."""
    facts = _facts(folder)
    if facts.get("format") != FORMAT:
        raise WrongInput(f"{folder} is of another version of this program; delete the folder to build it again")
    try:
        kind = np.dtype(facts["dtype"])
        for name in FILES:
            _check(folder / name, facts["files"][name], verify)
        return Tokens(
            training=np.memmap(folder / "training.bin", dtype=kind, mode="r"),
            held_out=np.memmap(folder / "held_out.bin", dtype=kind, mode="r"),
            vocabulary=int(facts["vocabulary"]),
            sha256=facts["files"]["training.bin"]["sha256"],
            folder=folder,
            end=int(facts["end"]),
            training_documents=int(facts["training_documents"]),
            held_out_documents=int(facts["held_out_documents"]),
            sources=tuple(source["name"] for source in facts["sources"]),
        )
    except (KeyError, TypeError) as error:
        raise _damaged(folder / "manifest.json", f"{error} is missing or of the wrong kind") from None


def build(
    folder: Path,
    sources: Sequence[str],
    vocabulary: int,
    *,
    tokenizer: Path | None = None,
    max_tokens: int | None = None,
    tokenizer_documents: int = TOKENIZER_DOCUMENTS,
    quiet: bool = True,
) -> Tokens:
    """Tokens of ``sources`` in ``folder``: under a BPE trained on them, or under ``tokenizer``, whose vocabulary then counts.

    ``max_tokens`` ends the training stream, and reading with it as soon as a document is held out. A folder that already answers the
    same question is opened. Raises ``WrongInput`` when the folder holds anything else, or a source or the tokenizer cannot be had.
    """
    asked = question(sources, vocabulary, tokenizer, max_tokens, tokenizer_documents)
    if (folder / "manifest.json").exists():
        facts = _facts(folder)
        if {name: facts.get(name) for name in asked} != asked:
            raise WrongInput(f"{folder} holds tokens of other sources or settings; choose another folder, or delete it")
        return open_tokens(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise WrongInput(f"{folder} exists and is not a token folder; choose another")
    part = _beside(folder)
    try:
        part.mkdir(parents=True)
        _write(part, sources, asked, tokenizer, quiet)
        _publish(part, folder)
    except OSError as error:
        raise WrongInput(f"{folder} cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return open_tokens(folder, verify=False)


def question(
    sources: Sequence[str],
    vocabulary: int,
    tokenizer: Path | None = None,
    max_tokens: int | None = None,
    tokenizer_documents: int = TOKENIZER_DOCUMENTS,
) -> dict[str, Any]:
    """What a folder is the answer to, as JSON values: files count by their content, not by where they are."""
    asked = {
        "max_tokens": max_tokens,
        "tokenizer": None if tokenizer is None else corpus.file_sha256(tokenizer),
        "vocabulary": vocabulary if tokenizer is None else None,
        "tokenizer_documents": tokenizer_documents if tokenizer is None else None,
    }
    return {"sources": [corpus.find(name).facts() for name in sources], "asked": asked}


def load_tokenizer(file: Path) -> Tokenizer:
    """A ``tokenizer.json``, set to encode whole texts and to take special tokens inside a text as text."""
    if not file.exists():
        raise WrongInput(f"there is no tokenizer {file}")
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises the bare class
        raise WrongInput(f"{file} is not a tokenizer.json: {error}") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    return tokenizer


def end_of(tokenizer: Tokenizer) -> int:
    """The id of the token that closes a document. Raises ``WrongInput`` when the tokenizer has none."""
    for name in ENDS:
        end = tokenizer.token_to_id(name)
        if end is not None:
            return end
    raise WrongInput(f"the tokenizer has no end token, one of {', '.join(ENDS)}")


def token_type(vocabulary: int) -> np.dtype:
    """The smallest unsigned type of a token file that holds ``vocabulary`` ids."""
    return np.dtype(np.uint16 if vocabulary <= 2**16 else np.uint32)


def _train(texts: Iterable[str], vocabulary: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _write(part: Path, sources: Sequence[str], question: dict[str, Any], reused: Path | None, quiet: bool) -> None:
    file, asked = part / "tokenizer.json", question["asked"]
    if reused is None:
        texts = (document.text for document in corpus.read(sources) if not document.held_out)
        _train(islice(texts, asked["tokenizer_documents"]), asked["vocabulary"]).save(str(file))
    else:
        shutil.copyfile(reused, file)
    _sync(file)
    tokenizer = load_tokenizer(reused or file)
    end = end_of(tokenizer)
    vocabulary = 1 + max(tokenizer.get_vocab().values())
    kind = token_type(vocabulary)
    with (
        _Stream(part / "training.bin", kind, asked["max_tokens"]) as training,
        _Stream(part / "held_out.bin", kind) as held_out,
        progress(asked["max_tokens"] or 0, "tokens", quiet) as bar,
    ):
        for document, ids in _encoded(corpus.read(sources), tokenizer):
            bar.update((held_out if document.held_out else training).append([*ids, end]))
            if training.full and held_out.documents:
                break
    if not training.documents or not held_out.documents:
        counts = f"documents to train on: {training.documents}, held out: {held_out.documents}"
        raise WrongInput(f"{counts}; one in {corpus.HELD_OUT} is held out, so more are needed (in a .txt a blank line ends one)")
    facts = {
        "format": FORMAT,
        **question,
        "vocabulary": vocabulary,
        "end": end,
        "dtype": kind.name,
        "training_tokens": training.tokens,
        "held_out_tokens": held_out.tokens,
        "training_documents": training.documents,
        "held_out_documents": held_out.documents,
        "files": {name: {"bytes": (part / name).stat().st_size, "sha256": corpus.file_sha256(part / name)} for name in FILES},
    }
    write_json(part / "manifest.json", facts)


class _Stream:
    """One token file in the making, at most ``limit`` tokens; on disk when its block ends."""

    def __init__(self, file: Path, kind: np.dtype, limit: int | None = None) -> None:
        self.file, self.kind, self.limit, self.tokens, self.documents = file, kind, limit, 0, 0
        self._file = file.open("wb")

    @property
    def full(self) -> bool:
        return self.limit is not None and self.tokens >= self.limit

    def append(self, ids: list[int]) -> int:
        """Append a document, or the beginning that fits; how many tokens that was."""
        if self.full:
            return 0
        ids = ids if self.limit is None else ids[: self.limit - self.tokens]
        self._file.write(np.array(ids, dtype=self.kind).tobytes())
        self.tokens += len(ids)
        self.documents += 1
        return len(ids)

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        _sync(self.file)


def _encoded(documents: Iterable[corpus.Document], tokenizer: Tokenizer) -> Iterator[tuple[corpus.Document, list[int]]]:
    for batch in corpus.batched(documents, BATCH_DOCUMENTS, BATCH_CHARACTERS):
        encodings = tokenizer.encode_batch_fast([document.text for document in batch], add_special_tokens=False)
        yield from ((document, encoding.ids) for document, encoding in zip(batch, encodings, strict=True))


def _sync(file: Path) -> None:
    with file.open("rb+") as opened:
        os.fsync(opened.fileno())


def _beside(folder: Path) -> Path:
    folder = folder.resolve()
    return folder.with_name(f"{folder.name}.{uuid.uuid4().hex[:12]}.part")


def _publish(part: Path, folder: Path) -> None:
    try:
        part.replace(folder)
    except OSError:
        if not (folder / "manifest.json").exists():
            raise  # else another builder was first, and its answer stays


def _facts(folder: Path) -> dict[str, Any]:
    file = folder / "manifest.json"
    try:
        facts = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(facts, dict):
            return facts
        raise ValueError("not a JSON object")
    except FileNotFoundError:
        raise WrongInput(f"{folder} is not a token folder: it has no manifest.json; `lowrank data` builds one") from None
    except (OSError, ValueError) as error:
        raise _damaged(file, str(error)) from None


def _check(file: Path, facts: dict[str, Any], verify: bool) -> None:
    if not file.exists():
        raise _damaged(file, "it is missing")
    if file.stat().st_size != facts["bytes"]:
        raise _damaged(file, f"{file.stat().st_size} bytes instead of {facts['bytes']}")
    if verify and corpus.file_sha256(file) != facts["sha256"]:
        raise _damaged(file, "its sha256 is not the one in the manifest")


def _damaged(file: Path, how: str) -> WrongInput:
    return WrongInput(f"{file} is damaged ({how}); delete the folder {file.parent} to build it again")
