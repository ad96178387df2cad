"""One module per question, each with a frozen ``Config`` and ``main(config)`` that fills a run directory; here formula meets sampler."""

import logging
import os

# transformers imports torchao where it is installed; its kernels for other versions of torch are not used here, and it says so at length
os.environ.setdefault("TORCHAO_FORCE_SKIP_LOADING_SO_FILES", "1")
for _name in ("torchao", "torch.utils._pytree"):
    logging.getLogger(_name).setLevel(logging.ERROR)
