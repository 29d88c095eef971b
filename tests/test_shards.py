from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchkit.shards import Cutter, pack


@pytest.mark.parametrize(
    ("sizes", "max_requests", "max_bytes", "shards"),
    [
        pytest.param([], 3, 10, [], id="no-rows"),
        pytest.param([5, 5], 3, 10, [0, 0], id="exact-fit"),
        pytest.param([5, 6], 3, 10, [0, 1], id="one-byte-over"),
        pytest.param([1, 1, 1, 1], 3, 10, [0, 0, 0, 1], id="one-request-over"),
        pytest.param([11, 1], 3, 10, [0, 1], id="single-oversized-first"),
        pytest.param([1, 11, 1], 3, 10, [0, 1, 2], id="single-oversized-between"),
        pytest.param([0, 0, 0, 0], 3, 10, [0, 0, 0, 1], id="rejected-rows-count-as-rows"),
        pytest.param([10, 0], 3, 10, [0, 0], id="a-rejected-row-needs-no-room"),
    ],
)
def test_pack_cuts_at_the_limits(sizes: list[int], max_requests: int, max_bytes: int, shards: list[int]) -> None:
    assert list(pack(sizes, max_requests=max_requests, max_bytes=max_bytes)) == shards


@given(st.lists(st.integers(0, 20)), st.integers(1, 5), st.integers(1, 30))
def test_pack_numbers_rise_by_one_and_shards_are_within_limits(sizes: list[int], requests: int, limit: int) -> None:
    shards = list(pack(sizes, max_requests=requests, max_bytes=limit))
    assert len(shards) == len(sizes)
    assert sorted(set(shards)) == list(range(len(set(shards))))
    assert shards == sorted(shards)
    for shard in set(shards):
        members = [size for size, number in zip(sizes, shards, strict=True) if number == shard]
        assert len(members) <= requests
        assert sum(members) <= limit or len([size for size in members if size]) == 1


@pytest.mark.parametrize(
    ("requests", "max_requests", "max_bytes", "shards"),
    [
        pytest.param([(5, "a"), (5, "a"), (5, "b")], 9, 10, [(0, None), (0, 1), (0, None)], id="takes-no-bytes"),
        pytest.param([(5, "a"), (6, "b"), (4, "a")], 9, 10, [(0, None), (1, None), (1, None)], id="not-across-shards"),
        pytest.param([(1, "a"), (1, "a"), (1, "a")], 2, 10, [(0, None), (0, 1), (1, None)], id="counts-as-a-row"),
        pytest.param([(1, "a"), (0, None), (1, "b"), (1, "a")], 9, 10, [(0, None)] * 3 + [(0, 3)], id="not-neighbours"),
        pytest.param([(0, None), (0, None)], 9, 10, [(0, None), (0, None)], id="rejected-rows-are-not-alike"),
    ],
)
def test_a_cutter_finds_what_its_shard_has_already(
    requests: list[tuple[int, str | None]],
    max_requests: int,
    max_bytes: int,
    shards: list[tuple[int, int | None]],
) -> None:
    cutter = Cutter(max_requests=max_requests, max_bytes=max_bytes)
    assert [cutter.place(*request) for request in requests] == shards
