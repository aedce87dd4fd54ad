"""The clients' side: all clients of a federation, or one of them, in whatever process they are.

Everything a client does follows from the configuration, the weights it is sent and the number of the round, so that
two processes with the same three give the same answer.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from subspace_lab import build
from subspace_lab.continual.context import Head, TaskContext
from subspace_lab.continual.objective import SequenceObjective
from subspace_lab.continual.scenario import LossOver, TaskData
from subspace_lab.data.order import mix
from subspace_lab.data.packing import Batch
from subspace_lab.errors import UserError
from subspace_lab.federated import training
from subspace_lab.federated.examples import TaskExamples
from subspace_lab.federated.federation import Federation
from subspace_lab.federated.layout import Layout
from subspace_lab.federated.partition import Indices
from subspace_lab.methods.federated.base import FederatedMethod
from subspace_lab.models.task_heads import find_task_heads, with_task_heads
from subspace_lab.optim.traits import is_elementwise

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from subspace_lab.federated.exchange import Question, Work

_STACK_BYTES = {"cpu": 1 << 24, "cuda": 1 << 30}  # of the weights of clients that are trained at once
_MOST_AT_ONCE = 256
_DRAW_BATCH = 256  # examples at a time where statistics are gathered
_AUTOCAST = {"32-true": None, "bf16-mixed": torch.bfloat16}


class ClientPool:
    """The clients of a federation; a pure function of the configuration and of its methods' arguments.

    Args:
        cfg: the validated configuration.
        device: where clients compute.

    Attributes:
        data: the data module, set up.
        scenario: makes the tasks; None: there is one.
        tasks: of the sequence.
        federation: who has what.
        method: answers questions.
        model: to work in; its weights are whatever was done last.
        layout: of its state.
        objective: what a batch means; its `current` and `judged` task are those of the last call.
        model_arguments: what the data said of themselves to the model.

    Raises:
        UserError: parts that do not fit together.
    """

    def __init__(self, cfg: DictConfig, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self.federation: Federation = build.instantiate(cfg.federation)
        method = build.build_method(cfg)
        if not isinstance(method, FederatedMethod):
            raise UserError(
                f"method={method.name} does not aggregate what clients send", hint="method=fedavg, fot, flag or krum"
            )
        self.method = method
        self.data: Any = build.build_data(cfg)
        if not hasattr(self.data, "draw"):
            raise UserError(
                "protocol=federated divides labelled examples among clients, and these data have none",
                hint="data=permuted_digits, or any image set of `subspace-lab list data`",
            )
        self.seed: int = cfg.seed
        self.data.configure(0, 1, cfg.seed)
        self.data.prepare_data()
        self.data.setup("fit")
        self.scenario: Any = build.instantiate(cfg.scenario) if cfg.get("scenario") is not None else None
        self.tasks: list[TaskData] = self._tasks()
        self.model_arguments: dict[str, Any] = self.data.model_arguments()
        if self.scenario is not None and "data_classes" in self.model_arguments:
            self.model_arguments |= {"data_classes": self.scenario.outputs(self.data)}
        self.head: Head = self.scenario.head if self.scenario is not None else "single"
        torch.manual_seed(cfg.seed)
        model = build.build_model_for(cfg, self.model_arguments)
        if self.head != "single":
            model = with_task_heads(model, self.scenario.sizes(self.data))
        self.model = method.prepare(model).to(self.device)
        self.layout = Layout(self.model)
        loss_over: LossOver = self.scenario.loss_over if self.scenario is not None else "task"
        columns = [task.columns for task in self.tasks]
        self.objective = SequenceObjective(self.data.task(), method, columns, self.head, loss_over)
        self._factory = build.instantiate(cfg.optimizer)
        self._varies = str(cfg.data.get("augment", "none")) != "none"  # an example looks different every time
        self._clip: float | None = cfg.trainer.gradient_clip_val or None
        self._autocast = _AUTOCAST[cfg.trainer.precision]
        self._stacks = training.stackable(self.model) and is_elementwise(self._factory) and not self._varies
        self._shares: dict[int, list[Indices]] = {}
        self._entered: int | None = None

    def _tasks(self) -> list[TaskData]:
        if self.scenario is not None:
            tasks: list[TaskData] = self.scenario.build(self.data, self.seed)
            return tasks
        return [TaskData(str(self.data.dataset), range(getattr(self.data, "classes", 1)), self.data)]

    # -- who has what ------------------------------------------------------------------------------------------

    def share(self, client: int, task: int) -> Indices:
        """Numbers of a client's training examples in a task, ascending."""
        return self.shares(task)[client]

    def shares(self, task: int) -> list[Indices]:
        """Numbers of every client's training examples in a task."""
        if task not in self._shares:
            examples = self.tasks[task].data.parts.train
            self._shares[task] = self.federation.divide(
                len(examples), getattr(examples, "targets", None), task, self.seed
            )
        return self._shares[task]

    def steps(self, client: int, task: int) -> int:
        """Optimizer steps of a client in a round."""
        federation = self.federation
        batches = math.ceil(len(self.share(client, task)) / int(self.data.batch_size))
        return federation.local_steps or federation.local_epochs * batches

    def groups(self, clients: Sequence[int], task: int) -> list[list[int]]:
        """Clients to train at once, of about equally many steps each."""
        if not self._stacks:
            return [[client] for client in clients]
        budget = _STACK_BYTES.get(self.device.type, _STACK_BYTES["cuda"])
        size = max(1, min(_MOST_AT_ONCE, budget // (4 * self.layout.size)))
        ordered = sorted(clients, key=lambda client: (self.steps(client, task), client))
        return [ordered[first : first + size] for first in range(0, len(ordered), size)]

    # -- what they do ------------------------------------------------------------------------------------------

    def train(self, weights: Tensor, clients: Sequence[int], work: Work) -> Tensor:
        """Train clients from the same weights.

        Args:
            weights: w (size,), float32.
            clients: which.
            work: of which round.

        Returns:
            w_c − w (len(clients), size), float32, on the pool's device.
        """
        self.enter(work.task)
        weights = weights.to(self.device)
        if self._stacks:
            counts = [self.steps(client, work.task) for client in clients]
            return training.train_stacked(
                self.model,
                self.layout,
                weights,
                counts,
                self._stacked_batches(clients, work),
                self._recipe(work.lr_scale),
            )
        return torch.stack([self._train_one(weights, client, work) for client in clients])

    def _train_one(self, weights: Tensor, client: int, work: Work, after_step: Any = lambda: None) -> Tensor:
        torch.manual_seed(mix(self.seed, work.round, client, 1))  # of dropout
        batches, recipe = self._client_batches(client, work), self._recipe(work.lr_scale)
        return training.train_one(self.model, self.layout, weights, batches, recipe, after_step)

    def single_steps(self, weights: Tensor, client: int, work: Work) -> Tensor:
        """The differences w_{k+1} − w_k of each step of a client's training (N, n), without buffers."""
        self.enter(work.task)
        visited = [weights.to(self.device)]
        self._train_one(visited[0], client, work, lambda: visited.append(self.layout.read(self.model)))
        return torch.stack(visited).diff(dim=0)[:, : self.layout.parameters]

    def answer(self, weights: Tensor, clients: Sequence[int], question: Question) -> list[dict[str, Tensor]]:
        """Have clients answer a question about the model at `weights` (size,).

        What the method asks it answers itself. ``steps`` asks for the `single_steps` of their training in a round.
        """
        if question.name == "steps":
            work = question.work()
            return [{"steps": self.single_steps(weights, client, work)} for client in clients]
        self.enter(question.task)
        self.layout.write(self.model, weights.to(self.device))
        tensors = {name: tensor.to(self.device) for name, tensor in question.tensors.items()}
        return [
            self.method.answer(question.name, tensors, self.model, self._context(client, question))
            for client in clients
        ]

    def enter(self, task: int) -> None:
        """Be in a task: its outputs, what of the model is trained, its examples at hand."""
        self.objective.current = self.objective.judged = task
        if self._entered == task:
            return
        heads = find_task_heads(self.model)
        if heads is not None:
            seen = self.scenario.loss_over == "seen"
            heads.train_only(range(task + 1) if seen else range(task, task + 1))
        self.method.install(self.model, task)
        self._examples = TaskExamples(self.tasks[task].data.parts.train, self.device, varies=self._varies)
        self._groups = self.method.param_groups(self.model)
        self._entered = task

    def optimizer(self, tensors: Mapping[str, Tensor]) -> Optimizer:
        """The optimizer of tensors by name, in the method's groups."""
        made: Optimizer = self._factory(training.parameter_groups(self._groups, tensors))
        return made

    def _recipe(self, lr_scale: float) -> training.Recipe:
        return training.Recipe(self.objective.loss, self.optimizer, lr_scale, self._clip, self._autocast)

    # -- their batches -----------------------------------------------------------------------------------------

    def _rows(self, client: int, work: Work) -> list[Indices]:
        """Numbers of the examples of each step: the batches of shuffled passes; the last of a pass may be short."""
        share, size = self.share(client, work.task), self.data.batch_size
        wanted, rows = self.steps(client, work.task), list[Indices]()
        while len(rows) < wanted:
            generator = torch.Generator().manual_seed(mix(self.seed, work.round, client, len(rows), 0))
            order = share[torch.randperm(len(share), generator=generator).numpy()]
            rows += [order[first : first + size] for first in range(0, len(order), size)]
        return rows[:wanted]

    def _client_batches(self, client: int, work: Work) -> Iterator[Batch]:
        for step, rows in enumerate(self._rows(client, work)):
            yield self._examples.batch(rows, mix(self.seed, work.round, client, step, 2))

    def _stacked_batches(self, clients: Sequence[int], work: Work) -> Any:
        # As wide as the largest batch of any client of the task: what a client computes is then the same in all groups.
        width = min(self.data.batch_size, max(len(share) for share in self.shares(work.task)))
        plans = [self._rows(client, work) for client in clients]
        table = np.full((max(map(len, plans)), len(plans), width), -1, dtype=np.int64)
        for number, plan in enumerate(plans):
            for step, rows in enumerate(plan):
                table[step, number, : len(rows)] = rows
        return lambda step: self._examples.stacked(table[step])

    def _context(self, client: int, question: Question) -> TaskContext:
        task, at = self.tasks[question.task], question.task
        share, seed = self.share(client, at), mix(self.seed, at, client, 3)

        def batches(count: int | None = None, batch_size: int | None = None, purpose: str = "") -> Iterator[Batch]:
            assert count is None
            size = batch_size or _DRAW_BATCH
            for first in range(0, len(share), size):
                yield self._examples.plain(share[first : first + size])

        return TaskContext(
            index=at,
            tasks=len(self.tasks),
            columns=task.columns,
            head=self.head,
            device=self.device,
            seed=seed,
            batches=batches,
            forward=self.objective.forward,
            loss=self.objective.task_loss,
        )
