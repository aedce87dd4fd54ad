"""Figures of an accuracy matrix, by hand."""

from __future__ import annotations

import pytest

from subspace_lab.continual.metrics import DEFINITIONS, figures

A = [[0.9], [0.6, 0.8], [0.7, 0.5, 0.95]]


def test_hand_made_matrix_has_every_figure() -> None:
    found = figures(A, [100, 100, 100])
    assert found.keys() == DEFINITIONS.keys()
    assert found["final_accuracy"] == pytest.approx((0.7 + 0.5 + 0.95) / 3)
    assert found["average_incremental_accuracy"] == pytest.approx((0.9 + 0.7 + (0.7 + 0.5 + 0.95) / 3) / 3)
    assert found["backward_transfer"] == pytest.approx(((0.7 - 0.9) + (0.5 - 0.8)) / 2)
    assert found["forgetting"] == pytest.approx((0.2 + 0.3) / 2)
    assert found["forgetting_since_learned"] == pytest.approx(0.25)
    assert found["learning_accuracy"] == pytest.approx((0.9 + 0.8 + 0.95) / 3)
    assert found["new_task_accuracy"] == pytest.approx((0.8 + 0.95) / 2)


def test_backward_gains_count_for_transfer_and_are_hidden_by_forgetting() -> None:
    found = figures([[0.5], [0.8, 0.9]], [10, 10])
    assert found["backward_transfer"] == pytest.approx(0.3)
    assert found["forgetting_since_learned"] == pytest.approx(-0.3)
    assert found["forgetting"] == 0  # the last row is in the maximum


def test_forgetting_looks_for_the_peak_after_learning() -> None:
    found = figures([[0.5], [0.8, 0.9], [0.6, 0.9, 0.7]], [1, 1, 1])
    assert found["forgetting"] == pytest.approx((0.2 + 0) / 2)
    assert found["forgetting_since_learned"] == pytest.approx((-0.1 + 0) / 2)


def test_average_incremental_accuracy_weighs_by_examples() -> None:
    assert figures([[1.0], [0.5, 1.0]], [30, 10])["average_incremental_accuracy"] == pytest.approx((1 + 0.625) / 2)


def test_tasks_learnt_jointly_have_a_final_accuracy_alone() -> None:
    assert figures([[0.9, 0.7]], [5, 5]) == {"final_accuracy": pytest.approx(0.8)}


def test_one_task_has_no_transfer() -> None:
    assert figures([[0.9]], [5]).keys() == {"final_accuracy", "average_incremental_accuracy", "learning_accuracy"}
    assert figures([], []) == {}
