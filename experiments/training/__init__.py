"""The training loop and its parts: model, objective, methods, optimizers, processes, checkpoints, what a run costs."""
