# %% [markdown]
# # 8. Choose an estimator for your model
# Load a model and a text, measure its gradients, and let the numbers choose: which law, which rank, how long to keep a draw, and what it costs.
# This is `lowrank advise` with its parts in view; set `MODEL` to a folder or hub name of your own.

# %%
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import torch
from IPython.display import Markdown

from estimators import Population, convert, measure
from experiments import advise
from experiments.advising import errors, subject
from experiments.advising.costs import chosen_layers
from experiments.pages import advice, figures, notebooks
from experiments.validation.gradients import populations

notebooks.begin()
MODEL = notebooks.size("smollm2", "tiny")
config = advise.Config(
    model=MODEL,
    budget_gb=2.5,
    law=notebooks.size(("haar_stiefel", "gaussian", "spectral", "top_svd"), ("haar_stiefel", "spectral")),
    ratio=notebooks.size((1 / 16, 1 / 4), (1 / 4,)),
    batches=notebooks.size(6, 4),
    sequences=2,
    length=notebooks.size(64, 32),
    repeats=notebooks.size(2, 1),
    runs_dir=Path(tempfile.mkdtemp()),
    quiet=True,
)
run = advise.main(config)
rows = run.rows()

# %% [markdown]
# ## What the gradients look like
# $S = E[\hat G^\top \hat G]$ of every layer. The effective rank is $\exp$ of the entropy of its spectrum: where it is far below $n$, a law that
# knows the directions can gain; where it is near $n$, none can.

# %%
layers = run.frame("layer")
layers["block"] = layers.layer.str.extract(r"\.(\d+)\.")[0].astype(float)
layers["type"] = layers.layer.str.rsplit(".", n=1).str[-1]
figure, ax = plt.subplots(figsize=(7, 3.2))
for kind, group in layers.groupby("type", sort=False):
    ax.plot(group.block, group.effective_rank / group[["m", "n"]].min(axis=1), ".-", color=figures.LAYERS.get(kind, "#000000"), label=kind)
ax.set(xlabel="block", ylabel="effective rank / min(m, n)", ylim=(0, None), title=f"Gradients of {MODEL}")
ax.legend(ncols=2, bbox_to_anchor=(1.02, 1), loc="upper left")
plt.show()

# %% [markdown]
# ## Error, memory, time
# The error is $E\|\hat G V V^\top - g\|^2$ over the error of the mini-batch gradient itself, for mini-batches that the law has not seen: a fitted law
# learned its directions from another one, as it does in training. An unbiased estimate with error $e$ needs batches $e$ times as large for the same
# error. A biased law may have less, and keeps it however many steps are averaged.

# %%
pd.DataFrame(advice.lines(rows)).set_index("law")

# %%
advice.figure(rows)
plt.show()

# %% [markdown]
# ## The recommendation

# %%
Markdown("\n".join(f"- {line}" for line in advice.reasons(rows, run.config)))

# %% [markdown]
# ## Is the prediction right?
# The smallest layer again: its gradients, the law as training would have it, and draws of it. Measured is the mean squared distance of the
# estimates from the mean of these mini-batches; predicted is the exact error on the same population.

# %%
mine = subject.load(config)
name, _ = min(chosen_layers(mine.model).items(), key=lambda item: item[1].weight.numel())
_, gradients = next(populations(mine.model, mine.batch, config.batches, names=[name], loss=mine.loss))
layer = next(errors.layers(iter([(name, gradients)]), config.seed))
evaluated = gradients[1:]
generator = torch.Generator().manual_seed(0)
noise = float((evaluated - evaluated.mean(0)).square().sum((1, 2)).mean())
unseen = float(evaluated.mean(0).square().sum()) - float(layer.sums.signal[0])  # noise that is left in the mean of a few mini-batches
rank = errors.fits(layer, config.ratio[-1])
checked = []
for law in (law for law in config.law if law != "top_svd"):
    seen = measure(layer.law(law, rank), Population(evaluated), notebooks.size(1000, 500), generator=generator, track_mean=False)
    predicted = float(layer.error(law, rank)[0]) - unseen  # E‖estimate − ḡ‖² = E‖estimate − g‖² − (‖ḡ‖² − ‖g‖²) where the mean is right
    checked.append(
        {
            "law": law,
            "predicted / noise": predicted / noise,
            "measured / noise": seen.mse.value / noise,
            "± standard error": seen.mse.standard_error / noise,
            "z": (seen.mse.value - predicted) / seen.mse.standard_error,
        }
    )
pd.DataFrame(checked).set_index("law").round(3)

# %% [markdown]
# ## Use it
# `ranks.json` of the run has a rank for every layer at the memory of the uniform rank. `convert` takes it, or one number for all.

# %%
told = run.frame("advice").iloc[0]
handle = convert(mine.again(), law=told.low_rank, rank=run.read("ranks.json"), refresh_every=int(told.refresh_every))
ranks = pd.Series({name: layer.rank for name, layer in handle.layers.items()}, name="rank")
ranks.groupby(ranks.index.str.rsplit(".", n=1).str[-1]).describe()[["min", "50%", "max"]].astype(int)
