"""What a model is asked in fine-tuning: heads, prompts, responses, and models that cannot be asked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from experiments import runs
from experiments.finetuning import pretrained
from experiments.finetuning.objectives import IGNORED, Classifier, Prompt, Response, logits_at
from experiments.text import tasks
from experiments.text.tasks import Example
from tests.experiments.small_models import WORDS


def asked(folder: Path, head: Any, kind: Callable[..., Any], *more: Any) -> Any:
    model, words = pretrained.load(str(folder), head, 2, 0)
    return kind(model.eval(), words, 16, None, *more)


TASK = tasks.Task("t", ("terrible", "great"), ("terrible", "great"), "{text} It was {mask} .", lambda _: ([], []), "")
TEXTS = [Example("w1 w2 w3", 1), Example("w4", 0), Example("w5 w6", 1)]


def test_a_classifier_is_the_heads_cross_entropy(bert: Path) -> None:
    objective = asked(bert, "classifier", Classifier)
    items = objective.items(TEXTS)
    alone = torch.cat([objective.logits(objective.batch([item])) for item in items]).detach()
    labels = torch.tensor([1, 0, 1])
    assert float(objective(objective.batch(items)).detach()) == pytest.approx(float(nn.functional.cross_entropy(alone, labels)), rel=1e-5)
    score = objective.score(items, 2)
    assert score["accuracy"] == pytest.approx(float((alone.argmax(1) == labels).float().mean()))
    assert score["loss"] == pytest.approx(float(nn.functional.cross_entropy(alone, labels)), rel=1e-5)


def test_a_head_is_drawn_with_the_seed_and_nothing_else_moves(bert: Path) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one, other, third = (pretrained.load(str(bert), "classifier", 3, seed)[0] for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    same = {name: torch.equal(p, dict(other.named_parameters())[name]) for name, p in one.named_parameters()}
    assert all(same.values()) and one.num_labels == 3
    differing = {name for name, p in one.named_parameters() if not torch.equal(p, dict(third.named_parameters())[name])}
    assert differing and all("classifier" in name or "pooler" in name for name in differing)


def test_a_prompt_reads_the_label_words_at_the_mask(bert: Path) -> None:
    objective = asked(bert, "prompt", Prompt, TASK)
    words = objective.tokenizer
    items = objective.items(TEXTS)
    assert words.decode(items[0]["input_ids"]) == "[CLS] w1 w2 w3 It was [MASK] . [SEP]"
    batch = objective.batch(items)
    whole = objective.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    for row, (example, item) in enumerate(zip(TEXTS, items, strict=True)):
        place = item["input_ids"].index(words.mask_token_id)
        expected = whole[row, place][words.convert_tokens_to_ids(["terrible", "great"])]
        torch.testing.assert_close(objective.logits(batch)[row], expected, rtol=1e-5, atol=1e-6)  # products of other sizes round otherwise
        assert int(batch["labels"][row]) == example.label
    long = objective.items([Example(" ".join(WORDS[:30]), 0)])[0]["input_ids"]
    assert len(long) <= 16 and words.decode(long).endswith("It was [MASK] . [SEP]"), "the text gives way, not the question"


def test_pairs_are_asked_as_they_were_published(bert: Path) -> None:
    objective = asked(bert, "prompt", Prompt, replace(TASK, template="{text} ? {mask} , {pair}"))
    said = lambda example: objective.tokenizer.decode(objective.items([example])[0]["input_ids"])  # noqa: E731
    assert said(Example("w1 w2 .", 1, "W3 w4")) == "[CLS] w1 w2 [UNK] [MASK] [UNK] w3 w4 [SEP]"
    assert said(Example("w1 [MASK] w2", 1, "w3")).count("[MASK]") == 1, "a mask in a text is no question"
    long = said(Example("w1 w2", 1, " ".join(WORDS[:30])))
    assert long.startswith("[CLS] w1 w2 [UNK] [MASK]") and long.endswith("[SEP]") and len(long.split()) <= 16, "the longer one gives way"


def test_a_model_that_continues_text_is_asked_at_its_end(llama: Path) -> None:
    objective = asked(llama, "prompt", Prompt, TASK)
    items = objective.items(TEXTS)
    assert objective.tokenizer.decode(items[1]["input_ids"]) == "w4 It was"
    alone = torch.cat([objective.logits(objective.batch([item])) for item in items])
    torch.testing.assert_close(objective.logits(objective.batch(items)), alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("task", "message"),
    [
        (replace(TASK, template="{mask} : {text}"), "its prompt goes on after the answer"),
        (replace(TASK, template="{text} ? {mask} , {pair}"), "its prompt goes on after the answer"),
        (replace(TASK, words=("great", "great")), "do not begin with different tokens"),
    ],
)
def test_prompts_that_cannot_be_asked(task: tasks.Task, message: str, llama: Path) -> None:
    with pytest.raises(runs.WrongInput, match=message):
        asked(llama, "prompt", Prompt, task)


def test_only_responses_are_learnt(llama: Path) -> None:
    from experiments.finetuning.instructions import Pair

    objective = asked(llama, "response", Response)
    items = objective.items([Pair("w1 w2 w3", "w4 w5"), Pair("w6", "w7")])
    assert items[0]["labels"][:3] == [IGNORED] * 3 and objective.tokenizer.decode(items[0]["labels"][3:]) == "w4 w5 [EOS]"
    total = 0.0
    for item in items:
        logits = objective.model(input_ids=torch.tensor([item["input_ids"]])).logits[0].log_softmax(-1)
        total -= sum(float(logits[i - 1, token]) for i, token in enumerate(item["labels"]) if token != IGNORED)
    assert float(objective(objective.batch(items)).detach()) == pytest.approx(total / 5, rel=1e-5), "five tokens: w4 w5 eos, w7 eos"


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_only_the_logits_that_are_asked_for_are_made(kind: str, request: pytest.FixtureRequest) -> None:
    model, _ = pretrained.load(str(request.getfixturevalue(kind)), "prompt", 2, 0)
    batch = {"input_ids": torch.arange(6, 14).view(2, 4), "attention_mask": torch.ones(2, 4, dtype=torch.long)}
    places = torch.tensor([[False, True, False, True], [True, False, False, False]])
    torch.testing.assert_close(logits_at(model.eval(), batch, places), model(**batch).logits[places])
    assert all(not module._forward_pre_hooks for module in model.modules())


def test_outputs_that_nobody_trained_are_refused(bert: Path, tmp_path: Path) -> None:
    with pytest.raises(runs.WrongInput, match="has no trained output for head=prompt"):
        pretrained.load("minilm", "prompt", 2, 0)
    with pytest.raises(runs.WrongInput, match="does not continue text"):
        pretrained.load(str(bert), "response", 2, 0)
    for labels in (2, 3):  # a head of another size is replaced, not refused
        model: Any
        model, words = pretrained.load(str(bert), "classifier", labels, 0)
        model.save_pretrained(tmp_path / str(labels))
        words.save_pretrained(tmp_path / str(labels))
    assert pretrained.load(str(tmp_path / "3"), "classifier", 2, 0)[0].num_labels == 2


def test_a_model_that_is_not_there_is_one_line() -> None:
    with pytest.raises(runs.WrongInput, match=r"the model '/no/where' cannot be loaded for head=classifier"):
        pretrained.load("/no/where", "classifier", 2, 0)
