"""--response-schema: what is taken, what is refused, and what is asked of the answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, ConfigDict

from batchkit import schemas
from batchkit.errors import BatchkitError, InputError, UsageError

CITY = {
    "title": "A City!",
    "type": "object",
    "properties": {"name": {"type": "string"}, "people": {"type": "integer"}},
    "required": ["name", "people"],
    "additionalProperties": False,
}


class Loose(BaseModel):
    name: str
    people: int = 0


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")
    name: str
    inner: list[Loose] | None


class Closed(BaseModel):
    model_config = ConfigDict(extra="forbid")
    name: str
    people: int


def test_a_file_a_model_a_class_and_a_dict_are_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "city.json"
    path.write_text("\ufeff" + json.dumps(CITY))
    assert schemas.load(str(path)) == schemas.load(path) == schemas.load(CITY) == CITY
    (tmp_path / "my_models_of_cities.py").write_text(
        "import pydantic\n"
        "class City(pydantic.BaseModel):\n    name: str\n"
        "    class Part(pydantic.BaseModel):\n        n: int\n"
    )
    monkeypatch.chdir(tmp_path)
    assert schemas.load("my_models_of_cities:City")["required"] == ["name"]
    assert schemas.load("my_models_of_cities:City.Part")["required"] == ["n"]
    assert schemas.load(Loose) == Loose.model_json_schema()
    assert schemas.load("tests.test_schemas:Loose") == Loose.model_json_schema()


class NoDict:
    @classmethod
    def model_json_schema(cls) -> list[int]:
        return [1]


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ("no-such.json", InputError, "no-such.json: cannot be read: No such file"),
        ("broken.json", InputError, "broken.json: is not JSON"),
        ("list.json", UsageError, "list.json: a JSON schema is an object"),
        ("tests.test_schemas:Nothing", InputError, "cannot be imported: AttributeError"),
        ("no_such_module_here:Name", InputError, "cannot be imported: ModuleNotFoundError"),
        ("tests.test_schemas:CITY", UsageError, "is a dict, not a pydantic model"),
        ("tests.test_schemas:NoDict", UsageError, r"its model_json_schema\(\) returns a list, not an object"),
        ({"title": "\ud800"}, UsageError, "a text in it has half of a surrogate pair"),
        (7, UsageError, "is a int, not a JSON schema"),
        ({"type": "objekt"}, UsageError, r"is no JSON schema: \$.type: 'objekt' is not valid"),
        ({"type": "string", "pattern": "("}, UsageError, "is no JSON schema"),
        ({"$ref": "#"}, UsageError, "refers to itself without end"),
        ({"properties": {"a": {"$ref": "#/$defs/A"}}}, UsageError, "'#/\\$defs/A' leads nowhere"),
        ({"properties": {"a": {"$ref": "https://example.com/a"}}}, UsageError, "lies outside of it"),
        ({"$ref": "file:///etc/passwd"}, UsageError, "lies outside of it"),
    ],
)
def test_what_is_no_usable_schema_is_one_clear_error(
    given: Any, error: type[BatchkitError], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "list.json").write_text("[]")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=message):
        schemas.load(given)


@pytest.mark.parametrize(
    ("schema", "why"),
    [
        (CITY, None),
        (Closed.model_json_schema(), None),
        ({"type": "array"}, "its root is not an object"),
        ({**CITY, "anyOf": [{}]}, "its root is not an object"),
        (Loose.model_json_schema(), "an object allows additional properties"),
        (Strict.model_json_schema(), "an object allows additional properties"),
        ({**CITY, "additionalProperties": True}, "an object allows additional properties"),
        ({**CITY, "required": ["name"]}, "'people' is not required"),
        ({**CITY, "default": {}}, "it uses 'default'"),
        ({**CITY, "properties": {"name": {"oneOf": [{"type": "string"}]}, "people": {}}}, "it uses 'oneOf'"),
        (
            {**CITY, "properties": {"default": {"enum": [{"oneOf": 1}]}, "not": {}}, "required": ["default", "not"]},
            None,
        ),
        ({**CITY, "x": {"properties": 3, "required": 3}}, "an object allows additional properties"),
    ],
)
def test_strict_mode_is_asked_for_where_it_would_be_granted(schema: dict[str, Any], why: str | None) -> None:
    assert schemas.why_not_strict(schema) == why


def test_the_name_is_made_of_the_title() -> None:
    assert schemas.name_of(CITY) == "A_City"
    assert schemas.name_of({"title": "Größe " * 50}).startswith("Gr_e_Gr_e")
    assert len(schemas.name_of({"title": "Größe " * 50})) <= 64
    assert schemas.name_of({}) == schemas.name_of({"title": "?"}) == schemas.name_of({"title": 3}) == "answer"


def test_a_schema_that_refers_to_itself_checks_trees() -> None:
    tree = {"type": "object", "properties": {"next": {"$ref": "#"}}, "additionalProperties": False}
    check = schemas.checker(tree)
    assert check({"next": {"next": {}}}) is None
    assert check({"next": {"next": {"other": 1}}}) is not None
