"""Features of images: what a classifier's head gets."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor, nn

from subspace_lab.data.loaders import Rows, ValidationBatches, ValidationLoader
from subspace_lab.linalg.precision import full_precision
from subspace_lab.models.heads import find_head


class Collector:
    """Puts images through a model and keeps what its head gets: in evaluation mode, without gradients or autocast.

    A context manager, which lends the model to the device and gives it back as it was.

    Args:
        model: the trained model.
        head: path of its head, None to find it.
        device: where to compute.
        batch_size: images at a time.

    Raises:
        UserError: no head.
    """

    def __init__(self, model: nn.Module, head: str | None, device: torch.device, batch_size: int) -> None:
        self._model, self._device, self._batch_size = model, device, batch_size
        self._layer = find_head(model, head)[1]
        parameter = next(model.parameters())
        self._home, self._dtype = parameter.device, parameter.dtype
        self._seen: Tensor | None = None

    def __enter__(self) -> Collector:
        self._training = self._model.training
        self._model.to(self._device).eval()
        self._hook = self._layer.register_forward_pre_hook(self._keep)
        return self

    def __exit__(self, *exception: object) -> None:
        self._hook.remove()
        self._model.to(self._home).train(self._training)

    def _keep(self, layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self._seen = inputs[0].detach()

    @full_precision
    @torch.no_grad()
    def features(self, examples: Rows, num_workers: int = 0) -> tuple[Tensor, Tensor]:
        """Return the features (N, n), float32, and the labels int64 (N,) of examples in order, on the device.

        Args:
            examples: their batches have "inputs" and "labels".
            num_workers: processes that read them.
        """
        kept, labels = [], []
        # Hooks do not fire in a compiled graph; and the compiler takes seconds to import.
        compiled = getattr(self._model, "_compiled_call_impl", None) is not None
        with torch.compiler.set_stance("force_eager") if compiled else nullcontext():
            for batch in ValidationLoader(ValidationBatches(examples, self._batch_size, 0, 1), num_workers):
                self._model(batch["inputs"].to(self._device, self._dtype))
                assert self._seen is not None
                kept.append(self._seen.flatten(1).float())
                labels.append(batch["labels"])
        self._seen = None
        return torch.cat(kept), torch.cat(labels).to(self._device)
