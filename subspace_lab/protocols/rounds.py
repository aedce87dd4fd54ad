"""The server of a federated run: its rounds, its tasks, and where it stands."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NoReturn

import torch
from torch import Tensor

from subspace_lab import interrupt
from subspace_lab.data.order import mix
from subspace_lab.errors import Interrupted, UserError
from subspace_lab.federated import byzantine, record
from subspace_lab.federated.exchange import Exchange, Question, Work
from subspace_lab.federated.server import GlobalModel, ServerStanding, learning_rates
from subspace_lab.methods.federated.base import Round
from subspace_lab.protocols import assembling
from subspace_lab.protocols.round_progress import RoundProgress
from subspace_lab.training import checkpoint as files

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from subspace_lab.federated.client import ClientPool
    from subspace_lab.training.trainer import TrainerPlan


class FederatedRun:
    """Runs rounds and ends tasks.

    Args:
        cfg: the validated configuration.
        plan: the resolved trainer group.
        pool: the clients; its model serves to evaluate as well.
        run_dir: where checkpoints and rows go.
        label: what progress lines call this run.
        resume_dir: the folder that `subspace-lab resume` would be given.
        part: on which accuracies are measured.

    Attributes:
        model: the global one.
        standing: where the run stands.
        velocity: of the server's momentum in this task.
        rounds: of each task.
        examples: of each task in `part`.
        last_validation: what was measured last in between.
        partition_hash: of who has which examples in which task.
    """

    def __init__(
        self,
        cfg: DictConfig,
        plan: TrainerPlan,
        pool: ClientPool,
        run_dir: Path,
        label: str,
        resume_dir: Path,
        *,
        part: Literal["test", "validation"],
    ) -> None:
        self.cfg, self.plan, self.pool, self.run_dir, self.resume_dir, self.part = (
            cfg, plan, pool, run_dir, resume_dir, part,
        )  # fmt: skip
        self.seed = int(cfg.seed)
        self.rounds = pool.federation.rounds(len(pool.tasks))
        self.examples = [len(getattr(task.data.parts, part)) for task in pool.tasks]
        self.standing = ServerStanding()
        self.velocity: Tensor | None = None
        self.last_validation: dict[str, float] = {}
        pool.method.check(len(pool.federation.sample(0, self.seed, pool.method.always())))
        self.model = GlobalModel(pool)
        self.partition_hash = record.write(pool, self.rounds, run_dir)
        self.loggers = assembling.make_loggers(cfg, run_dir, pool.method)
        self.progress = RoundProgress(plan, label, sum(self.rounds))
        self._files = files.AtomicCheckpointIO(plan.keep_checkpoints)
        self._known_rates: tuple[int, list[tuple[float, float]]] | None = None

    # -- rounds and tasks --------------------------------------------------------------------------------------

    def learn(self, exchange: Exchange) -> None:
        """Do all that is left.

        Raises:
            Interrupted: a signal asked to stop; everything is saved.
            UserError: a client or the rule failed.
        """
        at = self.standing
        while at.task < len(self.pool.tasks):
            try:
                while at.round - at.begun < self.rounds[at.task]:
                    self._round(exchange)
                self._end_task(exchange)
            except UserError:
                if interrupt.requested() is None:
                    raise
                self._stop()  # the signal has ended clients too, and nothing of this round counts

    def _round(self, exchange: Exchange) -> None:
        at, pool = self.standing, self.pool
        method, size = pool.method, pool.layout.parameters
        participants = pool.federation.sample(at.round, self.seed, method.always())
        scale, lr = self._rates(at.task)[at.round - at.begun]
        work = Work(at.task, at.round, scale)
        shares = torch.tensor(self._shares(participants), dtype=torch.float64)
        clock = time.perf_counter()
        if method.needs_each or pool.federation.byzantine:
            updates = self._collect(exchange, participants, work, lr)
            wanted = method.wants_steps()
            steps = None if wanted is None else self._single_steps(exchange, wanted, work)
            waited = time.perf_counter() - clock
            counts = tuple(pool.steps(client, at.task) for client in participants)
            about = Round(at.round, tuple(participants), counts, lr, mix(self.seed, at.round, 5), steps, scale)
            factors = shares.to(updates)
            aggregate = method.aggregate(updates[:, :size], factors, pool.layout.parts[: pool.layout.trained], about)
            update = torch.cat([aggregate, factors @ updates[:, size:]])
        else:
            total = exchange.sum_train(self.weights, participants, work, shares.tolist())
            waited = time.perf_counter() - clock
            update = total.float()
        update[:size] *= method.server_lr
        momentum = pool.federation.server_momentum
        if momentum and self.velocity is not None:
            update[:size] += momentum * self.velocity
        self.velocity = update[:size].clone() if momentum else None
        method.constrain(pool.layout.named(update))
        if not torch.isfinite(update).all():
            raise UserError(
                f"round {at.round + 1}: the aggregated update is not finite", hint="a smaller optimizer.lr or server_lr"
            )
        self.model.weights = self.weights + update
        at.client_seconds += waited
        at.server_seconds += time.perf_counter() - clock - waited
        at.round += 1
        at.bytes_down += self._vector_bytes * len(participants)
        at.bytes_up += self._vector_bytes * len(participants)
        self._after_round(update)

    def _collect(self, exchange: Exchange, participants: list[int], work: Work, lr: float) -> Tensor:
        """Every participant's update (p, size), those of Byzantine clients replaced."""
        place = {client: row for row, client in enumerate(participants)}
        updates = self.weights.new_empty(len(participants), len(self.weights))
        for client, update in exchange.train(self.weights, participants, work):
            updates[place[client]] = update
        federation, size = self.pool.federation, self.pool.layout.parameters
        if federation.byzantine:
            honest = torch.tensor([client >= federation.byzantine for client in participants], device=updates.device)
            byzantine.attack(federation.attack, updates[:, :size], honest, mix(self.seed, work.round, 6), lr)
        return updates

    def _single_steps(self, exchange: Exchange, client: int, work: Work) -> Tensor:
        question = Question("steps", work.task, work.round, lr_scale=work.lr_scale)
        ((_, answer),) = exchange.ask(self.weights, [client], question)
        return answer["steps"].to(self.weights.device)

    def _shares(self, participants: list[int]) -> list[float]:
        """What each participant's update counts, sum 1."""
        if self.pool.federation.weighting == "uniform":
            return [1 / len(participants)] * len(participants)
        counts = [len(self.pool.share(client, self.standing.task)) for client in participants]
        return [count / sum(counts) for count in counts]

    def _after_round(self, update: Tensor) -> None:
        at, plan = self.standing, self.plan
        last = at.round - at.begun == self.rounds[at.task]
        row: dict[str, float] = {}
        if plan.val_every is not None and (at.round % plan.val_every == 0 or last):
            figures = self.model.measure(at.task, "validation")
            self.last_validation = {f"val/{name}": value for name, value in figures.items()}
            row |= self.last_validation
        if at.round % plan.log_every == 0 or last:
            row |= {
                "task": float(at.task + 1),
                "update/norm": float(update.norm()),
                "communication/up_bytes": float(at.bytes_up),
                "communication/down_bytes": float(at.bytes_down),
                "server/seconds": at.server_seconds,
                "clients/seconds": at.client_seconds,
            }
        if row:
            self._log(row)
        self.progress.show(at.task, len(self.pool.tasks), at.round, self.last_validation.get("val/accuracy"))
        if interrupt.requested() is not None:
            self._stop()
        if plan.checkpoint_every and (at.round % plan.checkpoint_every == 0 or at.round == sum(self.rounds)):
            self.save()

    def _stop(self) -> NoReturn:
        self.save()
        raise Interrupted(
            f"interrupted after round {self.standing.round} of {sum(self.rounds)}, everything is saved; "
            f"continue with: subspace-lab resume {self.resume_dir}"
        )

    def _end_task(self, exchange: Exchange) -> None:
        """Let the method take in what the task leaves behind, and measure all tasks so far."""
        at, method = self.standing, self.pool.method
        began, sent = time.perf_counter(), at.bytes_up + at.bytes_down
        participants = self.pool.federation.sample(at.round - 1, self.seed, method.always())

        def gather(name: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
            question = Question(name, at.task, at.round - 1, tensors)
            sums = exchange.sum_ask(self.weights, participants, question)
            at.bytes_down += len(participants) * (self._vector_bytes + 4 * sum(t.numel() for t in tensors.values()))
            at.bytes_up += len(participants) * 4 * sum(t.numel() for t in sums.values())
            return sums

        method.finish_task(gather, at.task)
        at.task_end_seconds.append(time.perf_counter() - began)
        at.task_end_bytes.append(at.bytes_up + at.bytes_down - sent)
        row = [self.model.measure(task, self.part, after=at.task)["accuracy"] for task in range(at.task + 1)]
        at.matrix.append(row)
        at.ranks.append(method.ranks())
        figures = {f"task_{task:02d}/accuracy": accuracy for task, accuracy in enumerate(row)}
        counts = self.examples[: len(row)]
        figures["seen_accuracy"] = sum(a * n for a, n in zip(row, counts, strict=True)) / sum(counts)
        self._log(figures)
        self.progress.task_line(self.pool.tasks[at.task].name, row, at.ranks[-1], method.dimensions())
        at.task, at.begun, self.velocity = at.task + 1, at.round, None

    @property
    def weights(self) -> Tensor:
        """State w (size,) of the global model."""
        return self.model.weights

    def _rates(self, task: int) -> list[tuple[float, float]]:
        if self._known_rates is None or self._known_rates[0] != task:
            self._known_rates = (task, learning_rates(self.cfg, self.pool, task, self.rounds[task]))
        return self._known_rates[1]

    @property
    def _vector_bytes(self) -> int:
        return 4 * len(self.weights)

    def round_bytes(self) -> int:
        """Bytes of a round of training, both ways."""
        chosen = self.pool.federation.sample(0, self.seed, self.pool.method.always())
        return 2 * self._vector_bytes * len(chosen)

    def _log(self, row: dict[str, float]) -> None:
        for logger in self.loggers:
            logger.log_metrics(row, step=self.standing.round)

    # -- files -------------------------------------------------------------------------------------------------

    def save(self) -> None:
        """Write a checkpoint.

        Raises:
            UserError: the disk is full or read-only.
        """
        for logger in self.loggers:
            logger.save()
        contents = {
            "federated": asdict(self.standing),
            "weights": self.weights.cpu(),
            "velocity": None if self.velocity is None else self.velocity.cpu(),
            "method": self.pool.method.state_dict(),
            "partition": self.partition_hash,
            "validation": self.last_validation,
        }
        self._files.save_checkpoint(contents, files.path_for(self.run_dir, self.standing.round))
        if self._files.problem is not None:
            raise UserError(self._files.problem, hint="free some space, then continue with `subspace-lab resume`")

    def resume(self, path: Path | None) -> None:
        """Stand where a checkpoint was written; None is the beginning.

        Raises:
            UserError: the checkpoint is of another protocol, partition or sequence.
        """
        if path is None:
            return
        saved = files.load(path)
        if "federated" not in saved:
            raise UserError(f"checkpoint {path} is not of a federated run", hint="protocol=federated wrote none of it")
        if saved["partition"] != self.partition_hash or len(saved["weights"]) != len(self.weights):
            raise UserError(
                f"checkpoint {path} is of clients with other examples or of another model",
                hint="data, model, seed and federation as they were",
            )
        self.standing = ServerStanding(**saved["federated"])
        if self.standing.task >= len(self.pool.tasks):
            raise UserError(f"checkpoint {path} stands at task {self.standing.task + 1} of {len(self.pool.tasks)}")
        self.model.weights = saved["weights"].to(self.pool.device)
        if saved["velocity"] is not None:
            self.velocity = saved["velocity"].to(self.pool.device)
        self.pool.method.load_state_dict(saved["method"])
        self.last_validation = saved["validation"]
        for logger in self.loggers:
            if hasattr(logger, "drop_rows_after"):
                logger.drop_rows_after(self.standing.round)
