"""``convert``: two clocks that commute, draws by key, the way back, interruption, and real models."""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from estimators import LAWS, Conversion, HaarStiefel, LowRankLinear, convert, keyed
from estimators.directions import refine

K, RATE, DECAY = 4, 0.02, 0.1


def network(seed: int = 0, *, unused: bool = False) -> nn.Sequential:
    """12 → 16 → 10 → 1, float64; ``unused``: with a layer that the forward pass does not reach."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers = [nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 10, bias=False), nn.LayerNorm(10), nn.Linear(10, 1)]
        model = nn.Sequential(*layers).double()
        if unused:
            model[1].register_module("spare", nn.Linear(12, 12).double())
    return model


def loss(model: nn.Module, step: int) -> Tensor:
    """A regression whose batch depends on the step only."""
    X = torch.randn(8, 12, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
    return (model(X).squeeze(-1) - X.square().mean(1).sin()).square().mean()


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=RATE, weight_decay=DECAY, fused=True),  # its writes to B leave no trace
    "SGD": lambda p: torch.optim.SGD(p, lr=RATE, momentum=0.9),
}


def advance(model: nn.Module, handle: Conversion, optimizer: torch.optim.Optimizer, steps: range, decay: float = 1.0) -> None:
    for step in steps:
        optimizer.zero_grad()
        loss(model, step).backward()
        optimizer.step()
        handle.step(optimizer, decay=decay)


def trained(optimizer: str = "AdamW", steps: int = 2 * K + 2, **options: Any) -> tuple[nn.Module, Conversion]:
    """A model after some steps, B not lifted yet where ``lift_every`` says so."""
    model = network()
    handle = convert(model, rank=3, refresh_every=K, **options)
    advance(model, handle, OPTIMIZERS[optimizer](handle.parameters()), range(steps), 1 - RATE * DECAY if optimizer == "AdamW" else 1.0)
    return model, handle


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor], tolerance: float = 0.0) -> None:
    assert a.keys() == b.keys()
    for key, value in a.items():
        torch.testing.assert_close(value, b[key], rtol=0, atol=tolerance, msg=key)


# Two clocks


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("law", LAWS)
def test_how_often_it_lifts_does_not_change_the_iteration(law: str, optimizer: str) -> None:
    every = [
        trained(optimizer, law=law, lift_every=lift_every, state="reproject_both")[1].finalize().state_dict() for lift_every in (1, 3, K)
    ]
    assert float((every[0]["0.weight"] - network().state_dict()["0.weight"]).abs().max()) > 0.01  # it moved
    assert_same(every[0], every[1], 1e-10)
    assert_same(every[0], every[2], 1e-10)


@pytest.mark.parametrize("law", LAWS)
def test_stored_and_regenerated_V_give_the_same_bits(law: str) -> None:
    a, b = (trained(law=law, lift_every=4, store=store)[0].state_dict() for store in (True, False))
    assert_same(a, b)


def test_the_iteration_is_that_of_the_definition() -> None:
    """Against plain tensors: W + BVᵀ differentiated by autograd, V drawn from its key, decoupled decay on W + BVᵀ, state dropped at a redraw."""
    ours = trained(lift_every=2, seed=5)[1].finalize().state_dict()
    model = network()
    fixed = {name: p.detach().clone() for name, p in model.named_parameters()}
    names = ["0.weight", "2.weight"]
    free = {name: nn.Parameter(p) for name, p in fixed.items() if name not in names}
    B = {name: nn.Parameter(torch.zeros(len(fixed[name]), 3).double()) for name in names}
    optimizer = OPTIMIZERS["AdamW"]([*B.values(), *free.values()])
    V: dict[str, Tensor] = {}
    for step in range(2 * K + 2):
        if step % K == 0:
            for name in names:
                if step:
                    fixed[name] += B[name].detach() @ V[name].mT
                V[name] = keyed.draw(HaarStiefel(n=fixed[name].shape[1], rank=3), 5, name[:1], step // K, dtype=torch.float64)
                B[name].data.zero_()
                optimizer.state[B[name]].clear()
        optimizer.zero_grad()
        weights = free | {name: fixed[name] + B[name] @ V[name].mT for name in names}
        loss(lambda X: torch.func.functional_call(model, weights, (X,)), step).backward()  # pyright: ignore[reportArgumentType]
        optimizer.step()
        for name in names:
            fixed[name] *= 1 - RATE * DECAY
    expected = free | {name: fixed[name] + B[name].detach() @ V[name].mT for name in names}
    assert_same(ours, {name: p.detach() for name, p in expected.items()}, 1e-10)


def test_a_draw_depends_on_seed_name_and_number_only() -> None:
    def basis(name: str, model: nn.Module, redraws: int = 0, **options: Any) -> Tensor:
        handle = convert(model, rank=3, **options)
        for _ in range(redraws):
            handle.redraw()
        return handle.layers[name].basis()

    V = basis("2", network())
    assert torch.equal(V, basis("2", network(seed=9), targets=["2"], lift_every=7, refresh_every=3, store=False))  # of nothing else
    assert torch.equal(V, keyed.draw(HaarStiefel(n=16, rank=3), 0, "2", 0, dtype=torch.float64))
    wrapped = nn.Sequential(network())
    others = [basis("2", network(), seed=1), basis("2", network(), redraws=1), basis("0.2", wrapped)]
    assert not any(torch.equal(V, other) for other in others)
    assert torch.equal(others[1], keyed.draw(HaarStiefel(n=16, rank=3), 0, "2", 1, dtype=torch.float64))


@pytest.mark.parametrize("law", ["haar_stiefel", "gaussian", "spectral", "top_svd"])
def test_c_of_r_over_n_is_that_of_each_layer(law: str) -> None:
    ranks = {"0": (2, 12), "2": (5, 16)}
    fields: dict[str, Any] = {"law": law, "rank": {name: r for name, (r, _) in ranks.items()}, "refresh_every": 1}
    handle = convert(network(), c="r/n", **fields)
    for name, (r, n) in ranks.items():
        V = handle.layers[name].basis()
        assert torch.equal(V, convert(network(), c=r / n, **fields).layers[name].basis())
        if law == "haar_stiefel":  # columns of length 1, whatever the rank
            assert torch.allclose(V.mT @ V, torch.eye(r, dtype=V.dtype), rtol=0, atol=1e-10)
    advance(handle.model, handle, OPTIMIZERS["SGD"](handle.parameters()), range(2))
    assert {name: (handle.law_of(name).rank, handle.law_of(name).c) for name in ranks} == {"0": (2, 2 / 12), "2": (5, 5 / 16)}
    for wrong in (0.0, math.inf):
        with pytest.raises(ValueError, match="c must be positive and finite, or 'r/n'"):
            convert(network(), c=wrong, **fields)


def test_a_refused_step_can_be_repeated() -> None:
    model = network()
    handle = convert(model, rank=3, refresh_every=1)
    with pytest.raises(ValueError, match="the state policy 'reset' needs the optimizer"):
        handle.step()
    assert handle.steps == handle.draws == 0
    keeping = convert(network(), rank=3, refresh_every=1, state="keep")
    keeping.step()
    assert keeping.draws == 1


# The way back


@pytest.mark.parametrize("lift_every", [1, 4])
def test_finalize_gives_back_the_same_function_in_plain_layers(lift_every: int) -> None:
    model, handle = trained(lift_every=lift_every, steps=K + 1)
    assert bool(handle.layers["0"].B.any()) is (lift_every > 1)
    before = loss(model, 99)
    assert handle.finalize() is model
    torch.testing.assert_close(loss(model, 99), before, rtol=0, atol=1e-10)
    plain = network()
    assert [type(a) for a in model.modules()] == [type(b) for b in plain.modules()]
    shape = {name: (p.shape, p.requires_grad, p.dtype) for name, p in plain.named_parameters()}
    assert {name: (p.shape, p.requires_grad, p.dtype) for name, p in model.named_parameters()} == shape
    assert list(model.state_dict()) == list(plain.state_dict())


def test_without_training_nothing_has_changed() -> None:
    model = network().eval()
    handle = convert(model, rank=3)
    assert not handle.layers["0"].training and torch.equal(loss(model, 1), loss(network(), 1))
    assert_same(handle.finalize().state_dict(), network().state_dict())


# Interruption

CASES: dict[str, dict[str, Any]] = {
    "haar": {"lift_every": 4, "state": "reproject_both"},
    "haar, V not stored": {"lift_every": 1, "store": False},
    "spectral": {"law": "spectral", "online": 0.5, "basis_every": 2, "lift_every": 3, "state": "reproject_both"},
    "spectral, no sketches": {"law": "spectral", "lift_every": 3},
    "top_svd": {"law": "top_svd", "lift_every": 1, "state": "keep"},
    "a layer never used": {"law": "spectral", "lift_every": 3, "unused": True},
}


def setup(unused: bool = False, **options: Any) -> tuple[nn.Module, Conversion, torch.optim.Optimizer]:
    model = network(unused=unused)
    handle = convert(model, rank=3, refresh_every=4, **options)
    return model, handle, torch.optim.AdamW(handle.parameters(), lr=RATE)


@pytest.mark.parametrize("stop", [1, 7, 8, 10])
@pytest.mark.parametrize("case", CASES)
def test_interrupted_equals_uninterrupted_bitwise(case: str, stop: int) -> None:
    """Saved to a file that holds plain values only, loaded into new objects, 18 steps with redraws after 4, 8, 12, 16 in all."""
    model, handle, optimizer = setup(**CASES[case])
    advance(model, handle, optimizer, range(stop))
    file = io.BytesIO()
    torch.save([model.state_dict(), handle.state_dict(), optimizer.state_dict()], file)
    file.seek(0)
    advance(model, handle, optimizer, range(stop, 18))
    saved = torch.load(file, weights_only=True)
    again, handle2, optimizer2 = setup(**CASES[case])
    for part, state in zip((again, handle2, optimizer2), saved, strict=True):
        part.load_state_dict(state)
    lifted = stop % CASES[case]["lift_every"] == 0 or stop % 4 == 0 or (stop == 1 and handle.law.fitted)
    assert handle2.layers["0"].at_zero is lifted
    advance(again, handle2, optimizer2, range(stop, 18))
    assert_same(model.state_dict(), again.state_dict())
    assert (handle.steps, handle.draws) == (handle2.steps, handle2.draws)


@pytest.mark.parametrize("other", [{"seed": 1}, {"rank": 4}, {"law": "gaussian"}, {"c": 0.5}, {"targets": ["0"]}])
def test_the_state_of_another_conversion_is_refused(other: dict[str, Any]) -> None:
    state = convert(network(), rank=3).state_dict()
    with pytest.raises(ValueError, match=r"Conversion.load_state_dict: the state is of a conversion that differs in"):
        convert(network(), **{"rank": 3, **other}).load_state_dict(state)
    with pytest.raises(ValueError, match="differs in masters"):
        convert(network().bfloat16(), rank=3).load_state_dict(state)


def test_what_the_sketches_show_reaches_the_next_law() -> None:
    """The mean of (ĜV)ᵀ(ĜV) over the steps of a period, with its weight; the last full gradient is one period older."""
    model, handle, optimizer = setup(law="spectral", online=0.5, basis_every=2)
    advance(model, handle, optimizer, range(1))
    known, V, grams = handle.fitting.known["2"], handle.layers["2"].basis(), []
    for step in range(1, 4):
        advance(model, handle, optimizer, range(step, step + 1))
        sketch = handle.layers["2"].B.grad
        assert sketch is not None
        grams.append(sketch.mT @ sketch)
    expected = refine(known, V, torch.stack(grams).mean(0), 0.5)
    for ours, oracle in zip(handle.fitting.known["2"], expected, strict=True):
        torch.testing.assert_close(ours, oracle, rtol=1e-9, atol=1e-12)
    assert not torch.equal(known.sigma, expected.sigma)


# Real models


SIZES: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 50}


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**SIZES, max_position_embeddings=32, tie_word_embeddings=True))


def roberta() -> nn.Module:
    from transformers import RobertaConfig, RobertaForSequenceClassification

    options: dict[str, Any] = SIZES | {"num_labels": 3}
    return RobertaForSequenceClassification(RobertaConfig(**options, max_position_embeddings=40))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("build", "law"), [(llama, "haar_stiefel"), (roberta, "spectral")])
def test_transformers_train_save_and_load(build: Callable[[], nn.Module], law: str, tmp_path: Path) -> None:
    """Trained with activation checkpointing and without, to the same weights; then saved by transformers and read back."""
    tokens = torch.randint(3, 50, (4, 12), generator=torch.Generator().manual_seed(0))
    labels = tokens if build is llama else torch.tensor([0, 1, 2, 0])
    torch.manual_seed(0)
    start = build().train()
    for module in start.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    ends = []
    for checkpointing in (None, False, True):
        model: Any = copy.deepcopy(start)
        if checkpointing is not None:
            model.gradient_checkpointing_enable({"use_reentrant": checkpointing})  # the name both major versions know
            model.enable_input_require_grads()
        handle = convert(model, law=law, rank=4, refresh_every=3)
        heads = [name for name in handle.layers if "lm_head" in name or "classifier" in name]
        assert len(handle.layers) == (14 if build is llama else 12) and not heads
        optimizer = torch.optim.AdamW(handle.parameters(), lr=5e-3)
        losses = []
        for _ in range(8):
            optimizer.zero_grad()
            value = model(input_ids=tokens, labels=labels).loss
            value.backward()
            losses.append(float(value.detach()))
            optimizer.step()
            handle.step(optimizer)
        assert losses[-1] < 0.9 * losses[0] and math.isfinite(losses[-1])
        ends.append(handle.finalize())
    for other in ends[1:]:
        assert_same(ends[0].state_dict(), other.state_dict(), 1e-6)
    if build is llama:
        assert ends[0].lm_head.weight is ends[0].model.embed_tokens.weight  # pyright: ignore
    assert not any(isinstance(module, LowRankLinear) for module in ends[0].modules())
    ends[0].save_pretrained(tmp_path)  # pyright: ignore
    again: Any = type(start).from_pretrained(tmp_path)  # pyright: ignore
    assert_same(again.state_dict(), ends[0].state_dict())
    assert torch.equal(again.eval()(input_ids=tokens).logits, ends[0].eval()(input_ids=tokens).logits)
