# %% [markdown]
# # 1. Unbiased, and optimal
#
# A stochastic gradient $\hat G\in\mathbb R^{m\times n}$ with mean $g$ is seen through a random $V\in\mathbb R^{n\times r}$ drawn
# independently of it: the *sketch* $\hat GV$ ($m\times r$ numbers) is kept, and its *lift* $\hat GVV^\top$ is the estimate of $g$. The
# distribution of $V$ is called its **law**. This notebook shows what a law has to satisfy for the estimate to be unbiased, what its
# error is made of, and which law has the least error when nothing is known of the gradient ([arXiv
# 2603.20632](https://arxiv.org/abs/2603.20632)).
#
# Everything rests on two moments of $P = VV^\top$: $\mathbb E[P]$ and the map $M\mapsto\mathbb E[PMP]$. They are stated exactly in
# `theory/`, one module a law; `estimators/` draws from the same laws. Neither imports the other, so wherever a line meets points below,
# two independent pieces of work agree. Bars are ±2 standard errors throughout.

# %%
import numpy as np
import pandas as pd
import torch
from IPython.display import display
from matplotlib import pyplot as plt

from estimators import LAWS, keyed, measure
from estimators.measure import GROUPS
from experiments.pages import figures, figures_notebooks
from experiments.pages.notebooks import begin, committed, size
from experiments.validation.checks import check_law, exact
from experiments.validation.draws import errors_of_means, estimates
from experiments.validation.synthetic import gradients
from theory import mse, optimal

begin()
G = gradients("12x20", "power", noise=1.0, seed=0)  # eight equally likely gradients; ‖g‖² = 1 and tr Σ_ξ = 1
g = G.mean(0)
S = (G.mT @ G).mean(0)  # S = E[ĜᵀĜ] = Σ_ξ + gᵀg
n, r = G.shape[-1], 5
laws = {name: kind.from_second_moment(S, r) for name, kind in LAWS.items()}
_, noise, signal = mse.gradient_moments(G.numpy())
parts = {name: mse.ipa(exact(law), noise, signal) for name, law in laws.items()}

# %% [markdown]
# ## What a law is
#
# $$\mathbb E[VV^\top] = cI \quad\Longrightarrow\quad \mathbb E[\hat GVV^\top] = \mathbb E[\hat G]\,\mathbb E[VV^\top] = c\,g. \tag{1.1}$$
#
# This is *weak unbiasedness*; at $c=1$, used from here on, the estimate is unbiased. Below, $VV^\top$ of one draw has rank $r$ and is
# nothing like the identity for any law (upper row). What tells the laws apart is the mean of many draws (lower row): the identity, or
# the projector on a basis that never changes. `top_svd` keeps the leading eigenvectors of $S$ for good, as GaLore does between
# refreshes; `fixed_basis` the leading coordinates.

# %%
shown = ["gaussian", "haar_stiefel", "coordinate", "dct", "spectral", "top_svd", "fixed_basis"]
many = size(20_000, 500)
one, mean = {}, {}
for name in shown:
    V = laws[name].sample(many, generator=keyed.generator(0, f"mean of {name}", 0), dtype=torch.float64)
    one[name] = (V[0] @ V[0].mT).numpy()
    mean[name] = (torch.einsum("dir,djr->ij", V, V) / many).numpy()
figures_notebooks.matrices({"one draw": one, "mean of many": mean}, scales=(n / r, 1.0))
plt.show()

# %% [markdown]
# Looking is not enough: a law whose mean is off by a percent would look the same. `check_law` draws until a defect of the size it
# promises to see (*resolution*: eight standard errors) would show, and compares contrasts of $\mathbb E[P]$ and of
# $M\mapsto\mathbb E[PMP]$ with their exact values. It *holds* when the run was long enough and every $|z|<5$. A biased law passes too:
# what is checked is that it is as biased as theory says.

# %%
checks = {name: check_law(law, resolution=size(0.02, 0.25)) for name, law in laws.items()}
rows = {
    name: {
        "E[P] = cI": "yes" if exact(laws[name]).unbiased else "no",
        "draws": check.draws,
        "contrasts": len(check.verdicts),
        "largest |z|": max(abs(v.z) for v in check.verdicts),
        "resolution": check.resolution,
        "holds": check.holds,
    }
    for name, check in checks.items()
}
display(pd.DataFrame.from_dict(rows, orient="index").rename_axis("law").round(3))

# %% [markdown]
# ## Bias and variance, seen
#
# One entry of the estimate, its running mean over draws of $(\hat G, V)$, and $g_{ij}$ in black. It is the entry where top-r SVD is
# most wrong outside the columns that `fixed_basis` keeps. The band is ±2 standard errors of the running mean: it shrinks like
# $1/\sqrt N$ for every law, but only the unbiased ones shrink onto $g_{ij}$. The fixed basis is certain and wrong.

# %%
names = ["gaussian", "haar_stiefel", "top_svd", "fixed_basis"]
lost = (g - g @ torch.from_numpy(exact(laws["top_svd"]).mean)).abs()
lost[:, :r] = 0
i, j = divmod(int(lost.argmax()), n)
draws = size(40_000, 2_000)
drawn = {name: estimates(laws[name], G, draws, generator=keyed.generator(0, f"running {name}", 0)) for name in names}
N = np.unique(np.geomspace(30, draws, 200).astype(int))
figure, ax = plt.subplots(figsize=(7.5, 3.6))
for name in names:
    x = drawn[name][:, i, j].numpy()
    average = x.cumsum()[N - 1] / N
    error = np.sqrt(np.maximum((x**2).cumsum()[N - 1] / N - average**2, 0) / N)
    ax.fill_between(N, average - 2 * error, average + 2 * error, color=figures.colour(name), alpha=0.2, linewidth=0)
    ax.plot(N, average, color=figures.colour(name), marker=figures.marker(name), markevery=25, markersize=4.5, linewidth=1.2, label=name)
ax.axhline(float(g[i, j]), color="#000000", linewidth=1.6, linestyle="--", label="g")
ax.set(
    xscale="log", xlabel="draws N", ylabel=f"running mean of entry ({i}, {j})", title="Unbiased estimates average out, biased ones do not"
)
figure.tight_layout()
figures.legend(figure, ax)
plt.show()

# %% [markdown]
# All entries at once, against the entries of $g$: the mean of the first thousand draws with its bars. An unbiased law lies on the
# diagonal within them. Top-r SVD is pulled off it wherever $g$ leaves the leading eigenvectors, and a fixed basis returns zero for
# every column that it does not keep.

# %%
figure, axes = plt.subplots(1, 4, figsize=(11.0, 3.1), sharex=True, sharey=True)
rows, few = [], size(1_000, 200)
for ax, name in zip(axes, names, strict=True):
    average, spread = drawn[name][:few].mean(0), drawn[name][:few].std(0) / few**0.5
    ax.plot([-0.5, 0.5], [-0.5, 0.5], color="#000000", linewidth=0.8, linestyle="--")
    mark, mine = figures.marker(name), figures.colour(name)
    ax.errorbar(g.flatten(), average.flatten(), 2 * spread.flatten(), fmt=mark, color=mine, markersize=2.5, elinewidth=0.7, alpha=0.7)
    ax.set(xlabel="entry of g", title=name)
    rows.append({"law": name, "entries beyond 2 SE of g, %": 100 * float(((average - g).abs() > 2 * spread).double().mean())})
limit = 1.1 * float(g.abs().max())
axes[0].set(ylabel="mean estimate", xlim=(-limit, limit), ylim=(-limit, limit))
figure.tight_layout()
plt.show()
display(pd.DataFrame(rows).set_index("law").round(1))

# %% [markdown]
# (About 5 % of entries lie beyond two standard errors when nothing is wrong.)
#
# The same as one number: the squared distance of the mean of $N$ estimates from $g$. In expectation it is exactly
#
# $$\mathbb E\Big\|\tfrac1N\textstyle\sum_k \hat G_kP_k - g\Big\|^2 = \text{bias} + \frac{\text{projection}+\text{noise}}{N}, \tag{1.2}$$
#
# with the three parts of the next section. Lines are (1.2), points are means over independent sequences. At small $N$ the biased laws
# are *better*: they have little variance. They stop where their bias is; the unbiased ones go on.

# %%
counts = [1, 4, 16, 64, 256, 1024, 4096][: size(7, 4)]
rows = []
for name in ["gaussian", "haar_stiefel", "spectral", "top_svd", "fixed_basis"]:
    part = parts[name]
    seen = errors_of_means(laws[name], G, counts, size(32, 8), generator=keyed.generator(0, f"means of {name}", 0))
    for count, value in zip(counts, seen, strict=True):
        theory = part.bias + (part.projection + part.noise) / count
        rows.append({"law": name, "N": count, "theory": theory, "estimate": value.value, "standard_error": value.standard_error})
figure, ax = plt.subplots(figsize=(6.4, 3.8))
figures_notebooks.exact_and_measured(ax, pd.DataFrame(rows), "N")
ax.set(xscale="log", yscale="log", xlabel="draws N in the mean", ylabel="E‖mean − g‖² / ‖g‖²", title="Exact (lines), measured (points)")
figure.tight_layout()
figures.legend(figure, ax)
plt.show()

# %% [markdown]
# ## What the error is made of
#
# With $\Sigma_\xi = \mathbb E[(\hat G-g)^\top(\hat G-g)]$ and $S=\Sigma_\xi+g^\top g$ (`theory/mse.py`), for any law
#
# $$\mathbb E\|\hat GP-g\|^2 = \underbrace{\operatorname{tr}\big((\mathbb E[P^2]-\mathbb E[P]^2)S\big)}_{\text{projection}}
# + \underbrace{\operatorname{tr}\big(\mathbb E[P]^2\,\Sigma_\xi\big)}_{\text{noise}}
# + \underbrace{\|g(\mathbb E[P]-I)\|^2}_{\text{bias}}, \tag{1.3}$$
#
# and when $\mathbb E[P]=cI$ this is $\operatorname{tr}(\mathbb E[P^2]S)-(2c-1)\|g\|^2$: of the law only $\mathbb E[P^2]$ matters. The
# noise part at $c=1$ is what the mini-batch brings in any case; the projection part is the price of $r<n$.

# %%
seen = {name: measure(law, G, size(50_000, 2_000), generator=keyed.generator(0, f"error {name}", 0)) for name, law in laws.items()}
place = np.arange(len(laws))[::-1]
figure, ax = plt.subplots(figsize=(7.5, 4.0))
left = np.zeros(len(laws))
hatches = {"projection": ("#0072B2", ""), "noise": ("#E69F00", "//"), "bias": ("#000000", "")}
for kind, (mine, hatch) in hatches.items():
    width = np.array([getattr(part, kind) for part in parts.values()])
    ax.barh(place, width, left=left, color=mine, hatch=hatch, edgecolor="white", label=f"{kind}, exact", height=0.7)
    left += width
mean_error, bars = ([getattr(found.mse, what) for found in seen.values()] for what in ("value", "standard_error"))
ax.errorbar(mean_error, place, xerr=2 * np.array(bars), fmt="o", color="#D55E00", markersize=4, capsize=3, label="measured")
ax.set_yticks(place, list(laws))
ax.set(xlabel="E‖ĜVVᵀ − g‖² / ‖g‖²", title=f"Three parts of the error, n = {n}, r = {r}, c = 1")
ax.grid(axis="y", visible=False)
figure.tight_layout()
figures.legend(figure, ax)
plt.show()

# %% [markdown]
# The same in numbers. The total has a standard error of its own; squared bias comes from means of independent groups of draws, hence
# the mapping of its ratio from Student's distribution to a $z$ (`experiments/validation/verdict.py`).

# %%
total = {name: figures_notebooks.beside("total", seen[name].mse, parts[name].total) for name in laws}
bias = {name: figures_notebooks.beside("squared bias", seen[name].bias, parts[name].bias, GROUPS) for name in laws}
tables = [pd.DataFrame.from_dict(rows, orient="index").rename_axis("law") for rows in (total, bias)]
display(*(table.round(4) + 0.0 for table in tables))

# %% [markdown]
# ## Against the rank, and on a real model
#
# The same comparison over $r/n$: on the population above, measured here, and summed over all linear layers of a small LLaMA in
# training, read from the committed run `validate/tiny`, where $S$ is that of its 64 mini-batches. In both the order is the same:
# Gaussian above Haar–Stiefel, on which the coordinate law lies; the spectral law, which knows $S$, below; top-r SVD lowest for a single
# draw, because its bias is still smaller than their variance.

# %%
some = ["gaussian", "haar_stiefel", "coordinate", "spectral", "top_svd"]
rows = []
for name in some:
    for rank in (1, 2, 5, 10, 15):
        law = LAWS[name].from_second_moment(S, rank)
        found = measure(law, G, size(20_000, 500), generator=keyed.generator(0, f"rank {name}", rank), track_mean=False)
        theory = mse.ipa(exact(law), noise, signal).total
        rows.append(
            {"law": name, "ratio": rank / n, "theory": theory, "estimate": found.mse.value, "standard_error": found.mse.standard_error}
        )
here = pd.DataFrame(rows).assign(panel="eight 12 × 20 gradients, measured here")
model = committed("validate/tiny-model").query("law in @some")
told = {"theory": model.predicted, "estimate": model.measured, "standard_error": model.standard_error}
there = model[["law", "ratio"]].assign(panel="tiny LLaMA, committed", **{key: value / model.signal_norm2 for key, value in told.items()})
figures.error_against_rank(pd.concat([here, there]), "Exact (lines), measured (points, ±2 standard errors)")
plt.show()

# %% [markdown]
# ## Why $V^\top V=(cn/r)I$ is the optimum without knowledge
#
# A law that does not know $S$ can only make $\operatorname{tr}\mathbb E[P^2]$ small: that is its cost
# $\operatorname{tr}(\mathbb E[P^2]S)$ averaged over all rotations of $S$, up to the factor $\operatorname{tr}S/n$. $P$ has at most $r$
# positive eigenvalues, so by Cauchy–Schwarz, then Jensen (`theory/optimal.py`),
#
# $$\mathbb E\operatorname{tr}P^2 \;\ge\; \tfrac1r\,\mathbb E(\operatorname{tr}P)^2
# \;\ge\; \tfrac1r(\mathbb E\operatorname{tr}P)^2 = \frac{c^2n^2}{r}. \tag{1.4}$$
#
# Both steps are visible. Every draw lies on or above the parabola (first inequality: on it if and only if the eigenvalues of $V^\top V$
# are equal); and because the parabola is convex, spreading $\operatorname{tr}P$ along it costs as well (second). Equality in both means
# $V^\top V=(cn/r)I$ in every draw: all draws of Haar–Stiefel, of coordinates without replacement and of subsampled transforms are one
# and the same point.

# %%
figure, ax = plt.subplots(figsize=(6.4, 4.0))
rows = {}
for name in ["gaussian", "sparse_sign", "rademacher", "coordinate_replacement", "haar_stiefel", "coordinate", "dct", "hadamard"]:
    V = laws[name].sample(size(4_000, 400), generator=keyed.generator(0, f"traces {name}", 0), dtype=torch.float64)
    trace, square = (V.square().sum((-2, -1)) / n).numpy(), ((V.mT @ V).square().sum((-2, -1)) * r / n**2).numpy()
    optimum = optimal.instance_independent_floor(n, r)
    rows[name] = {
        "tr E[P²] / floor, exact": np.trace(exact(laws[name]).square) / optimum,
        "mean of draws": square.mean(),
        "± SE": square.std() / len(square) ** 0.5,
        "spread of tr P / n": trace.std(),
        "largest |tr P² − (tr P)²/r| / floor": np.abs(square - trace**2).max(),
    }
    if name not in ("coordinate", "dct", "hadamard"):
        mark, mine = figures.marker(name), figures.colour(name)
        ax.plot(trace[:400], square[:400], mark, color=mine, markersize=3, alpha=0.35)
        at = rows[name]["tr E[P²] / floor, exact"]
        ax.plot([1.0], [at], mark, color=mine, markersize=9, markeredgecolor="#000000", label=f"{name}, exact mean")
grid = np.linspace(0.4, 1.8, 100)
ax.plot(grid, grid**2, color="#000000", linewidth=1.4, label="(tr P)² / r")
ax.set(
    xlabel="tr P / (cn)",
    ylabel="tr P² / (c²n²/r)",
    xlim=(0.4, 1.8),
    ylim=(0, 3.6),
    title="Draws (small), exact means (large), the bound (line)",
)
figure.tight_layout()
figures.legend(figure, ax)
plt.show()
display(pd.DataFrame.from_dict(rows, orient="index").rename_axis("law").round(4))

# %% [markdown]
# With knowledge one can do better, and without it one cannot pretend: the spectral law fitted to $S$ has a smaller cost than $n/r$ on
# $S$ itself, and a larger one on almost every rotation of $S$. Its mean over all rotations is $\operatorname{tr}\mathbb E[P^2]/n$, at
# or above the floor like that of any law. The third notebook is about this law; the second about laws that share the optimum of
# Haar–Stiefel and still differ.

# %%
turns = LAWS["haar_stiefel"](n=n, rank=n).sample(size(4_000, 200), generator=keyed.generator(0, "turns", 0), dtype=torch.float64)
square = torch.from_numpy(exact(laws["spectral"]).square)
costs = torch.einsum("dij,jk,dlk,li->d", turns, S, turns, square).numpy() / float(S.trace())
marks = {
    "on S, which it was fitted to": (float((square * S).sum() / S.trace()), figures.colour("spectral"), "-"),
    "mean over rotations, exact": (float(square.trace()) / n, "#000000", "--"),
    "Haar–Stiefel, on every rotation: n/r": (n / r, figures.colour("haar_stiefel"), ":"),
}
figure, ax = plt.subplots(figsize=(6.4, 3.2))
ax.hist(costs, bins=30, color=figures.colour("spectral"), alpha=0.5, label="spectral law, on rotations of S")
for label, (at, mine, dashes) in marks.items():
    ax.axvline(at, color=mine, linestyle=dashes, linewidth=1.8, label=label)
ax.set(xlim=(0, None), xlabel="tr(E[P²] RSRᵀ) / tr S", ylabel="rotations R", title="Knowledge of S helps on S only")
figure.tight_layout()
figures.legend(figure, ax)
plt.show()
print(f"mean over {len(costs)} rotations {costs.mean():.3f} ± {costs.std() / len(costs) ** 0.5:.3f}; ", end="")
print("; ".join(f"{label}: {at:.3f}" for label, (at, _, _) in marks.items()))
