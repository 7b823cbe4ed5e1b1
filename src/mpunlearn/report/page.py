"""Renders a page as one HTML file that needs nothing else: no network, no fonts, no other files.

The template escapes everything that is put into it. In addition, a content security policy allows only the page's own style
and script, by their digests, and forbids every connection, so that a text that got around the escaping could neither run nor
send anything.
"""

import base64
import hashlib
import importlib.metadata
from functools import cache
from importlib import resources

import jinja2
from markupsafe import Markup

from mpunlearn.report.figure import start, svg
from mpunlearn.report.parts import Page

GENERATOR = "mpunlearn report"
"""How a page names its maker; only such files are replaced."""


def render(page: Page, date: str) -> str:
    """The page as HTML.

    Args:
        page: its content.
        date: when it was made, as it should be shown.
    """
    style, script = _file("style.css"), _file("sort.js")
    policy = "; ".join(
        (
            "default-src 'none'",
            f"style-src '{_digest(style)}'",
            f"script-src '{_digest(script)}'",
            "img-src data:",
            "base-uri 'none'",
            "form-action 'none'",
        )
    )
    return _template().render(
        page=page,
        date=date,
        version=importlib.metadata.version("mpunlearn"),
        generator=GENERATOR,
        policy=policy,
        style=Markup(style),
        script=Markup(script),
        svg=svg,
        start=start,
    )


@cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    return environment.from_string(_file("page.html.j2"))


@cache
def _file(name: str) -> str:
    return resources.files("mpunlearn.report").joinpath(name).read_text(encoding="utf-8")


def _digest(text: str) -> str:
    """The digest of an inline style or script, as a content security policy names it."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
