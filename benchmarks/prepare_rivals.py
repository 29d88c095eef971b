"""The loops that people write to make batch requests of rows with images. `prepare_*.py` run them, each as a process.

python benchmarks/prepare_rivals.py plain tasks.jsonl requests.jsonl
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
import mmap
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

MODEL = "m"
QUALITY = 90
"""Of re-encoded JPEGs: batchkit's own."""


def body(question: str, url: str) -> dict[str, Any]:
    content = [
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "text", "text": question},
    ]
    return {
        "model": MODEL,
        "messages": [{"role": "user", "content": content}],
        "max_tokens": 100,
        "temperature": 0,
    }


def request(row: dict[str, Any], url: str) -> dict[str, Any]:
    return {"custom_id": row["id"], "method": "POST", "url": "/v1/chat/completions", "body": body(row["question"], url)}


def plain(tasks: Path, target: Path, _: Path) -> None:
    with open(tasks, encoding="utf-8") as rows, open(target, "w", encoding="utf-8") as out:
        for line in rows:
            row = json.loads(line)
            with open(tasks.parent / row["image"], "rb") as stream:
                data = stream.read()
            url = "data:image/jpeg;base64," + base64.b64encode(data).decode("utf-8")
            out.write(json.dumps(request(row, url)) + "\n")


def fast(tasks: Path, target: Path, _: Path) -> None:
    """The same with orjson, which writes bytes."""
    import orjson

    with open(tasks, "rb") as rows, open(target, "wb", buffering=1 << 20) as out:
        for line in rows:
            row = orjson.loads(line)
            data = (tasks.parent / row["image"]).read_bytes()
            url = "data:image/jpeg;base64," + base64.b64encode(data).decode("ascii")
            out.write(orjson.dumps(request(row, url), option=orjson.OPT_APPEND_NEWLINE))


def flexllm(tasks: Path, target: Path, _: Path, **sizes: int) -> None:
    """Its preprocessing of messages, as its client calls it; the processor is kept, its threads are the cores'.

    It decodes every image and encodes it anew, whether it is made smaller or not.
    """
    import orjson
    from flexllm.msg_processors import UnifiedImageProcessor, UnifiedProcessorConfig, batch_messages_preprocess

    cores = len(os.sched_getaffinity(0))
    quality = QUALITY if sizes else 95  # its default
    config = UnifiedProcessorConfig(
        max_workers=cores, max_concurrent=16, jpeg_quality=quality, memory_cache_size_mb=16, enable_disk_cache=False
    )
    rows = [orjson.loads(line) for line in tasks.read_bytes().splitlines()]
    messages = [body(row["question"], str(tasks.parent / row["image"]))["messages"] for row in rows]

    async def work() -> None:
        made = await batch_messages_preprocess(
            messages, max_concurrent=16, processor=UnifiedImageProcessor(config), as_iterator=True, **sizes
        )
        waiting = iter(rows)
        with open(target, "wb", buffering=1 << 20) as out:  # noqa: ASYNC230
            async for ready in made:
                row = next(waiting)
                line = request(row, "")
                line["body"]["messages"] = ready
                out.write(orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE))

    asyncio.run(work())


def flexllm_smaller(tasks: Path, target: Path, _: Path) -> None:
    flexllm(tasks, target, _, max_width=1024, max_height=1024)


def flexllm_media(tasks: Path, target: Path, _: Path) -> None:
    """Its function that encodes a file as it is: what its users can call who want images unchanged."""
    import orjson
    from flexllm.msg_processors import encode_media_to_base64

    async def work() -> None:
        with open(tasks, "rb") as rows, open(target, "wb", buffering=1 << 20) as out:  # noqa: ASYNC230
            for line in rows:
                row = orjson.loads(line)
                url = await encode_media_to_base64(str(tasks.parent / row["image"]))
                out.write(orjson.dumps(request(row, url), option=orjson.OPT_APPEND_NEWLINE))

    asyncio.run(work())


def full_decode(tasks: Path, target: Path, _: Path) -> None:
    """Pillow as its tutorial has it: open, resize, save."""
    from PIL import Image

    with open(tasks, encoding="utf-8") as rows, open(target, "w", encoding="utf-8") as out:
        for line in rows:
            row = json.loads(line)
            buffer = io.BytesIO()
            with Image.open(tasks.parent / row["image"]) as image:
                factor = 1024 / max(image.size)
                size = (round(image.width * factor), round(image.height * factor))
                image.convert("RGB").resize(size, Image.Resampling.LANCZOS).save(buffer, "JPEG", quality=QUALITY)
            url = "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("utf-8")
            out.write(json.dumps(request(row, url)) + "\n")


def floor(tasks: Path, target: Path, model: Path) -> None:
    """No work at all: every image is read, and files of the same sizes as those of the run `model` are written.

    The same files are fsynced as by `prepare`: the manifest and the seal of the whole preparation, with their folder.
    """
    _floor(tasks, target, model, _through_cache)


def floor_direct(tasks: Path, target: Path, model: Path) -> None:
    """The same past the page cache, as `prepare` writes."""
    _floor(tasks, target, model, _past_cache)


def _through_cache(path: Path, sizes: Iterator[int]) -> None:
    nothing = bytes(1 << 20)
    with open(path, "wb", buffering=1 << 20) as out:
        out.writelines(nothing[:size] if size <= len(nothing) else bytes(size) for size in sizes)


def _past_cache(path: Path, sizes: Iterator[int]) -> None:
    nothing, written, whole = mmap.mmap(-1, 1 << 20), 0, 0
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_DIRECT)
    for size in sizes:
        whole += size
        while written + len(nothing) <= whole:
            written += os.write(file, nothing)
    os.write(file, memoryview(nothing)[: -(-(whole - written) // 4096) * 4096])
    os.ftruncate(file, whole)
    os.close(file)


def _floor(tasks: Path, target: Path, model: Path, write: Callable[[Path, Iterator[int]], None]) -> None:
    names = iter(json.loads(line)["image"] for line in tasks.read_bytes().splitlines())
    target.mkdir()
    for folder in ("rows", "requests"):
        (target / folder).mkdir()
    os_write(target / "manifest.json", (model / "manifest.json").read_bytes(), durable=True)

    def sizes(path: Path) -> Iterator[int]:
        for size in _line_sizes(model, path):
            (tasks.parent / next(names)).read_bytes()
            yield size

    for path in sorted((model / "requests").glob("*.jsonl")):
        write(target / "requests" / path.name, sizes(path))
        for other in (*(model / "rows").glob(f"{path.stem}.*"), path.with_suffix(".json")):
            os_write(target / other.relative_to(model), other.read_bytes())
    os_write(target / "prepared.json", (model / "prepared.json").read_bytes(), durable=True)


def _line_sizes(model: Path, path: Path) -> Iterator[int]:
    """They are beside the run, for counting them would be work: see `note_sizes`."""
    with open(model.parent / f"{path.stem}.sizes", encoding="ascii") as stream:
        yield from map(int, stream)


def note_sizes(model: Path) -> None:
    for path in (model / "requests").glob("*.jsonl"):
        with open(path, "rb") as lines, open(model.parent / f"{path.stem}.sizes", "w", encoding="ascii") as out:
            out.writelines(f"{len(line)}\n" for line in lines)


def os_write(path: Path, data: bytes, *, durable: bool = False) -> None:
    with open(path, "wb") as stream:
        stream.write(data)
        if durable:
            stream.flush()
            os.fsync(stream.fileno())
    if durable:
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)


RIVALS: dict[str, Callable[[Path, Path, Path], None]] = {
    "plain": plain,
    "orjson": fast,
    "flexllm": flexllm,
    "flexllm_media": flexllm_media,
    "flexllm_smaller": flexllm_smaller,
    "full_decode": full_decode,
    "floor": floor,
    "floor_direct": floor_direct,
}


def command(name: str, tasks: Path, target: Path, model: Path | None = None) -> list[str]:
    """What runs a rival; `model` is the run whose files the floor is of."""
    return [sys.executable, __file__, name, str(tasks), str(target), str(model or ".")]


if __name__ == "__main__":
    name, *paths = sys.argv[1:4]
    RIVALS[name](Path(paths[0]), Path(paths[1]), Path(sys.argv[4] if len(sys.argv) > 4 else "."))
