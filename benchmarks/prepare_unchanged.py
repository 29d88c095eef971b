"""`prepare` of rows with JPEGs of 80 KB that go into the requests as they are, beside the loops that people write.

All contenders read the same task file and the same images, from the page cache, and write request lines of the same
content: the same questions and the same image bytes, checked in every round (flexllm's preprocessing re-encodes, so its
pictures are decoded and compared). batchkit checks every image besides, and writes the rows, ids and checksums of a
run. Start-up of the interpreter and imports counts for all, so the job is long enough for it not to matter much.

    python benchmarks/prepare_unchanged.py
"""

from __future__ import annotations

import io
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pictures
import prepare_rivals
import requests_made
from harness import BATCHKIT, Contender, compare, parser, say, workplace
from PIL import Image
from report import Goal, Report, ranking, ratio, raw_times

PLAIN, ONE, TWO = "plain loop", "batchkit, 1 worker", "batchkit, 2 workers"
FLOORS = {"floor": "reading and writing alone", "floor_direct": "reading and writing alone, past the page cache"}


class Setting:
    """A task file with its images, and what requests of it must say."""

    def __init__(self, folder: Path, count: int) -> None:
        self.folder = folder
        self.tasks = folder / "tasks.jsonl"
        names = pictures.make_small(folder / "images", count)
        pictures.write_tasks(self.tasks, "images", names)
        self.bytes = sum(path.stat().st_size for path in (folder / "images").iterdir())
        self.model = folder / "model-run"
        subprocess.run(self.batchkit(self.model, 2), check=True, capture_output=True)
        prepare_rivals.note_sizes(self.model)
        first = folder / "plain.jsonl"
        subprocess.run(prepare_rivals.command("plain", self.tasks, first), check=True)
        self._expected = requests_made.digests([first])
        first.unlink()
        assert len(self._expected) == count

    def batchkit(self, run: Path, workers: int) -> list[str]:
        return [*BATCHKIT, "prepare", str(self.tasks), str(run), "--model", "m", "--workers", str(workers)]

    def check(self, paths: list[Path]) -> None:
        assert requests_made.digests(paths) == self._expected

    def check_alike(self, paths: list[Path]) -> None:
        """The same questions, and pictures that look the same: of every 50th the pixels are compared."""
        pairs = zip(requests_made.read(paths), self._expected, strict=True)
        for number, (asked, (question, _)) in enumerate(pairs):
            assert asked.question == question
            if number % 50 == 0:
                with Image.open(self.folder / f"images/{number:05}.jpg") as theirs:
                    before = np.asarray(theirs, np.int16)
                with Image.open(io.BytesIO(asked.image)) as ours:
                    assert np.abs(np.asarray(ours, np.int16) - before).mean() < 4

    def check_bytes(self, run: Path) -> None:
        """The floor has written what prepare does."""
        for wanted, found in zip(requests_made.of_run(self.model), requests_made.of_run(run), strict=True):
            assert wanted.stat().st_size == found.stat().st_size


def contenders(setting: Setting) -> list[Contender]:
    def rival(name: str, label: str, check: Callable[[list[Path]], None], most: int | None = None) -> Contender:
        def command(folder: Path) -> list[str]:
            return prepare_rivals.command(name, setting.tasks, folder / "requests.jsonl")

        return Contender(label, command, lambda folder: check([folder / "requests.jsonl"]), most=most)

    def batchkit(label: str, workers: int) -> Contender:
        return Contender(
            label,
            lambda folder: setting.batchkit(folder / "run", workers),
            lambda folder: setting.check(requests_made.of_run(folder / "run")),
        )

    def floor(name: str) -> Contender:
        return Contender(
            FLOORS[name],
            lambda folder: prepare_rivals.command(name, setting.tasks, folder / "run", setting.model),
            lambda folder: setting.check_bytes(folder / "run"),
        )

    return [
        rival("plain", PLAIN, setting.check),
        rival("orjson", "orjson loop", setting.check),
        rival("flexllm", "flexllm, messages (re-encodes)", setting.check_alike, most=1),
        rival("flexllm_media", "flexllm, files as they are", setting.check),
        batchkit(ONE, 1),
        batchkit(TWO, 2),
        *map(floor, FLOORS),
    ]


def main() -> None:
    arguments = parser(__doc__, rounds=3)
    arguments.add_argument("--images", type=int, help="[default: 16000]")
    given = arguments.parse_args()
    count = given.images or (100 if given.quick else 16_000)
    rounds = min(given.rounds, 1) if given.quick else given.rounds
    with workplace(given.folder) as folder:
        say(f"prepare, images unchanged: making {count:,} images")
        setting = Setting(folder, count)
        results = compare(contenders(setting), rounds, folder, [setting.tasks, folder / "images"])
    size = setting.bytes / count
    report = Report(
        "prepare_unchanged",
        "Prepare, images unchanged",
        f"{count:,} JPEGs of {size / 1000:.0f} KB ({setting.bytes / 1e6:.0f} MB), medians of {rounds} rounds in turns "
        "(one of the slowest rival). "
        "Every request was compared with the plain loop's. Start-up is in all the figures; MB are those of the images.",
        quick=given.quick,
    )
    report.tables.append(ranking("", results, rival=PLAIN, unit="MB", amount=setting.bytes / 1e6))
    best, floor = (min(names, key=lambda name: results[name].seconds) for names in ((ONE, TWO), FLOORS.values()))
    report.goals += [
        Goal("prepare, images unchanged: one worker against the plain loop", ratio(results, PLAIN, ONE), 4),
        Goal("prepare, images unchanged: two workers against the plain loop", ratio(results, PLAIN, TWO), 6),
        Goal(
            f"prepare, images unchanged: time of {best} against {floor}",
            ratio(results, best, floor),
            1.5,
            most=True,
        ),
    ]
    report.raw = raw_times(results)
    report.finish(given.json, given.folder)


if __name__ == "__main__":
    main()
