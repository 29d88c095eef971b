"""What a plan says of other resolutions, against plans that ask for them."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from PIL import Image

from batchkit import preparation, resolutions
from batchkit.cli import main
from batchkit.resolutions import Resolution
from tests.conftest import WriteTasks

OPENAI: dict[str, Any] = {"model": "gpt-4o", "backend": "openai", "max_tokens": 50, "workers": 1}
WAYS: dict[str, dict[str, Any]] = {
    "unchanged": {},
    "--fit gpt-4o": {"fit": "gpt-4o"},
    "--max-side 1024": {"max_side": 1024},
    "--max-side 768": {"max_side": 768},
    "--max-side 512": {"max_side": 512},
}


@pytest.fixture
def album(tmp_path: Path, write_tasks: WriteTasks) -> Callable[..., Path]:
    """A task file with so many photographs of several sizes."""

    def write(count: int, *sizes: tuple[int, int], kind: str = "jpg") -> Path:
        chance = random.Random(1)
        rows = []
        for index in range(count):
            size = sizes[index % len(sizes)]
            picture = Image.effect_noise((size[0] // 8, size[1] // 8), 70).resize(size, Image.Resampling.BICUBIC)
            picture.convert("RGB").save(tmp_path / f"{index}.{kind}", quality=chance.choice([75, 90]))
            rows.append({"image": f"{index}.{kind}", "question": "What is it?"})
        return write_tasks(rows)

    return write


def by_name(tasks: Path, **options: Any) -> dict[str, Resolution]:
    return {one.name: one for one in preparation.plan(tasks, **options).resolutions}


@pytest.mark.parametrize("asked", [{}, {"max_side": 900}, {"fit": "gpt-4o"}], ids=["unchanged", "max-side", "fit"])
def test_each_resolution_is_about_what_a_plan_with_it_says(album: Callable[..., Path], asked: dict[str, Any]) -> None:
    tasks = album(9, (1600, 1200), (900, 700), (400, 300))
    found = by_name(tasks, **OPENAI, **asked)
    assert found.keys() == {"as given", *(name for name, way in WAYS.items() if way != asked)}
    for name, resolution in found.items():
        plan = preparation.plan(tasks, **OPENAI, **(asked if name == "as given" else WAYS[name]))
        assert plan.tokens is not None
        assert plan.estimate is not None
        assert resolution.image_tokens == plan.tokens.image
        assert resolution.usd == plan.estimate.batch_usd
        assert resolution.shards == plan.shards == 1
        if resolution.sampled is None:
            assert resolution.requests_bytes == plan.requests_bytes
        else:
            assert resolution.requests_bytes == pytest.approx(plan.requests_bytes, rel=0.05)
            assert 3 <= resolution.sampled <= 9
    assert found["as given"].sampled is None
    assert found["as given"].shrunk == (3 if asked else 0)
    assert found["--max-side 512"].shrunk == 6


def test_bytes_are_exact_where_no_image_changes(album: Callable[..., Path]) -> None:
    found = by_name(album(4, (500, 400)), **OPENAI)
    assert {one.requests_bytes for one in found.values()} == {found["as given"].requests_bytes}
    assert {(one.shrunk, one.sampled, one.shards) for one in found.values()} == {(0, None, 1)}


def test_shards_follow_from_the_bytes(album: Callable[..., Path]) -> None:
    tasks = album(12, (1600, 1200))
    found = by_name(tasks, **OPENAI, max_bytes=1_500_000)
    for side in (1024, 512):
        shards = preparation.plan(tasks, **OPENAI, max_bytes=1_500_000, max_side=side).shards
        assert abs(found[f"--max-side {side}"].shards - shards) <= 1
    assert found["as given"].shards > found["--max-side 512"].shards


def test_the_sample_stays_small_and_is_spread(album: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resolutions, "SAMPLED", 4)
    tasks = album(30, (600, 450), (700, 500))
    found = by_name(tasks, **OPENAI)
    sampled = found["--max-side 512"].sampled
    assert sampled in (2, 3, 4)
    truth = preparation.plan(tasks, **OPENAI, max_side=512).requests_bytes
    assert found["--max-side 512"].requests_bytes == pytest.approx(truth, rel=0.25)


def test_the_tokens_of_a_local_model_are_told_without_a_price(album: Callable[..., Path]) -> None:
    found = by_name(album(2, (1600, 1200)), model="/models/mine", fit="qwen2.5-vl", workers=1)
    assert found["as given"].image_tokens == 2 * 57 * 43
    assert found["as given"].usd is None
    assert "--fit qwen2.5-vl" not in found
    unknown = by_name(album(2, (1600, 1200)), model="/models/mine", workers=1)
    assert unknown["as given"].image_tokens is None
    assert list(unknown) == ["as given", "--max-side 1024", "--max-side 768", "--max-side 512"]


def test_another_format_is_estimated_in_it(album: Callable[..., Path]) -> None:
    tasks = album(4, (1200, 900), kind="png")
    found = by_name(tasks, **OPENAI, image_format="jpeg", max_side=600)
    truth = preparation.plan(tasks, **OPENAI, image_format="jpeg").requests_bytes
    assert found["unchanged"].requests_bytes == pytest.approx(truth, rel=0.05)
    assert found["unchanged"].shrunk == 0


def test_rows_without_images_have_no_resolutions(write_tasks: WriteTasks) -> None:
    assert preparation.plan(write_tasks([{"question": "a"}]), model="gpt-4o", backend="openai").resolutions == []


def test_an_image_that_breaks_when_it_is_read_spoils_no_plan(album: Callable[..., Path], tmp_path: Path) -> None:
    tasks = album(3, (1600, 1200))
    data = bytearray((tmp_path / "1.jpg").read_bytes())
    data[700:-2] = bytes(len(data) - 702)
    (tmp_path / "1.jpg").write_bytes(data)
    report = preparation.plan(tasks, **OPENAI)
    assert report.requests == 3
    assert {one.sampled for one in report.resolutions} <= {None, 2, 3}


def test_the_table_stands_below_the_plan(album: Callable[..., Path], tmp_path: Path) -> None:
    tasks = album(2, (1600, 1200))
    arguments = ["prepare", str(tasks), str(tmp_path / "run"), "--model", "gpt-4o", "--backend", "openai", "--plan"]
    done = CliRunner().invoke(main, arguments)
    lines = done.stdout.splitlines()
    assert lines[lines.index("") + 1].split() == ["images", "shrunk", "image", "tokens", "requests", "shards",
                                                  "price,", "batch"]  # fmt: skip
    table = {line[:15].strip(): line[15:].split() for line in lines[lines.index("") + 2 : -2]}
    assert list(table) == ["as given", "--fit gpt-4o", "--max-side 1024", "--max-side 768", "--max-side 512"]
    assert table["as given"][:2] == ["0", "1,530"]
    assert table["--fit gpt-4o"][:2] == ["2", "1,530"]
    assert table["--fit gpt-4o"][2].startswith("~")
    assert not table["as given"][2].startswith("~")
    assert lines[-2:] == [
        "~: estimated, by making 2 images smaller, spread over the rows",
        "prices are of the input alone: no --max-tokens",
    ]
    assert not (tmp_path / "run").exists()
