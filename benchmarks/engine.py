"""`submit` to a local vLLM beside raw `run_batch` on the same requests, with the same engine arguments.

Measured: the seconds that `submit` spends while no engine lives; one raw start per shard; when the first answer is on
the disk; and what a SIGKILL of everything at half time costs, on so many requests that half of the time is not all
start. By default the example's model is asked, which runs on a CPU. Each start of vLLM takes half a minute there, so
this takes a quarter of an hour.

    python benchmarks/engine.py
    python benchmarks/engine.py --requests 2000 --rounds 1 --parts beside,kill --killed 30000
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path

from engines import DIGITS, TINY_ARGS, Place, Seen, texts, watch
from harness import parser, say, workplace
from report import Goal, Report, Table

PARTS = ("beside", "serve", "shards", "kill")
SHARDS = 3
KILLED_SHARDS = 12
FAR_AHEAD = 2
"""So many times as fast is called far ahead of one raw start per shard."""
ALIKE = 0.98
"""So many answers must be the same: with other requests beside it in a batch, a close call may fall otherwise."""
RAW, SUBMIT, SERVE = "raw run_batch", "batchkit submit", "batchkit submit --engine serve"
OPTIONS: dict[str, tuple[str, ...]] = {SUBMIT: (), SERVE: ("--engine", "serve")}


class Trial:
    """The same requests, answered in different ways; `seen` is what each way took."""

    def __init__(self, folder: Path, requests: int, shards: int) -> None:
        folder.mkdir()
        self.folder = folder
        self.requests = requests
        self.place = Place(folder, model=str(DIGITS / "model"), args=TINY_ARGS)
        tasks = folder / "tasks.jsonl"
        write_tasks(tasks, requests)
        options = ["--image-root", str(DIGITS), "--max-tokens", "8", "--max-requests", str(-(-requests // shards))]
        self.place.prepare(tasks, *options)
        self.seen: dict[str, list[Seen]] = {}
        self.output = folder / "raw.jsonl"

    def raw(self, source: Path, *, kill_after: float | None = None) -> Seen:
        self.output.unlink(missing_ok=True)
        return watch(
            self.place.raw(source, self.output),
            environment=self.place.environment,
            answers=lambda: [self.output],
            near=self.folder,
            kill_after=kill_after,
        )

    def submit(self, name: str, *, kill_after: float | None = None) -> Seen:
        return watch(
            self.place.submit(*OPTIONS[name]),
            environment=self.place.environment,
            answers=self.place.answer_files,
            near=self.folder,
            kill_after=kill_after,
        )

    def whole(self, name: str) -> None:
        """From nothing to all answers, compared with raw run_batch's."""
        say(f"engine: {name}")
        if name == RAW:
            seen = self.raw(self.place.source)
            self.expected = texts([self.output])
            assert len(self.expected) == self.requests
        else:
            self.place.forget()
            seen = self.submit(name)
            self.check()
        self.seen.setdefault(name, []).append(seen)

    def check(self) -> None:
        found = texts(sorted((self.place.run / "responses").glob("*.jsonl")))
        assert found.keys() == self.expected.keys()
        same = sum(found[custom_id] == answer for custom_id, answer in self.expected.items())
        assert same >= ALIKE * self.requests, f"{same} of {self.requests} answers are the same"

    def each_shard(self) -> float:
        """Seconds of one raw start after the other, one per shard."""
        say("engine: one raw start per shard")
        return sum(self.raw(path).seconds for path in self.place.shards())

    def kill(self, name: str) -> tuple[int, float]:
        """Kill everything at half time: how many rows are to be done again, and the seconds until all are done."""
        half = self.median(name) / 2
        say(f"engine: {name}, killed after {half:.1f} s")
        if name == RAW:
            lost = self.requests - self.raw(self.place.source, kill_after=half).answers
            return lost, half + self.median(RAW)
        self.place.forget()
        lost = self.requests - self.submit(name, kill_after=half).answers
        again = self.submit(name)
        self.check()
        return lost, half + again.seconds

    def median(self, name: str) -> float:
        return statistics.median(one.seconds for one in self.seen[name])

    def outside(self) -> float:
        return statistics.median(one.seconds - one.engine for one in self.seen[SUBMIT])

    def allowed(self) -> float:
        return 2 + 0.01 * statistics.median(one.engine for one in self.seen[SUBMIT])


def write_tasks(path: Path, count: int) -> None:
    """The example's rows, again and again, under ids of their own."""
    rows = [json.loads(line) for line in (DIGITS / "tasks.jsonl").read_text("utf-8").splitlines()]
    with open(path, "w", encoding="utf-8") as stream:
        stream.writelines(
            json.dumps({**rows[number % len(rows)], "id": f"row-{number}"}) + "\n" for number in range(count)
        )


def beside(trial: Trial) -> Table:
    rows = []
    for name, seen in trial.seen.items():
        first = statistics.median(one.first or one.seconds for one in seen)
        outside = f"{trial.outside():.2f}" if name == SUBMIT else ""
        memory = [f"{max(one.largest_mb for one in seen):,.0f}", f"{max(one.sum_mb for one in seen):,.0f}"]
        rows.append([name, f"{trial.median(name):.1f}", outside, f"{first:.1f}", *memory])
    columns = ["", "seconds", "of these without an engine", "first answer on the disk after", "largest MB", "sum MB"]
    return Table("", columns, rows)


def killing(trial: Trial, report: Report) -> Table:
    """Whole jobs, and the same killed at half of their time."""
    for name in (RAW, SUBMIT):
        trial.whole(name)
    killed = {name: trial.kill(name) for name in trial.seen}
    report.raw["killed"] = killed
    columns = ["killed at half time", "seconds of the whole", "rows to be done again", "seconds, until all are done"]
    return Table(
        f"{trial.requests:,} requests in {KILLED_SHARDS} shards",
        columns,
        [
            [name, f"{trial.median(name):.1f}", f"{lost:,} of {trial.requests:,}", f"{whole:.1f}"]
            for name, (lost, whole) in killed.items()
        ],
    )


def main() -> None:
    arguments = parser(__doc__, rounds=3)
    arguments.add_argument("--requests", type=int, help="[default: 1000]")
    arguments.add_argument("--killed", type=int, help="requests of the jobs that are killed [default: 12000]")
    arguments.add_argument("--parts", help=f"of {','.join(PARTS)} [default: all]")
    given = arguments.parse_args()
    requests = given.requests or (60 if given.quick else 1_000)
    killed_requests = given.killed or (80 if given.quick else 12_000)
    rounds = min(given.rounds, 1) if given.quick else given.rounds
    parts = given.parts.split(",") if given.parts else ["beside", "kill"] if given.quick else PARTS
    report = Report(
        "engine",
        "vLLM",
        f"{requests:,} requests in {SHARDS} shards to the example's model; raw run_batch and submit take turns, "
        f"medians of {rounds}. The answers were compared with raw run_batch's.",
        quick=given.quick,
    )
    with workplace(given.folder) as folder:
        trial = Trial(folder / "trial", requests, SHARDS)
        for _ in range(rounds):
            trial.whole(RAW)
            trial.whole(SUBMIT)
            if "serve" in parts:
                trial.whole(SERVE)
        report.tables.append(beside(trial))
        what = "vLLM: seconds of submit without an engine; allowed are 2 s + 1% of the engine's"
        report.goals.append(Goal(what, trial.outside(), round(trial.allowed(), 2), most=True, unit="s"))
        if "shards" in parts:
            each = trial.each_shard()
            times = each / trial.median(SUBMIT)
            report.goals.append(Goal("vLLM: one raw start per shard, in times of submit", times, FAR_AHEAD))
            row = [f"{SHARDS} raw starts, one per shard", f"{each:.1f}", f"{times:.2f}"]
            report.tables.append(Table("", ["", "seconds", "times of submit"], [row]))
        if "kill" in parts:
            report.tables.append(killing(Trial(folder / "killed", killed_requests, KILLED_SHARDS), report))
    report.raw["seen"] = {name: [one._asdict() for one in seen] for name, seen in trial.seen.items()}
    report.finish(given.json, given.folder)


if __name__ == "__main__":
    main()
