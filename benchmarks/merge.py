"""`merge` of rows with shuffled responses, beside the joins that people write; then the cost per row at many sizes.

The rivals are in `merge_rivals.py`, the rows in `merge_data.py`. All contenders get the same rows and responses: the
run has them in shards, shuffled within each, the others in one file, shuffled over all. Every result is checked
in every round.

    python benchmarks/merge.py
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import merge_data
import orjson
from harness import BATCHKIT, Contender, Result, compare, parser, say, workplace
from report import Goal, Report, Table, ranking, ratio, raw_times

RUN, PILE = "batchkit, its own run", "batchkit, a foreign pile"
ALONE = "batchkit, its own run, 1 worker"
START = " (one row)"
"""Behind the name of a contender: what it takes for a single row."""
PLAIN, DUCKDB = "plain dict loop", "DuckDB, with status and usage"
RIVALS = {
    PLAIN: "plain_dict",
    "orjson dict loop": "orjson_dict",
    "pandas": "pandas_join",
    "Polars": "polars_join",
    "DuckDB, the texts alone": "duckdb_join",
    DUCKDB: "duckdb_verdicts",
}
SIZES = (10_000, 50_000, 200_000, 1_000_000, 5_000_000)
PILE_ROWS = 1_000_000
"""Up to here the foreign pile is measured at every size, too."""
SERIES_ROWS, LEAST_ROUNDS, MOST_ROUNDS = 3_000_000, 2, 15
"""About so many rows are merged in all rounds of one size together: small ones vary more."""
CONSTANT = 1.25
"""A cost per row that varies by less is called constant. It is that of one worker: of several, how many there are, and
what their start takes, changes with the rows."""
MEMORY_MB = 150


class Setting:
    """A run with its responses, and (`foreign`) the same responses in a pile."""

    def __init__(self, folder: Path, rows: int, *, foreign: bool) -> None:
        say(f"merge: making {rows:,} rows")
        self.folder = folder
        self.rows = rows
        self.run = merge_data.make(folder, rows, foreign=foreign).path
        self._files = set(self.run.rglob("*"))

    def forget(self, _: Path) -> None:
        """Leave nothing in the run that an earlier round may have noted there."""
        for path in set(self.run.rglob("*")) - self._files:
            if path.is_file():
                path.unlink()

    def own(self, name: str = RUN, *options: str) -> Contender:
        def command(folder: Path) -> list[str]:
            return [*BATCHKIT, "merge", str(self.run), "-o", str(folder / "out.jsonl"), *options]

        return Contender(name, command, self.checked("raw_response"), self.forget)

    def pile(self, name: str = PILE) -> Contender:
        given = ["--tasks", str(self.folder / merge_data.TASKS), "--responses", str(self.folder / merge_data.RESPONSES)]
        return Contender(
            name,
            lambda folder: [*BATCHKIT, "merge", *given, "-o", str(folder / "out.jsonl")],
            self.checked("raw_response"),
        )

    def rival(self, name: str, key: str) -> Contender:
        script = [sys.executable, str(Path(__file__).with_name("merge_rivals.py")), key]
        files = [str(self.folder / merge_data.TASKS), str(self.folder / merge_data.RESPONSES)]
        return Contender(name, lambda folder: [*script, *files, str(folder / "out.jsonl")], self.checked("answer"))

    def checked(self, field: str) -> Callable[[Path], None]:
        """A check that every row is there, in order, with all its fields and its own answer in `field`."""

        def check(folder: Path) -> None:
            number = -1
            with open(folder / "out.jsonl", "rb") as stream:
                for number, line in enumerate(stream):
                    result: dict[str, Any] = orjson.loads(line)
                    assert result[field] == merge_data.answer_of(number), (number, line)
                    row = orjson.loads(merge_data.row_of(number))
                    assert {name: result[name] for name in row} == row, (number, line)
            assert number + 1 == self.rows, number + 1

        return check


def series(folder: Path, sizes: Sequence[int], *, quick: bool) -> dict[int, dict[str, Result]]:
    """The ways to merge, at each size, in turns with a single row."""
    found = {}
    one = Setting(folder / "one", 1, foreign=True)
    for rows in sizes:
        with workplace(folder) as place:
            foreign = rows <= PILE_ROWS
            setting = Setting(place / "rows", rows, foreign=foreign)
            contenders = [setting.own(), setting.own(ALONE, "--workers", "1"), one.own(RUN + START)]
            contenders += [setting.pile(), one.pile(PILE + START)] if foreign else []
            rounds = max(LEAST_ROUNDS, min(MOST_ROUNDS, SERIES_ROWS // rows))
            found[rows] = compare(contenders, 1 if quick else rounds, place, [setting.folder, one.folder])
    return found


def cost(results: dict[str, Result], name: str, rows: int) -> float:
    """µs for each row, without what the command takes for a single one."""
    start = results[(PILE if name == PILE else RUN) + START].seconds
    return (results[name].seconds - start) / rows * 1e6


def series_table(found: dict[int, dict[str, Result]]) -> Table:
    rows = [
        [
            name, f"{size:,}", f"{result.seconds:.2f}", f"{result.seconds / size * 1e6:.2f}",
            f"{cost(results, name, size):.2f}",
            f"{result.memory.largest_mb or 0:,.0f}", f"{result.memory.sum_mb or 0:,.0f}",
        ]
        for name in (RUN, ALONE, PILE)
        for size, results in found.items()
        if (result := results.get(name)) is not None
    ]  # fmt: skip
    columns = ["", "rows", "seconds", "µs/row", "µs/row without start-up", "largest MB", "sum MB"]
    return Table("Cost per row", columns, rows)


def plot(found: dict[int, dict[str, Result]], target: Path) -> None:
    import matplotlib as mpl

    mpl.use("svg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4))
    for name in (RUN, ALONE, PILE):
        sizes = [size for size, results in found.items() if name in results]
        costs = [cost(found[size], name, size) for size in sizes]
        axes.plot(sizes, costs, marker="o", label=name)
    axes.set(xscale="log", xlabel="rows", ylabel="µs per row, without start-up", title="batchkit merge")
    axes.set_ylim(bottom=0)
    axes.grid(visible=True, alpha=0.3)
    axes.legend()
    figure.savefig(target, bbox_inches="tight")


def goals(results: dict[str, Result], found: dict[int, dict[str, Result]]) -> list[Goal]:
    costs = [cost(one, ALONE, size) for size, one in found.items()]
    most = max(found)
    memory = found[most][RUN].memory
    return [
        Goal("merge: against the plain dict loop", ratio(results, PLAIN, RUN), 7),
        Goal("merge: against DuckDB on two threads", ratio(results, DUCKDB, RUN), 2),
        Goal("merge: time of a foreign pile against that of a run", ratio(results, PILE, RUN), 1.5, most=True),
        Goal(f"merge: largest process at {most:,} rows", memory.largest_mb or 0, MEMORY_MB, most=True, unit="MB"),
        Goal(f"merge: all processes at {most:,} rows", memory.sum_mb or 0, MEMORY_MB, most=True, unit="MB"),
        Goal(
            f"merge: the dearest row against the cheapest, {min(found):,} to {most:,} rows, 1 worker, without start-up",
            max(costs) / min(costs),
            CONSTANT,
            most=True,
        ),
    ]


def main() -> None:
    arguments = parser(__doc__, rounds=5)
    arguments.add_argument("--rows", type=int, help="[default: 200000]")
    arguments.add_argument("--sizes", help="of the series, separated by commas [default: 10000 to 5000000]")
    given = arguments.parse_args()
    rows = given.rows or (10_000 if given.quick else 200_000)
    rounds = min(given.rounds, 1) if given.quick else given.rounds
    sizes = tuple(map(int, given.sizes.split(","))) if given.sizes else (1000, 20_000) if given.quick else SIZES
    with workplace(given.folder) as folder:
        setting = Setting(folder / "rows", rows, foreign=True)
        contenders = [*(setting.rival(name, key) for name, key in RIVALS.items()), setting.own(), setting.pile()]
        results = compare(contenders, rounds, folder, [setting.folder])
        found = series(folder, sizes, quick=given.quick)
    start = found[min(found)][RUN + START].seconds
    report = Report(
        "merge",
        "Merge",
        f"{rows:,} rows with as many shuffled responses, medians of {rounds} rounds in turns, all results checked. "
        f"A merge of one row takes {start:.2f} s, which is taken off only where it says so. "
        f"Costs per row are medians of {LEAST_ROUNDS} rounds for the largest sizes to {MOST_ROUNDS} for the smallest.",
        quick=given.quick,
    )
    report.tables += [ranking("", results, rival=PLAIN, unit="rows", amount=rows), series_table(found)]
    report.goals += goals(results, found)
    report.raw = {
        "contenders": raw_times(results),
        "series": {str(size): raw_times(one) for size, one in found.items()},
    }
    if given.json is not None:
        given.json.parent.mkdir(parents=True, exist_ok=True)
        plot(found, given.json.with_name("merge_cost_per_row.svg"))
        report.plots.append("merge_cost_per_row.svg")
    report.finish(given.json, given.folder)


if __name__ == "__main__":
    main()
