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
from experiments.text.labelled import Example, Task

IGNORED = -100  # of a target that does not count


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
    """Raises ``WrongInput`` for label words that do not begin with different tokens, and for a template whose mask is not at the end of what a
    model that continues text can read."""

    def __init__(self, model: nn.Module, tokenizer: Any, length: int, autocast: torch.dtype | None, task: Task) -> None:
        super().__init__(model, tokenizer, length, autocast)
        self.task, self.masked = task, tokenizer.mask_token is not None
        before = task.template.split("{mask}")[0]
        if not self.masked and not {"{text}", "{pair}"} & set(_fields(before)):
            raise WrongInput(f"{task.name}: its prompt begins with the answer; only a model with a mask token can be asked")
        words = [tokenizer(f" {word}" if before else word, add_special_tokens=False)["input_ids"] for word in task.words]
        first = [ids[0] for ids in words if ids]
        if len(set(first)) < len(task.words):
            raise WrongInput(f"{task.name}: the label words {', '.join(task.words)} do not begin with different tokens of this model")
        self.first = first

    def items(self, examples: Sequence[Example]) -> list[dict[str, Any]]:
        return [self._item(example) for example in examples]

    def _item(self, example: Example) -> dict[str, Any]:
        mask = self.tokenizer.mask_token if self.masked else ""
        template = self.task.template if self.masked else self.task.template.split("{mask}")[0].rstrip()
        frame = lambda text: template.format(text=text, pair=example.pair, mask=mask)  # noqa: E731
        ids = lambda text: self.tokenizer(frame(text), add_special_tokens=True)["input_ids"]  # noqa: E731
        over = len(ids(example.text)) - self.length
        text = example.text
        if over > 0:  # the text gives way, never the question
            own = self.tokenizer(text, add_special_tokens=False)["input_ids"]
            text = self.tokenizer.decode(own[: max(1, len(own) - over)], skip_special_tokens=True)
        found = ids(text)
        return {"input_ids": found, "attention_mask": [1] * len(found), "labels": example.label}

    def logits(self, batch: dict[str, Tensor]) -> Tensor:
        ids, seen = batch["input_ids"], batch["attention_mask"]
        scores = self.model(input_ids=ids, attention_mask=seen).logits
        place = (ids == self.tokenizer.mask_token_id).int().argmax(1) if self.masked else seen.sum(1) - 1
        return scores[torch.arange(len(ids), device=ids.device), place][:, self.first]

    def targets(self, batch: dict[str, Tensor]) -> Tensor:
        return batch["labels"]


def _fields(template: str) -> list[str]:
    return [name for name in ("{text}", "{pair}", "{mask}") if name in template]


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
        scores = self.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        return scores[:, :-1].flatten(0, 1)

    def targets(self, batch: dict[str, Tensor]) -> Tensor:
        return batch["labels"][:, 1:].flatten()
