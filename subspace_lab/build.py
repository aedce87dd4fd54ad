"""From a validated config to objects: the only place that instantiates.

Every group's node names a ``_target_`` whose signature is its schema; nothing else here depends on the group.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from subspace_lab.errors import UserError

if TYPE_CHECKING:
    from omegaconf import DictConfig
    from torch import nn
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler

    from subspace_lab.data.module import TextDataModule
    from subspace_lab.data.supervised import SupervisedDataModule
    from subspace_lab.methods.base import Method

    DataModule = TextDataModule | SupervisedDataModule

# Extra entries of a node that are for people and other nodes, not for its target.
NOT_ARGUMENTS = ("name", "recipe")


def instantiate(node: DictConfig, **extra: Any) -> Any:
    """Build one node (and the nodes inside it); user errors pass through Hydra's wrapping unchanged."""
    import hydra
    from omegaconf import OmegaConf

    plain = OmegaConf.to_container(node, resolve=True)
    if not isinstance(plain, dict):
        raise UserError(f"expected a group with a _target_, not {plain!r}")
    arguments = {k: v for k, v in plain.items() if k not in NOT_ARGUMENTS}
    try:
        return hydra.utils.instantiate(arguments, **extra, _convert_="all")
    except Exception as error:
        for cause in _causes(error):
            if isinstance(cause, UserError):
                raise cause from None
            if isinstance(cause, ModuleNotFoundError):
                raise UserError(
                    f"{plain.get('_target_')} needs the package '{cause.name}', which is not installed",
                    hint=f"pip install {cause.name}",
                ) from error
        root = list(_causes(error))[-1]
        if isinstance(root, (ValueError, TypeError)):  # a library's own check of its arguments
            raise UserError(f"{node._get_full_key(None) or plain.get('_target_')}: {root}") from error
        raise


def _causes(error: BaseException) -> list[BaseException]:
    chain: list[BaseException] = []
    now: BaseException | None = error
    while now is not None and now not in chain:
        chain.append(now)
        now = now.__cause__ or now.__context__
    return chain


def build_data(cfg: DictConfig) -> DataModule:
    """The data module of ``data``."""
    data: DataModule = instantiate(cfg.data)
    return data


def build_model(cfg: DictConfig, data: DataModule) -> nn.Module:
    """The model of ``model``; its ``data_…`` parameters get what `data` says of itself.

    Raises:
        UserError: the model needs to know something that this data does not have (images for a language model).
    """
    return build_model_for(cfg, data.model_arguments())


def build_model_for(cfg: DictConfig, known: Mapping[str, Any]) -> nn.Module:
    """The model of ``model`` for data of which `known` is what `model_arguments()` said."""
    wanted = {name for name in _parameters(cfg.model) if name.startswith("data_")}
    if not wanted <= known.keys():
        kinds = {
            "data_vocab_size": "running text",
            "data_shape": "images",
            "data_tokens": "labelled sentences",
            "data_observation": "an environment",
            "data_sequence_tokens": "text-to-text tasks",
        }
        kind = " and ".join(kinds[name] for name in sorted(wanted & kinds.keys() - known.keys())) or "classes"
        given = " and ".join(kinds[name] for name in sorted(known.keys() & kinds.keys()))
        raise UserError(
            f"this model is for {kind}, and the data are {given}", hint="see `subspace-lab list models` and `list data`"
        )
    model: nn.Module = instantiate(cfg.model, **{name: known[name] for name in wanted})
    return model


def _parameters(node: DictConfig) -> set[str]:
    import inspect

    from hydra.utils import get_object

    return set(inspect.signature(get_object(node["_target_"])).parameters)


def build_method(cfg: DictConfig) -> Method:
    """The method of ``method``, with its subspace."""
    method: Method = instantiate(cfg.method)
    return method


def build_optimizer(cfg: DictConfig, method: Method, model: nn.Module) -> Optimizer:
    """The method's optimizer around the one of ``optimizer``."""
    try:
        return method.build_optimizer(model, instantiate(cfg.optimizer))
    except (ValueError, TypeError) as error:
        raise UserError(f"method={method.name} with this optimizer: {error}") from error


def build_scheduler(cfg: DictConfig, optimizer: Optimizer, total_steps: int) -> LRScheduler:
    """The learning-rate schedule of ``scheduler`` over `total_steps` optimizer steps."""
    schedule: LRScheduler = instantiate(cfg.scheduler)(optimizer, total_steps)
    return schedule
