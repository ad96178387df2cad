"""Continual learning: tasks one after the other, one backbone for all, a head for each.

``config`` what one sequence is; ``measures`` average accuracy, forgetting and transfer; ``methods`` who can learn so, GORP among them; ``learner``
the loop; ``summary`` what a comparison found. ``experiments.continual`` is the command.
"""
