"""Jinja2's sandbox, with bounds on what a template may take.

Jinja2 itself keeps templates away from Python's internals, but lets them run for ever and fill the memory. Here each
call, filter, operator and turn of a loop counts as work, and so does the size of what it makes; what would make too
much at once is refused before it is done. Nothing depends on the clock as long as a template is in reason.
"""

from __future__ import annotations

import re
import time
import types
from collections.abc import Callable, Iterable, Iterator
from functools import wraps
from typing import Any, TypeVar

from jinja2 import StrictUndefined, Undefined, nodes
from jinja2.exceptions import SecurityError
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

WORK = 100_000_000
"""What one row's template may make in all, in characters."""

STEP = 500
"""Work of any one step, however small what it makes: 200,000 steps take seconds."""

ENTRY = 50
"""Work of an entry of a list, in characters."""

SECONDS = 20.0
"""Of processor time for one row: for slow steps. A template that takes a hundredth of it is a strange one."""

LARGEST = 1_000_000
"""The largest number that may say how wide or how many."""

_MEASURES_NOTHING = frozenset({"truncate", "default", "d", "format"})
"""Filters whose numbers do not size what they make."""

_PRINT = frozenset({
    "capitalize", "center", "e", "escape", "forceescape", "indent", "lower", "replace", "safe", "string", "striptags",
    "title", "trim", "truncate", "upper", "urlencode", "wordcount", "wordwrap",
})  # fmt: skip
"""Filters that make a text of what they get."""

_WIDE_PERCENT = re.compile(r"%(?:\([^)]*\))?[^a-zA-Z%]*?(?:\*|\d{5})")
_WIDE_BRACES = re.compile(r"\{[^{}]*(?:\{|:[^{}]*\d{5})")

_CALLS = ("filters", "tests")
F = TypeVar("F", bound=Callable[..., Any])


class Sandbox(ImmutableSandboxedEnvironment):
    """Compiles templates with `compile_bounded`; `begin` starts the count for one row.

    In a template `image(field, entry=None)` stands for `on_image`, even where a row has a field of that name.
    """

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self, on_image: Callable[..., str]) -> None:
        # The text goes to a model, not into HTML: escaping would change it.
        super().__init__(undefined=StrictUndefined, autoescape=False, finalize=_printable)
        self.place_image = on_image
        for name in ("lipsum", "random"):  # a row gives the same request every time
            self.globals.pop(name, None)
            self.filters.pop(name, None)
        for kind in _CALLS:
            table = getattr(self, kind)
            table.update({name: self._counted(name, function) for name, function in table.items()})
        self.concat = self.joined  # type: ignore[method-assign]  # what output, macros and `set` blocks are made with
        self.begin()

    def begin(self) -> None:
        self._work = self._look = 0
        self._deadline = time.thread_time() + SECONDS

    def compile_bounded(self, text: str) -> Any:
        """The template, its loops and literals counted. Raises what Jinja2 and Python's compiler raise."""
        self.begin()
        tree = _Counting().visit(self.parse(text))
        tree.set_environment(self)
        return self.template_class.from_code(self, self.compile(tree), self.make_globals(None))

    # What `_Counting` puts into templates.

    def step(self) -> bool:
        return True  # it counts as a call

    def joined(self, parts: Iterable[Any]) -> str:
        texts = []
        for part in parts:
            if not isinstance(part, str):
                self._spend(_size(part))
            texts.append(str(_printable(part)))
            self._spend(len(texts[-1]))
        return "".join(texts)

    def tilde(self, *parts: Any) -> str:
        return self.joined(parts)

    def built(self, value: Any) -> Any:
        return value  # it was measured as the argument of a call

    # What templates do.

    def call(self, context: Context, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        given = [*args, *kwargs.values()]
        if isinstance(obj, types.BuiltinMethodType) and isinstance(obj.__self__, str | bytes | int):
            _refuse_large(obj.__name__, obj.__self__, given)
        for value in given:
            self._spend(_size(value))
        result = super().call(context, obj, *args, **kwargs)
        self._spend(STEP + _size(result))
        return result

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        _refuse_operation(operator, left, right)
        result = super().call_binop(context, operator, left, right)
        self._spend(STEP + _size(result))
        return result

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        wrapper = super().wrap_str_format(value)
        if wrapper is not None and _WIDE_BRACES.search(value.__self__):
            raise SecurityError("the format is too wide")
        return wrapper

    def _counted(self, name: str, function: F) -> F:
        skipped = int(hasattr(function, "jinja_pass_arg"))  # its first argument is Jinja2's, not the template's

        @wraps(function)
        def counted(*args: Any, **kwargs: Any) -> Any:
            given = [*args[skipped:], *kwargs.values()]
            if given and name in _PRINT:
                _printable(given[0])
            if given and name not in _MEASURES_NOTHING:
                _refuse_large(name, given[0], given[1:])
            if name == "format" and isinstance(given[0], str):
                _refuse_operation("%", given[0], given[1:])
            for value in given:
                self._spend(0 if isinstance(value, str) else _size(value))
            result = function(*args, **kwargs)
            self._spend(STEP + _size(result))
            return result

        return counted  # type: ignore[return-value]  # of the same shape

    def _spend(self, work: int) -> None:
        self._work += work
        if self._work > WORK:
            raise SecurityError("it takes too many steps, or makes too much")
        if self._work > self._look:  # not each time: a look at the clock costs more than most steps
            self._look = self._work + 20 * STEP
            if time.thread_time() > self._deadline:
                raise SecurityError(f"it takes more than {SECONDS:g} s")


class _Counting(NodeTransformer):
    """Makes calls of what Jinja2 compiles to plain Python: each turn of a loop, each `~`, each list; and of `image`."""

    def visit_Call(self, node: nodes.Call) -> nodes.Node:  # noqa: N802  # as Jinja2's visitors are
        if isinstance(node.node, nodes.Name) and node.node.name == "image":
            node.node = nodes.EnvironmentAttribute("place_image", lineno=node.lineno)
        return self.generic_visit(node)

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return _call("tilde", node.nodes, node.lineno)

    def visit_Literal(self, node: nodes.Literal) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return node if getattr(node, "ctx", "load") != "load" else _call("built", [node], node.lineno)

    visit_List = visit_Dict = visit_Tuple = visit_Literal  # noqa: N815

    def visit_For(self, node: nodes.For) -> nodes.Node:  # noqa: N802
        self._count_body(node)
        if node.test is not None:  # it runs for entries that the body never sees
            node.test = nodes.And(_call("step", [], node.lineno), node.test, lineno=node.lineno)
        return node

    def _count_body(self, node: nodes.Node) -> nodes.Node:
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(_call("step", [], node.lineno), lineno=node.lineno))  # type: ignore[attr-defined]
        return node

    visit_Macro = visit_CallBlock = visit_Block = _count_body  # noqa: N815


def _call(name: str, arguments: list[nodes.Expr], line: int) -> nodes.Call:
    return nodes.Call(nodes.EnvironmentAttribute(name, lineno=line), arguments, [], None, None, lineno=line)


def _size(value: Any) -> int:
    """About how many characters and entries a value has, with all that is in it."""
    total = 0
    pending = [value]
    while pending:
        one = pending.pop()
        if isinstance(one, str | bytes):
            total += len(one)
        elif isinstance(one, int):
            total += one.bit_length() // 4
        elif isinstance(one, range):
            total += ENTRY * len(one)
        elif isinstance(one, dict):
            total += ENTRY * len(one)
            pending += one.keys()
            pending += one.values()
        elif isinstance(one, list | tuple | set | frozenset):
            total += ENTRY * len(one)
            pending += one
        if total > WORK:
            raise SecurityError("it makes too much")
    return total


def _printable(value: Any) -> Any:
    """What is printed. A list would print what is undefined in it as «Undefined», where alone it is an error. What has
    no text of its own would print its place in the memory, another one in each process."""
    if isinstance(value, str):
        return value
    pending = [value]
    while pending:
        one = pending.pop()
        if isinstance(one, Undefined):
            if one is not value:
                str(one)  # raises
        elif callable(one):
            name = getattr(one, "__name__", None) or getattr(one, "name", "what is printed")
            raise SecurityError(f"{name} is a method; a field of that name is written FIELD[{name!r}]")
        elif isinstance(one, Iterator):
            raise SecurityError("what is printed is no value yet; | list makes one of it")
        if isinstance(one, list | tuple):
            pending += one
        elif isinstance(one, dict):
            pending += one.values()
    return value


def _refuse_large(name: str, value: Any, arguments: Iterable[Any]) -> None:
    """Refuse a call that could make, of a small value, something large: `|center(10**9)`, `x.replace("", x)`."""
    # Of what is made while it is read, the length is not known: no more than a range.
    size = _size(value) if isinstance(value, str | bytes | int | float | list | tuple | dict) else 100_000
    largest = 1
    for argument in arguments:
        if isinstance(argument, int):
            largest = max(largest, abs(argument))
            if largest > (1000 if name == "round" else LARGEST):
                raise SecurityError(f"{name}: a number is too large")
        else:
            largest = max(largest, _size(argument))
    if size * largest > WORK:
        raise SecurityError(f"{name}: it makes too much")


def _refuse_operation(operator: str, left: Any, right: Any) -> None:
    made = 0
    if operator == "*":
        if isinstance(left, int) and isinstance(right, int):
            made = left.bit_length() + right.bit_length()
        elif isinstance(left, int) or isinstance(right, int):
            times, value = (left, right) if isinstance(left, int) else (right, left)
            made = _size(value) * max(0, times)
    elif operator == "**" and isinstance(left, int) and isinstance(right, int):
        made = left.bit_length() * abs(right) * 1000  # time grows faster than size
    elif operator == "%" and isinstance(left, str | bytes):
        text = left if isinstance(left, str) else left.decode("latin-1")
        made = WORK + 1 if _WIDE_PERCENT.search(text) else 0
    if made > WORK:
        raise SecurityError(f"{operator}: it makes too much")
