"""Where kernels run in these tests, which are skipped without Triton and where its interpreter was turned off."""

import pytest
import torch

pytest.importorskip("triton")

from estimators.kernels.launch import INTERPRETED  # noqa: E402

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
if DEVICE.type == "cpu" and not INTERPRETED:
    pytest.skip("kernels need a CUDA device or TRITON_INTERPRET=1", allow_module_level=True)
