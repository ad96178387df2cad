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
# # 4. Real gradients
# What decides between the laws is one matrix a layer, $S=\mathbb E[\hat G^\top\hat G]$. Here it is of real mini-batches: of a small
# LLaMA, at its start and in training, and of the pretrained SmolLM2-135M.
#
# "The" gradient of a layer is that of a finite population: $N$ equally likely mini-batches with gradients $\hat G_i$ ($m\times n$),
# mean $g$. With $\Sigma_\Theta=g^\top g$ and $\Sigma_\xi=\mathbb E[(\hat G-g)^\top(\hat G-g)]$ the second moment is
# $S=\Sigma_\xi+\Sigma_\Theta$, and everything that follows is exact for that population. For a law with $\mathbb E[P]=I$, $P=VV^\top$,
# $$\mathbb E\|\hat GP-g\|^2=\operatorname{tr}(\mathbb E[P^2]\,S)-\|g\|^2 .$$

# %%
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
from IPython.display import Markdown, display
from scipy.stats import entropy

from experiments import validate
from experiments.pages import figures, notebooks
from experiments.pages import figures_notebooks_training as shown
from experiments.text import batches, tokens
from experiments.training import models
from experiments.validation.gradients import populations, statistics
from experiments.validation.verdict import student

notebooks.begin()
config = validate.Config(
    model="tiny",
    steps=notebooks.size(30, 2),
    batches=notebooks.size(24, 4),
    sequences=notebooks.size(8, 2),
    length=notebooks.size(128, 32),
    draws=notebooks.size(128, 16),
    law=("gaussian", "haar_stiefel", "coordinate", "spectral", "top_svd"),
    keep=(),
    ratio=notebooks.size((1 / 16, 1 / 4, 1 / 2), (1 / 4,)),
    runs_dir=Path(tempfile.mkdtemp()),
    quiet=True,
)


def facts(model, stream, count, sequences, names=None):
    """Ranks, shares and spectrum of S, a row a layer, of ``count`` mini-batches."""
    batch = lambda i: batches.batch(stream, config.seed, "gradients", i, sequences, config.length)  # noqa: E731
    found = populations(model.eval(), batch, count, names=names)
    return pd.DataFrame([{"layer": name, "n": stack.shape[-1]} | statistics(stack).summary() for name, stack in found])


text = tokens.tokens(models.PRESETS["tiny"]["vocab_size"])
start = facts(models.build("tiny", config.seed), text.training, config.batches, config.sequences)
run = validate.main(config)
rows, loss = pd.DataFrame(run.rows()), run.read("training.json")["loss"]
layers = rows[rows.kind == "layer"].reset_index(drop=True)
frequencies = pd.Series(text.training).value_counts()
Markdown(
    f"The LLaMA has {models.parameters('tiny'):,} weights and {len(layers)} linear layers. Populations here: $N={config.batches}$ "
    f"mini-batches of {config.sequences} × {config.length} tokens, before training and after {config.steps} steps of AdamW. The loss "
    f"went from {loss[0]:.2f} to {loss[-1]:.2f} nats; {entropy(frequencies):.2f} is the entropy of word frequencies, where a model "
    "ends that looks at no context."
)

# %% [markdown]
# ## Spectra of $S$
# The eigenvalues $\sigma_i$ of $S$ as shares of its trace. The spectral law draws direction $i$ with probability
# $\pi_i\propto\sqrt{\sigma_i}$, at most 1: the faster they fall, the more it gains.

# %%
for title, frame in {"at the start of training": start, f"after {config.steps} steps": layers}.items():
    figures.spectra(frame).axes[0].set_title(f"Spectrum of S by layer, {title}")
plt.show()

# %% [markdown]
# And some layers of the pretrained SmolLM2-135M, of a middle block and of the last one. (Skipped in the small version of this notebook,
# which does not need its weights.)

# %%
if not notebooks.SMOKE:
    pretrained, stream = models.smollm2()
    kinds = ("self_attn.q_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.down_proj")
    some = facts(pretrained, stream, 8, 1, names=[f"model.layers.{block}.{kind}" for block in (15, 29) for kind in kinds])
    figures.spectra(some).axes[0].set_title("Spectrum of S, SmolLM2-135M, blocks 15 and 29")
    plt.show()
    display(some.set_index("layer")[["n", "effective_rank", "stable_rank", "signal_share"]].round(3))

# %% [markdown]
# ## How low-rank, and how much of it signal?
# The effective rank is $\exp(-\sum p_i\log p_i)$ with $p_i=\sigma_i/\sum\sigma_j$, the stable rank $\sum\sigma_i/\sigma_1$, the signal
# share $\|g\|^2/\operatorname{tr}S$. A mean of $N$ gradients holds $\operatorname{tr}\Sigma_\xi/N$ of noise, so the last column takes
# that out: the share for the distribution that the mini-batches come from.

# %%
columns = ["effective rank / n", "effective_rank", "stable_rank", "signal_share", "signal_share_beyond"]
samples = {
    "tiny, at the start": start,
    f"tiny, after {config.steps} steps": layers,
    "tiny, committed run": notebooks.committed("validate/tiny-layer"),
    "SmolLM2-135M, committed run": notebooks.committed("validate/smollm2-layer"),
}
samples = {name: frame.assign(**{columns[0]: frame.effective_rank / frame.n}) for name, frame in samples.items()}
display(pd.DataFrame({name: frame[columns].median() for name, frame in samples.items()}).T.round(3))
figures.layer_facts(layers)
figures.layer_facts(samples["SmolLM2-135M, committed run"])
plt.show()

# %% [markdown]
# Medians over the layers. The figures are of the small LLaMA here, above, and of all linear layers of SmolLM2 in the committed run,
# below. Two things to see. While the small model learns word frequencies, every token asks for nearly the same change, and $S$ is
# nearly of rank one in all layers but the first ones; beyond that plateau (the committed run) it opens again. And little of $S$ is
# signal: the noise of a mini-batch decides what a law costs, so a law has to be fitted to $S$, not to $g$.
#
# ## Predicted and measured errors
# Summed over the layers, relative to $\|g\|^2$: lines are exact, points are means over draws of the law and of the mini-batch.

# %%
sums = {
    f"tiny, after {config.steps} steps, here": rows[rows.kind == "model"],
    "tiny, committed": notebooks.committed("validate/tiny-model"),
    "SmolLM2-135M, committed": notebooks.committed("validate/smollm2-model"),
}
model = pd.concat([frame[frame.law.isin(config.law)].assign(panel=name) for name, frame in sums.items()])
named = {"predicted": "theory", "measured": "estimate", "standard_error": "standard_error"}
model = model.assign(**{new: model[old] / model.signal_norm2 for old, new in named.items()})
figures.error_against_rank(model, "Exact (lines), measured (points, ±2 standard errors)")
plt.show()

# %% [markdown]
# Layer by layer, of the population here: measured over predicted.

# %%
gradients = rows[rows.kind == "gradient"]
figures.layer_ratios(gradients, list(config.law), 1 / 4)
z = (gradients.measured - gradients.predicted) / gradients.standard_error
z = z[gradients.standard_error > 0].map(lambda value: student(value, config.draws))
figures.z_scores(z.to_numpy(), f"Every layer, law and rank; {config.draws} draws each")
plt.show()
said = {name: frame for name, frame in sums.items() if "committed" in name}
Markdown(
    f"Here the largest of {len(z)} $|z|$ is {z.abs().max():.2f}. In the committed runs "
    + " and ".join(f"{int(frame.holds.sum())} of {len(frame)} laws and ranks hold ({name})" for name, frame in said.items())
    + "; what does not hold of SmolLM2 has too few draws to tell, see experiments/results."
)

# %% [markdown]
# ## Where the spectral law gains most, and where Haar–Stiefel
# Both ratios follow from two numbers a layer. With $s=\|g\|^2/\operatorname{tr}S$:
# $$\frac{\text{Gaussian}}{\text{Haar}}=\frac{\frac{n+r+1}{r}-s}{\frac nr-s}=1+\frac{r+1}{n-rs}$$
# $$\frac{\text{Haar}}{\text{spectral}}=\frac{\frac nr-s}{\frac{\sum\sigma_i/\pi_i}{\operatorname{tr}S}-s}\le\frac{\frac nr-s}{1-s}.$$
# So orthonormal columns gain with $r/n$ and, for a given rank, where signal is a large share; the spectral law gains where the spectrum
# falls fast, up to the point where only the noise of the mini-batch is left.

# %%
parts = []
for name, label in (("tiny", "tiny"), ("smollm2", "SmolLM2-135M")):
    frame = notebooks.committed(f"validate/{name}-gradient")
    wide = frame.pivot_table(index=["layer", "n", "rank", "ratio"], columns="law", values="predicted", sort=False).reset_index()
    parts.append(wide.merge(samples[f"{label}, committed run"].drop(columns="n"), on="layer").assign(model=label))
every = pd.concat(parts).reset_index(drop=True)
share = every.signal_share
every["Gaussian / Haar"], every["Haar / spectral"] = every.gaussian / every.haar_stiefel, every.haar_stiefel / every.spectral
every["of its bound"] = every["Haar / spectral"] / ((every.n / every["rank"] - share) / (1 - share))
every["kind"] = every.layer.str.rsplit(".", n=1).str[-1]
quarter = every[every.ratio == 1 / 4]
shown.gains(pd.concat([quarter.assign(what=f"{what}, r/n = 1/4", gain=quarter[what]) for what in ("Haar / spectral", "Gaussian / Haar")]))
plt.show()
display(every.pivot_table(index=["model", "kind"], columns="ratio", values="Haar / spectral", aggfunc="median", sort=False).round(2))

# %% [markdown]
# The layers with the largest gains of either kind, at $r/n=1/4$:

# %%
facts_shown = ["model", "layer", "Haar / spectral", "of its bound", "Gaussian / Haar", "effective rank / n", "signal_share"]
for what in ("Haar / spectral", "Gaussian / Haar"):
    best = quarter.groupby("model", sort=False)[facts_shown].apply(lambda group, what=what: group.nlargest(3, what)).reset_index(drop=True)
    display(best.round(3))
formula = 1 + (every["rank"] + 1) / (every.n - every["rank"] * share)
rank_of = lambda model, a, b: quarter[quarter.model == model][[a, b]].corr("spearman").iloc[0, 1]  # noqa: E731
gap = (every["Gaussian / Haar"] / formula - 1).abs().max()
kinds = quarter[quarter.model == "SmolLM2-135M"].groupby("kind")["Haar / spectral"].median().sort_values()
Markdown(
    f"The formula for Gaussian over Haar meets all {len(every)} committed pairs of predictions to {gap:.0e}. At $r/n=1/4$ the spectral "
    f"law reaches a median of {quarter['of its bound'].median():.2f} of its bound. Its gain falls with the effective rank (rank "
    f"correlation {rank_of('tiny', 'Haar / spectral', 'effective rank / n'):.2f} on tiny, "
    f"{rank_of('SmolLM2-135M', 'Haar / spectral', 'effective rank / n'):.2f} on SmolLM2), that of Haar over Gaussian rises with the "
    f"signal share ({rank_of('tiny', 'Gaussian / Haar', 'signal_share'):.2f} and "
    f"{rank_of('SmolLM2-135M', 'Gaussian / Haar', 'signal_share'):.2f}). On SmolLM2 the kind of layer with the largest median gain is "
    f"`{kinds.index[-1]}` ({kinds.iloc[-1]:.2f}), with the smallest `{kinds.index[0]}` ({kinds.iloc[0]:.2f})."
)

# %% [markdown]
# All of this is about one gradient at a time at $c=1$. Whether a smaller error makes a better training is another question:
# 06_pretraining.
