"""`--response-schema`: a JSON schema, from a file or from a pydantic model, and what can be said of it.

A schema is sent as the user wrote it. OpenAI's strict mode takes only some schemas: it is asked for where it would be
granted, and nothing is added to the others.
"""

from __future__ import annotations

import importlib
import json
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from batchkit.errors import InputError, UsageError

_IMPORT_PATH = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")
_NOT_STRICT = ("allOf", "oneOf", "not", "if", "then", "else", "dependentRequired", "dependentSchemas", "default",
               "patternProperties", "prefixItems", "unevaluatedProperties")  # fmt: skip
_TRIALS: tuple[Any, ...] = ({}, [], "", 0, None)

Check = Callable[[Any], str | None]


def load(given: Any) -> dict[str, Any]:
    """The schema of a file's name, `package.module:Model`, a pydantic model or a decoded schema.

    Raises `InputError` where it cannot be read or imported, `UsageError` where it is no JSON schema.
    """
    if hasattr(given, "model_json_schema"):
        schema = _of_model(given, getattr(given, "__name__", "the model"))
    elif isinstance(given, dict):
        schema = given
    elif isinstance(given, str | Path):
        text = str(given)
        imports = _IMPORT_PATH.fullmatch(text) and not Path(text).exists()
        schema = _of_model(_imported(text), text) if imports else _of_file(text)
    else:
        raise UsageError(
            f"--response-schema is a {type(given).__name__}, not a JSON schema or a pydantic model",
            hint="a file's name, package.module:Model, a dict, or the class itself",
        )
    try:
        json.dumps(schema, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError as exc:
        raise UsageError(
            "--response-schema: a text in it has half of a surrogate pair, which UTF-8 cannot hold",
            hint=r"look for \ud800 to \udfff in it",
        ) from exc
    except RecursionError as exc:
        raise UsageError("the response schema is nested too deeply") from exc
    checker(schema)
    return schema


def _of_file(name: str) -> dict[str, Any]:
    path = Path(name).expanduser()
    try:
        schema = json.loads(path.read_text("utf-8-sig"))
    except OSError as exc:
        raise InputError(
            f"{path}: cannot be read: {exc.strerror or exc}",
            hint="--response-schema takes a JSON file, or package.module:Model",
        ) from exc
    except (ValueError, RecursionError) as exc:
        raise InputError(f"{path}: is not JSON: {exc}", hint="--response-schema takes a JSON schema") from exc
    if not isinstance(schema, dict):
        raise UsageError(f"{path}: a JSON schema is an object", hint='for example {"type": "object", "properties": …}')
    return schema


def _imported(text: str) -> Any:
    """What `package.module:Name` names; modules in the current directory count."""
    module, _, name = text.partition(":")
    with _current_directory_importable():
        try:
            found: Any = importlib.import_module(module)
            for part in name.split("."):
                found = getattr(found, part)
        except (Exception, SystemExit) as exc:  # the module is the user's: it may fail in any way
            raise InputError(
                f"--response-schema {text}: cannot be imported: {type(exc).__name__}: {exc}",
                hint="the module must be installed, or lie in the current directory",
            ) from exc
    return found


@contextmanager
def _current_directory_importable() -> Iterator[None]:
    folder = str(Path.cwd())
    sys.path.insert(0, folder)
    importlib.invalidate_caches()
    try:
        yield
    finally:
        if folder in sys.path:
            sys.path.remove(folder)


def _of_model(model: Any, name: str) -> dict[str, Any]:
    try:
        schema = model.model_json_schema()
    except AttributeError:
        raise UsageError(
            f"--response-schema {name}: is a {type(model).__name__}, not a pydantic model",
            hint="package.module:Name names a class that inherits from pydantic.BaseModel",
        ) from None
    except Exception as exc:
        raise UsageError(f"--response-schema {name}: has no JSON schema: {exc}") from exc
    if not isinstance(schema, dict):
        raise UsageError(
            f"--response-schema {name}: its model_json_schema() returns a {type(schema).__name__}, not an object",
            hint="package.module:Name names a class that inherits from pydantic.BaseModel",
        )
    return schema


# -- what a schema says ----------------------------------------------------------------------------------------------


def checker(schema: Any) -> Check:
    """A function from a value to what is wrong with it, or None. References are never fetched from anywhere.

    Raises `UsageError` where `schema` is no JSON schema.
    """
    import jsonschema
    import referencing
    from jsonschema.exceptions import best_match

    kind = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
    try:
        kind.check_schema(schema)
    except jsonschema.SchemaError as exc:
        raise UsageError(
            f"the response schema is no JSON schema: {exc.json_path}: {exc.message[:300]}",
            hint="https://json-schema.org/understanding-json-schema",
        ) from exc
    except RecursionError as exc:
        raise UsageError("the response schema is nested too deeply") from exc
    validator = kind(schema, registry=referencing.Registry())

    def check(value: Any) -> str | None:
        error = best_match(validator.iter_errors(value))
        return f"{error.json_path}: {error.message[:200]}" if error is not None else None

    try:
        _refuse_dangling(schema)
        for trial in _TRIALS:
            check(trial)
    except RecursionError as exc:
        raise UsageError("the response schema refers to itself without end") from exc
    except Exception as exc:
        raise UsageError(
            f"the response schema cannot be used: {exc}", hint="references are to lie in it: #/$defs/NAME"
        ) from exc
    return check


def _refuse_dangling(schema: Any) -> None:
    """Raise `UsageError` for a reference to what is not there, or is elsewhere."""
    if not isinstance(schema, dict):
        return
    for part in _parts(schema):
        target = part.get("$ref")
        if not isinstance(target, str) or target == "#":
            continue
        if not target.startswith("#"):
            raise UsageError(f"{target!r} lies outside of it")
        if target.startswith("#/") and not _leads_somewhere(schema, target):
            raise UsageError(f"{target!r} leads nowhere")


def _leads_somewhere(schema: Any, pointer: str) -> bool:
    for step in pointer[2:].split("/"):
        name = step.replace("~1", "/").replace("~0", "~")
        if isinstance(schema, list) and name.isdigit() and int(name) < len(schema):
            schema = schema[int(name)]
        elif isinstance(schema, dict) and name in schema:
            schema = schema[name]
        else:
            return False
    return True


def _parts(schema: Any) -> Iterator[dict[str, Any]]:
    """All schemas inside a schema. What stands in `enum`, `const`, `default` and `examples` is none."""
    pending = [schema]
    while pending:
        part = pending.pop()
        if isinstance(part, list):
            pending += part
        elif isinstance(part, dict):
            yield part
            for key, value in part.items():
                if key in ("properties", "$defs", "definitions", "patternProperties") and isinstance(value, dict):
                    pending += value.values()
                elif key not in ("enum", "const", "default", "examples", "required"):
                    pending.append(value)


def name_of(schema: dict[str, Any]) -> str:
    """A name for it, as OpenAI wants one: up to 64 of [A-Za-z0-9_-]; from its title."""
    title = schema.get("title")
    name = re.sub(r"[^A-Za-z0-9_-]+", "_", title).strip("_")[:64] if isinstance(title, str) else ""
    return name or "answer"


def why_not_strict(schema: dict[str, Any]) -> str | None:
    """Why OpenAI's strict mode would refuse it, None where it would not.

    The rules: platform.openai.com/docs/guides/structured-outputs, "Supported schemas", 2026-11.
    """
    if schema.get("type") != "object" or "anyOf" in schema:
        return "its root is not an object"
    for part in _parts(schema):
        word = next((word for word in _NOT_STRICT if word in part), None)
        if word is not None:
            return f"it uses {word!r}"
        if part.get("type") == "object" or "properties" in part:
            if part.get("additionalProperties") is not False:
                return "an object allows additional properties"
            properties, required = part.get("properties"), part.get("required")
            optional = set(properties or ()) - set(required if isinstance(required, list) else ())
            if optional:
                return f"{min(optional)!r} is not required"
    return None
