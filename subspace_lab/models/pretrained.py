"""Trained weights for an image classifier: from a file, a run's folder, or the network."""

from __future__ import annotations

import logging
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from subspace_lab.errors import UserError
from subspace_lab.models.heads import find_head

_NAMES = ("model.safetensors", "pytorch_model.bin")
_HINT = "model.pretrained=/a/file.safetensors or .pth; with a network model.pretrained=true downloads them once"

T = TypeVar("T")


def download(get: Callable[[], T], name: str) -> T:
    """Return what `get` fetches, or one line for being offline."""
    from subspace_lab.data.hub import hub_error

    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # every attempt of an offline machine is no news
    try:
        return get()
    except TypeError:
        raise  # an argument the architecture does not have
    except Exception as error:
        raise hub_error("", f"the weights of {name} (model.pretrained=true)", error, _HINT) from error


def read_weights(source: str) -> dict[str, Tensor]:
    """Return the named tensors of a .safetensors, .pth or .ckpt file, or of the folder of an exported model.

    Raises:
        UserError: there is no such file, or no state dict in it.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        folders = (path, path / "model", path / "export")
        path = next((folder / name for folder in folders for name in _NAMES if (folder / name).is_file()), path)
    if not path.is_file():
        raise UserError(f"model.pretrained={source}: no such file or folder with {' or '.join(_NAMES)}", hint=_HINT)
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        found: Any = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError, _safetensor_error()) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
        raise UserError(f"model.pretrained={source}: cannot be read ({reason})", hint=_HINT) from error
    for key in ("state_dict", "model"):
        if isinstance(found, Mapping) and isinstance(found.get(key), Mapping):
            found = found[key]
    if not isinstance(found, Mapping) or not all(isinstance(value, Tensor) for value in found.values()):
        raise UserError(f"model.pretrained={source}: expected named tensors", hint=_HINT)
    return {str(name).removeprefix("module."): value for name, value in found.items()}


def load_state(model: nn.Module, weights: Mapping[str, Tensor], source: str) -> None:
    """Put weights into a model; a head that does not fit (other classes, other kind) stays as it was drawn.

    Args:
        model: changed in place.
        weights: by name.
        source: what to call them in a message.

    Raises:
        UserError: something besides the head is missing, is too much or has another shape.
    """
    head = f"{find_head(model)[0]}."
    own = model.state_dict()
    fitting = {n: w for n, w in weights.items() if n in own and own[n].shape == w.shape}
    wrong = [n for n in weights if n not in fitting and not n.startswith(head)]
    missing = [n for n in own if n not in fitting and not n.startswith(head) and not n.endswith("num_batches_tracked")]
    if wrong or missing:
        name = (wrong or missing)[0]
        shapes = f"is {tuple(weights[name].shape)} there" if name in weights else "is not there"
        here = f"{tuple(own[name].shape)} here" if name in own else "not here"
        raise UserError(f"{source}: weights of another architecture: {name} {shapes}, {here}")
    if any(n.startswith(head) and n not in fitting for n in own):
        fitting = {n: w for n, w in fitting.items() if not n.startswith(head)}  # not half a head
    model.load_state_dict(fitting, strict=False)


def _safetensor_error() -> type[Exception]:
    from safetensors import SafetensorError

    error: type[Exception] = SafetensorError
    return error
