"""How much one start takes, and how a request that kills the engine is found."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchkit.rounds import FIRST_ROUND, MAX_REQUESTS, Key, Pool, Room, Speed, Weight, fitting, plan_room

GB = 1 << 30
PLENTY = {"memory": 1000 * GB, "disk": 1000 * GB}
SPEED = Speed(startup_seconds=60, requests_per_second=10)  # 5% of start-up: rounds of 19 × 600 = 11,400


@pytest.mark.parametrize(
    ("due", "speed", "streams", "replicas", "requests"),
    [
        pytest.param(10, None, False, 1, 10, id="all-of-little"),
        pytest.param(FIRST_ROUND, None, False, 1, FIRST_ROUND, id="first-round-exactly"),
        pytest.param(FIRST_ROUND + 500, None, False, 1, FIRST_ROUND + 500, id="no-start-for-a-small-rest"),
        pytest.param(FIRST_ROUND * 2, None, False, 1, FIRST_ROUND, id="two-alike"),
        pytest.param(10_000_000, None, False, 1, FIRST_ROUND, id="unmeasured-is-cautious"),
        pytest.param(11_400, SPEED, False, 1, 11_400, id="startup-is-5-percent"),
        pytest.param(1_140_000, SPEED, False, 1, 11_400, id="startup-is-5-percent-of-many"),
        pytest.param(16_000, SPEED, False, 1, 16_000, id="one-and-a-bit-is-one"),
        pytest.param(20_000, SPEED, False, 1, 10_000, id="two-alike-measured"),
        pytest.param(3_000, SPEED, False, 2, 1_500, id="replicas-share"),
        pytest.param(3_000, None, True, 1, 3_000, id="streaming-takes-all"),
        pytest.param(10_000_000, None, True, 1, MAX_REQUESTS, id="streaming-bounded-by-our-memory"),
        pytest.param(3_001, None, True, 2, 1_501, id="streaming-replicas-share"),
    ],
)
def test_requests_of_a_start(due: int, speed: Speed | None, streams: bool, replicas: int, requests: int) -> None:
    room = plan_room(due=due, speed=speed, streams=streams, replicas=replicas, idle=replicas, **PLENTY)
    assert room.requests == requests


def test_a_start_that_holds_everything_is_bounded_by_memory() -> None:
    room = plan_room(due=100_000, speed=SPEED, memory=10 * GB, disk=1000 * GB, streams=False)
    weight = Weight(bytes=100_000, pixels=1_000_000)  # 16.4 MB each while it waits
    assert fitting(room, weight, 0, 0, 0) == pytest.approx(261, abs=2)
    streaming = plan_room(due=100_000, speed=SPEED, memory=10 * GB, disk=1000 * GB, streams=True)
    assert fitting(streaming, weight, 0, 0, 0) == 100_000


@pytest.mark.parametrize(
    ("taken", "fits"),
    [pytest.param(0, 1, id="oversized-alone"), pytest.param(1, 0, id="oversized-beside-another")],
)
def test_a_request_larger_than_memory_is_still_tried(taken: int, fits: int) -> None:
    room = Room(requests=100, memory=10, disk=1000)
    assert fitting(room, Weight(bytes=50, pixels=0), taken, taken * 200, taken * 50) == fits


def simulate(
    count: int, poison: set[int], *, attempts: int = 3, answers_before: bool = False, broken: bool = False
) -> tuple[list[list[Key]], set[int], Pool]:
    """Runs a pool to its end: an engine dies with every group that holds a poisonous request."""
    fresh = [[(0, position) for position in range(count)]]
    pool = Pool(lambda: fresh.pop() if fresh else [], attempts=attempts, proven=False)
    starts: list[list[Key]] = []
    failed: set[int] = set()
    while group := pool.take():
        starts.append(group.keys)
        bad = [index for index, key in enumerate(group.keys) if broken or key[1] in poison]
        answered = len(group.keys) if not bad else bad[0] if answers_before and not broken else 0
        pool.report(group, rest=group.keys[answered:], answers=answered, died=bool(bad))
        failed |= {position for (_, position), _ in pool.condemned()}
        if pool.broken:
            break
    return starts, failed, pool


@given(
    count=st.integers(4, 300),
    places=st.sets(st.floats(0, 1, exclude_max=True), max_size=3),
    attempts=st.integers(2, 4),
    answers_before=st.booleans(),
)
def test_exactly_the_poisonous_requests_are_condemned(
    count: int, places: set[float], attempts: int, answers_before: bool
) -> None:
    poison = {int(place * count) for place in places}
    starts, failed, pool = simulate(count, poison, attempts=attempts, answers_before=answers_before)
    if pool.broken or pool.doubtful:  # nothing ever answered: every probe hit a poisonous request
        assert len(poison) >= 3
        return
    assert failed == poison
    assert all(start.count(key) == 1 for start in starts for key in start)
    for position in poison:
        assert sum((0, position) in start for start in starts) >= attempts
        assert starts[-1] == [(0, position)] or [(0, position)] in starts, "the last time alone"


@pytest.mark.parametrize("place", [0, 1, 99, 100, 137, 199])
@pytest.mark.parametrize("answers_before", [False, True])
def test_one_poisonous_request_among_200_costs_few_starts(place: int, answers_before: bool) -> None:
    starts, failed, _ = simulate(200, {place}, answers_before=answers_before)
    assert failed == {place}
    # Once, again, one probe or a few, eight halvings, the ones set free.
    assert len(starts) <= 13


@given(count=st.integers(3, 300))
def test_a_broken_engine_shows_after_few_starts_and_condemns_nothing(count: int) -> None:
    starts, failed, pool = simulate(count, set(), broken=True)
    assert pool.broken
    assert not failed
    assert len(starts) <= 7


def test_a_single_death_costs_one_start() -> None:
    fresh = [[(0, position) for position in range(100)]]
    pool = Pool(lambda: fresh.pop() if fresh else [], attempts=3, proven=True)
    group = pool.take()
    assert group is not None
    pool.report(group, rest=group.keys[40:], answers=40, died=True)
    again = pool.take()
    assert again is not None
    assert again.keys == group.keys[40:]
    pool.report(again, rest=[], answers=60, died=False)
    assert pool.take() is None


def test_a_group_that_was_refused_for_certain_is_halved_at_once() -> None:
    fresh = [[(0, position) for position in range(8)]]
    pool = Pool(lambda: fresh.pop() if fresh else [], attempts=3, proven=True)
    starts = []
    while group := pool.take():
        starts.append([position for _, position in group.keys])
        refused = 5 in starts[-1]
        rest = group.keys if refused else []
        pool.report(group, rest=rest, answers=len(group.keys) - len(rest), died=refused, certain=refused)
        if condemned := pool.condemned():
            assert condemned == [((0, 5), starts.count([5]) + sum(5 in start and len(start) > 1 for start in starts))]
    assert starts.count([5]) == 1
    assert starts[0] == list(range(8))
    assert starts.count(list(range(8))) == 1
    assert {position for start in starts for position in start if 5 not in start} == {0, 1, 2, 3, 4, 6, 7}
