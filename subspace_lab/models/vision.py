"""Image classifiers of timm and torchvision, by name, built for the data's channels, size and classes.

Weights are drawn by the library's own initialisation from torch's global generator, which the runner seeds just before:
the same seed gives the same network with the same versions of torch and of the library, and no more is promised
(models of `initialization` are the same everywhere).
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from subspace_lab.errors import UserError
from subspace_lab.models.shapes import Shape, need

_FAILURES = (RuntimeError, AssertionError, ValueError, IndexError, ZeroDivisionError)


def build_timm(
    *,
    architecture: str,
    pretrained: bool | str = False,
    drop_path: float | None = None,
    data_shape: Shape | None = None,
    data_classes: int | None = None,
) -> nn.Module:
    """Any image model of timm.

    Args:
        architecture: as `timm.list_models()` has it; with a tag (`resnet50.a1_in1k`) for one of several weights.
        pretrained: true takes timm's weights (downloaded once), a file or the folder of a run its; the head of other
            classes is new.
        drop_path: stochastic depth, the largest rate; null is the architecture's own.
        data_shape: (channels, height, width) of the data; given by the runner.
        data_classes: number of classes; given by the runner.

    Raises:
        UserError: no such architecture or weights, offline, or an architecture that does not take such images.
    """
    (channels, height, width), classes = need(data_shape, data_classes)
    import timm  # seconds of import: only for this model

    if not timm.is_model(architecture):
        raise _unknown(architecture, timm.list_models())
    arguments: dict[str, Any] = {"num_classes": classes, "in_chans": channels}
    config = timm.get_pretrained_cfg(architecture, allow_unregistered=True)
    if config is not None and config.fixed_input_size:
        arguments["img_size"] = (height, width)
    if drop_path is not None:
        arguments["drop_path_rate"] = drop_path

    def build() -> nn.Module:
        model: nn.Module = timm.create_model(architecture, pretrained=_downloads(pretrained), **arguments)
        return model

    model = _built(build, architecture, pretrained, (channels, height, width), "drop_path_rate")
    _load(model, pretrained, architecture)
    return _checked(model, architecture, (channels, height, width))


def build_torchvision(
    *,
    architecture: str,
    pretrained: bool | str = False,
    drop_path: float | None = None,
    data_shape: Shape | None = None,
    data_classes: int | None = None,
) -> nn.Module:
    """Any image classifier of torchvision; they take colour images.

    Args:
        architecture: as `torchvision.models.list_models()` has it.
        pretrained: true takes torchvision's newest weights (downloaded once), a file or the folder of a run its; the
            head of other classes is new.
        drop_path: stochastic depth, the largest rate; null is the architecture's own.
        data_shape: (3, height, width) of the data; given by the runner.
        data_classes: number of classes; given by the runner.

    Raises:
        UserError: no such architecture or weights, offline, or an architecture that does not take such images.
    """
    shape, classes = need(data_shape, data_classes)
    from torchvision import models

    names = models.list_models(module=models)
    if architecture not in names:
        raise _unknown(architecture, names)
    if shape[0] != 3:
        raise UserError(
            f"torchvision's {architecture} takes images of 3 channels, not of {shape[0]}",
            hint="model=timm, whose models take any number",
        )
    arguments: dict[str, Any] = {"num_classes": classes}
    if architecture.startswith("vit_"):
        arguments["image_size"] = shape[1]
    if drop_path is not None:
        arguments["stochastic_depth_prob"] = drop_path

    def build() -> nn.Module:
        model: nn.Module = models.get_model(architecture, weights=None, **arguments)
        return model

    model = _built(build, architecture, pretrained, shape, "stochastic_depth_prob")
    if _downloads(pretrained):
        weights: Any = models.get_model_weights(architecture).DEFAULT
        _load(model, lambda: weights.get_state_dict(progress=False), architecture)
    else:
        _load(model, pretrained, architecture)
    return _checked(model, architecture, shape)


def build_vgg13_bn(
    *,
    feature_dropout: bool = True,
    pretrained: bool | str = False,
    data_shape: Shape | None = None,
    data_classes: int | None = None,
) -> nn.Module:
    """Torchvision's VGG-13 with batch normalisation.

    Args:
        feature_dropout: dropout before the last layer; GCR's release drops it for class subspaces, not for vectors.
        pretrained: see `build_torchvision`.
        data_shape: (3, height, width) of the data; given by the runner.
        data_classes: number of classes; given by the runner.

    Raises:
        UserError: see `build_torchvision`.
    """
    model: Any = build_torchvision(
        architecture="vgg13_bn", pretrained=pretrained, data_shape=data_shape, data_classes=data_classes
    )
    if not feature_dropout:
        model.classifier[5] = nn.Identity()
    built: nn.Module = model
    return built


def _unknown(architecture: str, names: Sequence[str]) -> UserError:
    folded = architecture.lower().replace("-", "_")
    close = sorted((name for name in names if name.startswith(folded)), key=len)
    close += difflib.get_close_matches(folded, [name for name in names if name not in close], n=3, cutoff=0.6)
    close = close[:3]
    return UserError(
        f"model.architecture={architecture}: no such model",
        hint=f"did you mean {', '.join(close)}?" if close else f"there are {len(names)}, e.g. {names[0]}",
    )


def _downloads(pretrained: bool | str) -> bool:
    from torch._guards import detect_fake_mode

    return pretrained is True and detect_fake_mode() is None  # `estimate=true` wants shapes, not weights


def _built(build: Callable[[], nn.Module], name: str, pretrained: bool | str, shape: Shape, depth: str) -> nn.Module:
    from subspace_lab.models.pretrained import download

    try:
        return download(build, name) if _downloads(pretrained) else build()
    except TypeError as error:
        if depth in str(error):
            raise UserError(f"{name} has no stochastic depth", hint="model.drop_path=null") from error
        raise
    except _FAILURES as error:
        raise _refused(name, shape, error) from error


def _load(model: nn.Module, pretrained: bool | str | Callable[[], Any], name: str) -> None:
    if isinstance(pretrained, bool):
        return
    from subspace_lab.models.pretrained import download, load_state, read_weights

    if isinstance(pretrained, str):
        load_state(model, read_weights(pretrained), f"model.pretrained={pretrained}")
    else:
        load_state(model, download(pretrained, name), f"model.pretrained=true ({name})")


def _checked(model: nn.Module, name: str, shape: Shape) -> nn.Module:
    """Return the model if it classifies one image of the data's shape: what it takes is known to nobody else."""
    training = model.training
    first = next(model.parameters())
    try:
        with torch.no_grad():
            model.eval()(first.new_zeros(1, *shape))
    except _FAILURES as error:
        raise _refused(name, shape, error) from error
    finally:
        model.train(training)
    return model


def _refused(name: str, shape: Shape, error: Exception) -> UserError:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
    return UserError(
        f"{name} does not take images of {shape[1]}×{shape[2]} pixels ({reason})",
        hint="model=resnet18 takes small ones; data=imagenet has data.image_size",
    )
