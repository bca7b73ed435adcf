"""Miniworld: small rendered videos of moving, changing shapes, in public data sets' formats.

The embedded data set of the suite. Its labels are motion and change, which one frame alone cannot
tell, so that it separates encoders that remember from encoders that do not.
"""

from .actions import ACTIONS, CLASS_NAMES, PRETRAINING_ACTIONS
from .params import WorldParams, world_key
from .render import render_world

__all__ = [
    "ACTIONS",
    "CLASS_NAMES",
    "PRETRAINING_ACTIONS",
    "WorldParams",
    "render_world",
    "world_key",
]
