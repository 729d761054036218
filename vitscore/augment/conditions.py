"""Conditions: the names and recipes under which a run scores every image. No torch, no pixels."""

from __future__ import annotations

from dataclasses import dataclass

from vitscore.augment.operators import Augmentation

Recipe = tuple[Augmentation, ...]
"""Operators in the order in which they are carried out; none leaves the picture as it is."""


@dataclass(frozen=True)
class Condition:
    """How images are changed before they are classified."""

    name: str
    """What stands behind a model's name in the parts, `@gaussian_noise:3`; "" for the run's own predictions."""
    recipe: Recipe = ()

    @property
    def is_random(self) -> bool:
        return any(each.operator.is_random for each in self.recipe)


def cell_name(text: str) -> str:
    """`gaussian_noise:3` for the cell written `gaussian_noise:severity=3`."""
    return text.replace("severity=", "")
