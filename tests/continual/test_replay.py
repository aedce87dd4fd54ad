"""Replay: the reservoir's statistics, the losses as in the papers, and an exact resume in the middle of a task."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from reference import bfp_literal
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn

from subspace_lab.continual.context import TaskContext
from subspace_lab.continual.objective import SequenceObjective
from subspace_lab.continual.reservoir import Reservoir
from subspace_lab.errors import UserError
from subspace_lab.linalg.random import derive_key, random_bits
from subspace_lab.methods.continual.base import ContinualMethod
from subspace_lab.methods.continual.bfp import BFP
from subspace_lab.methods.continual.replay import Replay
from subspace_lab.models.mlp import build_mlp
from subspace_lab.models.task_heads import TaskHeads, find_task_heads, with_task_heads
from subspace_lab.training.tasks import Classification

COLUMNS = [range(0, 2), range(2, 5)]
SIZES = [2, 3]


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return with_task_heads(build_mlp(hidden=[6], data_shape=(1, 2, 2), data_classes=5), SIZES)


def data(task: int, seed: int = 0, steps: int = 8) -> list[dict[str, Tensor]]:
    g = torch.Generator().manual_seed(100 * seed + task)
    columns = COLUMNS[task]
    return [
        {
            "inputs": torch.randn(4, 1, 2, 2, generator=g),
            "labels": torch.randint(columns.start, columns.stop, (4,), generator=g),
        }
        for _ in range(steps)
    ]


class Loop:
    """What the protocol does, without Lightning."""

    def __init__(self, method: ContinualMethod, model: nn.Module, loss_over: Any = "seen", lr: float = 0.1) -> None:
        self.method, self.model, self.lr = method, model, lr
        self.objective = SequenceObjective(Classification(), method, COLUMNS, "class", loss_over)
        self.losses: list[float] = []

    def context(self, task: int) -> TaskContext:
        def batches(count: int | None = None, batch_size: int | None = None, purpose: str = "") -> Iterator[Any]:
            yield from data(task)

        o = self.objective
        device = torch.device("cpu")
        return TaskContext(task, 2, COLUMNS[task], "class", device, 7 + task, batches, o.forward, o.task_loss)

    def start(self, task: int, begin: bool = True) -> None:
        self.objective.current = task
        heads = find_task_heads(self.model)
        assert heads is not None
        heads.train_only(range(task, task + 1))
        if begin:
            self.method.begin_task(self.model, self.context(task))
        self.method.install(self.model, task)
        groups = self.method.param_groups(self.model)
        self.optimizer = torch.optim.SGD([p for g in groups for _, p in g["params"]], lr=self.lr)

    def steps(self, batches: list[dict[str, Tensor]]) -> None:
        for batch in batches:
            self.optimizer.zero_grad()
            loss = self.objective.loss(self.model, batch)
            loss.backward()  # type: ignore[no-untyped-call]
            self.optimizer.step()
            self.method.after_step(self.optimizer)
            self.losses.append(float(loss.detach()))

    def train(self) -> Loop:
        for task in range(2):
            self.start(task)
            self.steps(data(task))
            self.method.end_task(self.model, self.context(task))
        return self


def same(a: nn.Module, b: nn.Module) -> None:
    for (name, x), y in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        assert torch.equal(x, y), name


# -- the reservoir ---------------------------------------------------------------------------------------------------


def rows(numbers: range, classes: int = 1) -> dict[str, Tensor]:
    values = torch.arange(numbers.start, numbers.stop)
    return {"inputs": values.float()[:, None], "labels": values % classes}


def test_every_example_is_kept_equally_often() -> None:
    counts: Counter[int] = Counter()
    for seed in range(600):
        reservoir = Reservoir(10, seed)
        for first in range(0, 60, 20):
            reservoir.add(rows(range(first, first + 20)))
        kept = reservoir.kept()["inputs"][:, 0].int().tolist()
        assert len(set(kept)) == len(kept) == len(reservoir) == 10
        counts.update(kept)
    # 600 · 10 / 60 = 100 each, standard deviation 9.1
    assert min(counts[i] for i in range(60)) > 60 and max(counts.values()) < 140
    halves = sum(counts[i] for i in range(30)), sum(counts[i] for i in range(30, 60))
    assert abs(halves[0] - halves[1]) < 6 * 40  # neither early nor late ones are favoured


def test_how_examples_come_in_batches_does_not_matter() -> None:
    one, many = Reservoir(7, 3), Reservoir(7, 3)
    one.add(rows(range(50)))
    for first, last in pairwise([0, 1, 9, 10, 30, 50]):
        many.add(rows(range(first, last)))
    assert torch.equal(one.kept()["inputs"], many.kept()["inputs"])


def test_draws_are_without_replacement_and_uniform() -> None:
    reservoir = Reservoir(12, 0)
    reservoir.add(rows(range(12)))
    counts: Counter[int] = Counter()
    for _ in range(900):
        drawn = reservoir.draw(4)["inputs"][:, 0].int().tolist()
        assert len(set(drawn)) == 4
        counts.update(drawn)
    assert min(counts[i] for i in range(12)) > 230 and max(counts.values()) < 370  # 300, deviation 14
    assert len(reservoir.draw(40)["labels"]) == 12


def test_balanced_keeps_rare_classes() -> None:
    """Two classes in turn, then one alone: a plain reservoir holds few of the first."""
    balanced, plain = Reservoir(20, 0, True, 3), Reservoir(20, 0)
    for reservoir in (balanced, plain):
        for first in range(0, 40, 8):
            reservoir.add(rows(range(first, first + 8), classes=2))
        for first in range(0, 800, 8):
            batch = rows(range(first, first + 8))
            reservoir.add({**batch, "labels": batch["labels"] + 2})
    kept = torch.bincount(balanced.kept()["labels"], minlength=3).tolist()
    assert max(kept) - min(kept) <= 2
    assert torch.bincount(plain.kept()["labels"], minlength=3)[2] >= 16


def test_a_reservoir_goes_on_from_its_state() -> None:
    a = Reservoir(9, 5, True, 4)
    for first in range(0, 24, 4):
        a.add(rows(range(first, first + 4), 4))
    a.draw(3)
    b = Reservoir.from_state(copy.deepcopy(a.state_dict()))
    for reservoir in (a, b):
        for first in range(24, 60, 4):
            reservoir.add(rows(range(first, first + 4), 4))
    for x, y in zip(a.draw(5).values(), b.draw(5).values(), strict=True):
        assert torch.equal(x, y)
    assert a.bytes() == b.bytes() == 9 * (4 + 8)


def test_another_shape_is_refused() -> None:
    reservoir = Reservoir(4, 0)
    reservoir.add(rows(range(3)))
    with pytest.raises(UserError, match=r"replayed inputs all need one shape, and after \(1,\) came \(2,\)"):
        reservoir.add({"inputs": torch.zeros(3, 2), "labels": torch.zeros(3, dtype=torch.int64)})


# -- the losses ------------------------------------------------------------------------------------------------------

METHODS: dict[str, Callable[[], Replay]] = {
    "er": lambda: Replay(6, 3),
    "der": lambda: Replay(6, 3, alpha=0.7, beta=0.0),
    "derpp": lambda: Replay(6, 3, alpha=0.7, beta=0.5),
    "bfp": lambda: BFP(0.8, buffer_size=6, minibatch_size=3, alpha=0.7, beta=0.5, balanced=False),
    "distillation": lambda: BFP(0.8, "identity", targets="stored", buffer_size=6, minibatch_size=3, balanced=False),
}


@pytest.mark.parametrize("name", METHODS)
def test_training_equals_the_papers_equations(name: str) -> None:
    method, model = METHODS[name](), network().double()
    loop = Loop(method, model)
    gamma = method.gamma if isinstance(method, BFP) else 0.0
    linear = isinstance(method, BFP) and method.projection == "linear"
    weights = {k: p.detach().clone().requires_grad_() for k, p in model.named_parameters()}

    def functions(w: dict[str, Tensor]) -> tuple[Any, Any]:
        def h(x: Tensor) -> Tensor:
            return torch.relu(w["1.weight"] @ x.flatten() + w["1.bias"])

        def f(x: Tensor) -> Tensor:
            return torch.cat([w[f"3.heads.{t}.weight"] @ h(x) + w[f"3.heads.{t}.bias"] for t in range(2)])

        return h, f

    def word(m: int) -> int:
        return int(random_bits(derive_key("reservoir/1", 7), m, 1, "cpu"))

    def order(draw: int, n: int) -> list[int]:
        words = random_bits(derive_key("reservoir/draw/1", 7, 0), draw * 6, n, "cpu").tolist()
        return sorted(range(n), key=lambda i: words[i])

    memory = bfp_literal.ListReservoir(6, word, order)
    old = None
    h, f = functions(weights)
    for task in range(2):
        loop.start(task)
        A = b = None
        if linear:
            assert isinstance(method, BFP)
            A, b = (p.detach().double().clone().requires_grad_() for p in method._A.parameters())
        moved = [torch.zeros_like(p) for p in (A, b) if p is not None]
        for batch in data(task, steps=5):
            batch["inputs"] = batch["inputs"].double()
            loop.steps([batch])
            pairs = [(x, int(y)) for x, y in zip(batch["inputs"], batch["labels"], strict=True)]
            classes = COLUMNS[task].stop
            settings = (
                classes,
                method.alpha,
                method.beta,
                gamma,
                A,
                b,
                getattr(method, "targets", "stored") == "stored",
            )
            loss = bfp_literal.loss(pairs, memory, 3, h, f, old, *settings)
            assert loop.losses[-1] == pytest.approx(float(loss.detach()), rel=1e-6)
            own = [p for p in (A, b) if p is not None and old is not None and memory.rows]
            grads = torch.autograd.grad(loss, [*weights.values(), *own], allow_unused=True)
            outputs = [f(x).detach() for x, _ in pairs]
            with torch.no_grad():
                for p, g in zip(weights.values(), grads, strict=False):
                    p -= 0.1 * g if g is not None else 0.0
                for i, (p, g) in enumerate(zip(own, grads[len(weights) :], strict=True)):
                    assert g is not None
                    moved[i] = 0.9 * moved[i] + g
                    p -= 0.1 * moved[i]
            for (x, y), z in zip(pairs, outputs, strict=True):
                memory.add((x, y, z))
        old = functions({k: p.detach().clone() for k, p in weights.items()})
        method.end_task(model, loop.context(task))
        for k, p in model.named_parameters():
            torch.testing.assert_close(p.detach(), weights[k].detach(), rtol=1e-5, atol=1e-6, msg=k)


def test_without_the_projection_it_is_derpp_and_without_logits_er() -> None:
    options: dict[str, Any] = {"targets": "stored", "buffer_size": 6, "minibatch_size": 3, "balanced": False}
    for alpha, beta in ((0.7, 0.5), (0.0, 1.0)):
        bfp = Loop(BFP(0.0, alpha=alpha, beta=beta, **options), network()).train()
        plain = Loop(Replay(6, 3, alpha, beta), network()).train()
        same(bfp.model, plain.model)
        assert bfp.losses == plain.losses


def test_a_projection_that_stays_at_the_identity_is_distillation() -> None:
    class AtIdentity(BFP):
        def begin_task(self, model: nn.Module, task: TaskContext) -> None:
            super().begin_task(model, task)
            nn.init.eye_(self._A[0].weight)
            nn.init.zeros_(self._A[0].bias)

    linear = Loop(AtIdentity(projection_lr=0.0, buffer_size=6, minibatch_size=3), network()).train()
    identity = Loop(BFP(projection="identity", buffer_size=6, minibatch_size=3), network()).train()
    for a, b in zip(linear.model.parameters(), identity.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    learnt = Loop(AtIdentity(buffer_size=6, minibatch_size=3), network()).train()
    assert isinstance(learnt.method, BFP) and not torch.equal(learnt.method._A[0].weight, torch.eye(6))  # type: ignore[arg-type]
    assert learnt.losses[-1] != identity.losses[-1]


def test_micro_batches_train_the_projection_with_their_mean() -> None:
    """Two equal micro-batches move A as one of them does."""

    def after(times: int) -> Tensor:
        method = BFP(buffer_size=4, minibatch_size=4, alpha=0.0, beta=0.0)
        loop = Loop(method, network())
        loop.start(0)
        loop.steps(data(0, steps=1))  # the first four fill the reservoir and are drawn whole
        method.end_task(loop.model, loop.context(0))
        loop.start(1)
        method.reservoir.add = lambda batch: None  # type: ignore[method-assign]
        batch = data(0, steps=1)[0]
        for _ in range(times):
            loop.objective.loss(loop.model, batch)
        method.after_step(loop.optimizer)
        return method._A[0].weight.detach().clone()  # type: ignore[return-value, operator]

    torch.testing.assert_close(after(2), after(1))
    assert not torch.equal(after(1), Loop(BFP(), network()).model[1].weight[:1])  # type: ignore[index]


@pytest.mark.parametrize("projection", ["linear", "mlp", "identity"])
@pytest.mark.parametrize("interrupted", [(0, 3), (1, 5)])
def test_a_resume_within_a_task_is_exact(projection: Any, interrupted: tuple[int, int]) -> None:
    def make() -> BFP:
        return BFP(projection=projection, buffer_size=6, minibatch_size=3)

    whole = Loop(make(), network()).train()
    task, step = interrupted
    first = Loop(make(), network())
    for index in range(task):
        first.start(index)
        first.steps(data(index))
        first.method.end_task(first.model, first.context(index))
    first.start(task)
    first.steps(data(task)[:step])
    state, weights = copy.deepcopy(first.method.state_dict()), copy.deepcopy(first.model.state_dict())
    first.steps(data(task)[step:])  # what goes on elsewhere leaves the saved state alone
    again = Loop(make(), network(1))
    again.model.load_state_dict(weights)
    again.method.load_state_dict(state)
    assert str(again.method.state_dict()) == str(state)  # saved again before anything is installed
    again.start(task, begin=False)
    again.method.install(again.model, task)  # twice does no harm
    again.steps(data(task)[step:])
    again.method.end_task(again.model, again.context(task))
    for index in range(task + 1, 2):
        again.start(index)
        again.steps(data(index))
    same(again.model, whole.model)


def test_later_classes_keep_their_logits_on_old_examples_only_because_all_outputs_are_compared() -> None:
    method = Replay(6, 3, alpha=1.0, beta=0.0)
    loop = Loop(method, network())
    loop.start(0)
    loop.steps(data(0))
    assert method.reservoir.kept()["logits"].shape == (6, 5)
    heads = find_task_heads(loop.model)
    assert isinstance(heads, TaskHeads) and all(p.requires_grad for p in heads.parameters())
    assert heads.active == range(0, 1)  # as the loss had left it


# -- what is refused -------------------------------------------------------------------------------------------------


def test_one_line_for_what_cannot_be() -> None:
    loop = Loop(Replay(6, 3), network(), loss_over="task")
    loop.start(0)
    loop.steps(data(0))
    loop.start(1)
    with pytest.raises(UserError, match="the loss compares 3 of the 5 classes seen so far") as error:
        loop.steps(data(1))
    assert error.value.hint == "scenario.loss_over=seen"
    mixed = {"inputs": torch.zeros(2, 1, 2, 2), "labels": torch.full((2, 5), 0.2)}
    with pytest.raises(UserError, match="labels that are whole, not mixed"):
        loop.steps([mixed])
    for options, message in (
        ({"buffer_size": 0}, "method.buffer_size=0"),
        ({"minibatch_size": 0}, "method.minibatch_size=0"),
        ({"alpha": -1.0}, "method.alpha=-1.0"),
        ({"beta": float("nan")}, "method.beta=nan"),
        ({"gamma": -0.5}, "method.gamma=-0.5"),
        ({"projection_momentum": 1.0}, "method.projection_momentum=1.0"),
    ):
        with pytest.raises(UserError, match=message):
            BFP(**options)  # type: ignore[arg-type]


# -- real digits, several processes ----------------------------------------------------------------------------------


def test_replay_remembers_digits_that_fine_tuning_forgets() -> None:
    """Two digits after two others, one head for all; the accuracy on the first two, without being told which."""
    images, labels = load_digits(return_X_y=True)
    x = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16
    y = torch.tensor(labels)

    def accuracy(method: ContinualMethod) -> float:
        torch.manual_seed(0)
        loop = Loop(method, with_task_heads(build_mlp(hidden=[40], data_shape=(1, 8, 8), data_classes=5), SIZES))
        for task, columns in enumerate(COLUMNS):
            mine = torch.isin(y[:1400], torch.tensor(list(columns))).nonzero().flatten()
            loop.start(task)
            for _ in range(5):
                loop.steps([{"inputs": x[i], "labels": y[i]} for i in mine.split(10)])
            method.end_task(loop.model, loop.context(task))
        heads = find_task_heads(loop.model)
        assert heads is not None
        heads.active = range(2)
        test = (y[1400:] < 2).nonzero().flatten() + 1400
        return (loop.model(x[test]).argmax(1) == y[test]).double().mean().item()

    assert accuracy(ContinualMethod()) < 0.3
    assert accuracy(Replay(100, 16)) > 0.75
    assert accuracy(Replay(100, 16, alpha=0.5, beta=0.0)) > 0.4
    assert accuracy(BFP(buffer_size=100, minibatch_size=16, alpha=0.5)) > 0.8


def _process(rank: int, folder: str) -> None:
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    method = BFP(buffer_size=6, minibatch_size=2)
    loop = Loop(method, network(), lr=0.0)
    for task in range(2):
        loop.start(task)
        loop.steps([{k: v[2 * rank : 2 * rank + 2] for k, v in batch.items()} for batch in data(task)])
        method.end_task(loop.model, loop.context(task))
    torch.save({"state": method.state_dict(), "draw": method.reservoir.draw(3)["inputs"]}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_keep_one_reservoir_and_one_projection(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")  # where the host's name leads nowhere
    spawn(_process, (str(tmp_path),), nprocs=2)
    a, b = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert str(a["state"]) == str(b["state"])
    assert not torch.equal(a["draw"], b["draw"])  # each rehearses its own
    alone = Loop(BFP(buffer_size=6, minibatch_size=2), network(), lr=0.0).train()
    kept = alone.method.state_dict()["reservoir"]["rows"]
    for name in ("inputs", "labels"):
        assert torch.equal(kept[name], a["state"]["reservoir"]["rows"][name])
