"""Error feedback: one step of each recursion around a compressor C, as pure functions of tensors.

Biased at every step and repaired over time: what C drops is remembered. An unbiased law needs none of this. Convergence and divergence:
theory/feedback.py. The literal form is GradLite as transcribed (arXiv 2510.22467): the residual is added but never paid back, so it
diverges in every discarded direction for every step size; it is kept as the proven counter-example.
References: EF14, Seide et al. (2014); EF21, arXiv 2106.05203.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

Compressor = Callable[[Tensor], Tensor]


def ef14(compress: Compressor, gradient: Tensor, error: Tensor) -> tuple[Tensor, Tensor]:
    """v = e + g; returns (C(v), v − C(v)): the update direction and the new error, both shaped like the gradient."""
    corrected = error + gradient
    sent = compress(corrected)
    return sent, corrected - sent


def ef21(compress: Compressor, gradient: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
    """h ← h + C(g − h); returns (h, h): the update direction is the memory itself."""
    memory = memory + compress(gradient - memory)
    return memory, memory


def literal(compress: Compressor, gradient: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    """GradLite as transcribed: returns (C(g) + r, r + g − C(g)). Diverges; see the module docstring."""
    sent = compress(gradient)
    return sent + residual, residual + gradient - sent


def none(compress: Compressor, gradient: Tensor, unused: Tensor) -> tuple[Tensor, Tensor]:
    """No feedback: returns (C(g), ``unused``)."""
    return compress(gradient), unused
