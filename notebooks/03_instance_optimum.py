# %% [markdown]
# # 3. The optimum with knowledge of the gradient
#
# Without knowledge the cost $\operatorname{tr}(\mathbb E[P^2]S)$ of an unbiased law is at least $\tfrac nr\operatorname{tr}S$ for some
# $S$. With knowledge of $S=\mathbb E[\hat G^\top\hat G]=Q\operatorname{diag}(\sigma_1,\dots,\sigma_n)Q^\top$ it can be far less, and
# the law stays unbiased: draw eigen-directions, each with a probability of its own, and divide by it ([arXiv
# 2603.20632](https://arxiv.org/abs/2603.20632); for one fixed matrix [arXiv 2505.09647](https://arxiv.org/abs/2505.09647)). Exact
# moments are in `theory/spectral.py`, probabilities and optimality in `theory/optimal.py`, draws in `estimators/spectral.py`.
#
# $$V = \Big[\,q_i\sqrt{c/\pi_i}\,\Big]_{i\in J},\quad |J|=r,\quad P(i\in J)=\pi_i
# \quad\Longrightarrow\quad \mathbb E[VV^\top] = \sum_i \pi_i\frac{c}{\pi_i}\,q_iq_i^\top = cI. \tag{3.1}$$
#
# Note that (3.1) asks nothing of $Q$ and $\pi$ but $\pi>0$: a wrong guess costs variance, never bias. Bars are ±2 standard errors.

# %%
import numpy as np
import pandas as pd
import torch
from IPython.display import display
from matplotlib import pyplot as plt

from estimators import HaarStiefel, Law, SpectralSampling, TopSVD, keyed, measure
from estimators.spectral import ESTIMATED_FLOOR
from experiments.pages import figures, figures_notebooks
from experiments.pages.notebooks import begin, committed, size
from experiments.validation.checks import exact
from experiments.validation.draws import errors_of_means, squared_errors
from experiments.validation.synthetic import SPECTRA, gradients
from theory import mse, optimal
from theory.spectral import FLOOR

begin()
m, n, r = 24, 48, 12
draws = size(2_000, 300)
SHADES = dict(zip(SPECTRA, ("#0072B2", "#E69F00", "#D55E00", "#CC79A7"), strict=True))
populations = {spectrum: gradients(f"{m}x{n}", spectrum, noise=1.0, seed=0) for spectrum in SPECTRA}  # ‖g‖² = 1 and tr Σ_ξ = 1
seconds = {spectrum: (G.mT @ G).mean(0) for spectrum, G in populations.items()}  # S


def theory(law: Law, G: torch.Tensor) -> mse.Decomposition:
    """The exact error of ĜVVᵀ on equally likely gradients G, in its three parts."""
    _, noise, signal = mse.gradient_moments(G.numpy())
    return mse.ipa(exact(law), noise, signal)


def compared(drawn: Law, G: torch.Tensor, **where: object) -> dict[str, object]:
    """A row: the exact error and the measured one."""
    seen = measure(drawn, G, draws, generator=keyed.generator(0, f"{drawn} {where}", 0), track_mean=False).mse
    return {**where, "theory": theory(drawn, G).total, "estimate": seen.value, "standard_error": seen.standard_error}


# %% [markdown]
# ## From the spectrum to the probabilities
#
# $\operatorname{tr}(\mathbb E[P^2]S)=c^2\sum_i\sigma_i/\pi_i$ is to be least under $\sum_i\pi_i=r$ and $\pi_i\le1$:
#
# $$\pi_i=\min\Big\{1,\ \frac{(r-\tau)\sqrt{\sigma_i}}{\sum_{j:\pi_j<1}\sqrt{\sigma_j}}\Big\},\quad \tau=\#\{i:\pi_i=1\},\qquad
# c^2\sum_i\frac{\sigma_i}{\pi_i}=c^2\Big[\sum_{\text{sat}}\sigma_i+\frac{\big(\sum_{\text{unsat}}\sqrt{\sigma_i}\big)^2}{r-\tau}\Big]. \tag{3.2}$$
#
# The $\tau$ leading directions are kept in every draw, the others in proportion to the *square root* of their energy. With no direction
# saturated the value is $c^2(\operatorname{tr}S^{1/2})^2/r$. A flat $g$ gives nearly uniform probabilities, a steep one nearly those of
# top-r SVD, but for a small rest of probability that keeps (3.1) true. `low_rank` has energy in fewer than $r$ directions; what is left
# of $r$ goes to directions that carry nothing.

# %%
figure, axes = plt.subplots(1, 2, figsize=(9.5, 3.6))
rows = {}
for (spectrum, S), dashes in zip(seconds.items(), figures_notebooks.DASHES, strict=True):
    law = SpectralSampling.from_second_moment(S, r)
    sigma, pi = law.sigma, law.inclusion
    axes[0].plot(np.arange(1, n + 1), sigma / sigma.sum(), dashes, color=SHADES[spectrum], label=spectrum)
    axes[1].plot(np.arange(1, n + 1), pi, dashes, color=SHADES[spectrum])
    rows[spectrum] = {
        "τ": int((pi > 1 - 1e-12).sum()),
        "Σ π": float(pi.sum()),
        "effective rank of S": optimal.effective_rank(sigma.numpy()),
        "smallest π over r/n": float(pi.min()) * n / r,
        "Σ σ/π, exact law": float((torch.from_numpy(exact(law).square) * S).sum()),
        "optimal_value": optimal.optimal_value(sigma.numpy(), r),
        "lower_bound": optimal.lower_bound(sigma.numpy(), r),
        "n/r · tr S": n / r * float(S.trace()),
    }
axes[0].set(yscale="log", ylim=(1e-7, 1), xlabel="index i", ylabel="σᵢ / tr S", title="Spectrum of S")
axes[1].axhline(r / n, color="#000000", linewidth=0.8)
axes[1].set(yscale="log", xlabel="index i", ylabel=r"$\pi_i$", title=f"Inclusion probabilities, r = {r}; black: r/n, Haar–Stiefel")
figure.tight_layout()
figures.legend(figure, axes[0])
plt.show()
display(pd.DataFrame.from_dict(rows, orient="index").rename_axis("spectrum of g").round(4))

# %% [markdown]
# `lower_bound` is a duality bound on every rank-r law with $\mathbb E[P]=cI$ (`theory/optimal.py`), computed without knowing (3.2); the
# two agree, so the spectral law is optimal. The law that is drawn keeps a floor of `theory.spectral.FLOOR`$\,\cdot r/n$ under every
# $\pi_i$, so that $\sigma_i=0$ stays unbiased; its value is larger than the optimum by at most that share.
#
# ## Its error, exact and measured
#
# Haar–Stiefel has $\tfrac nr\operatorname{tr}S-\|g\|^2$ for all four. The sketched form `k=0.125n`, of which more below, knows an
# eighth of the directions.

# %%
rows = []
for spectrum, G in populations.items():
    S = seconds[spectrum]
    for rank in (2, 6, 12, 24):
        laws = {
            "haar_stiefel": HaarStiefel(n=n, rank=rank),
            "spectral k=0.125n": SpectralSampling.from_second_moment(S, rank, keep=n // 8),
            "spectral": SpectralSampling.from_second_moment(S, rank),
            "top_svd": TopSVD.from_second_moment(S, rank),
        }
        rows += [compared(law, G, panel=spectrum, ratio=rank / n, law=label) for label, law in laws.items()]
rows = pd.DataFrame(rows)
figures.error_against_rank(rows, "Exact (lines), measured (points, ±2 standard errors)")
plt.show()
z = (rows.estimate - rows.theory) / rows.standard_error
print(f"{len(z)} comparisons: largest |z| = {z.abs().max():.2f}, root mean square of z = {(z**2).mean() ** 0.5:.2f}")
display(rows[np.isclose(rows.ratio, r / n)].assign(z=z).drop(columns="ratio").set_index(["panel", "law"]).round(4))

# %% [markdown]
# ## How much there is to gain
#
# The gain over Haar–Stiefel in $\mathbb E\|\hat GP\|^2=\operatorname{tr}(\mathbb E[P^2]S)$, the part that the law decides, is
# $\tfrac nr\operatorname{tr}S\,\big/\sum\sigma_i/\pi_i$. Left: $\sigma_i\propto i^{-2a}$; a steeper spectrum gains more, up to $n/r$,
# where everything that matters fits into $r$ directions. Right: the layers of two real models at $r/n=1/4$, against the effective rank
# of their $S$, exact (small) and, for the small LLaMA whose layers were measured with many draws, measured. The table has the medians
# beside $n/r$, the most there can be.

# %%
size_of, decays = 96, np.linspace(0, 2.5, 26)
figure, axes = plt.subplots(1, 2, figsize=(10.0, 3.9))
rows = []
for rank in (6, 12, 24, 48):
    for a in decays:
        sigma = torch.arange(1, size_of + 1, dtype=torch.float64) ** (-2 * a)
        haar = size_of / rank * float(sigma.sum())
        row = {"r/n": f"r/n = 1/{size_of // rank}", "a": a, "theory": haar / optimal.optimal_value(sigma.numpy(), rank)}
        row |= {"estimate": np.nan, "standard_error": np.nan}
        if rank in (6, 24) and np.isclose(a, (0, 0.5, 1, 1.5, 2)).any():
            law = SpectralSampling.from_second_moment(sigma.diag(), rank)
            seen = measure(
                law, sigma.sqrt().diag(), size(1_000, 100), generator=keyed.generator(0, f"gain {a}", rank), track_mean=False
            ).square
            row |= {"estimate": haar / seen.value, "standard_error": haar / seen.value**2 * seen.standard_error}
        rows.append(row)
rows = pd.DataFrame(rows)
colours = dict(zip(rows["r/n"].unique(), ("#0072B2", "#E69F00", "#D55E00", "#CC79A7"), strict=True))
figures_notebooks.exact_and_measured(axes[0], rows, "a", by="r/n", colours=colours)
axes[0].set(
    yscale="log", xlabel="decay a of the singular values, sᵢ = i^(−a)", ylabel="Haar–Stiefel / spectral", title="Gain in tr(E[P²]S)"
)
axes[0].legend(frameon=False)
told = []
for model, mine, mark in (("smollm2", "#E69F00", "s"), ("tiny", "#0072B2", "o")):
    layers = committed(f"validate/{model}-layer").set_index("layer")
    found = (
        committed(f"validate/{model}-gradient").query("ratio == 0.25 and law in ('haar_stiefel', 'spectral')").set_index(["layer", "law"])
    )
    cost, seen, bar = (
        (found[what] + shift * found.signal_norm2).unstack() for what, shift in (("predicted", 1), ("measured", 1), ("standard_error", 0))
    )
    at, gain = layers.effective_rank.loc[cost.index] / layers.n.loc[cost.index], cost.haar_stiefel / cost.spectral
    axes[1].plot(at, gain, mark, color=mine, markersize=3, alpha=0.7, zorder=4, label=f"{model}, exact")
    if model == "tiny":
        ratio = seen.haar_stiefel / seen.spectral
        width = 2 * ratio * np.hypot(bar.haar_stiefel / seen.haar_stiefel, bar.spectral / seen.spectral)
        axes[1].errorbar(
            at, ratio, width, fmt="D", color="#000000", markerfacecolor="white", markersize=6, capsize=2, label="tiny, measured"
        )
    told.append({"model": model, "layers": len(gain), "median gain": gain.median(), "least": gain.min(), "largest": gain.max(), "n/r": 4.0})
axes[1].axhline(4.0, color="#000000", linewidth=0.8, linestyle="--")
axes[1].set(xscale="log", xlabel="effective rank of S / n", title="Layers of real models, r/n = 1/4; dashed: n/r")
axes[1].legend(frameon=False)
figure.tight_layout()
plt.show()
display(pd.DataFrame(told).set_index("model").round(2))

# %% [markdown]
# ## Knowing only k directions
#
# An eigendecomposition of $S$ is $O(n^3)$ and $S$ itself $n^2$ numbers. The sketched form keeps $k$ directions $Q_k$ with their
# energies and takes the rest as isotropic with mean energy $\bar\sigma$: the units are the $k$ directions and $n-k$ exchangeable ones,
# of which those that are drawn become a Haar frame on the complement, scaled by $\sqrt{c/\bar\pi}$. For *any* true $S$
#
# $$\operatorname{tr}(\mathbb E[P^2]S)=c^2\Big[\sum_{i\le k}\frac{q_i^\top Sq_i}{\pi_i}
# +\frac{\operatorname{tr}\big((I-Q_kQ_k^\top)S\big)}{\bar\pi}\Big]. \tag{3.3}$$
#
# $k=0$ is Haar–Stiefel, $k=n$ the optimum; memory is $n(k+r)$ numbers. Most of the gain comes from the first few directions when the
# spectrum is steep.

# %%
rows = []
for spectrum, G in populations.items():
    for keep in (0, 1, 2, 4, 8, 12, 16, 24, 48):
        rows.append(compared(SpectralSampling.from_second_moment(seconds[spectrum], r, keep=keep), G, spectrum=spectrum, k=keep))
figure, ax = plt.subplots(figsize=(6.4, 3.8))
figures_notebooks.exact_and_measured(ax, pd.DataFrame(rows), "k", by="spectrum", colours=SHADES)
ax.axvline(r, color="#000000", linewidth=0.8, linestyle="--")
ax.set(xlabel="known directions k (dashed: k = r)", ylabel="E‖ĜVVᵀ − g‖² / ‖g‖²", ylim=(0, None), title="Exact (lines), measured (points)")
ax.set_xscale("symlog", linthresh=1)
ax.set_xlim(-0.2, 60)
ax.set_xticks([0, 1, 2, 4, 8, 16, 48], ["0", "1", "2", "4", "8", "16", "48"])
ax.minorticks_off()
figure.tight_layout()
figures.legend(figure, ax)
plt.show()

# %% [markdown]
# ## A stale S
#
# In training $S$ is that of an earlier step. Let the gradients have turned by an angle: the law is fitted to those of the past,
# $\cos\theta\,\hat G+\sin\theta\,\hat G'$ with $\hat G'$ an independent population, and used on $\hat G$. By (3.1) it stays unbiased,
# which the right panel measures; its error grows, and beyond some angle Haar–Stiefel, which cannot be stale, is better. The floor under
# $\pi$ is the insurance: it costs little while $S$ is right and bounds the loss when it is wrong, since no $1/\pi_i$ exceeds
# $n/(r\cdot\text{floor})$. `from_basis`, meant for estimated $S$, uses a larger floor than `from_second_moment` for this reason. A
# stale top-r SVD pays in bias instead: the mean of its estimates loses the gradient, which its error, never far from $\|g\|^2$, does
# not tell.

# %%
new, other = populations["power"], gradients(f"{m}x{n}", "power", noise=1.0, seed=1)
angles = np.arange(0, 91, 15)
fitted = {}
for angle in angles:
    past = np.cos(np.radians(angle)) * new + np.sin(np.radians(angle)) * other
    fitted[angle] = (past.mT @ past).mean(0)


def stale(label: str, angle: int) -> Law:
    """The law of this label, fitted to the S of the past."""
    if label == "haar_stiefel":
        return HaarStiefel(n=n, rank=r)
    if label == "top_svd":
        return TopSVD.from_second_moment(fitted[angle], r)
    return SpectralSampling.from_second_moment(fitted[angle], r, floor=float(label.split("floor ")[1]))


labels = {f"spectral, floor {FLOOR:g}": "#CC79A7", f"spectral, floor {ESTIMATED_FLOOR:g}": "#E69F00", "spectral, floor 0.5": "#D55E00"}
labels |= {"haar_stiefel": "#0072B2", "top_svd": "#000000"}
error, aligned = [], []
for label in labels:
    for angle in angles:
        law = stale(label, int(angle))
        seen = measure(law, new, draws, generator=keyed.generator(0, f"stale {label}", int(angle)), track_mean=False)
        part = theory(law, new)
        pairs = ((error, part.total, seen.mse), (aligned, part.alignment, seen.alignment))
        for rows, value, found in pairs:
            rows.append({"law": label, "angle": angle, "theory": value, "estimate": found.value, "standard_error": found.standard_error})
figure, axes = plt.subplots(1, 2, figsize=(10.0, 3.9))
for ax, rows in zip(axes, (error, aligned), strict=True):
    figures_notebooks.exact_and_measured(ax, pd.DataFrame(rows), "angle", colours=labels)
    ax.set(xlabel="angle between past and present, degrees", xticks=angles)
axes[0].set(yscale="log", ylabel="E‖ĜVVᵀ − g‖² / ‖g‖²", title="Error: exact (lines), measured (points)")
axes[1].set(ylabel="⟨E[ĜVVᵀ], g⟩ / ‖g‖²", title="How much of g the mean keeps", ylim=(0, 1.3))
figure.tight_layout()
figures.legend(figure, axes[0])
plt.show()
shown = pd.DataFrame(error).assign(z=lambda rows: (rows.estimate - rows.theory) / rows.standard_error)
print(f"largest |z| of {len(shown)} errors: {shown.z.abs().max():.2f}")
display(shown.pivot(index="law", columns="angle", values="theory").loc[list(labels)].rename_axis(columns="exact error at angle").round(2))

# %% [markdown]
# ## The price of 1/π
#
# A direction with a small $\pi_i$ comes rarely and then with weight $1/\pi_i$. On the $S$ it was fitted to that is harmless, as there
# is little energy in it. When $S$ is wrong, rare draws carry large errors: the mean squared error rests on its tail, and a run of
# ordinary length may not see it, which makes a measured error (and its standard error) look smaller than it is. Below, the distribution
# of the squared error in one draw: on the $S$ of today, and on one that has turned by 90°.

# %%
many = size(20_000, 2_000)
figure, axes = plt.subplots(1, 2, figsize=(9.5, 3.9), sharey=True)
rows = []
for ax, angle in zip(axes, (0, 90), strict=True):
    for (label, mine), dashes in zip([*labels.items()][:4], figures_notebooks.DASHES, strict=True):
        law = stale(label, angle)
        values = squared_errors(law, new, many, generator=keyed.generator(0, f"tail {label}", angle)).numpy()
        share = np.geomspace(1, 5 / many, 300)
        ax.plot(np.quantile(values, 1 - share), share, dashes, color=mine, linewidth=1.3, label=label)
        largest = 1 / float(law.inclusion.min()) if isinstance(law, SpectralSampling) else n / r
        quantile = dict(zip(("median", "99 %", "99.9 %"), np.quantile(values, (0.5, 0.99, 0.999)), strict=True))
        tail = np.sort(values)[-many // 100 :].sum() / values.sum()
        rows.append(
            {"angle": angle, "law": label, "largest 1/π": largest, "exact mean": theory(law, new).total, "measured mean": values.mean()}
        )
        rows[-1] |= {"± SE": values.std() / many**0.5, **quantile, "share of the mean in the worst 1 %": tail}
    ax.set(xscale="log" if angle else "linear", yscale="log", xlabel="‖ĜVVᵀ − g‖² / ‖g‖²", title=f"S turned by {angle}°")
axes[0].set_ylabel("probability of a larger error")
figure.tight_layout()
figures.legend(figure, axes[0])
plt.show()
display(pd.DataFrame(rows).set_index(["angle", "law"]).round(3))

# %% [markdown]
# ## A smaller error is not an average
#
# The leading eigenvectors are also what top-r SVD projects on, with $\pi=1$ for $r$ of them and 0 for the others: no weights, no
# variance from the draw, and often the smaller error for *one* gradient. But by (1.2) its bias stays, and the mean of $N$ estimates of
# the unbiased law is better from
#
# $$N^\star = \frac{\text{variance of spectral}-\text{variance of top-r SVD}}{\text{squared bias of top-r SVD}} \tag{3.4}$$
#
# on. Left: the `power` population, exact and measured. Right: a small LLaMA, all linear layers at $r/n=1/4$, from the parts of its
# exact error in `validate/tiny`, with the measured error of one estimate.

# %%
figure, axes = plt.subplots(1, 2, figsize=(10.0, 3.9))
counts, rows, parts = [1, 4, 16, 64, 256, 1024][: size(6, 4)], [], {}
for label in ("haar_stiefel", "spectral", "top_svd"):
    law = stale(label if label != "spectral" else f"spectral, floor {FLOOR:g}", 0)
    part = parts[label] = theory(law, new)
    seen = errors_of_means(law, new, counts, size(32, 8), generator=keyed.generator(0, f"means {label}", 0))
    for count, value in zip(counts, seen, strict=True):
        exactly = part.bias + (part.projection + part.noise) / count
        rows.append({"law": label, "N": count, "theory": exactly, "estimate": value.value, "standard_error": value.standard_error})
figures_notebooks.exact_and_measured(axes[0], pd.DataFrame(rows), "N")
crossing = {"power": (parts["spectral"].total - parts["top_svd"].total + parts["top_svd"].bias) / parts["top_svd"].bias}
model = committed("validate/tiny-model").query("ratio == 0.25").set_index("law")
summed = committed("validate/tiny-gradient").query("ratio == 0.25").groupby("law")[["projection", "noise", "bias", "signal_norm2"]].sum()
N = np.geomspace(1, 1024, 50)
for place, label in enumerate(parts):
    part, whole = summed.loc[label], model.loc[label]
    line = (part.bias + (part.projection + part.noise) / N) / part.signal_norm2
    axes[1].plot(N, line, figures_notebooks.DASHES[place], color=figures.colour(label), linewidth=1.3)
    bar = [2 * whole.standard_error / whole.signal_norm2]
    axes[1].errorbar([1], [whole.measured / whole.signal_norm2], bar, fmt=figures.marker(label), color=figures.colour(label), capsize=2)
variance = summed.projection + summed.noise
crossing["tiny LLaMA"] = (variance["spectral"] - variance["top_svd"]) / summed.bias["top_svd"]
for ax, (title, at) in zip(axes, crossing.items(), strict=True):
    ax.axvline(at, color="#000000", linewidth=0.8, linestyle=":")
    ax.set(xscale="log", yscale="log", xlabel="estimates N in the mean", title=f"{title}; dotted: N⋆ = {at:.1f}")
axes[0].set_ylabel("E‖mean − g‖² / ‖g‖²")
figure.tight_layout()
figures.legend(figure, axes[0])
plt.show()

# %% [markdown]
# Training averages only approximately: over momentum and small steps, while $g$ moves and bases are renewed. What it made of the two
# kinds of error in the committed comparisons of the small LLaMA: held-out loss minus that of Haar–Stiefel, with Student's 95 % interval
# over seeds. Top-r SVD ends *below* every unbiased law there. Those runs are shorter than the $N^\star$ found above for the same model,
# so (3.4) does not contradict it, and does not prove it either. The spectral law ends above Haar–Stiefel where each chose its own $c$,
# below it where $c$ is the same for both.

# %%
rows = [committed(f"compare/{name}-paired").assign(comparison=name) for name in ("tiny", "tiny-constant")]
rows = pd.concat(rows)
rows = rows[rows.label.str.match("spectral|top_svd") & rows.reference.str.match("haar_stiefel")]
display(rows.set_index(["comparison", "label", "reference"])[["seeds", "difference", "low", "high"]].round(3))
steps = committed("compare/tiny-final").steps.unique()
print(f"steps trained: {', '.join(map(str, steps))}; N⋆ of the small LLaMA: {crossing['tiny LLaMA']:.0f}")
