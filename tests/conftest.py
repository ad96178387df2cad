"""Shapes of public functions are checked against their jaxtyping annotations while tests run; one thread a worker."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from jaxtyping import config, install_import_hook

import tests.shapes  # noqa: F401  the hook looks it up by name

hook = install_import_hook("estimators", "tests.shapes.checker")

import torch  # noqa: E402

torch.set_num_threads(1)


@pytest.fixture
def unchecked() -> Iterator[None]:
    """As a user has it: annotations are not enforced, so that our own error messages answer wrong input."""
    config.update("jaxtyping_disable", True)
    yield
    config.update("jaxtyping_disable", False)


@pytest.fixture
def generator() -> torch.Generator:
    """A fixed generator; tests never draw from the global one."""
    return torch.Generator().manual_seed(20_260_320)
