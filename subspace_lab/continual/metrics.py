"""Figures of a sequence of tasks from its accuracy matrix A[i, j]: the accuracy on task j after learning task i.

Every figure goes by its full name, since the short ones mean different things in different papers.
"""

from __future__ import annotations

from collections.abc import Sequence

Row = Sequence[float]

#: what each figure is, for docs, tables and results.json
DEFINITIONS = {
    "final_accuracy": "mean over tasks j of A[T, j]",
    "average_incremental_accuracy": "mean over sessions i of the accuracy on all examples of the tasks seen, 1 … i",
    "backward_transfer": "mean over j < T of A[T, j] − A[j, j] (Lopez-Paz & Ranzato 2017)",
    "forgetting": "mean over j < T of max over i of A[i, j] − A[T, j], the last row included in the maximum",
    "forgetting_since_learned": "mean over j < T of A[j, j] − A[T, j], minus the backward transfer (FOT's FGT)",
    "learning_accuracy": "mean over j of A[j, j]",
    "new_task_accuracy": "mean over j > 1 of A[j, j] (ROGO's Ω_new)",
}


def figures(matrix: Sequence[Row], examples: Sequence[int]) -> dict[str, float]:
    """Return every figure of `DEFINITIONS` that the matrix determines.

    Args:
        matrix: row i has the accuracies (fractions) on tasks 0 … i after task i. A matrix of one row that covers
            several tasks is of tasks learnt jointly, of which only `final_accuracy` can be said.
        examples: test examples of each task, the weights of the average incremental accuracy.
    """
    if not matrix:
        return {}
    last = matrix[-1]
    found = {"final_accuracy": _mean(last)}
    if len(matrix) == 1 and len(last) > 1:
        return found
    seen = [sum(a * n for a, n in zip(row, examples, strict=False)) / sum(examples[: len(row)]) for row in matrix]
    found["average_incremental_accuracy"] = _mean(seen)
    diagonal = [row[i] for i, row in enumerate(matrix)]
    found["learning_accuracy"] = _mean(diagonal)
    if len(matrix) < 2:
        return found
    old = range(len(matrix) - 1)
    found["backward_transfer"] = _mean([last[j] - diagonal[j] for j in old])
    found["forgetting"] = _mean([max(row[j] for row in matrix[j:]) - last[j] for j in old])
    found["forgetting_since_learned"] = -found["backward_transfer"]
    found["new_task_accuracy"] = _mean(diagonal[1:])
    return found


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
