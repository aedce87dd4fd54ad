"""What a batch means: the loss to minimise and the sums that make an exact figure over a data set.

A task turns a batch into numbers; the training module does everything else.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor, nn

Batch = Mapping[str, Tensor]
ClassificationLoss = Literal["cross_entropy", "bce"]


class Sums(Protocol):
    """Running sums of one pass over a data set, on the device and without a host sync per batch."""

    def add(self, *args: Any, **kwargs: Any) -> None:
        """Add what `Task.measure` found in one batch."""
        ...

    def local(self) -> Tensor:
        """Return this process's sums (float64), to be added over processes."""
        ...


class Task(Protocol):
    """A loss and its exact average over a data set."""

    #: what `size` counts: tokens, examples
    unit: ClassVar[str]
    #: the validation figure to show while training, and what to call it
    headline: ClassVar[tuple[str, str]]

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the batch's mean loss (fp32 scalar)."""
        ...

    def measure(self, model: nn.Module, batch: Batch) -> tuple[Tensor, ...]:
        """Return what `Sums.add` takes."""
        ...

    def size(self, batch: Batch) -> int:
        """Return the batch's size in units, without touching the device."""
        ...

    def sums(self, device: torch.device) -> Sums:
        """Return sums of nothing."""
        ...

    def figures(self, total: Tensor, part: str) -> dict[str, float]:
        """Return the figures of a part (val, test, train) by name from `Sums.local()` added over all processes."""
        ...


class ValidationSums:
    """Running sums of one pass of language modelling.

    The tensor `values` (float64, 4) holds: the summed loss over targets, the number of targets, the sum of the batches'
    mean losses divided by (number of batches + 1), and the number of processes; the last two are what the GaLore
    script's figure needs once they have been added over the processes.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.nll = torch.zeros((), dtype=torch.float64, device=device)
        self.targets = torch.zeros((), dtype=torch.float64, device=device)
        self.batch_means = torch.zeros((), dtype=torch.float64, device=device)
        self.batches = 0

    def add(self, mean_loss: Tensor, count: Tensor) -> None:
        """Add one batch; a batch without targets (all padding, mean loss NaN) adds nothing but its number."""
        mean = torch.where(count > 0, mean_loss.detach().double(), 0.0)
        self.nll += mean * count
        self.targets += count
        self.batch_means += mean
        self.batches += 1

    def local(self) -> Tensor:
        """Return this process's four numbers (float64, shape (4,)), to be summed over processes."""
        script = self.batch_means / (self.batches + 1)
        ones = torch.ones_like(script)
        return torch.stack([self.nll, self.targets, script, ones])

    @staticmethod
    def figures(total: Tensor) -> tuple[float, float]:
        """Return (exact mean loss, the GaLore script's mean loss) from the sum of `local()` over processes."""
        nll, targets, script, processes = total.tolist()
        return (nll / targets if targets else math.nan), script / processes


class LanguageModeling:
    """Next-token prediction with a Hugging Face causal language model.

    The labels are not shifted (the model shifts them): the loss is over labels[:, 1:], -100 is no target.

    Args:
        bytes_per_token: UTF-8 bytes of text per token of the validation set; None leaves bits per byte out.
    """

    unit: ClassVar[str] = "tokens"
    headline: ClassVar[tuple[str, str]] = ("val/perplexity", "val ppl")

    def __init__(self, bytes_per_token: float | None = None) -> None:
        self.bytes_per_token = bytes_per_token

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the mean cross-entropy in nats over the batch's targets, fp32."""
        return self.loss_and_count(model, batch)[0]

    def measure(self, model: nn.Module, batch: Batch) -> tuple[Tensor, ...]:
        """Return `loss_and_count`."""
        return self.loss_and_count(model, batch)

    def loss_and_count(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the mean cross-entropy in nats over the batch's targets, fp32, and their number.

        Args:
            model: called as model(input_ids=…, labels=…[, attention_mask=…]) and giving `.loss`.
            batch: "input_ids" and "labels" LongTensor (b, T); optionally "attention_mask" (b, T).
        """
        loss = model(**batch).loss
        count = (batch["labels"][:, 1:] != -100).sum()
        return loss.float(), count

    def size(self, batch: Batch) -> int:
        """Return the number of tokens, padding included."""
        return batch["input_ids"].numel()

    def sums(self, device: torch.device) -> ValidationSums:
        """Return sums of nothing."""
        return ValidationSums(device)

    def figures(self, total: Tensor, part: str) -> dict[str, float]:
        """Return `summary` under the names of a part; bits per byte and the script's figure are validation's alone."""
        found = self.summary(total, self.bytes_per_token)
        if part == "val":
            return found
        return {f"{part}/{name}": found[f"val/{name}"] for name in ("loss", "perplexity")}

    def summary(self, total: Tensor, bytes_per_token: float | None) -> dict[str, float]:
        """Return val/loss, val/perplexity, val/bits_per_byte and val/perplexity_galore_script.

        `val/perplexity` is exp of the mean over all target tokens. `val/perplexity_galore_script` is what GaLore's
        training script prints (torchrun_main.py of jiaweizzhao/GaLore: its batch counter starts at 1, so the sum of the
        batches' mean losses is divided by one too many): lower than the truth, and the figure its tables compare with.

        Args:
            total: ValidationSums.local() summed over the processes (float64, (4,)).
            bytes_per_token: UTF-8 bytes of text per token of the validation set; None leaves bits per byte out.
        """
        exact, script = ValidationSums.figures(total)
        figures = {
            "val/loss": exact,
            "val/perplexity": _exp(exact),
            "val/perplexity_galore_script": _exp(script),
        }
        if bytes_per_token:
            figures["val/bits_per_byte"] = exact / math.log(2) / bytes_per_token
        return figures


class ClassificationSums:
    """Summed loss, correct answers and examples (float64, 3): counts are exact, in whatever batches they came."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.values = torch.zeros(3, dtype=torch.float64, device=device)

    def add(self, sums: Tensor) -> None:
        """Add the three sums of one batch (float64, (3,))."""
        self.values += sums

    def local(self) -> Tensor:
        """Return the three sums."""
        return self.values


class Classification:
    """One label out of several for each example: images, or sentences with a Hugging Face classifier.

    The model is called as model(batch["inputs"]) and returns logits (b, classes), or, where the batch has no "inputs",
    with all of the batch but the labels, and returns an object with `.logits`. Labels are int64 (b,), of which -100 is
    no example, or, in training, shares of the classes (b, classes) in floating point, as mixing images makes them.

    Args:
        loss: cross_entropy, in nats per example; bce: binary cross-entropy of each class by itself, in nats, the mean
            over classes.
        label_smoothing: share of every training label that is spread over all classes; evaluation has none.
    """

    unit: ClassVar[str] = "examples"
    headline: ClassVar[tuple[str, str]] = ("val/accuracy", "val acc")

    def __init__(self, loss: ClassificationLoss = "cross_entropy", label_smoothing: float = 0.0) -> None:
        self._binary, self._smoothing = loss == "bce", label_smoothing

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the mean loss in nats over the batch, fp32."""
        logits, labels = logits_of(model, batch).float(), batch["labels"]
        if self._binary:
            losses = binary_losses(logits, labels, self._smoothing)
            return losses.sum() / (labels != -100).sum() if labels.dim() == 1 else losses.mean()
        if labels.is_floating_point():
            labels = labels.float()
        return nn.functional.cross_entropy(logits, labels, label_smoothing=self._smoothing)

    def measure(self, model: nn.Module, batch: Batch) -> tuple[Tensor, ...]:
        """Return the sums over the batch of the loss (nats), correct answers and examples (float64, (3,))."""
        logits, labels = logits_of(model, batch).float(), batch["labels"]
        if self._binary:
            losses = binary_losses(logits, labels)
        else:
            losses = nn.functional.cross_entropy(logits, labels, reduction="none")  # 0 where the label is -100
        correct = logits.argmax(-1) == labels
        return (torch.stack([losses.double(), correct.double(), (labels != -100).double()]).sum(1),)

    def size(self, batch: Batch) -> int:
        """Return the number of examples."""
        return len(batch["labels"])

    def sums(self, device: torch.device) -> ClassificationSums:
        """Return sums of nothing."""
        return ClassificationSums(device)

    def figures(self, total: Tensor, part: str) -> dict[str, float]:
        """Return <part>/loss (nats per example) and <part>/accuracy (a fraction)."""
        loss, correct, examples = total.tolist()
        return {
            f"{part}/loss": loss / examples if examples else math.nan,
            f"{part}/accuracy": correct / examples if examples else math.nan,
        }


def binary_losses(logits: Tensor, labels: Tensor, smoothing: float = 0.0) -> Tensor:
    """Return each example's mean over the classes of their binary cross-entropies, 0 where the label is -100.

    Args:
        logits: float32 (b, classes).
        labels: int64 (b,), or shares (b, classes) in floating point.
        smoothing: share of the labels that is spread over all classes.

    Returns:
        float32 (b,), in nats.
    """
    classes = logits.shape[-1]
    if labels.is_floating_point():
        return nn.functional.binary_cross_entropy_with_logits(
            logits, labels.float() * (1 - smoothing) + smoothing / classes, reduction="none"
        ).mean(-1)
    shares = nn.functional.one_hot(labels.clamp(min=0), classes).float()
    return torch.where(labels != -100, binary_losses(logits, shares, smoothing), 0.0)


def logits_of(model: nn.Module, batch: Batch) -> Tensor:
    """Return a classifier's logits (b, classes) for a batch."""
    if "inputs" in batch:
        found: Any = model(batch["inputs"])
    else:
        found = model(**{name: tensor for name, tensor in batch.items() if name != "labels"})
    logits: Tensor = found if isinstance(found, Tensor) else found.logits
    return logits


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf
