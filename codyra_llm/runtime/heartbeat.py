"""Heartbeats: each process keeps the others informed of what it is doing, so that none waits long for a
process that is gone or hangs."""

import json
import math
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import timedelta

from torch.distributed import DistError, PrefixStore, Store
from torch.distributed.distributed_c10d import _get_default_store

from codyra_llm.core.terminal import one_line
from codyra_llm.runtime import signals

EXIT = 76  # another process of the launch is gone; signals.EXIT is a process that was asked to stop
BEAT = 2.0  # seconds between heartbeats

# Seconds without a heartbeat after which a process counts as dead: long, since a library call may block the
# interpreter and with it the heartbeat.
SILENT = 120.0
BROKEN = 10.0  # the same where a connection has broken, or the launcher is already ending all processes


@dataclass
class Sign:
    """The heartbeat of a process. `place`: what it is doing; `moves`: how many places it has reached;
    `waits`: whether it is waiting for others; `beats`: how many heartbeats it has sent; `code`: its exit
    code, None while it runs."""

    host: str
    place: str = "its start"
    moves: int = 0
    waits: bool = False
    beats: int = 0
    code: int | None = None


class Watch:
    """The watchdog of rank `rank` among `world`. Rank 0 watches all others, in a thread; the others watch
    rank 0.

    A process is lost when it has sent no heartbeat for `SILENT` seconds. The launch hangs when no process has
    reached a new place for `hung` seconds; the message then names those that are not waiting for others.
    """

    def __init__(self, store: Store, rank: int, world: int, hung: float = math.inf):
        self.store, self.rank, self.world, self.hung = store, rank, world, hung
        self.own = Sign(socket.gethostname())
        self.others = range(world) if rank == 0 else range(1)
        self.seen: dict[int, tuple[Sign, float]] = {}  # each one's last heartbeat, and when it came
        self.moved = time.monotonic()
        self.stopping = False  # this process is already ending in an orderly way
        self.told = math.inf  # when this process was asked to stop since another has
        self.tell()
        threading.Thread(target=self._run, daemon=True).start()

    def at(self, place: str) -> None:
        """This process has come to `place`."""
        self.own.place = place
        self.own.moves += 1
        self.moved = time.monotonic()

    def tell(self) -> None:
        """Send this process's heartbeat."""
        self.own.beats += 1
        self.store.set(str(self.rank), json.dumps(asdict(self.own)))

    def look(self, ranks: range) -> None:
        """Read the heartbeats of those `ranks` that have sent one."""
        for rank in ranks:
            if rank == self.rank or not self.store.check([str(rank)]):
                continue
            sign = Sign(**json.loads(self.store.get(str(rank))))
            before = self.seen.get(rank, (None, 0.0))[0]
            if sign == before:
                continue
            self.seen[rank] = sign, time.monotonic()
            if before is None or sign.moves != before.moves:
                self.moved = time.monotonic()

    def gone(self, seconds: float) -> list[str]:
        """The watched processes that have ended badly, or sent no heartbeat for `seconds`."""
        found = []
        for rank, (sign, since) in sorted(self.seen.items()):
            if sign.code is None and time.monotonic() - since > seconds:
                found.append(f"rank {rank} on {sign.host} is gone or stopped, last seen at {sign.place}")
            elif sign.code not in (None, 0, signals.EXIT):
                found.append(
                    f"rank {rank} on {sign.host} has ended with exit code {sign.code} at {sign.place}; its "
                    "own message says why"
                )
        return found

    def stopped(self) -> str:
        """Which process was asked to stop and has ended; empty where none has."""
        for rank, (sign, _) in sorted(self.seen.items()):
            if sign.code == signals.EXIT:
                return f"rank {rank} on {sign.host} has stopped"
        return ""

    def outlast(self) -> None:
        """Wait until all watched processes have ended, for `BROKEN` seconds at most."""
        end_of_wait = time.monotonic() + BROKEN
        with suppress(DistError):
            self.look(self.others)
            while any(sign.code is None for sign, _ in self.seen.values()):
                if time.monotonic() > end_of_wait:
                    break
                time.sleep(BEAT / 4)
                self.look(self.others)

    def _run(self) -> None:
        while self.own.code is None:
            time.sleep(BEAT)
            try:
                if self.own.code is None:
                    self.tell()
                    self.look(self.others)
                    self._judge()
            except DistError:
                if self.own.code is None and signals.asked():  # the first process has saved and ended
                    os._exit(signals.EXIT)
                if self.own.code is None:
                    end("the first process, or its machine, is gone")

    def _judge(self) -> None:
        if self.store.check(["verdict"]):
            end(self.store.get("verdict").decode())
        stopped = self.stopped()
        if stopped and not self.stopping:
            self._stop_too(stopped)
        verdict = "; ".join(self.gone(BROKEN if signals.asked() else SILENT))
        if not verdict and self.rank == 0:
            verdict = self._hang()
        if verdict:
            self.store.set("verdict", verdict)
            end(verdict)

    def _stop_too(self, reason: str) -> None:
        """End this process, since another has stopped. The first one has files to close and a folder to
        release, so it is asked to stop, and ended only if it doesn't in time, as where it waits for the
        process that is gone. The others have nothing to close."""
        if self.rank == 0:
            if math.isinf(self.told):
                self.told = time.monotonic()
                signals.ask(reason)
            patience = BEAT if self.own.waits else BROKEN
            if time.monotonic() - self.told < patience:
                return
        leave_stopped()
        signals.say_stopped(reason)
        os._exit(signals.EXIT)

    def _hang(self) -> str:
        """A sentence that no process makes progress, and where they are; empty while one does."""
        if time.monotonic() - self.moved < self.hung:
            return ""
        signs = {rank: Sign("a machine that has not told its name") for rank in range(self.world)}
        signs[self.rank] = self.own
        signs |= {rank: sign for rank, (sign, _) in self.seen.items()}
        busy = {rank: sign for rank, sign in signs.items() if not sign.waits} or signs
        return f"no process has made progress for {self.hung / 60:g} minutes (hang_minutes): " + ", ".join(
            f"rank {rank} on {sign.host} is at {sign.place}" for rank, sign in sorted(busy.items())
        )


_watch: Watch | None = None
_started = 0  # how many times this process, like every other of its launch, has called `start`
_needs_launcher = False


def start(rank: int, world: int) -> None:
    """Start the watchdog, which uses the store of the process group, whether that is a launcher's server or a
    file. From here on a lost process ends the others (for a hang see `limit`). A watchdog that this process
    started before ends."""
    global _watch, _started
    if _watch and _watch.own.code is None:
        leave(0)
    _started += 1
    # A separate connection: waiting for a key blocks a connection, for as long as a collective may last.
    store = _get_default_store().clone()
    store.set_timeout(timedelta(seconds=BROKEN))
    _watch = Watch(PrefixStore(f"codyra_llm/{_started}", store), rank, world)


def limit(hang_minutes: float) -> None:
    """From here on the launch ends if no process reaches a new place for `hang_minutes`. Not before: data
    sets and models are downloaded and converted in one piece, which may take longer."""
    if _watch:
        _watch.moved, _watch.hung = time.monotonic(), 60 * hang_minutes


def launcher() -> None:
    """From here on this process ends when torchrun, which keeps the store, is gone. Until all processes have
    joined the group nothing else would notice, and torch would wait as long as it does for a collective."""
    global _needs_launcher

    def look() -> None:
        while not signals.orphaned():
            time.sleep(BEAT)
        end("the launcher is gone")

    if "TORCHELASTIC_RUN_ID" in os.environ and not _needs_launcher:
        _needs_launcher = True
        threading.Thread(target=look, daemon=True).start()


def at(place: str) -> None:
    """This process has come to `place`."""
    if _watch:
        _watch.at(place)


def alive() -> tuple[int, int] | None:
    """How many processes are alive (this one, and those that have not ended and sent a heartbeat lately), and
    how many there are; None if there is only one. For rank 0, which reads all heartbeats."""
    if not _watch:
        return None
    beating = [
        sign
        for sign, since in list(_watch.seen.values())
        if sign.code is None and time.monotonic() - since < BROKEN
    ]
    return 1 + len(beating), len(_watch.others)


@contextmanager
def waiting() -> Iterator[None]:
    """Within this block this process may wait for others."""
    if not _watch:
        yield
        return
    _watch.own.waits = True
    try:
        yield
    finally:
        _watch.own.waits = False


def lost(world: int, keeper: bool = True) -> str:
    """Which processes are gone, the `keeper` of the store included; called when a connection has broken.
    Empty once all others have sent a new heartbeat, or have called `leave`."""
    if not _watch:
        return ""
    try:
        _watch.look(range(world))
        first = {rank: sign for rank, (sign, _) in _watch.seen.items()}
        end_of_wait = time.monotonic() + BROKEN
        while any(_watch.seen[rank][0] == sign and sign.code is None for rank, sign in first.items()):
            if time.monotonic() > end_of_wait:
                break
            time.sleep(BEAT / 4)
            _watch.look(range(world))
        return "; ".join(_watch.gone(BROKEN - BEAT))
    except DistError:
        return "the first process, or its machine, is gone" if keeper else ""


def first_ended() -> int | None:
    """The exit code that rank 0 has announced; None if it has not, or can't be asked."""
    if not _watch:
        return None
    try:
        _watch.look(range(1))
    except DistError:
        return None
    return _watch.seen[0][0].code if 0 in _watch.seen else None


@contextmanager
def until_stopped() -> Iterator[None]:
    """Once `Stopped` leaves this block the watchdog no longer ends this process, even if the others ended
    long ago: it still has to finish a tracker's upload and release the lock of the folder.

    Only an optimizer step agrees on a stop. Elsewhere each process stops by itself, and the others, which
    wait for it, meet a broken connection: that becomes `Stopped` here."""
    try:
        yield
    except signals.Stopped:
        _keep_from_ending()
        raise
    except RuntimeError as error:  # torch's, whatever the backend
        reason = _other_that_stopped()
        if not reason:
            raise
        _keep_from_ending()
        raise signals.Stopped(reason) from error


def _keep_from_ending() -> None:
    if _watch:
        _watch.stopping = True


def _other_that_stopped() -> str:
    """See `Watch.stopped`, of all processes; a process announces its end before its connections break."""
    if not _watch:
        return ""
    try:
        _watch.look(range(_watch.world))
    except DistError:
        return ""
    return _watch.stopped()


def leave(code: int) -> None:
    """Announce to the others that this process ends with `code`, or has done its part. From here on it
    watches no other process."""
    if _watch:
        _watch.own.code = code
        with suppress(DistError):  # the process that keeps the store has left already
            _watch.tell()


def leave_stopped() -> None:
    """Announce to the others that this process has stopped as it was asked to. The first one then waits for
    the others to end: they read its announcement in the store, which may end with it."""
    leave(signals.EXIT)
    if _watch and _watch.rank == 0:
        _watch.outlast()


def end(verdict: str) -> None:
    """End this process because another is gone, whatever it waits for."""
    rank = _watch.rank if _watch else os.environ.get("RANK", 0)
    print(
        f"error (rank {rank}): {one_line(verdict)}; run the same command to resume from what is saved",
        file=sys.stderr,
        flush=True,
    )
    leave(EXIT)
    os._exit(EXIT)
