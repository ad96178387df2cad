"""Triton kernels beside the plain versions that they must agree with; none is used by an estimator until a measured gain says so.

Each module holds a formula, its ``cost`` (bytes it must move and operations it must do, which give a floor for its time), the kernel, a
``plain`` version in torch that is its oracle, and a function that checks its arguments and launches the kernel. ``sketch``: XV with V made
from a counter-based key; ``hadamard``: the fast Walsh–Hadamard transform; ``rounding_lift``: W += BVᵀ, rounded stochastically to bfloat16;
``cholesky``: many small Cholesky factors and Cholesky-QR. The plain versions need no Triton; the kernels need the extra ``kernels``.
Times beside plain and compiled versions: ``python -m experiments.gpu.kernels``.
"""
