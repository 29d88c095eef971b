"""Keys: found by the name of their variable, used, and shown nowhere."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from batchkit import signatures
from batchkit.errors import CredentialsError

HIDDEN = "[key]"
SECRET_BYTES = 12
HUB_TOKENS = ("HF_TOKEN", "HUGGINGFACE_TOKEN", "HUGGING_FACE_HUB_TOKEN")
"""Where the token of the Hugging Face hub is looked for, in this order."""
_LIKE_A_KEY = re.compile(r"\b(?:sk|gsk|pk|rk)[-_][A-Za-z0-9*_-]{6,}|\bAIza[A-Za-z0-9_-]{10,}")
"""Providers quote keys in their errors, some of them with stars in the middle."""


class Key:
    """An API key. Its text and its representation do not show it."""

    def __init__(self, name: str, value: str) -> None:
        self.name = name
        self.value = value

    def hide(self, text: str) -> str:
        """`text` without this key, and without what looks like one, or is a signature."""
        return _LIKE_A_KEY.sub(HIDDEN, signatures.hide(text.replace(self.value, HIDDEN)))

    def hide_bytes(self, data: bytes) -> bytes:
        """`data`, mostly without a copy, without this key. A short one is a placeholder (EMPTY, test): responses that
        happen to hold such a word stay as they are."""
        key = self.value.encode()
        return data.replace(key, HIDDEN.encode()) if len(key) >= SECRET_BYTES and key in data else data

    def __repr__(self) -> str:
        return f"Key({self.name!r})"


def find_variable(name: str, *, folder: Path | None = None) -> str | None:
    """A variable of the environment, or of `folder`/.env (of the working directory unless given); None if it is not
    set, or empty."""
    value = os.environ.get(name) or _read_env_file((folder or Path.cwd()) / ".env").get(name) or ""
    return value.strip() or None


def find_key(names: Sequence[str], *, folder: Path | None = None) -> Key:
    """The key in the first of the variables `names` that is set, in the environment or in `folder`/.env (of the working
    directory unless given; the environment wins).

    Raises `CredentialsError` where none is, or where it cannot be a key.
    """
    for name in names:
        if value := find_variable(name, folder=folder):
            if not value.isascii() or not value.isprintable() or " " in value:
                raise CredentialsError(
                    f"{name} does not hold a key: it has characters that no key has",
                    hint=f"export {name}=… with the key alone",
                )
            return Key(name, value)
    raise CredentialsError(
        f"{' or '.join(names)} is not set",
        hint=f"export {names[0]}=… (or write {names[0]}=… into .env here); --api-key-env names another variable",
    )


def _read_env_file(path: Path) -> dict[str, str | None]:
    if not path.is_file():
        return {}
    import dotenv

    try:
        return dict(dotenv.dotenv_values(path))
    except (OSError, UnicodeDecodeError) as exc:
        raise CredentialsError(f"{path}: cannot be read: {exc}") from exc
