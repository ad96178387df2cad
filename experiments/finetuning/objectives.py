"""What a model is asked: a mean loss over a batch, and how many answers of it are right.

``Classifier``  cross-entropy of a new head over the labels.
``Prompt``      the same over the label words alone, at the masked token, or at the last one of a model that continues text (2305.17333).
``Response``    next-token cross-entropy in nats over the tokens of responses; prompts are read and not learnt.
"""

from __future__ import annotations

import abc
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from experiments.finetuning.instructions import Pair
from experiments.runs import WrongInput
from experiments.text.tasks import Example, Task
from experiments.training.loss import IGNORED


class Objective(nn.Module, abc.ABC):
    """Items are dicts of token lists, a batch is a dict of tensors (examples, tokens) with ``labels``. ``autocast``: dtype of products, None for
    that of the weights."""

    def __init__(self, model: nn.Module, tokenizer: Any, length: int, autocast: torch.dtype | None = None) -> None:
        super().__init__()
        self.model, self.tokenizer, self.length, self.autocast = model, tokenizer, length, autocast

    @abc.abstractmethod
    def items(self, examples: Sequence[Any]) -> list[dict[str, Any]]:
        """Tokens of every example."""

    @abc.abstractmethod
    def logits(self, batch: dict[str, Tensor]) -> Tensor:
        """(answers, choices)."""

    @abc.abstractmethod
    def targets(self, batch: dict[str, Tensor]) -> Tensor:
        """(answers,): the right choice of each, ``IGNORED`` where there is none."""

    def batch(self, items: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """Padded to the longest."""
        device = next(self.model.parameters()).device
        plain = [{key: value for key, value in item.items() if key != "labels"} for item in items]
        padded = self.tokenizer.pad(plain, return_tensors="pt", padding_side="right")
        labels = [torch.as_tensor(item["labels"]) for item in items]
        stacked = torch.stack(labels) if labels[0].ndim == 0 else nn.utils.rnn.pad_sequence(labels, True, IGNORED)
        return {**{key: value.to(device) for key, value in padded.items()}, "labels": stacked.to(device)}

    def answers(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """(logits in float32, targets)."""
        device = batch["labels"].device
        with torch.autocast(device.type, self.autocast) if self.autocast else nullcontext():
            return self.logits(batch).float(), self.targets(batch)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """Mean cross-entropy of the answers, in nats."""
        logits, targets = self.answers(batch)
        return nn.functional.cross_entropy(logits, targets, ignore_index=IGNORED)

    @torch.no_grad()
    def score(self, items: Sequence[dict[str, Any]], at_once: int) -> dict[str, float]:
        """``loss`` (nats an answer) and ``accuracy`` over all answers of ``items``; shorter texts first, so that little is padding."""
        was = self.model.training
        self.model.eval()
        ordered = sorted(items, key=lambda item: len(item["input_ids"]))
        loss = right = count = 0.0
        for start in range(0, len(ordered), at_once):
            logits, targets = self.answers(self.batch(ordered[start : start + at_once]))
            counted = targets != IGNORED
            loss += float(nn.functional.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum"))
            right += float((logits.argmax(-1) == targets)[counted].sum())
            count += float(counted.sum())
        self.model.train(was)
        return {"loss": loss / count, "accuracy": right / count}


class Classifier(Objective):
    def items(self, examples: Sequence[Example]) -> list[dict[str, Any]]:
        pairs = [example.pair for example in examples] if examples and examples[0].pair is not None else None
        found = self.tokenizer([example.text for example in examples], pairs, truncation=True, max_length=self.length)
        return [{key: found[key][i] for key in found} | {"labels": example.label} for i, example in enumerate(examples)]

    def logits(self, batch: dict[str, Tensor]) -> Tensor:
        return self.model(**{key: value for key, value in batch.items() if key != "labels"}).logits

    def targets(self, batch: dict[str, Tensor]) -> Tensor:
        return batch["labels"]


class Prompt(Objective):
    """Raises ``WrongInput`` for label words that do not begin with different tokens, and, where a model continues text, for a template in which
    something that it should read comes after the answer."""

    def __init__(self, model: nn.Module, tokenizer: Any, length: int, autocast: torch.dtype | None, task: Task) -> None:
        super().__init__(model, tokenizer, length, autocast)
        self.task, self.masked = task, tokenizer.mask_token is not None
        before, _, after = task.template.partition("{mask}")
        if not self.masked and ("{text}" in after or "{pair}" in after or "{text}" not in before):
            raise WrongInput(f"{task.name}: its prompt goes on after the answer; only a model with a mask token can be asked")
        words = [tokenizer(f" {word}", add_special_tokens=False)["input_ids"] for word in task.words]
        first = [ids[0] for ids in words if ids]
        if len(set(first)) < len(task.words):
            raise WrongInput(f"{task.name}: the label words {', '.join(task.words)} do not begin with different tokens of this model")
        self.first = first

    def items(self, examples: Sequence[Example]) -> list[dict[str, Any]]:
        return [self._item(example) for example in examples]

    def _item(self, example: Example) -> dict[str, Any]:
        """Texts that are too long are cut at their ends, the longer one first; the question stays. In a pair, as in LM-BFF, the first text gives its
        final mark to the template, and the second begins small after the answer."""
        text, pair = (part if part is None else self._plain(part) for part in (example.text, example.pair))
        assert text is not None
        if pair is not None:
            text, pair = text.rstrip(".,?!"), pair[:1].lower() + pair[1:]
        found = self._ids(text, pair)
        while len(found) > self.length:
            over = len(found) - self.length
            if pair is not None and len(self._own(pair)) > len(self._own(text)):
                pair = self._cut(pair, over)
            elif len(self._own(text)) > 1:
                text = self._cut(text, over)
            else:
                raise WrongInput(f"{self.task.name}: length={self.length} leaves no room for a text beside the question")
            found = self._ids(text, pair)
        return {"input_ids": found, "attention_mask": [1] * len(found), "labels": example.label}

    def _plain(self, text: str) -> str:
        """Without the mask token, should a text contain it."""
        return text.replace(self.tokenizer.mask_token, " ") if self.masked else text

    def _own(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _cut(self, text: str, over: int) -> str:
        own = self._own(text)
        return self.tokenizer.decode(own[: max(1, len(own) - max(1, min(over, len(own) // 2)))], skip_special_tokens=True)

    def _ids(self, text: str, pair: str | None) -> list[int]:
        template = self.task.template if self.masked else self.task.template.split("{mask}")[0].rstrip()
        said = template.format(text=text, pair=pair, mask=self.tokenizer.mask_token)
        return self.tokenizer(said, add_special_tokens=True)["input_ids"]

    def logits(self, batch: dict[str, Tensor]) -> Tensor:
        ids, seen = batch["input_ids"], batch["attention_mask"]
        if self.masked:
            places = ids == self.tokenizer.mask_token_id
        else:
            places = torch.arange(ids.shape[1], device=ids.device) == seen.sum(1, keepdim=True) - 1
        return logits_at(self.model, batch, places)[:, self.first]

    def targets(self, batch: dict[str, Tensor]) -> Tensor:
        return batch["labels"]


def logits_at(model: Any, batch: dict[str, Tensor], places: Tensor) -> Tensor:
    """(N, entries) logits at the N ``places`` (examples, tokens) that are true, in order. All others, often gigabytes, are never made where the
    output is a module of the usual name."""
    output = next((module for name in ("lm_head", "cls") if isinstance(module := getattr(model, name, None), nn.Module)), None)
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    if output is None:
        return model(**inputs).logits[places]
    hook = output.register_forward_pre_hook(lambda _, arguments: (arguments[0][places].unsqueeze(0), *arguments[1:]))
    try:
        return model(**inputs).logits[0]
    finally:
        hook.remove()


class Response(Objective):
    def items(self, examples: Sequence[Pair]) -> list[dict[str, Any]]:
        found = []
        for example in examples:
            prompt = self.tokenizer(example.prompt, add_special_tokens=False)["input_ids"]
            answer = [*self.tokenizer(example.response, add_special_tokens=False)["input_ids"], self.tokenizer.eos_token_id]
            answer = answer[: self.length // 2]  # at most half is answer, and prompts keep their ends
            prompt = prompt[-(self.length - len(answer)) :]
            ids = [*prompt, *answer]
            found.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": [IGNORED] * len(prompt) + answer})
        return found

    def logits(self, batch: dict[str, Tensor]) -> Tensor:
        before = nn.functional.pad(batch["labels"][:, 1:] != IGNORED, (0, 1))  # the tokens that are followed by one of a response
        return logits_at(self.model, batch, before)

    def targets(self, batch: dict[str, Tensor]) -> Tensor:
        following = batch["labels"][:, 1:]
        return following[following != IGNORED]
