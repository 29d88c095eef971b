"""Wildcards in the names of objects: `*` and `?` stand for letters of one folder's names, `**/` for any folders."""

from __future__ import annotations

import re

from batchkit import s3
from batchkit.errors import UsageError

_PIECES = re.compile(r"\*\*/|\*|\?|\[!?[^\]]+\]|[^*?\[]+|.", re.DOTALL)
_MEANING = {"**/": "(?:.*/)?", "*": "[^/]*", "?": "[^/]"}


def is_pattern(name: str) -> bool:
    return any(letter in name for letter in "*?[")


def matching(pattern: str) -> list[str]:
    """The objects that a pattern matches, sorted; one that bears the pattern itself as its name is that alone.

    Raises `UsageError` for what is no pattern, `StorageError` or `CredentialsError` where the bucket may not be listed.
    """
    if s3.version(pattern) is not None:
        return [pattern]
    bucket, key = s3.split(pattern)
    beginning = re.split(r"[*?\[]", key, maxsplit=1)[0]
    try:
        expression = re.compile("".join(map(_translated, _PIECES.findall(key))), re.DOTALL)
    except re.error as exc:
        raise UsageError(f"{pattern}: {exc.msg}", hint="in [a-z] the first letter comes first") from exc
    names = (beginning + found.name for found in s3.listed(f"{s3.SCHEME}{bucket}/{beginning}"))
    return sorted(f"{s3.SCHEME}{bucket}/{name}" for name in names if expression.fullmatch(name))


def _translated(piece: str) -> str:
    if piece in _MEANING:
        return _MEANING[piece]
    if len(piece) > 2 and piece[0] == "[":
        inner = re.sub(r"([\\^\[&|~])", r"\\\1", piece[1:-1])
        return f"[^{inner[1:]}/]" if inner[0] == "!" else f"[{inner}]"
    return re.escape(piece)
