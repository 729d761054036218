"""The list of operators: their arguments with units and ranges, their severities, and their notation.

`OP:ARG=V,...` becomes an `Augmentation`. Severities 1 to 5 are those of the Common Corruptions benchmark (ImageNet-C;
Hendrycks and Dietterich, ICLR 2019; github.com/hendrycks/robustness, `corruptions.py`). The four operators that the
benchmark lacks (hue, rotate, zoom, occlusion) have the source `OWN`. Nothing here changes an image.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from vitscore.errors import UsageError

SEVERITIES = (1, 2, 3, 4, 5)
SOURCE = "ImageNet-C"
OWN = "vitscore"


@dataclass(frozen=True)
class Argument:
    """A numeric argument of an operator."""

    unit: str
    low: float
    high: float
    default: float | None = None
    """None if the argument must be given, directly or through `severity`."""

    @property
    def range(self) -> str:
        return f"{self.low:g}..{self.high:g}"


@dataclass(frozen=True)
class Operator:
    """An operator, its arguments and its severities."""

    name: str
    does: str
    arguments: Mapping[str, Argument]
    levels: tuple[tuple[float, ...], ...]
    """The arguments' values at severity 1 to 5, in the arguments' order."""
    source: str = SOURCE
    is_random: bool = False

    def at(self, severity: int) -> Augmentation:
        return Augmentation(self.name, self.levels[severity - 1])


@dataclass(frozen=True)
class Augmentation:
    """An operator with the values of its arguments, in their order."""

    name: str
    values: tuple[float, ...]

    @property
    def operator(self) -> Operator:
        return OPERATORS[self.name]

    def __str__(self) -> str:
        """Return the notation of `--augment`, with every argument."""
        pairs = zip(self.operator.arguments, self.values, strict=True)
        return f"{self.name}:" + ",".join(f"{argument}={value:g}" for argument, value in pairs)


def _levels(*values: float) -> tuple[tuple[float, ...], ...]:
    return tuple((value,) for value in values)


_LISTED = (
    Operator(
        "brightness",
        "adds to the HSV value",
        {"delta": Argument("share of full scale", -1, 1)},
        _levels(0.1, 0.2, 0.3, 0.4, 0.5),
    ),
    Operator(
        "contrast",
        "scales each channel's distance to its mean",
        {"factor": Argument("factor", 0, 4)},
        _levels(0.4, 0.3, 0.2, 0.1, 0.05),
    ),
    Operator(
        "saturation",
        "scales the HSV saturation and adds to it",
        {"factor": Argument("factor", 0, 20), "offset": Argument("share of full scale", -1, 1, 0)},
        ((0.3, 0), (0.1, 0), (2, 0), (5, 0.1), (20, 0.2)),
    ),
    Operator(
        "hue",
        "turns the colours around the grey axis (in YIQ)",
        {"angle": Argument("degrees", -180, 180)},
        _levels(18, 36, 54, 72, 90),
        OWN,
    ),
    Operator(
        "gaussian_blur",
        "Gaussian blur",
        {"sigma": Argument("pixels of 224", 0, 20)},
        _levels(1, 2, 3, 4, 6),
    ),
    Operator(
        "defocus_blur",
        "blur by a disk, itself softened by a Gaussian",
        {"radius": Argument("pixels of 224", 0, 20), "alias": Argument("pixels of 224", 0, 2, 0.5)},
        ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5)),
    ),
    Operator(
        "jpeg_compression",
        "writes and reads a JPEG, chroma at half size",
        {"quality": Argument("libjpeg's quality", 1, 100)},
        _levels(25, 18, 15, 10, 7),
    ),
    Operator(
        "pixelate",
        "averages blocks: a share of the side, and back, box filter",
        {"scale": Argument("share of the side", 0.05, 1)},
        _levels(0.6, 0.5, 0.4, 0.3, 0.25),
    ),
    Operator(
        "rotate",
        "turns counter-clockwise around the centre, black corners",
        {"angle": Argument("degrees", -180, 180)},
        _levels(6, 12, 18, 24, 30),
        OWN,
    ),
    Operator(
        "zoom",
        "enlarges the centre",
        {"factor": Argument("factor", 1, 8)},
        _levels(1.1, 1.25, 1.5, 1.75, 2),
        OWN,
    ),
    Operator(
        "occlusion",
        "a grey rectangle of the picture's shape, at a random place",
        {"share": Argument("share of the area", 0, 0.9)},
        _levels(0.05, 0.1, 0.2, 0.3, 0.4),
        OWN,
        is_random=True,
    ),
    Operator(
        "gaussian_noise",
        "adds normal noise to every value",
        {"sigma": Argument("share of full scale", 0, 1)},
        _levels(0.08, 0.12, 0.18, 0.26, 0.38),
        is_random=True,
    ),
    Operator(
        "shot_noise",
        "Poisson noise: the value is a count of photons",
        {"photons": Argument("photons at full scale", 1, 1000)},
        _levels(60, 25, 12, 5, 3),
        is_random=True,
    ),
    Operator(
        "impulse_noise",
        "salt and pepper: a share of the values becomes black or full",
        {"share": Argument("share of the values", 0, 1)},
        _levels(0.03, 0.06, 0.09, 0.17, 0.27),
        is_random=True,
    ),
)
OPERATORS: Mapping[str, Operator] = {operator.name: operator for operator in _LISTED}
WHOLE = ("jpeg_compression",)
"""Operators whose arguments must be whole numbers."""


def parse(text: str, *, option: str = "--augment") -> Augmentation:
    """Parse `OP:ARG=V,...` or `OP:severity=N`.

    Raises:
        UsageError: an operator or argument is unknown, or a value is missing or out of range; the message shows the
            list or the range.
    """
    name, _, rest = text.partition(":")
    operator = find(name.strip(), option=option)
    given = dict(_pair(item, operator, option) for item in rest.split(",") if item.strip())
    if len(given) < sum(bool(item.strip()) for item in rest.split(",")):
        raise UsageError("argument given twice", where=f"{option} {text}")
    if "severity" in given:
        severity = given.pop("severity")
        if given or severity not in SEVERITIES:
            expected = "severity=1 to severity=5, and no other argument"
            raise UsageError("wrong value", where=f"{option} {name}", expected=expected, got=rest)
        return operator.at(int(severity))
    defaults = {name: argument.default for name, argument in operator.arguments.items()}
    values = {**defaults, **given}
    missing = [argument for argument, value in values.items() if value is None]
    if missing:
        expected = f"{missing[0]}=V ({usage(operator)})"
        raise UsageError("missing argument", where=f"{option} {name}", expected=expected, got=rest or "none")
    return Augmentation(operator.name, tuple(float(value or 0) for value in values.values()))


def find(name: str, *, option: str) -> Operator:
    """Return the operator of this name.

    Raises:
        UsageError: there is none; the message lists all operators.
    """
    if name not in OPERATORS:
        raise UsageError(
            "unknown operator", where=option, expected="one of " + ", ".join(OPERATORS), got=name or "none"
        )
    return OPERATORS[name]


def usage(operator: Operator) -> str:
    """Return the arguments in one line: `sigma 0..1 share of full scale, or severity=1..5`."""
    arguments = (f"{name} {argument.range} {argument.unit}" for name, argument in operator.arguments.items())
    return ", ".join(arguments) + ", or severity=1..5"


def _pair(item: str, operator: Operator, option: str) -> tuple[str, float]:
    name, _, text = (part.strip() for part in item.partition("="))
    where = f"{option} {operator.name}"
    if name != "severity" and name not in operator.arguments:
        raise UsageError("unknown argument", where=where, expected=usage(operator), got=name)
    try:
        value = float(text)
    except ValueError:
        raise UsageError(
            "not a number", where=f"{where}:{name}", expected=usage(operator), got=text or "none"
        ) from None
    if name != "severity":
        argument = operator.arguments[name]
        if not argument.low <= value <= argument.high:  # refuses NaN, too
            expected = f"{argument.range} {argument.unit}"
            raise UsageError("value out of range", where=f"{where}:{name}", expected=expected, got=text)
        if operator.name in WHOLE and value != int(value):
            raise UsageError("not a whole number", where=f"{where}:{name}", expected=argument.range, got=text)
    return name, value


def describe() -> list[str]:
    """Return the list in lines of at most 80 columns: each operator's effect, its arguments and its five severities."""
    lines = []
    for operator in OPERATORS.values():
        lines.append(f"{operator.name:<18}{operator.does}")
        for index, (name, argument) in enumerate(operator.arguments.items()):
            levels = " ".join(f"{level[index]:g}" for level in operator.levels)
            lines.append(f"{'':<18}{name} {argument.range} ({argument.unit}): {levels}")
    own = ", ".join(operator.name for operator in OPERATORS.values() if operator.source == OWN)
    return [*lines, "After each argument: its values at severity 1 to 5, from ImageNet-C except for", f"{own}."]


def select(names: Sequence[str], *, option: str) -> list[Operator]:
    """Return some operators by name, in the list's order, or all operators if no name is given.

    Raises:
        UsageError: a name is unknown.
    """
    wanted = {find(name, option=option).name for name in names} or set(OPERATORS)
    return [operator for name, operator in OPERATORS.items() if name in wanted]
