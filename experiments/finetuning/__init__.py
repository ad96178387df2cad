"""Fine-tuning: pretrained models, what they are asked, and one loop for gradients and for loss differences.

``config`` what one training is; ``pretrained`` models and tokenizers; ``objectives`` classification heads, prompts, responses; ``tuner`` the loop, ``ways`` its two kinds of step;
``instructions`` prompt/response data; ``summary`` what a comparison found. ``experiments.finetune`` is the command.
"""
