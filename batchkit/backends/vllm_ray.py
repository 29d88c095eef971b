"""vLLM's batch runner on a Ray cluster: one actor for each replica, and in it the runner of one machine.

The run directory stays here, and nothing of it need be visible there. To `engines` an engine of an actor looks like one
of this machine: its log and its output appear in the same folder, line by line as they come, so that what was answered
before an actor dies is kept as that of any engine that dies.
"""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec

from batchkit import __version__, clusters
from batchkit.backends import vllm_install
from batchkit.backends.vllm import IDENTITY, End, Start, explain_end
from batchkit.backends.vllm_remote import RemoteEngine
from batchkit.backends.vllm_replica import Replica
from batchkit.errors import BatchkitError, EngineError, UsageError
from batchkit.storage import write_whole

PLACE_SECONDS = 60.0
"""So long an engine may wait for its place while no other has one. Ray starts an actor in a second or two, and a
machine that the cluster has to start first takes minutes: it has to be up before."""

MOST_EARLY_DEATHS = 5
"""Actors that died before they said anything, and not of themselves."""

TAKEN_ALONG = re.compile(r"(?:VLLM|HF)_\w*(?<!_HOME)(?<!_CACHE)(?<!_PATH)(?<!_ROOT)(?<!_DIR)")
"""Variables that an engine there gets from here. Not the names of folders: those are of this machine."""


class _Slot:
    """An actor, and the answer to whether it is there."""

    def __init__(self, actor: Any) -> None:
        self.actor = actor
        self.answer = actor.hello.remote()
        self.hello: dict[str, Any] | None = None
        self.engine: RemoteEngine | None = None


class RayVllm:
    """The engines of one `submit` on a cluster, one actor for each replica. Made by `running`. `pooling` as for
    `Vllm`."""

    def __init__(
        self, ray: Any, address: str, *, model: str, replicas: int, args: Sequence[str], pooling: str | None
    ) -> None:
        if replicas < 1:
            raise UsageError("--replicas must be at least 1")
        vllm_install.refuse_ours(args)
        self.args = tuple(args)
        self._model = model
        self._pooling = pooling
        self._ray = ray
        self._address = address
        self._need, room = _fit(clusters.nodes(ray), replicas, vllm_install.group_size(args), address)
        self.replicas = min(replicas, room)
        self.notes = _room_notes(replicas, room, address)
        self._environment = {name: value for name, value in os.environ.items() if TAKEN_ALONG.fullmatch(name)}
        self._early_deaths = 0
        self._slots = [self._new_slot() for _ in range(self.replicas)]
        self._waiting_since = time.monotonic()
        while not any([self.is_up(slot) for slot in range(self.replicas)]):  # noqa: C419  # each is looked at
            time.sleep(0.05)
        first = next(slot.hello for slot in self._slots if slot.hello is not None)
        self._install = msgspec.convert(first["install"], vllm_install.Install)
        self.notes += first["notes"]

    @property
    def streams(self) -> bool:
        """As `Vllm.streams`."""
        return self._install.streams

    def memory(self) -> int:
        """The bytes that all engines together can have: as if all had as much as the one that has least."""
        hellos = [slot.hello for slot in self._slots if slot.hello is not None]
        sharing = Counter(hello["host"] for hello in hellos)
        least = min((int(hello["memory"]) // sharing[hello["host"]] for hello in hellos), default=0)
        return least * self.replicas

    def is_up(self, slot: int) -> bool:
        """Whether the slot's actor is there; one that has died gets a successor, where there is room for it.

        Raises `EngineError` where it cannot work there, or where none has found a place for long.
        """
        place = self._slots[slot]
        if place.engine is not None and place.engine.cause is not None:
            self._ray.kill(place.actor)  # whatever it is still doing
            place = self._slots[slot] = self._new_slot()
        if place.hello is None and self._ray.wait([place.answer], timeout=0)[0]:
            place.hello = self._greet(place)
        if any(other.hello is not None for other in self._slots):
            self._waiting_since = time.monotonic()
        elif time.monotonic() - self._waiting_since > PLACE_SECONDS:
            raise self._no_place()
        return place.hello is not None

    def start(self, folder: Path, slot: int) -> Start:
        """As `Vllm.start`."""
        folder = folder.absolute()
        place = self._slots[slot]
        assert place.hello is not None  # noqa: S101  # is_up said so
        with write_whole(folder / IDENTITY, durable=True) as stream:  # from here on it may have been sent
            stream.write(msgspec.json.encode({"ray": self._address, "host": place.hello["host"]}) + b"\n")
        place.engine = RemoteEngine(self._ray, place.actor, folder)
        return Start(place.engine, folder, slot)

    def explain(self, end: End) -> BatchkitError:
        """As `Vllm.explain`."""
        if end.cause.kind == "lost":
            return EngineError(
                f"engines on the Ray cluster die again and again: {end.cause.text}",
                hint="ray status, and the logs of the cluster, may say why; what was answered is kept",
            )
        return explain_end(end, install=self._install, model=self._model, args=self.args)

    def close(self) -> None:
        """End all actors, and with them what they still run."""
        for slot in self._slots:
            with contextlib.suppress(Exception):  # one that is gone is none
                self._ray.kill(slot.actor)

    def _new_slot(self) -> _Slot:
        make = self._ray.remote(Replica).options(**self._need, scheduling_strategy="SPREAD", max_restarts=0)
        given: dict[str, Any] = {"model": self._model, "args": self.args, "environment": self._environment}
        if self._pooling is not None:
            given["pooling"] = self._pooling
        return _Slot(make.remote(**given))

    def _greet(self, place: _Slot) -> dict[str, Any] | None:
        """What the actor says of itself; None where it has died. Raises `EngineError` where it cannot be used."""
        try:
            hello: dict[str, Any] = self._ray.get(place.answer)
        except self._ray.exceptions.RayError as exc:
            self._early_deaths += 1
            if not getattr(exc, "actor_init_failed", True) and self._early_deaths <= MOST_EARLY_DEATHS:
                self._slots[self._slots.index(place)] = self._new_slot()  # its machine went down
                return None
            raise EngineError(
                f"the Ray cluster at {self._address} cannot run batchkit: {clusters.reason(exc)}",
                hint=f"pip install 'batchkit-vlm[vllm,ray]=={__version__}', on each of its machines",
            ) from exc
        if hello["batchkit"] != __version__:
            raise EngineError(
                f"{hello['host']}, of the Ray cluster, has batchkit {hello['batchkit']}; here it is {__version__}",
                hint=f"pip install 'batchkit-vlm[vllm,ray]=={__version__}', on each of its machines",
            )
        if hello["error"] is not None:
            error = hello["error"]
            raise EngineError(f"{hello['host']}, of the Ray cluster: {error['message']}", hint=error["hint"])
        return hello

    def _no_place(self) -> EngineError:
        free, has = clusters.free(self._ray), clusters.nodes(self._ray)
        wanted = _worded(self._need)
        return EngineError(
            f"no engine has found a place on the Ray cluster at {self._address} in {PLACE_SECONDS:.0f} s: each needs "
            f"{wanted} on one machine; of {sum(n.gpus for n in has)} GPUs and {sum(n.cpus for n in has)} CPUs, "
            f"{free.gpus} GPUs and {free.cpus} CPUs are free",
            hint="ray status says what holds them; the same command again, when they are free",
        )


@contextlib.contextmanager
def running(
    address: str, *, model: str, replicas: int, args: Sequence[str], pooling: str | None = None
) -> Iterator[RayVllm]:
    """A `RayVllm` on the cluster at `address`; its actors are ended behind the block.

    Raises `UsageError` and `EngineError`, which say what is missing: Ray, the cluster, room in it, batchkit or vLLM on
    its machines.
    """
    with clusters.connected(address) as ray:
        runner: RayVllm | None = None
        try:
            runner = RayVllm(ray, address, model=model, replicas=replicas, args=args, pooling=pooling)
            yield runner
        finally:
            if runner is not None:
                runner.close()


def _fit(nodes: Sequence[clusters.Node], replicas: int, size: int, address: str) -> tuple[dict[str, int], int]:
    """What an actor asks Ray for, and how many of them have room: `size` GPUs each; where the cluster has none, CPUs,
    as many as leave room for all replicas. Raises `EngineError` where no machine is large enough."""
    if any(node.gpus for node in nodes):
        room, most = sum(node.gpus // size for node in nodes), max(node.gpus for node in nodes)
        if room == 0:
            raise EngineError(
                f"an engine needs {size} GPUs on one machine, and the Ray cluster at {address} has {most} at most",
                hint="smaller --tensor-parallel-size or --pipeline-parallel-size behind --",
            )
        return {"num_gpus": size, "num_cpus": 0}, room
    cpus = [node.cpus for node in nodes if node.cpus]
    if not cpus:
        raise EngineError(
            f"the Ray cluster at {address} has neither GPUs nor CPUs", hint="ray start --num-cpus N says how many"
        )
    each = max(1, min(cpus) // -(-replicas // len(cpus)))
    return {"num_cpus": each}, sum(has // each for has in cpus)


def _worded(need: dict[str, int]) -> str:
    return ", ".join(f"{count} {name.removeprefix('num_').upper()[:-1]}s" for name, count in need.items() if count)


def _room_notes(replicas: int, room: int, address: str) -> list[str]:
    if replicas > room:
        return [f"the Ray cluster at {address} has room for {room} engines of {replicas}: so many work"]
    if replicas < room and replicas == 1:
        return [f"the Ray cluster at {address} has room for {room} engines: --replicas {room} uses it all"]
    return []
