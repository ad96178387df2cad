# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 5. Convergence
# SGD with a projected gradient on a quadratic can be followed exactly: the expected loss at every step, the level at which it stays,
# the step size at which it diverges. Here these stand beside simulation, then two things that practice adds: a subspace that is kept
# for $K$ steps, and error feedback.
#
# Setting (arXiv 2603.20632 for the estimator): $F(\Theta)=\tfrac12\operatorname{tr}(\Theta H\Theta^\top)$ with $\Theta$ of $m\times n$
# numbers, $\hat G=\Theta H+N$ with rows of $N$ independent, mean zero, covariance $C$, and a fresh $P=VV^\top$ at every step:
# $\Theta\leftarrow\Theta-\eta\,\hat GP$.

# %%
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from IPython.display import Markdown, display

from experiments import dynamics as simulated
from experiments.pages import figures, notebooks
from experiments.pages import figures_notebooks_training as shown
from experiments.validation.checks import exact
from theory import dynamics, feedback

notebooks.begin()
config = simulated.Config(ensemble=notebooks.size(2000, 200), steps=notebooks.size(150, 30))
quadratic = simulated.problem(config)
laws = {name: simulated.law_for(config, name, quadratic) for name in config.law}
Markdown(
    f"$n={config.n}$, $r={config.rank}$, $m={config.rows}$; eigenvalues of $H$ from 1 down to 1/{config.condition:g}; every entry of a "
    f"gradient has noise of variance {config.noise:g}. The spectral law knows $S$ at the start and keeps it while that goes stale."
)

# %% [markdown]
# ## The expected loss of every law, exact and simulated
# $S_t=\mathbb E[\Theta_t^\top\Theta_t]$ obeys a closed linear recursion, because $P$ and $N$ are independent of $\Theta_t$ and $N$ is
# centred:
# $$S_{t+1}=S_t-\eta c\,(HS_t+S_tH)+\eta^2\,\mathcal T(HS_tH+mC),\qquad \mathcal T(M)=\mathbb E[PMP],$$
# $$\mathbb E[F_t]=\tfrac12\operatorname{tr}(HS_t).$$
# So a law enters through its full second moment map $\mathcal T$, not only through $\mathbb E[P^2]=\mathcal T(I)$. Each law runs at the
# same fraction of its own largest stable step, so a law with a shorter step also ends at a lower level.

# %%
rows = pd.DataFrame([{"law": name} | row for name in config.law for row in simulated.curve(config, name)])
figures.loss_curves(rows)
plt.show()
far = notebooks.committed("dynamics/n16-r4-curve")
Markdown(
    f"Here, {config.ensemble:,} runs a law: {int(rows.holds.sum())} of {len(rows)} points hold, the largest $|z|$ is "
    f"{rows.z.abs().max():.2f}. In the committed run, of more runs: {int(far.holds.sum())} of {len(far)}, the largest $|z|$ "
    f"{far.z.abs().max():.2f}; it would have seen a defect of {100 * far.resolution.max():.1f} % at every point."
)

# %% [markdown]
# ## The same step for everyone
# At equal $\eta$ the drift $-\eta c(HS+SH)$ is the same for all unbiased laws; what differs is $\eta^2\mathcal T$, the noise that the
# projection adds. It decides how far down the loss goes, which is a linear solve: $c(HS_\infty+S_\infty H)-\eta\,\mathcal T(HS_\infty
# H)=\eta\,m\,\mathcal T(C)$.

# %%
limits = {name: dynamics.largest_stable_step(exact(law), quadratic.H) for name, law in laws.items()}
eta, start = 0.5 * min(limits.values()), quadratic.start.T @ quadratic.start
H, C, m = quadratic.H, quadratic.C, config.rows
curves, levels = [], []
for name, law in laws.items():
    loss = dynamics.expected_loss(exact(law), H, C, start, eta, config.steps, m)
    curves += [{"label": name, "step": t, "loss": loss[t]} for t in range(0, config.steps + 1, 5)]
    level = 0.5 * float(np.sum(H * dynamics.stationary(exact(law), H, C, eta, m)))
    levels.append({"law": name, "largest stable η": limits[name], "E F at the last step": loss[-1], "E F in the end": level})
shown.lines(pd.DataFrame(curves), "step", "loss", xlabel=f"step, η = {eta:.3f} for all", ylabel="E[F], exact", scales=("linear", "log"))
plt.show()
table = pd.DataFrame(levels).set_index("law").sort_values("E F in the end")
display(table.round(4))
Markdown(
    f"Lowest in the end: `{table.index[0]}`, highest: `{table.index[-1]}`, "
    f"{table['E F in the end'].iloc[-1] / table['E F in the end'].iloc[0]:.2f} times as high. Of the spectral law the largest stable "
    f"step is {limits['spectral'] / limits['haar_stiefel']:.2f} of Haar–Stiefel's: directions that it draws rarely because the "
    "gradient was small there at the start come with large weights $c/\\pi_i$ later, when the gradient has turned to them."
)

# %% [markdown]
# ## The largest stable step
# $\eta^\star=1/\rho(A^{-1}B)$ with $A(S)=c(HS+SH)$ and $B(S)=\mathcal T(HSH)$, by Perron–Frobenius. For $H=hI$ and a law with $V^\top
# V=(cn/r)I$ it is $2r/(cnh)$: a smaller rank asks for a proportionally smaller step, the price of $c=1$. At $c=r/n$ the price is paid
# in the drift instead.

# %%
ranks = range(1, config.n + 1)
steps = [
    {"label": name, "ratio": rank / config.n, "eta": dynamics.largest_stable_step(exact(law), quadratic.H)}
    for rank in ranks
    for name, law in ((name, simulated.law_for(simulated.Config(rank=rank), name, quadratic)) for name in config.law)
]
steps = pd.DataFrame(steps)
figure = shown.lines(steps, "ratio", "eta", xlabel="r/n", ylabel="largest stable η · λ_max")
figure.axes[0].plot([0, 1], [0, 2], color="#7F7F7F", linewidth=1, linestyle=":")
plt.show()
figures.stability(notebooks.committed("dynamics/n16-r4-stability"))
plt.show()

# %% [markdown]
# Above: exact; dotted, $2r/n$, which is the boundary were all of $H$ as curved as its most curved direction. Below, of the committed
# run: the exact growth of $\mathbb E\|\Theta\|^2$ a step around the boundary, and simulated over exact values after five steps (±2
# standard errors).
#
# ## Lazy updates: a subspace kept for $K$ steps
# For $H=hI$, no noise, and a law with $V^\top V=(cn/r)I$, one outer step of $K$ inner ones multiplies $\mathbb E\|\Theta\|^2$ by
# $$1-\tfrac rn\left[1-(1-\eta h\,cn/r)^{2K}\right].$$
# Inside the subspace $\Theta$ shrinks, outside nothing happens: however large $K$, no more than $r/n$ can go.

# %%
lazy = notebooks.committed("dynamics/n16-r4-lazy")
periods = np.unique(np.geomspace(1, 40, 25).astype(int))
rows = [
    {"label": "exact", "variant": f"η = {eta:g}", "K": K, "outer": value, "inner": value ** (1 / K)}
    for eta in lazy.eta.unique()
    for K in periods
    for value in (dynamics.lazy_contraction(config.n, config.rank, eta, 1.0, int(K)),)
]
curves = pd.DataFrame(rows)
panels = {"outer": "an outer step of K", "inner": "one inner step, on average"}
long = pd.concat([curves.assign(panel=title, left=curves[name]) for name, title in panels.items()])
seen = lazy.assign(label=lazy.law, K=lazy.inner)
power = 1 / seen.inner
measured = pd.concat(
    [
        seen.assign(panel=panels["outer"], left=seen.estimate, bar=2 * seen.standard_error),
        seen.assign(panel=panels["inner"], left=seen.estimate**power, bar=2 * seen.standard_error * power * seen.estimate ** (power - 1)),
    ]
)
figure = shown.lines(long, "K", "left", xlabel="K", ylabel="E‖Θ‖² after / before", error="bar", points=measured, scales=("log", "linear"))
figure.axes[0].axhline(1 - config.rank / config.n, color="#000000", linewidth=0.8)
plt.show()
Markdown(
    f"{int(lazy.holds.sum())} of {len(lazy)} simulated points hold (±2 standard errors, smaller than most markers; largest $|z|$ "
    f"{lazy.z.abs().max():.2f}). The right panel is what a step is worth: on a quadratic without noise a fresh subspace at every step "
    "is best, and keeping one costs little as long as the steps inside it do not finish what there is to gain, $K\\eta h\\,cn/r\\ll1$."
)

# %% [markdown]
# ## Error feedback
# A biased compressor, here $\mathcal C(x)=xQQ^\top$ with a fresh Haar frame $Q$ of $r$ columns, keeps $r/n$ of its input on average.
# Feedback remembers the rest:
#
# | recursion | update | memory |
# |---|---|---|
# | EF14 | $\Theta\leftarrow\Theta-\eta\,\mathcal C(v)$, $v=e+G$ | $e\leftarrow v-\mathcal C(v)$ |
# | EF21 | $\Theta\leftarrow\Theta-\eta\,h$ | $h\leftarrow h+\mathcal C(G-h)$ |
# | GradLite as transcribed (arXiv 2510.22467) | $\Theta\leftarrow\Theta-\eta\,(\mathcal C(G)+\rho)$ | $\rho\leftarrow\rho+G-\mathcal C(G)$ |
#
# The last one adds the residual to the update and never pays it back.

# %%
paths = {name: simulated.feedback_path(config, name) for name in simulated.FEEDBACK}
figures.feedback([{"law": name} | row for name, row in paths.items()])
plt.show()
display(
    pd.DataFrame([{"recursion": name, "F at the start": row["loss"][0], "F at the end": row["loss"][-1]} for name, row in paths.items()])
)
free = dynamics.expected_loss(exact(laws["haar_stiefel"]), H, 0 * C, start, paths["none"]["eta"], simulated.FEEDBACK_STEPS, m)
Markdown(
    "Without feedback the loss falls too, at $r/n$ of the speed: one fresh subspace a step sees every direction in turn, and scaling "
    f"by $n/r$ makes up for it: Haar–Stiefel at $c=1$, the same frames with the factor $n/r$, is at $\\mathbb E[F]={free[-1]:.1e}$ "
    "after as many steps, exactly. Feedback is for compressors that would miss a direction for good."
)

# %% [markdown]
# ### Why the literal recursion diverges
# On $f=\tfrac\lambda2x^2$ with a compressor that keeps the fraction $\kappa$, a step is linear: in $(x,e)$, $(x,h)$ or $(x,\rho)$. The
# literal map has determinant $1+\eta\lambda(1-2\kappa)$, so for $\kappa<\tfrac12$ it expands whatever the step size. Where nothing is
# kept, $\kappa=0$, its eigenvalues are $1\pm i\sqrt{\eta\lambda}$, of modulus $\sqrt{1+\eta\lambda}$.

# %%
eta, kept = paths["literal"]["eta"], np.linspace(0, 1, 201)
above, maps = {}, {"ef14": feedback.ef14_matrix, "ef21": feedback.ef21_matrix, "literal": feedback.literal_matrix}
figure, axes = plt.subplots(1, 2, figsize=(9.0, 3.4))
for name, matrix in maps.items():
    radius = [np.abs(np.linalg.eigvals(matrix(eta, 1.0, kappa))).max() for kappa in kept]
    axes[0].plot(kept, radius, **figures.FEEDBACK[name], label=name)
    above[name] = sum(value > 1 + 1e-12 for value in radius[1:])
axes[0].axhline(1, color="#000000", linewidth=0.8)
axes[0].set(xlabel="κ, the share that is kept", ylabel="spectral radius of a step", title=f"ηλ = {eta:g}")
axes[0].legend(frameon=False)
small = np.geomspace(1e-3, 1, 13)
grown = np.array([simulated.literal_growth(step) for step in small])
axes[1].plot(small, [feedback.literal_modulus(step, 1.0) - 1 for step in small], color=figures.colour("gaussian"), label="√(1+ηλ) − 1")
axes[1].plot(small, grown - 1, "o", color="#000000", markersize=4, label="measured over 2000 steps")
axes[1].set(xscale="log", yscale="log", xlabel="ηλ", ylabel="growth a step, minus 1", title="literal recursion, κ = 0")
axes[1].legend(frameon=False)
figure.tight_layout()
plt.show()
off = max(abs(seen / feedback.literal_modulus(step, 1.0) - 1) for seen, step in zip(grown, small, strict=True))
Markdown(
    f"Measured and stated growth differ by a factor of at most $1+{off:.0e}$ at all {len(small)} step sizes. There is no small enough "
    f"step: at a smaller one the same divergence only comes later. Of the {len(kept) - 1} shares above 0 on the left, EF14 is outside "
    f"the unit circle at {above['ef14']}, EF21 at {above['ef21']}, the literal recursion at {above['literal']}. With a linear "
    "compressor the maps of EF14 and EF21 have the same trace $2-\\kappa-\\eta\\lambda\\kappa$ and the same determinant $1-\\kappa$, "
    "so the curves coincide."
)
