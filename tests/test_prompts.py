"""Templates in their sandbox, and images in the places that the text gives them."""

from __future__ import annotations

import base64
import json
import re
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchkit import gemini_requests, placeholders, preparation
from batchkit.errors import RowError, UsageError
from batchkit.measures import request_tokens
from batchkit.placeholders import Place
from batchkit.prompts import PromptMaker, arrange, compile_template
from batchkit.runs import Run
from batchkit.tasks import ImageReference, Task
from tests.conftest import WriteTasks

Picture = Callable[..., Path]
AS_TEXT = "--no-placeholders takes it as text"
UNPLACED = "an image of field {!r} has no placeholder: {} in the text, {} in the image fields ({})"
WHOLE = "{} is no whole placeholder: <image_start>[FIELD]<image_end>; " + AS_TEXT
COLOURS = ("red", "green", "blue", "black", "white")


@pytest.fixture
def colours(picture: Picture) -> dict[bytes, str]:
    """Pictures `red.png`, `green.png`, …; from their bytes to their names."""
    return {picture(f"{name}.png", colour=name).read_bytes(): name for name in COLOURS}


def shown(request: dict[str, Any], colours: dict[bytes, str]) -> list[str]:
    """What the model sees in order: texts as they are, pictures as «red»."""
    content = request["body"]["messages"][-1]["content"]
    if isinstance(content, str):
        return [content]
    return [
        part["text"]
        if part["type"] == "text"
        else f"«{colours[base64.b64decode(part['image_url']['url'].partition(',')[2])]}»"
        for part in content
    ]


def lines(run: Path) -> list[bytes]:
    opened = Run.open(run)
    return [line for seal in opened.seals() for line in opened.requests_path(seal.shard).read_bytes().split(b"\n")[:-1]]


Prepared = Callable[..., list[Any]]


@pytest.fixture
def prepared(write_tasks: WriteTasks, colours: dict[bytes, str], tmp_path: Path) -> Prepared:
    """Prepares one row after another: what each becomes, or `(code, message)` of its rejection."""

    def prepare(*rows: dict[str, Any], **options: Any) -> list[Any]:
        run = tmp_path / f"run{len(list(tmp_path.glob('run*')))}"
        preparation.prepare(write_tasks(list(rows)), run, model="m", **options)
        made = iter([shown(json.loads(line), colours) for line in lines(run)])
        rejected = {
            rejection.position: (rejection.code, rejection.message.partition(": ")[2])
            for seal in Run.open(run).seals()
            for rejection in seal.rejected
        }
        return [rejected.get(position) or next(made) for position in range(len(rows))]

    return prepare


def test_bagel_rows_name_their_images_in_the_question_and_need_no_option(prepared: Prepared) -> None:
    row = {
        "Question": "<image_start>[problem_image_2]<image_end>, then <image_start>[problem_image_1]<image_end>. Why?",
        "problem_image_1": "red.png",
        "problem_image_2": "green.png",
        "reasoning_image_1": "blue.png",
    }
    assert prepared(row, question_field="Question") == [["«green»", ", then ", "«red»", ". Why?"]]


@pytest.mark.parametrize(
    ("question", "seen"),
    [
        ("What is it?", ["«red»", "«green»", "What is it?"]),
        ("<image>What is it?<image>", ["«red»", "What is it?", "«green»"]),
        ("<image>\n<image>\nWhy?", ["«red»", "\n", "«green»", "\nWhy?"]),
        ("A <image_start>[image]<image_end> B", ["A ", "«red»", "«green»", " B"]),
        ("<image_start>[image]<image_end>?<image_start>[ image ]<image_end>", None),
        ("<image_start> [image] <image_end>", ["«red»", "«green»"]),
        ("<image> and <image_start>[b]<image_end> and <image>", ["«red»", " and ", "«blue»", " and ", "«green»"]),
        ("<image_start>[b]<image_end>1<image>2<image>3", ["«blue»", "1", "«red»", "2", "«green»", "3"]),
        ("<image_start>[b]<image_end><image><image>?<image_start>[b]<image_end>",
         ["«blue»", "«red»", "«green»", "?", "«blue»"]),
        ("<IMAGE> < image>", ["«red»", "«green»", "<IMAGE> < image>"]),
    ],
)  # fmt: skip
def test_images_go_where_the_placeholders_are(question: str, seen: list[str] | None, prepared: Prepared) -> None:
    (found,) = prepared({"image": ["red.png", "green.png"], "b": "blue.png", "question": question})
    if seen is None:
        assert found == ("placeholder", "placeholder [ image ] has no image: the row has no field ' image '")
    else:
        assert found == seen


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "What is <image>?"},
         "<image> has no image: 1 placeholder in the text, no image in the image fields; " + AS_TEXT),
        ({"image": "red.png", "question": "<image><image>?"},
         "<image> has no image: 2 placeholders in the text, 1 image in the image fields (image); " + AS_TEXT),
        ({"image": ["red.png", "green.png"], "question": "<image>?"},
         UNPLACED.format("image", "1 placeholder", "2 images", "image")),
        ({"image": "red.png", "b": "green.png", "question": "<image_start>[b]<image_end>?"},
         UNPLACED.format("image", "1 placeholder", "1 image", "image")),
        ({"question": "<image_start>[b]<image_end>?"}, "placeholder [b] has no image: the row has no field 'b'"),
        ({"b": None, "question": "<image_start>[b]<image_end>?"}, "placeholder [b] has no image: the field is empty"),
        ({"b": [], "question": "<image_start>[b]<image_end>?"}, "placeholder [b] has no image: the field is empty"),
        ({"b": "red.png", "question": "<image_start>b<image_end>?"}, WHOLE.format("<image_start>")),
        ({"b": "red.png", "question": "[b]<image_end>?"}, WHOLE.format("<image_end>")),
    ],
)  # fmt: skip
def test_a_placeholder_without_image_or_the_reverse_is_rejected_by_name(
    row: dict[str, Any], message: str, prepared: Prepared
) -> None:
    assert prepared(row) == [("placeholder", message)]


def test_a_placeholder_of_a_field_that_holds_no_image_is_rejected(prepared: Prepared) -> None:
    question = "<image_start>[b]<image_end>?"
    assert prepared({"b": 7, "question": question}, {"b": "none.png", "question": question}) == [
        ("image", "image field 'b' holds a number, not a path or a list of paths"),
        ("image", "image not found: none.png"),
    ]


def test_named_image_fields_and_placeholders_both_count(prepared: Prepared) -> None:
    placed = "<image_start>[b]<image_end>"
    rows = [
        {"a": "red.png", "b": "green.png", "question": f"{placed} or <image>?"},
        {"a": "red.png", "b": "green.png", "question": f"{placed}?"},
        {"b": "green.png", "question": f"{placed}?"},
        {"a": "red.png", "b": "green.png", "question": "?"},
    ]
    assert prepared(*rows, image_field=("a",)) == [
        ["«green»", " or ", "«red»", "?"],
        (
            "placeholder",
            "an image of field 'a' has no placeholder: 1 placeholder in the text, 1 image in the image fields (a)",
        ),
        ["«green»", "?"],
        ["«red»", "?"],
    ]


def test_without_their_images_the_texts_go_out_where_that_is_wanted(prepared: Prepared) -> None:
    rows = [
        {"question": "What is <image>?"},
        {"image": "none.png", "question": "What is <image>?"},
        {"image": "red.png", "question": "<image_start>[b]<image_end><image>Why?"},
        {"image": ["red.png", "blue.png"], "question": "<image>Why?"},
        {"question": "<image>"},
    ]
    assert prepared(*rows, on_bad_image="text-only") == [
        ["What is ?"],
        ["What is ?"],
        ["Why?"],
        (
            "placeholder",
            UNPLACED.format("image", "1 placeholder", "2 images", "image"),
        ),
        ("placeholder", "without its images, nothing is left of the question"),
    ]


def test_placeholders_can_be_text(prepared: Prepared) -> None:
    rows = [
        {"question": "What is <image> in SVG?"},
        {"image": "red.png", "question": "<image_start>[image] <image>?"},
    ]
    assert prepared(*rows, placeholders=False) == [
        ["What is <image> in SVG?"],
        ["«red»", "<image_start>[image] <image>?"],
    ]
    assert prepared(*rows, placeholders=False, prompt_template="{{ question }} {{ image('image') }}")[1] == [
        "<image_start>[image] <image>? ",
        "«red»",
    ]


@pytest.mark.parametrize(
    ("template", "seen"),
    [
        ('{{ image("b") }} or {{ image("a") }}?', ["«blue»", " or ", "«red»", "«green»", "?"]),
        ('{{ image("a", 1) }} or {{ image("a", 0) }}?', ["«green»", " or ", "«red»", "?"]),
        ('{% for one in a %}{{ loop.index }}: {{ image("a", loop.index0) }} {% endfor %}',
         ["1: ", "«red»", " 2: ", "«green»", " "]),
        ('{{ image("a", 1) }}<image>{{ image(field="b") }}', ["«green»", "«red»", "«blue»"]),
        ('{% set one = image("b") %}{{ one }}{{ one }} {{ a[0] }}<image><image>',
         ["«blue»", "«blue»", " red.png", "«red»", "«green»"]),
        ('{{ image("a") | upper | title | trim }}{% if false %}{{ image("b") }}{% endif %}', ["«red»", "«green»"]),
        ('{% macro show(name) %}[{{ image(name) }}]{% endmacro %}{{ show("b") ~ "," ~ show("a") }}',
         ["[", "«blue»", "],[", "«red»", "«green»", "]"]),
        ('{{ ["a", "b"] | length }}{% if 1 in (1, 2) %}{{ {"x": 1}.x + 2 }}{% endif %}', ["«red»", "«green»", "23"]),
    ],
)  # fmt: skip
def test_a_template_places_images(template: str, seen: list[str], prepared: Prepared) -> None:
    row = {"a": ["red.png", "green.png"], "b": "blue.png", "question": "?"}
    assert prepared(row, prompt_template=template, image_field=("a",)) == [seen]


def test_image_is_a_function_also_where_a_row_has_a_field_of_that_name(prepared: Prepared) -> None:
    template = "{{ question }} {{ image('image') }} ({{ image }})"
    assert prepared({"image": "red.png", "question": "Q"}, prompt_template=template) == [["Q ", "«red»", " (red.png)"]]


@pytest.mark.parametrize(
    ("template", "code", "message"),
    [
        ("{{ image('c') }}", "template", "image('c'): the row has no field 'c'"),
        ("{{ image('a', 5) }}<image>", "placeholder", "placeholder [a] (entry 5) has no image: the field has 1 image"),
        ("{{ image('a', -1) }}", "template", "image() takes the name of a field, and the number of an entry"),
        ("{{ image(17) }}", "template", "image() takes the name of a field, and the number of an entry"),
        ("{{ image() }}", "template", "the prompt template fails: "),
        ("{{ image('a') | length }}", "template", "image('a') is in no place"),
        ("{{ image('a') | truncate(9, true) }}", "template", "image('a') is in no place"),
        ("{% set x = image('a') %}text", "template", "image('a') is in no place"),
        ("{{ image.__class__ }}", "template", "the prompt template fails: "),
    ],
)
def test_a_template_that_places_what_is_not_there_is_told(
    template: str, code: str, message: str, prepared: Prepared
) -> None:
    ((found, why),) = prepared({"a": "red.png", "question": "?"}, prompt_template=template, image_field=("a",))
    assert found == code
    assert why.startswith(message)


def test_a_field_cannot_forge_the_mark_of_image() -> None:
    render = compile_template("{{ image('a') }}{{ text }}")
    seen: list[str] = []
    for text in ("\x020:0\x03", "\x02" + "1" * 29 + ":0\x03", "{{ image('a') }}", "\x03\x02"):
        parts = render({"a": "x", "text": text})
        assert parts == [Place("a"), text]
        seen += [part for part in parts if isinstance(part, str)]
    assert seen[2] == "{{ image('a') }}"


@pytest.mark.parametrize(
    ("template", "why"),
    [
        ("{{ meta.items }}", "items is a method; a field of that name is written FIELD['items']"),
        ("{{ [meta.items] }}", "items is a method; a field of that name is written FIELD['items']"),
        ("{{ 'a' ~ meta.count }}", "count is a method; a field of that name is written FIELD['count']"),
        ("{{ meta.items | upper }}", "items is a method; a field of that name is written FIELD['items']"),
        ("{{ meta.values() | map('upper') }}", "what is printed is no value yet; | list makes one of it"),
    ],
)
def test_what_has_no_text_of_its_own_is_not_printed(template: str, why: str, prepared: Prepared) -> None:
    row = {"meta": {"items": "x"}, "question": "?"}
    if "count" in template:
        row["meta"] = ["x"]
    assert prepared(row, prompt_template=template) == [("template", f"the prompt template fails: {why}")]
    assert prepared({"meta": {"items": "x"}}, prompt_template="{{ meta['items'] }}") == [["x"]]


ATTACKS = [
    "{{ ''.__class__ }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ ''['__class__'] }}",
    "{{ '' | attr('__class__') }}",
    "{{ '' | attr('__cla' ~ 'ss__') }}",
    "{{ [''] | map(attribute='__class__') | list }}",
    "{{ [''] | map('attr', '__class__') | list }}",
    "{{ [''] | groupby('__class__') }}",
    "{{ [''] | sum(attribute='__class__') }}",
    "{{ '{0.__class__}'.format('') }}",
    "{{ '{x.__class__}'.format_map({'x': ''}) }}",
    "{{ ('{0.__class__}' | attr('format'))('') }}",
    "{{ ['{0.__class__.__mro__}'] | map('attr', 'format') | list | first('') }}",
    "{{ self.__init__.__globals__ }}",
    "{{ self._TemplateReference__context }}",
    "{{ cycler.__init__.__globals__ }}",
    "{{ joiner.__init__.__globals__.os }}",
    "{{ namespace.__init__.__globals__ }}",
    "{{ lipsum.__globals__ }}",
    "{{ lipsum() }}",
    "{{ range.__globals__ }}",
    "{{ image.__globals__ }}",
    "{{ image('q').__class__ }}",
    "{{ dict.__subclasses__() }}",
    "{{ dict.mro() }}",
    "{{ (range.func_globals).x }}",
    "{% macro m() %}{% endmacro %}{{ m.__globals__ }}{{ m.__init__.__globals__ }}",
    "{% macro m() %}{{ caller.__globals__ }}{% endmacro %}{% call m() %}{% endcall %}",
    "{% for x in [1] %}{{ loop.__init__.__globals__ }}{% endfor %}",
    "{{ q.__init_subclass__() }}",
    "{{ xs.append(1) }}",
    "{{ fields.update({'a': 1}) }}",
    "{{ xs.clear() }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}{{ os.system('true') }}",
    "{% extends 'x' %}",
    "{{ environment }}",
    "{{ ().__class__.__base__ }}",
    "{{ (1).__class__ }}",
    "{{ q | random }}",
]  # fmt: skip

FLOODS = [
    "{{ 'a' * 10**10 }}",
    "{{ 10**10 * 'a' }}",
    "{{ [0] * 10**10 }}",
    "{{ 10**(10**10) }}",
    "{{ 9**(9**9) }}",
    "{{ (2**100000) ** 100000 }}",
    "{{ q * n }}",
    "{{ range(10**9) }}",
    "{{ range(10**9) | list }}",
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{% for a in range(99999) %}{% for b in range(99999) %}xxxxxxxxxxxxxxxxxxxxxxx{% endfor %}{% endfor %}",
    "{% for a in range(99999) %}{% for b in range(99999) if b < 0 %}{% endfor %}{% endfor %}",
    "{% for a in [1, 2] recursive %}{% if loop.depth < 60 %}{{ loop([1, 2]) }}{% endif %}{% endfor %}",
    "{% for a in [1] recursive %}{{ loop([1]) }}{% endfor %}",
    "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "{% block b %}{{ self.b() }}{% endblock %}",
    "{% set s = namespace(x='abcdefgh') %}{% for i in range(60) %}{% set s.x = s.x ~ s.x %}{% endfor %}",
    "{% set s = namespace(x='abcdefgh') %}{% for i in range(60) %}{% set s.x = s.x + s.x %}{% endfor %}",
    "{% set s = namespace(x='abcdefgh') %}{% for i in range(60) %}{% set s.x = '%s%s' % (s.x, s.x) %}{% endfor %}",
    "{% set s = namespace(x='ab') %}{% for i in range(60) %}{% set s.x = '%s%s' | format(s.x, s.x) %}{% endfor %}",
    "{% set s = namespace(x='abcdefgh') %}{% for i in range(60) %}{% set s.x = '{0}{0}'.format(s.x) %}{% endfor %}",
    "{% set s = namespace(x='ab') %}{% for i in range(60) %}{% set s.x = s.x.replace('', s.x) %}{% endfor %}",
    "{% set s = namespace(x='ab') %}{% for i in range(60) %}{% set s.x = s.x | replace('a', s.x) %}{% endfor %}",
    "{% set s = namespace(x='ab') %}{% for i in range(60) %}{% set s.x = s.x.join(s.x) %}{% endfor %}",
    "{% set s = namespace(x='ab') %}{% for i in range(60) %}{% set s.x = [s.x, s.x] | join %}{% endfor %}",
    "{% set s = namespace(x='ab') %}{% for i in range(60) %}{% set s.x = s.x | urlencode ~ s.x %}{% endfor %}",
    "{% set s = namespace(x=q) %}{% for i in xs*20 %}{% set t %}{{ s.x*2 }}{% endset %}{% set s.x = t %}{% endfor %}",
    "{% set s = namespace(x=[1]) %}{% for i in range(60) %}{% set s.x = [s.x, s.x] %}{% endfor %}{{ s.x }}",
    "{% set s = namespace(x=(1,)) %}{% for i in range(60) %}{% set s.x = (s.x, s.x) %}{% endfor %}{{ s.x == s.x }}",
    "{% set s = namespace(x={}) %}{% for i in range(60) %}{% set s.x = {'a': s.x, 'b': s.x} %}{% endfor %}",
    "{% set s = namespace(x={}) %}{% for i in range(60) %}{% set s.x = dict(a=s.x, b=s.x) %}{% endfor %}",
    "{% set s = namespace(x=2) %}{% for i in range(60) %}{% set s.x = s.x * s.x %}{% endfor %}",
    "{{ '%10000000000d' % 1 }}",
    "{{ '%(a)10000000000d' % {'a': 1} }}",
    "{{ '%*d' % (10**10, 1) }}",
    "{{ '%.10000000000f' % 1 }}",
    "{{ '%10000000000d' | format(1) }}",
    "{{ '{:10000000000}'.format(1) }}",
    "{{ '{:{}}'.format(1, 10**10) }}",
    "{{ '{x:>10000000000}'.format_map({'x': 1}) }}",
    "{{ q.center(10**10) }}",
    "{{ q.ljust(n) }}",
    "{{ q.zfill(10**10) }}",
    "{{ '\t'.expandtabs(10**10) }}",
    "{{ (1).to_bytes(10**10, 'big') }}",
    "{{ q | center(10**10) }}",
    "{{ q | indent(10**10, true) }}",
    "{{ [1] | batch(10**10, 0) | list }}",
    "{{ [1] | slice(10**10) | list }}",
    "{{ xs | tojson(10**10) }}",
    "{{ 1 | round(10**10) }}",
    "{{ 1 | round(10**9, 'ceil') }}",
    "{{ range(99999) | map('center', 99999) | join }}",
    "{{ range(99999) | map('string') | join('x' * 999999) }}",
    "{% set big = range(99999) | list %}{{ range(99999) | select('in', big) | list | length }}",
    "{% for a in range(99999) %}{{ range(99999) | list | length }}{% endfor %}",
    "{% for a in range(99999) %}{{ range(99999) | sum }}{% endfor %}",
    "{{ q | replace('', q * 9999) | replace('', q * 9999) }}",
]  # fmt: skip

ROW = {"q": "question", "xs": [1, 2, 3], "fields": {"a": 0}, "n": 10**12}


@pytest.mark.parametrize("template", ATTACKS)
def test_a_template_that_reaches_for_the_inside_of_python_is_refused_or_rejects_the_row(template: str) -> None:
    try:
        render = compile_template(template)
    except UsageError:
        return
    try:
        parts = render(dict(ROW))
    except RowError as exc:
        assert exc.code == "template"  # noqa: PT017  # one that does not compile is refused, too
    else:
        pytest.fail(f"the template made {parts}")


@pytest.mark.parametrize("template", FLOODS)
@pytest.mark.timeout(60)
def test_a_template_that_floods_ends_soon_and_in_little_memory(template: str) -> None:
    started = time.thread_time()
    render = compile_template(template)
    with pytest.raises(RowError, match="the prompt template fails: ") as caught:
        render(dict(ROW))
    assert caught.value.code == "template"
    assert time.thread_time() - started < 30


@pytest.mark.parametrize(
    "template",
    [
        "{{ 'abc' * 10**9 }}",
        "{% set s = namespace(x='abcdefgh') %}{% for i in range(60) %}{% set s.x = s.x ~ s.x %}{% endfor %}",
        "{% set s = namespace(x=[1]) %}{% for i in range(60) %}{% set s.x = [s.x, s.x] %}{% endfor %}{{ s.x }}",
        "{{ range(99999) | map('center', 99999) | join }}",
    ],
)
def test_a_template_that_floods_takes_at_most_some_hundred_megabytes(template: str) -> None:
    render = compile_template(template)
    tracemalloc.start()
    try:
        with pytest.raises(RowError):
            render(dict(ROW))
        assert tracemalloc.get_traced_memory()[1] < 600_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "template",
    ["(" * 5000, "{{ " + "(" * 5000, "{{ " + "-" * 100_000 + "1 }}", "{% for a in b %}" * 300 + "{% endfor %}" * 300,
     "{{ " + "9" * 5000 + " }}", "{{ 1 | nothing }}",
     "{% nothing %}", "{{ \udc80 }}", "{% if %}", "{{ a.b.c", "{{ 'a" ],
)  # fmt: skip
def test_a_template_that_cannot_be_compiled_is_a_usage_error_or_text(template: str) -> None:
    try:
        render = compile_template(template)
    except UsageError as exc:
        assert exc.message.startswith("--prompt-template")  # noqa: PT017  # text is fine, too
        assert exc.hint  # noqa: PT017
    else:
        assert render(dict(ROW)) == [template]


def test_what_one_row_spent_is_not_taken_from_the_next() -> None:
    render = compile_template("{% for a in range(50000) %}{{ q }}{% endfor %}")
    for _ in range(6):
        (text,) = render(dict(ROW))
        assert isinstance(text, str)
        assert len(text) == 50_000 * 8


def test_a_long_question_through_a_template_is_no_flood() -> None:
    row = {"question": "word " * 2_000_000, "options": ["yes", "no"] * 1000}
    text = "{{ question | trim | replace('\\t', ' ') }}{% for o in options %}\n{{ loop.index }}. {{ o }}{% endfor %}"
    (made,) = compile_template(text)(row)
    assert isinstance(made, str)
    assert made.endswith("\n1999. yes\n2000. no")


PIECES = st.sampled_from(
    ["{{ ", " }}", "{% ", " %}", "q", "xs", "n", "image('q')", "<image>", "|", ".", "__class__", "(", ")", "[", "]",
     "for a in ", "endfor", "if", "endif", "range(", "10**", "99", "*", "~", "'", "format", "attr", "set s = ",
     "macro m()",
     "endmacro", "self", "loop", "recursive", "join", "replace", "center", "\x00", "\u2028", "é", "{#", "#}", "\n"]
)  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(st.lists(PIECES, max_size=14).map("".join))
def test_any_template_compiles_or_is_a_usage_error_and_renders_or_rejects(template: str) -> None:
    try:
        maker = PromptMaker(template, placeholders=True)
    except UsageError:
        return
    try:
        parts = maker.write(Task("0-0", dict(ROW), [], None))
    except RowError as exc:
        assert exc.code in ("template", "placeholder")  # noqa: PT017  # either way has its own claims
    else:
        assert all(isinstance(part, str | Place) for part in parts)


TEXTS = st.lists(st.sampled_from(["<image>", "<image_start>", "<image_end>", "[a]", "[b]", " ", "x", "<", "[", "]"]))


@settings(max_examples=500, deadline=None)
@given(TEXTS.map("".join), st.integers(0, 3), st.integers(0, 2))
def test_every_image_is_placed_and_no_text_is_lost_or_the_row_is_rejected(text: str, a: int, b: int) -> None:
    images = [ImageReference("a", f"a{k}") for k in range(a)] + [ImageReference("b", f"b{k}") for k in range(b)]
    task = Task("0-0", {"a": [f"a{k}" for k in range(a)], "b": [f"b{k}" for k in range(b)]}, images, text)
    try:
        parts = placeholders.split(text)
        arranged = arrange(parts, task)
    except RowError as exc:
        assert exc.code == "placeholder"  # noqa: PT017  # either way has its own claims
        return
    assert {part for part in arranged if isinstance(part, ImageReference)} == set(images)
    written = "".join(
        part
        if isinstance(part, str)
        else "<image>"
        if part.field is None
        else f"<image_start>[{part.field}]<image_end>"
        for part in parts
    )
    assert written == re.sub(r"<image_start> *(\[[ab]\]) *<image_end>", r"<image_start>\1<image_end>", text)
    assert [part for part in arranged if isinstance(part, str)] == [part for part in parts if isinstance(part, str)]


def test_a_text_full_of_beginnings_is_read_in_linear_time() -> None:
    started = time.thread_time()
    for text in ("<image_start>[" * 200_000, "<image_start>[" + "a" * 3_000_000, "<image_start>" + " " * 3_000_000):
        with pytest.raises(RowError):
            placeholders.split(text)
    assert time.thread_time() - started < 5


def test_gemini_and_the_token_counts_keep_the_order(
    write_tasks: WriteTasks, colours: dict[bytes, str], tmp_path: Path
) -> None:
    row = {"image": ["red.png", "green.png", "blue.png"], "question": "A<image>B<image><image>C"}
    preparation.prepare(write_tasks([row]), tmp_path / "run", model="gemini-2.5-flash", backend="gemini")
    (line,) = lines(tmp_path / "run")
    parts = json.loads(gemini_requests.translate(line))["request"]["contents"][0]["parts"]
    seen = [
        part["text"] if "text" in part else f"«{colours[base64.b64decode(part['inline_data']['data'])]}»"
        for part in parts
    ]
    assert seen == shown(json.loads(line), colours) == ["A", "«red»", "B", "«green»", "«blue»", "C"]
    tokens = request_tokens(line, "gemini-2.5-flash")
    assert (tokens.images, tokens.text) == (3, 1)


def test_prepare_tells_a_hostile_template_in_one_line(write_tasks: WriteTasks, tmp_path: Path) -> None:
    rows = [{"question": "a"}] * 3
    template = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    report = preparation.prepare(write_tasks(rows), tmp_path / "run", model="m", prompt_template=template)
    assert report.reasons == {"template": 3}
    (first, *_) = next(Run.open(tmp_path / "run").seals()).rejected
    assert first.message == ("tasks.jsonl:1: the prompt template fails: it takes too many steps, or makes too much")
