"""Conditions: the named recipes under which a run scores every image. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass

from vitscore.augment.operators import Augmentation

Recipe = tuple[Augmentation, ...]
"""Operators in the order in which they are applied; an empty recipe leaves the picture unchanged."""


@dataclass(frozen=True)
class Condition:
    """A named change of the images before they are classified."""

    name: str
    """The suffix of a model's name in the parts, `@gaussian_noise:3`; "" for the run's own predictions."""
    recipe: Recipe = ()

    @property
    def is_random(self) -> bool:
        return any(step.operator.is_random for step in self.recipe)


def cell_name(text: str) -> str:
    """Return the short name of a cell: `gaussian_noise:3` for `gaussian_noise:severity=3`."""
    return text.replace("severity=", "")
