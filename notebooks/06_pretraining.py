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
# # 6. Pretraining
# Does a smaller error of the gradient make a better training? Small LLaMAs from scratch, with $W$ frozen and $B$ ($m\times r$) trained
# by Adam: $W\leftarrow W+BV^\top$ after every step, a new $V$ every $K$ steps. Everything here is read from committed results; what was
# fixed before looking, and what was not, stands in experiments/results.

# %%
import json

import matplotlib.pyplot as plt
import pandas as pd
from IPython.display import Markdown, display

from experiments.pages import comparisons, figures_scale, figures_training, notebooks
from experiments.pages import figures_notebooks_training as shown
from experiments.publish import RESULTS

notebooks.begin()
NAMES = ("tiny", "tiny-rank", "tiny-period", "tiny-constant", "9m")
kinds = {name: comparisons.committed(name) for name in NAMES}
configs = {name: json.loads((RESULTS / "compare" / f"{name}.json").read_text(encoding="utf-8"))["config"] for name in NAMES}
first = kinds["tiny"]["final"].iloc[0]
Markdown(
    f"`tiny` has {int(first.parameters):,} weights, of which the methods differ in {100 * first.touched_share:.0f} %; `9m` is the same "
    f"body with a larger vocabulary: {int(kinds['9m']['final'].parameters.iloc[0]):,} weights, "
    f"{100 * kinds['9m']['final'].touched_share.max():.0f} %. Embeddings, head and norms train in full everywhere. "
    f"{configs['tiny']['steps']} steps of {configs['tiny']['sequences']} × {configs['tiny']['length']} tokens, seeds "
    f"{configs['tiny']['seed']} that fix initialisation and data order for everyone; learning rate and $c$ chosen for each row by "
    f"equally many runs of {configs['tiny']['tune_steps']} steps ({configs['9m']['tune_steps']} on `9m`) with a seed that is not "
    "compared. The loss is held out, in nats a token; the corpus is film reviews, so these are not C4 perplexities."
)

# %% [markdown]
# ## Curves
# Laws and baselines at $r/n=1/4$, $K=20$; bars are ±1 standard error over the seeds. The plateau at the beginning is that of word
# frequencies.

# %%
curve = pd.concat([notebooks.committed(f"compare/{name}-curve").assign(panel=name) for name in ("tiny", "9m")])
words = {"xlabel": "tokens", "ylabel": "held-out loss (nats/token)", "error": "standard_error"}
shown.lines(curve, "trained_tokens", "loss", **words)
plt.show()

# %% [markdown]
# The ranks, each law in all panels:

# %%
ranks = notebooks.committed("compare/tiny-rank-curve")
parts = ranks.label.str.extract(r"^(?P<label>\S+)(?: r=(?P<ratio>\S+))?$")
ranks = pd.concat([ranks.drop(columns="label"), parts], axis=1)
panels = sorted(ranks.ratio.dropna().unique(), key=float)
everywhere = pd.concat([ranks[ranks.ratio.isna()].assign(ratio=ratio) for ratio in panels])
ranks = pd.concat([ranks.dropna(subset="ratio"), everywhere]).sort_values("ratio", kind="stable", key=lambda ratio: ratio.astype(float))
shown.lines(ranks.assign(panel="r/n = " + ranks.ratio), "trained_tokens", "loss", **words)
plt.show()

# %% [markdown]
# ## Where they end: $r/n$, $K$, $c$
# Held-out loss after the last step, ±1 standard error over the seeds.

# %%
figures_scale.scale()
plt.show()

# %% [markdown]
# ## Pairs
# Contenders share seeds, so a difference is taken seed by seed; the interval is Student's, 95 %, of very few seeds, and not corrected
# for the number of intervals.

# %%
for reference in ("adamw", "haar_stiefel"):
    figures_training.differences(kinds["tiny"]["paired"], reference)
plt.show()

# %% [markdown]
# The theory of one gradient says: (1) Gaussian above Haar–Stiefel; (2) coordinate and DCT equal to it; (3) spectral below. Here every
# pair with Haar–Stiefel at the same $r/n$, $K$ and $c$ of the grid, with the outcome of that expectation. Knobs are equal where both
# had chosen the same learning rate and $c$: only then is the law all that differs.

# %%
EXPECTED = {"gaussian": 1, "coordinate": 0, "dct": 0, "spectral": -1}


def outcome(row):
    sign = 0 if row.low <= 0 <= row.high else 1 if row.low > 0 else -1
    if sign == EXPECTED[row.law]:
        return "as expected" if sign else "not contradicted"
    return "undecided" if sign == 0 else "against"


parts = []
for name, found in kinds.items():
    knobs = found["final"].groupby("label")[["lr", "c"]].first()
    rows = found["paired"].drop(columns="seeds").assign(comparison=name)
    rows[["law", "setting"]] = rows.label.str.extract(r"^(\S+) ?(.*)$")
    rows = rows[rows.law.isin(EXPECTED) & (rows.reference == ("haar_stiefel " + rows.setting).str.strip())]
    equal = [knobs.loc[label].equals(knobs.loc[reference]) for label, reference in zip(rows.label, rows.reference, strict=True)]
    parts.append(rows.assign(**{"equal knobs": equal}))
pairs = pd.concat(parts).drop_duplicates(["law", "difference"])  # runs that stand in several comparisons
pairs["outcome"] = pairs.apply(outcome, axis=1)
columns = ["law", "comparison", "setting", "difference", "low", "high", "equal knobs", "outcome"]
display(pairs.sort_values("law", kind="stable")[columns].round(3).reset_index(drop=True))
alike = pairs[pairs["equal knobs"]].sort_values("law", kind="stable")
figure = figures_training.differences(
    alike.assign(label=alike.law + " " + alike.comparison + " " + alike.setting, reference="haar_stiefel"), "haar_stiefel"
)
figure.axes[0].set_title("Equal learning rate and c, 95 % intervals")
plt.show()

# %%
many = lambda outcomes: ", ".join(f"{count} {said}" for said, count in outcomes.value_counts().items())  # noqa: E731
told = [f"{law} {many(group.outcome)}" for law, group in alike.groupby("law")]
other = pairs[~pairs["equal knobs"]]
constant = kinds["tiny-constant"]["paired"].set_index("label")
moved = constant[constant.reference.str.endswith("c=1.0") & ~constant.index.str.endswith("c=1.0")].difference.abs()
beside = constant[constant.reference.str.startswith("haar_stiefel") & ~constant.index.str.startswith("haar_stiefel")].difference.abs()
Markdown(
    f"With equal knobs, {len(alike)} pairs: {'; '.join(told)}. With different knobs, {len(other)} pairs: {many(other.outcome)}. The "
    f"difference that the other $c$ makes to a law is {moved.min():.2f} to {moved.max():.2f} (median {moved.median():.2f}), that of "
    f"another law at the same $c$, learning rates as chosen, {beside.min():.2f} to {beside.max():.2f} (median {beside.median():.2f})."
)

# %% [markdown]
# ## Error and loss
# The error of a gradient, $\mathbb E\|\hat GVV^\top-g\|^2/\|g\|^2$ at $c=1$ summed over all layers (exact, on the gradients of such a
# model after AdamW training, 04_real_gradients), beside the loss that the law trains to, at either $c$.

# %%
error = notebooks.committed("validate/tiny-model").query("ratio == 0.25").set_index("law")
final = kinds["tiny-constant"]["final"]
at = final.label.str.extract(r"c=(.*)$")[0].rename("at")
points = final.groupby(["law", at], sort=False).agg(loss=("loss", "mean"), bar=("loss", "sem"), lr=("lr", "first"))
points = points.reset_index().assign(label=lambda frame: frame.law, panel=lambda frame: "c = " + frame["at"])
points["error"] = points.law.map(error.predicted / error.signal_norm2)
words = {"xlabel": "error of a gradient / ‖g‖²", "ylabel": "held-out loss (nats/token)"}
shown.lines(points.iloc[:0], "error", "loss", error="bar", points=points, **words)
plt.show()
display(points.pivot(index="law", columns="at", values="lr").rename_axis(columns="learning rate chosen at c ="))

# %% [markdown]
# At $c=1$ all but the one with the larger learning rate lie in the order of their errors.
#
# ## What the tuning saw
# Mean training loss over the last fifth of the tuning runs, by learning rate: the choice was made where the curves are lowest, after
# runs that hardly leave the plateau. Under Adam $c$ is a step size of the projected layers beside the rest, so a small $c$ with a large
# learning rate, which it allows for embeddings and head, is another training and not another law.

# %%
trial = notebooks.committed("compare/tiny-trial")
laws = trial.dropna(subset="law").assign(panel=lambda frame: frame.c.map("c = {:g}".format))
shown.lines(laws, "lr", "loss", xlabel="learning rate", ylabel="tuning loss (nats/token)", scales=("log", "linear"))
plt.show()
edge = trial[trial.chosen & trial.at_edge]
Markdown(f"A choice at the end of the learning rates: {', '.join(edge.label) or 'none'}. Full AdamW's was searched with as many runs.")

# %% [markdown]
# ## Optimizers in a frame
# Methods that keep weights and gradients whole and the optimizer's state in a low-dimensional frame, each with a learning rate from a
# short search. A line joins those that no other beats in loss at an equal or smaller cost.

# %%
for name in ("optimizers", "9m-optimizers"):
    figures_scale.pareto(name)
plt.show()
for name in ("optimizers", "9m-optimizers", "60m-optimizers"):
    found, config = comparisons.committed(name), json.loads((RESULTS / "compare" / f"{name}.json").read_text(encoding="utf-8"))
    rows = pd.DataFrame(comparisons.merged(found)).set_index("contender")
    others = rows.drop("adamw")
    device, config = config["environment"]["device"], config["config"]
    display(
        Markdown(
            f"`{name}` ({device}; {config['steps']} steps, {len(config['seed'])} seeds, {config['trials']} learning rates of "
            f"{config['tune_steps']} steps): of {len(others)} methods {int((others.high < 0).sum())} end below full AdamW with an "
            f"interval that excludes 0, {int((others.low > 0).sum())} above, {int(((others.low <= 0) & (others.high >= 0)).sum())} are "
            f"undecided; {int(rows['at edge'].sum())} of {len(rows)} chose the end of what they tried. Lowest: `{rows.loss.idxmin()}` "
            f"at {rows.loss.min():.3f} ± {rows.error[rows.loss.idxmin()]:.3f}."
        )
    )

# %% [markdown]
# ## On a GPU
# The plan for CUDA devices trains LLaMA-20M, 60M and 100M on many more tokens (experiments/results/gpu).

# %%
cells = {kind: notebooks.committed(f"gpu/{kind}").status for kind in ("tune", "train")}
Markdown(" ".join(f"`gpu/{kind}`: {many(status)}." for kind, status in cells.items()))

# %% [markdown]
# ## What this shows, and what it does not
# - With equal knobs the laws end in the order of their errors where they can be told apart at all; between Gaussian, coordinate, DCT
#   and Haar–Stiefel they mostly cannot, at three seeds.
# - A new draw at every step ends lowest, for both laws that were tried; and a smaller rank ends lower here, against the expectation:
#   the smaller step $c=r/n$ that comes with it was chosen wherever it was offered, so the two are not told apart.
# - The constant $c$, a step size under Adam, moves the loss at least as much as the law does.
# - The biased top-$r$ SVD ends lowest in the comparison of all laws and baselines. Over a few hundred steps a small error counts for
#   more than none on average; in a long run a bias does not average out, and that was not measured here.
# - It is no evidence that a low-rank gradient is better than the full one: full AdamW has one learning rate for all weights and the
#   same number of trials, chosen on runs that hardly leave the plateau.
# - Nothing here is a timing: these runs shared their cores (07_memory_and_speed has those). One corpus, models of a few million
#   weights, a few hundred steps.
