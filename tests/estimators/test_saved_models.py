"""A model that was trained by ``convert`` or ``compress`` and finalized is a plain model of transformers: it is saved and loaded to the last bit."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from estimators import WTACRS, LawOnFeatures, LawOnTokens, VeLoRA, compress, convert
from estimators.error_basis import ErrorBasis, Inputs

SIZE: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48, "vocab_size": 60}
LABELS: dict[str, Any] = {"num_labels": 3}
MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZE)),
    "llama tied": lambda: LlamaForCausalLM(LlamaConfig(**SIZE, tie_word_embeddings=True, attention_bias=True)),
    "roberta": lambda: RobertaForSequenceClassification(RobertaConfig(**SIZE, **LABELS)),
    "bert": lambda: BertForSequenceClassification(BertConfig(**SIZE, **LABELS)),
}
CONVERSIONS: dict[str, dict[str, Any]] = {
    "every step": {},
    "not lifted yet": {"lift_every": 4, "refresh_every": 8},  # five steps are made
    "fitted": {"law": "spectral", "refresh_every": 2},
    "not stored": {"law": "gaussian", "store": False},
    "master": {"lift": "master", "lift_every": 3},
    "stochastic": {"lift": "stochastic"},
}
KEEPERS: dict[str, Callable[[nn.Linear], Any]] = {
    "tokens": lambda linear: LawOnTokens("coordinate", 0.5),  # noqa: ARG005
    "features": lambda linear: LawOnFeatures("rademacher", 4),  # noqa: ARG005
    "wta_crs": lambda linear: WTACRS(0.5),  # noqa: ARG005
    "velora": lambda linear: VeLoRA(0.25),  # noqa: ARG005
    "error basis": lambda linear: ErrorBasis(Inputs(), 4),  # noqa: ARG005
}


def built(name: str, dtype: torch.dtype = torch.float32) -> Any:
    """Other weights than float32 as users have them, from ``from_pretrained``: ``to`` would also round the frequencies of rotary positions."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = MODELS[name]()
    if dtype == torch.float32:
        return model
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return type(model).from_pretrained(folder, dtype=dtype)


def batch(name: str) -> dict[str, Tensor]:
    tokens = torch.randint(3, 60, (4, 10), generator=torch.Generator().manual_seed(1))
    return {"input_ids": tokens, "labels": tokens if "llama" in name else torch.tensor([0, 1, 2, 0])}


def trained(name: str, model: Any, handle: Any, after: Callable[[Any], None]) -> None:
    """Five steps, with dropout where the model has it."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model.train()
    for _ in range(5):
        optimizer.zero_grad()
        model(**batch(name)).loss.backward()
        optimizer.step()
        after(optimizer)
    handle.finalize()


def plain_and_loads_to_the_last_bit(name: str, model: Any, folder: Path, dtype: torch.dtype = torch.float32) -> None:
    """Kinds of modules, names, shapes and what is trained are those of the model before; nothing is missing, renamed or new in the file."""
    start = built(name, dtype)
    assert [type(module) for module in model.modules()] == [type(module) for module in start.modules()]
    described = [[(key, p.shape, p.dtype, p.requires_grad) for key, p in some.named_parameters()] for some in (model, start)]
    assert described[0] == described[1] and list(model.state_dict()) == list(start.state_dict())
    for some, place in ((model, "trained"), (start, "start")):
        some.save_pretrained(folder / place)
    with (
        safe_open(folder / "trained" / "model.safetensors", "pt") as file,
        safe_open(folder / "start" / "model.safetensors", "pt") as before,
    ):
        assert set(file.keys()) == set(before.keys())
    again, told = type(start).from_pretrained(folder / "trained", dtype=dtype, output_loading_info=True)
    assert not any(told.values()), told
    mine, theirs = model.state_dict(), again.state_dict()
    assert list(theirs) == list(mine) and all(torch.equal(theirs[key], mine[key]) for key in mine)
    with torch.no_grad():
        logits = model.eval()(**batch(name)).logits
        assert torch.equal(again.eval()(**batch(name)).logits, logits)
        assert not torch.allclose(start.eval()(**batch(name)).logits, logits, atol=1e-3)  # training has changed it


@pytest.mark.parametrize("fields", CONVERSIONS.values(), ids=list(CONVERSIONS))
@pytest.mark.parametrize("name", MODELS)
def test_a_converted_model(name: str, fields: dict[str, Any], tmp_path: Path) -> None:
    dtype = torch.bfloat16 if "lift" in fields else torch.float32
    model = built(name, dtype)
    before = model.state_dict().keys()
    handle = convert(model, rank=4, **fields)
    assert model.state_dict().keys() != before  # while it trains there is a B
    trained(name, model, handle, handle.step)
    plain_and_loads_to_the_last_bit(name, model, tmp_path, dtype)


@pytest.mark.parametrize("keeper", KEEPERS)
@pytest.mark.parametrize("name", MODELS)
def test_a_compressed_model(name: str, keeper: str, tmp_path: Path) -> None:
    model = built(name)
    handle = compress(model, keeper=KEEPERS[keeper])
    trained(name, model, handle, lambda _: handle.step())
    plain_and_loads_to_the_last_bit(name, model, tmp_path)


def test_a_model_that_is_not_finalized_is_seen(tmp_path: Path) -> None:
    """The mutant of the tests above: the low-rank part would be lost on the way."""
    model = built("llama")
    handle = convert(model, rank=4, lift_every=8, refresh_every=8)
    trained("llama", model, SimpleNamespace(finalize=lambda: None), handle.step)
    with pytest.raises(AssertionError):
        plain_and_loads_to_the_last_bit("llama", model, tmp_path)
