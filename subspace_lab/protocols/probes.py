"""Which data sets a transfer run probes: from `protocol.probes` to examples as the trained model wants them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from omegaconf import DictConfig, OmegaConf, open_dict

from subspace_lab import build, schema
from subspace_lab.errors import UserError

if TYPE_CHECKING:
    from subspace_lab.data.packing import Batch
    from subspace_lab.data.presentation import Presentation
    from subspace_lab.data.splits import Indices
    from subspace_lab.data.supervised import Examples

Probes = Sequence[str] | Mapping[str, Any]


@dataclass
class Source:
    """Images of a probe.

    Attributes:
        train: to train it on.
        test: to test it on.
        num_workers: processes that read them.
        identity: hash of the training examples.
    """

    train: Chosen
    test: Examples
    num_workers: int
    identity: str


class Chosen:
    """Some of the examples.

    Args:
        examples: all of them.
        rows: int64, which.
    """

    def __init__(self, examples: Examples, rows: Indices) -> None:
        self._examples, self._rows = examples, rows

    def __len__(self) -> int:
        return len(self._rows)

    def batch(self, indices: Indices) -> Batch:
        """Those at `indices` of the chosen ones."""
        return self._examples.batch(self._rows[indices])


def open_data(cfg: DictConfig, name: str, options: Mapping[str, Any]) -> Any:
    """Return the data module of a probe, with its data found.

    Args:
        cfg: the run's configuration, whose paths hold here too.
        name: of the probe, for messages.
        options: of the data module, and `data`, the option of the data group.

    Raises:
        UserError: no such data set or option, no images, missing files.
    """
    from subspace_lab.app import compose_config
    from subspace_lab.hydra_errors import CONFIG_ERRORS, explain

    chosen = f"data={options['data']}"
    probe = cfg.copy()
    try:
        try:
            node = compose_config([chosen]).data
        except CONFIG_ERRORS as error:
            raise explain(error, [chosen], compose_config) from error
        with open_dict(probe):
            probe.data = node
            # A batch larger than the training part is refused, and there is no training here.
            own = {"batch_size": 2} if "batch_size" in node else {}
            for key, value in {**own, **options}.items():
                if key != "data":
                    OmegaConf.update(probe.data, key, value, force_add=True)
        schema.validate(probe)
        module: Any = build.build_data(probe)
        if not hasattr(module, "examples_as"):
            raise UserError(f"{chosen} has no images")
        module.configure(0, 1, cfg.seed)
        module.prepare_data()
        module.setup("test")
    except UserError as error:
        raise UserError(f"protocol.probes, {name}: {error.message}", hint=error.hint) from error
    return module


def source_of(module: Any, presentation: Presentation, at_most: int | None) -> Source:
    """Return a data module's images as a model wants them.

    Args:
        module: after `setup`.
        presentation: what the model wants.
        at_most: training examples, by class in proportion; None is all.
    """
    from subspace_lab.data.splits import stratified

    parts, own = module.examples_as(presentation), module.parts.train
    rows = np.arange(len(own))
    if at_most is not None and at_most < len(own):
        rows = np.flatnonzero(stratified(np.asarray(own.labels)[np.asarray(own.rows)], at_most, "probe_examples"))
    return Source(Chosen(parts.train, rows), parts.test, module.num_workers, parts.train.identity())


def options_by_name(probes: Probes) -> dict[str, dict[str, Any]]:
    """Return the options of each probe's data module, `data` among them.

    Raises:
        UserError: an entry that is no mapping.
    """
    if not isinstance(probes, Mapping):
        return {name: {"data": name} for name in probes}
    found = {}
    for name, options in probes.items():
        if not isinstance(options, Mapping | None):
            raise UserError(f"protocol.probes.{name}={options}: expected options", hint=f"{name}: {{data: {options}}}")
        found[str(name)] = {"data": name, **(options or {})}
    return found
