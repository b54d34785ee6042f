"""The weights in a checkpoint: their names, and whether they are those of a model."""

from __future__ import annotations

from collections.abc import Mapping

from megascale.checkpoint.errors import CheckpointError
from megascale.checkpoint.layout import Shape
from megascale.checkpoint.load import CheckpointReader
from megascale.checkpoint.tensors import BUFFERS, WEIGHTS

__all__ = ["BUFFERS", "WEIGHTS", "check_weights"]

_CONFIG_CHANGED = "is config.yaml in the run folder the one that it was trained with?"


def check_weights(reader: CheckpointReader, shapes: Mapping[str, Shape]) -> None:
    """Check that a checkpoint holds exactly the given parameters.

    Raises:
        CheckpointError: names a weight that is missing, unknown or of another shape.
    """
    saved = {name.removeprefix(WEIGHTS) for name in reader.names() if name.startswith(WEIGHTS)}
    if saved - shapes.keys():
        unknown = ", ".join(sorted(saved - shapes.keys())[:3])
        raise CheckpointError(str(reader.path), f"holds weights that the model does not have: {unknown}", _CONFIG_CHANGED)
    for name, shape in shapes.items():
        if name not in saved:
            raise CheckpointError(str(reader.path), f"lacks the weight {name}", _CONFIG_CHANGED)
        if reader.shape(WEIGHTS + name) != shape:
            reason = f"weight {name} has shape {reader.shape(WEIGHTS + name)}, the model's has {shape}"
            raise CheckpointError(str(reader.path), reason, _CONFIG_CHANGED)
