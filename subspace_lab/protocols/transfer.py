"""`protocol=transfer`: train as `fit` does, then ask what the frozen features are good for.

The features are what the classifier's head gets. Linear probes of other data sets tell how well they transfer, and
statistics of the test part how much a class varies within them (Wang, Li & Zhang, ICCV 2023, Table 3).
"""

from __future__ import annotations

import dataclasses
import math
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from typing_extensions import override

from subspace_lab import interrupt
from subspace_lab.analysis.probe import Classifier
from subspace_lab.errors import Interrupted, UserError
from subspace_lab.protocols import probes as probing
from subspace_lab.protocols.fit import Fit
from subspace_lab.protocols.probes import Probes

if TYPE_CHECKING:
    import torch
    from lightning.pytorch import Trainer
    from omegaconf import DictConfig
    from torch import nn

    from subspace_lab.analysis.collecting import Collector
    from subspace_lab.build import DataModule
    from subspace_lab.protocols.outcome import Outcome
    from subspace_lab.training.module import ExperimentModule
    from subspace_lab.training.trainer import TrainerPlan


class Transfer(Fit):
    """Trains one model, then probes its features and measures their statistics, on the first process.

    Args:
        train_accuracy: measure the trained model on its whole training set too (train/accuracy and train/loss).
        probes: names of the data group; or a mapping from names of your choice to options of data modules, `data`
            among them (the name itself if it is not given). null probes the run's own data: a check that the head
            takes out of the features all that is linearly in them.
        classifier: logistic: multinomial logistic regression; svm: one linear SVM per class.
        probe_examples: training examples of each probe at most, by class in proportion; null is all.

    Raises:
        UserError: fewer than two examples.
    """

    def __init__(
        self,
        train_accuracy: bool = False,
        probes: Probes | None = None,
        classifier: Classifier = "logistic",
        probe_examples: int | None = 10_000,
    ) -> None:
        super().__init__(train_accuracy)
        if probe_examples is not None and probe_examples < 2:
            raise UserError(f"protocol.probe_examples={probe_examples}: expected at least 2, or null")
        self.probes, self.classifier, self.probe_examples = probes, classifier, probe_examples
        self._sources: dict[str, probing.Source] = {}
        self._details: dict[str, Any] = {}
        self._head: str | None = None
        self._workers = 0
        self._tells = False
        self._collects = True

    @override
    def run(self, cfg: DictConfig, run_dir: Path, *, label: str, resume_dir: Path) -> Outcome:
        """Train as `Fit.run`, evaluate the features, and return all figures.

        Args:
            cfg: the validated configuration.
            run_dir: where checkpoints, rows and the export go.
            label: what progress lines call this run.
            resume_dir: the folder that `subspace-lab resume` would be given (of the main run, for a baseline).

        Raises:
            UserError: as `Fit.run`; a probe that does not exist, is no image set or whose files are missing.
            Interrupted: a signal asked to stop; training is saved, the evaluation will be repeated.
        """
        self._run_dir, self._resume_dir = run_dir, resume_dir
        outcome = super().run(cfg, run_dir, label=label, resume_dir=resume_dir)
        outcome.sections["probes"] = self._details
        return outcome

    @override
    def _prepare(self, cfg: DictConfig, plan: TrainerPlan, data: Any) -> None:
        if not hasattr(data, "presentation"):
            raise UserError(
                "protocol=transfer evaluates features of images, and the data are something else",
                hint="protocol=fit",
            )
        # Sharded weights come together only if every process asks: then all of them look at all images.
        self._collects = plan.rank == 0 or plan.strategy == "fsdp"
        self._head, self._tells = cfg.method.get("head"), plan.progress != "off"
        self._workers = data.num_workers
        if self.probes is None:
            opened = {data.dataset: data}
        else:
            named = probing.options_by_name(self.probes)
            opened = {name: probing.open_data(cfg, name, options) for name, options in named.items()}
        if self._collects:
            self._sources = {
                name: probing.source_of(found, data.presentation, self.probe_examples) for name, found in opened.items()
            }

    @override
    def _assemble(self, *args: Any, **kwargs: Any) -> Any:
        from subspace_lab.models.heads import find_head

        parts = super()._assemble(*args, **kwargs)
        find_head(parts[0].model, self._head)  # now and not after training, if there is none
        return parts

    @override
    def _evaluate(self, trainer: Trainer, module: ExperimentModule, data: DataModule) -> None:
        try:
            super()._evaluate(trainer, module, data)
            if not self._collects:
                return
            figures = self._figures(trainer.strategy.root_device, module.model, data, trainer.is_global_zero)
        except (KeyboardInterrupt, SystemExit, Interrupted):  # the ways in which a signal ends what is not training
            raise self._interrupted() from None
        if not trainer.is_global_zero:
            return
        module.evaluation |= figures
        for logger in trainer.loggers:
            logger.log_metrics(figures, step=trainer.global_step)

    def _figures(self, device: torch.device, model: nn.Module, data: Any, fits: bool) -> dict[str, float]:
        """Collect features and, where `fits`, return their figures."""
        from subspace_lab.analysis.collecting import Collector
        from subspace_lab.analysis.features import statistics

        with Collector(model, self._head, device, 4 * data.batch_size) as collector:
            features, labels = collector.features(data.parts.test, self._workers)
            if not features.isfinite().all():
                return {"features/intra_class_angle": math.nan, "probe/accuracy": math.nan}
            found = statistics(features, labels) if fits else {}
            figures = {f"features/{name}": value for name, value in found.items()}
            for name, source in self._sources.items():
                if interrupt.requested() is not None:
                    raise KeyboardInterrupt
                # The run's own test part has been looked at already.
                test = (features, labels) if self.probes is None else None
                self._details[name] = self._probe(collector, name, source, fits, test)
        if not fits:
            return {}
        accuracies = {f"probe/{name}/accuracy": found["accuracy"] for name, found in self._details.items()}
        return figures | accuracies | {"probe/accuracy": float(np.mean([*accuracies.values()]))}

    def _probe(
        self,
        collector: Collector,
        name: str,
        source: probing.Source,
        fits: bool,
        test_part: tuple[torch.Tensor, torch.Tensor] | None,
    ) -> dict[str, Any]:
        from subspace_lab.analysis.probe import linear_probe

        began = time.perf_counter()
        train, train_labels = collector.features(source.train, source.num_workers)
        test, test_labels = test_part or collector.features(source.test, source.num_workers)
        if not fits:
            return {}
        arrays = (tensor.cpu().numpy() for tensor in (train, train_labels, test, test_labels))
        found = linear_probe(*arrays, classifier=self.classifier, name=name)
        seconds = time.perf_counter() - began
        if self._tells:
            told = f"C={found.c:g}, {found.train_examples:,} examples, {seconds:.1f} s"
            print(f"probe {name}: accuracy {found.accuracy:.4f} ({told})", file=sys.stderr, flush=True)
        more = {"classifier": self.classifier, "features": train.shape[1], "seconds": seconds, "data": source.identity}
        return dataclasses.asdict(found) | more

    def _interrupted(self) -> Interrupted:
        from subspace_lab.training import checkpoint

        if not checkpoint.list_checkpoints(self._run_dir):
            return Interrupted("interrupted during the evaluation; trainer.checkpoint_every=0 has kept no checkpoint")
        return Interrupted(
            "interrupted during the evaluation, the training is saved; "
            f"continue with: subspace-lab resume {self._resume_dir}"
        )
