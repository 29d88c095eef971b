"""All benchmarks, one after the other; `make bench` calls it. Writes `results.json`, `results.md` and the plot.

Each benchmark is a process of its own. One that fails is named in the results, and the exit code is 1.

    python benchmarks/run_all.py
    python benchmarks/run_all.py --quick --results /tmp/tried
    python benchmarks/run_all.py --only prepare_unchanged,merge
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from harness import say, workplace
from report import Goal, Report, Table, machine, markdown

HERE = Path(__file__).resolve().parent
ALL = (
    *("prepare_unchanged", "prepare_smaller", "merge", "startup"),
    *("engine", "live_client", "remote_images", "flat_memory"),
)
PLOTS = "*.svg"


def run(name: str, target: Path, folder: Path, *, quick: bool) -> dict[str, Any]:
    """The report of one benchmark. Raises `subprocess.CalledProcessError` where it fails."""
    script = [sys.executable, str(HERE / f"{name}.py"), "--json", str(target), "--folder", str(folder)]
    if name == "startup":
        script += ["--shards", "20", "--rows", "20", "--times", "3"] if quick else []
    elif quick:
        script.append("--quick")
    subprocess.run(script, check=True, stdout=subprocess.DEVNULL)
    found: dict[str, Any] = json.loads(target.read_text("utf-8"))
    return startup_report(found, quick=quick).as_json(folder) if name == "startup" else found


def startup_report(found: dict[str, Any], *, quick: bool) -> Report:
    """The figures of `startup.py`, which writes them bare."""
    commands = found["commands"]
    rows = [[name, f"{one['cpu_s']:.3f}", f"{one['wall_s']:.3f}"] for name, one in commands.items()]
    shards = found["shards"]
    return Report(
        "startup",
        "Start-up",
        f"Medians, on a run of {shards:,} shards with {found['rows_per_shard']:,} rows each.",
        quick=quick,
        tables=[Table("", ["command", "CPU s", "seconds"], rows)],
        goals=[
            Goal("start-up: CPU time of batchkit --help", commands["--help"]["cpu_s"], 0.15, most=True, unit="s"),
            Goal(f"start-up: status of {shards:,} shards", commands["status"]["wall_s"], 0.5, most=True, unit="s"),
        ],
        raw=found,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="sizes for trying whether all of it runs")
    parser.add_argument("--only", help=f"some of {','.join(ALL)}")
    parser.add_argument("--results", type=Path, default=HERE / "results", help="[default: benchmarks/results]")
    parser.add_argument("--folder", type=Path, help="where to work [default: a temporary folder]; 15 GB")
    given = parser.parse_args()
    names = given.only.split(",") if given.only else ALL
    if unknown := set(names) - set(ALL):
        parser.error(f"--only {min(unknown)}: is none of {', '.join(ALL)}")
    given.results.mkdir(parents=True, exist_ok=True)
    about, page = machine(given.folder), ""
    reports: list[dict[str, Any]] = []
    failed: dict[str, str] = {}
    with workplace(given.folder) as folder:
        for name in names:
            say(f"== {name}")
            began = time.monotonic()
            try:
                reports.append(run(name, folder / f"{name}.json", folder, quick=given.quick))
            except (subprocess.CalledProcessError, OSError, KeyError) as exc:
                failed[name] = str(exc)
            say(f"== {name}: {'failed' if name in failed else 'done'} after {time.monotonic() - began:.0f} s")
            for plot in folder.glob(PLOTS):
                (given.results / plot.name).write_bytes(plot.read_bytes())
            # Each time: what was measured stays when somebody ends it.
            whole = {"machine": about, "quick": given.quick, "failed": failed, "reports": reports}
            page = markdown(reports, about, failed)
            text = json.dumps(whole, indent=1, ensure_ascii=False) + "\n"
            (given.results / "results.json").write_text(text, encoding="utf-8")
            (given.results / "results.md").write_text(page, encoding="utf-8")
    print(page)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
