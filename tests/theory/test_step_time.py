"""Step times by hand: operations, messages, bounds and where they meet."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest

from theory import communication, operations, step_time
from theory.llama import Setting
from theory.step_time import Link, Step

SIZES: dict[str, Any] = {"hidden": 128, "intermediate": 352, "layers": 4, "heads": 4, "vocabulary": 2560, "sequences": 8, "length": 65}
RATE = 1e9


def tiny(**fields: Any) -> Setting:
    return Setting(**{**SIZES, **fields})


@pytest.mark.parametrize("ratio", [None, 0.25])
def test_work_is_that_of_theory_operations(ratio: float | None) -> None:
    setting = tiny(method="adamw") if ratio is None else tiny(rank=ratio)
    assert step_time.work(setting) == operations.step(8 * 64, 128, 352, 4, 2560, 64, ratio)
    twice = replace(setting, accumulate=2)
    assert step_time.work(twice) - step_time.lifts(twice) == 2 * (step_time.work(setting) - step_time.lifts(setting))
    assert (step_time.lifts(setting) == 0) == (ratio is None)


def test_a_v_that_is_not_kept_is_drawn_at_every_use() -> None:
    kept = tiny(rank=0.25, accumulate=3)
    more = step_time.work(replace(kept, store=False)) - step_time.work(kept)
    assert more == 4 * 4 * sum(operations.redraw(m.n, m.rank) for m in kept.matrices)
    again = tiny(rank=0.25, accumulate=3, checkpoint_activations=True)
    assert step_time.work(replace(again, store=False)) - step_time.work(again) == more * 7 // 4


def test_recomputing_adds_a_forward_pass_of_the_blocks() -> None:
    """A third of the layers' and of the attention's operations, none of the head's."""
    setting = tiny(method="adamw")
    head = operations.dense(setting.tokens, 2560, 128)
    more = step_time.work(replace(setting, checkpoint_activations=True)) - step_time.work(setting)
    assert 3 * more == step_time.work(setting) - head


def test_lora_by_hand() -> None:
    """No product with DᵀX of W, but two thin products forward and four backward."""
    lora, full = tiny(method="lora", rank=8), tiny(method="adamw")
    saved = sum(2 * full.tokens * m.m * m.n - 6 * full.tokens * 8 * (m.m + m.n) for m in full.matrices)
    assert step_time.work(full) - step_time.work(lora) == 4 * saved


def test_seconds_of_messages() -> None:
    link = Link(bandwidth=1000.0, latency=0.5)
    everyone = communication.Traffic("all_reduce", 4000, 4)
    assert link.seconds(everyone) == 2 * 3 / 4 * 4000 / 1000 + 2 * 2 * 0.5
    assert link.seconds(everyone, calls=3) - link.seconds(everyone) == 2 * (2 * 2 * 0.5)
    assert link.seconds(communication.Traffic("all_gather", 4000, 5)) == pytest.approx(4 / 5 * 4 + 3 * 0.5)
    assert link.seconds(communication.Traffic("all_gather", 4000, 1)) == 0


def test_bounds_enclose_every_overlap_and_reach_both_ends() -> None:
    """A share u of what could be hidden is: the ratio of two such steps lies between the bounds' ends wherever both hide the same share."""
    a, phi = 0.75, 0.3
    for x, u in itertools.product((0.0, 0.2, 0.75, 1.0, 2.5, 10.0, 1e6), (0.0, 0.3, 1.0)):
        full, low = Step(compute=1.0, sending=x), Step(compute=a, sending=phi * x)
        hidden, serial = step_time.bounds(full, low)
        assert hidden == pytest.approx(max(a, phi * x) / max(1, x)) and serial == pytest.approx((a + phi * x) / (1 + x))
        ratio = (u * low.hidden + (1 - u) * low.serial) / (u * full.hidden + (1 - u) * full.serial)
        assert min(hidden, serial) - 1e-12 <= ratio <= max(hidden, serial) + 1e-12
    assert step_time.bounds(Step(compute=1, sending=0), Step(compute=a, sending=0)) == (a, a)
    assert step_time.bounds(Step(compute=1, sending=1e9), Step(compute=a, sending=phi * 1e9))[0] == pytest.approx(phi)


@pytest.mark.parametrize("fields", [{"method": "adamw"}, {"rank": 0.25}, {"method": "adamw", "shard": "fsdp"}])
def test_at_the_hiding_tokens_operations_take_as_long_as_messages(fields: dict[str, Any]) -> None:
    setting = tiny(world_size=16, **fields)
    link = Link(bandwidth=1e5)
    tokens = step_time.hiding_tokens(setting, RATE, step_time.step(setting, RATE, link))
    many = replace(setting, sequences=round(tokens / 64))
    found = step_time.step(many, RATE, link)
    assert many.sequences > 10 and found.compute == pytest.approx(found.sending, rel=0.5 / many.sequences)
    assert step_time.hiding_tokens(setting, RATE, Step(compute=1.0, sending=0.0)) == 0


def test_fsdp_saves_a_third_at_best_and_ddp_the_share_of_the_matrices() -> None:
    link = Link(bandwidth=1e9)

    def share(shard: Any) -> float:
        full, low = (tiny(world_size=64, shard=shard, hidden=2048, intermediate=5632, vocabulary=2, heads=16, **m) for m in FULL_AND_THIN)
        return step_time.step(low, RATE, link).sending / step_time.step(full, RATE, link).sending

    assert 2 / 3 < share("fsdp") < 0.68 and share("ddp") < 0.02


FULL_AND_THIN: tuple[dict[str, Any], ...] = ({"method": "adamw"}, {"rank": 16})


def test_hybrid_is_fsdp_inside_and_an_all_reduce_of_rows_between() -> None:
    setting, node = tiny(world_size=32, method="adamw"), 8
    near, far = Link(bandwidth=1e9), Link(bandwidth=1e6)
    sent = step_time.across(setting, node)
    assert (sent.collective, sent.devices) == ("all_reduce", 4)
    assert sent.payload == sum(4 * math.ceil(t.rows / node) * t.columns for t in setting.parameters() if t.trained)
    here = step_time.step(step_time.inside(setting, node), RATE, near)
    whole = step_time.hybrid(setting, node, RATE, near, far)
    assert whole.compute == here.compute and whole.sending == pytest.approx(here.sending + far.seconds(sent))
    assert whole.sending < step_time.step(replace(setting, shard="fsdp"), RATE, far).sending  # weights stay on fast links
    with pytest.raises(ValueError, match="not a multiple of node=5"):
        step_time.across(setting, 5)
