"""A vanished factor of a bilinear model under a sparsity penalty: when descent leaves it at zero for ever, and how soon a coupled step revives it.

f(x, a) = ½(σ − xa)² + λ|x| with x, a > 0 and xa ≤ σ, one component of a sparse code. Proximal descent with step η:

    x⁺ = max(0, x + η((σ − xa)a − λ)),    a⁺ = a + η(σ − xa)x.

(0, a) is stationary whenever σa ≤ λ: the code is zero because the atom is poor, and the atom stays poor because its code is zero. The coupled step
(estimators/coupled.py) keeps x̂ = x where x has vanished beside a and x⁺ < x; there a grows until σ − xa pays for the penalty.
Setting: sparse coding in cogradient descent (CoGD, 2006.09142); the statements are derived here.
"""

from __future__ import annotations

import math

from theory.arguments import Array, finite


def descent(sigma: float, penalty: float, eta: float, x: float, a: float) -> tuple[float, float]:
    """(x⁺, a⁺) of proximal descent; ``penalty``: λ."""
    rest = sigma - x * a
    return max(0.0, x + eta * (rest * a - penalty)), a + eta * rest * x


def stalls(sigma: float, penalty: float, x: float, a: float) -> bool:
    """Whether x + a < λ/σ and λ² ≤ 4σ³, from where proximal descent ends at x = 0 for every η > 0, with f = ½σ².

    Proof. With u = a − λ/σ and s = x + u < 0: xa ≤ (λ/σ)²/4 ≤ σ, so that while x > 0: x⁺ ≤ x + ησu and a ≤ a⁺ ≤ a + ησx. Hence s⁺ ≤ (1 + ησ)s
    stays below s₀ < 0, u < s₀, and x falls by at least ησ|s₀| a step.
    """
    _positive("coupled.stalls", sigma=sigma, penalty=penalty)
    return x + a < penalty / sigma and penalty**2 <= 4 * sigma**3


def steps_to_vanish(sigma: float, penalty: float, eta: float, x: float, a: float) -> int:
    """After at most so many steps x = 0, from a start that ``stalls``: ⌈x/(ησ|s₀|)⌉ with s₀ = x + a − λ/σ. Raises ``ValueError`` elsewhere."""
    _positive("coupled.steps_to_vanish", sigma=sigma, penalty=penalty, eta=eta, x=x, a=a)
    if not stalls(sigma, penalty, x, a):
        raise ValueError(f"coupled.steps_to_vanish(sigma={sigma}, penalty={penalty}, x={x}, a={a}): this start need not stall")
    return math.ceil(x / (eta * sigma * (penalty / sigma - a - x)))


def steps_to_revive(sigma: float, penalty: float, eta: float, x: float, a: float) -> int:
    """After at most so many coupled steps a ≥ a*, the smaller root of (σ − xa*)a* = λ, from where x grows by itself: ⌈(a* − a)/(η(σ − xa*)x)⌉.

    Proof. Until then x̂ = x, and a grows by η(σ − xa)x a step, the less the larger a is, so at least by its value at a*. Raises ``ValueError``
    unless x < σ²/(4λ), without which a* does not exist: so large a code cannot pay for its penalty at any a.
    """
    _positive("coupled.steps_to_revive", sigma=sigma, penalty=penalty, eta=eta, x=x, a=a)
    if 4 * penalty * x >= sigma**2:
        raise ValueError(
            f"coupled.steps_to_revive(sigma={sigma}, penalty={penalty}, x={x}): x must be below σ²/(4λ) = {sigma**2 / 4 / penalty:g}"
        )
    enough = (sigma - math.sqrt(sigma**2 - 4 * penalty * x)) / (2 * x)
    return max(0, math.ceil((enough - a) / (eta * (sigma - x * enough) * x)))


def loss(sigma: float, penalty: float, x: Array | float, a: Array | float) -> Array:
    """f(x, a), entrywise."""
    code, atom = finite("coupled.loss", "x", x), finite("coupled.loss", "a", a)
    return 0.5 * (sigma - code * atom) ** 2 + penalty * abs(code)


def _positive(call: str, **values: float) -> None:
    for name, value in values.items():
        if not 0 < value < math.inf:
            raise ValueError(f"{call}({name}={value}): must be positive and finite")
