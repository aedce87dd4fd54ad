"""CoSO: equality with the paper's algorithm, its constraint under any optimizer, the sketch's bounds, resuming."""

from __future__ import annotations

import io
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from reference.coso_literal import LiteralCoSO
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW

from subspace_lab.continual.context import TaskContext
from subspace_lab.continual.schedules import quarter_cosine
from subspace_lab.errors import UserError
from subspace_lab.methods.continual.coso import CoSO
from subspace_lab.optim.subspace_optimizer import SubspaceOptimizer
from subspace_lab.subspaces.within import Sketched

X = torch.randn(3, 40, 8, generator=torch.Generator().manual_seed(0))
Y = torch.randn(3, 40, 6, generator=torch.Generator().manual_seed(1))


class Net(nn.Module):
    """Two layers of different shape and one that does not train."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.wide = nn.Linear(8, 12)
        self.tall = nn.Linear(12, 6)
        self.scale = nn.Parameter(torch.ones(6))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.scale * self.tall(torch.tanh(self.wide(x)))
        return y


def context(index: int, **changes: Any) -> TaskContext:
    def nothing(*_: Any, **__: Any) -> Any:
        raise AssertionError("CoSO gathers nothing from data")

    given: dict[str, Any] = {
        "index": index,
        "tasks": 3,
        "columns": range(6),
        "head": "single",
        "device": torch.device("cpu"),
        "seed": index,
        "batches": nothing,
        "forward": nothing,
        "loss": nothing,
    }
    return TaskContext(**(given | changes))


def start(method: CoSO, model: nn.Module, index: int, factory: Callable[..., Any]) -> SubspaceOptimizer:
    method.begin_task(model, context(index))
    method.install(model, index)
    optimizer = method.build_optimizer(model, factory)
    assert isinstance(optimizer, SubspaceOptimizer)
    return optimizer


def step(
    model: nn.Module, optimizer: torch.optim.Optimizer, task: int, part: int = 0, clip: float | None = None
) -> None:
    optimizer.zero_grad()
    rows = slice(part % 4 * 10, part % 4 * 10 + 10)
    (model(X[task][rows]) - Y[task][rows]).square().sum().backward()
    if clip is not None:
        nn.utils.clip_grad_norm_(model.parameters(), clip)
    optimizer.step()


@pytest.mark.parametrize("side", ["output", "input"])
@pytest.mark.parametrize(
    ("variant", "adam", "every"),
    [("release", False, 1), ("release", True, 100), ("paper", True, 3), ("paper", False, 2)],
)
def test_equals_the_algorithm_written_out(side: str, variant: str, adam: bool, every: int) -> None:
    options: dict[str, Any] = {"r1": 2, "r2": 3, "every": every, "threshold": 0.8}
    method = CoSO(**options, side=side, variant=variant, solver="svd", targets=["wide"])  # type: ignore[arg-type]
    model = Net()
    lr = 0.02 if adam else 0.002
    literal = LiteralCoSO(**options, lr=lr, side=side, release=variant == "release", adam=adam)
    factory = partial(Adam, lr=lr, eps=1e-6) if adam else partial(SGD, lr=lr)
    W = model.wide.weight.detach().double().numpy().copy()
    for task in range(3):
        optimizer = start(method, model, task, factory)
        for t in range(8):
            # The literal's gradient is taken at the literal's own weight.
            model_weight = model.wide.weight.detach().clone()
            model.wide.weight.data = torch.tensor(W, dtype=torch.float32)
            model.zero_grad()
            rows = slice(t % 4 * 10, t % 4 * 10 + 10)
            (model(X[task][rows]) - Y[task][rows]).square().sum().backward()
            assert model.wide.weight.grad is not None
            W = literal.step(W, model.wide.weight.grad.double().numpy())
            model.wide.weight.data = model_weight
            step(model, optimizer, task, t)
        np.testing.assert_allclose(model.wide.weight.detach().numpy(), W, rtol=0, atol=2e-5)
        method.end_task(model, context(task))
        literal.end()
        assert literal.M is not None
        M = method.memory["wide"].double().numpy()
        np.testing.assert_allclose(M @ M.T, literal.M @ literal.M.T, rtol=0, atol=1e-4)
    assert 0 < literal.M.shape[1] < 8


OPTIMIZERS: dict[str, Callable[..., Any]] = {
    "sgd": partial(SGD, lr=0.01, momentum=0.9, weight_decay=0.01),
    "adam": partial(Adam, lr=0.01, weight_decay=0.01),
    "adamw": partial(AdamW, lr=0.01, weight_decay=0.1),
}


@pytest.mark.parametrize("side", ["output", "input"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_applied_update_is_in_the_basis_and_outside_the_memory(side: str, name: str) -> None:
    method = CoSO(r1=3, r2=4, every=2, threshold=0.95, side=side)  # type: ignore[arg-type]
    model = Net()
    for task in range(3):
        optimizer = start(method, model, task, OPTIMIZERS[name])
        for t in range(12):
            before = {n: p.detach().clone() for n, p in model.named_parameters()}
            step(model, optimizer, task, t, clip=5.0)
            for path in ("wide", "tall"):
                D = model.get_submodule(path).weight.detach() - before[f"{path}.weight"]  # type: ignore[operator]
                D = D.mT if side == "output" else D
                P = optimizer.directions(f"{path}.weight")["basis"]
                # What moves is far larger than the rounding of weights of size 1.
                assert D.norm() > 1e-3
                assert (D - D @ P @ P.mT).norm() <= 1e-5 * D.norm() + 1e-6
                M = method.memory.get(path)
                if M is not None:
                    assert (D @ M).norm() <= 1e-5 * D.norm() + 1e-6
                    assert (P.mT @ M).abs().max() < 1e-5
            for frozen in ("wide.bias", "tall.bias", "scale"):
                assert torch.equal(before[frozen], model.get_parameter(frozen))
        method.end_task(model, context(task))
    for path in ("wide", "tall"):
        M = method.memory[path]
        assert (M.mT @ M - torch.eye(M.shape[1])).abs().max() < 1e-5
    assert method.ranks() == {path: M.shape[1] for path, M in method.memory.items()}
    assert method.dimensions() == ({"wide": 12, "tall": 6} if side == "output" else {"wide": 8, "tall": 12})
    assert method.basis_bytes() == 4 * sum(M.numel() for _, M in method.memory.items())


def test_input_side_leaves_old_answers_and_output_side_does_not() -> None:
    change = {}
    for side in ("input", "output"):
        method = CoSO(r1=3, r2=8, threshold=0.9999, side=side, targets=["wide"])  # type: ignore[arg-type]
        model = Net()
        torch.manual_seed(0)
        old = torch.randn(40, 5) @ torch.linalg.qr(torch.randn(8, 5))[0].mT
        optimizer = start(method, model, 0, partial(Adam, lr=0.01))
        for _ in range(10):
            optimizer.zero_grad()
            (model(old) - Y[0]).square().sum().backward()
            optimizer.step()
        method.end_task(model, context(0))
        M = method.memory["wide"]
        assert M.shape[1] >= 3
        if side == "input":  # what the memory took in of the old inputs: all but the last direction
            old = old @ M @ M.mT
        kept, other = model.wide(old).detach(), model.wide(X[1]).detach()
        optimizer = start(method, model, 1, partial(Adam, lr=0.01))
        for t in range(20):
            step(model, optimizer, 1, t)
        change[side] = float(((model.wide(old) - kept).norm() / kept.norm()).detach())
        assert (model.wide(X[1]) - other).norm() > 0.01 * other.norm()
        if side == "output":  # its guarantee is another one
            drift = model.wide(X[1]).detach() - other
            assert (drift @ M).norm() < 1e-5 * drift.norm()
    assert change["input"] < 1e-5
    assert change["output"] > 1e-2


def gradients(count: int, p: int, q: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    spectrum = torch.logspace(0, -3, min(p, q))
    U, V = (torch.linalg.qr(torch.randn(n, n, generator=generator))[0][:, : min(p, q)] for n in (p, q))
    noise = (0.05 * torch.randn(count, p, q, generator=generator)).unbind()
    drift = [torch.randn(p, p, generator=generator) / p**0.5 for _ in range(count)]
    return [d @ (U * spectrum) @ V.mT + n for d, n in zip(drift, noise, strict=True)]


@pytest.mark.parametrize("shrink", ["single", "double"])
def test_sketch_stays_below_what_it_sketches_and_within_its_bound(shrink: str) -> None:
    stream, columns = gradients(25, 30, 40), 20
    subspace = Sketched(5, {}, sketch=columns, shrink=shrink).allocate(  # type: ignore[arg-type]
        (1, 30, 40), names=["w"], device=torch.device("cpu")
    )
    C, extra = torch.zeros(40, 40, dtype=torch.float64), 0.0
    for A in stream:
        subspace.refresh(A[None])
        C += A.double().mT @ A.double()
        extra += float(torch.linalg.svdvals(A.double())[columns] ** 2)
    S = subspace.sketch[0].double()
    difference = torch.linalg.eigvalsh(C - S @ S.mT)
    tail = torch.linalg.eigvalsh(C).flip(0)
    bound = min(float(tail[k:].sum()) / (columns + 1 - k) for k in range(columns))
    assert difference.min() > -1e-4 * tail[0]
    assert difference.max() <= bound + (extra if shrink == "double" else 0.0)
    if shrink == "double":
        assert difference.max() > 0
    leading, kept = torch.linalg.eigh(C)[1][:, -5:], torch.linalg.eigh(S @ S.mT)[1][:, -5:]
    assert torch.linalg.svdvals(leading.mT @ kept).min() > 0.999


def test_double_shrinking_loses_more() -> None:
    lost = {}
    for shrink in ("single", "double"):
        subspace = Sketched(2, {}, sketch=10, shrink=shrink).allocate(  # type: ignore[arg-type]
            (1, 30, 40), names=["w"], device=torch.device("cpu")
        )
        for A in gradients(10, 30, 40):
            subspace.refresh(A[None])
        lost[shrink] = float(subspace.sketch.square().sum())
    assert lost["double"] < lost["single"]


def test_a_sketch_as_wide_as_the_layer_is_exact_and_says_so() -> None:
    with pytest.warns(UserWarning, match="rank 100 is more than the 8"):
        subspace = Sketched(3, {}, sketch=100, shrink="double").allocate(
            (2, 5, 8), names=["a", "b"], device=torch.device("cpu")
        )
    stream = torch.randn(6, 2, 5, 8, generator=torch.Generator().manual_seed(1))
    stream[2, 1, 0, 0] = float("nan")
    for A in stream:
        subspace.refresh(A)
    S = subspace.sketch
    exact = stream.mT @ stream
    torch.testing.assert_close(S[0] @ S[0].mT, exact[:, 0].sum(0), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(S[1] @ S[1].mT, exact[[0, 1, 3, 4, 5], 1].sum(0), rtol=1e-4, atol=1e-4)


def test_full_memory_freezes_the_weight() -> None:
    method = CoSO(r1=3, r2=8, side="input", targets=["wide"])
    method.memory.put("wide", torch.linalg.qr(torch.randn(8, 8))[0])
    model = Net()
    before = model.wide.weight.detach().clone()
    optimizer = start(method, model, 1, partial(AdamW, lr=0.1))
    for t in range(5):
        step(model, optimizer, 1, t)
    assert torch.equal(before, model.wide.weight)


@pytest.mark.parametrize("variant", ["release", "paper"])
def test_sketch_and_moments_survive_a_resume_in_the_middle_of_a_task(variant: str) -> None:
    def fresh() -> tuple[CoSO, Net]:
        return CoSO(r1=3, r2=4, every=2, threshold=0.7, variant=variant), Net()  # type: ignore[arg-type]

    factory = partial(Adam, lr=0.01)
    method, model = fresh()
    optimizer = start(method, model, 0, factory)
    for t in range(6):
        step(model, optimizer, 0, t)
    method.end_task(model, context(0))
    optimizer = start(method, model, 1, factory)
    for t in range(5):
        step(model, optimizer, 1, t)
    file = io.BytesIO()
    torch.save({"method": method.state_dict(), "model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    again, other = fresh()
    again.load_state_dict(saved["method"])
    again.install(other, 1)
    again.install(other, 1)
    resumed = again.build_optimizer(other, factory)
    other.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    for t in range(5, 11):
        step(model, optimizer, 1, t)
        step(other, resumed, 1, t)
    method.end_task(model, context(1))
    again.end_task(other, context(1))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    for path, M in method.memory.items():
        assert torch.equal(M, again.memory[path])


def test_all_processes_remember_the_same_bases_each_found_once() -> None:
    posted: list[dict[str, Tensor]] = []
    together = threading.Barrier(2, timeout=60)

    def gather(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        posted.append(tensors)
        together.wait()
        return {name: tensor for found in posted for name, tensor in found.items()}

    def trained(rank: int) -> tuple[CoSO, Net]:
        method, model = CoSO(r1=3, r2=4, threshold=0.9), Net()
        optimizer = start(method, model, 0, partial(Adam, lr=0.01))
        for t in range(4):
            step(model, optimizer, 0, t + rank)  # another process would differ by rounding only
        return method, model

    def end(method: CoSO, model: Net, rank: int) -> None:
        method.end_task(model, context(0, leads=rank == 0, split=lambda names: names[rank::2], gather=gather))

    (first, one), (second, two) = trained(0), trained(1)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(end, (first, second), (one, two), (0, 1)))
    assert sorted(name for found in posted for name in found) == sorted(first.memory)
    for path, M in first.memory.items():
        assert torch.equal(M, second.memory[path])


def test_trains_attention_outputs_where_there_are_any_and_heads_at_their_own_rate() -> None:
    from subspace_lab.models.task_heads import TaskHeads

    model = nn.Sequential()
    block = nn.Module()
    block.attn = nn.Module()
    block.attn.qkv, block.attn.proj = nn.Linear(4, 12), nn.Linear(4, 4)
    block.mlp = nn.Linear(4, 4)
    model.add_module("blocks", nn.Sequential(block))
    model.add_module("head", TaskHeads(4, [2, 2]))
    model.head.train_only(range(1, 2))  # type: ignore[union-attr,operator]
    method = CoSO(r1=2, r2=2, head_lr=0.5)
    method.install(model, 1)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {"blocks.0.attn.proj.weight", "head.heads.1.weight", "head.heads.1.bias"}
    projected, head = method.build_optimizer(model, partial(Adam, lr=0.1)).param_groups
    assert projected["param_names"] == ["blocks.0.attn.proj.weight"]
    assert (projected["lr"], head["lr"]) == (0.1, 0.5)


def test_schedule_is_a_quarter_of_a_cosine_in_steps_of_an_epoch() -> None:
    optimizer = SGD([{"params": [nn.Parameter(torch.zeros(1))], "lr": 2.0}], lr=1.0)
    schedule = quarter_cosine(optimizer, 20, stairs=5)
    rates: list[float] = []
    for _ in range(20):
        rates.append(float(schedule.get_last_lr()[0]) / 2)
        optimizer.step()
        schedule.step()
    expected = [np.cos(99 * np.pi * epoch / (200 * 4)) for epoch in range(5)]
    np.testing.assert_allclose(rates, np.repeat(expected, 4), atol=1e-12)
    assert quarter_cosine(optimizer, 7, stairs=1).get_last_lr() == [2.0]
    with pytest.raises(UserError, match="at least 1"):
        quarter_cosine(optimizer, 7, stairs=0)


@pytest.mark.parametrize(
    "options", [{"r1": 0}, {"r2": -1}, {"every": 0}, {"threshold": 0.0}, {"threshold": 1.1}, {"head_lr": 0.0}]
)
def test_options_out_of_range_are_told(options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=f"method.{next(iter(options))}"):
        CoSO(**options)
