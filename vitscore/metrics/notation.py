"""Notation of figures in text: a fraction as a percentage. Used by the terminal, the report and exports alike."""

from __future__ import annotations


def percent(value: float | None, digits: int = 1, *, unit: str = "", missing: str = "-") -> str:
    """Return a fraction in percent: `97.4`, with a true minus sign and without a negative zero.

    Args:
        value: the fraction.
        digits: decimal places.
        unit: text appended to the number (`%`).
        missing: the text for None, an undefined figure.
    """
    return missing if value is None else f"{100 * value:z.{digits}f}{unit}".replace("-", "−")
