"""Peak bytes of one training step of a LLaMA on one device, by what they are for: a walk through the moments of the step.

Held all along are the weights, V and what fitted laws know (projectors), float32 masters, optimizer states, and with DDP the buckets that
gradients are views of. Of an m×n matrix with T tokens full AdamW holds, in elements, mn (W) + mn (gradient) + 2mn (states) + Tn (X); LowRank-IPA
mn + nr (V) + 4mr (B, its gradient, two states) + Tr (XV). On top come attention and nonlinearities (theory/activations.py), the loss, and what
passes.

The moments: the loss, when all activations are held and logits of a chunk of tokens beside them; the begin of the backward pass, when the
gradients of hidden states and head are scaled; every operation of the backward pass of every block, when activations below and gradients above
are held; the embedding's gradient, a dense V×h matrix; the optimizer step; the redraw. The peak is the largest, and the categories are those of
that moment. Exact but for allocator rounding, vectors of a few bytes, and linear-algebra workspaces; measured in experiments/training/footprint.py.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from theory.activations import Moment, around, backward, last_norm, saved
from theory.llama import HALF, SINGLE, Setting, Tensor

CATEGORIES: tuple[str, ...] = (
    "weights",
    "projectors",
    "masters",
    "gradients",
    "states",
    "activations",
    "loss",
    "temporaries",
    "communication",
)
CHUNK_BYTES = 2**26  # of float32 logits at a time (experiments/training/loss.py)
CHUNK_TOKENS = 1024
QUANTIZED, SCALED, TABLE = 4096, 256, 256  # adamw8bit: smallest quantized tensor, elements a scale, entries of the table of values
DOUBLE = 8


@dataclass(frozen=True)
class Footprint:
    """Bytes by category at one moment of the step, named ``moment``."""

    moment: str
    bytes: dict[str, int]

    @property
    def total(self) -> int:
        """Bytes in all."""
        return sum(self.bytes.values())


def peak(setting: Setting, redraw: bool = False) -> Footprint:
    """The largest footprint of the step; ``redraw``: of one in which a fitted law sees full gradients and V is drawn again.

    >>> tiny = Setting(hidden=128, intermediate=352, layers=4, heads=4, vocabulary=2560, sequences=8)
    >>> peak(tiny).moment, round(peak(tiny).total / 2**20)
    ('loss', 74)
    """
    return max(moments(setting, redraw), key=lambda footprint: footprint.total)


def held(setting: Setting) -> dict[str, int]:
    """Bytes by category between two steps, gradients gone. Under FSDP parameters, states and masters lie in rows over the devices; V does not."""
    p, parameters = setting.shards, setting.parameters()
    found = dict.fromkeys(CATEGORIES, 0)
    found["weights"] = sum(tensor.bytes(p) for tensor in parameters)
    found["states"] = sum(state(setting, tensor, p) for tensor in parameters if tensor.trained)
    for matrix in setting.matrices:
        if matrix.kind != "lowrank":
            continue
        k = setting.directions(matrix)
        V = matrix.n * matrix.rank * SINGLE if setting.store else 0
        known = (matrix.n * k + k + 1) * SINGLE + matrix.n * DOUBLE if setting.fitted else 0  # Q, σ, the tail; π in float64
        found["projectors"] += setting.layers * (V + known)
        if setting.masters and setting.weight == HALF:
            found["masters"] += setting.layers * Tensor(rows=matrix.m, columns=matrix.n, size=SINGLE).bytes(p)
    if setting.shard == "ddp" and setting.world_size > 1:
        found["communication"] = sum(tensor.bytes() for tensor in parameters if tensor.trained)  # buckets, which the gradients are views of
    return found


def state(setting: Setting, tensor: Tensor, p: int = 1) -> int:
    """Bytes of the optimizer's state of one trained parameter of which 1/p lies here. Moments have its dtype; Adam counts steps in a float32."""
    here = tensor.bytes(p)
    match setting.optimizer:
        case "sgd":
            return here
        case "muon" if tensor.matrix:
            return here
        case "adamw8bit" if tensor.elements(p) >= QUANTIZED and tensor.elements(p) % SCALED == 0:
            return 2 * (tensor.elements(p) * (SCALED + SINGLE) // SCALED + TABLE * SINGLE) + SINGLE
    return 2 * here + SINGLE


def moments(setting: Setting, redraw: bool = False) -> list[Footprint]:
    """The footprint at every moment that can be the largest. Raises ``ValueError`` for a redraw step of a law that is not fitted."""
    if redraw and not (setting.fitted and setting.method == "lowrank"):
        raise ValueError(f"memory.moments(method={setting.method!r}, fitted={setting.fitted}): only a fitted law has a redraw step")
    if not redraw or setting.accumulate == 1:
        return _Walk(setting, redraw).moments()
    first = _Walk(replace(setting, accumulate=1), redraw=True).moments()  # only the first micro-batch shows its full gradients
    learned = first[-1].bytes["projectors"] - held(setting)["projectors"]
    later = _Walk(setting, redraw=False).moments()
    return [*first, *(Footprint(m.moment, m.bytes | {"projectors": m.bytes["projectors"] + learned}) for m in later)]


class _Walk:
    """The sizes that several moments share."""

    def __init__(self, setting: Setting, redraw: bool) -> None:
        self.setting, self.redraw = setting, redraw
        self.p = setting.shards
        self.held = held(setting)
        self.table, self.tokens = setting.vocabulary * setting.hidden, setting.tokens
        self.H = setting.tokens * setting.hidden
        self.block = sum(saved(setting, redraw).values())
        self.kept = self.H * setting.stream if setting.checkpoint_activations else self.block
        self.around = around(setting)
        trained = [tensor for tensor in setting.block() if tensor.trained]
        self.whole = sum(tensor.bytes() for tensor in trained)  # gradients of a block, and the part that stays here
        self.part = sum(tensor.bytes(self.p) for tensor in trained)
        self.root = sum(tensor.bytes() for tensor in setting.root())
        self.root_part = sum(tensor.bytes(self.p) for tensor in setting.root())
        self.bucketed = setting.shard == "ddp" and setting.world_size > 1
        self.all = 0 if self.bucketed else setting.layers * self.part + self.root_part
        self.copies = 2 if setting.device == "cpu" else 1  # gloo copies what it reduces and scatters
        self.again = setting.accumulate > 1

    def moments(self) -> list[Footprint]:
        setting = self.setting
        ledger, norm = backward(setting, self.redraw), last_norm(setting)
        learned, own = ledger[-1].learned, norm[0].activations
        found = [self._loss(), self._scaled()]
        worst = max(norm, key=lambda moment: moment.total)
        found.append(self._differentiated("last norm", worst, self._activations(setting.layers) - own, 0, 0))
        worst = max(ledger, key=lambda moment: moment.total)
        for above in range(setting.layers):
            below = self._activations(setting.layers - 1 - above) - own
            found.append(self._differentiated(f"block {setting.layers - above}", worst, below, above, learned))
        found += [self._embedding(learned), *([self._scattered(learned)] if self.p > 1 else []), self._update(learned)]
        return [*found, *([self._redraw(learned)] if self.redraw else [])]

    def _at(self, moment: str, gathered: int = 0, **more: int) -> Footprint:
        """Everything held, the parameters that FSDP has gathered, and what is there at this moment only."""
        here = dict(self.held)
        if self.p > 1:
            more["communication"] = more.get("communication", 0) + gathered
        for category, size in more.items():
            here[category] += size
        return Footprint(moment, here)

    def _gathered(self, blocks: int) -> int:
        """Unsharded bytes: the root group all along, and ``blocks`` blocks (one in use, one prefetched)."""
        return self.root + blocks * sum(tensor.bytes() for tensor in self.setting.block())

    def _activations(self, blocks: int) -> int:
        return self.around + blocks * self.kept

    def _gradients(self, root: int, above: int) -> int:
        """Gradients of ``root`` bytes of embedding, head and norm and of ``above`` blocks; where an earlier micro-batch left some, of all.

        Under FSDP the root group's are scattered last, so a micro-batch forms them whole beside the scattered ones of the one before. Under DDP
        each goes into its bucket as soon as it is formed.
        """
        if self.bucketed:
            return 0
        if self.again:
            return self.all + (root if self.p > 1 else 0)
        return root + above * self.part

    def _loss(self) -> Footprint:
        """Logits z and probabilities p of a chunk of tokens, the hidden states, and the gradients by hidden states and head.

        In float32 a chunk's hidden states without ignored tokens pass. In 16 bits the operands are cast, and what passes is the largest of: z in
        float32; a chunk's share of the head's gradient, which a CPU copies to float32 to add it; both gradients in their final dtype.
        """
        setting, H, table = self.setting, self.H, self.table
        rows = min(self.tokens, CHUNK_TOKENS, max(1, CHUNK_BYTES // (SINGLE * setting.vocabulary)))
        logits = rows * setting.vocabulary
        size = logits * (setting.product + SINGLE) + H * setting.product + table * SINGLE
        if setting.product == SINGLE:
            size += rows * setting.hidden * SINGLE
        else:
            casts = (H + table) * HALF if setting.casts else 0
            last = H * setting.stream + (table * HALF if setting.weight == HALF else 0)
            share = (rows * setting.hidden + table) * HALF + (table * SINGLE if setting.device == "cpu" else 0)
            size += casts + max(logits * SINGLE, share, last)
        activations = self._activations(setting.layers) + H * setting.stream
        gradients = self._gradients(0, 0)
        return self._at("loss", self._gathered(0), activations=activations, loss=size, gradients=gradients)

    def _scaled(self) -> Footprint:
        """The kept gradients by hidden states and head, and both times ∂L/∂loss; the head's is a parameter's gradient from here on."""
        size = self.H * self.setting.stream + self.table * self.setting.weight
        activations, gradients = self._activations(self.setting.layers), self._gradients(0, 0)
        return self._at("start of backward", self._gathered(0), activations=activations, loss=2 * size, gradients=gradients)

    def _differentiated(self, name: str, worst: Moment, below: int, above: int, learned: int) -> Footprint:
        """A block's or norm's backward pass: its own moment, activations ``below``, gradients of the head and of ``above`` blocks.

        FSDP reduces a block's gradients when it is done: beside the gradients of the block at hand lies the buffer of the one above.
        """
        buffer = self.copies * self.whole if self.p > 1 and above else 0
        return self._at(
            f"backward of {name}",
            self._gathered(2 if above < self.setting.layers - 1 else 1) + buffer,
            projectors=above * learned + worst.learned,
            gradients=self._gradients(self.table * self.setting.weight, above) + worst.gradients,
            activations=below + worst.activations,
            temporaries=worst.temporaries,
        )

    def _embedding(self, learned: int) -> Footprint:
        """The embedding's gradient is dense; an earlier micro-batch's is there already. All blocks are done."""
        setting = self.setting
        new = self.table * setting.weight
        own = self._gradients(self.root, setting.layers) + (new if (self.again and self.p == 1) or self.bucketed else 0)
        more = {"gradients": own, "temporaries": self.H * setting.stream, "projectors": setting.layers * learned}
        return self._at("embedding", self._gathered(0), **more)

    def _scattered(self, learned: int) -> Footprint:
        """FSDP's last reduction, the parameters already freed: the root group's buffer, what comes out of it, and the head's gradient, which is
        freed after it; an earlier micro-batch's gradients."""
        own = (2 if self.again else 1) * self.root_part + self.setting.layers * self.part + self.table * self.setting.weight
        return self._at("last reduction", self.copies * self.root, gradients=own, projectors=self.setting.layers * learned)

    def _update(self, learned: int) -> Footprint:
        """All gradients, and what the optimizer computes with: for one parameter at a time, or for all of a group."""
        tensors = [tensor for tensor in self.setting.parameters() if tensor.trained]
        groups = [[t for t in tensors if t.matrix], [t for t in tensors if not t.matrix]]
        passing = max(self._passing(group) for group in groups if group)
        return self._at("optimizer step", gradients=self.all, temporaries=passing, projectors=self.setting.layers * learned)

    def _passing(self, group: list[Tensor]) -> int:
        """AdamW: √v and √v over its bias correction, of one parameter; in a group at once √v only, changed in place. Momentum SGD: nothing.

        Muon: Nesterov's mean, then in 16 bits the iterate before and after a step and two Gram matrices. adamw8bit: both moments in float32.
        """
        match self.setting.optimizer:
            case "sgd":
                return 0
            case "muon" if group[0].matrix:
                shapes = ((t.rows, t.columns, t.size) for t in group)
                return max(m * n * (size + 2 * HALF) + 2 * HALF * min(m, n) ** 2 for m, n, size in shapes)
            case "adamw8bit":
                return max(2 * t.elements(self.p) * SINGLE for t in group)
        if self.setting.device == "cuda":
            return sum(t.bytes(self.p) for t in group)
        return max(2 * t.bytes(self.p) for t in group)

    def _redraw(self, learned: int) -> Footprint:
        """Known directions are checked in float64, layer by layer: Q twice, QᵀQ, the identity and their difference."""
        setting = self.setting
        sizes = ((m.n, setting.directions(m)) for m in setting.matrices if m.kind == "lowrank")
        passing = max(DOUBLE * (2 * n * k + 3 * k * k) for n, k in sizes)
        return self._at("redraw", gradients=self.all, projectors=setting.layers * learned, temporaries=passing)


def beside_adamw(setting: Setting) -> Setting:
    """The same step with every weight trained by full AdamW."""
    return replace(setting, method="adamw", optimizer="adamw", fitted=False)
