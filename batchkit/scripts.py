"""Commands of vLLM's batch runner as files: a POSIX shell script, and a JSON list for schedulers. Pure."""

from __future__ import annotations

import datetime as dt
import shlex
from collections.abc import Iterable, Sequence

import msgspec

from batchkit import __version__
from batchkit.wording import counted


class Command(msgspec.Struct, frozen=True, kw_only=True):
    """One start of the batch runner: `requests` of a shard, read from the URL `input`, answered into the URL `output`.
    Both are in `command`, too, and hold until `expires`."""

    shard: int
    attempt: int
    requests: int
    command: list[str]
    input: str
    output: str
    expires: str


def as_json(commands: Sequence[Command]) -> str:
    return msgspec.json.format(msgspec.json.encode(commands), indent=2).decode() + "\n"


def as_shell(run: str, commands: Sequence[Command]) -> str:
    """A script for `sh`: all commands one after another, or those of the shards that are its arguments. It goes on
    behind one that fails, and ends with 1 then; with 2 for a shard that it does not know."""
    shards: dict[int, list[Command]] = {}
    for command in commands:
        shards.setdefault(command.shard, []).append(command)
    numbers = " ".join(map(str, shards))
    until = min((command.expires for command in commands), default="")
    lines = [
        "#!/bin/sh",
        f"# vLLM's batch runner on {counted(len(shards), 'shard')} of {_comment(run)}, by batchkit {__version__}.",
        f"# The URLs hold until {until or '(there are none)'}. Until then whoever has this file can use them: keep it.",
        "# sh FILE does all shards one after another, sh FILE 3 only shard 3.",
        f"# Slurm: sbatch --array={numbers.replace(' ', ',')} --gres=gpu:1 --wrap 'sh FILE $SLURM_ARRAY_TASK_ID'",
        "# PYTHON=… names a Python that has vLLM; `python` unless set.",
        "",
        f"shards='{numbers}'",
        "trap 'exit 130' INT",
        "trap 'exit 143' TERM",
        "",
        "answer() {",
        "  case $1 in",
    ]
    for shard, found in shards.items():
        lines += [f"  {shard})", *_joined(map(_line, found)), "    ;;"]
    lines += [
        '  *) echo "shard $1 is not in here, only $shards" >&2; unknown=1; return 2 ;;',
        "  esac",
        "}",
        "",
    ]
    if until:
        end = int(dt.datetime.fromisoformat(until).timestamp())
        lines += [
            f'if [ "$(date +%s)" -ge {end} ]; then',
            f"  echo 'the URLs in here expired at {until}: batchkit presign --again makes new ones' >&2",
            "  exit 1",
            "fi",
        ]
    lines += [
        "[ $# -gt 0 ] || set -- $shards",
        "failed= unknown=",
        'for shard in "$@"; do',
        '  answer "$shard" || failed="$failed $shard"',
        "done",
        '[ -z "$failed" ] && exit 0',
        'echo "failed:$failed" >&2',
        '[ -n "$unknown" ] && exit 2',
        "exit 1",
        "",
    ]
    return "\n".join(lines)


def _line(command: Command) -> str:
    _, *arguments = command.command
    return f'    "${{PYTHON:-python}}" {shlex.join(arguments)}'


def _joined(lines: Iterable[str]) -> list[str]:
    """All of them run; the exit code is 0 only where all went well."""
    found = list(lines)
    if len(found) == 1:
        return found
    return ["    code=0", *(f"{line} || code=1" for line in found), "    return $code"]


def _comment(text: str) -> str:
    return " ".join(text.split())
