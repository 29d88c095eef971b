"""`evaluate`: every figure of a real job, and of made ones, is computed here once more, another way.

`data/demo-results.jsonl.gz` are the results of `make demo`: 400 questions about pictures of digits, answered by the
example's model through vLLM 0.32 on two cores (November 2026).
"""

from __future__ import annotations

import base64
import gzip
import json
import math
import os
import random
import re
import statistics
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
import pytest
from PIL import Image

from batchkit.distributions import wilson
from batchkit.errors import InputError, UsageError
from batchkit.evaluation import Evaluation, evaluate
from batchkit.merging import merge
from batchkit.preparation import prepare
from batchkit.runs import Run
from batchkit.scores import compare
from batchkit.submission import submit
from tests.conftest import WriteTasks
from tests.fake_server import Server
from tests.made_runs import MadeRun, failure_line, response_line
from tests.test_cli import answer_all, call
from tests.test_generated_images import BLUE, JPEG, RED, chat, files_in, part, text

DEMO = Path(__file__).parent / "data" / "demo-results.jsonl.gz"
BAGEL_FIELDS = [
    "sample_id", "question", "ground_truth_reasoning", "ground_truth_answer", "ground_truth_images", "output_reasoning",
    "output_images", "num_reasoning_steps", "num_generated_images",
]  # fmt: skip
BAGEL_STATISTICS = [
    "total_samples", "successful", "failed", "avg_reasoning_steps", "avg_generated_images",
    "reasoning_steps_distribution", "image_count_distribution",
]  # fmt: skip


def load_json(path: Path | str) -> Any:
    return json.loads(Path(path).read_bytes())


def wilson_by_roots(right: int, count: int) -> tuple[float, float]:
    """Where (p̂ - p)² = z² p (1 - p) / n: the interval's definition, solved as a quadratic equation."""
    z2 = statistics.NormalDist().inv_cdf(0.975) ** 2
    share = right / count
    a, b, c = 1 + z2 / count, -(2 * share + z2 / count), share**2
    root = math.sqrt(max(0.0, b * b - 4 * a * c))
    return (-b - root) / (2 * a), (-b + root) / (2 * a)


def check_score(score: dict[str, Any], marks: list[tuple[bool, bool]]) -> None:
    """`marks` are (answered, right), one for each row that counts."""
    right, answered = sum(r for _, r in marks), sum(a for a, _ in marks)
    assert (score["rows"], score["answered"], score["right"]) == (len(marks), answered, right)
    assert score["accuracy"] == pytest.approx(right / len(marks))
    assert score["interval"] == pytest.approx(wilson_by_roots(right, len(marks)), abs=1e-9)
    if answered:
        assert score["accuracy_of_answered"] == pytest.approx(right / answered)
        assert score["interval_of_answered"] == pytest.approx(wilson_by_roots(right, answered), abs=1e-9)
    else:
        assert score["accuracy_of_answered"] is score["interval_of_answered"] is None


def check_spread(spread: dict[str, Any] | None, values: list[int]) -> None:
    """Nearest rank: in the sorted list, the value at ⌈p·n⌉."""
    if not values:
        assert spread is None
        return
    values = sorted(values)
    assert spread is not None
    assert spread["count"] == len(values)
    for name, per_cent in (("p50", 50), ("p90", 90), ("p99", 99)):
        assert spread[name] == values[math.ceil(per_cent * len(values) / 100) - 1], name
    assert (spread["min"], spread["max"]) == (values[0], values[-1])
    assert spread["mean"] == pytest.approx(statistics.fmean(values))


def test_every_figure_of_the_demo_is_right(tmp_path: Path) -> None:
    found = evaluate(results=DEMO, output=tmp_path / "e", answer_field="truth", by=["question"])
    results = [json.loads(line) for line in gzip.decompress(DEMO.read_bytes()).splitlines()]
    saved = load_json(tmp_path / "e" / "statistics.json")
    assert list(saved)[: len(BAGEL_STATISTICS)] == BAGEL_STATISTICS
    assert (saved["total_samples"], saved["successful"], saved["failed"]) == (400, 400, 0)
    exact = [(True, r["raw_response"].strip().lower() == r["truth"].lower()) for r in results]
    check_score(saved["accuracy"]["exact"], exact)
    assert saved["accuracy"]["exact"]["right"] == 398
    numbers = [(True, r["raw_response"].strip() == r["truth"]) for r in results if r["truth"].isdigit()]
    check_score(saved["accuracy"]["number"], numbers)
    assert "choice" not in saved["accuracy"]
    questions = {r["question"] for r in results}
    assert saved["by"]["question"].keys() == questions
    for question in questions:
        asked = [mark for mark, result in zip(exact, results, strict=True) if result["question"] == question]
        check_score(saved["by"]["question"][question]["exact"], asked)
    usage = [r["batchkit"]["usage"] for r in results]
    check_spread(saved["prompt_tokens"], [one["prompt_tokens"] for one in usage])
    check_spread(saved["completion_tokens"], [one["completion_tokens"] for one in usage])
    check_spread(saved["answer_characters"], [len(r["raw_response"]) for r in results])
    assert (saved["avg_reasoning_steps"], saved["reasoning_steps_distribution"]) == (1.0, {"1": 400})
    assert (saved["avg_generated_images"], saved["image_count_distribution"]) == (0.0, {"0": 400})
    assert saved["errors"] == []
    data = load_json(tmp_path / "e" / "evaluation_data.json")
    for place, (entry, result) in enumerate(zip(data, results, strict=True)):
        assert list(entry)[: len(BAGEL_FIELDS)] == BAGEL_FIELDS
        assert (entry["sample_id"], entry["question"]) == (place, result["question"])
        assert (entry["ground_truth_answer"], entry["output_reasoning"]) == (result["truth"], result["raw_response"])
        assert entry["right"]["exact"] == exact[place][1]
    overview = load_json(tmp_path / "e" / "summary.json")
    assert overview["accuracy"] == saved["accuracy"]
    assert overview["model"] == "examples/digits/model"
    assert found.statistics.accuracy["exact"].right == 398


CASES: list[tuple[Any, dict[str, Any], Any, dict[str, bool]]] = [
    ("Paris", {}, " paris\n", {"exact": True}),
    ("Paris", {}, "It is Paris.", {"exact": False}),
    ("Paris", {}, "<think>Rome?</think> Paris", {"exact": True}),
    (["colour", "color"], {}, "color", {"exact": True}),
    ("B", {}, "The answer is B.", {"exact": False, "choice": True}),
    ("(b)", {}, "**B**", {"exact": False, "choice": True}),
    ("B", {}, "C", {"exact": False, "choice": False}),
    ("red", {"A": "blue", "B": "Red", "C": ""}, "(B)", {"exact": False, "choice": True}),
    ("B", {"A": "blue", "B": "red"}, "Red", {"exact": False, "choice": True}),
    ("red", {"options": ["blue", "red"]}, "A", {"exact": False, "choice": False}),
    ("red", {"choices": {"a": "blue", "b": "red"}}, "b", {"exact": False, "choice": True}),
    (4, {}, "4", {"exact": True, "number": True}),
    ("1,200", {}, "about $1200.0 in all", {"exact": False, "number": True}),
    ("50%", {}, "It is 50 %", {"exact": False, "number": True}),
    (0.1, {}, "0.10000001", {"exact": False, "number": True}),
    (0.1, {}, "0.1001", {"exact": False, "number": False}),
    (0, {}, "0", {"exact": True, "number": True}),
    ("−3", {}, "-3", {"exact": False, "number": True}),
    ("4 apples", {}, "4", {"exact": False}),
    (True, {}, "true", {"exact": True}),
    ("12", {}, None, {"exact": False, "number": False}),
    ("A", {}, None, {"exact": False, "choice": False}),
    (None, {}, "x", {}),
    ("", {}, "x", {}),
    ([], {}, "x", {}),
    ("xy", {}, [0.5, 0.25], {"exact": False}),
    # an option's text may be a letter itself
    ("A", {"A": "B", "B": "A"}, "A", {"exact": True, "choice": True}),
    ("A", {"A": "B", "B": "A"}, "B", {"exact": False, "choice": False}),
    ("A", {"A": "B", "B": "A"}, "The answer is A.", {"exact": False, "choice": True}),
    ("E", {"A": "D", "B": "E"}, "E", {"exact": True, "choice": True}),
    ("E", {"A": "D", "B": "E"}, "The answer is E.", {"exact": False, "choice": True}),
    ("E", {"A": "D", "B": "E"}, "B", {"exact": False, "choice": True}),
    # JSON by its values
    ({"a": 1, "b": [2.0]}, {}, {"b": [2], "a": 1.0}, {"exact": True}),
    ('{"a": 1, "b": "X"}', {}, {"b": "x", "a": 1}, {"exact": True}),
    ({"a": 1}, {}, {"a": 2}, {"exact": False}),
    ({"a": 1}, {}, {"a": True}, {"exact": False}),
    (2, {}, 2.0, {"exact": True, "number": True}),
    ([1, 2], {}, [1.0, 2], {"exact": True, "number": False}),
    ([1, 2], {}, [2, 1], {"exact": False, "number": False}),
    ([1, 2], {}, "2", {"exact": True, "number": True}),
    ([["a"], ["b"]], {}, ["b"], {"exact": True}),
]  # fmt: skip


@pytest.mark.parametrize(("truth", "row", "raw", "expected"), CASES)
def test_answers_are_compared_in_every_way_that_applies(
    truth: Any, row: dict[str, Any], raw: Any, expected: dict[str, bool]
) -> None:
    assert compare(truth, row, raw, raw.strip() if isinstance(raw, str) else raw) == expected


def test_the_parsed_answer_counts_where_there_is_one() -> None:
    assert compare("blue", {}, "I would say blue, of course", "blue") == {"exact": True}
    assert compare("4", {}, '{"n": 4}', {"n": 4})["number"]


@pytest.mark.parametrize(
    ("right", "count", "low", "high"),
    # R. G. Newcombe, 1998, Statistics in Medicine 17, 857-872, table I, method 3.
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_the_interval_is_the_published_one(right: int, count: int, low: float, high: float) -> None:
    assert wilson(right, count) == pytest.approx((low, high), abs=5e-5)
    assert wilson(0, 0) is None


def test_the_interval_is_scipys() -> None:
    stats = pytest.importorskip("scipy.stats")
    for count in (1, 2, 17, 400):
        for right in {0, 1, count // 2, count - 1, count}:
            expected = stats.binomtest(right, count).proportion_ci(method="wilson")
            assert wilson(right, count) == pytest.approx((expected.low, expected.high), abs=1e-9)


def made_run(path: Path, rows: int, seed: int) -> tuple[MadeRun, list[dict[str, Any]]]:
    """Rows of two categories, some without a truth; answers right, wrong, cut off, failed and missing."""
    chance = random.Random(seed)
    made = MadeRun(path)
    tasks: list[dict[str, Any]] = []
    for number in range(rows):
        task: dict[str, Any] = {"id": number, "question": f"q{number}", "category": chance.choice(["a", "b", None, 3])}
        if chance.random() < 0.9:
            task["answer"] = chance.choice(["A", "B", "C"])
        tasks.append(task)
    made.add_shard([json.dumps(task).encode() for task in tasks])
    made.finish()
    lines = []
    for custom_id in made.ids:
        fate = chance.random()
        usage = {"prompt_tokens": chance.randrange(5, 500), "completion_tokens": chance.randrange(1, 90)}
        said = chance.choice(["A", "B", "The answer is C.", "none of them", "A\n\nbecause\n \nso"])
        if fate < 0.8:
            lines.append(response_line(custom_id, said, finish=chance.choice(["stop", "length"]), usage=usage))
        elif fate < 0.9:
            lines.append(failure_line(custom_id, 400, f"{chance.choice(['too long', 'no image'])}: {number} > 7"))
    made.add_attempt(0, lines)
    return made, tasks


@pytest.mark.parametrize("seed", range(4))
def test_every_figure_of_a_made_run_is_right(tmp_path: Path, seed: int) -> None:
    made, tasks = made_run(tmp_path / "run", 300, seed)
    found = evaluate(made.run.path, by=["category"])
    assert found.merged
    results = [json.loads(line) for line in (made.run.path / "results.jsonl").read_bytes().splitlines()]
    saved = load_json(made.run.path / "evaluation" / "statistics.json")
    verdicts = Counter(result["batchkit"]["verdict"] for result in results)
    assert {name: count for name, count in saved["verdicts"].items() if count} == verdicts
    answers = [result for result in results if result["batchkit"]["verdict"] in ("answered", "truncated")]
    assert (saved["total_samples"], saved["successful"], saved["failed"]) == (300, len(answers), 300 - len(answers))
    judged = [(task, result) for task, result in zip(tasks, results, strict=True) if "answer" in task]
    assert saved["without_truth"] == 300 - len(judged)
    letters = {"A": "A", "B": "B", "The answer is C.": "C", "none of them": None, "A\n\nbecause\n \nso": "A"}
    marks = {
        "exact": [(r["raw_response"] is not None, r["raw_response"] == t["answer"]) for t, r in judged],
        "choice": [
            (r["raw_response"] is not None, r["raw_response"] is not None and letters[r["raw_response"]] == t["answer"])
            for t, r in judged
        ],
    }
    assert saved["accuracy"].keys() == marks.keys()
    for way, of_all in marks.items():
        check_score(saved["accuracy"][way], of_all)
        for value, name in (("a", "a"), ("b", "b"), (None, "(none)"), (3, "3")):
            group = [mark for mark, (task, _) in zip(of_all, judged, strict=True) if task["category"] == value]
            check_score(saved["by"]["category"][name][way], group)
    for name in ("prompt", "completion"):
        counts = [r["batchkit"]["usage"][f"{name}_tokens"] for r in results if r["batchkit"]["usage"]]
        check_spread(saved[f"{name}_tokens"], counts)
    check_spread(saved["answer_characters"], [len(result["raw_response"]) for result in answers])
    steps = [3 if "because" in result["raw_response"] else 1 for result in answers]
    assert saved["reasoning_steps_distribution"] == {str(n): steps.count(n) for n in sorted(set(steps))}
    assert saved["avg_reasoning_steps"] == pytest.approx(statistics.fmean(steps))
    check_errors(saved["errors"], results)


def check_errors(errors: list[dict[str, Any]], results: list[dict[str, Any]]) -> None:
    kinds = Counter(
        (r["batchkit"]["verdict"], re.sub("[0-9]+", "#", r["error"])) for r in results if r["error"] is not None
    )
    assert {(error["verdict"], error["message"]): error["count"] for error in errors} == kinds
    assert [error["count"] for error in errors] == sorted(kinds.values(), reverse=True)
    for error in errors:
        assert len(error["examples"]) == min(3, error["count"])
        for example in error["examples"]:
            result = results[example["line"] - 1]
            assert (result["batchkit"]["custom_id"], result["error"]) == (example["custom_id"], example["message"])


@pytest.fixture
def bagel(tmp_path: Path) -> MadeRun:
    """Rows as the Bagel scripts have them, and answers with images between their texts."""
    for name, colour in (("p1.png", "red"), ("p2.jpg", "blue")):
        Image.new("RGB", (4, 4), colour).save(tmp_path / name)
    made = MadeRun(tmp_path / "run")
    row = {
        "Question": "<image_start>[problem_image_1]<image_end> and then?",
        "Text Reasoning Trace": "first, then",
        "Final Answer": "B",
        "problem_image_2": "p2.jpg",
        "problem_image_1": "p1.png",
        "reasoning_image_10": "r10.png",
        "reasoning_image_2": "r2.png",
    }
    made.add_shard([json.dumps(row).encode(), json.dumps({**row, "problem_image_2": "gone.png"}).encode()])
    made.finish()
    content = [text("Step 1"), part(RED), text("Step 2\n\nstill"), part(JPEG), text("B")]
    made.add_attempt(0, [chat(made.ids[0], content), failure_line(made.ids[1], 400, "too long")])
    return made


def test_rows_of_the_bagel_scripts_are_understood_without_options(bagel: MadeRun) -> None:
    evaluate(bagel.run.path)
    folder = bagel.run.path / "evaluation"
    first, second = load_json(folder / "evaluation_data.json")
    assert {name: first[name] for name in BAGEL_FIELDS} == {
        "sample_id": 0,
        "question": "<image_start>[problem_image_1]<image_end> and then?",
        "ground_truth_reasoning": "first, then",
        "ground_truth_answer": "B",
        "ground_truth_images": ["r2.png", "r10.png"],
        "output_reasoning": "Step 1\n\nStep 2\n\nstill\n\nB",
        "output_images": ["../output_images/0/output_image_1.png", "../output_images/0/output_image_2.jpg"],
        "num_reasoning_steps": 3,
        "num_generated_images": 2,
    }
    assert [(folder / name).read_bytes() for name in first["output_images"]] == [RED, JPEG]
    assert (second["output_reasoning"], second["num_reasoning_steps"], second["verdict"]) == (None, 0, "failed")
    saved = load_json(folder / "statistics.json")
    assert saved["answer_field"] == "Final Answer"
    assert (saved["reasoning_steps_distribution"], saved["image_count_distribution"]) == ({"3": 1}, {"2": 1})


def test_copied_images_make_the_folders_of_the_bagel_scripts(bagel: MadeRun, tmp_path: Path) -> None:
    found = evaluate(bagel.run.path, copy_images=True, image_root=tmp_path)
    folder = bagel.run.path / "evaluation"
    assert files_in(folder / "output_images") == {
        "0/problem_image_1.png": (tmp_path / "p1.png").read_bytes(),
        "0/problem_image_2.jpg": (tmp_path / "p2.jpg").read_bytes(),
        "0/output_image_1.png": RED,
        "0/output_image_2.jpg": JPEG,
        "1/problem_image_1.png": (tmp_path / "p1.png").read_bytes(),
    }
    assert load_json(folder / "evaluation_data.json")[0]["output_images"] == [
        "output_images/0/output_image_1.png",
        "output_images/0/output_image_2.jpg",
    ]
    assert (found.lost, found.first_lost) == (
        1,
        [f"{bagel.run.path / 'results.jsonl'}:2: image not found: gone.png"],
    )


def test_the_images_of_the_field_that_prepare_was_told_are_copied(
    write_tasks: WriteTasks, picture: Any, tmp_path: Path
) -> None:
    shown = picture("photos/a.png")
    tasks = write_tasks([{"question": "a", "photo": ["photos/a.png"], "truth": "x"}])
    call("prepare", tasks, tmp_path / "run", "--model", "m", "--image-field", "photo", "--answer-field", "truth")
    answer_all(tmp_path / "run", {0: "X"})
    found = evaluate(tmp_path / "run", copy_images=True)
    assert files_in(tmp_path / "run" / "evaluation" / "output_images") == {"0/problem_image_1.png": shown.read_bytes()}
    assert found.statistics.accuracy["exact"].right == 1
    assert found.statistics.answer_field == "truth"


def test_the_answer_field_is_kept_in_the_run_and_never_sent(write_tasks: WriteTasks, tmp_path: Path) -> None:
    tasks = write_tasks([{"question": "a", "truth": "the-secret"}])
    call("prepare", tasks, tmp_path / "run", "--model", "m", "--answer-field", "truth")
    run = Run.open(tmp_path / "run")
    assert run.manifest.options["answer_field"] == "truth"
    assert b"the-secret" not in run.requests_path(0).read_bytes()
    call("prepare", tasks, tmp_path / "other", "--model", "m")
    assert run.requests_path(0).read_bytes() == Run.open(tmp_path / "other").requests_path(0).read_bytes()


def test_evaluating_again_gives_the_same_and_leaves_the_summary_of_merge_alone(tmp_path: Path) -> None:
    made, _ = made_run(tmp_path / "run", 40, 1)
    evaluate(made.run.path)
    first = files_in(made.run.path)
    evaluate(made.run.path)
    assert files_in(made.run.path) == first
    assert "rows" in load_json(made.run.path / "summary.json")
    with pytest.raises(UsageError, match=r"summary\.json of a merge"):
        evaluate(made.run.path, output=made.run.path)


def test_an_evaluation_that_fails_leaves_the_one_before(tmp_path: Path) -> None:
    made, _ = made_run(tmp_path / "run", 40, 1)
    evaluate(made.run.path)
    folder = made.run.path / "evaluation"
    before = files_in(folder)
    for options in ({"by": ["nonsense"]}, {"answer_field": "nonsense"}, {"by": ["id"]}):
        if "id" in options.get("by", []):
            big, _ = made_run(tmp_path / "big", 1001, 1)
            with pytest.raises(UsageError, match="more than 1,000 different values"):
                evaluate(big.run.path, by=["id"])
            assert list((big.run.path / "evaluation").iterdir()) == []
        else:
            with pytest.raises(UsageError, match="nonsense: no row has this field"):
                evaluate(made.run.path, **options)
        assert files_in(folder) == before


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"id":1}\n', "r.jsonl:1: is no result of batchkit merge: it has no field 'batchkit'"),
        (b"id,question\n", "r.jsonl:1: is no result of batchkit merge: not a JSON object"),
        (b'{"batchkit":{"verdict":"nonsense"}}\n', "r.jsonl:1: is no result"),
        (b"\xff\xfe\n", "r.jsonl:1: is no result"),
        (b"", "r.jsonl: has no results"),
    ],
)
def test_what_is_no_results_file_is_an_error_with_its_line(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "r.jsonl").write_bytes(content)
    with pytest.raises(InputError) as caught:
        evaluate(results=tmp_path / "r.jsonl")
    assert message in caught.value.message
    assert caught.value.hint


def test_results_with_prefixed_names_are_read_as_well(write_tasks: WriteTasks, tmp_path: Path) -> None:
    tasks = write_tasks([{"question": "a", "error": "theirs", "answer": "x", "batchkit": {"verdict": 1}}])
    call("prepare", tasks, tmp_path / "run", "--model", "m")
    answer_all(tmp_path / "run", {0: "x"})
    call("merge", tmp_path / "run", "--prefix", "z_")
    assert evaluate(tmp_path / "run").statistics.accuracy["exact"].right == 1


def test_the_command_prints_a_table_or_json_and_ends_with_0(tmp_path: Path) -> None:
    made, _ = made_run(tmp_path / "run", 60, 2)
    done = call("evaluate", made.run.path, "--by", "category", "-o", tmp_path / "e")
    assert done.exit_code == 0, done.stderr
    assert f"not merged yet: merged into {made.run.path / 'results.jsonl'}\n" in done.stderr
    assert re.match(r"60 rows: answered \d+, truncated \d+, failed \d+, missing \d+\n", done.stdout)
    assert re.search(
        r"^all rows +compared +rows +right +accuracy +95% interval +of answered$", done.stdout, re.MULTILINE
    )
    assert re.search(
        r"^\(none\) +exact +\d+ +\d+ +[\d.]+%  [\d.]+% – [\d.]+% +[\d.]+% of \d+$", done.stdout, re.MULTILINE
    )
    assert re.search(r"^ +\d+  failed: (too long|no image): # > # \(lines \d+", done.stdout, re.MULTILINE)
    printed = call("evaluate", made.run.path, "--by", "category", "--json")
    assert json.loads(printed.stdout) == load_json(made.run.path / "evaluation" / "statistics.json")
    assert printed.exit_code == 0


def test_responses_that_came_since_the_merge_are_warned_of(tmp_path: Path) -> None:
    made, _ = made_run(tmp_path / "run", 20, 1)
    evaluate(made.run.path)
    written = (made.run.path / "results.jsonl").stat().st_mtime_ns
    os.utime(made.run.responses_path(0, 1), ns=(written + 1, written + 1))
    assert "warning: responses have come since" in call("evaluate", made.run.path).stderr


def test_rows_without_truths_are_counted_and_say_how_to_name_the_field(tmp_path: Path) -> None:
    made = MadeRun(tmp_path / "run")
    made.add_shard([b'{"question":"a","gold":"x"}'])
    made.finish()
    found: Evaluation = evaluate(made.run.path)
    assert (found.statistics.without_truth, found.statistics.accuracy) == (1, {})
    assert "--answer-field names the field" in call("evaluate", made.run.path).stdout


def test_memory_does_not_grow_with_the_results(tmp_path: Path) -> None:
    chance = random.Random(0)
    with open(tmp_path / "r.jsonl", "w", encoding="utf-8") as stream:
        for number in range(30_000):
            result = {
                "id": number, "answer": "A", "model": "m", "raw_response": "A" * chance.randrange(1, 3000),
                "parsed_answer": None, "error": None,
                "batchkit": {"custom_id": str(number), "verdict": "answered", "usage": {"prompt_tokens": number % 900}},
            }  # fmt: skip
            stream.write(json.dumps(result) + "\n")
    process = psutil.Process()
    before = process.memory_info().rss
    found = evaluate(results=tmp_path / "r.jsonl")
    assert found.statistics.total_samples == 30_000
    assert process.memory_info().rss - before < 20_000_000  # the file has 45 MB


def test_images_that_are_named_by_links_stay_links(tmp_path: Path) -> None:
    made = MadeRun(tmp_path / "run")
    made.add_shard([b'{"question":"a"}'])
    made.finish()
    away = {"type": "image_url", "image_url": {"url": "https://a.example/b.png"}}
    made.add_attempt(0, [chat(made.ids[0], [away, part(BLUE)])])
    evaluate(made.run.path, copy_images=True)
    assert load_json(made.run.path / "evaluation" / "evaluation_data.json")[0]["output_images"] == [
        "https://a.example/b.png",
        "output_images/0/output_image_2.png",
    ]


def test_an_evaluation_never_replaces_what_a_merge_has_written(bagel: MadeRun, tmp_path: Path) -> None:
    merge(bagel.run, output=tmp_path / "other" / "results.csv")
    merge(bagel.run, output=tmp_path / "out" / "results.jsonl")
    (tmp_path / "out" / "results.jsonl").rename(tmp_path / "out" / "moved.jsonl")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "statistics.json").write_text("[]")
    for name in ("other", "out", "mine"):
        before = files_in(tmp_path / name)
        with pytest.raises(UsageError, match="would be replaced") as caught:
            evaluate(bagel.run.path, output=tmp_path / name, copy_images=True)
        assert "-o FOLDER" in str(caught.value.hint)
        assert files_in(tmp_path / name) == before
    for _ in range(2):  # ours is replaced
        evaluate(bagel.run.path, output=tmp_path / "new", copy_images=True, image_root=tmp_path)
    assert (tmp_path / "new" / "output_images").exists()
    (tmp_path / "new" / "summary.json").unlink()  # killed before the last file was at its place
    evaluate(bagel.run.path, output=tmp_path / "new")


def test_values_that_look_alike_are_told_apart_and_our_own_fields_too(tmp_path: Path) -> None:
    lines = []
    values: list[Any] = [1, "1", True, "true", None, "(none)", "a\nb", "plain", ""]
    for number, value in enumerate(values):
        note = {"custom_id": str(number), "verdict": "answered" if number else "truncated"}
        result = {"answer": "x", "kind": value, "model": f"m{number % 2}", "raw_response": "x", "parsed_answer": "x"}
        lines.append(json.dumps({**result, "error": None, "batchkit": note}))
    (tmp_path / "r.jsonl").write_text("\n".join(lines) + "\n")
    found = evaluate(results=tmp_path / "r.jsonl", by=["kind", "model", "verdict"])
    names = {"1", '"1"', "true", '"true"', "(none)", '"(none)"', '"a\\nb"', "plain", '""'}
    assert found.statistics.by["kind"].keys() == names
    assert {name: one["exact"].rows for name, one in found.statistics.by["model"].items()} == {"m0": 5, "m1": 4}
    assert found.statistics.by["verdict"].keys() == {"answered", "truncated"}
    overview = load_json(Path(found.folder) / "summary.json")
    assert (overview["model"], overview["models"]) == (None, ["m0", "m1"])


@pytest.mark.parametrize("name", ["t.csv", "t.tsv"])
def test_images_that_are_not_in_the_rows_are_copied_from_the_requests(tmp_path: Path, name: str) -> None:
    cell = "," if name == "t.csv" else "\t"
    rows = [cell.join([str(n), "which?", "x", base64.b64encode(data).decode()]) for n, data in ((0, RED), (2, BLUE))]
    rows.insert(1, cell.join(["1", "", "x", "gone.png"]))
    if name == "t.tsv":
        rows[2] = "2\twhich?\tx\t0"  # the image of row 0
    (tmp_path / name).write_text("\n".join([cell.join(["index", "question", "answer", "image"]), *rows]) + "\n")
    call("prepare", tmp_path / name, tmp_path / "run", "--model", "m", "--max-requests", "1")
    answer_all(tmp_path / "run", {0: "x", 2: "x"})
    evaluate(tmp_path / "run", copy_images=True)
    copied = files_in(tmp_path / "run" / "evaluation" / "output_images")
    assert {"0/problem_image_1.png", "2/problem_image_1.png"} == copied.keys()
    assert copied["2/problem_image_1.png"] == (RED if name == "t.tsv" else BLUE)


@pytest.mark.parametrize(("max_requests", "requests"), [(100, 3), (3, 4)])
def test_rows_that_share_a_request_get_the_images_that_are_only_there(
    tmp_path: Path, server: Server, max_requests: int, requests: int
) -> None:
    import pyarrow as pa
    from pyarrow import parquet as pq

    asked = [(RED, "one"), (BLUE, "two"), (RED, "one"), (b"no image", "bad"), (RED, "one"), (BLUE, "three")]
    rows = [{"image": {"bytes": data, "path": None}, "question": question} for data, question in asked]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "t.parquet")
    options: dict[str, Any] = {"backend": "server", "dedupe": True, "max_requests": max_requests}
    report = prepare(tmp_path / "t.parquet", tmp_path / "run", model="m", workers=1, **options)
    assert (report.requests, report.rejected) == (requests, 1)
    submit(tmp_path / "run", endpoints=[server.url])
    merge(tmp_path / "run")
    assert evaluate(tmp_path / "run", copy_images=True).lost == 0
    copied = files_in(tmp_path / "run" / "evaluation" / "output_images")
    assert copied == {f"{n}/problem_image_1.png": data for n, (data, _) in enumerate(asked) if n != 3}


def test_images_of_rows_that_are_requests_are_copied_and_links_that_may_not_be_fetched_are_named(
    write_tasks: WriteTasks, tmp_path: Path
) -> None:
    away = {"type": "image_url", "image_url": {"url": "https://127.0.0.1:9/b.png?X-Amz-Signature=a-secret"}}
    body = {"model": "m", "messages": [{"role": "user", "content": [text("?"), away, part(RED)]}]}
    tasks = write_tasks([{"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": body}])
    call("prepare", tasks, tmp_path / "run", "--model", "m")
    answer_all(tmp_path / "run", {0: "x"})
    found = evaluate(tmp_path / "run", copy_images=True)
    folder = tmp_path / "run" / "evaluation"
    assert files_in(folder / "output_images") == {"0/problem_image_2.png": RED}
    assert found.lost == 1
    assert "https://127.0.0.1:9/b.png: 127.0.0.1 is 127.0.0.1, which is not a public address" in found.first_lost[0]
    assert "a-secret" not in found.first_lost[0]


def test_bagel_images_keep_their_numbers(tmp_path: Path) -> None:
    for number in (2, 10):
        (tmp_path / f"p{number}.png").write_bytes(RED)
    row = {"problem_image_10": "p10.png", "problem_image_2": "p2.png", "problem_image_1": None}
    note = {"custom_id": "0", "verdict": "failed"}
    ours = {"model": "m", "raw_response": None, "parsed_answer": None, "error": "e", "batchkit": note}
    (tmp_path / "r.jsonl").write_text(json.dumps({**row, **ours}) + "\n")
    found = evaluate(results=tmp_path / "r.jsonl", copy_images=True)
    assert files_in(Path(found.folder) / "output_images").keys() == {"0/problem_image_2.png", "0/problem_image_10.png"}


def test_small_things_of_evaluate(write_tasks: WriteTasks, tmp_path: Path) -> None:
    body = {"model": "m", "messages": [{"role": "user", "content": "what?"}]}
    line = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": body}
    call("prepare", write_tasks([line]), tmp_path / "requests", "--model", "m")
    answer_all(tmp_path / "requests", {0: "x"})
    found = evaluate(tmp_path / "requests", by="method")
    assert found.statistics.by.keys() == {"method"}
    assert load_json(Path(found.folder) / "evaluation_data.json")[0]["question"] == "what?"
    call("prepare", write_tasks([{"question": "a", "model": "mine"}], "b.jsonl"), tmp_path / "named", "--model", "m")
    answer_all(tmp_path / "named", {0: "x"})
    with pytest.raises(UsageError, match="not merged yet") as caught:
        evaluate(tmp_path / "named")
    assert caught.value.hint == f"batchkit merge {tmp_path / 'named'} --prefix answer_, then evaluate"
    with pytest.raises(UsageError, match="goes not with --flat"):
        merge(tmp_path / "named", flat=True, prefix="answer_")
