"""The Jinja environment of the report and the robustness page.

Other modules compute plain values; the files in `templates/` lay them out, and every value is escaped. Imported only
when a page is written, since Jinja is.
"""

from __future__ import annotations

from functools import cache
from importlib import resources
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from vitscore.metrics.notation import percent


@cache
def environment() -> Environment:
    made = Environment(
        loader=PackageLoader("vitscore.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {"percent": percent, "number": "{:,}".format}
    # `tojson` escapes what could end a script element. Names keep their characters and their order.
    made.policies["json.dumps_kwargs"] = {"ensure_ascii": False, "allow_nan": False, "separators": (",", ":")}
    return made


def fill(template: str, **values: Any) -> str:
    """The page that a template makes of these values."""
    return environment().get_template(template).render(values)


def assets(*names: str) -> Markup:
    """Style sheets or scripts of this package, joined; unescaped, since no outside text is in them."""
    folder = resources.files("vitscore.report")
    return Markup("\n".join(folder.joinpath(name).read_text(encoding="utf-8") for name in names))
