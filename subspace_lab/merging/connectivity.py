"""Linear mode connectivity: loss and accuracy on the straight line between two networks.

Frankle et al., ICML 2020, arXiv 1912.05671; the barrier as in Entezari et al., ICLR 2022, arXiv 2110.06296:

    barrier  =  max over λ of   L((1 − λ) W_A + λ W_B)  −  (1 − λ) L(W_A) − λ L(W_B)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from rich.table import Table

Evaluate = Callable[[Mapping[str, Tensor]], tuple[float, float]]
"""Weights by name -> (mean loss, accuracy in [0, 1])."""

POINTS = 25

# Okabe & Ito's colours, distinguishable with any colour vision.
_COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7")


@dataclass(frozen=True)
class Connectivity:
    """What was measured on the line from A (λ = 0) to B (λ = 1).

    Attributes:
        scales: the λ, ascending from 0 to 1.
        loss: at each.
        accuracy: at each.
    """

    scales: tuple[float, ...]
    loss: tuple[float, ...]
    accuracy: tuple[float, ...]

    @property
    def barrier(self) -> float:
        """Largest excess of the loss over the line between its ends; 0 at the ends, so never negative."""
        first, last = self.loss[0], self.loss[-1]
        return max(L - (1 - s) * first - s * last for s, L in zip(self.scales, self.loss, strict=True))

    @property
    def middle(self) -> int:
        """Index of the λ nearest 1/2."""
        return min(range(len(self.scales)), key=lambda i: abs(self.scales[i] - 0.5))

    @classmethod
    def read(cls, record: Mapping[str, Any]) -> Connectivity:
        """What `record` wrote."""
        return cls(tuple(record["scales"]), tuple(record["loss"]), tuple(record["accuracy"]))

    def record(self) -> dict[str, Any]:
        """For results.json."""
        return {
            "scales": list(self.scales),
            "loss": list(self.loss),
            "accuracy": list(self.accuracy),
            "barrier": self.barrier,
            "midpoint_loss": self.loss[self.middle],
            "midpoint_accuracy": self.accuracy[self.middle],
        }


def interpolate(a: Mapping[str, Tensor], b: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
    """(1 − λ) W_A + λ W_B in A's dtype; tensors that are not of floating point are A's."""
    merged = {}
    for name, W in a.items():
        if W.is_floating_point():
            wide = W if W.dtype.itemsize >= 4 else W.float()
            merged[name] = wide.lerp(b[name].to(wide), scale).to(W.dtype)
        else:
            merged[name] = W
    return merged


def connect(a: Mapping[str, Tensor], b: Mapping[str, Tensor], evaluate: Evaluate, points: int = POINTS) -> Connectivity:
    """Measure loss and accuracy at evenly spaced λ from A to B.

    Args:
        a: state dict of one network.
        b: of another of the same shapes.
        evaluate: measures one set of weights.
        points: how many, both ends among them; at least 2.
    """
    scales = tuple(i / (points - 1) for i in range(points))
    found = [evaluate(interpolate(a, b, scale)) for scale in scales]
    return Connectivity(scales, tuple(loss for loss, _ in found), tuple(accuracy for _, accuracy in found))


def connectivity_table(curves: Mapping[str, Connectivity]) -> Table:
    """Barrier, midpoint and ends of some lines, one a row."""
    from rich.table import Table

    table = Table("line", "barrier", "midpoint loss", "midpoint accuracy", "ends", title="linear mode connectivity")
    for label, curve in curves.items():
        m = curve.middle
        ends = " ".join(f"{curve.accuracy[i]:.1%}" for i in (0, -1))
        table.add_row(label, f"{curve.barrier:.3f}", f"{curve.loss[m]:.3f}", f"{curve.accuracy[m]:.1%}", ends)
    return table


def draw_connectivity(curves: Mapping[str, Connectivity], target: Path, title: str) -> Path:
    """Draw loss (left) and accuracy (right) along some lines into one PNG.

    Args:
        curves: label -> line.
        target: the file; its folder is made.
        title: above the plots.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    loss, accuracy = figure.subplots(1, 2)
    for index, (label, curve) in enumerate(curves.items()):
        style: dict[str, Any] = {"color": _COLOURS[index % len(_COLOURS)], "lw": 1.6, "marker": "o", "ms": 3}
        loss.plot(curve.scales, curve.loss, label=f"{label}: barrier {curve.barrier:.3f}", **style)
        accuracy.plot(curve.scales, curve.accuracy, label=f"{label}: {curve.accuracy[curve.middle]:.1%}", **style)
    loss.set(xlabel="λ", ylabel="loss")
    accuracy.set(xlabel="λ", ylabel="accuracy")
    accuracy.yaxis.set_major_formatter(PercentFormatter(1.0))
    for axes in (loss, accuracy):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(fontsize=8, framealpha=0.9, edgecolor="none")
    figure.suptitle(title)
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=150)
    return target
