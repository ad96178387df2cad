"""What a sequence of T tasks left, from a[i][j], the accuracy on task j after task i (j ≤ i): a triangle of rows of lengths 1 … T.

Average accuracy and backward transfer: Lopez-Paz & Ranzato (1706.08840); forgetting: Chaudhry et al. (1801.10112). The largest of several measured
accuracies is too large on average by what they err, so that forgetting is no less than −transfer.
"""

from __future__ import annotations

from collections.abc import Sequence

Triangle = Sequence[Sequence[float]]


def average(a: Triangle) -> float:
    """ACC = mean of a[T][j] over all tasks, in [0, 1].

    >>> average([[0.9], [0.6, 0.8]])
    0.7
    """
    _check(a)
    return sum(a[-1]) / len(a)


def learned(a: Triangle) -> float:
    """Mean of a[i][i]: how well each task was known when it had just been learnt. Forgetting says little where this is near chance.

    >>> round(learned([[0.9], [0.6, 0.8]]), 10)
    0.85
    """
    _check(a)
    return sum(row[-1] for row in a) / len(a)


def forgetting(a: Triangle) -> float:
    """F = mean over the tasks j < T of max over i < T of a[i][j], minus a[T][j]; 0 for one task. Negative where later tasks helped.

    >>> round(forgetting([[0.9], [0.6, 0.8], [0.7, 0.9, 0.5]]), 10)  # (0.9 − 0.7) and (0.8 − 0.9)
    0.05
    """
    _check(a)
    return _mean([max(row[j] for row in a[j:-1]) - a[-1][j] for j in range(len(a) - 1)])


def transfer(a: Triangle) -> float:
    """BWT = mean over the tasks j < T of a[T][j] − a[j][j]; 0 for one task.

    >>> round(transfer([[0.9], [0.95, 0.8], [0.7, 0.9, 0.5]]), 10)  # (0.7 − 0.9) and (0.9 − 0.8)
    -0.05
    """
    _check(a)
    return _mean([a[-1][j] - a[j][j] for j in range(len(a) - 1)])


def _check(a: Triangle) -> None:
    if not a or [len(row) for row in a] != list(range(1, len(a) + 1)):
        raise ValueError(f"accuracies of lengths {[len(row) for row in a]}: row i needs those of tasks 1 … i")


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
