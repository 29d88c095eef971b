"""Fetching small images from a bucket whose server takes 20 ms for each GET: batchkit's fetcher beside the loop that
people write with boto3, in turns, their outputs compared; then the memory of `prepare` at several sizes.

The server is a process of its own on loopback; it checks nothing and answers every GET with a picture made of its name.

    python benchmarks/remote_images.py --images 2000 --memory 2000,20000
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import io
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from harness import BATCHKIT, measure, parser, say, workplace
from report import Report, Table

from batchkit import s3
from batchkit.provision import with_images
from batchkit.tasks import Row

DELAY = 0.02


@cache
def picture() -> bytes:
    from PIL import Image

    stream = io.BytesIO()
    Image.frombytes("RGB", (48, 48), random.Random(0).randbytes(48 * 48 * 3)).save(stream, "JPEG")
    return stream.getvalue()


class Slow(asyncio.Protocol):
    """Answers each GET after `DELAY`. The bytes behind the picture's end are its name: every object is another one."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport
        self._left = b""

    def data_received(self, data: bytes) -> None:
        *heads, self._left = (self._left + data).split(b"\r\n\r\n")
        for head in heads:
            asyncio.get_running_loop().call_later(DELAY, self._answer, head.split(b" ", 2)[1])

    def _answer(self, path: bytes) -> None:
        body = picture() + path
        head = b'HTTP/1.1 200 OK\r\netag: "1"\r\ncontent-type: image/jpeg\r\ncontent-length: %d\r\n\r\n' % len(body)
        self._transport.write(head + body)  # type: ignore[attr-defined]


async def serve(port: int) -> None:
    server = await asyncio.get_running_loop().create_server(Slow, "127.0.0.1", port, backlog=1000)
    await server.serve_forever()


def names(count: int) -> list[str]:
    return [f"s3://bucket/photos/{number:06}.jpg" for number in range(count)]


def with_boto3(uris: list[str]) -> Iterator[bytes]:
    client = s3.client()
    for uri in uris:
        bucket, key = s3.split(uri)
        yield client.get_object(Bucket=bucket, Key=key)["Body"].read()


def with_batchkit(uris: list[str]) -> Iterator[bytes]:
    rows = (Row(number, number + 1, uri.encode(), 0) for number, uri in enumerate(uris))
    for row in with_images(rows, lambda row: [row.raw.decode()], private_hosts=False):
        (found,) = (row.fetched or {}).values()
        assert isinstance(found, bytes), found
        yield found


WAYS = {"boto3, one after the other": with_boto3, "batchkit": with_batchkit}


def compare(count: int, rounds: int) -> tuple[Table, dict[str, list[float]]]:
    """boto3 fetches a tenth: it is that much slower, and its time is the same for each image."""
    rates: dict[str, list[float]] = {name: [] for name in WAYS}
    for number in range(rounds):
        say(f"remote images: round {number + 1} of {rounds}")
        digests = {}
        for name, way in WAYS.items():
            uris = names(max(1, count // 10) if way is with_boto3 else count)
            began = time.monotonic()
            digests[name] = [hashlib.sha256(found).hexdigest() for found in way(uris)]
            rates[name].append(len(uris) / (time.monotonic() - began))
        theirs, ours = digests.values()
        assert ours[: len(theirs)] == theirs
        assert len(set(ours)) == count
    medians = {name: statistics.median(found) for name, found in rates.items()}
    loop = next(iter(medians.values()))
    rows = [[name, f"{rate:,.0f}", f"{rate / loop:.1f}"] for name, rate in medians.items()]
    return Table(f"Fetching {count:,} images", ["", "images/s", f"{next(iter(medians))} = 1"], rows), rates


def memory(folder: Path, sizes: list[int]) -> tuple[Table, dict[str, dict[str, float | None]]]:
    rows, raw = [], {}
    for size in sizes:
        say(f"remote images: {size:,} through prepare")
        tasks, run = folder / "tasks.jsonl", folder / f"run-{size}"
        lines = (json.dumps({"id": n, "image": uri, "question": "?"}) for n, uri in enumerate(names(size)))
        tasks.write_text("\n".join(lines))
        measured = measure([*BATCHKIT, "prepare", str(tasks), str(run), "--model", "m"])
        made = sum(1 for path in (run / "requests").glob("*.jsonl") for _ in open(path, "rb"))  # noqa: SIM115
        assert made == size
        rows.append([f"{size:,}", f"{measured.seconds:.1f}", f"{size / measured.seconds:,.0f}"])
        rows[-1] += [f"{measured.largest_mb or 0:.0f}", f"{measured.sum_mb or 0:.0f}"]
        raw[str(size)] = measured._asdict()
    return Table("prepare", ["images", "seconds", "images/s", "largest MB", "sum MB"], rows), raw


def main() -> None:
    options = parser(__doc__, rounds=3)
    options.add_argument("--images", type=int, help="[default: 2000]")
    options.add_argument("--memory", help="sizes, separated by commas [default: 2000,20000]")
    options.add_argument("--serve", type=int, help=argparse.SUPPRESS)
    arguments = options.parse_args()
    if arguments.serve:
        asyncio.run(serve(arguments.serve))
        return
    port = 20_000 + os.getpid() % 20_000
    os.environ.update(
        AWS_ENDPOINT_URL=f"http://127.0.0.1:{port}",
        AWS_ACCESS_KEY_ID="key",
        AWS_SECRET_ACCESS_KEY="none",  # noqa: S106  # the server checks nothing
        AWS_DEFAULT_REGION="us-east-1",
    )
    server = subprocess.Popen([sys.executable, __file__, "--serve", str(port)])
    try:
        time.sleep(2)
        images = arguments.images or (100 if arguments.quick else 2000)
        sizes = arguments.memory or ("100,300" if arguments.quick else "2000,20000")
        rounds = min(arguments.rounds, 1) if arguments.quick else arguments.rounds
        fetched, rates = compare(images, rounds)
        with workplace(arguments.folder) as folder:
            prepared, measured = memory(folder, [int(size) for size in sizes.split(",")])
    finally:
        server.kill()
    report = Report(
        "remote_images",
        "Images in a bucket",
        f"Images of {len(picture()):,} bytes from a loopback server that takes {DELAY * 1000:g} ms for each GET, "
        f"medians of {rounds} rounds in turns; what both fetched was compared.",
        quick=arguments.quick,
        tables=[fetched, prepared],
        raw={"images_per_second": rates, "prepare": measured},
    )
    report.finish(arguments.json, arguments.folder)


if __name__ == "__main__":
    main()
