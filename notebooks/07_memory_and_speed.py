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
# # 7. Memory and speed
# What a step of training holds and how long it takes, per method: counted, predicted, measured. Bytes are of one device; times are
# ratios to a peer that ran side by side on the same cores, with quartiles.

# %%
import json
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from IPython.display import Markdown, display

from experiments import memory as accounts
from experiments.benching import growth
from experiments.pages import figures_bench, footprints, notebooks
from experiments.pages import figures_notebooks_training as shown
from experiments.pages.page import records
from experiments.publish import RESULTS
from theory import memory, operations
from theory.llama import Setting

notebooks.begin()

# %% [markdown]
# ## Bytes of a step by category
# Of an $m\times n$ matrix with $T$ tokens full AdamW holds, in numbers, $mn$ ($W$) $+\,mn$ (gradient) $+\,2mn$ (states) $+\,Tn$ (input
# kept for the backward pass); a LowRank-IPA layer $mn+nr$ ($V$) $+\,4mr$ ($B$, its gradient, two states) $+\,Tr$ ($XV$ in the place of
# $X$). What that is of a whole step, every storage followed from its making to its release on tensors without numbers:

# %%
METHODS = [
    "adamw", "adamw fused", "adamw recomputed", "lora", "haar_stiefel", "haar_stiefel fused", "haar_stiefel fused recomputed", "spectral",
    "galore", "galore fused", "apollo_mini", "ldadam", "muon", "lisa", "badam", "lowrank_lr", "mezo",
]  # fmt: skip
footprint = {model: notebooks.committed(f"memory/measure-{model}-footprint") for model in ("roberta-large", "60m", "7b")}
bars = pd.concat([frame.assign(panel=model) for model, frame in footprint.items()]).rename(columns={"name": "label"})
shown.bytes_by_category(pd.concat([bars[bars.label == method] for method in METHODS]))
plt.show()
batches = [f"{model}: {frame.sequences[0]} × {frame.length[0]} tokens, {frame.precision[0]}" for model, frame in footprint.items()]
Markdown(
    f"{'; '.join(batches)}. *fused*: the optimizer steps inside the backward pass and frees each gradient; *recomputed*: activations "
    "of the blocks are formed again. With a large batch the activations decide, and a method that only makes the optimizer's state "
    "smaller changes little; the zeroth-order ones keep none."
)

# %%
target = records(notebooks.committed("memory/measure-roberta-large-target"))
seen = pd.concat([pd.read_csv(file) for file in sorted((RESULTS / "memory").glob("measure-*-agreement.csv"))])
said = "\n".join(f"- {footprints.verdict(row)}." for row in target)
Markdown(
    f"What was asked of the peaks, with the shares of the reference's peak that make up each:\n\n{said}\n\nWhere both were seen, the "
    f"peak on such tensors is {seen.ratio.min():.3f} to {seen.ratio.max():.3f} of the allocator's ({len(seen)} peaks)."
)

# %% [markdown]
# ## Predicted and measured
# `theory/memory.py` walks through the moments of a LLaMA's step and needs no tensors at all. Its peak over the allocator's, for every
# method, precision, optimizer, with activations kept and recomputed; two devices are two processes with DDP or FSDP.

# %%
measured = pd.concat([pd.read_csv(file) for file in sorted((RESULTS / "memory").glob("*-measured.csv"))])
measured = measured.assign(label=measured["name"], MiB=measured.measured / 2**20)
measured["panel"] = measured.world_size.map({1: "one device", 2: "two devices"})
words = {"xlabel": "measured peak, MiB", "ylabel": "predicted / measured"}
figure = shown.lines(measured.iloc[:0], "MiB", "ratio", points=measured, **words)
for ax in figure.axes:
    ax.axhspan(1 - accounts.TOLERANCE, 1 + accounts.TOLERANCE, color="#56B4E9", alpha=0.15)
    ax.axhline(1, color="#000000", linewidth=0.8)
plt.show()


def predicted(row):
    """The peak that theory gives here, now."""
    law = row.label not in ("adamw", "lora")
    config = accounts.Config(
        model=row.model, method="lowrank" if law else row.label, law=row.label if law else "haar_stiefel", rank=row["rank"], store=row.stored,
        optimizer=row.optimizer, precision=row.precision, sequences=row.sequences, length=row.length, accumulate=row.accumulate,
        checkpoint_activations=row.checkpointed,
    )  # fmt: skip
    return memory.peak(accounts.setting(accounts.step(config), 1, "ddp", "cpu"), row.step == "redraw").total


alone = measured[measured.world_size == 1].reset_index(drop=True).iloc[:: notebooks.size(1, 8)]
again = alone.apply(predicted, axis=1)
Markdown(
    f"{int(measured.holds.sum())} of {len(measured)} peaks are within {100 * accounts.TOLERANCE:.0f} %; the ratios go from "
    f"{measured.ratio.min():.3f} to {measured.ratio.max():.3f}. Of {len(alone)} settings on one device computed again here, "
    f"{int((again == alone.predicted).sum())} predictions are the committed ones to the byte. Where: {', '.join(measured.device.unique())}."
)

# %% [markdown]
# The only peaks of a GPU among the results are those of whole trainings of LLaMA-60M, with evaluation and live measurement of the
# gradients in them, which the prediction of a step does not count. They are no test of it, and stand here because there is no other:

# %%
final = notebooks.committed("compare/60m-optimizers-final").groupby("label", sort=False).peak_bytes.median()
told = json.loads((RESULTS / "compare" / "60m-optimizers.json").read_text(encoding="utf-8"))
asked = {name: told["config"][name] for name in ("precision", "sequences", "length")} | {"rank": told["config"]["rank"][0], "accumulate": 1}


def largest(setting):
    """Bytes of the largest peak: of a fitted law's redraw step if that is more."""
    return max(memory.peak(setting, redraw).total for redraw in ((False, True) if setting.fitted else (False,)))


rows = []
for name, changes in {"adamw": {"method": "adamw"}, "haar_stiefel": {}, "spectral": {"law": "spectral"}}.items():
    config = accounts.Config(model="60m", **asked, **changes)
    peak = largest(accounts.setting(accounts.step(config), 1, "ddp", "cuda"))
    rows.append(
        {"method": name, "step, predicted (MiB)": peak / 2**20, "run, measured (MiB)": final[name] / 2**20, "ratio": peak / final[name]}
    )
display(pd.DataFrame(rows).set_index("method").round(2))
many = lambda status: ", ".join(f"{count} cells {what}" for what, count in status.value_counts().items())  # noqa: E731
waiting = many(notebooks.committed("gpu/memory").status)
Markdown(f"{told['environment']['device']}. Peaks of steps alone on a CUDA device (`gpu/memory`): {waiting}.")

# %% [markdown]
# ## The largest model that fits
# Predicted for CUDA devices, computed here; not measured there. Models of the shape of LLaMA: width $h$, $8h/3$ between, $h/128$ blocks
# and heads, a vocabulary of 32 000; one sequence of 2048 tokens, activations recomputed, $r/n=1/8$. Spectral counts its redraw step,
# when it sees full gradients.

# %%
WAYS = {
    "adamw": {"method": "adamw"},
    "lora": {"method": "lora"},
    "haar_stiefel": {},
    "haar_stiefel, V from its key": {"store": False},
    "spectral": {"fitted": True},
}
rows = []
for precision in ("fp32", "bf16_weights"):
    for width in range(512, 10241, notebooks.size(512, 3072)):
        shape = {"hidden": width, "intermediate": width * 8 // 48 * 16, "layers": width // 128, "heads": width // 128, "vocabulary": 32000}
        batch = {"precision": precision, "sequences": 1, "length": 2048, "checkpoint_activations": True, "masters": False, "device": "cuda"}
        weights = sum(tensor.elements() for tensor in Setting(**shape, method="adamw").parameters())
        for name, way in WAYS.items():
            label, _, variant = name.partition(", ")
            peak = largest(Setting(rank=1 / 8, **shape, **batch, **way))
            rows.append(
                {
                    "panel": precision,
                    "name": name,
                    "label": label,
                    "variant": variant or None,
                    "GiB": peak / 2**30,
                    "weights": weights / 1e9,
                }
            )
curves = pd.DataFrame(rows)
figure = shown.lines(curves, "GiB", "weights", xlabel="device memory, GiB", ylabel="largest model, 10⁹ weights", scales=("log", "log"))
for ax in figure.axes:
    ax.set(xlim=(4, 200), ylim=(0.2, 60))
    for size in (24, 80):
        ax.axvline(size, color="#7F7F7F", linewidth=0.8, linestyle=":")
plt.show()
fits = lambda group, size: float(np.exp(np.interp(np.log(size), np.log(group.GiB), np.log(group.weights))))  # noqa: E731
table = {
    f"{size} GiB": curves.groupby(["panel", "name"], sort=False)[["GiB", "weights"]].apply(fits, size) for size in (16, 24, 40, 80, 141)
}
display(pd.DataFrame(table).round(2))

# %% [markdown]
# $10^9$ weights, interpolated between the widths; nothing but the model has been left room for. `bf16_weights`: weights and AdamW's
# states in bfloat16, lifts rounded at random, so without float32 copies. The curves part where the terms with $mn$ decide: AdamW holds
# four of them, the others one. $B$ of a converted layer stays float32, LoRA's factors are as the weights, so in bfloat16 LoRA gains on
# it.
#
# ## Time of a step
# Over full AdamW, LLaMA-60M; medians and quartiles of pairs side by side. One square layer over `nn.Linear`.

# %%


def kept(name, kind, over=None):
    """Committed rows of a bench without what is missing in each; ``over``: the peer where the rows do not say it."""
    rows = [{key: value for key, value in row.items() if pd.notna(value)} for row in records(notebooks.committed(f"bench/{name}-{kind}"))]
    return [({"over": over} if over else {}) | {"kind": kind} | row for row in rows if row["name"] != "peer"]


step, layer = kept("60m", "step", "AdamW"), kept("60m", "layer", "nn.Linear")
figures_bench.ratios(step + layer)
plt.show()
redraw = pd.DataFrame(kept("60m", "refresh")).set_index("name")
period = json.loads((RESULTS / "bench" / "60m.json").read_text(encoding="utf-8"))["config"]["refresh_every"]
display(redraw[["full_gradient_seconds", "redraw_seconds"]].round(3))
ideal = operations.low_rank(4096, 1024, 1024, 128) / operations.dense(4096, 1024, 1024)
Markdown(
    f"Seconds that a redraw adds to the step it falls on, once in $K={period}$ steps. By operations the layer with $B=0$ in the "
    f"forward pass takes $1-\\tfrac13+\\tfrac{{r(m+n)}}{{3mn}}={ideal:.2f}$ of `nn.Linear`; measured: "
    f"{next(row['ratio'] for row in layer if 'lift_every=1' in row['name']):.2f}."
)

# %% [markdown]
# ## Drawing $V$ over what the machine allows
# Haar–Stiefel makes $V=\sqrt{cn/r}\,Z(Z^\top Z)^{-1/2}$'s column space with Cholesky: a Gaussian $Z$, its Gram matrix, a triangular
# solve. Its floor is these three and nothing else. Black ticks are what was asked for.

# %%
drawn = kept("60m-primitives", "sampling")
figures_bench.ratios([row for row in drawn if "floor" in row["over"]])
figures_bench.ratios([row for row in drawn if row["over"] == "torch.linalg.qr" and row["shape"] != "4096x128" and row["ratio"] < 3])
plt.show()
limited = pd.DataFrame([row for row in drawn if "share" in row])
limited["seconds over the floor's"] = 1 / limited.share
display(limited.pivot(index="name", columns="shape", values="seconds over the floor's").round(2))
missed = {row["shape"]: 100 * row["share"] * row["ratio"] for row in drawn if row.get("holds") is False and "share" in row}
Markdown(
    "The table is over what the machine's full rates of products and of normal numbers allow. Asked for and missed: a fifth of "
    f"`torch.linalg.qr` in {len(missed)} shapes; by those rates nothing could be below "
    f"{' and '.join(f'{share:.0f} % ({shape})' for shape, share in missed.items())} of it."
)

# %% [markdown]
# ## Optimizers in a frame
# An update over the two products that every frame needs, and over published packages where there is one (LLaMA-60M, CPU; a tick is the
# target).

# %%
updates = kept("60m-optimizers", "optimizer")
figures_bench.ratios([row for row in updates if row["over"] != "two products"])
plt.show()
bare = pd.DataFrame([row for row in updates if row["over"] == "two products"]).sort_values("ratio")
display(bare[["name", "ratio", "ratio_q1", "ratio_q3", "refresh", "period"]].round(3).reset_index(drop=True))
slower = [f"`{row['name']}` ({row['ratio']:.2f} of {row['over']})" for row in updates if row.get("holds") is False]
Markdown(
    f"Missed: {', '.join(slower) or 'none'}. torch's Muon multiplies bfloat16 matrices, for which this processor has no instructions; "
    "that ratio says nothing of devices that have them. Below the figure: over the two products, and seconds of a refresh, which "
    "comes once in `period` steps."
)

# %% [markdown]
# ## How cost grows
# Seconds (points) beside operations (`theory/operations.py`, lines), both over the first point: a layer against $r$ and against $n$ at
# $r=n/8$, a step against the number of blocks, and against $K$.

# %%
curves = kept("60m-primitives", "growth")
figures_bench.growth(curves)
plt.show()
T, n = growth.TOKENS, growth.WIDTH
here = {r: operations.low_rank(T, n, n, r) + operations.lift(n, n, r) for r in growth.RANKS}
off = max(abs(row["predicted_operations"] / here[row["value"]] - 1) for row in curves if row["name"] == "r")
last = {row["name"]: row["ratio"] / row["predicted"] for row in curves}
Markdown(
    f"Operations against $r$, computed again here, differ from the committed ones by at most {off:.0e}. At the last point, seconds "
    f"over operations, both over the first: {', '.join(f'{name} {ratio:.2f}' for name, ratio in last.items())}. Below 1 in a layer: "
    "small products run below the rate of large ones. Below 1 against $K$: a redraw takes longer than its operations, because it is "
    "many small ones."
)

# %% [markdown]
# ## On a GPU

# %%
cells = {Path(file).stem: pd.read_csv(file).status for file in sorted((RESULTS / "gpu").glob("*.csv"))}
told = "; ".join(f"`gpu/{name}`: {many(status)}" for name, status in cells.items())
Markdown(f"{told}. Until they are run there is no statement about times on a GPU.")
