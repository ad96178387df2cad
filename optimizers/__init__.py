"""Optimizers whose state lives in a low-dimensional frame: one file a published method, on the loop of ``subspace``.

>>> import torch
>>> model = torch.nn.Sequential(torch.nn.Embedding(50, 64), torch.nn.Linear(64, 96), torch.nn.Linear(96, 50))
>>> optimizer = GaLore(split_parameters(model, rank=16, others={"lr": 1e-3}), lr=0.01)
>>> model(torch.arange(8)).square().mean().backward()
>>> optimizer.step()
"""

from optimizers.apollo import Apollo, ApolloMini
from optimizers.fira import Fira
from optimizers.flora import Flora
from optimizers.frugal import Frugal
from optimizers.galore import GaLore
from optimizers.golore import GoLore
from optimizers.ldadam import LDAdam
from optimizers.per_layer import PerLayer, per_layer
from optimizers.plumage import Plumage
from optimizers.spectral_adam import SpectralAdam
from optimizers.split import split_parameters
from optimizers.subspace import Rule, Subspace

OPTIMIZERS: dict[str, type[Subspace]] = {
    "galore": GaLore,
    "golore": GoLore,
    "flora": Flora,
    "fira": Fira,
    "apollo": Apollo,
    "apollo_mini": ApolloMini,
    "frugal": Frugal,
    "ldadam": LDAdam,
    "plumage": Plumage,
    "spectral_adam": SpectralAdam,
}

__all__ = [
    "OPTIMIZERS",
    "Apollo",
    "ApolloMini",
    "Fira",
    "Flora",
    "Frugal",
    "GaLore",
    "GoLore",
    "LDAdam",
    "PerLayer",
    "Plumage",
    "Rule",
    "SpectralAdam",
    "Subspace",
    "per_layer",
    "split_parameters",
]
