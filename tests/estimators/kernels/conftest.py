"""Kernels are tested where they can run: with Triton, and on a CUDA device or by its interpreter."""

from estimators.kernels import launch
from tests.estimators.kernels.device import DEVICE

collect_ignore_glob = [] if launch.triton is not None and (DEVICE.type == "cuda" or launch.INTERPRETED) else ["*"]
