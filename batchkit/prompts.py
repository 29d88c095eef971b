"""Task + template → the text of the question.

Templates are Jinja2 in its sandbox, over the fields of the row. A field that the row lacks is an error of that row.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from batchkit.errors import InputError, RowError, UsageError

Render = Callable[[dict[str, Any]], str]


def read_text_option(value: str) -> str:
    """The text of an option that takes text or `@file`."""
    if not value.startswith("@"):
        return value
    path = Path(value[1:]).expanduser()
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as exc:
        raise InputError(f"{path}: cannot be read as text: {exc}", hint="check the path behind the @") from exc


def compile_template(text: str) -> Render:
    """A function from a row's fields to the question. Raises `UsageError` with the line of a syntax error.

    The function raises `RowError` where the row lacks a field or the template fails on it.
    """
    import jinja2
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    # The text goes to a model, not into HTML: escaping would change it.
    environment = ImmutableSandboxedEnvironment(undefined=jinja2.StrictUndefined, autoescape=False)
    try:
        template = environment.from_string(text)
    except jinja2.TemplateSyntaxError as exc:
        raise UsageError(
            f"--prompt-template, line {exc.lineno}: {exc.message}",
            hint="fields are written {{ field }}; see https://jinja.palletsprojects.com/templates/",
        ) from exc

    def render(fields: dict[str, Any]) -> str:
        try:
            text = template.render(fields)
            text.encode()  # half a surrogate pair, which a template can make, cannot be sent
        except Exception as exc:  # a template may fail in any way on one row
            raise RowError("template", f"the prompt template fails: {exc}") from exc
        return text

    return render
