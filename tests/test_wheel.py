"""The wheel: all packages, the committed rows and nothing else; installed elsewhere it works without this repository.

It is built from a copy of the sources, because a folder ``build`` that an earlier one left would get into it, and is installed without a network into
an environment that sees other packages of this one, but not the repository: its editable installation is a hook that only its own environment runs.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from experiments.publish import RESULTS, committed
from tests.conftest import Once

ROOT = Path(__file__).parents[1]
PACKAGES = ("theory", "estimators", "optimizers", "experiments")
ENVIRONMENT = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "LOWRANK_COMMIT")} | {"OMP_NUM_THREADS": "1"}
PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet")


def sources() -> list[Path]:
    """All modules, relative to the repository."""
    return [file.relative_to(ROOT) for package in PACKAGES for file in (ROOT / package).rglob("*.py")]


def told(*command: str | Path, cwd: Path) -> str:
    """What a command says; it must succeed."""
    done = subprocess.run(
        [str(word) for word in command], cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def build(folder: Path) -> None:
    """The wheel, beside the copy that it is built from: of tests too, which would get into it if the list of packages did not say otherwise."""
    for package in (*PACKAGES, "tests"):
        shutil.copytree(ROOT / package, folder / "copy" / package, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / "copy")
    told(*PIP, "wheel", ".", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", folder, cwd=folder / "copy")


def install(folder: Path, wheel: Path) -> None:
    """Into a new environment, in a project that is a repository of its own."""
    told("git", "init", "--quiet", cwd=folder)
    told("git", "-c", "user.name=a", "-c", "user.email=a@b.c", "commit", "--quiet", "--allow-empty", "--message", "other work", cwd=folder)
    told(sys.executable, "-m", "venv", "--without-pip", "environment", cwd=folder)
    told(*PIP, "--python", folder / "environment", "install", "--no-deps", "--no-index", "--no-compile", wheel, cwd=folder)
    (own,) = (folder / "environment" / "lib").glob("python*/site-packages")
    others = [path for path in sys.path if Path(path).name == "site-packages"]
    (own / "others.pth").write_text("".join(f"{path}\n" for path in others), encoding="utf-8")  # hooks in there are not run


@pytest.fixture(scope="module")
def wheel(once: Once) -> Path:
    (built,) = once("wheel", build).glob("*.whl")
    return built


@pytest.fixture(scope="module")
def project(once: Once, wheel: Path) -> Path:
    """A folder with an environment that has the wheel."""
    return once("project", lambda folder: install(folder, wheel))


def test_every_package_is_listed() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    assert sorted(settings["packages"]) == sorted({".".join(file.parent.parts) for file in sources() if file.name == "__init__.py"})
    assert {file.parent for file in sources()} == {file.parent for file in sources() if file.name == "__init__.py"}  # no module is outside


def test_it_holds_the_modules_and_the_committed_rows_and_nothing_else(wheel: Path) -> None:
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    rows = [file.relative_to(ROOT) for kind in ("csv", "json") for file in RESULTS.rglob(f"*.{kind}")]
    assert len(rows) > 100 and names == {file.as_posix() for file in (*sources(), *rows)}
    assert any(name.endswith("dist-info/licenses/LICENSE") for name in zipfile.ZipFile(wheel).namelist())


def test_modules_and_committed_rows_come_from_the_installation(project: Path) -> None:
    """The repository is nowhere on the path, and one line gives the rows as a frame."""
    code = f"""
import json, sys
{"".join(f"import {package}; " for package in PACKAGES)}
from experiments.publish import committed
files = [{", ".join(f"{package}.__file__" for package in PACKAGES)}]
print(json.dumps([sys.path, files, committed("compare/tiny-final").to_json()]))
"""
    seen, files, rows = json.loads(told(project / "environment/bin/python", "-c", code, cwd=project))
    assert all(Path(file).is_relative_to(project / "environment") for file in files)
    first = next(path for path in seen if path and (Path(path) / "experiments").exists())
    assert Path(first).is_relative_to(project) and str(ROOT) not in seen
    assert rows == committed("compare/tiny-final").to_json()


def test_the_command_works_elsewhere_and_says_that_there_is_no_repository(project: Path, tmp_path: Path) -> None:
    """Its environment lies in a repository, whose commit is not that of this code."""
    command = project / "environment/bin/lowrank"
    assert told(command, "--help", cwd=project).startswith("usage: lowrank QUESTION")
    flags = f"--law haar_stiefel --shapes 6x8 --spectra flat --ratio 0.5 --quiet --json --runs-dir {tmp_path}"
    (result,) = json.loads(told(command, "validate", "smoke", *flags.split(), cwd=project))["results"]
    assert result["rows"] and all(row["holds"] for row in result["rows"])
    environment = json.loads((Path(result["run"]) / "env.json").read_text(encoding="utf-8"))
    version = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    assert environment["git_sha"] == "" and environment["git_dirty"] is False
    assert environment["installed"] == f"lowrank-gradients {version}, outside a repository"
