"""The layers and the stem rule, read from the source."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from estimators import LAWS
from theory import STEMS

ROOT = Path(__file__).parent.parent
FORBIDDEN = {
    "theory": {"estimators", "optimizers", "experiments", "torch", "tests"},
    "estimators": {"theory", "optimizers", "experiments", "tests"},
    "optimizers": {"theory", "experiments", "tests"},
    "experiments": {"tests"},
}


@pytest.mark.parametrize("package", FORBIDDEN)
def test_dependencies_point_one_way(package: str) -> None:
    for path in (ROOT / package).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path}: relative import"
                names = [node.module or ""]
            roots = {name.split(".")[0] for name in names}
            assert not roots & FORBIDDEN[package], f"{path.name} imports {roots & FORBIDDEN[package]}"


def test_every_law_has_its_stem_on_both_sides() -> None:
    assert {law.stem for law in LAWS.values()} == set(STEMS)
    for stem in STEMS:
        assert (ROOT / "theory" / f"{stem}.py").exists() and (ROOT / "estimators" / f"{stem}.py").exists()


def test_the_registry_has_the_agreed_names() -> None:
    assert list(LAWS) == (
        [
            "gaussian",
            "rademacher",
            "sparse_sign",
            "haar_stiefel",
            "coordinate",
            "coordinate_replacement",
            "dct",
            "hadamard",
            "spectral",
            "top_svd",
            "fixed_basis",
        ]
    )


def test_no_module_outgrows_its_reader() -> None:
    for package in ("theory", "estimators", "optimizers", "experiments"):
        for path in (ROOT / package).rglob("*.py"):
            assert len(path.read_text(encoding="utf-8").splitlines()) <= 300, path
