"""Percentages have a true minus sign, no negative zero, and a text for undefined figures."""

from vitscore.metrics.notation import percent


def test_percentages_have_no_negative_zero_and_a_text_for_none() -> None:
    assert [percent(value) for value in (0.97449, -0.00001, -0.021, None)] == ["97.4", "0.0", "−2.1", "-"]
    assert [percent(value, 3, unit="%", missing="") for value in (0.5, None)] == ["50.000%", ""]
