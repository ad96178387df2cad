"""Exact statements about low-rank gradient estimators, in float64 numpy. No torch, no sampling.

One module per law (``mean``, ``second_moment``, ``trace_weighted_mean``), and what follows from the moments: ``mse``, ``levels`` (the
same without matrices), ``optimal``, ``dynamics``, ``feedback``. Beside them ``coupled``: a bilinear
model whose factor vanishes.
"""

from theory.moments import STEMS, Moments, moments

__all__ = ["STEMS", "Moments", "moments"]
