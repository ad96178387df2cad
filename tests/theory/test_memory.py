"""Predicted bytes against hand counts: what a matrix costs, what is sent, what is cut into rows."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from theory import activations, communication, memory
from theory.llama import Setting, Tensor

TINY: dict[str, Any] = {"hidden": 128, "intermediate": 352, "layers": 4, "heads": 4, "vocabulary": 2560, "sequences": 8}
h, f, L, vocabulary = 128, 352, 4, 2560
T = 8 * 127
SHAPES = [(h, h)] * 4 + [(f, h)] * 2 + [(h, f)]
ROOT = 2 * vocabulary * h + h  # embedding, head, last norm
NORMS = 2 * h
DENSE = sum(m * n for m, n in SHAPES)


def tiny(**fields: Any) -> Setting:
    return Setting(**{**TINY, **fields})


def ranks(rank: float) -> list[int]:
    return [round(rank * n) for _, n in SHAPES]


def test_full_adamw_holds_four_numbers_a_weight() -> None:
    """mn (W), mn (gradient), 2mn (states); a state also counts its steps in a float32."""
    held = memory.held(tiny(method="adamw"))
    numbers, tensors = L * (DENSE + NORMS) + ROOT, L * 9 + 3
    assert held["weights"] == 4 * numbers
    assert held["states"] == 8 * numbers + 4 * tensors
    update = next(m for m in memory.moments(tiny(method="adamw")) if m.moment == "optimizer step")
    assert update.bytes["gradients"] == 4 * numbers
    assert update.bytes["temporaries"] == 2 * 4 * vocabulary * h


def test_lowrank_holds_mn_nr_and_4mr_numbers_a_matrix() -> None:
    """mn (W), nr (V), 4mr (B, its gradient, two states): theory.md §9, the rest as in full training."""
    setting = tiny(rank=0.25)
    update = next(m for m in memory.moments(setting) if m.moment == "optimizer step")
    mr = sum(m * r for (m, _), r in zip(SHAPES, ranks(0.25)))
    nr = sum(n * r for (_, n), r in zip(SHAPES, ranks(0.25)))
    rest = L * NORMS + ROOT
    held = sum(update.bytes[name] for name in ("weights", "projectors", "gradients", "states"))
    assert held == 4 * (L * (DENSE + nr + 4 * mr) + 4 * rest) + 4 * (L * 9 + 3)
    assert update.bytes["projectors"] == 4 * L * nr
    assert memory.held(replace(setting, store=False))["projectors"] == 0


def test_what_a_block_keeps_for_its_backward_pass() -> None:
    """float32: 10H + 4I dense, 8H + 3I + TΣr lowrank, beside 1/rms of two norms and a log-sum-exp a head; X again on a redraw step."""
    H, I, vectors = T * h, T * f, T * (2 + 4)
    assert sum(activations.saved(tiny(method="adamw")).values()) == 4 * (10 * H + 4 * I + vectors)
    fitted = tiny(fitted=True)
    assert sum(activations.saved(fitted).values()) == 4 * (8 * H + 3 * I + T * sum(ranks(0.25)) + vectors)
    assert sum(activations.saved(fitted, redraw=True).values()) == 4 * (10 * H + 4 * I + T * sum(ranks(0.25)) + vectors)
    assert sum(activations.saved(tiny(method="lora")).values()) == 4 * (10 * H + 4 * I + T * sum(ranks(0.25)) + vectors)


def test_autocast_copies_an_input_for_every_layer_that_reads_it() -> None:
    """Kept in 16 bits: five copies of n₁ and n₂, q, k, v, a, four of I, every W; in float32: x and x/rms of two norms."""
    H, I = T * h, T * f
    expected = 2 * (9 * H + 4 * I + DENSE) + 4 * (4 * H + T * (2 + 4))
    assert sum(activations.saved(tiny(method="adamw", precision="bf16")).values()) == expected
    lowrank = 2 * (4 * H + 3 * I + T * sum(ranks(0.25))) + 4 * (4 * H + T * (2 + 4))
    assert sum(activations.saved(tiny(precision="bf16")).values()) == lowrank


@pytest.mark.parametrize("method", ["lowrank", "adamw", "lora"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "bf16_weights"])
def test_the_ledger_of_a_block_closes(method: Any, precision: Any) -> None:
    """All activations go but none that was not there, every trained number has its gradient, and ∂L/∂x alone is left in flight."""
    setting = tiny(method=method, precision=precision)
    moments = activations.backward(setting)
    last = moments[-1]
    stream = T * h * setting.stream
    assert moments[0].activations == sum(activations.saved(setting).values())
    assert last.gradients == sum(tensor.bytes() for tensor in setting.block() if tensor.trained)
    passing = stream if setting.stream != 4 else 0
    assert last.temporaries == stream + 2 * T * h * 4 + passing  # the last line still counts the two that are added to it
    again = activations.backward(replace(setting, accumulate=2))
    assert again[-1].gradients == 0 and max(m.total for m in again) <= max(m.total for m in moments) + last.gradients


def test_layers_at_or_below_the_rank_stay_dense() -> None:
    """rank 0.5: down has n = 352 and r = 176, not below min(m, n) = 128."""
    kinds = {matrix.name: matrix.kind for matrix in tiny(rank=0.5).matrices}
    assert kinds == dict.fromkeys(("q", "k", "v", "o", "gate", "up"), "lowrank") | {"down": "dense"}
    with pytest.raises(ValueError, match="no layer of a block has min"):
        tiny(rank=128)


def test_states_of_every_optimizer() -> None:
    """One momentum; Muon one for matrices; adamw8bit a byte, a scale per 256 and a table of 256 values, small tensors plain."""
    matrix, vector = Tensor(rows=64, columns=128, size=4, matrix=True), Tensor(rows=128, columns=1, size=4)
    sizes = {
        name: [memory.state(tiny(optimizer=name), tensor) for tensor in (matrix, vector)] for name in ("adamw", "sgd", "muon", "adamw8bit")
    }
    assert sizes["adamw"] == [2 * 4 * 8192 + 4, 2 * 4 * 128 + 4]
    assert sizes["sgd"] == [4 * 8192, 4 * 128]
    assert sizes["muon"] == [4 * 8192, 2 * 4 * 128 + 4]
    assert sizes["adamw8bit"] == [2 * (8192 + 4 * 8192 // 256 + 4 * 256) + 4, 2 * 4 * 128 + 4]


def test_masters_are_float32_copies_of_converted_16_bit_weights() -> None:
    assert memory.held(tiny())["masters"] == 0
    half = tiny(precision="bf16_weights")
    assert memory.held(half)["masters"] == 4 * L * DENSE
    assert memory.held(replace(half, masters=False))["masters"] == 0


def test_recomputing_keeps_the_inputs_of_blocks() -> None:
    kept = {flag: memory.moments(tiny(checkpoint_activations=flag))[0].bytes["activations"] for flag in (False, True)}
    block = sum(activations.saved(tiny()).values())
    assert kept[False] - kept[True] == L * (block - 4 * T * h)
    assert memory.peak(tiny(checkpoint_activations=True)).total < memory.peak(tiny()).total


def test_a_redraw_step_is_for_fitted_laws_and_holds_more() -> None:
    fitted = tiny(fitted=True)
    assert memory.peak(fitted, redraw=True).total > memory.peak(fitted).total > memory.peak(tiny()).total
    with pytest.raises(ValueError, match="only a fitted law has a redraw step"):
        memory.peak(tiny(), redraw=True)


def test_a_converted_matrix_sends_mr_and_a_full_one_mn() -> None:
    full, low = (communication.traffic(tiny(method=method, rank=16, world_size=4)) for method in ("adamw", "lowrank"))
    rest = L * NORMS + ROOT
    assert [t.payload for t in full] == [4 * (L * DENSE + rest)]
    assert [t.payload for t in low] == [4 * (L * sum(16 * m for m, _ in SHAPES) + rest)]
    assert full[0].wire == 2 * 3 / 4 * full[0].payload


def test_fsdp_gathers_everything_and_scatters_what_is_trained() -> None:
    """All rows here divide by 4: blocks twice, the root once; gradients of B, norms and root once."""
    gathered, scattered = communication.traffic(tiny(rank=16, world_size=4, shard="fsdp", accumulate=3))
    B = sum(16 * m for m, _ in SHAPES)
    assert (gathered.collective, scattered.collective) == ("all_gather", "reduce_scatter")
    assert gathered.payload == 3 * 4 * (2 * L * (DENSE + B + NORMS) + ROOT)
    assert scattered.payload == 3 * 4 * (L * (B + NORMS) + ROOT)
    assert gathered.wire == 3 / 4 * gathered.payload


@pytest.mark.parametrize("method", ["lowrank", "adamw", "lora"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_one_device_has_nothing_to_shard(method: Any, device: Any) -> None:
    ddp, fsdp = (tiny(method=method, device=device, shard=shard) for shard in ("ddp", "fsdp"))
    assert memory.moments(ddp) == memory.moments(fsdp)
    assert memory.peak(ddp).bytes["communication"] == 0
    assert [t.wire for t in communication.traffic(fsdp)] == [0, 0]


@pytest.mark.parametrize("method", ["lowrank", "adamw", "lora"])
def test_more_devices_hold_less(method: Any) -> None:
    """Under FSDP weights and states fall as 1/p up to a row each; V does not; DDP holds its buckets at any p."""
    settings = [tiny(method=method, shard="fsdp", world_size=p, precision="bf16_weights") for p in (1, 2, 3, 4, 8, 64)]
    held = [memory.held(s) for s in settings]
    for name in ("weights", "states", "masters"):
        sizes = [one[name] for one in held]
        assert sizes == sorted(sizes, reverse=True)
        assert all(p * size >= sizes[0] for p, size in zip((1, 2, 3, 4, 8, 64), sizes))
    assert len({one["projectors"] for one in held}) == 1
    peaks = [memory.peak(s).total for s in settings[1:]]
    assert peaks == sorted(peaks, reverse=True)
    buckets = memory.held(tiny(method=method, world_size=2))["communication"]
    assert buckets == communication.traffic(tiny(method=method, world_size=2))[0].payload


@pytest.mark.parametrize("field", ["sequences", "length"])
def test_more_tokens_hold_more(field: str) -> None:
    peaks = [memory.peak(tiny(**{field: value})).total for value in (2, 16, 64, 128)]
    assert peaks == sorted(peaks) and peaks[-1] > 2 * peaks[0]


def test_only_the_first_micro_batch_of_a_redraw_step_keeps_x() -> None:
    """With many of them the activations of one are the same, but gradients of an earlier one lie beside those of the later."""
    one, many = tiny(fitted=True), tiny(fitted=True, accumulate=4)
    shown = [m for m in memory.moments(many, redraw=True) if m.moment == "loss"]
    assert shown[0] == memory.moments(one, redraw=True)[0]
    plain = memory.moments(many)[0].bytes
    assert {name: shown[1].bytes[name] for name in plain if name != "projectors"} == {n: b for n, b in plain.items() if n != "projectors"}
    assert shown[1].bytes["projectors"] > plain["projectors"]


def _communication(moment: str, accumulate: int, device: Any) -> int:
    setting = tiny(method="adamw", shard="fsdp", world_size=4, accumulate=accumulate, device=device)
    return next(m for m in memory.moments(setting) if m.moment == moment).bytes["communication"]


@pytest.mark.parametrize("accumulate", [1, 4])
def test_fsdp_gathers_two_blocks_and_the_root(accumulate: int) -> None:
    """In the middle of the backward pass: block at hand, the next one, root; and the gradients on their way from the block above, which gloo
    copies on a CPU. At the end the root group's own are on their way, with no parameter gathered."""
    assert _communication("backward of block 2", accumulate, "cpu") - 4 * (DENSE + NORMS) == _communication(
        "backward of block 2", accumulate, "cuda"
    )
    assert [_communication("last reduction", accumulate, device) for device in ("cuda", "cpu")] == [4 * ROOT, 2 * 4 * ROOT]
    setting = tiny(method="adamw", shard="fsdp", world_size=4, accumulate=accumulate, device="cuda")
    middle = next(m for m in memory.moments(setting) if m.moment == "backward of block 2")
    assert middle.bytes["communication"] == 4 * (3 * (DENSE + NORMS) + ROOT)
    last = next(m for m in memory.moments(setting) if m.moment == "backward of block 1")
    assert last.bytes["communication"] == 4 * (2 * (DENSE + NORMS) + ROOT)


def test_rows_are_cut_into_equal_chunks() -> None:
    assert [Tensor(rows=10, columns=3, size=2).bytes(p) for p in (1, 3, 4, 20)] == [60, 24, 18, 6]


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"layers": 0}, "layers must be at least 1"),
        ({"length": 1}, "length must be at least 2"),
        ({"rank": 1.5}, "rank must be a positive"),
    ],
)
def test_impossible_settings_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny(**fields)


def test_grouped_queries_share_keys_and_values() -> None:
    """Half as many keys and values: half of k and v in weights and between the passes, all else as it was."""
    whole, grouped = tiny(method="adamw"), tiny(method="adamw", kv_heads=2)
    assert [(m.m, m.n) for m in grouped.matrices[:4]] == [(h, h), (h // 2, h), (h // 2, h), (h, h)]
    assert sum(t.elements() for t in whole.parameters()) - sum(t.elements() for t in grouped.parameters()) == L * h * h
    assert sum(activations.saved(whole).values()) - sum(activations.saved(grouped).values()) == 4 * T * h
    left, found = (activations.backward(setting)[-1] for setting in (whole, grouped))
    assert (found.activations, found.temporaries) == (
        left.activations,
        left.temporaries,
    )  # what the first norm keeps, and H-sized derivatives
    assert left.gradients - found.gradients == 4 * h * h
    with pytest.raises(ValueError, match="kv_heads must divide heads=4, got 3"):
        tiny(kv_heads=3)
