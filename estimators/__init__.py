"""Laws as samplers, the estimators built on them, and the measurement of bias and variance, in torch.

>>> import torch
>>> g = torch.Generator().manual_seed(0)
>>> V = HaarStiefel(n=256, rank=32, c=1.0).sample(100, generator=g, dtype=torch.float64)
>>> V.shape
torch.Size([100, 256, 32])
"""

from estimators.compressed import CompressedLinear, Compression, Keeper, Key, compress
from estimators.convert import Conversion, convert
from estimators.coordinate import Coordinate, CoordinateReplacement
from estimators.coupled import Coupling
from estimators.error_basis import ErrorBasis, Inputs
from estimators.gaussian import Gaussian
from estimators.haar_stiefel import HaarStiefel
from estimators.ipa import ipa
from estimators.law import Law
from estimators.linear import LowRankLinear
from estimators.lr import lr
from estimators.measure import Estimate, Measurement, Population, measure, measure_estimates
from estimators.on_features import LawOnFeatures
from estimators.on_tokens import LawOnTokens
from estimators.rademacher import Rademacher
from estimators.sketch import estimate, lift, on_left, sketch
from estimators.sparse_sign import SparseSign
from estimators.spectral import SpectralSampling
from estimators.subsampled_transform import Hadamard, SubsampledTransform
from estimators.tokens import tokens
from estimators.truncated import FixedBasis, TopSVD
from estimators.velora import VeLoRA
from estimators.wta_crs import WTACRS

LAWS: dict[str, type[Law]] = {
    "gaussian": Gaussian,
    "rademacher": Rademacher,
    "sparse_sign": SparseSign,
    "haar_stiefel": HaarStiefel,
    "coordinate": Coordinate,
    "coordinate_replacement": CoordinateReplacement,
    "dct": SubsampledTransform,
    "hadamard": Hadamard,
    "spectral": SpectralSampling,
    "top_svd": TopSVD,
    "fixed_basis": FixedBasis,
}

__all__ = [
    "LAWS",
    "WTACRS",
    "CompressedLinear",
    "Compression",
    "Conversion",
    "Coordinate",
    "CoordinateReplacement",
    "Coupling",
    "ErrorBasis",
    "Estimate",
    "FixedBasis",
    "Gaussian",
    "HaarStiefel",
    "Hadamard",
    "Inputs",
    "Keeper",
    "Key",
    "Law",
    "LawOnFeatures",
    "LawOnTokens",
    "LowRankLinear",
    "Measurement",
    "Population",
    "Rademacher",
    "SparseSign",
    "SpectralSampling",
    "SubsampledTransform",
    "TopSVD",
    "VeLoRA",
    "compress",
    "convert",
    "estimate",
    "ipa",
    "lift",
    "lr",
    "measure",
    "measure_estimates",
    "on_left",
    "sketch",
    "tokens",
]
