"""What a classifier has to know of its data."""

from __future__ import annotations

from subspace_lab.errors import UserError

Shape = tuple[int, int, int]


def need(shape: Shape | None, classes: int | None) -> tuple[Shape, int]:
    """Return the shape (channels, height, width) and the number of classes, both of which the data must have given.

    Raises:
        UserError: it has not.
    """
    if shape is None or classes is None:
        raise UserError("this model classifies images and takes its sizes from them", hint="data=digits or data=mnist")
    channels, height, width = shape
    return (channels, height, width), classes
