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
import tempfile
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import psutil

from batchkit import s3
from batchkit.provision import with_images
from batchkit.tasks import Row

DELAY = 0.02
COMMAND = [sys.executable, "-m", "batchkit"]


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


def compare(count: int, rounds: int) -> None:
    """boto3 fetches a tenth: it is that much slower, and its time is the same for each image."""
    rates: dict[str, list[float]] = {name: [] for name in WAYS}
    for _ in range(rounds):
        digests = {}
        for name, way in WAYS.items():
            uris = names(count // 10 if way is with_boto3 else count)
            began = time.monotonic()
            digests[name] = [hashlib.sha256(found).hexdigest() for found in way(uris)]
            rates[name].append(len(uris) / (time.monotonic() - began))
        theirs, ours = digests.values()
        assert ours[: len(theirs)] == theirs
        assert len(set(ours)) == count
    medians = {name: statistics.median(found) for name, found in rates.items()}
    print(f"{count:,} images of {len(picture()):,} bytes, {DELAY * 1000:g} ms for each GET, medians of {rounds}")
    for name, rate in medians.items():
        print(f"{name:28} {rate:8,.0f} images/s")
    loop, ours_rate = medians.values()
    print(f"{'ratio':28} {ours_rate / loop:8.1f}")


def memory(sizes: list[int]) -> None:
    print(f"\n{'images':>8} {'seconds':>8} {'images/s':>9} {'largest MB':>11} {'sum MB':>7}   batchkit prepare")
    for size in sizes:
        with tempfile.TemporaryDirectory() as folder:
            tasks = Path(folder) / "tasks.jsonl"
            lines = (json.dumps({"id": n, "image": uri, "question": "?"}) for n, uri in enumerate(names(size)))
            tasks.write_text("\n".join(lines))
            began = time.monotonic()
            largest, together = peaks([*COMMAND, "prepare", str(tasks), f"{folder}/run", "--model", "m"])
            seconds = time.monotonic() - began
            made = sum(1 for path in Path(folder, "run", "requests").glob("*.jsonl") for _ in open(path, "rb"))  # noqa: SIM115
            assert made == size
        print(f"{size:8,} {seconds:8.1f} {size / seconds:9,.0f} {largest:11.0f} {together:7.0f}", flush=True)


def peaks(command: list[str]) -> tuple[float, float]:
    """Peak memory in MB of the largest process, and of all of them, looked at every 50 ms."""
    process = psutil.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    largest = together = 0.0
    while process.poll() is None:
        sizes = []
        for one in [process, *process.children(recursive=True)]:
            try:
                sizes.append(one.memory_info().rss / 1e6)
            except psutil.Error:
                continue
        largest, together = max([largest, *sizes]), max(together, sum(sizes))
        time.sleep(0.05)
    assert process.returncode == 0
    return largest, together


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--memory", default="2000,20000", help="sizes, separated by commas")
    parser.add_argument("--serve", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
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
        compare(arguments.images, arguments.rounds)
        memory([int(size) for size in arguments.memory.split(",")])
    finally:
        server.kill()


if __name__ == "__main__":
    main()
