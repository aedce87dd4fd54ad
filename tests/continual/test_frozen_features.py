"""NMC and IF2Net: no gradient descent, so what they know must not depend on the order or division of the data."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from reference.if2net_literal import RecursiveLeastSquares, complement_projector
from sklearn.datasets import load_digits
from torch import Tensor, nn

from subspace_lab.continual.context import TaskContext
from subspace_lab.errors import UserError
from subspace_lab.methods.continual.base import ContinualMethod
from subspace_lab.methods.continual.if2net import IF2Net
from subspace_lab.methods.continual.nearest_mean import NearestMean
from subspace_lab.models.convolutional import build_small_cnn
from subspace_lab.models.mlp import build_mlp
from subspace_lab.models.task_heads import with_task_heads

IMAGES, LABELS = load_digits(return_X_y=True)
X, Y = torch.tensor(IMAGES, dtype=torch.float32).view(-1, 1, 8, 8) / 16, torch.tensor(LABELS)
TRAIN, TEST = slice(0, 1400), slice(1400, None)


def network(hidden: Sequence[int] = (), sizes: Sequence[int] = (2,) * 5) -> nn.Module:
    torch.manual_seed(0)
    return with_task_heads(build_mlp(hidden=hidden, data_shape=(1, 8, 8), data_classes=10), sizes)


def learn(
    method: ContinualMethod, model: nn.Module, tasks: Sequence[Sequence[int]], batch_size: int = 100, **context: Any
) -> None:
    """Tasks are classes; each class keeps its own output, whatever the order."""
    for index, classes in enumerate(tasks):
        rows = torch.isin(Y[TRAIN], torch.tensor(classes)).nonzero().flatten()

        def batches(
            count: int | None = None, size: int | None = None, purpose: str = "", rows: Tensor = rows
        ) -> Iterator[Any]:
            for some in rows.split(batch_size):
                yield {"inputs": X[some], "labels": Y[some]}

        columns = range(min(classes), max(classes) + 1)
        task = TaskContext(
            index, len(tasks), columns, "class", torch.device("cpu"), 3, batches, _never, _never, **context
        )
        method.begin_task(model, task)
        method.install(model, index)
        method.end_task(model, task)


def _never(*_: Any) -> Any:
    raise AssertionError("nothing is trained")


def scores(method: ContinualMethod, model: nn.Module, columns: range = range(10)) -> Tensor:
    with torch.no_grad():
        found = method.scores(model, {"inputs": X[TEST], "labels": Y[TEST]}, columns)
    assert found is not None and found.shape == (397, len(columns))
    return found


def accuracy(method: ContinualMethod, model: nn.Module) -> float:
    return (scores(method, model).argmax(1) == Y[TEST]).double().mean().item()


PAIRS = [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9]]
OTHERWISE = [[7, 9, 2], [0], [1, 3, 4, 5, 6, 8]]
MAKERS = {"nmc": NearestMean, "if2net": lambda: IF2Net(60, 0.1)}


@pytest.mark.parametrize("name", MAKERS)
def test_order_and_division_of_tasks_and_batches_do_not_matter(name: str) -> None:
    found = []
    model = network((20,))
    for tasks, size in ((PAIRS, 100), (PAIRS[::-1], 7), (OTHERWISE, 64), ([list(range(10))], 2000)):
        method = MAKERS[name]()
        learn(method, model, tasks, size)
        found.append(scores(method, model))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=0, atol=2e-5)


def test_running_means_are_the_means_of_unit_features_and_the_nearest_wins() -> None:
    method, model = NearestMean(), network((20,))
    learn(method, model, PAIRS, 9)
    h = torch.relu(X.flatten(1) @ model[1].weight.T + model[1].bias).detach()  # type: ignore[index, union-attr]
    phi = h / h.norm(dim=1, keepdim=True)
    means = torch.stack([phi[TRAIN][Y[TRAIN] == c].mean(0) for c in range(10)])
    assert (means.norm(dim=1) < 0.999).all()  # not renormalised: else cosine would give the same answers
    distances = (phi[TEST][:, None] - means).norm(dim=2)
    torch.testing.assert_close(scores(method, model), -distances, rtol=0, atol=1e-5)
    torch.testing.assert_close(scores(method, model, range(4, 6)), -distances[:, 4:6], rtol=0, atol=1e-5)
    assert method.basis_bytes() == 10 * 20 * 8 + 10 * 8


def test_a_class_may_come_again() -> None:
    """As with one head for tasks of the same classes."""
    twice, once = NearestMean(), NearestMean()
    model = network()
    learn(twice, model, [[0, 1, 2], [0, 1, 2]])
    learn(once, model, [[0, 1, 2]])
    torch.testing.assert_close(scores(twice, model, range(3)), scores(once, model, range(3)))
    assert twice._counts is not None and once._counts is not None and torch.equal(twice._counts, 2 * once._counts)


def test_unseen_classes_are_no_answer() -> None:
    method, model = NearestMean(), network()
    assert method.scores(model, {"inputs": X[TEST]}, range(10)) is None
    learn(method, model, PAIRS[:2])
    assert scores(method, model).isinf().any(0).tolist() == [False] * 4 + [True] * 6
    assert int(scores(method, model).argmax(1).max()) < 4


def test_it_equals_recursive_least_squares() -> None:
    """Batch by batch with P, in float64."""
    method, model = IF2Net(40, 0.3), network((15,))
    learn(method, model, PAIRS)
    literal = RecursiveLeastSquares(40, 10, 0.3)
    seen = []
    with torch.no_grad():
        for classes in PAIRS:
            rows = torch.isin(Y[TRAIN], torch.tensor(classes)).nonzero().flatten()
            for some in rows.split(35):
                H = method.random_features(model, {"inputs": X[some]}).double()
                literal.update(H, nn.functional.one_hot(Y[some], 10).double())
                seen.append(H)
    assert method._W is not None and method._A is not None
    torch.testing.assert_close(method._W, literal.W, rtol=0, atol=1e-7)
    torch.testing.assert_close(torch.linalg.inv(method._A), literal.P, rtol=0, atol=1e-7)
    H = torch.cat(seen)
    ridge = torch.linalg.solve(H.T @ H + 0.3 * torch.eye(40), H.T @ nn.functional.one_hot(_labels(PAIRS), 10).double())
    torch.testing.assert_close(method._W, ridge, rtol=0, atol=1e-6)  # of all tasks together
    assert method.ranks() == {"random_features": round(40 - 0.3 * float(literal.P.trace()))}


def _labels(tasks: Sequence[Sequence[int]]) -> Tensor:
    return torch.cat([Y[TRAIN][torch.isin(Y[TRAIN], torch.tensor(classes))] for classes in tasks])


def test_updates_leave_answers_to_old_inputs_in_place_and_the_projector_is_the_complement() -> None:
    """As the ridge goes to zero, with more features than examples."""
    model = network()
    method = IF2Net(300, 1e-9)
    some = {"inputs": X[:60], "labels": Y[:60]}
    task = TaskContext(0, 2, range(10), "single", torch.device("cpu"), 3, lambda *a, **k: iter([some]), _never, _never)
    method.begin_task(model, task)
    method.end_task(model, task)
    before = method.scores(model, some, range(10))
    assert method._A is not None and before is not None
    H = method.random_features(model, some).detach().double()
    torch.testing.assert_close(1e-9 * torch.linalg.inv(method._A), complement_projector(H), rtol=0, atol=2e-3)
    more = {"inputs": X[500:560], "labels": Y[500:560]}
    next_task = TaskContext(
        1, 2, range(10), "single", torch.device("cpu"), 4, lambda *a, **k: iter([more]), _never, _never
    )
    method.end_task(model, next_task)
    after, new = (method.scores(model, batch, range(10)) for batch in (some, more))
    assert after is not None and new is not None
    assert (after - before).abs().max() < 2e-3 and torch.equal(new.argmax(1), more["labels"])
    other = {"inputs": X[900:960], "labels": Y[900:960]}
    assert method.ranks()["random_features"] == 120 and other["labels"].shape == (60,)


@pytest.mark.parametrize("name", MAKERS)
def test_only_the_first_process_reads_and_a_resume_goes_on(name: str) -> None:
    model = network((20,))
    whole, shared = MAKERS[name](), []

    def share(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        shared.append(tensors)
        return tensors

    learn(whole, model, PAIRS, share=share)
    follower = MAKERS[name]()
    handed = iter(shared)
    learn(follower, model, PAIRS[:3], leads=False, share=lambda _: next(handed))
    state = copy.deepcopy(follower.state_dict())
    resumed = MAKERS[name]()
    resumed.load_state_dict(state)
    learn(resumed, model, PAIRS[3:], leads=False, share=lambda _: next(handed))
    assert torch.equal(scores(resumed, model), scores(whole, model))


def test_features_are_those_of_evaluation() -> None:
    """BatchNorm neither learns nor looks at the batch, and the model is left in the mode it was in."""
    torch.manual_seed(0)
    model = with_task_heads(build_small_cnn(width=4, data_shape=(1, 8, 8), data_classes=10), [2] * 5).train()
    model[1].eval()  # type: ignore[index, union-attr]
    before = copy.deepcopy(model.state_dict())
    a, b = NearestMean(), NearestMean()
    learn(a, model, PAIRS, 11)
    learn(b, model, PAIRS, 500)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert model.training and not model[1].training and model[4].training  # type: ignore[index, union-attr]
    torch.testing.assert_close(scores(a, model.eval()), scores(b, model))


def test_digits_pixels_without_being_told_the_task() -> None:
    """The reference figure for the nearest mean of pixels is 90.9; half-random answers would have 10."""
    nmc, model = NearestMean(), network()
    learn(nmc, model, PAIRS)
    assert 0.84 < accuracy(nmc, model) < 0.95
    if2net = IF2Net(400, 1.0)
    learn(if2net, model, PAIRS)
    assert accuracy(if2net, model) > 0.85


def test_one_line_for_values_out_of_range() -> None:
    for options in ({"width": 0}, {"ridge": 0.0}, {"ridge": float("inf")}):
        with pytest.raises(UserError, match=f"method.{next(iter(options))}="):
            IF2Net(**options)  # type: ignore[arg-type]
