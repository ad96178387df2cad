"""Seconds of a training step on p devices, between two bounds: all that is sent hidden under the operations, or nothing of it.

    max(t, s) ≤ step ≤ t + s,    t = operations/rate,    s = Σ over collectives of wire/bandwidth + calls·passes·⌈log₂ p⌉·latency

An all-reduce passes twice, a gather or a reduce-scatter once (theory/communication.py has the bytes); recursive halving and doubling need ⌈log₂ p⌉
messages a pass and send as many bytes as a ring (Thakur, Rabenseifner & Gropp (2005)). Full training has t, s; the low-rank step at, φs, with a its
share of the operations and φ of the bytes. With x = s/t the ratio of the steps lies between

    max(a, φx)/max(1, x)  and  (a + φx)/(1 + x):    a where sending is free, φ where nothing else matters.

Sending m×r in the place of m×n pays, beyond what fewer operations give, where x > a: where a device has fewer tokens than hide its messages, in
number ``hiding_tokens``. Under FSDP weights are gathered whole by every method, so φ is 2/3 at best. ``hybrid``: FSDP inside nodes, all-reduce of
what each device keeps between them, so that only gradients cross the slow links. Not counted: the optimizer's update, redraws, stragglers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from theory import operations
from theory.communication import PASSES, Traffic, traffic
from theory.llama import Matrix, Setting

BUCKET = 25 * 2**20  # bytes that DDP sends at a time


@dataclass(frozen=True, kw_only=True)
class Link:
    """``bandwidth``: bytes a second that a device sends; ``latency``: seconds of a message."""

    bandwidth: float
    latency: float = 0.0

    def seconds(self, sent: Traffic, calls: int = 1) -> float:
        """Of one collective in ``calls`` parts."""
        if sent.devices == 1:
            return 0.0
        rounds = calls * PASSES[sent.collective] * math.ceil(math.log2(sent.devices))
        return sent.wire / self.bandwidth + rounds * self.latency


@dataclass(frozen=True, kw_only=True)
class Step:
    """``compute``, ``sending``: seconds of one step."""

    compute: float
    sending: float

    @property
    def hidden(self) -> float:
        """Where what is sent is hidden as far as it can be."""
        return max(self.compute, self.sending)

    @property
    def serial(self) -> float:
        """Where nothing is."""
        return self.compute + self.sending


def work(setting: Setting) -> int:
    """Operations of a step on one device, W ← W + BVᵀ once in it; a V that is not kept is drawn again.

    >>> tiny = Setting(hidden=128, intermediate=352, layers=4, heads=4, vocabulary=2560, method="adamw", length=129)
    >>> work(tiny) == operations.step(128, 128, 352, 4, 2560, 128, None)
    True
    """
    T, h, context = setting.tokens, setting.hidden, setting.length - 1
    micro = setting.layers * (sum(_layer(T, matrix) for matrix in setting.matrices) + 12 * T * context * h)
    micro += operations.dense(T, setting.vocabulary, h)
    if setting.checkpoint_activations:  # the forward pass of the blocks once more
        forward = sum(2 * T * (m.m * m.n + m.rank * (m.n if m.kind == "lowrank" else m.m + m.n)) for m in setting.matrices)
        micro += setting.layers * (forward + 4 * T * context * h)
    return setting.accumulate * micro + lifts(setting) + _drawn(setting)


def _drawn(setting: Setting) -> int:
    """Operations of the draws of a V that is not kept: for every forward pass, recomputed ones too, and for the lift."""
    if setting.store:
        return 0
    uses = setting.accumulate * (2 if setting.checkpoint_activations else 1) + 1
    return uses * setting.layers * sum(operations.redraw(m.n, m.rank) for m in setting.matrices if m.kind == "lowrank")


def lifts(setting: Setting) -> int:
    """Operations of all lifts, once a step whatever the tokens."""
    return setting.layers * sum(operations.lift(m.m, m.n, m.rank) for m in setting.matrices if m.kind == "lowrank")


def _layer(T: int, matrix: Matrix) -> int:
    if matrix.kind == "lowrank":
        return operations.low_rank(T, matrix.m, matrix.n, matrix.rank)
    if matrix.kind == "lora":
        return 4 * T * matrix.m * matrix.n + 6 * T * matrix.rank * (matrix.m + matrix.n)
    return operations.dense(T, matrix.m, matrix.n)


def calls(setting: Setting, sent: Traffic) -> int:
    """Collectives that ``sent`` is made of: buckets under DDP, under FSDP one a group, the root's gathered once."""
    if sent.collective == "all_reduce":
        return math.ceil(sent.payload / BUCKET)
    return setting.accumulate * (2 * setting.layers + 1 if sent.collective == "all_gather" else setting.layers + 1)


def step(setting: Setting, rate: float, link: Link) -> Step:
    """All devices at one kind of link; ``rate``: operations a second that a device reaches."""
    return Step(compute=work(setting) / rate, sending=sum(link.seconds(sent, calls(setting, sent)) for sent in traffic(setting)))


def inside(setting: Setting, node: int) -> Setting:
    """What one of ``node`` devices of a node holds and sends there under ``hybrid``."""
    return replace(setting, world_size=node, shard="fsdp")


def across(setting: Setting, node: int) -> Traffic:
    """What crosses nodes under ``hybrid``: the trained rows that a device keeps, once a step. Raises ``ValueError`` unless nodes are full."""
    if setting.world_size % node:
        raise ValueError(f"step_time.across(world_size={setting.world_size}): not a multiple of node={node}")
    kept = sum(tensor.bytes(node) for tensor in setting.parameters() if tensor.trained)
    return Traffic("all_reduce", kept, setting.world_size // node)


def hybrid(setting: Setting, node: int, rate: float, near: Link, far: Link) -> Step:
    """FSDP over the devices of a node by ``near``, all-reduce between nodes by ``far``."""
    own, sent = inside(setting, node), across(setting, node)
    here = step(own, rate, near)
    return Step(compute=here.compute, sending=here.sending + far.seconds(sent, math.ceil(sent.payload / BUCKET)))


def bounds(full: Step, low: Step) -> tuple[float, float]:
    """Ratio of the steps, everything hidden that can be, and nothing.

    >>> bounds(Step(compute=1.0, sending=3.0), Step(compute=0.75, sending=0.75))
    (0.25, 0.375)
    """
    return low.hidden / full.hidden, low.serial / full.serial


def hiding_tokens(setting: Setting, rate: float, found: Step) -> float:
    """Tokens a device and step whose operations take as long as what is sent, in sequences of the same length; lifts and draws take their share
    whatever the tokens. ``found``: the step of ``setting``, whose messages do not depend on tokens (under FSDP: in one micro-batch)."""
    fixed = lifts(setting) + _drawn(setting)
    each = (work(setting) - fixed) / (setting.tokens * setting.accumulate)
    return max(0.0, found.sending * rate - fixed) / each
