"""From a solution back to the model: θ0 from its seed, P from its integers, θ = θ0 + P z, each checked by a hash."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from subspace_lab import build
from subspace_lab.compression import sid
from subspace_lab.compression.solution import FILE, Solution, buffers_of, frozen_sha256, sha256
from subspace_lab.errors import UserError
from subspace_lab.training import rng

if TYPE_CHECKING:
    from subspace_lab.methods.intrinsic import IntrinsicDimension
    from subspace_lab.subspaces.flat import FlatModel

#: what a file may name as the builder of its model: files come from anywhere, and building calls what they name
_TRUSTED = "subspace_lab.models."


def load(path: Path) -> tuple[Solution, int]:
    """Read a solution, compressed or not, and return it with the bytes of its file.

    Args:
        path: a solution.safetensors, a .sid file, or the folder of a run.

    Raises:
        UserError: none of these, or damaged.
    """
    if path.is_dir():
        candidates = [path / FILE, path / sid.FILE]
        found = next((file for file in candidates if file.is_file()), None)
        if found is None:
            near = sorted(path.glob(f"**/{FILE}"))
            hint = f"did you mean {near[-1].parent}?" if near else "runs of method=intrinsic_dimension write one"
            raise UserError(f"{path}: no {FILE} in this folder", hint=hint)
        path = found
    if sid.is_sid(path):
        compressed = sid.load(path)
        return compressed.solution, len(compressed.data)
    solution = Solution.load(path)
    return solution, path.stat().st_size


def rebuild(solution: Solution, device: torch.device | str = "cpu", theta0: Path | None = None) -> dict[str, Tensor]:
    """Return the plain weights of a solution, the very bytes it was saved with, wherever this runs.

    Args:
        solution: what `load` or `Solution.load` gave.
        device: where to compute; the weights are on it.
        theta0: a safetensors file of the initial weights, by the model's names, instead of building them.

    Raises:
        UserError: see `restore`.
    """
    model, method = restore(solution, device, theta0)
    return method.export(model)


def restore(
    solution: Solution, device: torch.device | str = "cpu", theta0: Path | None = None
) -> tuple[FlatModel, IntrinsicDimension]:
    """Return the reparametrised model at a solution, in evaluation mode, with its method; arguments as in `rebuild`.

    Raises:
        UserError: θ0, P or θ differ from what the solution was saved with; the model cannot be built.
    """
    model, method = initial(solution, theta0)
    model.to(device)
    place(model, solution)
    if sha256(model.theta_exact()) != solution.theta_sha256:
        raise UserError(
            "the rebuilt weights differ from those that were saved, though θ0 and the projection are the same",
            hint="the file was altered, or this machine's arithmetic is not IEEE 754; try --device cpu",
        )
    model.settle()
    return model, method


def initial(solution: Solution, theta0: Path | None = None) -> tuple[FlatModel, IntrinsicDimension]:
    """Return the model at θ0 on the CPU, in evaluation mode, and its method, after checking both.

    The state of the random generators is as before afterwards.
    """
    from subspace_lab.methods.intrinsic import IntrinsicDimension

    before = rng.get_state()
    try:
        rng.seed(solution.seed)
        inner = _build(solution)
    finally:
        rng.set_state(before)
    if theta0 is not None:
        _load_weights(inner, theta0)
    try:
        method = IntrinsicDimension(**solution.method)
    except TypeError as error:
        raise UserError(f"the solution's method cannot be made here: {error}") from None
    model = method.prepare(inner)
    _check(model, solution, given=theta0)
    return model.eval(), method


def place(model: FlatModel, solution: Solution) -> None:
    """Move a model to a solution: coordinates, scales, buffers.

    Raises:
        UserError: the solution has a buffer that the model has not.
    """
    own = buffers_of(model)
    strange = sorted(set(solution.buffers) - set(own))
    if strange or model.z.shape != solution.z.shape or (model.lambdas is None) != (solution.lambdas is None):
        raise UserError(f"the solution does not fit its own model ({', '.join(strange) or 'coordinates'})")
    with torch.no_grad():
        model.z.copy_(solution.z)
        if model.lambdas is not None and solution.lambdas is not None:
            model.lambdas.copy_(solution.lambdas)
        for name, value in solution.buffers.items():
            own[name].copy_(value)


def _build(solution: Solution) -> nn.Module:
    from omegaconf import OmegaConf

    node = solution.model["node"]
    for target in _targets(node):
        if not target.startswith(_TRUSTED):
            raise UserError(
                f"this file asks to call {target}, which is not one of subspace-lab's models",
                hint="in Python, build the model yourself and use subspace_lab.compression.rebuild.place",
            )
    arguments = {k: tuple(v) if isinstance(v, list) else v for k, v in solution.model["arguments"].items()}
    return build.build_model_for(OmegaConf.create({"model": node}), arguments)


def _check(model: FlatModel, solution: Solution, *, given: Path | None) -> None:
    if model.layout.digest() != solution.layout_sha256:
        raise UserError(
            f"the model built here has other weights than the solution's (D={model.layout.D}, saved D={solution.D})",
            hint="it was made with another version of subspace-lab or of the model's library",
        )
    kind = solution.method["projection"]
    if model.projection.version != solution.projection_version:
        raise UserError(
            f"the solution needs version {solution.projection_version} of projection={kind}, "
            f"this subspace-lab has version {model.projection.version}"
        )
    if model.projection.fingerprint() != solution.projection_fingerprint:
        raise UserError(f"projection={kind} is not the one the solution was trained in", hint="the file was altered")
    if model.theta0_sha256() == solution.theta0_sha256 and frozen_sha256(model) == solution.frozen_sha256:
        return
    if given is not None:
        raise UserError(f"{given}: not the initial weights that the solution was trained from (their SHA-256 differs)")
    raise UserError(
        f"θ0 could not be reproduced here from seed {solution.seed}: another torch, CPU or checkpoint makes others",
        hint="give the initial weights themselves: --theta0 FILE.safetensors",
    )


def _load_weights(model: nn.Module, path: Path) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        weights = load(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None
    except (SafetensorError, ValueError):
        raise UserError(f"{path}: not a safetensors file") from None
    parameters = dict(model.named_parameters())
    wrong = [n for n, p in parameters.items() if n not in weights or weights[n].shape != p.shape]
    if wrong:
        raise UserError(f"{path}: no weights of the right shape for {wrong[0]}", hint="by the model's own names")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(weights[name])


def _targets(node: Any) -> list[str]:
    """Return every `_target_` in nested plain containers."""
    if isinstance(node, Mapping):
        own = [str(node["_target_"])] if "_target_" in node else []
        return own + [target for value in node.values() for target in _targets(value)]
    return [target for value in node for target in _targets(value)] if isinstance(node, list) else []
