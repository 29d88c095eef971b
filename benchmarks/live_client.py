"""Requests a second against a loopback server: `submit --backend server` beside the OpenAI SDK's async client.

Both read the same run of requests (100 KB each, an image inline), keep the same number under way, and write every
response to a file; the rounds take turns. The server is a process of its own that answers at once. Prints requests a
second, and requests a second of CPU time of the client, which is what a core can do.

    python benchmarks/live_client.py --requests 10000 --rounds 3
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import statistics
import subprocess
import sys
from pathlib import Path

from harness import BATCHKIT, Measured, measure, parser, say, workplace
from report import Report, Table

from batchkit.runs import Run

NUMBER = b"012345"
ANSWER = json.dumps({
    "id": "c", "object": "chat.completion", "created": 1, "model": "m",
    "choices": [{"index": 0, "message": {"role": "assistant", "content": NUMBER.decode()}, "finish_reason": "stop"}],
    "usage": {"prompt_tokens": 10, "completion_tokens": 1, "total_tokens": 11},
}).encode()  # fmt: skip
"""The answer to the question `number N?`: in the place of `NUMBER`, N."""
QUESTION = re.compile(rb"number (\d+)\?")
END_BYTES = 1024
"""The question is in the last so many bytes of a request, behind the image."""
CONCURRENCY = 32
SDK, OURS = "OpenAI SDK, async", "batchkit submit"


class Stub(asyncio.Protocol):
    """Reads requests by their content-length, and answers each with the number that it asks for."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport
        self._head = self._end = b""
        self._left = 0

    def data_received(self, data: bytes) -> None:
        while data:
            if self._left:
                taken = data[: self._left]
                self._left -= len(taken)
                data = data[len(taken) :]
                self._end = (self._end + taken)[-END_BYTES:]
                if not self._left:
                    asked = QUESTION.search(self._end)
                    self._answer(ANSWER.replace(NUMBER, asked[1] if asked else b"nothing"))
                    self._end = b""
                continue
            self._head += data
            end = self._head.find(b"\r\n\r\n")
            if end < 0:
                return
            head, data, self._head = self._head[:end].lower(), self._head[end + 4 :], b""
            if head.startswith(b"get"):
                self._answer(b'{"data":[{"id":"m"}]}')
            else:
                self._left = int(head.partition(b"content-length: ")[2].split(b"\r\n")[0])

    def _answer(self, body: bytes) -> None:
        head = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(body)
        self._transport.write(head + body)  # type: ignore[attr-defined]


async def serve(port: int) -> None:
    server = await asyncio.get_running_loop().create_server(Stub, "127.0.0.1", port)
    await server.serve_forever()


async def ask_with_the_sdk(run: Path, url: str, output: Path) -> None:
    """The loop that people write: the SDK's async client, some workers, a line a response."""
    import openai

    client = openai.AsyncOpenAI(api_key="none", base_url=url)
    lines = (line for path in sorted((run / "requests").glob("*.jsonl")) for line in open(path, "rb"))  # noqa: SIM115, ASYNC230
    with open(output, "w", encoding="utf-8") as stream:  # noqa: ASYNC230

        async def work() -> None:
            for line in lines:
                request = json.loads(line)
                answer = await client.chat.completions.create(**request["body"])
                response = {"status_code": 200, "body": answer.model_dump()}
                stream.write(json.dumps({"custom_id": request["custom_id"], "response": response}) + "\n")

        await asyncio.gather(*(work() for _ in range(CONCURRENCY)))


def prepare(folder: Path, count: int) -> Run:
    import random

    noise = random.Random(1).randbytes(75_000)  # base64 makes 100 KB of it
    from PIL import Image

    picture = folder / "noise.png"
    Image.frombytes("RGB", (250, 100), noise).save(picture, compress_level=0)
    tasks = folder / "tasks.jsonl"
    tasks.write_text(
        "".join(json.dumps({"id": n, "image": "noise.png", "question": f"number {n}?"}) + "\n" for n in range(count))
    )
    command = [sys.executable, "-m", "batchkit", "prepare", str(tasks), str(folder / "run"), "--model", "m"]
    command += ["--backend", "server"]
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
    return Run.open(folder / "run")


def main() -> None:
    options = parser(__doc__, rounds=3)
    options.add_argument("--requests", type=int, help="[default: 10000]")
    options.add_argument("--serve", type=int, help=argparse.SUPPRESS)
    options.add_argument("--sdk", nargs=3, help=argparse.SUPPRESS)
    arguments = options.parse_args()
    if arguments.serve:
        asyncio.run(serve(arguments.serve))
    elif arguments.sdk:
        run, url, output = arguments.sdk
        asyncio.run(ask_with_the_sdk(Path(run), url, Path(output)))
    else:
        count = arguments.requests or (300 if arguments.quick else 10_000)
        rounds = min(arguments.rounds, 1) if arguments.quick else arguments.rounds
        with workplace(arguments.folder) as folder:
            found, size = compare(folder, count, rounds)
        report_of(found, count, size, quick=arguments.quick).finish(arguments.json, arguments.folder)


def compare(folder: Path, count: int, rounds: int) -> tuple[dict[str, list[Measured]], float]:
    """What each client took in each round, and the bytes of a request."""
    port = 20_000 + os.getpid() % 20_000
    url = f"http://127.0.0.1:{port}/v1"
    me = [sys.executable, __file__]
    server = subprocess.Popen([*me, "--serve", str(port)])
    found: dict[str, list[Measured]] = {SDK: [], OURS: []}
    try:
        run = prepare(folder, count)
        size = sum(seal.requests_bytes for seal in run.seals()) / count
        for number in range(rounds):
            say(f"live client: round {number + 1} of {rounds}")
            output = folder / "sdk.jsonl"
            found[SDK].append(measure([*me, "--sdk", str(run.path), url, str(output)], look=False))
            for path in [*(run.path / "jobs").iterdir(), *(run.path / "responses").iterdir()]:
                path.unlink()
            command = [*BATCHKIT, "submit", str(run.path), "--endpoints", url, "--concurrency", str(CONCURRENCY)]
            found[OURS].append(measure(command, look=False))
            check(run, output)
    finally:
        server.kill()
    return found, size


def check(run: Run, output: Path) -> None:
    """Both have one answer to each request, and the right one."""
    from engines import texts  # here: it is not for the SDK's process, which is timed

    asked = [custom_id for seal in run.seals() for custom_id in run.ids_path(seal.shard).read_text("utf-8").split()]
    expected = {custom_id: str(number) for number, custom_id in enumerate(asked)}
    for paths in ([output], sorted((run.path / "responses").iterdir())):
        assert texts(paths) == expected
        assert sum(path.read_bytes().count(b"\n") for path in paths) == len(asked)


def report_of(found: dict[str, list[Measured]], count: int, size: float, *, quick: bool) -> Report:
    rows, rates = [], {}
    for name, measured in found.items():
        wall, cpu = statistics.median(one.seconds for one in measured), statistics.median(one.cpu for one in measured)
        rates[name] = (count / wall, count / cpu)
    for name, (rate, of_core) in rates.items():
        theirs = rates[SDK]
        rows.append([name, f"{rate:,.0f}", f"{rate / theirs[0]:.1f}", f"{of_core:,.0f}", f"{of_core / theirs[1]:.1f}"])
    columns = ["", "requests/s", f"{SDK} = 1", "requests per CPU second", f"{SDK} = 1"]
    return Report(
        "live_client",
        "Live servers",
        f"{count:,} requests of {size / 1000:,.0f} KB to a loopback server that answers at once, {CONCURRENCY} at a "
        f"time, medians of {len(found[OURS])} rounds in turns; every answer was checked.",
        quick=quick,
        tables=[Table("", columns, rows)],
        raw={name: [one._asdict() for one in measured] for name, measured in found.items()},
    )


if __name__ == "__main__":
    main()
