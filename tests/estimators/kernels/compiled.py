"""The package without Triton, then every kernel compiled for compute capability 9.0, which asks for no device; started by a test."""

from __future__ import annotations

import re
import sys
from typing import Any

import pytest
import torch


def missing() -> None:
    sys.modules["triton"] = None  # pyright: ignore[reportArgumentType]  import fails
    import estimators

    assert "estimators.kernels" not in sys.modules
    from estimators.kernels import cholesky, hadamard, rounding_lift, sketch

    law, X = estimators.Gaussian(n=8, rank=2), torch.ones(4, 8)
    W, B, V = torch.zeros(4, 8).bfloat16(), torch.zeros(4, 2), torch.zeros(8, 2)
    assert sketch.plain(X, law, 1).shape == (4, 2) and hadamard.plain(X).shape == (4, 8)
    assert rounding_lift.plain(W, B, V, 1) is W and cholesky.plain(torch.eye(3)[None]).L.shape == (1, 3, 3)
    for call in (
        lambda: sketch.sketch(X, law, 1),
        lambda: hadamard.transform(X),
        lambda: rounding_lift.lift(W, B, V, 1),
        lambda: cholesky.factor(torch.eye(3)[None]),
        lambda: sketch._sketch[(1,)](),
    ):
        with pytest.raises(ImportError, match=re.escape("pip install 'lowrank-gradients[kernels]'")):
            call()


def compiled() -> None:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from estimators.kernels import cholesky, hadamard, rounding_lift, sketch

    def make(kernel: Any, pointers: dict[str, str], **constants: Any) -> None:
        kinds = {"key": "i64", "size": "fp32", "scale": "fp32"}
        signature = {name: "constexpr" if name in constants else pointers.get(name, kinds.get(name, "i32")) for name in kernel.arg_names}
        source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
        assert len(triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["cubin"]) > 1000

    for stream in (0, 1, 2):
        make(sketch._sketch, {"X": "*bf16", "Y": "*bf16"}, STREAM=stream, BT=16, BN=32, BR=16)
    make(hadamard._transform, {"X": "*bf16", "Y": "*bf16"}, N=64, STAGES=6, BT=8)
    make(rounding_lift._lift, {"W": "*bf16", "B": "*bf16", "V": "*bf16"}, BM=16, BN=16, BR=16)
    make(cholesky._factor, {"A": "*fp32", "L": "*fp32", "M": "*fp32", "info": "*i32"}, R=16)


if __name__ == "__main__":
    missing()
    for name in [name for name in sys.modules if name == "triton" or name.startswith("estimators.kernels")]:
        del sys.modules[name]
    compiled()
