"""What a batch means: the loss to minimise and the sums that make an exact validation figure.

A task turns a batch into numbers; the training module does everything else. Language modelling is the first one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

Batch = Mapping[str, Tensor]


class Task(Protocol):
    """A loss and its exact average over a data set."""

    def loss_and_count(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the batch's mean loss (fp32 scalar) and over how many targets it is the mean (int64 scalar)."""
        ...

    def size(self, batch: Batch) -> int:
        """Return the batch's size in the unit of throughput (tokens), without touching the device."""
        ...

    def summary(self, total: Tensor, bytes_per_token: float | None) -> dict[str, float]:
        """Return the validation figures by name from `ValidationSums.local()` summed over all ranks."""
        ...


class ValidationSums:
    """Running sums of one validation pass, in float64 on the device and without a host sync per batch.

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
    """

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


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf
