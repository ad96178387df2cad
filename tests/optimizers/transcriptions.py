"""Every rule once more, naively: float64 numpy, one matrix, one function a method, as the paper writes it with P (m×r) on the left.

``frames[t]`` is the projector that the period of step t uses. Nothing here is shared with optimizers/.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

Array = np.ndarray
Frames = Callable[[int], Array]


def galore(
    W: Array, Gs: list[Array], P: Frames, *, lr: float, alpha: float, b1: float, b2: float, eps: float, wd: float, code: bool = False
) -> list[Array]:
    """Algorithm 2 of 2403.03507; ``code``: the order of its implementation."""
    M = V = 0.0
    out = []
    for t, G in enumerate(Gs):
        R = P(t).T @ G
        M = b1 * M + (1 - b1) * R
        V = b2 * V + (1 - b2) * R**2
        c1, c2 = 1 - b1 ** (t + 1), 1 - b2 ** (t + 1)
        if code:
            W = W - lr * np.sqrt(c2) / c1 * alpha * P(t) @ (M / (np.sqrt(V) + eps))
            W = W - lr * wd * W
        else:
            W = (1 - lr * wd) * W - lr * alpha * P(t) @ ((M / c1) / (np.sqrt(V / c2) + eps))
        out.append(W)
    return out


def galore_adafactor(W: Array, Gs: list[Array], P: Frames, *, lr: float, alpha: float, b1: float, floor: float, wd: float) -> list[Array]:
    """Adafactor (1804.04235) on PᵀG with relative step sizes and momentum of the steps."""
    row = col = M = 0.0
    out = []
    for t, G in enumerate(Gs):
        R = P(t).T @ G
        beta = 1 - (t + 1) ** -0.8
        row = beta * row + (1 - beta) * (R**2 + 1e-30).mean(1)
        col = beta * col + (1 - beta) * (R**2 + 1e-30).mean(0)
        U = R / np.sqrt(np.outer(row, col) / row.mean())
        U = U / max(1.0, np.sqrt((U**2).mean()))
        rate = lr * max(floor, np.sqrt((W**2).mean()))
        M = b1 * M + (1 - b1) * rate * U
        W = (1 - rate * wd) * W - alpha * P(t) @ M
        out.append(W)
    return out


def golore(
    W: Array, Gs: list[Array], P: Frames, refresh: int, *, lr: float, alpha: float, b1: float, b2: float, eps: float, wd: float
) -> list[Array]:
    """GaLore with M ← P_newᵀP_old M at a refresh (2410.11289)."""
    M, V = 0.0, 0.0
    out = []
    for t, G in enumerate(Gs):
        if t and t % refresh == 0:
            M = P(t).T @ P(t - 1) @ M
        R = P(t).T @ G
        M = b1 * M + (1 - b1) * R
        V = b2 * V + (1 - b2) * R**2
        W = (1 - lr * wd) * W - lr * alpha * P(t) @ (M / (1 - b1 ** (t + 1)) / (np.sqrt(V / (1 - b2 ** (t + 1))) + eps))
        out.append(W)
    return out


def flora(W: Array, Gs: list[Array], P: Frames, refresh: int, *, lr: float, beta: float, wd: float) -> list[Array]:
    """Momentum in a sketch with A = Pᵀ (2402.03293)."""
    C = 0.0
    out = []
    for t, G in enumerate(Gs):
        if t and t % refresh == 0:
            C = P(t).T @ P(t - 1) @ C
        C = beta * C + (1 - beta) * P(t).T @ G
        W = (1 - lr * wd) * W - lr * P(t) @ C
        out.append(W)
    return out


def _limited(S: Array, before: float | None, gamma: float = 1.01) -> Array:
    """If ‖S‖ has grown by more than γ, S is scaled to γ times the norm before."""
    norm = float(np.linalg.norm(S))
    return S if before is None or norm <= gamma * before else S * (gamma * before / norm)


def fira(W: Array, Gs: list[Array], P: Frames, *, lr: float, alpha: float, b1: float, b2: float, eps: float, wd: float) -> list[Array]:
    """GaLore and the scaled residual (2410.01623)."""
    M = V = 0.0
    before = None
    out = []
    for t, G in enumerate(Gs):
        R = P(t).T @ G
        M = b1 * M + (1 - b1) * R
        V = b2 * V + (1 - b2) * R**2
        N = (M / (1 - b1 ** (t + 1))) / (np.sqrt(V / (1 - b2 ** (t + 1))) + eps)
        phi = np.linalg.norm(N, axis=0) / np.linalg.norm(R, axis=0)
        S = _limited((G - P(t) @ R) * phi, before)
        before = float(np.linalg.norm(S))
        W = (1 - lr * wd) * W - lr * (alpha * P(t) @ N + S)
        out.append(W)
    return out


def apollo(
    W: Array, Gs: list[Array], P: Frames, *, lr: float, alpha: float, b1: float, b2: float, eps: float, wd: float, whole: bool
) -> list[Array]:
    """Algorithm 1 of 2412.05270."""
    M = V = 0.0
    before = None
    out = []
    for t, G in enumerate(Gs):
        R = P(t).T @ G
        M = b1 * M + (1 - b1) * R
        V = b2 * V + (1 - b2) * R**2
        N = (M / (1 - b1 ** (t + 1))) / (np.sqrt(V / (1 - b2 ** (t + 1))) + eps)
        axis = None if whole else 0
        s = np.linalg.norm(N, axis=axis) / np.linalg.norm(R, axis=axis)
        S = _limited(G * s, before)
        before = float(np.linalg.norm(S))
        W = (1 - lr * wd) * W - lr * alpha * S
        out.append(W)
    return out


def frugal(
    W: Array, Gs: list[Array], P: Frames, refresh: int, *, lr: float, c: float, b1: float, b2: float, eps: float, wd: float, sign: bool
) -> list[Array]:
    """Adam on PᵀG, reset at every refresh, and a step without state on the rest (2411.07837)."""
    M = V = 0.0
    k = 0
    out = []
    for t, G in enumerate(Gs):
        if t % refresh == 0:
            M, V, k = 0.0, 0.0, 0
        k += 1
        R = P(t).T @ G
        M = b1 * M + (1 - b1) * R
        V = b2 * V + (1 - b2) * R**2
        rest = G - P(t) @ R
        W = (
            (1 - lr * wd) * W
            - lr * P(t) @ (M / (1 - b1**k) / (np.sqrt(V / (1 - b2**k)) + eps))
            - lr * c * (np.sign(rest) if sign else rest)
        )
        out.append(W)
    return out


def ldadam(W: Array, Gs: list[Array], r: int, *, lr: float, rho: float, b1: float, b2: float, eps: float, wd: float) -> list[Array]:
    """Algorithm 1 of 2410.16103, one block power iteration a step."""
    e, P, M, V = np.zeros_like(W), np.zeros((W.shape[0], r)), np.zeros((r, W.shape[1])), np.zeros((r, W.shape[1]))
    out = []
    for t, G in enumerate(Gs):
        a = G + e
        old = P
        if t == 0:
            P = np.linalg.svd(a, full_matrices=False)[0][:, :r]
            C = np.zeros((r, r))
        else:
            b = rho * old @ (M / (1 - b1**t)) + (1 - rho) * a
            P = np.linalg.qr(b @ (b.T @ old))[0]
            C = P.T @ old
        lost = old @ M - P @ C @ M
        if t:
            m, v = M / (1 - b1**t), V / (1 - b2**t)
            V = (1 - b2**t) * np.abs((C * C) @ (v - m**2) + (C @ m) ** 2)
        M = b1 * C @ M + (1 - b1) * P.T @ a
        V = b2 * V + (1 - b2) * (P.T @ a) ** 2
        W = (1 - lr * wd) * W - lr * P @ ((M / (1 - b1 ** (t + 1))) / (np.sqrt(V / (1 - b2 ** (t + 1))) + eps))
        e = a - P @ (P.T @ a) + b1 / (1 - b1) * lost
        out.append(W)
    return out


def spectral(
    W: Array,
    Gs: list[Array],
    P: Frames,
    pi: Frames,
    refresh: int,
    *,
    lr: float,
    alpha: float,
    b1: float,
    b2: float,
    eps: float,
    wd: float,
    filled: bool,
    half: bool,
) -> list[Array]:
    """PLUMAGE, and with ``filled`` SpectralAdam: P orthonormal; 1/π half at sketch and lift (``half``), or all at the lift."""
    M = V = np.zeros((P(0).shape[1], W.shape[1]))
    out = []
    for t, G in enumerate(Gs):
        D = np.diag(pi(t) ** -0.5) if half else np.eye(len(pi(t)))  # what stretches the coordinates PᵀG
        if t and t % refresh == 0:
            E = np.diag(pi(t - 1) ** -0.5) if half else np.eye(len(pi(t)))
            C = D @ P(t).T @ P(t - 1) @ np.linalg.inv(E)
            m, v = M / (1 - b1**t), V / (1 - b2**t)
            new = np.abs((C * C) @ (v - m**2) + (C @ m) ** 2)
            if filled:
                seen = ((P(t).T @ P(t - 1)) ** 2).sum(1)
                new = new + np.maximum(0, 1 - seen)[:, None] * (D @ D) @ np.tile((np.linalg.inv(E @ E) @ v).mean(0), (len(seen), 1))
            M, V = C @ M, (1 - b2**t) * new
        R = D @ P(t).T @ G
        M = b1 * M + (1 - b1) * R
        V = b2 * V + (1 - b2) * R**2
        N = (M / (1 - b1 ** (t + 1))) / (np.sqrt(V / (1 - b2 ** (t + 1))) + eps)
        lift = P(t) @ (D if half else np.diag(1 / pi(t)))
        W = (1 - lr * wd) * W - lr * alpha * lift @ N
        out.append(W)
    return out
