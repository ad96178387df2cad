"""The vocabulary seen from the residual stream (the logit lens): how much a direction u says of every token.

Final norm and unembedding give u the logits E·(γ ⊙ u/rms u). An RMSNorm divides by a number, so that up to a positive factor they are linear in u:
L·u with L = E·diag γ. A shift common to all tokens is not seen by the softmax, and is taken out: the columns of L have mean 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from experiments.runs import WrongInput

CHUNK = 64  # directions whose scores of all tokens are in memory at a time
DIAGONAL = 1e-3  # relative size of what a norm may do to a basis vector beside scaling it
BLANKS = {" ": "␣", "\n": "⏎", "\t": "⇥", "\r": "␍", "": "∅"}


def visible(text: str) -> str:
    """``text`` without white space or unprintable characters: a space is ␣, a line's end ⏎, a tabulator ⇥, nothing at all ∅; others are escaped."""
    shown = (BLANKS.get(c) or (c if c.isprintable() else c.encode("unicode_escape").decode()) for c in text)
    return "".join(shown) or BLANKS[""]


@dataclass(frozen=True)
class Lens:
    """``L`` (v, d): what each of d coordinates of the residual stream says of each of v tokens, float64, columns of mean 0; ``tokenizer``: of
    transformers, to name tokens."""

    L: Float[Tensor, "v d"]
    tokenizer: Any

    @classmethod
    def of(cls, model: Any, tokenizer: Any) -> Lens:
        """Of a language model whose last norm is an RMSNorm without bias. Raises ``WrongInput`` for another."""
        norm = getattr(model.get_decoder(), "norm", None) if hasattr(model, "get_decoder") else None
        head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        if norm is None or head is None:
            raise WrongInput(f"{type(model).__name__} has no final norm and output embeddings of a LLaMA; the lens looks through these")
        d = head.weight.shape[-1]
        with torch.no_grad():
            scaled = norm(1e3 * torch.eye(d, dtype=head.weight.dtype)) / d**0.5  # e_j has rms 1/√d
            gamma = scaled.diagonal()
            if float((scaled - torch.diag(gamma)).abs().max()) > DIAGONAL * float(gamma.abs().max()):
                raise WrongInput(
                    f"the final norm of {type(model).__name__} is a {type(norm).__name__}; the lens is linear for RMSNorm alone"
                )
            L = (head.weight * gamma).double()
        return cls(L - L.mean(0), tokenizer)

    @cached_property
    def K(self) -> Float[Tensor, "d d"]:
        """LᵀL: uᵀKv is the inner product of the scores of u and v."""
        return self.L.mT @ self.L

    @cached_property
    def _narrow(self) -> Tensor:
        return self.L.float()  # ranks tokens; sums over them are made in float64

    def top(self, W: Float[Tensor, "d c"], count: int) -> Int[Tensor, "c k"]:
        """The ``count`` tokens of the largest scores of every column of W."""
        scale = W.norm(dim=0).clamp_min(torch.finfo(W.dtype).tiny)
        chunks = (W / scale).float().mT.split(CHUNK)
        return torch.cat([(chunk @ self._narrow.mT).topk(count, dim=1).indices for chunk in chunks])

    def energies(self, H: Float[Tensor, "d p"]) -> Float[Tensor, " v"]:
        """‖Hᵀℓ_t‖² of every token t: how much of a gradient with Gram matrix HHᵀ lies along the token's direction."""
        return (self.L @ H).square().sum(1)

    def word(self, token: int) -> str:
        """The token as readable text."""
        piece = self.tokenizer.convert_ids_to_tokens(token)
        if piece is None:  # rows of the output beyond the tokenizer's entries
            return f"<{token}>"
        text = self.tokenizer.decode([token], clean_up_tokenization_spaces=False)
        if "�" in text:  # a part of a character
            text = piece
        return visible(f" {text}" if piece.startswith("▁") and not text.startswith(" ") else text)

    def words(self, tokens: Int[Tensor, " k"]) -> str:
        """Several, with spaces between them."""
        return " ".join(self.word(token) for token in tokens.tolist())


def overlap(some: Int[Tensor, "*batch k"], others: Int[Tensor, "*batch k"]) -> Float[Tensor, "*batch"]:
    """Jaccard: tokens in both over tokens in either, of sets of k each."""
    k = some.shape[-1]
    both = (some.unsqueeze(-1) == others.unsqueeze(-2)).sum((-2, -1)).double()
    return both / (2 * k - both)
