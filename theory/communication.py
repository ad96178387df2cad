"""Bytes that one training step sends between p devices, by collective: what is handed to it, and what a ring puts on the wire.

DDP sums every trained number over the devices once a step (micro-batches before the last wait): m×r for a converted matrix where full training
sends m×n. FSDP, with every block a group and embedding, head and last norm the root group, gathers a block's parameters (frozen ones too) for
the forward pass and again for the backward pass, the root's once; then it sums and scatters the gradients of what is trained; for every
micro-batch. Rows are padded to a multiple of p.

Ring: the numbers travel p − 1 times as pieces of 1/p, so a device sends (p−1)/p of the whole for a gather or a reduce-scatter, twice that for an
all-reduce, which is both. Reference: Patarasuk and Yuan (2009); ZeRO, arXiv 1910.02054. Not counted: scalars; what fitted laws exchange
(m×n once every K steps, with ``online`` also m×r a micro-batch); what Muon's products of sharded matrices exchange.
"""

from __future__ import annotations

from dataclasses import dataclass

from theory.llama import Setting, Tensor

PASSES = {"all_reduce": 2, "all_gather": 1, "reduce_scatter": 1}  # times that every number goes round the ring


@dataclass(frozen=True)
class Traffic:
    """One collective of one step among ``devices`` devices; ``payload``: bytes of the full tensors it works on."""

    collective: str
    payload: int
    devices: int

    @property
    def wire(self) -> float:
        """Bytes that each device sends."""
        return PASSES[self.collective] * (self.devices - 1) / self.devices * self.payload


def traffic(setting: Setting) -> list[Traffic]:
    """The collectives of one optimizer step; on one device they are there with nothing on the wire.

    >>> tiny = Setting(hidden=128, intermediate=352, layers=4, heads=4, vocabulary=2560, rank=16, world_size=4)
    >>> [(t.collective, t.payload, t.wire) for t in traffic(tiny)]
    [('all_reduce', 2970112, 4455168.0)]
    """
    p = setting.world_size
    trained = [tensor for tensor in setting.parameters() if tensor.trained]
    if setting.shard == "ddp":
        return [Traffic("all_reduce", sum(tensor.bytes() for tensor in trained), p)]
    gathered = 2 * setting.layers * _padded(setting.block(), p) + _padded(setting.root(), p)
    sizes = {"all_gather": gathered, "reduce_scatter": _padded(trained, p)}
    return [Traffic(collective, setting.accumulate * size, p) for collective, size in sizes.items()]


def _padded(tensors: list[Tensor], p: int) -> int:
    return sum(p * tensor.bytes(p) for tensor in tensors)
