"""The layers of docs/architecture.md: a module imports only from layers above its own."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "batchkit"
TABLE = re.compile(r"^\| (\d+) \| `([\w./]+)` \|", re.MULTILINE)
HEAVY = {
    "boto3",
    "openai",
    "vllm",
    "PIL",
    "smart_open",
    "pydantic",
    "jinja2",
    "tqdm",
    "loky",
    "torch",
    "jsonschema",
    "ray",
    "pyarrow",
    "datasets",
    "cv2",
    "numpy",
    "aiohttp",
    "msgspec",
    "xxhash",
}


def layers() -> dict[str, int]:
    text = (ROOT / "docs" / "architecture.md").read_text("utf-8")
    found = {name: int(layer) for layer, name in TABLE.findall(text)}
    assert len(found) == len(TABLE.findall(text)), "a module has two rows"
    return found


def modules() -> dict[str, Path]:
    """Every module but the package's own face, by its name below `batchkit`."""
    paths = sorted(PACKAGE.rglob("*.py"))
    return {
        path.relative_to(PACKAGE).with_suffix("").as_posix(): path
        for path in paths
        if path.read_bytes().strip() and path != PACKAGE / "__init__.py" and path.name != "__init__.py"
    }


def imported(path: Path) -> set[str]:
    """The modules of ours that a module imports, anywhere in it, as paths below the package."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "batchkit":
            inner = "/".join(node.module.split(".")[1:])
            for alias in node.names:
                deeper = f"{inner}/{alias.name}".lstrip("/")
                found.add(deeper if deeper in modules() else inner)
        elif isinstance(node, ast.Import):
            found |= {"/".join(alias.name.split(".")[1:]) for alias in node.names if alias.name.startswith("batchkit.")}
    return {name for name in found if name and name in modules()}


def test_the_architecture_page_lists_every_module() -> None:
    assert set(layers()) == set(modules())


@pytest.mark.parametrize("module", sorted(modules()))
def test_a_module_imports_only_from_layers_above(module: str) -> None:
    table = layers()
    below = {name: table[name] for name in imported(modules()[module]) if table[name] >= table[module]}
    assert not below, f"{module} is of layer {table[module]}"


def test_every_module_imports_on_its_own() -> None:
    for module in modules():
        name = "batchkit." + module.replace("/", ".")
        assert subprocess.run([sys.executable, "-c", f"import {name}"], check=False).returncode == 0, name


@pytest.mark.parametrize("arguments", [["--help"], ["prepare", "--help"], ["submit", "--help"], ["--version"]])
def test_help_loads_nothing_heavy(arguments: list[str]) -> None:
    code = (
        "import sys; from batchkit.cli import main\n"
        f"try: main({arguments!r})\n"
        "except SystemExit: pass\n"
        f"print(sorted({HEAVY!r} & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == "[]\n"


def test_the_package_offers_the_verbs_and_loads_them_late() -> None:
    import batchkit

    for name in batchkit.__all__:
        assert callable(getattr(batchkit, name))
    code = f"import sys, batchkit; print(sorted({HEAVY!r} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
