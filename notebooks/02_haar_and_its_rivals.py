# %% [markdown]
# # 2. Haar–Stiefel and its rivals
#
# Among laws that know nothing of the gradient, $V^\top V=(cn/r)I$ is the optimum (first notebook, (1.4)). Four laws here attain it:
# Haar–Stiefel, coordinates without replacement, and subsampled DCT and Hadamard transforms with random signs. The Gaussian law, the one
# that is easiest to write down, does not. This notebook asks how much that matters, what the optimum hides, and what each law costs to
# draw.
#
# Exact values come from `theory/`, draws from `estimators/`, benches and gradients of real models from committed results. Bars are ±2
# standard errors.

# %%
import json
from dataclasses import fields

import numpy as np
import pandas as pd
import torch
from IPython.display import display
from matplotlib import pyplot as plt
from scipy import stats

from estimators import LAWS, Estimate, keyed, measure
from experiments.benching.sampling import made
from experiments.pages import figures, figures_notebooks
from experiments.pages.notebooks import begin, committed, size
from experiments.publish import RESULTS
from experiments.training.timing import pairs
from experiments.validation.checks import exact
from experiments.validation.draws import errors_of_means, squared_errors
from experiments.validation.synthetic import gradients
from theory import levels, mse, optimal

begin()

# %% [markdown]
# ## How much better than Gaussian?
#
# With $t=\operatorname{tr}S$ and $c=1$ (`theory/haar_stiefel.py`, `theory/gaussian.py`, `theory/mse.py`)
#
# $$\text{Haar: } \tfrac nr\,t-\|g\|^2, \qquad \text{Gaussian: } \tfrac{n+r+1}{r}\,t-\|g\|^2,
# \qquad \text{difference: } \tfrac{r+1}{r}\,t. \tag{2.1}$$
#
# The difference hardly depends on $r$, the error itself falls like $n/r$. So at small $r/n$ the two laws are the same for any practical
# purpose, and at $r=n$ the Haar estimate is exact ($VV^\top=I$) while the Gaussian one is not. Noise is common to both and hides part
# of the gain. The lines are exact for three levels of noise $\operatorname{tr}\Sigma_\xi/\|g\|^2$: none, equal to the signal, and the
# median over the layers of a small LLaMA in training (`validate/tiny`), most of whose second moment is noise. Open squares are that
# model's measured errors, all layers together.

# %%
n, m = 64, 16
layers = committed("validate/tiny-layer")
noises = {0.0: "#0072B2", 1.0: "#E69F00", float((1 / layers.signal_share - 1).median()): "#000000"}
grid = np.arange(1, n)


def ratio_of_errors(rank: int, noise: float) -> float:
    """Gaussian over Haar–Stiefel, exactly, at ‖g‖² = 1."""
    over, under = (levels.ipa(levels.levels(stem, n, rank), 1 + noise, 1.0) for stem in ("gaussian", "haar_stiefel"))
    return over / under


rows = []
for noise in noises:
    G = gradients(f"{m}x{n}", "power", noise=noise, seed=0)
    for rank in grid:
        row = {"noise": noise, "ratio": rank / n, "theory": ratio_of_errors(int(rank), noise), "estimate": np.nan, "standard_error": np.nan}
        if rank in (1, 4, 16, 32):
            over, under = (
                measure(
                    LAWS[name](n=n, rank=int(rank)),
                    G,
                    size(3_000, 200),
                    generator=keyed.generator(0, f"{name} {noise}", int(rank)),
                    track_mean=False,
                ).mse
                for name in ("gaussian", "haar_stiefel")
            )
            row["estimate"] = over.value / under.value
            row["standard_error"] = row["estimate"] * np.hypot(over.standard_error / over.value, under.standard_error / under.value)
        rows.append(row)
rows = pd.DataFrame(rows)
model = committed("validate/tiny-model").set_index(["law", "ratio"])
over, under = model.loc["gaussian"], model.loc["haar_stiefel"]
quotient = over.measured / under.measured
bar = 2 * quotient * np.hypot(over.standard_error / over.measured, under.standard_error / under.measured)
figure, ax = plt.subplots(figsize=(6.6, 3.8))
names = {noise: f"noise / signal = {noise:.3g}" for noise in noises}
figures_notebooks.exact_and_measured(ax, rows.assign(law=rows.noise.map(names)), "ratio", colours={names[k]: v for k, v in noises.items()})
ax.errorbar(quotient.index, quotient, bar, fmt="s", color="#D55E00", markerfacecolor="white", capsize=2, label="tiny LLaMA, committed")
ax.set(xlabel="r/n", ylabel="error of Gaussian / error of Haar–Stiefel", ylim=(0.95, 3.5), title="Exact (lines), measured (points)")
figure.tight_layout()
figures.legend(figure, ax)
plt.show()
z = (rows.estimate - rows.theory) / rows.standard_error
print(f"{z.count()} points, largest |z| = {z.abs().max():.2f}; tiny LLaMA, measured ratio:", end=" ")
print(", ".join(f"{value:.3f} ± {error / 2:.3f} at r/n = {at:g}" for (at, value), error in zip(quotient.items(), bar, strict=True)))

# %% [markdown]
# ## One mean, different tails
#
# The mean squared error of the four optimal laws is the same number for every gradient. Its *distribution* is not. Three gradients with
# $\|G\|=1$ and no noise: one with i.i.d. entries; one of rank one in a random direction, $G=uv^\top$; and one whose energy sits in a
# single column, $G=ue_1^\top$, as when one input feature is much larger than the others. For rank one and Haar–Stiefel the distribution
# is known: $b=\|Q^\top v\|^2$ is Beta$(\tfrac r2,\tfrac{n-r}2)$ whatever $v$, and
#
# $$\|GVV^\top-G\|^2 = 1 + \big(\tfrac{n^2}{r^2}-\tfrac{2n}r\big)\,b. \tag{2.2}$$
#
# The coordinate law on a single column has two outcomes only: with probability $r/n$ the column is chosen and comes back $n/r$ times
# too long, else it is lost. Same mean; a very different gamble.

# %%
r, draws = 8, size(30_000, 2_000)
generator = keyed.generator(0, "three gradients", 0)
spread = torch.randn(m, n, generator=generator, dtype=torch.float64)
u, v = torch.randn(m, generator=generator, dtype=torch.float64), torch.randn(n, generator=generator, dtype=torch.float64)
kinds = {
    "i.i.d. entries": spread / spread.norm(),
    "rank one, random direction": torch.outer(u / u.norm(), v / v.norm()),
    "rank one, a single column": torch.outer(u / u.norm(), torch.eye(n, dtype=torch.float64)[0]),
}
rivals = ["gaussian", "haar_stiefel", "coordinate", "dct", "hadamard"]
errors = {
    kind: {
        name: squared_errors(LAWS[name](n=n, rank=r), G, draws, generator=keyed.generator(0, f"tail {kind} {name}", 0)).numpy()
        for name in rivals
    }
    for kind, G in kinds.items()
}
figure, axes = plt.subplots(1, 3, figsize=(11.5, 3.8), sharey=True)
for ax, (kind, found) in zip(axes, errors.items(), strict=True):
    figures_notebooks.tails(ax, found)
    if kind.startswith("rank"):
        x = np.linspace(1, max(values.max() for values in found.values()), 400)
        beta = stats.beta(r / 2, (n - r) / 2).sf((x - 1) / ((n / r) ** 2 - 2 * n / r))
        ax.plot(x, beta, color="#000000", linewidth=0.9, linestyle=(0, (1, 1)), label="haar_stiefel, (2.2)")
    ax.axvline(n / r - 1, color="#7F7F7F", linewidth=0.9)
    ax.set(xlabel="‖GVVᵀ − G‖² / ‖G‖²", title=kind)
axes[0].set_ylabel("probability of a larger error")
figure.tight_layout()
figures.legend(figure, axes[-1])
plt.show()

# %% [markdown]
# The grey line is $n/r-1$, the mean of all but the Gaussian law. In numbers, with the exact mean beside the measured one:

# %%
for kind, found in errors.items():
    G = kinds[kind].numpy()
    table = figures_notebooks.quantiles(found, (0.5, 0.9, 0.99, 0.999))
    told = {}
    for name, values in found.items():
        seen = Estimate(float(values.mean()), float(values.std() / len(values) ** 0.5))
        told[name] = figures_notebooks.beside("mean", seen, mse.ipa(exact(LAWS[name](n=n, rank=r)), 0 * G.T @ G, G.T @ G).total)
    print(kind)
    display(pd.DataFrame.from_dict(told, orient="index").rename_axis("law").join(table).round(3))

# %% [markdown]
# Random signs and a transform mix the coordinates before some are chosen: DCT and Hadamard are like Haar–Stiefel on the first two
# gradients. On a single column they are better: the transform spreads it over all frequencies, in equal shares for Hadamard, so that
# any $r$ of them hold the same and every draw has the mean error. The bare coordinate law is the one to distrust there; on a gradient
# with i.i.d. entries, where there is nothing to mix, its tails are even *shorter*.
#
# Does it happen? For every layer of two models the committed runs hold the standard error of the error over a known number of draws,
# hence its spread in one draw relative to its mean. On the small LLaMA the coordinate law is a little wider than Haar–Stiefel, most in
# the `down_proj` layers. On the pretrained SmolLM2, whose second moments are nearly of rank one in many layers, it is several times
# wider. (There the spread itself is estimated from few draws, so single points are rough.)

# %%
figure, axes = plt.subplots(1, 2, figsize=(9.0, 3.9), sharex=True, sharey=True)
told = []
for ax, name in zip(axes, ("tiny", "smollm2"), strict=True):
    layers = committed(f"validate/{name}-layer").set_index("layer")
    rows = committed(f"validate/{name}-gradient").query("ratio == @r / @n")
    rows = rows.assign(spread=rows.standard_error / rows.measured * np.sqrt(rows.layer.map(layers.draws)))
    spread = rows.pivot_table(index="layer", columns="law", values="spread")
    for law in ("coordinate", "dct", "gaussian"):
        style = {"color": figures.colour(law), "marker": figures.marker(law), "s": 16, "alpha": 0.7, "linewidth": 0.4, "edgecolor": "white"}
        ax.scatter(spread.haar_stiefel, spread[law], label=law, **style)
    ax.plot([0.02, 4], [0.02, 4], color="#000000", linewidth=0.8)
    ax.set(
        xscale="log",
        yscale="log",
        xlabel="spread / mean, Haar–Stiefel",
        title=f"{name}: {len(spread)} layers, {int(layers.draws.iloc[0])} draws each",
    )
    told.append(
        {"model": name, "median stable rank of S": layers.stable_rank.median()}
        | spread[["haar_stiefel", *["coordinate", "dct", "gaussian"]]].median().to_dict()
    )
axes[0].set_ylabel("spread / mean, the law")
figure.tight_layout()
figures.legend(figure, axes[0])
plt.show()
print("Medians over layers of the spread over the mean:")
display(pd.DataFrame(told).set_index("model").round(3))

# %% [markdown]
# ## The constant c
#
# At isotropy constant $c$ the error is a parabola, $c^2\operatorname{tr}(\mathbb E[P^2]S)_{c=1}-2c\|g\|^2+\|g\|^2$, least at
#
# $$c^\star = \frac{\|g\|^2}{\operatorname{tr}(\mathbb E[P^2]S)_{c=1}} = \frac rn\cdot\frac{\|g\|^2}{\operatorname{tr}S}
# \ \text{ for the optimal laws,}
# \qquad \text{with error } (1-c^\star)\|g\|^2 \tag{2.3}$$
#
# (`theory/optimal.py`, `best_scale`). This is shrinkage: at $c^\star$ the estimate is so short that it is wrong mostly by being short.
# Left: exact parabolas, measured points, and the least error as a large marker. Right: the mean of $N$ estimates. Its best constant
# grows to 1 with $N$, so "least error" and "unbiased" are different goals, and which one matters depends on how many estimates are
# averaged, by momentum or by small steps. In SGD $c$ is a factor of the learning rate.

# %%
G = gradients(f"{m}x{n}", "power", noise=1.0, seed=0)
S = (G.mT @ G).mean(0)
_, noise, signal = mse.gradient_moments(G.numpy())
names, constants = ["gaussian", "haar_stiefel", "spectral"], np.geomspace(0.02, 1.5, 9)
rows, best = [], {}
for name in names:
    at_one = exact(LAWS[name].from_second_moment(S, r))
    best[name] = optimal.best_scale(at_one.square, signal, S.numpy())
    for place, c in enumerate(sorted([*constants, 1.0])):
        law = LAWS[name].from_second_moment(S, r, float(c))
        seen = measure(law, G, size(5_000, 200), generator=keyed.generator(0, f"c {name}", place), track_mean=False).mse
        theory = mse.ipa(exact(law), noise, signal).total
        rows.append({"law": name, "c": c, "theory": theory, "estimate": seen.value, "standard_error": seen.standard_error})
rows = pd.DataFrame(rows)
figure, axes = plt.subplots(1, 2, figsize=(10.0, 3.8))
for name in names:
    cost = float((exact(LAWS[name].from_second_moment(S, r)).square * S.numpy()).sum())
    c = np.geomspace(0.02, 1.5, 200)
    axes[0].plot(c, c**2 * cost - 2 * c + 1, color=figures.colour(name), linewidth=1.3)
    axes[0].plot([best[name]], [1 - best[name]], figures.marker(name), color=figures.colour(name), markersize=9, markeredgecolor="#000000")
    group = rows[rows.law == name]
    axes[0].errorbar(
        group.c,
        group.estimate,
        2 * group.standard_error,
        fmt=figures.marker(name),
        color=figures.colour(name),
        markersize=4,
        capsize=2,
        label=name,
    )
axes[0].axvline(1, color="#000000", linewidth=0.8)
axes[0].set(xscale="log", yscale="log", xlabel="c", ylabel="E‖ĜVVᵀ − g‖² / ‖g‖²", title="One estimate; large: the best c")
counts, rows = [1, 4, 16, 64, 256, 1024][: size(6, 4)], []
for label, c in {"c = 1": 1.0, "c = 0.3": 0.3, "c = c⋆ of one draw": best["haar_stiefel"]}.items():
    law = LAWS["haar_stiefel"](n=n, rank=r, c=float(c))
    part = mse.ipa(exact(law), noise, signal)
    seen = errors_of_means(law, G, counts, size(32, 8), generator=keyed.generator(0, f"means at {label}", 0))
    for count, value in zip(counts, seen, strict=True):
        theory = part.bias + (part.projection + part.noise) / count
        rows.append({"law": label, "N": count, "theory": theory, "estimate": value.value, "standard_error": value.standard_error})
colours = dict(zip(dict.fromkeys(row["law"] for row in rows), ("#0072B2", "#E69F00", "#D55E00"), strict=True))
figures_notebooks.exact_and_measured(axes[1], pd.DataFrame(rows), "N", colours=colours)
N = np.geomspace(1, counts[-1], 100)
cost = n / r * float(S.trace())
axes[1].plot(N, 1 - 1 / (1 + (cost - 1) / N), color="#000000", linewidth=1, linestyle=(0, (1, 1)), label="best c for each N")
axes[1].set(xscale="log", yscale="log", xlabel="estimates N in the mean", title="Haar–Stiefel, the mean of N estimates")
for ax in axes:
    ax.legend(frameon=False, fontsize=8)
figure.tight_layout()
plt.show()
print("; ".join(f"{name}: c⋆ = {c:.4f}" for name, c in best.items()))

# %% [markdown]
# ## What a draw costs
#
# Times over `torch.linalg.qr` of an equal Gaussian matrix, drawing it included: as committed by `lowrank bench primitives` (filled, bar
# from the lower to the upper quartile) and as measured in place (open), the calls taking turns so that what slows the machine slows all
# of them. They depend on the threads (printed below) and on what else the machine does; that three laws cost next to nothing and two
# cost most shows in both. Haar–Stiefel here is a Cholesky factorisation of $Z^\top Z$ and a triangular solve; coordinates and the
# Hadamard transform hardly need more than their random numbers. The spectral law knows $2r$ directions, and a draw projects on their
# complement.

# %%
rows, n = committed("bench/60m-primitives-sampling"), size(2048, 128)
shape = rows[(rows.over == "torch.linalg.qr") & (rows["shape"] == "2048x256")].set_index("name")
generator = keyed.generator(0, "costs", 0)
names = [name for name in shape.index if name in LAWS and name not in ("top_svd", "fixed_basis")]
laws = {name: made(name, n, n // 8, generator) for name in names}
calls = {name: lambda law=law: law.sample(generator=generator) for name, law in laws.items()}
peer = lambda: torch.linalg.qr(torch.randn(n, n // 8, generator=generator))  # noqa: E731
here = pd.DataFrame(pairs(peer, calls, torch.device("cpu"), size(15, 2))).set_index("name")
figure, ax = plt.subplots(figsize=(7.0, 3.6))
place = np.arange(len(names))[::-1]
for y, name in zip(place, names, strict=True):
    for row, shift, face in ((shape.loc[name], 0.13, figures.colour(name)), (here.loc[name], -0.13, "white")):
        ax.plot([row.ratio_q1, row.ratio_q3], [y + shift] * 2, color=figures.colour(name), linewidth=2)
        ax.plot([row.ratio], [y + shift], figures.marker(name), color=figures.colour(name), markerfacecolor=face, markersize=6)
ax.axvline(1, color="#000000", linewidth=0.8)
ax.plot([], [], "o", color="#555555", label="committed")
ax.plot([], [], "o", color="#555555", markerfacecolor="white", label="measured in place")
ax.set_yticks(place, names)
ax.set(xscale="log", xlabel="time of a draw / time of torch.linalg.qr", title=f"V of {n} × {n // 8}, float32")
figure.tight_layout()
figures.legend(figure, ax)
plt.show()
told = json.loads((RESULTS / "bench" / "60m-primitives.json").read_text(encoding="utf-8"))["environment"]
print(f"committed: {told['device']}, torch {told['torch']}; in place: {torch.get_num_threads()} threads, torch {torch.__version__}")

# %% [markdown]
# What one gets for it: the exact error without noise at this $r/n$, for the laws that know nothing of the gradient, beside the time of
# a draw. Then what the transforms do where $V$ is applied and never formed ($XV$ in $O(n\log n)$ a row, from $n$ signs and $r$ places),
# as committed: `kept`, their share of the bytes of $V$, and `ratio`, their time over the plain product with a stored $V$. On this
# processor they save memory and not time.

# %%
table = pd.DataFrame(
    {
        "E‖GVVᵀ − G‖² / ‖G‖², exact": {
            name: levels.ipa(levels.levels(law.stem, n, n // 8, **{f.name: getattr(law, f.name) for f in fields(law)[3:]}), 1.0, 1.0)
            for name, law in laws.items()
            if name != "spectral"
        },
        "over torch.linalg.qr, committed": shape.ratio,
        "here": here.ratio,
        "seconds, committed": shape.seconds,
    }
)
display(table.loc[[name for name in names if name != "spectral"]].sort_values(by=["seconds, committed"]).round(5))
applied = rows[rows.over == "XV with V stored"].set_index(["name", "shape"])
display(applied.assign(kept=applied.kept_bytes / applied.V_bytes)[["ratio", "ratio_q1", "ratio_q3", "kept"]].round(3))

# %% [markdown]
# So: among laws without knowledge take one with $V^\top V=(cn/r)I$. The gain over Gaussian is what (2.1) says, worth having at moderate
# $r/n$ and nothing at small; Haar–Stiefel and the transforms are safe for every gradient; bare coordinates are cheapest and fine where
# the energy is spread. To do better than $n/r$ takes knowledge of the gradient: the third notebook.
