"""The Jinja2 templates that stand beside this file. They escape whatever they are given, but for `Markup`."""

from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

TEMPLATES = Environment(
    loader=PackageLoader("safety_mech.reporting", ""),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


def render(template: str, **values: Any) -> Markup:
    return Markup(TEMPLATES.get_template(template).render(values))


def macros(template: str) -> Any:
    """A template's macros as functions that return `Markup`."""
    return TEMPLATES.get_template(template).module
