"""Storages followed on fake tensors: against sizes known by hand, and to the byte against torch's own tracker."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.distributed._tools.mem_tracker import MemTracker

from experiments.training.faked import CATEGORIES, Ledger, faked
from optimizers.storage import code_table

WIDTH, BATCH = 32, 8


@pytest.mark.parametrize("fake", [True, False])
def test_peaks_of_known_sizes(fake: bool) -> None:
    """exp(exp(x)) holds both results at once, a view holds nothing, x is freed inside. Real tensors are counted as fake ones are."""

    def work(ledger: Ledger) -> None:
        x = torch.zeros(10, 100)
        with ledger.part("first"):
            y = x.exp().exp()
            z = y.mT
            del x
        with ledger.part("second"):
            y = z = z.square()  # the old y is still there while this one is made
        assert z is y

    ledger = Ledger()
    if fake:
        with faked(), ledger:
            work(ledger)
    else:
        with ledger:
            work(ledger)
    assert [sum(ledger.peak(part).values()) for part in ("first", "second")] == [12000, 8000]


def test_what_owns_a_storage_says_what_it_is() -> None:
    with faked(), Ledger() as ledger:
        kept, other = torch.zeros(100), torch.zeros(50)
        ledger.owned = lambda: [("weights", kept)]
        with ledger.part("step"):
            kept[:10].add_(1)
            passed = other * 2
            ledger.keeps("activations")
            passed.exp()
    held = ledger.peak("step")
    assert set(held) == set(CATEGORIES)
    assert {name: size for name, size in held.items() if size} == {"weights": 400, "activations": 400, "temporaries": 200}


def test_questions_about_numbers_are_answered_as_if_all_were_well() -> None:
    with faked(), Ledger():
        x = torch.randn(3, 4)
        assert bool(x.isfinite().all()) and not bool((x < 0).any()) and torch.allclose(x, x + 1)
        assert x.sum().item() == 1.0 and (x - 1).abs().max().item() == 0.0 and int((x > 0).sum()) == 12
        assert x[0].isfinite().nonzero().flatten().tolist() == [0, 1, 2, 3]
        assert x[x > 0].shape == (12,)
        assert sorted(torch.ones(5).multinomial(3).tolist()) == [0, 1, 2]  # indices differ
        assert torch.tensor(3.5).item() == 3.5  # what is known stays known
        with pytest.raises(NotImplementedError, match="asks fake tensors for numbers"):
            x.int().unique()


def test_tables_that_are_remembered_do_not_cross_over() -> None:
    before = code_table("exp_avg", torch.device("cpu"))[0]
    with faked(), Ledger():
        inside = code_table("exp_avg", torch.device("cpu"))[0]
        inside.add(torch.zeros(256))
    after = code_table("exp_avg", torch.device("cpu"))[0]
    assert type(before) is Tensor and type(inside) is not Tensor and torch.equal(after, before)


def test_modules_of_fake_tensors_can_be_moved_and_converted() -> None:
    with faked():
        layer = nn.Linear(4, 4).to("cpu").to(torch.bfloat16)
    assert layer.weight.dtype == torch.bfloat16


GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize("device, together", [("cpu", False), pytest.param("cuda", True, marks=GPU)])
def test_a_gpu_updates_all_parameters_at_once(device: str, together: bool) -> None:
    """Temporaries of AdamW on a GPU are as many as all weights and more, on a CPU as many as the largest."""
    with faked(), Ledger() as ledger:
        layers = nn.Sequential(*(nn.Linear(100, 100, bias=False, device=device) for _ in range(8)))
        optimizer = torch.optim.AdamW(layers.parameters())
        for p in layers.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
        with ledger.part("step"):
            optimizer.step()
    before = 4 * 8 * 100**2 * 4  # weights, gradients, two moments
    extra = sum(ledger.peak("step").values()) - before
    assert (extra >= 8 * 100**2 * 4) is together and extra >= 100**2 * 4


def model_of() -> nn.Sequential:
    return nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))


def stepped(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> None:
    optimizer.zero_grad(set_to_none=True)
    model(x).square().mean().backward()
    optimizer.step()


def test_a_step_of_adamw_weighs_what_torch_s_own_tracker_says() -> None:
    """To the byte, of a step whose states are there; torch's counts what the optimizer's step makes for itself as its state."""
    with faked():
        model = model_of()
        optimizer, x = torch.optim.AdamW(model.parameters()), torch.zeros(BATCH, WIDTH)
        stepped(model, optimizer, x)
        tracker = MemTracker()
        tracker.track_external(model, optimizer, x)
        with tracker:
            stepped(model, optimizer, x)
    theirs = {getattr(name, "value", name): size for name, size in tracker.get_tracker_snapshot("peak")[torch.device("cpu")].items()}
    with faked(), Ledger() as ledger:
        model = model_of()
        optimizer, x = torch.optim.AdamW(model.parameters()), torch.zeros(BATCH, WIDTH)
        ledger.owned = lambda: owned(model, optimizer, x)
        stepped(model, optimizer, x)
        with ledger.part("step"):
            stepped(model, optimizer, x)
    ours = ledger.peak("step")
    assert sum(ours.values()) == theirs["Total"]
    assert (ours["weights"], ours["gradients"]) == (theirs["Parameter"], theirs["Gradient"])
    assert ours["activations"] == theirs["Other"] == 4 * BATCH * WIDTH
    assert ours["states"] + ours["temporaries"] == theirs["Optstate"] and ours["temporaries"]


def owned(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> Iterator[tuple[str, Tensor]]:
    yield "activations", x
    for p in model.parameters():
        yield "weights", p
        if p.grad is not None:
            yield "gradients", p.grad
    yield from (("states", value) for state in optimizer.state.values() for value in state.values())
