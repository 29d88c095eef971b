"""Images in the places that the text gives them, through a real vLLM: the example model's answers prove the order.

The model reads «second» as the picture next before the question, and «first» as the one before that, however many there
are. So each row's answer says which picture stands in one place, and a run of rows with all orders says it of each.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from batchkit import outcomes
from batchkit.preparation import prepare
from batchkit.runs import Run
from batchkit.submission import submit

DIGITS = Path(__file__).parent.parent / "examples" / "digits"
ENGINE_ARGS = ["--enforce-eager", "--max-model-len", "256", "--dtype", "float32"]
ENGINE_ARGS += ["--limit-mm-per-prompt", '{"image":3}']
FIRST = "Which digit is in the first image?"
SECOND = "Which digit is in the second image?"
ROWS = 100

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]


def known_digits() -> dict[str, str]:
    """Pictures of the example's task file whose digit it tells."""
    digits = {}
    for line in (DIGITS / "tasks.jsonl").read_text().splitlines():
        row = json.loads(line)
        names = row["image"] if isinstance(row["image"], list) else [row["image"]]
        if row["truth"].isdigit():
            digits[names["second" in row["question"]]] = row["truth"]
    return digits


def named(field: str) -> str:
    return f"<image_start>[{field}]<image_end>"


Write = Callable[[list[str], list[int]], tuple[str, int]]
"""From the fields in the order wanted, and that order, to the question and the number of the picture it asks for."""

KINDS: dict[str, Write] = {
    "two, named, second": lambda names, order: (f"{named(names[0])} : {named(names[1])}{SECOND}", order[1]),
    "two, named, first": lambda names, order: (f"{named(names[0])}:{named(names[1])}{FIRST}", order[0]),
    "three, named, second": lambda names, order: ("".join(map(named, names)) + SECOND, order[2]),
    "three, named, first": lambda names, order: ("".join(map(named, names)) + FIRST, order[1]),
    "three, the last behind the text": lambda names, order: (
        f"{named(names[0])}{named(names[1])}{SECOND}{named(names[2])}",
        order[1],
    ),
    "three, one named and two next": lambda names, order: (f"{named(names[0])}<image>:<image>{SECOND}", max(order[1:])),
}


def make_rows() -> list[dict[str, Any]]:
    """Rows with different digits, and as many of each kind and order; `truth` is the digit in the place asked for."""
    chance = random.Random(5)
    digits = known_digits()
    pictures = sorted(digits)
    rows = []
    for kind, write in KINDS.items():
        count = 2 if kind.startswith("two") else 3
        orders = list(itertools.permutations(range(count)))
        for number in range(ROWS // len(orders)):
            chosen = chance.sample(pictures, count)
            while len({digits[name] for name in chosen}) < count:
                chosen = chance.sample(pictures, count)
            for order in orders:  # the same pictures in every order
                fields = [f"picture_{index}" for index in order]
                question, asked = write(fields, list(order))
                row = {f"picture_{index}": name for index, name in enumerate(chosen)}
                rows.append(
                    {"id": f"{kind} {number} {order}", "kind": kind, "group": f"{kind} {number}", **row}
                    | {"question": question, "truth": digits[chosen[asked]]}
                )
    return rows


def test_each_answer_is_about_the_picture_that_its_placeholder_puts_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}.items():
        monkeypatch.setenv(name, value)
    rows = make_rows()
    tasks = tmp_path / "tasks.jsonl"
    tasks.write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = prepare(
        tasks,
        tmp_path / "run",
        model=str(DIGITS / "model"),
        image_root=str(DIGITS),
        max_tokens=4,
        # Where no placeholder names them: the row's own order.
        image_field=("picture_0", "picture_1", "picture_2"),
    )
    assert report.rejected == 0
    run = Run.open(tmp_path / "run")
    submitted = submit(run, engine_args=ENGINE_ARGS)
    assert (submitted.starts, submitted.responses) == (1, len(rows))
    answers = [
        outcome.response.answer if outcome.response is not None else None
        for seal in run.seals()
        for outcome in outcomes.load(run, seal).outcomes
    ]

    for kind in KINDS:
        right = [answer == row["truth"] for row, answer in zip(rows, answers, strict=True) if row["kind"] == kind]
        print(f"{kind}: {sum(right)} of {len(right)} answers are about the picture in the place asked for")
        # With the third picture behind the question, the model is far from what it was trained on.
        assert sum(right) >= (0.85 if "behind" in kind else 0.95) * len(right)

    # The same pictures and the same question: only their order changes, and the answer with it.
    pairs = list(zip(rows, answers, strict=True))
    two = [pair for pair in pairs if pair[0]["kind"].startswith("two")]
    changed = [one[1] != other[1] for one, other in zip(two[::2], two[1::2], strict=True)]
    assert all(one[0]["group"] == other[0]["group"] for one, other in zip(two[::2], two[1::2], strict=True))
    print(f"{sum(changed)} of {len(changed)} answers change when the two placeholders are swapped")
    assert sum(changed) >= 0.95 * len(changed)
