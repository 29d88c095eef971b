"""`prepare --max-side 1024` of 3000 × 2000 JPEGs, beside Pillow's full decode with LANCZOS and flexllm's preprocessing.

All write JPEGs of quality 90. Each result's picture is compared with that of the full decode by scikit-image's
structural similarity (SSIM, of the luminance), in every round, each different picture once.

    python benchmarks/prepare_smaller.py
"""

from __future__ import annotations

import io
import itertools
import statistics
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pictures
import prepare_rivals
import requests_made
from harness import BATCHKIT, Contender, compare, parser, say, workplace
from PIL import Image
from report import Goal, Report, Table, ranking, ratio, raw_times
from skimage.metrics import structural_similarity

FULL, ONE, TWO = "Pillow, full decode", "batchkit, 1 worker", "batchkit, 2 workers"
FLEXLLM = "flexllm, messages"
SIDE = 1024


class Setting:
    """A task file with its images, what the full decode makes of them, and how alike the results were."""

    def __init__(self, folder: Path, distinct: int, count: int) -> None:
        self.tasks = folder / "tasks.jsonl"
        self.distinct = distinct
        self.count = count
        names = pictures.make_large(folder / "images", distinct, count)
        pictures.write_tasks(self.tasks, "images", names)
        few, first = folder / "few.jsonl", folder / "full.jsonl"
        with open(self.tasks, "rb") as stream:
            few.write_bytes(b"".join(itertools.islice(stream, distinct)))
        subprocess.run(prepare_rivals.command("full_decode", few, first), check=True)
        self._expected = [grey(asked.image) for asked in requests_made.read([first])]
        self.alike: dict[str, list[float]] = {}

    def check(self, name: str, paths: Sequence[Path]) -> None:
        """The right number of requests with pictures of the right size; notes how alike they are.

        flexllm rounds the shorter side down: pictures of other sizes cannot be compared by their pixels.
        """
        made = requests_made.read(paths)
        found = [grey(asked.image) for asked in itertools.islice(made, self.distinct)]
        assert len(found) + sum(1 for _ in made) == self.count
        pairs = list(zip(self._expected, found, strict=True))
        if name == FLEXLLM:
            assert all(abs(expected.shape[0] - theirs.shape[0]) <= 1 for expected, theirs in pairs)
        else:
            self.alike[name] = [ssim(expected, ours) for expected, ours in pairs]


def ssim(one: np.ndarray[Any, Any], other: np.ndarray[Any, Any]) -> float:
    return float(structural_similarity(one, other, data_range=255))


def grey(image: bytes) -> np.ndarray[Any, Any]:
    with Image.open(io.BytesIO(image)) as opened:
        assert max(opened.size) == SIDE, opened.size
        return np.asarray(opened.convert("L"))


def contenders(setting: Setting) -> list[Contender]:
    def rival(name: str, label: str) -> Contender:
        return Contender(
            label,
            lambda folder: prepare_rivals.command(name, setting.tasks, folder / "requests.jsonl"),
            lambda folder: setting.check(label, [folder / "requests.jsonl"]),
        )

    def batchkit(label: str, workers: int) -> Contender:
        options = ["--model", "m", "--max-side", str(SIDE), "--workers", str(workers)]
        return Contender(
            label,
            lambda folder: [*BATCHKIT, "prepare", str(setting.tasks), str(folder / "run"), *options],
            lambda folder: setting.check(label, requests_made.of_run(folder / "run")),
        )

    return [rival("full_decode", FULL), rival("flexllm_smaller", FLEXLLM), batchkit(ONE, 1), batchkit(TWO, 2)]


def main() -> None:
    arguments = parser(__doc__, rounds=3)
    arguments.add_argument("--images", type=int, help="[default: 240, of which 24 are different]")
    given = arguments.parse_args()
    count = given.images or (6 if given.quick else 240)
    distinct = min(count, 3 if given.quick else 24)
    rounds = min(given.rounds, 1) if given.quick else given.rounds
    with workplace(given.folder) as folder:
        say(f"prepare, images made smaller: making {count:,} images")
        setting = Setting(folder, distinct, count)
        results = compare(contenders(setting), rounds, folder, [setting.tasks, folder / "images"])
    report = Report(
        "prepare_smaller",
        "Prepare, images made smaller",
        f"{count:,} JPEGs of 3000 × 2000 to {SIDE} px, {distinct} different ones, medians of {rounds} rounds in turns. "
        "All write JPEG of quality 90. flexllm works in as many threads as there are cores.",
        quick=given.quick,
    )
    report.tables.append(ranking("", results, rival=FULL, unit="images", amount=count))
    report.tables.append(
        Table(
            "SSIM against the full decode",
            ["", "worst", "mean"],
            [[name, f"{min(found):.4f}", f"{statistics.fmean(found):.4f}"] for name, found in setting.alike.items()],
        )
    )
    report.goals += [
        Goal("prepare, images made smaller: one worker against full decode", ratio(results, FULL, ONE), 3),
        Goal("prepare, images made smaller: two workers against full decode", ratio(results, FULL, TWO), 6),
        Goal("prepare, images made smaller: worst SSIM", min(setting.alike[ONE] + setting.alike[TWO]), 0.98, unit=""),
    ]
    report.raw = {**raw_times(results), "ssim": setting.alike}
    report.finish(given.json, given.folder)


if __name__ == "__main__":
    main()
