"""Optimizers whose state lives in a low-dimensional frame: one file a published method, on the loop of ``subspace``.

>>> import torch
>>> model = torch.nn.Sequential(torch.nn.Embedding(50, 64), torch.nn.Linear(64, 96), torch.nn.Linear(96, 50))
>>> optimizer = GaLore(split_parameters(model, rank=16, others={"lr": 1e-3}), lr=0.01)
>>> model(torch.arange(8)).square().mean().backward()
>>> optimizer.step()
"""

from optimizers.adalomo import AdaLomo
from optimizers.apollo import Apollo, ApolloMini
from optimizers.badam import BAdam
from optimizers.buckets import UnusableGradient
from optimizers.coap import COAP
from optimizers.communication import LawState, law_hook
from optimizers.dct_adamw import DCTAdamW
from optimizers.dion import Dion
from optimizers.fira import Fira
from optimizers.flora import Flora
from optimizers.foam import FOAM
from optimizers.frugal import Frugal
from optimizers.galore import GaLore
from optimizers.golore import GoLore
from optimizers.grad_norm_lorp import GradNormLoRP
from optimizers.gradlite import GradLite
from optimizers.grass import Grass, GrassSampled
from optimizers.gum import GUM
from optimizers.ldadam import LDAdam
from optimizers.lisa import LISA
from optimizers.lomo import LOMO
from optimizers.lowrank_lr import LowRankLR
from optimizers.lozo import LOZO
from optimizers.mezo import MeZO
from optimizers.mofasgd import MoFaSGD
from optimizers.muon import Muon
from optimizers.online_subspace import OnlineSubspaceDescent
from optimizers.owlore import OwLore, outlier_shares
from optimizers.per_layer import PerLayer, per_layer
from optimizers.plumage import Plumage
from optimizers.q_galore import QGaLore
from optimizers.quantized import Int8Linear, float_weights, int8_weights
from optimizers.rso import RSO
from optimizers.spectral_adam import SpectralAdam
from optimizers.split import split_parameters
from optimizers.subspace import Rule, Subspace
from optimizers.subzero import SubZero
from optimizers.trion import Trion
from optimizers.zeroth import ZerothOrder

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
    "q_galore": QGaLore,
    "coap": COAP,
    "online_subspace": OnlineSubspaceDescent,
    "grass": Grass,
    "grass_sampled": GrassSampled,
    "rso": RSO,
    "grad_norm_lorp": GradNormLoRP,
    "foam": FOAM,
    "dct_adamw": DCTAdamW,
    "muon": Muon,
    "trion": Trion,
    "dion": Dion,
    "mofasgd": MoFaSGD,
    "gum": GUM,
    "lisa": LISA,
    "owlore": OwLore,
    "badam": BAdam,
    "lomo": LOMO,
    "adalomo": AdaLomo,
    "gradlite": GradLite,
}

ZEROTH_ORDER: dict[str, type[ZerothOrder]] = {
    "lowrank_lr": LowRankLR,
    "mezo": MeZO,
    "lozo": LOZO,
    "subzero": SubZero,
}

__all__ = [
    "COAP",
    "FOAM",
    "GUM",
    "LISA",
    "LOMO",
    "LOZO",
    "OPTIMIZERS",
    "RSO",
    "ZEROTH_ORDER",
    "AdaLomo",
    "Apollo",
    "ApolloMini",
    "BAdam",
    "DCTAdamW",
    "Dion",
    "Fira",
    "Flora",
    "Frugal",
    "GaLore",
    "GoLore",
    "GradLite",
    "GradNormLoRP",
    "Grass",
    "GrassSampled",
    "Int8Linear",
    "LDAdam",
    "LawState",
    "LowRankLR",
    "MeZO",
    "MoFaSGD",
    "Muon",
    "OnlineSubspaceDescent",
    "OwLore",
    "PerLayer",
    "Plumage",
    "QGaLore",
    "Rule",
    "SpectralAdam",
    "SubZero",
    "Subspace",
    "Trion",
    "UnusableGradient",
    "ZerothOrder",
    "float_weights",
    "int8_weights",
    "law_hook",
    "outlier_shares",
    "per_layer",
    "split_parameters",
]
