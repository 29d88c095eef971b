"""JPEGs to work on: as heavy as photographs, made in seconds, the same every time."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

SMALL, LARGE = (640, 480), (3000, 2000)
DRAWN = 2000


def make_small(folder: Path, count: int, *, drawn: int = DRAWN, size: tuple[int, int] = SMALL) -> list[str]:
    """`count` different JPEGs, by default of about 80 KB: a gradient with noise. Returns their names.

    From `drawn` on they are earlier ones with a comment of their own: other files of other bytes, made quickly.
    """
    folder.mkdir()
    chance = np.random.default_rng(0)
    width, height = size
    noise = chance.normal(0, 16, (height * 2, width * 2, 3)).astype(np.int16)
    across, down = np.linspace(0, 1, width)[None, :, None], np.linspace(0, 1, height)[:, None, None]
    names = [f"{number:05}.jpg" for number in range(count)]
    for name in names[:drawn]:
        corners = chance.integers(0, 255, (3, 3))
        gradient = corners[0] + (corners[1] - corners[0]) * across + (corners[2] - corners[0]) * down * 0.5
        top, left = chance.integers(0, (height, width))
        picture = gradient.astype(np.int16) + noise[top : top + height, left : left + width]
        Image.fromarray(np.clip(picture, 0, 255).astype(np.uint8)).save(folder / name, quality=80)
    for number in range(drawn, count):
        before = (folder / names[number % drawn]).read_bytes()
        text = b"%06d" % number
        comment = b"\xff\xfe" + (len(text) + 2).to_bytes(2, "big") + text  # ITU-T T.81 B.2.4.5
        (folder / names[number]).write_bytes(before[:2] + comment + before[2:])
    return names


def make_large(folder: Path, distinct: int, count: int) -> list[str]:
    """`count` JPEGs of 3000 × 2000, `distinct` different ones and copies of them. Returns their names.

    Like photographs they have shades, shapes with edges, texture of all sizes, and the noise of a sensor.
    """
    folder.mkdir()
    names = [f"{number:05}.jpg" for number in range(count)]
    for number, name in enumerate(names):
        if number < distinct:
            _photo(number).save(folder / name, quality=92)
        else:
            shutil.copyfile(folder / names[number % distinct], folder / name)
    return names


def _photo(seed: int) -> Image.Image:
    chance = np.random.default_rng(seed)
    width, height = LARGE
    picture = np.zeros((height, width, 3), np.float32)
    for cells, weight in ((3, 40), (12, 22), (48, 14), (192, 9), (768, 7)):
        grid = chance.normal(0, 1, (cells * 2, cells * 3, 3)).astype(np.float32)
        for band in range(3):
            layer = Image.fromarray(grid[:, :, band]).resize(LARGE, Image.Resampling.BICUBIC)
            picture[:, :, band] += weight * np.asarray(layer)
    shapes = Image.new("RGB", LARGE, (128, 128, 128))
    draw = ImageDraw.Draw(shapes)
    for _ in range(60):
        x, y, size = chance.integers(0, width), chance.integers(0, height), chance.integers(20, 500)
        colour = tuple(map(int, chance.integers(0, 255, 3)))
        shape = draw.ellipse if chance.random() < 0.5 else draw.rectangle
        shape((int(x), int(y), int(x + size), int(y + size * chance.uniform(0.3, 1.5))), fill=colour)
    picture += np.asarray(shapes, np.float32) + chance.normal(0, 3, (height, width, 1)).astype(np.float32)
    return Image.fromarray(np.clip(picture, 0, 255).astype(np.uint8))


def write_tasks(path: Path, folder: str, names: Iterable[str]) -> None:
    """A task file; every row has a question of its own, not all of them ASCII."""
    with open(path, "w", encoding="utf-8") as stream:
        for number, name in enumerate(names):
            question = f"What is in picture {number}? “One word”, please."
            row = {"id": f"row-{number}", "image": f"{folder}/{name}", "question": question}
            stream.write(json.dumps(row, ensure_ascii=False) + "\n")
