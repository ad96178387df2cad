"""Kernels beside their plain versions: interpreted on a CPU, compiled where there is a CUDA device."""
