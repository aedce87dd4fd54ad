"""The entropy of predictions on unlabelled examples, and what it pulls weights to (Wang et al., ICLR 2021, Tent)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from subspace_lab.data.packing import Batch
from subspace_lab.merging.learning import draw_seed, stop_if_asked
from subspace_lab.merging.workshop import Workshop

_TOGETHER = 1 << 22  # input entries of one forward pass: all tasks of small images at once, 27 images of 224²


def entropies(logits: Tensor) -> Tensor:
    """Entropy of softmax, in nats: (n, classes) -> (n,)."""
    log_p = functional.log_softmax(logits, dim=1)
    return -(log_p.exp() * log_p).sum(1)


@dataclass(frozen=True)
class Predictions:
    """What a model predicts of one task.

    Attributes:
        entropy: mean over examples, in nats.
        marginals: share of examples that each class is predicted for; all of them in one class is a collapse.
    """

    entropy: float
    marginals: list[float]


class TestEntropy:
    """Batches of every task's test part without labels, and the entropy of what is predicted for them.

    Args:
        workshop: model and tasks.
        batch_size: examples of a task in a batch.
        use: whose batches: their order is a function of it and of the workshop's seed.
        batches: so many of every task at a time.
    """

    __test__ = False  # not for pytest

    def __init__(self, workshop: Workshop, batch_size: int, use: str, batches: int = 1) -> None:
        self.workshop, self.batches = workshop, batches
        # Running statistics are merged too, but nothing can be differentiated in them.
        self._parameters = {name for name, _ in workshop.model.named_parameters(remove_duplicate=False)}
        self._streams = [
            task.draw("test", batch_size, draw_seed(workshop, use, t)) for t, task in enumerate(workshop.tasks)
        ]

    def draw(self) -> list[tuple[int, Batch]]:
        """(task, batch) of the next batches, labels left out."""
        stop_if_asked()
        drawn = []
        for t, stream in enumerate(self._streams):
            for _ in range(self.batches):
                drawn.append((t, {name: value for name, value in next(stream).items() if name != "labels"}))
        return drawn

    def backward(self, weights: Mapping[str, Tensor]) -> Tensor:
        """Add the gradient of Σ (mean entropy of a batch) to the leaves that `weights` were computed from.

        The model sees as many tasks at a time as fit, and what led to `weights` is run backwards once.

        Returns:
            Entropy (T,) of each task under `weights`, detached.
        """
        base = self.workshop.base
        leaves = {name: w.detach().to(base[name].dtype) for name, w in weights.items()}
        trained = {name: leaf.requires_grad_() for name, leaf in leaves.items() if name in self._parameters}
        found = torch.zeros(len(self.workshop.tasks), device=self.workshop.device)
        gradients: list[Tensor | None] = [None] * len(trained)
        for group in _groups(self.draw()):
            values = [entropies(logits).mean() for logits in self._logits(leaves, group)]
            new = torch.autograd.grad(torch.stack(values).sum(), list(trained.values()), allow_unused=True)
            gradients = [b if a is None else a if b is None else a.add_(b) for a, b in zip(gradients, new, strict=True)]
            for (t, _), value in zip(group, values, strict=True):
                found[t] += value.detach() / self.batches
        found_by = zip(trained, gradients, strict=True)
        pairs = [(weights[name], g.to(weights[name].dtype)) for name, g in found_by if g is not None]
        torch.autograd.backward([w for w, _ in pairs], [g for _, g in pairs])
        return found

    def _logits(self, weights: Mapping[str, Tensor], group: Sequence[tuple[int, Batch]]) -> list[Tensor]:
        joined = {name: torch.cat([batch[name] for _, batch in group]) for name in group[0][1]}
        sizes = [len(next(iter(batch.values()))) for _, batch in group]
        features = torch.split(self.workshop.features(weights, joined), sizes)
        return [self.workshop.tasks[t].head(f).float() for (t, _), f in zip(group, features, strict=True)]

    @torch.no_grad()
    def predictions(self, weights: Mapping[str, Tensor], examples: int = 256) -> list[Predictions]:
        """What the first `examples` of each task are predicted to be; the draws of `backward` stay as they are."""
        cast = {name: w.to(self.workshop.base[name].dtype) for name, w in weights.items()}
        found = []
        for t, task in enumerate(self.workshop.tasks):
            stream = task.draw("test", min(64, task.examples["test"]), draw_seed(self.workshop, "predictions", t))
            seen = 0
            entropy = votes = torch.zeros((), device=self.workshop.device)
            while seen < min(examples, task.examples["test"]):
                logits = self.workshop.logits(cast, t, next(stream)).float()
                entropy = entropy + entropies(logits).sum()
                votes = votes + functional.one_hot(logits.argmax(1), logits.shape[1]).sum(0)
                seen += len(logits)
            found.append(Predictions(float(entropy) / seen, [round(v / seen, 4) for v in votes.tolist()]))
        return found

    def report(self, before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> dict[str, Any]:
        """For results.json: entropy and marginals of each task before and after; tells which class leads."""
        found: dict[str, Any] = {}
        pairs = zip(self.workshop.tasks, self.predictions(before), self.predictions(after), strict=True)
        for task, old, new in pairs:
            top = max(new.marginals)
            found[task.name] = {
                "entropy_before": round(old.entropy, 5),
                "entropy_after": round(new.entropy, 5),
                "marginals_before": old.marginals,
                "marginals_after": new.marginals,
            }
            self.workshop.tell(
                f"{task.name}: entropy {old.entropy:.3f} -> {new.entropy:.3f}, "
                f"{top:.0%} of the predictions are class {new.marginals.index(top)}"
            )
        return found


class Progress:
    """Tells the mean entropy about ten times in a run of steps.

    Args:
        workshop: says it.
        what: of the line.
        steps: of the run.
    """

    def __init__(self, workshop: Workshop, what: str, steps: int) -> None:
        self._tell, self._what, self._steps = workshop.tell, what, steps
        self._every = max(1, steps // 10)
        self._sum: Tensor | None = None
        self._count = 0

    def step(self, index: int, entropy: Tensor) -> None:
        """Count step `index` (from 0) with the entropy (T,) of every task."""
        self._sum = entropy if self._sum is None else self._sum + entropy
        self._count += 1
        if (index + 1) % self._every == 0 or index + 1 == self._steps:
            mean = self._sum / self._count
            self._tell(
                f"{self._what}: step {index + 1} of {self._steps}, entropy {mean.mean():.4f} "
                f"({mean.min():.3f} to {mean.max():.3f} by task)"
            )
            self._sum, self._count = None, 0


def _groups(drawn: Sequence[tuple[int, Batch]]) -> list[list[tuple[int, Batch]]]:
    """Neighbours whose inputs can be joined, up to a size."""
    groups: list[list[tuple[int, Batch]]] = []
    size = 0
    for item in drawn:
        entries = sum(value.numel() for value in item[1].values())
        shapes = {name: value.shape[1:] for name, value in item[1].items()}
        fits = groups and size + entries <= _TOGETHER
        if fits and shapes == {name: value.shape[1:] for name, value in groups[-1][-1][1].items()}:
            groups[-1].append(item)
            size += entries
        else:
            groups.append([item])
            size = entries
    return groups
