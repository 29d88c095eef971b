"""Puts the goals of the last `make bench` into docs/performance.md, between its two marks.

What is said there of goals that are not met, and the table of the README, are written by hand:

    python benchmarks/fill_docs.py
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "results.json"
DOCS = ROOT / "docs" / "performance.md"
BEGIN, END = "<!-- figures -->\n", "<!-- end -->"


def main() -> None:
    whole = json.loads(RESULTS.read_text("utf-8"))
    if whole["quick"]:
        sys.exit(f"{RESULTS}: made with --quick: these figures mean nothing")
    lines = ["| what | wanted | measured | met | alone |", "|---|---|---|---|---|"]
    for report in whole["reports"]:
        for goal in report["goals"]:
            wanted = f"{'at most' if goal['most'] else 'at least'} {goal['bound']:g} {goal['unit']}"
            measured = f"{goal['measured']:.3g} {goal['unit']}"
            met = "yes" if goal["met"] else "no"
            lines.append(f"| {goal['what']} | {wanted.strip()} | {measured.strip()} | {met} | `{report['command']}` |")
    before, _, rest = DOCS.read_text("utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    DOCS.write_text(f"{before}{BEGIN}" + "\n".join(lines) + f"\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
