"""What is known of every cell: one small ``cell.json`` in its run directory, and an archive of what is worth carrying away.

A run directory under ``folder`` counts by the cell that its ``cell.json`` names, not by its own name, so it may come from another day and place.
"""

from __future__ import annotations

import io
import json
import re
import tarfile
from pathlib import Path
from typing import Any

from experiments import runs
from experiments.gpu.cells import Cell
from experiments.runs import WrongInput

RECORD = "cell.json"
SMALL = ("config.json", "env.json", "facts.json", RECORD, "DONE")  # of a run, beside its thinned rows
EVERY = 20  # training rows that stay in the archive: one in so many; all others stay


def records(folder: Path) -> dict[str, dict[str, Any]]:
    """Cell name → its record, for all that are finished, diverged or failed."""
    found = {}
    for file in sorted(folder.glob(f"*/{RECORD}")):
        record = json.loads(file.read_text(encoding="utf-8"))
        if found.get(record["cell"], {}).get("status") in (None, "failed"):
            found[record["cell"]] = record
    return found


def record(path: Path, cell: Cell, status: str, **values: Any) -> None:
    """Write the record of a cell: status done, diverged or failed, and its ``row`` or ``rows``."""
    path.mkdir(parents=True, exist_ok=True)
    runs.write_json(path / RECORD, {"cell": cell.name, "status": status, **values})


def failed_path(folder: Path, cell: Cell) -> Path:
    """Where a failure is recorded: beside the run, whose directory stays as it is for the next try."""
    return folder / re.sub(r"[^\w.=-]+", "-", f"failed-{cell.name}")


def archive(folder: Path, file: Path) -> int:
    """Write the small files of every recorded cell to a .tar.gz, atomically; returns its bytes. Checkpoints stay behind."""
    part = file.with_name(f"{file.name}.part")
    part.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(part, "w:gz") as tar:
        for path in sorted(file.parent for file in folder.glob(f"*/{RECORD}")):
            for name in SMALL:
                if (path / name).exists():
                    _add(tar, f"{path.name}/{name}", (path / name).read_bytes())
            thin = [row for row in runs.read_rows(path) if row.get("kind") != "train" or row["step"] % EVERY == 0]
            if thin:
                _add(tar, f"{path.name}/metrics.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in thin).encode())
    part.replace(file)
    return file.stat().st_size


def restore(file: Path, folder: Path) -> int:
    """Unpack an archive into ``folder``, leaving run directories that are there alone; returns how many came. Raises ``WrongInput``."""
    folder.mkdir(parents=True, exist_ok=True)
    there = {path.name for path in folder.iterdir()}
    try:
        with tarfile.open(file, "r:gz") as tar:
            members = [m for m in tar.getmembers() if m.isfile() and Path(m.name).parts[0] not in there]
            tar.extractall(folder, members=members, filter="data")
    except (OSError, EOFError, tarfile.TarError) as error:
        raise WrongInput(f"{file} is not an archive of cells: {error}") from None
    return len({Path(m.name).parts[0] for m in members})


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))
