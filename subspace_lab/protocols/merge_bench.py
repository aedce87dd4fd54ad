"""One merge of experts: train or read them, merge, choose λ, measure."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from subspace_lab.errors import UserError
from subspace_lab.merging.workshop import TaskBench, Workshop
from subspace_lab.protocols import experts as training
from subspace_lab.protocols.merge_evaluation import (
    Scale,
    TaskFigures,
    choose_scale,
    drawer,
    figures,
    in_order,
    mean,
    normalized,
    similarities,
    task_figures,
)
from subspace_lab.protocols.outcome import Outcome

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from subspace_lab.merging.base import Merge
    from subspace_lab.merging.settings import MergeSettings
    from subspace_lab.protocols.merge import Merging
    from subspace_lab.training.trainer import TrainerPlan

State = dict[str, Tensor]
LEARNED_FILE = "learned.safetensors"


class Bench:
    """See `Merging`.

    Args:
        protocol: its options.
        cfg: the configuration.
        plan: says which device.
        method: how to merge.
        settings: which tensors are what.
        suite: the tasks.
        run_dir: where files go.
        label: of progress lines.
        resume_dir: the folder that `subspace-lab resume` would be given.
    """

    def __init__(
        self,
        protocol: Merging,
        cfg: DictConfig,
        plan: TrainerPlan,
        method: Merge,
        settings: MergeSettings,
        suite: Any,
        run_dir: Path,
        label: str,
        resume_dir: Path,
    ) -> None:
        self.protocol, self.cfg, self.method, self.settings, self.suite = protocol, cfg, method, settings, suite
        self.run_dir, self.label, self.resume_dir = run_dir, label, resume_dir
        self.quiet = plan.progress == "off"
        self.device = torch.device("cuda" if plan.accelerator == "gpu" else "cpu")
        self._check()

    def _check(self) -> None:
        """Refuse, before anything is trained, what cannot work.

        Raises:
            UserError: too few or too many tasks for the method, no base where it needs one.
        """
        names, name = self.suite.names, self.cfg.method.name
        least, most = self.method.least, self.method.most
        if len(names) < least or (most is not None and len(names) > most):
            wanted = f"{least}" if most == least else f"{least} to {most}" if most else f"at least {least}"
            raise UserError(
                f"method={name} merges {wanted} models, and data={self.suite.dataset} has {len(names)} tasks",
                hint=f"data.views=[{','.join(names[: most or least])}]" if most else None,
            )
        if self.method.needs_base and not self.suite.has_base:
            raise UserError(
                f"method={name} needs what the models were fine-tuned from, and those of data={self.suite.dataset} "
                "start from weights of their own",
                hint="data=digits_tasks, or method=weight_matching or simple_average",
            )

    def tell(self, line: str) -> None:
        """Show a line of progress."""
        if not self.quiet:
            training.tell(f"{self.label}  {line}")

    def run(self) -> Outcome:
        """Return the figures."""
        began = time.perf_counter()
        workshop, data = self._workshop()
        trained = time.perf_counter() - began
        experts = self._own_figures(workshop, data, self.protocol.part)
        base = figures(workshop, workshop.base, self.protocol.part, data) if self.suite.has_base else None
        started = time.perf_counter()
        if self.method.needs_data:
            self.method.learn(workshop)
        merged, scale = self._merge(workshop, data)
        seconds = time.perf_counter() - started
        found = figures(workshop, merged, self.protocol.part, data)
        self._write(workshop, merged)
        outcome = self._outcome(workshop, experts, base, found, scale, {"train": trained, "merge": seconds})
        if self.protocol.cross:
            outcome.sections["merge"]["cross"] = self._cross(workshop, data)
        more = getattr(self.method, "examine", None)
        if more is not None:  # what only this method is judged by: the path between two networks
            outcome.sections["merge"] |= more(workshop, lambda weights: self._curve_point(workshop, data, weights))
        return outcome

    # -- models ------------------------------------------------------------------------------------------------

    def _workshop(self) -> tuple[Workshop, list[Any]]:
        data: list[Any] = self.suite.tasks()
        for one in data:
            one.setup()
        if self.suite.has_own_models:
            model, base, models, heads = self.suite.load(self.cfg, self.settings, self.device)
        elif self.settings.models is not None:
            model, base, models, heads = self._given(data)
        else:
            model, base, models, heads = self._trained(data)
        tasks = [
            TaskBench(
                one.name,
                head.to(self.device),
                drawer(one, index, self.device),
                {part: len(getattr(one.parts, part)) for part in ("train", "validation", "test")},
            )
            for index, (one, head) in enumerate(zip(data, heads, strict=True))
        ]
        excluded = self.settings.rules.excluded
        move = [
            {name: t.to(self.device) for name, t in state.items() if not excluded(name)} for state in (base, *models)
        ]
        model = model.to(self.device)
        return Workshop(model, move[0], move[1:], tasks, int(self.cfg.seed), self.device, self.tell), data

    def _trained(self, data: Sequence[Any]) -> tuple[nn.Module, State, list[State], list[nn.Module]]:
        options = self.protocol
        made = training.Experts(
            self.cfg, self.suite, options.pretrain_epochs, options.pretrain_lr, options.gamma, self.resume_dir
        )
        first = self.suite.pretraining()
        if first is None:
            # Whole networks, heads and all: the heads are merged too.
            states = [made.train(one.name, one, number=k + 1) for k, one in enumerate(data)]
            whole = training.whole_model(self.cfg, data[0].model_arguments())
            self._told_of(made)
            return whole, states[0], states, [nn.Identity() for _ in data]
        first.setup()
        start = made.train("pretraining", first)
        model, path = training.encoder(self.cfg, first.model_arguments())
        base = training.without_head(start, path)
        model.load_state_dict(base)
        heads = self._heads(model, data)
        models = [
            training.without_head(made.train(f"{one.name} {k + 1}/{len(data)}", one, base, head), path)
            for k, (one, head) in enumerate(zip(data, heads, strict=True))
        ]
        self._told_of(made)
        return model, base, models, heads

    def _given(self, data: Sequence[Any]) -> tuple[nn.Module, State, list[State], list[nn.Module]]:
        """Experts from files, by task, of this run's model; frozen heads are made anew, from the base."""
        given, base = self.settings.models, self.settings.base
        assert given is not None
        if not self.suite.has_base:
            whole = training.whole_model(self.cfg, data[0].model_arguments())
            states = [training.read(given[one.name], f"merge.models.{one.name}", whole) for one in data]
            return whole, states[0], states, [nn.Identity() for _ in data]
        if base is None:
            raise UserError("merge.base is null: what were the models in merge.models fine-tuned from?")
        first = self.suite.pretraining()
        model, path = training.encoder(self.cfg, first.model_arguments())
        start = training.read(base, "merge.base", model, path)
        model.load_state_dict(start)
        states = [training.read(given[one.name], f"merge.models.{one.name}", model, path) for one in data]
        return model, start, states, self._heads(model, data)

    def _told_of(self, made: training.Experts) -> None:
        if made.reused:
            self.tell(f"{made.reused} trained models read from {made.folder}")

    def _heads(self, model: nn.Module, data: Sequence[Any]) -> list[nn.Module]:
        if self.suite.shared_head:
            return [self._prototypes(model, data[0])] * len(data)
        return [self._prototypes(model, one) for one in data]

    @torch.no_grad()
    def _prototypes(self, model: nn.Module, data: Any) -> nn.Module:
        found = [(model(batch["inputs"]), batch["labels"]) for batch in in_order(data, "train", torch.device("cpu"))]
        features, labels = (torch.cat(list(part)) for part in zip(*found, strict=True))
        return training.prototype_head(features, labels, data.classes, self.protocol.gamma)

    # -- merging -----------------------------------------------------------------------------------------------

    def _merge(self, workshop: Workshop, data: Sequence[Any]) -> tuple[State, Scale]:
        from subspace_lab.merging.in_memory import merge_state_dicts, update_state_dicts

        method, scales, base = self.method, self.protocol.scales, workshop.base
        labels = [task.name for task in workshop.tasks]
        options: dict[str, Any] = {"rules": self.settings.rules, "labels": labels, "device": self.device}
        if not (method.scalable and scales):
            chosen = Scale(method.scale, "given" if method.scalable else "none")
            return merge_state_dicts(method, base, workshop.models, **options), chosen
        updates = update_state_dicts(method, base, workshop.models, **options)
        validation = [one.accuracy for one in self._own_figures(workshop, data, "validation")]

        def at(scale: float) -> State:
            return {name: W + scale * updates[name].to(W) if name in updates else W for name, W in base.items()}

        def score(weights: Mapping[str, Tensor]) -> float:
            return normalized([one.accuracy for one in figures(workshop, weights, "validation", data)], validation)

        best = choose_scale(scales, at, score)
        method.scale = best.value
        self.tell(f"λ = {best.value:g} of {len(scales)} is best on validation data")
        return at(best.value), best

    def _own_figures(self, workshop: Workshop, data: Sequence[Any], part: Any) -> list[TaskFigures]:
        """Each expert on its own task."""
        return [task_figures(workshop, workshop.models[k], k, part, one) for k, one in enumerate(data)]

    def _cross(self, workshop: Workshop, data: Sequence[Any]) -> list[list[float]]:
        """Accuracy of expert i on task j."""
        return [
            [one.accuracy for one in figures(workshop, state, self.protocol.part, data)] for state in workshop.models
        ]

    def _curve_point(
        self, workshop: Workshop, data: Sequence[Any], weights: Mapping[str, Tensor]
    ) -> tuple[float, float]:
        found = figures(workshop, weights, self.protocol.part, data)
        return mean([one.loss for one in found]), mean([one.accuracy for one in found])

    # -- results -----------------------------------------------------------------------------------------------

    def _write(self, workshop: Workshop, merged: State) -> None:
        from safetensors.torch import save_file

        if self.cfg.export:
            folder = self.run_dir / "export"
            folder.mkdir(parents=True, exist_ok=True)
            whole = {**dict(workshop.model.state_dict()), **merged}
            save_file({name: t.detach().cpu().contiguous() for name, t in whole.items()}, folder / "model.safetensors")
        state = getattr(self.method, "state_dict", None)
        learned = state() if state is not None else {}
        if learned:
            save_file({n: t.detach().cpu().contiguous() for n, t in learned.items()}, self.run_dir / LEARNED_FILE)

    def _outcome(
        self,
        workshop: Workshop,
        experts: list[TaskFigures],
        base: list[TaskFigures] | None,
        merged: list[TaskFigures],
        scale: Scale,
        seconds: Mapping[str, float],
    ) -> Outcome:
        names = [task.name for task in workshop.tasks]
        own = [one.accuracy for one in experts]
        rows = {"experts": experts, "merged": merged} | ({"base": base} if base is not None else {})
        averages = {f"{of}/accuracy": mean([one.accuracy for one in row]) for of, row in rows.items()}
        reached = [one.accuracy for one in merged]
        metrics = {
            **averages,
            "merged/normalized_accuracy": normalized(reached, own),
            "merged/worst_normalized_accuracy": min(a / e if e else 0.0 for a, e in zip(reached, own, strict=True)),
            "merged/loss": mean([one.loss for one in merged]),
            "merged/entropy": mean([one.entropy for one in merged]),
            "merged/largest_marginal": max(max(one.marginals) for one in merged),
            "merged/error": 1 - mean(reached),
            **{f"merged/{name}/accuracy": one.accuracy for name, one in zip(names, merged, strict=True)},
            **{f"merge/{name}": float(value) for name, value in self.method.metrics().items()},
            "merge/seconds": seconds["merge"],
        }
        if scale.chosen != "none":
            metrics["merge/scale"] = scale.value
        section: dict[str, Any] = {
            "method": str(self.cfg.method.name),
            "part": self.protocol.part,
            "tasks": names,
            "family": self.settings.family or self.suite.dataset,
            "scale": {"value": scale.value, "chosen": scale.chosen, "curve": [list(point) for point in scale.curve]},
            "transductive": self.method.transductive,
            **{
                of: {
                    name: {
                        "accuracy": one.accuracy,
                        "loss": one.loss,
                        "entropy": one.entropy,
                        "marginals": one.marginals,
                    }
                    for name, one in zip(names, row, strict=True)
                }
                for of, row in rows.items()
            },
            "task_vectors": similarities(workshop.base, workshop.models),
            "learned": self.method.learned(),
        }
        parameters = sum(t.numel() for t in workshop.base.values())
        return Outcome(
            metrics=metrics | {"model/parameters": float(parameters)},
            timing={"steps": 0, "train_seconds": seconds["train"], "merge_seconds": seconds["merge"]},
            memory={"weight_bytes": sum(t.numel() * t.element_size() for t in workshop.base.values())},
            data=self.suite.describe(),
            objective="merged/error",
            sections={"merge": section},
        )
