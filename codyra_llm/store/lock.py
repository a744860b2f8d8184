"""One run at a time in a folder: a file that says which process works there, renewed while it runs."""

import json
import logging
import os
import socket
import threading
import time
import uuid
from pathlib import Path

import psutil

from codyra_llm.core.errors import Fault
from codyra_llm.core.files import unwritable
from codyra_llm.core.terminal import one_line

log = logging.getLogger(__name__)
BEAT = 5.0  # seconds between renewals
DEAD = 60.0  # seconds without a renewal after which an owner on another machine counts as dead
SEEN = 90.0  # seconds until other machines must see a new lease: network file systems cache directories


class Lease:
    """Holds `folder` for this process. A dead owner's lease is taken over: at once if it ran on this machine,
    else when it has not been renewed for `DEAD` seconds of this machine's clock."""

    def __init__(self, folder: Path):
        self.folder, self.file = folder, folder / "lease.json"
        self.token = uuid.uuid4().hex  # by which this holder recognises its own file
        self.ended = threading.Event()
        self.thread: threading.Thread | None = None

    def take(self) -> None:
        """Hold the folder from now on. Raises Fault where a running process holds it."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise unwritable(self.folder, error) from None
        self._remove_dead()
        self._create(self._content(0))
        self.thread = threading.Thread(target=self._renew, daemon=True)
        self.thread.start()

    def await_token(self, token: str) -> None:
        """Wait until this process sees the lease with this `token`, which the first process of the launch
        holds. Raises Fault where it doesn't, since the first process's folder is another one of that name."""
        end = time.monotonic() + SEEN
        while self.owner().get("token") != token:
            if time.monotonic() > end:
                raise Fault(
                    f"output: {self.folder} on {socket.gethostname()} is another folder than the first "
                    "process's; give an output on a file system that all nodes share"
                )
            time.sleep(0.5)

    def release(self) -> None:
        """Stop renewing, and remove the file, unless another process has taken the folder over."""
        if self.thread:
            self.ended.set()
            self.thread.join()
            if self.owner().get("token") == self.token:
                self.file.unlink(missing_ok=True)

    def check(self) -> None:
        """Raises Fault if another process has taken the folder over, which it may if this one was suspended
        for long."""
        found = self.owner()
        if found.get("token") != self.token:
            raise Fault(
                f"{self.folder} was taken over by {_who(found)} while this process stood still; let that one "
                "work"
            )

    def _renew(self) -> None:
        """Write the file again at every beat, until `release`, or until another process has taken over."""
        beat = 0
        while not self.ended.wait(BEAT):
            beat += 1
            own = self.file.with_name(f".lease.{os.getpid()}")
            try:
                if self.owner().get("token") != self.token:
                    return
                own.write_text(self._content(beat), encoding="utf-8")
                os.replace(own, self.file)
            except OSError:
                # A full disk, or a network that is away for a while: the next beat may get through.
                continue

    def _remove_dead(self) -> None:
        """Remove the file of an owner that is dead. Raises Fault where it lives."""
        seen = self._read()
        if seen is None:
            return
        if self.owner().get("place") != _place():
            self._await_beat(seen)
        elif _lives(self.owner()):
            raise self._held()
        # Renaming decides between several processes that found the owner dead: one of them gets the file.
        aside = self.file.with_name(f".{self.token}.{os.getpid()}")
        try:
            os.replace(self.file, aside)
        except FileNotFoundError:  # another process was faster
            raise self._held() from None
        found = aside.read_text(encoding="utf-8", errors="replace")
        aside.unlink()
        if found != seen:  # the file of a process that had taken over already: give it back
            self._create(found)
            raise self._held()

    def _await_beat(self, seen: str) -> None:
        """Wait until an owner on another machine counts as dead. Raises Fault where it renews the file."""
        held = f"{self.folder} was held by {_who(self.owner())}"
        log.info("%s; waiting up to %.0f s for a sign of life", one_line(held), DEAD)
        end = time.monotonic() + DEAD
        while time.monotonic() < end:
            time.sleep(min(BEAT, DEAD / 4))
            if self._read() not in (None, seen):
                raise self._held()

    def _create(self, content: str) -> None:
        """Make the file, in exactly one of several processes, on network file systems too."""
        try:
            file = open(self.file, "x", encoding="utf-8")  # noqa: SIM115  # closed below
        except FileExistsError:
            raise self._held() from None
        except OSError as error:  # the file, if there is one, is another process's
            raise unwritable(self.file, error) from None
        try:
            with file:
                file.write(content)
        except OSError as error:
            self.file.unlink(missing_ok=True)
            raise unwritable(self.file, error) from None

    def _held(self) -> Fault:
        return Fault(
            f"output: {self.folder} is being worked on by {_who(self.owner())}; wait for its end, or give "
            f"another output"
        )

    def _read(self) -> str | None:
        """The file's text, empty for a moment after it was made; None where nobody holds the folder."""
        try:
            return self.file.read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:
            return None

    def owner(self) -> dict:
        """What the owner wrote about itself; {} where that can't be read, as after a loss of power."""
        try:
            found = json.loads(self._read() or "{}")
        except ValueError:
            return {}
        return found if isinstance(found, dict) else {}

    def _content(self, beat: int) -> str:
        own = os.getpid()
        return json.dumps(
            {
                "token": self.token,
                "host": socket.gethostname(),
                "pid": own,
                "place": _place(),
                "started": psutil.Process(own).create_time(),
                "beat": beat,
            }
        )


def holder(folder: Path) -> dict | None:
    """The holder of `folder`: pid, host, and whether it lives (`alive`); None where there is none. Writes
    nothing."""
    lease = Lease(folder)
    try:
        found, age = lease.owner(), time.time() - lease.file.stat().st_mtime
    except FileNotFoundError:
        return None
    return {
        "pid": found.get("pid"),
        "host": found.get("host"),
        "alive": _lives(found) if found.get("place") == _place() else age < DEAD,
    }


def _who(found: dict) -> str:
    return f"process {found.get('pid', '?')} on {found.get('host', 'an unknown machine')}"


def _place() -> str:
    """Identifies where process ids are comparable: one machine and, in containers, one pid namespace."""
    numbering = Path("/proc/self/ns/pid")
    return f"{socket.gethostname()} {uuid.getnode():x} {os.readlink(numbering) if numbering.exists() else ''}"


def _lives(owner: dict) -> bool:
    """Whether the process still runs. Start times show whether the pid was reused by a later process."""
    try:
        process = psutil.Process(owner["pid"])
        return process.status() != psutil.STATUS_ZOMBIE and abs(process.create_time() - owner["started"]) < 10
    except psutil.NoSuchProcess:
        return False
