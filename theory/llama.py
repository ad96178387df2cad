"""What decides the bytes of one training step of a LLaMA: shapes, method, precision, batch, devices. Element counts, no tensors.

A block has seven matrices, each m×n with n in-features: q, o (h×h), k, v (h×h; of grouped queries h·κ×h, κ = key and value heads over heads),
gate, up (f×h), down (h×f); it has two norms of h numbers.
Around the blocks are the embedding and the head (vocabulary×h each, not tied) and a last norm. Embedding, head and norms are trained in
full by every method; a matrix is trained in full (``dense``), through B (m×r) with W frozen (``lowrank``), or through A (r×n) and B (m×r)
with W frozen (``lora``). A layer with min(m, n) ≤ r is left dense. Source: estimators.selection's rules and Touvron et al., arXiv
2302.13971; grouped queries: arXiv 2305.13245.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

SINGLE, HALF = 4, 2  # bytes of a float32 and of a 16-bit number

Method = Literal["lowrank", "adamw", "lora"]
Optimizer = Literal["adamw", "sgd", "muon", "adamw8bit"]
Precision = Literal["fp32", "bf16", "bf16_weights"]
Shard = Literal["ddp", "fsdp"]
Device = Literal["cpu", "cuda"]


@dataclass(frozen=True, kw_only=True)
class Matrix:
    """One linear layer of a block, m×n, and how it is trained. ``rank``: r, 0 for a dense one."""

    name: str
    m: int
    n: int
    kind: Literal["dense", "lowrank", "lora"]
    rank: int

    def factors(self) -> tuple[tuple[int, int], ...]:
        """(rows, columns) of the tensors that are trained in place of W: B, or A and B."""
        B, A = (self.m, self.rank), (self.rank, self.n)
        return {"dense": (), "lowrank": (B,), "lora": (A, B)}[self.kind]


@dataclass(frozen=True, kw_only=True)
class Tensor:
    """A parameter: rows×columns elements of ``size`` bytes (a vector is one column). ``matrix``: in the optimizer group of the blocks' matrices."""

    rows: int
    columns: int
    size: int
    trained: bool = True
    matrix: bool = False

    def elements(self, devices: int = 1) -> int:
        """Elements that the fullest of ``devices`` holds when the rows are cut into equal chunks, the last ones perhaps short or empty."""
        return -(-self.rows // devices) * self.columns

    def bytes(self, devices: int = 1) -> int:
        """Bytes of these elements."""
        return self.elements(devices) * self.size


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One training step as one of ``world_size`` devices sees it.

    ``sequences``: of one micro-batch on this device, of ``length`` tokens each, so T = sequences·(length − 1) predicted tokens; ``accumulate``:
    micro-batches a step; ``rank``: r, or a fraction in (0, 1) of each layer's n; ``fitted``: the law learns from full gradients and keeps
    ``keep``·r directions a layer (an integer ``keep`` is the number itself); ``store``: V is kept; ``masters``: 16-bit converted weights have
    a float32 copy; ``device``: torch updates parameters one at a time on a CPU, a whole group at once on CUDA, and in a sum of two dtypes a CPU
    first makes a copy of the narrower operand.
    Raises ``ValueError`` for impossible values.
    """

    hidden: int  # h
    intermediate: int  # f
    layers: int
    heads: int
    vocabulary: int
    kv_heads: int | None = None  # None: as many as heads
    method: Method = "lowrank"
    rank: int | float = 0.25
    fitted: bool = False
    keep: int | float = 2.0
    store: bool = True
    masters: bool = True
    optimizer: Optimizer = "adamw"
    precision: Precision = "fp32"
    sequences: int = 1
    length: int = 128
    accumulate: int = 1
    checkpoint_activations: bool = False
    world_size: int = 1
    shard: Shard = "ddp"
    device: Device = "cpu"

    def __post_init__(self) -> None:
        call = f"Setting(method={self.method!r}, rank={self.rank})"
        for name in ("hidden", "intermediate", "layers", "heads", "vocabulary", "sequences", "accumulate", "world_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{call}: {name} must be at least 1, got {getattr(self, name)}")
        if self.kv_heads is not None and (self.kv_heads < 1 or self.heads % self.kv_heads):
            raise ValueError(f"{call}: kv_heads must divide heads={self.heads}, got {self.kv_heads}")
        if self.length < 2:
            raise ValueError(f"{call}: length must be at least 2, got {self.length}")
        if self.rank <= 0 or (isinstance(self.rank, float) and self.rank >= 1):
            raise ValueError(f"{call}: rank must be a positive integer or a fraction in (0, 1)")
        if self.method != "adamw" and all(matrix.kind == "dense" for matrix in self.matrices):
            raise ValueError(f"{call}: no layer of a block has min(m, n) above the rank")

    @property
    def tokens(self) -> int:
        """T: the last token of a sequence is a target only."""
        return self.sequences * (self.length - 1)

    @property
    def keys(self) -> int:
        """Features of a key, and of a value: hκ."""
        return self.hidden * (self.kv_heads or self.heads) // self.heads

    @property
    def weight(self) -> int:
        """Bytes of an element of W, and of every parameter that is not a factor."""
        return HALF if self.precision == "bf16_weights" else SINGLE

    @property
    def product(self) -> int:
        """Bytes of an element of a matrix product: autocast makes it 16-bit from float32 weights."""
        return SINGLE if self.precision == "fp32" else HALF

    @property
    def stream(self) -> int:
        """Bytes of an element of the residual stream and of what a norm returns: float32 under autocast, where embedding and norms are."""
        return self.weight

    @property
    def shards(self) -> int:
        """Into how many chunks of rows the parameters are cut: p under FSDP."""
        return self.world_size if self.shard == "fsdp" else 1

    @property
    def casts(self) -> bool:
        """Whether autocast makes a 16-bit copy of what enters a product."""
        return self.precision == "bf16"

    @cached_property
    def matrices(self) -> tuple[Matrix, ...]:
        """The seven matrices of a block."""
        h, f, k = self.hidden, self.intermediate, self.keys
        shapes = {"q": (h, h), "k": (k, h), "v": (k, h), "o": (h, h), "gate": (f, h), "up": (f, h), "down": (h, f)}
        return tuple(self._matrix(name, m, n) for name, (m, n) in shapes.items())

    def _matrix(self, name: str, m: int, n: int) -> Matrix:
        rank = self.rank if isinstance(self.rank, int) else max(1, round(self.rank * n))
        if self.method == "adamw" or min(m, n) <= rank:
            return Matrix(name=name, m=m, n=n, kind="dense", rank=0)
        return Matrix(name=name, m=m, n=n, kind=self.method, rank=rank)

    def block(self) -> list[Tensor]:
        """Parameters of one block. B of a lowrank layer is float32 whatever the weights are; LoRA's factors are as the weights."""
        norms = [Tensor(rows=self.hidden, columns=1, size=self.weight)] * 2
        own = self.method == "adamw"  # layers that a converting method leaves dense belong to its other parameters
        found = []
        for matrix in self.matrices:
            dense, size = matrix.kind == "dense", SINGLE if matrix.kind == "lowrank" else self.weight
            found.append(Tensor(rows=matrix.m, columns=matrix.n, size=self.weight, trained=dense, matrix=own))
            found += [Tensor(rows=rows, columns=columns, size=size, matrix=True) for rows, columns in matrix.factors()]
        return found + norms

    def root(self) -> list[Tensor]:
        """Embedding, head, last norm."""
        table = Tensor(rows=self.vocabulary, columns=self.hidden, size=self.weight)
        return [table, table, Tensor(rows=self.hidden, columns=1, size=self.weight)]

    def parameters(self) -> list[Tensor]:
        """All parameters of the model."""
        return self.block() * self.layers + self.root()

    def directions(self, matrix: Matrix) -> int:
        """k, the directions that a fitted law knows of a layer: at least r, at most min(m, n)."""
        wanted = self.keep if isinstance(self.keep, int) else round(self.keep * matrix.rank)
        return max(matrix.rank, min(wanted, matrix.m, matrix.n))
