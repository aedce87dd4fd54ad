"""Federated orthogonal training.

Bakman, Yaldiz, Ezzeldin & Avestimehr, "Federated Orthogonal Training: Mitigating Global Catastrophic Forgetting in
Continual Federated Learning", ICLR 2024, arXiv 2309.01289; released code duygunuryldz/Federated_Orthogonal_Training.
For the weight W (out, d) of a layer with inputs x, in every round of every task after the first:

    clients   ΔW_c = W_c − W after local training, unconstrained
    server    ΔW = mean of ΔW_c,    W <- W + ΔW − ΔW U Uᵀ

    after each task, with A_c (d, n_c) the layer's inputs on the examples of client c of the last round:
    clients   R_c = (I − U Uᵀ) A_c,   Y_c = R_c G_c with a random G_c (n_c, s) that stays with the client
    server    Y = Σ_c Y_c,   ρ̄ = Σ_c |R_c|² / Σ_c |A_c|²,   ε' = (ρ̄ − (1 − ε)) / ρ̄
              U <- [U, u_1 … u_k], the fewest leading left singular vectors of Y that hold ε' of its energy

==========  ==============================================================================================
symbol      here
==========  ==============================================================================================
U           ``memory[path]``
ε           ``method.threshold``
s           ``method.sketch_width`` times d
ρ̄, ε'       `subspace_lab.federated.sketches.remaining_threshold`
==========  ==============================================================================================

Only sums over clients enter the server's rule: of updates, of sketches and of energies.

``variant: release`` does what the code does where it departs from that: ρ̄ is the mean of |R_c| / |A_c| (not squared),
weighted by examples; at least one direction is added to every layer after every task; what is not protected (biases)
goes on being averaged.  With ``sketch_width: 1`` its sketches are as narrow as the code's.  Not taken over: inputs
there come from each client's own trained model, and of the MLP with dropout on.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from typing_extensions import override

from subspace_lab.continual.activations import Layers, input_size, protected_layers, stream_inputs
from subspace_lab.continual.context import TaskContext
from subspace_lab.continual.memory import BasisMemory
from subspace_lab.continual.thresholds import Spec, Thresholds
from subspace_lab.data.packing import Batch
from subspace_lab.errors import UserError
from subspace_lab.federated.sketches import InputSketch, new_directions, remaining_threshold, sketch_columns
from subspace_lab.linalg.random import derive_key
from subspace_lab.linalg.removal import Removal
from subspace_lab.methods.continual.protecting import freeze_rest, weight_of
from subspace_lab.methods.continual.remembering import RememberingMethod
from subspace_lab.methods.federated.base import FederatedMethod, Gather

_LEAST = 1e-12  # a share of the energy that takes one direction


class FOT(RememberingMethod, FederatedMethod):
    """Aggregated updates orthogonal to the inputs of all old tasks on all clients, layer by layer.

    Args:
        threshold: ε, the share of the inputs' energy to protect: a number, ``[start, step per task]``, or regular
            expressions on layers' paths with either.
        variant: paper or release, see above.
        sketch_width: columns of a client's sketch, in multiples of the layer's inputs; null: Gram matrices (d, d),
            which are exact, and smaller than sketches wider than 1.
        targets: regular expressions on the paths of the protected layers; null takes all linear and convolution layers
            but the heads of single tasks.
        server_lr: factor of the aggregated update.
    """

    name: ClassVar[str] = "fot"

    def __init__(
        self,
        threshold: Spec = 0.95,
        variant: Literal["paper", "release"] = "paper",
        sketch_width: float | None = 5.0,
        targets: Sequence[str] | None = None,
        server_lr: float = 1.0,
    ) -> None:
        FederatedMethod.__init__(self, server_lr)
        self.memory = BasisMemory()
        if sketch_width is not None and sketch_width <= 0:
            raise UserError(f"method.sketch_width={sketch_width:g}: expected a positive number, or null for exact sums")
        self.thresholds = Thresholds(threshold)
        self.variant, self.sketch_width, self.targets = variant, sketch_width, targets
        self.layers: Layers = {}
        self._removals: dict[str, tuple[Tensor, Removal]] = {}

    @override
    def prepare(self, model: nn.Module) -> nn.Module:
        """Find the layers.

        Raises:
            UserError: `targets` matches nothing, or a layer without a threshold.
        """
        self.layers = protected_layers(model, self.targets)
        for path in self.layers:
            self.thresholds.at(path, 0)
        return model

    @override
    def install(self, model: nn.Module, index: int) -> None:
        protects = any(self.thresholds.at(path, index - 1) > 0 for path in self.layers)
        if index > 0 and protects and self.variant == "paper":
            freeze_rest(model, self.layers)

    @override
    def constrain(self, update: Mapping[str, Tensor]) -> None:
        for path, U in self.memory.items():
            part = update[weight_of(path)]
            if U.shape[1]:
                remove = self._removal(path, U.to(part.device))
                # Twice: what is left may be small, and the rounding of what was taken out is not.
                part.copy_(remove(remove(part.flatten(1))).view_as(part))

    def _removal(self, path: str, U: Tensor) -> Removal:
        known = self._removals.get(path)
        if known is None or known[0].shape != U.shape or known[0].device != U.device:
            known = self._removals[path] = (U, Removal.of(U))
        return known[1]

    @override
    def load_state_dict(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        self._removals.clear()
        self.memory.load_state_dict(state["bases"])

    @override
    def answer(
        self, name: str, tensors: Mapping[str, Tensor], model: nn.Module, task: TaskContext
    ) -> dict[str, Tensor]:
        """Sketch and energies of every layer's inputs on one client's examples."""
        assert name == "sketch"
        layers, sketches = protected_layers(model, self.targets), {}
        for path, layer in layers.items():
            U, d = tensors.get(path), input_size(layer)
            U = torch.zeros(d, 0, device=task.device) if U is None else U
            generator = torch.Generator(task.device).manual_seed(derive_key("fot/1", task.seed, path))
            sketches[path] = InputSketch(U, sketch_columns(d, self.sketch_width), generator)
        examples = 0

        def counted() -> Iterator[Batch]:
            nonlocal examples
            for batch in task.batches():
                examples += len(batch["labels"])
                yield batch

        stream_inputs(model, layers, counted(), task.forward, lambda path, X: sketches[path].add(X))
        found = {f"sketch/{path}": sketch.Y for path, sketch in sketches.items()}
        return found | {f"energies/{path}": sketch.energies_of(examples) for path, sketch in sketches.items()}

    @override
    def finish_task(self, gather: Gather, index: int) -> None:
        """Extend every layer's basis by the leading directions of the summed sketch."""
        sums = gather("sketch", dict(self.memory.items()))
        for path in self.layers:
            share = remaining_threshold(self._ratio(sums[f"energies/{path}"]), self.thresholds.at(path, index))
            if self.variant == "release":
                share = max(share, _LEAST)
            found = new_directions(sums[f"sketch/{path}"], share, gram=self.sketch_width is None)
            self.memory.extend(path, found)

    def _ratio(self, energies: Tensor) -> float:
        whole, rest, examples, weighted = energies.tolist()
        if self.variant == "release":
            return float(weighted / examples)
        return float(rest / whole) if whole else 0.0
