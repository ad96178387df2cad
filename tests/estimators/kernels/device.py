"""Where kernels run in these tests, which are skipped without Triton."""

import pytest
import torch

pytest.importorskip("triton")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
