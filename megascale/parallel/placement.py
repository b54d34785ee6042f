"""What a rank holds of a global parameter, and who else holds the same."""

from __future__ import annotations

from dataclasses import dataclass

from megascale.parallel.mesh import Ranks

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Placement:
    """The rectangle of a global parameter that lies on this rank.

    Attributes:
        global_shape: of the whole parameter.
        offsets: where this rank's rectangle starts; its sizes are those of the rank's parameter.
        holders: all ranks of the world with exactly this rectangle, this one included. The parameter's gradient is the sum over them.
        sharded_over: those of them among which ZeRO may share the optimizer state, this rank included: the data axes, for experts the ranks
            of the stage with the same experts.
    """

    global_shape: Shape
    offsets: Shape
    holders: Ranks
    sharded_over: Ranks
