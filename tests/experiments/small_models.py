"""Small things to fine-tune: random models of two layers with a tokenizer of some fifty words, and a task that can be learnt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertForMaskedLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tests.experiments.test_labelled import own

WORDS = [f"w{i}" for i in range(40)]
DROPOUT = 0.1
SIZE: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}


def tokenizer(folder: Path, masked: bool) -> PreTrainedTokenizerFast:
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"] if masked else ["[PAD]", "[UNK]", "[EOS]"]
    entries = [*special, "It", "was", ".", "great", "terrible", "yes", "no", "great!", *WORDS]
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(entries)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names: dict[str, str] = {"pad_token": "[PAD]", "unk_token": "[UNK]"}
    if masked:
        made.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
        )
        names |= {"cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
    else:
        names["eos_token"] = "[EOS]"
    fast = PreTrainedTokenizerFast(tokenizer_object=made, **names)
    fast.save_pretrained(folder)
    return fast


def model(folder: Path, masked: bool) -> Path:
    """A BERT with a masked head, or a LLaMA, and its tokenizer at ``folder``."""
    entries = len(tokenizer(folder, masked))
    torch.manual_seed(0)
    if masked:
        made: Any = BertForMaskedLM(BertConfig(vocab_size=entries, **SIZE, hidden_dropout_prob=DROPOUT))
    else:
        made = LlamaForCausalLM(LlamaConfig(vocab_size=entries, **SIZE))
    made.save_pretrained(folder)
    return folder


def parity(folder: Path) -> Path:
    """A task that can be learnt: the label is whether a text has even words or odd ones."""
    generator = torch.Generator().manual_seed(0)

    def some(n: int) -> list[tuple[str, str]]:
        found = []
        for i in range(n):
            picked = 2 * torch.randint(20, (6,), generator=generator) + i % 2
            found.append((" ".join(WORDS[int(w)] for w in picked), ("great", "terrible")[i % 2]))
        return found

    return own(folder, some(400), some(60))
