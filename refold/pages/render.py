"""Rendering of pages: a template of another package that extends `base.html.jinja`."""

from typing import Any

from jinja2 import ChoiceLoader, Environment, PackageLoader

from refold.pages.palette import DARK, LIGHT


def render_template(package: str, template: str, **values: Any) -> str:
    """Returns a page as HTML; values are escaped.

    Args:
        package: The package that holds the template, such as `refold.analysis`.
        template: The template's file, which extends `base.html.jinja`.
        values: The values that the template names.
    """
    loader = ChoiceLoader([PackageLoader(package, "."), PackageLoader("refold.pages", ".")])
    environment = Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.get_template(template).render(light=LIGHT, dark=DARK, **values)
