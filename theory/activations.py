"""Bytes that one LLaMA block keeps for its backward pass, and how they come and go while it is differentiated.

A block: n₁ = norm(x); q, k, v = Wn₁; q, k rotated; a = attention(q, k, v); y = x + W_o a; n₂ = norm(y); p = silu(W_gate n₂)·W_up n₂;
x′ = y + W_down p. T tokens, H = T·h and I = T·f elements. Each operation keeps what its derivative needs, every storage once:

* norm, in float32: x (H; the residual stream itself where that is float32, else a copy), 1/rms (T), x/rms (H, for the trained weight);
* attention with a fused kernel: q, a (H each), k, v (H each; of grouped queries κH) and a log-sum-exp a head (T·heads, float32);
  never the T×T scores;
* silu(g)·u: g, silu(g), u (I each);
* a dense linear layer: its input X (Tn) to form DᵀX, D = ∂L/∂Y; lowrank: XV (Tr) instead; lora: X for A and XA (Tr) for B. Under autocast X
  is a 16-bit copy, one for each layer that reads it, unless it is 16-bit already; the layer also keeps the 16-bit copy of W that
  gives DW. LowRankLinear keeps W itself and casts it twice. A redraw step of a fitted law keeps X as well.

So in float32 a dense block keeps 10H + 4I, a lowrank one 8H + 3I + TΣr (n₁, n₂ and p go), beside T(2 + heads). ``saved`` has the terms,
``backward`` the ledger of the backward pass, one line an operation. Checked term by term against saved_tensors_hooks of transformers' LlamaModel.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from theory.llama import HALF, SINGLE, Matrix, Setting

OVERSAMPLE = 8  # extra directions of the range finder that learns a fitted law (estimators/directions.py)


def saved(setting: Setting, redraw: bool = False) -> dict[str, int]:
    """Bytes of each tensor that one block keeps between its forward and its backward pass, under a name of its own."""
    H, I = setting.tokens * setting.hidden, setting.tokens * setting.intermediate
    kept: dict[str, int] = {}
    kept |= _kept_by_norm(setting, "norm1") | _kept_by_norm(setting, "norm2")
    kept |= {"q": H * setting.product, "a": H * setting.product}
    kept |= dict.fromkeys(("k", "v"), setting.tokens * setting.keys * setting.product)
    kept["log-sum-exp"] = setting.tokens * setting.heads * SINGLE
    for name in ("gate", "silu", "up"):
        kept[name] = I * setting.product
    for matrix in setting.matrices:
        kept |= _kept_by(setting, matrix, redraw)
    return kept


def around(setting: Setting) -> int:
    """Bytes that the forward pass keeps around the blocks: cos and sin of every position, and what the last norm keeps."""
    rotations = 2 * (setting.length - 1) * (setting.hidden // setting.heads) * setting.stream
    return rotations + sum(_kept_by_norm(setting, "norm").values())


def _kept_by_norm(setting: Setting, norm: str) -> dict[str, int]:
    T, H = setting.tokens, setting.tokens * setting.hidden
    return {f"{norm} x": H * SINGLE, f"{norm} 1/rms": T * SINGLE, f"{norm} x/rms": H * setting.stream}


def _kept_by(setting: Setting, matrix: Matrix, redraw: bool) -> dict[str, int]:
    """What a linear layer keeps beside what others keep already (the output of attention is the input of o)."""
    T, name, kept = setting.tokens, matrix.name, {}
    source = {"q": "n1", "k": "n1", "v": "n1", "o": "a", "gate": "n2", "up": "n2", "down": "p"}[name]
    entering, size = setting.product if source in ("a", "p") else setting.stream, setting.product
    if matrix.kind != "lowrank" or redraw:
        # peft first casts X to the float32 of the factors, so that autocast makes a copy of a 16-bit X as well
        own = size != entering or (matrix.kind == "lora" and setting.casts)
        kept[f"X of {name}" if own else source] = T * matrix.n * size
    if matrix.rank:
        kept[f"sketch of {name}"] = T * matrix.rank * size
    if setting.casts and matrix.kind != "lowrank":
        kept[f"cast of {name}"] = HALF * (matrix.m * matrix.n + sum(rows * columns for rows, columns in matrix.factors()))
    return kept


@dataclass(frozen=True)
class Moment:
    """Bytes of one block at one moment of its backward pass; ``learned``: of directions that a redraw step has found in it."""

    activations: int
    gradients: int
    temporaries: int
    learned: int

    @property
    def total(self) -> int:
        """Their sum."""
        return self.activations + self.gradients + self.temporaries + self.learned


@dataclass
class Ledger:
    """Activations fall, gradients rise, and ∂L/∂(activations) are in flight. ``again``: gradients of an earlier micro-batch lie there already,
    and a new one lives only until it is added to them; not so under FSDP, which adds when it has scattered those of the whole block."""

    kept: dict[str, int]
    again: bool
    flight: int = 0
    gradients: int = 0
    learned: int = 0
    moments: list[Moment] = field(default_factory=list)

    def line(self, *, new: int = 0, passing: int = 0, gone: int = 0, gradient: int = 0, freed: tuple[str, ...] = ()) -> None:
        """An operation: ``new`` bytes in flight and a ``gradient`` appear, ``passing`` ones live during it only; afterwards ``gone`` bytes in
        flight and the ``freed`` activations are no longer there."""
        self.flight += new
        here, added = (passing + gradient, 0) if self.again else (passing, gradient)
        self.gradients += added
        self.moments.append(Moment(sum(self.kept.values()), self.gradients, self.flight + here, self.learned))
        self.flight -= gone
        for name in freed:
            self.kept.pop(name, None)


def backward(setting: Setting, redraw: bool = False) -> list[Moment]:
    """One moment for every operation of a block's backward pass, from ∂L/∂x′ (in flight at the start) to ∂L/∂x (left at the end)."""
    book = Ledger(saved(setting, redraw), again=setting.accumulate > 1 and setting.shards == 1)
    H, I, K = (setting.tokens * features for features in (setting.hidden, setting.intermediate, setting.keys))
    a, s = setting.product, setting.stream
    matrices = {matrix.name: matrix for matrix in setting.matrices}

    def layer(name: str, entering: int, D: int, shared: str = "") -> None:
        _linear(book, setting, matrices[name], entering, shared, redraw)
        book.line(gone=D, freed=(f"X of {name}", f"sketch of {name}", f"cast of {name}", shared))

    book.line(new=H * s)  # ∂L/∂x′, which is also ∂L/∂y along the residual
    book.line(new=H * a if a != s else 0)  # its 16-bit copy for the product
    if setting.checkpoint_activations:
        book.line(passing=_recomputing(setting, matrices["down"]))
    layer("down", a, H * a if a != s else 0, "p")
    book.line(new=2 * I * a, gone=I * a, freed=("silu", "up"))  # of silu(g) and u, from that of p
    layer("up", s, I * a)
    book.line(new=I * a, gone=I * a, freed=("gate",))  # of g, from that of silu(g)
    layer("gate", s, I * a, "n2")
    book.line(gone=H * s)  # the two derivatives by n₂ are added in place
    _norm(book, setting, "norm2")
    book.line(new=H * a if a != s else 0)
    layer("o", a, H * a if a != s else 0)
    book.line(new=(H + 2 * K) * a, gone=H * a, freed=("q", "k", "v", "a", "log-sum-exp"))  # of q, k, v, from that of a
    for rotated in (K, H):  # back, k and q: d·cos, d·sin and the two halves put in their places
        book.line(passing=3 * rotated * s + (rotated * s if a != s else 0))
    layer("v", s, K * a)
    layer("k", s, K * a)
    book.line(gone=H * s)
    layer("q", s, H * a, "n1")
    book.line(gone=H * s)
    _norm(book, setting, "norm1")
    return book.moments


def _recomputing(setting: Setting, down: Matrix) -> int:
    """What passes when a checkpointed block has been computed again up to the last tensor that its backward pass needs, beside all it keeps.

    That is the input of ``down``, so nothing; with LoRA it is XA, and W_down p and the derivative by its second term are there as well, under
    autocast also p and its float32 copy.
    """
    if down.kind != "lora":
        return 0
    H, I = setting.tokens * setting.hidden, setting.tokens * setting.intermediate
    return 2 * H * setting.product + (I * (HALF + SINGLE) if setting.casts else 0)


def last_norm(setting: Setting) -> list[Moment]:
    """The moments of the last norm's backward pass, when ∂L/∂(hidden states) is in flight; activations here are its own."""
    book = Ledger(_kept_by_norm(setting, "norm"), again=setting.accumulate > 1 and setting.shards == 1)
    book.line(new=setting.tokens * setting.hidden * setting.stream)
    _norm(book, setting, "norm", residual=False)
    return book.moments


def _linear(book: Ledger, setting: Setting, matrix: Matrix, entering: int, shared: str, redraw: bool) -> None:
    """∂L/∂X in the dtype of X (``entering`` bytes an element) and the gradient of what is trained; ``shared``: an input no other layer needs."""
    T, m, n, r, a = setting.tokens, matrix.m, matrix.n, matrix.rank, setting.product
    whole, half = (T * n * entering, T * n * a if entering != a else 0)
    if matrix.kind == "dense":
        book.line(new=half or whole, passing=m * n * a if setting.casts else 0)  # DW and DᵀX from one node
        book.line(passing=m * n * a if setting.casts else 0, gradient=m * n * setting.weight)
    elif matrix.kind == "lowrank":
        book.line(new=half or whole, passing=m * n * a if setting.casts else 0)
    else:  # backwards through the scale and B, then A, then W, then the sum of both ways
        book.line(new=T * (m + r) * a, gone=T * m * a, gradient=m * r * setting.weight)
        freed = (f"X of {matrix.name}", f"sketch of {matrix.name}", shared)
        book.line(new=half or whole, gone=T * r * a, gradient=r * n * setting.weight, freed=freed)
        book.line(new=half or whole)
        book.line(passing=half or whole, gone=half or whole)
    if half:
        book.line(new=whole, gone=half)
    if matrix.kind == "lowrank":
        book.line(gradient=m * r * SINGLE, passing=m * r * a if a != SINGLE else 0)
        if redraw:
            k = setting.directions(matrix)
            book.line(passing=learning(m, n, k) + (m * n * a if a != SINGLE else 0))
            book.learned += (n * k + k + 1) * SINGLE


def learning(m: int, n: int, k: int) -> int:
    """Bytes passing while a full gradient G (m×n, float32) is formed and reduced to k directions: G, and the most of three moments.

    The finiteness test holds |G| and two masks; the residual G² with Z, Q (factors of κ = k + 8 columns); the SVD its input, a copy, U and Vᵀ and
    LAPACK's workspace of about 4κ². With κ ≥ min(m, n) the SVD is of G itself.
    """
    small = min(m, n)
    finite = SINGLE * m * n + 2 * m * n
    if k + OVERSAMPLE >= small:
        factors = 0
        svd = SINGLE * (m * n + m * small + n * small + 4 * small * small)
        basis = SINGLE * n * small
    else:
        width = k + OVERSAMPLE
        factors = SINGLE * (m + n) * width
        svd = factors + SINGLE * (3 * m * width + 5 * width * width)
        basis = 0
    residual = SINGLE * (m * n + n * k) + factors + basis
    return SINGLE * m * n + max(finite, svd, residual)


def _norm(book: Ledger, setting: Setting, norm: str, residual: bool = True) -> None:
    """w·(x/rms): the derivative by x/rms and, passing, the product that sums to ∂L/∂w; x/rms: by x directly (H) and through rms, where x, 2x
    and the product of that with the derivative of the mean square pass; then all is added, with the residual's derivative if there is one."""
    H, s = setting.tokens * setting.hidden, setting.stream
    book.line(new=H * s, passing=H * s, gradient=setting.hidden * setting.weight, gone=H * s, freed=(f"{norm} x/rms",))
    if s != SINGLE:
        book.line(new=H * SINGLE, gone=H * s)
    book.line(new=H * SINGLE, passing=H * SINGLE, gone=H * SINGLE)
    book.line(new=H * SINGLE, passing=3 * H * SINGLE, freed=(f"{norm} 1/rms",))
    book.line(passing=H * s if s != SINGLE else 0, gone=2 * H * SINGLE if residual else H * SINGLE, freed=(f"{norm} x",))
