"""Fine-tuning: pretrained models, what they are asked, and one loop for gradients and for loss differences.

``config`` what one training is; ``pretrained`` models and tokenizers; ``objectives`` classification heads, prompts, responses; ``instructions``
prompt/response data; ``tuner`` the loop, ``ways`` its two kinds of step; ``contenders`` who is compared; ``summary`` what a comparison found.
``experiments.finetune`` is the command.
"""
