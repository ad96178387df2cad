"""Instructions and responses: databricks-dolly-15k from the hub, or a .jsonl file in its schema, or in that of prompt and response.

dolly's fields: ``instruction``, ``context`` (may be empty), ``response``. One in ``TEST_SHARE``, by the hash of its prompt, is for tests.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from estimators import keyed
from experiments.runs import WrongInput
from experiments.text import corpus
from experiments.text.labelled import Split

DOLLY = "databricks/databricks-dolly-15k"
TEST_SHARE = 5
ASKED, ABOUT, ANSWER = "### Instruction:\n", "\n\n### Context:\n", "\n\n### Response:\n"


@dataclass(frozen=True)
class Pair:
    """What the model reads, and what it should then write."""

    prompt: str
    response: str


def read(source: str) -> list[Pair]:
    """All pairs of ``dolly`` or of a .jsonl file. Raises ``WrongInput`` for what cannot be read, a missing field and an empty prompt or response."""
    if source == "dolly":
        rows: Iterable[Any] = enumerate(corpus.hub(DOLLY, None, "train", "without a network name a .jsonl file in its schema"), 1)
    elif source.endswith(".jsonl"):
        rows = corpus.objects(Path(source))
    else:
        raise WrongInput(f"instructions are 'dolly' or a .jsonl file, not {source!r}")
    return [_pair(row, f"{source}, row {number}") for number, row in rows]


def split(source: str, k: int, seed: int, tests: int) -> Split:
    """``k`` pairs for training and as many for validation, drawn with ``seed``, and at most ``tests`` others. Raises ``WrongInput`` for too few."""
    pairs = list({pair.prompt: pair for pair in read(source)}.values())  # one response a prompt
    apart = [int.from_bytes(hashlib.sha256(pair.prompt.encode()).digest(), "big") % TEST_SHARE == 0 for pair in pairs]
    pool = [pair for pair, out in zip(pairs, apart, strict=True) if not out]
    test = [pair for pair, out in zip(pairs, apart, strict=True) if out]
    if len(pool) < 2 * k or not test:
        raise WrongInput(
            f"{source} has {len(pool)} pairs beside {len(test)} for tests, k={k} needs {2 * k} for training and validation, and a test"
        )
    order = torch.randperm(len(pool), generator=keyed.generator(seed, "few instructions", k)).tolist()
    return Split([pool[i] for i in order[:k]], [pool[i] for i in order[k : 2 * k]], test[:tests])


def _pair(row: Any, where: str) -> Pair:
    if "prompt" in row and "response" in row:
        prompt, response = str(row["prompt"]), str(row["response"])
    elif "instruction" in row and "response" in row:
        context = str(row.get("context") or "")
        prompt = (
            f"{ASKED}{row['instruction']}{ABOUT + context if context.strip() else ''}{ANSWER}" if str(row["instruction"]).strip() else ""
        )
        response = str(row["response"])
    else:
        raise WrongInput(f"{where}: needs 'instruction' and 'response', or 'prompt' and 'response', not {', '.join(row)}")
    if not prompt.strip() or not response.strip():
        raise WrongInput(f"{where}: an empty {'response' if prompt.strip() else 'instruction'}")
    return Pair(prompt, response)
