"""The rest of the family once more, naively: float64 numpy, one matrix, one function a method, P (m×r) on the left and m ≤ n unless a function
says otherwise. Nothing here is shared with optimizers/."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

Array = np.ndarray
Frames = Callable[[int], Array]
Step = Callable[[Array], Array]


class Adam:
    """M̂/(√N̂ + ε) of whatever it is given; ``reset`` begins anew."""

    def __init__(self, b1: float, b2: float, eps: float) -> None:
        self.b1, self.b2, self.eps = b1, b2, eps
        self.reset()

    def reset(self) -> None:
        self.M: Array | float = 0.0
        self.V: Array | float = 0.0
        self.k = 0

    def __call__(self, R: Array) -> Array:
        self.k += 1
        self.M = self.b1 * self.M + (1 - self.b1) * R
        self.V = self.b2 * self.V + (1 - self.b2) * R**2
        return (self.M / (1 - self.b1**self.k)) / (np.sqrt(self.V / (1 - self.b2**self.k)) + self.eps)


def leading(G: Array, r: int) -> Array:
    """Left singular vectors, each with its largest entry positive."""
    U = np.linalg.svd(G, full_matrices=False)[0][:, :r]
    return U * np.sign(U[np.abs(U).argmax(0), np.arange(r)])


def four_bits(P: Array, group: int) -> Array:
    """The nearest of 16 levels between the least and the largest of every group, zero among them."""
    flat = P.reshape(-1, group if P.size % group == 0 else P.size)
    out = np.empty_like(flat)
    for i, x in enumerate(flat):
        low, high = min(x.min(), 0.0), max(x.max(), 0.0)
        scale = (high - low) / 15
        zero = np.round(-low / scale)
        out[i] = scale * (np.clip(np.round(x / scale) + zero, 0, 15) - zero)
    return out.reshape(P.shape)


def q_galore(
    W: Array, Gs: list[Array], r: int, every: int, *, lr: float, alpha: float, wd: float, kept: int, threshold: float, adam: Adam
) -> tuple[list[Array], list[int]]:
    """2407.08296 with the share of the new subspace in the old, over what chance gives, as likeness; also the steps of the refreshes."""
    P, gap, likeness = np.zeros((0, 0)), every, []
    out, refreshes = [], []
    for t, G in enumerate(Gs):
        if t % gap == 0:
            refreshes.append(t)
            new = leading(G, r)
            if t:
                n = len(new)
                share = float(np.linalg.norm(P.T @ new) ** 2 / r)
                likeness.append((share - r / n) / (1 - r / n) if r < n else 1.0)
                if len(likeness) >= kept and np.mean(likeness[-kept:]) >= threshold:
                    gap *= 2
            P = four_bits(new, 256)
        W = (1 - lr * wd) * W - lr * alpha * P @ adam(P.T @ G)
        out.append(W)
    return out, refreshes


def coap(
    W: Array,
    Gs: list[Array],
    first: Array,
    every: int,
    recalibrate: int,
    *,
    lr: float,
    alpha: float,
    wd: float,
    eta: float,
    carry: bool,
    adam: Adam,
) -> list[Array]:
    """2412.00071, gradients by hand; ``first``: the Gaussian matrix of the first sketch (m, r)."""
    P = first
    out = []
    for t, G in enumerate(Gs):
        if t % every == 0:
            old = P
            if t // every % recalibrate == 0:
                Q = np.linalg.qr(G.T @ P)[0]
                P = leading(G @ Q, P.shape[1])
            else:
                R = P @ (P.T @ G) - G
                error = (R**2).mean()
                d_error = 2 / R.size * (R @ (G.T @ P) + G @ (R.T @ P))
                L = P @ np.asarray(adam.M)
                likeness = (L * G).sum(0) / np.linalg.norm(L, axis=0) / np.linalg.norm(G, axis=0)
                along = G / np.linalg.norm(L, axis=0) / np.linalg.norm(G, axis=0) - L * likeness / (L**2).sum(0)
                d_likeness = along @ np.asarray(adam.M).T / G.shape[1]
                step = d_error * (1 - likeness.mean()) - error * d_likeness
                P = P - eta * step * min(1.0, 1 / (np.linalg.norm(step) + 1e-6))
            if t and carry:
                C = P.T @ old
                adam.M, adam.V = C @ adam.M, (C @ np.sqrt(adam.V)) ** 2
        W = (1 - lr * wd) * W - lr * alpha * P @ adam(P.T @ G)
        out.append(W)
    return out


def online_subspace(
    W: Array, Gs: list[Array], r: int, *, lr: float, alpha: float, wd: float, eta: float, penalty: float, sgd: bool, adam: Adam
) -> list[Array]:
    """2408.12857 with its penalty; a step on P after every step on W but the first."""
    P = leading(Gs[0], r)
    inner = Adam(0.9, 0.999, 1e-8)
    out = []
    for t, G in enumerate(Gs):
        W = (1 - lr * wd) * W - lr * alpha * P @ adam(P.T @ G)
        out.append(W)
        if t:
            g = G / np.linalg.norm(G)
            E = P @ P.T @ g - g
            D = 2 * (E @ g.T + g @ E.T) @ P + 4 * penalty * P @ (P.T @ P - np.eye(r))
            P = P - eta * (D if sgd else inner(D))
    return out


def grass(
    W: Array, Gs: list[Array], rows: Frames, rho: Frames, refresh: int, *, lr: float, alpha: float, wd: float, adam: Adam
) -> list[Array]:
    """2406.17660 with P = diag(ρ)·B as a matrix, duplicates included."""
    out = []
    for t, G in enumerate(Gs):
        if t % refresh == 0:
            adam.reset()
        P = np.zeros((G.shape[0], len(rows(t))))
        P[rows(t), np.arange(len(rows(t)))] = rho(t)
        W = (1 - lr * wd) * W - lr * alpha * P @ adam(P.T @ G)
        out.append(W)
    return out


def rso(W: Array, Gs: list[Array], P: Frames, refresh: int, *, lr: float, alpha: float, wd: float, pull: float, adam: Adam) -> list[Array]:
    """2502.07222: Adam on B with μB in its gradient, lifted at every step."""
    B = np.zeros((P(0).shape[1], W.shape[1]))
    out = []
    for t, G in enumerate(Gs):
        if t % refresh == 0:
            adam.reset()
            B = np.zeros_like(B)
        step = -lr * adam(P(t).T @ G + pull * B)
        B = B + step
        W = (1 - lr * wd) * W + alpha * P(t) @ step
        out.append(W)
    return out


def grad_norm_lorp(W: Array, Gs: list[Array], P: Frames, *, lr: float, alpha: float, wd: float, adam: Adam, lengths: Adam) -> list[Array]:
    """2412.19616 with rows as they stand; P projects the smaller dimension, columns where both are equal."""
    out = []
    for t, G in enumerate(Gs):
        g = np.linalg.norm(W, axis=1, keepdims=True)
        unit = W / g
        radial = (G * unit).sum(1, keepdims=True)
        D = G - radial * unit
        V = W - lr * alpha * (P(t) @ adam(P(t).T @ D) if W.shape[0] < W.shape[1] else adam(D @ P(t)) @ P(t).T)
        g = g - lr * lengths(radial)
        W = (1 - lr * wd) * g * V / np.linalg.norm(V, axis=1, keepdims=True)
        out.append(W)
    return out


def foam(W: Array, Gs: list[Array], level: int, *, lr: float, alpha: float, b1: float, b2: float, eps: float, wd: float) -> list[Array]:
    """2512.07112, entry by entry: every column knows the columns of its block."""
    size = 2**level
    blocks = [np.arange(start, min(start + size, W.shape[1])) for start in range(0, W.shape[1], size)]
    M = V = np.zeros_like(W)
    out = []
    for t, G in enumerate(Gs):
        mean = np.empty_like(G)
        for block in blocks:
            mean[:, block] = G[:, block].mean(1, keepdims=True)
        M = b1 * M + (1 - b1) * mean
        V = b2 * V + (1 - b2) * mean**2
        rate = lr * alpha * math.sqrt(1 - b2 ** (t + 1)) / (1 - b1 ** (t + 1))
        W = (1 - lr * wd) * W - rate * (M + G - mean) / (np.sqrt(V + (G - mean) ** 2) + eps)
        out.append(W)
    return out


def cosines(n: int) -> Array:
    """The orthonormal DCT-II matrix, entry by entry."""
    C = np.array([[math.sqrt(2 / n) * math.cos(math.pi * (2 * a + 1) * k / (2 * n)) for a in range(n)] for k in range(n)])
    C[0] /= math.sqrt(2)
    return C


def dct_adamw(
    W: Array, Gs: list[Array], r: int, every: int, *, lr: float, wd: float, l2: bool, rotate: bool, feedback: bool, adam: Adam
) -> list[Array]:
    """2505.17967; moments follow their column of C."""
    C = cosines(W.shape[0])
    E, J = np.zeros_like(W), np.zeros(0, int)
    out = []
    for t, G in enumerate(Gs):
        A = G + E
        if t % every == 0:
            S = C.T @ A
            norms = np.linalg.norm(S, axis=1) if l2 else np.abs(S).sum(1)
            new = np.sort(np.argsort(-norms)[:r])
            if t and rotate:
                for name in ("M", "V"):
                    held = dict(zip(J.tolist(), np.asarray(getattr(adam, name)), strict=True))
                    setattr(adam, name, np.stack([held.get(j, np.zeros(W.shape[1])) for j in new.tolist()]))
            J = new
        P = C[:, J]
        if feedback:
            E = A - P @ (P.T @ A)
        W = (1 - lr * wd) * W - lr * P @ adam(P.T @ A)
        out.append(W)
    return out


def quintic(X: Array, steps: int = 5) -> Array:
    """Newton–Schulz on the side given."""
    X = X / np.linalg.norm(X)
    for _ in range(steps):
        A = X @ X.T
        X = 3.4445 * X + (-4.7750 * A + 2.0315 * A @ A) @ X
    return X


def muon(W: Array, Gs: list[Array], *, lr: float, beta: float, wd: float, nesterov: bool) -> list[Array]:
    """Momentum, then Newton–Schulz; m ≤ n."""
    M = np.zeros_like(W)
    out = []
    for G in Gs:
        M = beta * M + (1 - beta) * G
        W = (1 - lr * wd) * W - lr * quintic((1 - beta) * G + beta * M if nesterov else M)
        out.append(W)
    return out


def trion(W: Array, Gs: list[Array], r: int, *, lr: float, mu: float, wd: float) -> list[Array]:
    """2505.17967, its Muon."""
    C = cosines(W.shape[0])
    M = np.zeros_like(W)
    out = []
    for G in Gs:
        A = M + G
        S = C.T @ A
        J = np.argsort(-np.abs(S).sum(1))[:r]
        M = A - (1 - mu) * C[:, J] @ S[J]
        W = (1 - lr * wd) * W - lr * C[:, J] @ quintic(S[J])
        out.append(W)
    return out


def dion(W: Array, Gs: list[Array], Q: Array, *, lr: float, mu: float, wd: float) -> list[Array]:
    """2504.05295 for m ≤ n with Q (m, r) on the smaller side: it is the paper's algorithm of Wᵀ."""
    M = np.zeros_like(W)
    out = []
    for G in Gs:
        A = M + G
        P = np.linalg.qr(A.T @ Q)[0]
        R = A @ P
        M = A - (1 - mu) * R @ P.T
        Q = R / np.linalg.norm(R, axis=0)
        W = (1 - lr * wd) * W - lr * Q @ P.T
        out.append(W)
    return out


def mofasgd(W: Array, Gs: list[Array], r: int, *, lr: float, beta: float, wd: float, rest: float, largest: float | None) -> list[Array]:
    """2507.08091 by the dense recursion: the momentum is formed and cut to rank r by a singular value decomposition."""
    out = []
    U, s, Vt = np.zeros((0, 0)), np.zeros(0), np.zeros((0, 0))
    for t, G in enumerate(Gs):
        if t == 0:
            U, s, Vt = (x[..., :r] if i < 2 else x[:r] for i, x in enumerate(np.linalg.svd(G, full_matrices=False)))
            seen = U @ U.T @ G @ Vt.T @ Vt
        else:
            left, right = U @ U.T, Vt.T @ Vt
            seen = left @ G + G @ right - left @ G @ right
            U, s, Vt = (
                x[..., :r] if i < 2 else x[:r] for i, x in enumerate(np.linalg.svd(beta * (U * s) @ Vt + seen, full_matrices=False))
            )
        f = np.ones_like(s) if largest is None else np.minimum(1 / s, largest)
        W = (1 - lr * wd) * W - lr * ((U * f) @ Vt + rest * (G - seen))
        out.append(W)
    return out


def gum(
    W: Array, Gs: list[Array], P: Frames, rest: Callable[[int], bool], refresh: int, *, lr: float, q: float, beta: float, wd: float
) -> list[Array]:
    """2510.17802 for given projectors and coins."""
    M: Array | float = 0.0
    out = []
    for t, G in enumerate(Gs):
        if t % refresh == 0:
            M = 0.0
        low = P(t).T @ G
        R = (G - P(t) @ low) / q if rest(t) else low / (1 - q)
        M = beta * M + (1 - beta) * R
        W = (1 - lr * wd) * W - lr * (quintic(M) if rest(t) else P(t) @ quintic(M))
        out.append(W)
    return out


def lomo(W: Array, Gs: list[Array], *, lr: float, wd: float) -> list[Array]:
    """2306.09782."""
    out = []
    for G in Gs:
        W = (1 - lr * wd) * W - lr * G
        out.append(W)
    return out


def adalomo(W: Array, Gs: list[Array], *, lr: float, wd: float) -> list[Array]:
    """2310.10195, entry by entry of the factors; a vector keeps every square."""
    R, C, V = np.zeros(W.shape[:1]), np.zeros(W.shape[-1:]), np.zeros_like(W)
    out = []
    for t, G in enumerate(Gs, 1):
        b2 = 1 - t**-0.8
        square = G**2 + 1e-30
        if W.ndim == 2:
            for i in range(len(R)):
                R[i] = b2 * R[i] + (1 - b2) * square[i].mean()
            for j in range(len(C)):
                C[j] = b2 * C[j] + (1 - b2) * square[:, j].mean()
            V = np.outer(R, C) / R.mean()
        else:
            V = b2 * V + (1 - b2) * square
        U = G / np.sqrt(V)
        U = U / max(1.0, math.sqrt((U**2).mean()))
        rate = lr * max(1e-3, math.sqrt((W**2).mean()))
        W = (1 - rate * wd) * W - rate * U
        out.append(W)
    return out


def by_turns(
    W: Array, Gs: list[Array], active: Callable[[int], bool], refresh: int, *, lr: float, wd: float, adam: Adam, r: int | None, alpha: float
) -> list[Array]:
    """LISA, BAdam, and with ``r`` OwLore: Adam while it is this layer's turn, begun anew at every period, and otherwise nothing."""
    P = np.zeros((0, 0))
    out = []
    for t, G in enumerate(Gs):
        if t % refresh == 0:
            adam.reset()
            P = np.eye(W.shape[0]) if r is None else leading(G, r)
        if active(t):
            W = (1 - lr * wd) * W - lr * alpha * P @ adam(P.T @ G)
        out.append(W)
    return out
