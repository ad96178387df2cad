"""Shapes of public functions are checked against their jaxtyping annotations while tests run; one thread a worker.

``--record-checks FILE`` writes how many tests marked ``check(way, method)`` ran and passed, by method and way, and beside
it the code and packages that they ran with.
"""

from __future__ import annotations

import fcntl
import gc
import json
import os
import shutil
from collections.abc import Callable, Iterator
from importlib.metadata import distributions
from pathlib import Path

import pytest
from jaxtyping import config, install_import_hook

import tests.shapes  # noqa: F401  the hook looks it up by name

hook = install_import_hook("estimators", "tests.shapes.checker")

import torch  # noqa: E402

torch.set_num_threads(1)
if not torch.cuda.is_available():  # then kernels are interpreted; read once, when something imports Triton
    os.environ.setdefault("TRITON_INTERPRET", "1")

PEERS = (  # of the published optimizers
    "apollo-torch",
    "badam",
    "bitsandbytes",
    "fira",
    "flora-opt",
    "galore-torch",
    "ista-daslab-optimizers",
    "lomo-optim",
    "pytorch-optimizer",
    "q-galore-torch",
    "torchao",
)


class Checks:
    """Counts the marked tests; their marks travel with the reports of parallel workers."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.counts: dict[tuple[str, str], list[int]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" and not report.skipped:
            for name, value in report.user_properties:
                if name == "check":
                    way, method = str(value).split(" ")
                    count = self.counts.setdefault((method, way), [0, 0])
                    count[0] += report.passed
                    count[1] += 1

    def pytest_sessionfinish(self) -> None:
        from experiments import runs

        told = runs.environment()  # before the file below changes the tree
        rows = [f"{method},{way},{passed},{tests}" for (method, way), (passed, tests) in sorted(self.counts.items())]
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.file.write_text("\n".join(["method,way,passed,tests", *rows]) + "\n", encoding="utf-8")
        peers = {found.name: found.version for found in distributions() if found.name.replace("_", "-") in PEERS}
        told |= {"command": "make checks", "packages": dict(sorted(peers.items()))}
        self.file.with_suffix(".json").write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record-checks", metavar="FILE", help="write the results of tests marked check(way, method) to FILE as CSV")


def pytest_configure(config: pytest.Config) -> None:
    file = config.getoption("--record-checks")
    if file and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Checks(Path(file)))


def pytest_runtest_setup(item: pytest.Item) -> None:
    item.user_properties += [("check", " ".join(mark.args)) for mark in item.iter_markers("check")]


def pytest_collection_finish() -> None:
    """Modules and thousands of tests live to the end: garbage collections, which memory is measured after, need not go through them."""
    gc.collect()
    gc.freeze()


Once = Callable[[str, Callable[[Path], object]], Path]


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory) -> Once:
    """``once(name, build)``: a folder that ``build`` fills, in the first of several workers that asks for it. The others read it, no more."""
    root = tmp_path_factory.getbasetemp()
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root

    def made(name: str, build: Callable[[Path], object]) -> Path:
        folder, done = root / f"once-{name}", root / f"once-{name}.done"
        with (root / f"once-{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not done.exists():
                shutil.rmtree(folder, ignore_errors=True)  # what a worker left that failed
                folder.mkdir()
                build(folder)
                done.touch()
        return folder

    return made


@pytest.fixture
def unchecked() -> Iterator[None]:
    """As a user has it: annotations are not enforced, so that our own error messages answer wrong input, or thousands of draws of a few numbers are
    not slower by half."""
    before = config.jaxtyping_disable
    config.update("jaxtyping_disable", True)
    yield
    config.update("jaxtyping_disable", before)


@pytest.fixture
def generator() -> torch.Generator:
    """A fixed generator; tests never draw from the global one."""
    return torch.Generator().manual_seed(20_260_320)
