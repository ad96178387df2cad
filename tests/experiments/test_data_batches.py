"""Batches: every chunk once an epoch, and iterators that continue exactly where they stopped."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch

from experiments.runs import WrongInput
from experiments.text import batches, corpus, tokens
from tests.experiments.test_data import held_out, texts, write_jsonl


@pytest.mark.parametrize("sequences", [1, 4, 7, 50])
def test_an_epoch_has_every_chunk_once(sequences: int) -> None:
    stream = np.arange(23 * 8 + 5, dtype=np.uint16)
    flow = batches.Batches(stream, seed=3, sequences=sequences, length=8)
    rows = torch.cat([flow.next() for _ in range(-(-46 // sequences))])[:46]
    assert rows.dtype == torch.int64 and bool((rows.diff(dim=1) == 1).all())
    first, second = (rows[:, 0] // 8)[:23], (rows[:, 0] // 8)[23:]
    assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(23)) and bool((rows[:, 0] % 8 == 0).all())
    assert not torch.equal(first, second) and first.tolist() != list(range(23))
    assert flow.epochs == pytest.approx(-(-46 // sequences) * sequences / 23)
    other = batches.Batches(stream, seed=4, sequences=sequences, length=8)
    assert not torch.equal(torch.cat([other.next() for _ in range(-(-46 // sequences))])[:46], rows)


@pytest.mark.parametrize("taken", [0, 1, 5, 6, 13])
def test_batches_resume_exactly(taken: int) -> None:
    stream = np.random.default_rng(0).integers(0, 70_000, 500).astype(np.uint32)
    flow = batches.Batches(stream, seed=1, sequences=4, length=20)
    for _ in range(taken):
        flow.next()
    state = json.loads(json.dumps(flow.state_dict()))
    assert state == {"index": 4 * taken}
    again = batches.Batches(stream, seed=1, sequences=4, length=20)
    again.next()
    again.load_state_dict(state)
    halves = batches.Batches(stream, seed=1, sequences=2, length=20)
    halves.load_state_dict(state)
    for _ in range(15):
        expected = flow.next()
        assert torch.equal(expected, again.next())
        assert torch.equal(expected, torch.cat([halves.next(), halves.next()]))
    assert flow.epochs == again.epochs


def test_batches_refuse_what_cannot_be() -> None:
    with pytest.raises(ValueError, match=r"Batches\(length=11\): the stream holds only 10 tokens"):
        batches.Batches(np.zeros(10, np.uint16), 0, 1, 11)
    flow = batches.Batches(np.zeros(10, np.uint16), 0, 1, 10)
    with pytest.raises(ValueError, match="index=-1"):
        flow.load_state_dict({"index": -1})
    with pytest.raises(ValueError, match="limit_tokens=4"):
        batches.held_out_batches(np.zeros(10, np.uint16), 2, 5, 4)


def test_held_out_batches_are_the_beginning_in_order() -> None:
    stream = np.arange(103, dtype=np.uint16)
    for limit, chunks in ((None, 10), (1000, 10), (75, 7), (10, 1)):
        found = list(batches.held_out_batches(stream, 4, 10, limit))
        assert [len(ids) for ids in found] == [4] * (chunks // 4) + [chunks % 4] * (chunks % 4 > 0)
        assert torch.equal(torch.cat(found).flatten(), torch.arange(10 * chunks))


@pytest.fixture
def streams(tmp_path: Path) -> dict[str, Callable[[], Any]]:
    """Streams of the same 300 documents in three files, and their training part through ``corpus.resumable``."""
    (tmp_path / "parts").mkdir()
    files = [str(write_jsonl(tmp_path / "parts" / f"{k}.jsonl", texts(100, start=100 * k))) for k in range(3)]
    return {
        "datasets": lambda: datasets.load_dataset("json", data_files=files, split="train", streaming=True),
        "corpus": lambda: corpus.resumable(str(tmp_path / "parts")),
    }


@pytest.mark.parametrize("kind", ["datasets", "corpus"])
def test_a_stream_is_its_documents_packed_and_resumes_exactly(
    streams: dict[str, Callable[[], Any]], built: tokens.Tokens, kind: str
) -> None:
    tokenizer = tokens.load_tokenizer(built.folder / "tokenizer.json")
    expected = [text for text in texts(300) if kind == "datasets" or not held_out(text)]
    epoch = [id for item in tokenizer.encode_batch(expected) for id in [*item.ids, built.end]]
    if kind == "corpus":
        assert epoch == built.training.tolist()
    flow = batches.StreamBatches(streams[kind](), tokenizer, 3, 64)
    steps = 2 * len(epoch) // (3 * 64) + 3
    states, seen = [], []
    for _ in range(steps):
        states.append(json.dumps(flow.state_dict()))
        seen.append(flow.next())
    assert seen[0].shape == (3, 64) and seen[0].dtype == torch.int64
    assert torch.cat(seen).flatten().tolist() == (epoch * 3)[: steps * 3 * 64] and flow.epochs == 2
    for start in (0, 1, steps // 4, steps // 2 - 1, steps // 2, steps // 2 + 1, steps - 1):
        again = batches.StreamBatches(streams[kind](), tokenizer, 3, 64)
        again.next()
        again.load_state_dict(json.loads(states[start]))
        assert json.dumps(again.state_dict()) == states[start]  # saved again at once, it is the same
        for ids in islice(seen, start, None):
            assert torch.equal(again.next(), ids)
        assert again.epochs == flow.epochs and again.state_dict() == flow.state_dict()


def test_a_stream_without_documents_or_text_is_refused(built: tokens.Tokens) -> None:
    tokenizer = tokens.load_tokenizer(built.folder / "tokenizer.json")
    nothing = datasets.IterableDataset.from_generator(lambda: iter(()))
    other = datasets.Dataset.from_dict({"words": ["a"]}).to_iterable_dataset()
    for stream, message in ((nothing, "holds no documents"), (other, "no field 'text'")):
        flow = batches.StreamBatches(stream, tokenizer, 1, 4)
        with pytest.raises(WrongInput, match=message):
            flow.next()
