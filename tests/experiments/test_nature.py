"""The word for a method's gradient: known for every name that a table can have, and no other than what the methods themselves claim and do."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from estimators import LAWS
from experiments.optimizers import ALL, CLAIMS
from experiments.pages import nature
from experiments.training import models
from experiments.training.methods import METHODS
from experiments.training.methods.compressed import Compressed
from experiments.training.options import Options
from optimizers import OPTIMIZERS, ZEROTH_ORDER


def test_every_name_of_the_registries_has_one() -> None:
    for name in (*METHODS, *ALL, *LAWS, *ZEROTH_ORDER):
        assert nature.nature(name) in (nature.EXACT, nature.UNBIASED, nature.SHARE, nature.COMPENSATED, nature.BIASED)
    for name in (*nature.ALL_OF_IT, *nature.FED_BACK, *nature.ESTIMATED, *nature.OF_A_LAW):
        assert name in METHODS or name in ALL or name in ZEROTH_ORDER
    for wrong in ("adam", "lowrank:nothing", "adamw haar_stiefel", "lozo:zzz"):
        with pytest.raises(ValueError, match="nature"):
            nature.nature(wrong)


def test_it_is_what_is_claimed_and_measured() -> None:
    """Whoever claims a mean of 1 is exact or unbiased, and no one else's optimizer but APOLLO, whose path is the gradient."""
    for name in ALL:
        word = nature.nature(name)
        claimed = CLAIMS[name](0.25) if name in CLAIMS else None
        assert (claimed == 1.0) == (word in (nature.EXACT, nature.UNBIASED)) or name.startswith("apollo"), name
        assert (claimed == 0.25) == (word == nature.SHARE), name


def test_only_who_is_compensated_keeps_what_was_left_out() -> None:
    """A state that has not less than the matrix itself, beside exact methods', after a step."""
    for name, kind in OPTIMIZERS.items():
        W = nn.Parameter(torch.zeros(512, 512))
        W.grad = torch.randn(512, 512, generator=torch.Generator().manual_seed(0))
        optimizer = kind([("w", W)], 1e-3, **kind.takes(rank=16, residual="fp32"))
        optimizer.step()
        whole = any(torch.is_tensor(t) and t.numel() >= W.numel() for t in optimizer.state[W].values())
        assert whole or nature.nature(name) != nature.COMPENSATED, name


@pytest.mark.parametrize(
    ("label", "word"),
    [
        ("lowrank:haar_stiefel", nature.UNBIASED),
        ("lowrank:top_svd+fused", nature.BIASED),
        ("tokens haar_stiefel", nature.UNBIASED),
        ("gradlite+fused", nature.COMPENSATED),
        ("gradlite_no_feedback", nature.BIASED),
        ("gradlite_static", nature.BIASED),
        ("gradlite_law", nature.UNBIASED),
        ("adamw+recomputed", nature.EXACT),
        ("velora", nature.BIASED),
        ("gorp", nature.BIASED),
        ("protected", nature.BIASED),
        ("golore", nature.SHARE),
        ("lowrank_lr:spectral", nature.UNBIASED),
        ("galore", nature.BIASED),
    ],
)
def test_labels_of_tables(label: str, word: str) -> None:
    assert nature.nature(label) == word


def test_keepers_say_the_same_of_themselves() -> None:

    for name, kind in METHODS.items():
        if isinstance(kind, type) and issubclass(kind, Compressed) and name in ("tokens", "rad", "wta_crs", "velora"):
            method = kind(models.build("tiny", 0), Options(method=name, rank=0.25))
            assert method.compression.unbiased == (nature.nature(name) == nature.UNBIASED), name
