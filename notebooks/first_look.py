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
# # A first look
# One gradient, several laws: what they cost and whether they keep their promise. Everything is computed here or read from committed results.

# %%
import matplotlib.pyplot as plt
import pandas as pd
import torch

from estimators import LAWS, measure
from experiments import figures
from experiments.publish import RESULTS
from experiments.verdict import check_law, exact
from theory import mse

generator = torch.Generator().manual_seed(0)
G = torch.randn(24, 64, generator=generator, dtype=torch.float64) * torch.logspace(0, -1.5, 64, dtype=torch.float64)
S = G.mT @ G

# %% [markdown]
# ## The error of GVVᵀ, exact and measured
# No noise here, c = 1: Haar has n/r − 1, Gaussian (n+1)/r, the spectral law the nuclear-norm optimum.

# %%
rows = []
for name in ("gaussian", "haar_stiefel", "coordinate", "spectral", "top_svd"):
    for rank in (4, 8, 16, 32):
        law = LAWS[name].from_second_moment(S, rank)
        predicted = mse.ipa(exact(law), 0 * S.numpy(), S.numpy())
        seen = measure(law, G, 4000, generator=generator)
        norm = predicted.signal
        rows.append({"law": name, "ratio": rank / 64, "panel": "one 24 × 64 gradient", "theory": predicted.total / norm,
                     "estimate": seen.mse.value / norm, "standard_error": seen.mse.standard_error / norm})
figures.error_against_rank(pd.DataFrame(rows), "Exact (lines), measured (points, ±2 standard errors)")
plt.show()

# %% [markdown]
# ## Does a law keep its promise?

# %%
print(check_law(LAWS["haar_stiefel"](n=16, rank=4)))

# %% [markdown]
# ## The same on the gradients of a LLaMA in training

# %%
model = pd.read_csv(RESULTS / "validate" / "tiny-model.csv")
signal = model.signal_norm2
figures.error_against_rank(
    model.assign(panel="tiny LLaMA, all linear layers", theory=model.predicted / signal, estimate=model.measured / signal,
                 standard_error=model.standard_error / signal),
    "Committed result: exact (lines), measured (points)",
)
plt.show()
