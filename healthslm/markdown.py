"""Markdown documents from Jinja templates, with filters for numbers and text."""

import re
from typing import Any

import jinja2


def environment(package: str) -> jinja2.Environment:
    """The environment of the templates in the folder `templates` of a package.

    Filters: `count` (1,234), `percent` (12.3%), `decimals` (0.123), `interval` (0.10 to 0.20) and `text` (text that
    Markdown shows unchanged, on one line).
    """
    found = jinja2.Environment(
        loader=jinja2.PackageLoader(package),
        undefined=jinja2.StrictUndefined,  # a missing number is an error, not a gap
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # Markdown
    )
    found.filters |= {
        "count": "{:,}".format,
        "percent": "{:.1%}".format,
        "decimals": "{:.3f}".format,
        "interval": _interval,
        "text": escape,
    }
    return found


def render(package: str, template: str, context: dict[str, Any]) -> str:
    """Fill in a template of a package."""
    return environment(package).get_template(template).render(context)


def _interval(ends: list[float] | None, form: str) -> str:
    """An interval with ends in a format such as ".1%"."""
    return "too few documents" if ends is None else f"{ends[0]:{form}} to {ends[1]:{form}}"


def escape(text: str) -> str:
    """Text that Markdown shows unchanged, on one line."""
    return re.sub(r"([\\`*_\[\]<>|])", r"\\\1", " ".join(text.split()))
