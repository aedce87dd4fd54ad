"""InfLoRA: equal to an explicit adapter, DualGPM as written out, the update stays in A's rows under any optimizer."""

from __future__ import annotations

import copy
import io
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from reference.inflora_literal import LiteralAdapter, LiteralDualGPM, Matrix, down_projection
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import SGD, Adam, AdamW

from subspace_lab.continual.context import TaskContext
from subspace_lab.data.packing import Batch
from subspace_lab.errors import UserError
from subspace_lab.methods.continual.inflora import InfLoRA
from subspace_lab.models.task_heads import TaskHeads
from subspace_lab.subspaces.fixed import Given

TASKS = 5


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first = nn.Linear(12, 10)
        self.second = nn.Linear(10, 6)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(torch.tanh(self.first(x)))
        return y


def inputs() -> Tensor:
    """Every task's inputs fill another part of the space, with a falling spectrum."""
    generator = torch.Generator().manual_seed(0)
    bases = torch.linalg.qr(torch.randn(TASKS, 12, 12, generator=generator))[0]
    spectrum = torch.logspace(0, -2.5, 12)
    return torch.randn(TASKS, 60, 12, generator=generator) * spectrum @ bases.mT


X = inputs()
Y = torch.randn(TASKS, 60, 6, generator=torch.Generator().manual_seed(3))


def context(index: int, **changes: Any) -> TaskContext:
    def batches(count: int | None = None, batch_size: int | None = None, purpose: str = "bases") -> Iterator[Batch]:
        for part in X[index][:count].split(25):
            yield {"inputs": part}

    given: dict[str, Any] = {
        "index": index,
        "tasks": TASKS,
        "columns": range(6),
        "head": "single",
        "device": torch.device("cpu"),
        "seed": index,
        "batches": batches,
        "forward": lambda model, batch: model(batch["inputs"]),
        "loss": lambda model, batch: model(batch["inputs"]).mean(),
    }
    return TaskContext(**(given | changes))


def start(method: InfLoRA, model: nn.Module, index: int, factory: Callable[..., Any]) -> torch.optim.Optimizer:
    method.begin_task(model, context(index))
    method.install(model, index)
    return method.build_optimizer(model, factory)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, task: int) -> None:
    optimizer.zero_grad()
    functional.mse_loss(model(X[task]), Y[task]).backward()
    optimizer.step()


def representations(model: Net, task: int, variant: str) -> dict[str, Matrix]:
    """R (d, n) of each layer: inputs as columns, or their Gram matrix (mean), as the release has it."""
    with torch.no_grad():
        rows = {"first": X[task], "second": torch.tanh(model.first(X[task]))}
    columns = {path: x.double().numpy().T for path, x in rows.items()}
    return columns if variant == "paper" else {p: R @ R.T / R.shape[1] for p, R in columns.items()}


@pytest.mark.parametrize("variant", ["release", "paper"])
def test_equals_the_algorithm_written_out(variant: str) -> None:
    method = InfLoRA(rank=3, threshold=0.8, threshold_end=0.95, variant=variant)  # type: ignore[arg-type]
    model = Net()
    spaces = {"first": LiteralDualGPM(), "second": LiteralDualGPM()}
    kinds = []
    for task in range(TASKS):
        R = representations(model, task, variant)
        optimizer = start(method, model, task, partial(Adam, lr=0.05))
        by_hand = {}
        for path, space in spaces.items():
            A = method.down[path].double().numpy()
            expected = down_projection(space, R[path], 3)
            np.testing.assert_allclose(A.T @ A, expected.T @ expected, rtol=0, atol=1e-5)
            # Eigenvectors have any sign, and Adam does not mind as long as B has it too.
            W = model.get_parameter(f"{path}.weight").detach().double().numpy().copy()
            by_hand[path] = LiteralAdapter(W, A, 0.05)
        for _ in range(6):
            model.zero_grad()
            functional.mse_loss(model(X[task]), Y[task]).backward()
            for path, adapter in by_hand.items():
                grad = model.get_parameter(f"{path}.weight").grad
                assert grad is not None
                adapter.step(grad.double().numpy())
            optimizer.step()
        for path, adapter in by_hand.items():
            now = model.get_parameter(f"{path}.weight").detach().numpy()
            np.testing.assert_allclose(now, adapter.weight, rtol=0, atol=1e-5)
        method.end_task(model, context(task))
        for path, R_after in representations(model, task, variant).items():
            space = spaces[path]
            space.update(R_after, 0.8 + 0.15 * task / TASKS)
            assert space.M is not None
            M = method.memory.bases[path].double().numpy()
            np.testing.assert_allclose(M @ M.T, space.M @ space.M.T, rtol=0, atol=1e-4)
            assert (path in method.memory.retains) is (space.kind == "retain")
            kinds.append(space.kind)
    if variant == "paper":
        assert {"remove", "retain"} == set(kinds)  # the memory has changed sides in this test
    ranks = {p: s.M.shape[1] if s.kind == "remove" else len(s.M) - s.M.shape[1] for p, s in spaces.items()}  # type: ignore[union-attr,arg-type]
    assert method.ranks() == ranks


OPTIMIZERS: dict[str, Callable[..., Any]] = {
    "sgd": partial(SGD, lr=0.5, momentum=0.9, weight_decay=0.01),
    "adam": partial(Adam, lr=0.02, weight_decay=0.01),
    "adamw": partial(AdamW, lr=0.02, weight_decay=0.1),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_update_stays_in_the_rows_of_A_and_off_the_memory(name: str) -> None:
    method, model = InfLoRA(rank=3, threshold=0.95, threshold_end=0.96, variant="paper"), Net()
    sides = set()
    for task in range(4):
        optimizer = start(method, model, task, OPTIMIZERS[name])
        before = {n: p.detach().double().clone() for n, p in model.named_parameters()}
        for _ in range(10):
            step(model, optimizer, task)
        for path in ("first", "second"):
            D = model.get_parameter(f"{path}.weight").detach().double() - before[f"{path}.weight"]
            A = method.down[path].double()
            assert D.norm() > 1e-2
            assert (D - D @ torch.linalg.pinv(A) @ A).norm() < 1e-5 * D.norm()
            M = method.memory.bases.get(path)
            if M is not None:
                M = M.double()
                retained = path in method.memory.retains
                sides.add(retained)
                assert (D - D @ M @ M.mT if retained else D @ M).norm() < 1e-5 * D.norm()
            assert torch.equal(before[f"{path}.bias"].float(), model.get_parameter(f"{path}.bias"))
        method.end_task(model, context(task))
    assert sides == {True, False}


def test_first_directions_are_scaled_and_a_dominant_one_is_still_remembered() -> None:
    method, model = InfLoRA(rank=4, threshold=0.05, threshold_end=0.05), Net()
    method.begin_task(model, context(0))
    A = method.down["first"]
    torch.testing.assert_close(A @ A.mT, torch.eye(4) / 3)
    method.end_task(model, context(0))
    assert method.ranks() == {"first": 1, "second": 1}


def test_nothing_left_to_use_freezes_the_layer() -> None:
    method, model = InfLoRA(rank=3), Net()
    method.memory.bases.put("first", torch.zeros(12, 0))
    method.memory.retains.add("first")
    before = model.first.weight.detach().clone()
    optimizer = start(method, model, 1, partial(AdamW, lr=0.1))
    step(model, optimizer, 1)
    assert method.down["first"].shape == (0, 12)
    assert torch.equal(before, model.first.weight)
    method.end_task(model, context(1))
    assert method.ranks()["first"] == 12


def test_only_keys_and_values_of_a_fused_projection_move() -> None:
    torch.manual_seed(0)
    model = nn.Module()
    model.attn = nn.Module()
    model.attn.qkv, model.attn.proj = nn.Linear(4, 12), nn.Linear(4, 4)
    model.head = TaskHeads(4, [2, 2])
    model.head.train_only(range(1))
    x = torch.randn(30, 4)

    def forward(net: nn.Module, _: Batch) -> Tensor:
        q, k, v = net.attn.qkv(x).chunk(3, dim=-1)  # type: ignore[union-attr,operator]
        out: Tensor = net.head(net.attn.proj(torch.softmax(q @ k.mT, -1) @ v))  # type: ignore[union-attr,operator]
        return out

    def batches(*_: Any, **__: Any) -> Iterator[Batch]:
        yield {}

    method = InfLoRA(rank=2)
    task = context(0, batches=batches, forward=forward, columns=range(2))
    method.begin_task(model, task)
    method.install(model, 0)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {"attn.qkv.weight", "head.heads.0.weight", "head.heads.0.bias"}
    optimizer = method.build_optimizer(model, partial(Adam, lr=0.1))
    before = model.attn.qkv.weight.detach().clone()
    forward(model, {}).square().sum().backward()
    optimizer.step()
    moved = (model.attn.qkv.weight.detach() - before).norm(dim=1) > 0
    assert moved.tolist() == [False] * 4 + [True] * 8


def test_a_resume_goes_on_bit_for_bit_and_processes_agree() -> None:
    factory = partial(Adam, lr=0.02)
    method, model = InfLoRA(rank=3, threshold=0.8, variant="paper"), Net()
    follower = InfLoRA(rank=3, threshold=0.8, variant="paper")

    def together(hook: str, task: int) -> None:
        posted: list[dict[str, Tensor]] = []
        both = threading.Barrier(2, timeout=60)

        def gather(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            posted.append(tensors)
            both.wait()
            return {name: tensor for found in posted for name, tensor in found.items()}

        def process(rank: int) -> None:
            told = context(task, leads=rank == 0, split=lambda names: names[rank::2], gather=gather)
            getattr((method, follower)[rank], hook)(nets[rank], told)

        nets = (model, copy.deepcopy(model))
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(process, range(2)))
        assert all(posted) and not posted[0].keys() & posted[1].keys()  # each layer is one process's

    for task in range(2):
        together("begin_task", task)
        method.install(model, task)
        optimizer = method.build_optimizer(model, factory)
        for _ in range(4):
            step(model, optimizer, task)
        if task == 0:
            together("end_task", 0)
    assert method.ranks() == follower.ranks() and method.memory.retains == follower.memory.retains
    file = io.BytesIO()
    torch.save({"method": method.state_dict(), "model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    again, other = InfLoRA(rank=3, threshold=0.8, variant="paper"), Net()
    again.load_state_dict(saved["method"])
    again.install(other, 1)
    again.install(other, 1)
    resumed = again.build_optimizer(other, factory)
    other.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    for _ in range(4):
        step(model, optimizer, 1)
        step(other, resumed, 1)
    for ended, net in ((method, model), (again, other)):
        ended.end_task(net, context(1))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    assert all(torch.equal(M, again.memory.bases[path]) for path, M in method.memory.bases.items())
    assert method.basis_bytes() == again.basis_bytes() > 0


def test_given_directions_of_different_number_share_a_stack() -> None:
    bases = {"a": torch.randn(2, 5), "b": torch.randn(4, 5)}
    subspace = Given(bases, {"b": range(1, 3)}).allocate((2, 3, 5), names=["a", "b"], device=torch.device("cpu"))
    G = torch.randn(2, 3, 5)
    Z = subspace.project(G)
    torch.testing.assert_close(Z[0, :, :2], G[0] @ bases["a"].mT)
    torch.testing.assert_close(Z[1, 1:3], G[1, 1:3] @ bases["b"].mT)
    assert not Z[0, :, 2:].any() and not Z[1, 0].any()
    torch.testing.assert_close(subspace.lift(Z)[1, 1:3], Z[1, 1:3] @ bases["b"])
    with pytest.raises(ValueError, match="no directions"):
        Given({}).allocate((1, 3, 5), names=["a"], device=torch.device("cpu"))
    with pytest.raises(ValueError, match="expected"):
        Given({"a": torch.zeros(2, 4)}).allocate((1, 3, 5), names=["a"], device=torch.device("cpu"))


@pytest.mark.parametrize(
    "options", [{"rank": 0}, {"threshold": 0.0}, {"threshold": 1.1}, {"threshold_end": 0.0}, {"samples": 0}]
)
def test_options_out_of_range_are_told(options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=f"method.{next(iter(options))}"):
        InfLoRA(**options)
