"""What methods share that train scalings Q of chosen subspaces S of protected inputs beside the projected weights."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import nn
from typing_extensions import override

from subspace_lab.continual.scaled_layers import SCALABLE, Scaled, make_scalable
from subspace_lab.methods.continual.protecting import ProtectingMethod


class ScalingMethod(ProtectingMethod):
    """Base of methods whose layers are `subspace_lab.continual.scaled_layers`; arguments as in `ProtectingMethod`.

    Protected layers that are neither plain `nn.Linear` nor `nn.Conv2d` are protected only.
    """

    # With S inside span M the projected gradient of W is that of the effective weight; the layers have no input route.
    projects_inputs: ClassVar[bool] = False

    @override
    def prepare(self, model: nn.Module) -> nn.Module:
        model = super().prepare(model)
        for layer in self.layers.values():
            if type(layer) in SCALABLE:
                make_scalable(layer)
        return model

    def scaled(self) -> dict[str, Scaled]:
        """The scalable layers by path."""
        return {path: layer for path, layer in self.layers.items() if isinstance(layer, Scaled)}

    @override
    def param_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """As in `ProtectingMethod`; Q has a group of its own, without decay: it would shrink what is not in use."""
        mine = {id(Q) for layer in self.scaled().values() for Q in layer.scales}
        groups = []
        for group in super().param_groups(model):
            rest = [(name, p) for name, p in group["params"] if id(p) not in mine]
            if rest:
                groups.append({**group, "params": rest})
        own = [(name, p) for name, p in model.named_parameters() if id(p) in mine]
        return groups + ([{"params": own, "kind": "other", "weight_decay": 0.0}] if own else [])
