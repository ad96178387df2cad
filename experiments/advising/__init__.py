"""Parts of ``lowrank advise``: the user's model and text, the error of every law on its gradients, what a step costs, and the choice."""
