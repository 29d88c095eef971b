"""Task + template → the text of the question, and where in it the images go.

Templates are Jinja2 in its sandbox, over the fields of the row. A field that the row lacks is an error of that row.
"""

from __future__ import annotations

import re
import secrets
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

from batchkit import placeholders, tasks
from batchkit.errors import InputError, RowError, UsageError
from batchkit.placeholders import AS_TEXT, Place
from batchkit.tasks import ImageReference, Task

Render = Callable[..., list[str | Place]]


class MissingImageError(RowError):
    """A placeholder without its image: what `--on-bad-image` decides about."""


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
    """A function from a row's fields, and the names of fields whose images are not among these, to the question: texts,
    and the places of `image()`.

    Raises `UsageError` with the line of a syntax error. The function raises `RowError` where the row lacks a field or
    the template fails on it.
    """
    import jinja2

    from batchkit.sandbox import Sandbox

    marks = _Marks()
    try:
        template = Sandbox(marks.mark).compile_bounded(text)
    except jinja2.TemplateSyntaxError as exc:
        raise UsageError(
            f"--prompt-template, line {exc.lineno}: {exc.message}",
            hint="fields are written {{ field }}; see https://jinja.palletsprojects.com/templates/",
        ) from exc
    except Exception as exc:  # Python's compiler gives up on what is nested too deeply, in several ways
        raise UsageError(
            f"--prompt-template cannot be compiled: {_why(exc)}", hint="make it shorter, and nest it less deeply"
        ) from exc

    def render(fields: dict[str, Any], images: Collection[str] = ()) -> list[str | Place]:
        marks.begin({*fields, *images})
        template.environment.begin()
        try:
            text = template.render(fields)
            text.encode()  # half a surrogate pair, which a template can make, cannot be sent
        except RowError:
            raise
        except Exception as exc:  # a template may fail in any way on one row
            raise RowError("template", f"the prompt template fails: {_why(exc)}") from exc
        return marks.split(text)

    return render


def _why(exc: Exception) -> str:
    return str(exc) or type(exc).__name__


class _Marks:
    """What `image()` puts into the text of a template, and finds there again.

    Marks are new for each row and cannot be guessed, so that no field can hold one. They have no letters: `|upper`
    leaves them whole.
    """

    def begin(self, fields: Collection[str]) -> None:
        self._fields = fields
        self._places: list[Place] = []
        self._secret = str(secrets.randbits(96))

    def mark(self, field: Any, entry: Any = None) -> str:
        if not isinstance(field, str) or not (entry is None or (type(entry) is int and entry >= 0)):
            raise RowError("template", 'image() takes the name of a field, and the number of an entry: image("a", 0)')
        if field not in self._fields:
            raise RowError("template", f"image({field!r}): the row has no field {field!r}")
        self._places.append(Place(field, entry))
        return f"\x02{self._secret}:{len(self._places) - 1}\x03"

    def split(self, text: str) -> list[str | Place]:
        pieces = re.split(f"\x02{self._secret}:([0-9]+)\x03", text)
        found = [int(number) for number in pieces[1::2]]
        if lost := set(range(len(self._places))) - set(found):
            place = self._places[min(lost)]
            raise RowError(
                "template", f"image({place.field!r}) is in no place: print it as it is, unfiltered and whole"
            )
        parts: list[str | Place] = []
        for index, piece in enumerate(pieces):
            parts.append(self._places[int(piece)] if index % 2 else piece)
        return [part for part in parts if part != ""]


class PromptMaker:
    """Makes of each task its texts and images, in the order in which the model is to see them.

    `placeholders` False takes `<image>` and the like as text; `image()` of a template counts always.
    """

    def __init__(self, template: str | None, *, placeholders: bool) -> None:
        self._render = compile_template(template) if template is not None else None
        self._placeholders = placeholders

    def write(self, task: Task) -> list[str | Place]:
        """The texts of a task and the places between them."""
        parts: list[str | Place] = []
        if self._render is not None:
            for part in self._render(task.fields, {*task.attached, *(image.field for image in task.images)}):
                parts += self._pieces(part) if isinstance(part, str) else [part]
        else:
            parts += self._pieces(task.question or "")
        if not any(isinstance(part, Place) or part.strip() for part in parts):
            raise RowError("template", "the prompt template gives an empty text")
        return parts

    def _pieces(self, text: str) -> list[str | Place]:
        return placeholders.split(text) if self._placeholders else [text]


def arrange(parts: Sequence[str | Place], task: Task) -> list[str | ImageReference]:
    """The parts with the images in their places; where there are no places, all images before the text.

    Raises `MissingImageError` for a place without an image, `RowError` for an image without a place.
    """
    places = [part for part in parts if isinstance(part, Place)]
    if not places:
        return [*task.images, *(part for part in parts if isinstance(part, str))]
    fields: dict[str, list[ImageReference]] = {}
    for image in task.images:
        fields.setdefault(image.field, []).append(image)
    for place in places:
        if place.field is not None and place.field not in fields:
            fields[place.field] = tasks.find_images(task.fields, (place.field,), task.attached)
    unnamed = _unnamed(task.images, places)
    arranged: list[str | ImageReference] = []
    for part in parts:
        if isinstance(part, str):
            arranged.append(part)
        elif part.field is None:
            if not unnamed:
                raise MissingImageError(
                    "placeholder", f"<image> has no image: {_counted(places, task.images)}; {AS_TEXT}"
                )
            arranged.append(unnamed.pop(0))
        else:
            arranged += _named(part, fields[part.field], task)
    if unnamed:
        raise RowError(
            "placeholder",
            f"an image of field {unnamed[0].field!r} has no placeholder: {_counted(places, task.images)}",
        )
    return arranged


def _unnamed(images: Sequence[ImageReference], places: Sequence[Place]) -> list[ImageReference]:
    """The images that `<image>` stands for: those that no place names."""
    named = {(place.field, place.entry) for place in places}
    unnamed = []
    entries: Counter[str] = Counter()
    for image in images:
        if (image.field, None) not in named and (image.field, entries[image.field]) not in named:
            unnamed.append(image)
        entries[image.field] += 1
    return unnamed


def _named(place: Place, images: Sequence[ImageReference], task: Task) -> Sequence[ImageReference]:
    chosen = images if place.entry is None else images[place.entry : place.entry + 1]
    if not chosen:
        if place.field not in task.fields and place.field not in task.attached:
            why = f"the row has no field {place.field!r}"
        else:
            why = f"the field has {_number(len(images), 'image')}" if images else "the field is empty"
        raise MissingImageError("placeholder", f"placeholder {place} has no image: {why}")
    return chosen


def _counted(places: Sequence[Place], images: Sequence[ImageReference]) -> str:
    fields = ", ".join(dict.fromkeys(image.field for image in images))
    shown = f"{_number(len(places), 'placeholder')} in the text, {_number(len(images), 'image')} in the image fields"
    return f"{shown} ({fields})" if fields else shown


def _number(count: int, thing: str) -> str:
    return f"{count or 'no'} {thing}{'s' if count > 1 else ''}"


def text_only(parts: Sequence[str | Place]) -> list[str]:
    """The texts as one, without the places."""
    text = "".join(part for part in parts if isinstance(part, str))
    if not text.strip():
        raise RowError("placeholder", "without its images, nothing is left of the question")
    return [text]
