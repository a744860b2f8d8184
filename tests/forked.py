"""Processes forked from this one, which has loaded all packages: what a command or a launcher's processes do,
without their imports. tests/launch starts each launcher itself too, once.
"""

import gc
import os
import runpy
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch
from accelerate.commands import launch as accelerate_launch
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils.launch import prepare_deepspeed_cmd_env
from launches import OF_LAUNCHERS, SHIPPED
from torch.distributed import TCPStore

from codyra_llm.cli import main

Work = Callable[[int], int | None]


@dataclass
class Ended:
    """What processes were, as `subprocess.run` says it; `codes` by rank."""

    codes: list[int]
    stdout: str
    stderr: str

    @property
    def returncode(self) -> int:
        return next((code for code in self.codes if code), 0)


class Started:
    """`work(rank)` in a process for each environment, which returns or exits with a code."""

    def __init__(self, work: Work, environments: list[dict[str, str]], folder: Path):
        if torch.cuda.is_available():
            pytest.skip("forked processes can't use a GPU that this one has used")
        self.files = [folder / name for name in ("stdout", "stderr")]
        self.codes: dict[int, int] = {}
        self.processes = [self._fork(work, rank, each) for rank, each in enumerate(environments)]

    def _fork(self, work: Work, rank: int, environment: dict[str, str]) -> int:
        sys.stdout.flush()
        sys.stderr.flush()
        process = os.fork()
        if process:
            return process
        code = 1
        try:
            gc.freeze()  # collections of this process need not walk, and so copy, what it was forked with
            become_another(environment, self.files)
            code = work(rank) or 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def running(self) -> bool:
        """Whether any is alive."""
        for process in set(self.processes) - self.codes.keys():
            done, status = os.waitpid(process, os.WNOHANG)
            if done:
                self.codes[process] = os.waitstatus_to_exitcode(status)
        return len(self.codes) < len(self.processes)

    def wait(self, timeout: float = 300) -> Ended:
        """Until all have ended; those that have not after `timeout` seconds are killed: the test fails."""
        end = time.monotonic() + timeout
        while self.running() and time.monotonic() < end:
            time.sleep(0.02)
        late = self.kill()
        told = [file.read_text(encoding="utf-8") for file in self.files]
        assert not late, f"{len(late)} processes did not end within {timeout} s; they said\n{''.join(told)}"
        return Ended([self.codes[process] for process in self.processes], *told)

    def kill(self) -> list[int]:
        """End those that are still alive, and name them."""
        alive = [process for process in self.processes if process not in self.codes]
        for process in alive:
            os.kill(process, signal.SIGKILL)
            self.codes[process] = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        return alive


def become_another(environment: dict[str, str], files: list[Path]) -> None:
    """Drop what the test's process has set for itself: output, environment, signals, Accelerate's state."""
    for number, name, file in zip((1, 2), ("stdout", "stderr"), files, strict=True):
        opened = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.dup2(opened, number)
        stream = os.fdopen(number, "w", encoding="utf-8", buffering=1, closefd=False)
        setattr(sys, name, stream)
    for name in [name for name in os.environ if name.startswith(OF_LAUNCHERS)]:
        del os.environ[name]
    os.environ.update(environment)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_DFL)
    torch.set_num_threads(1)  # threads that the first process had are not there
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


class Forked:
    """What the fixture `forked` gives: functions that start processes."""

    def __init__(self, tmp_path_factory):
        self.factory = tmp_path_factory
        self.started: list[Started] = []

    def start(self, work: Work, environments: list[dict[str, str]]) -> Started:
        self.started.append(Started(work, environments, self.factory.mktemp("said")))
        return self.started[-1]

    def alone(self, work: Work) -> Started:
        """One process without a launcher."""
        return self.start(work, [{}])

    def module(self, name: str, *words: object, session: bool = False) -> Started:
        """`python -m NAME WORDS`, such as a launcher, in a session of its own if that is asked for; what it
        starts are fresh processes."""

        def work(rank: int) -> None:
            if session:
                os.setsid()
            sys.argv = [name, *map(str, words)]
            runpy.run_module(name, run_name="__main__", alter_sys=True)

        return self.alone(work)

    def ranks(
        self, work: Work, environment: dict[str, str] | None = None, processes: int = 2, timeout: float = 300
    ) -> Ended:
        """Processes that get ranks and `environment` (see `zero`), to their end. As with torchrun they
        meet at a store that is none of theirs."""
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        meet = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
        shared = {**(environment or {}), **meet, "TORCHELASTIC_USE_AGENT_STORE": "True"}
        shared |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
        each = [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]
        return self.start(work, each).wait(timeout)

    def command(self, *words: str | Path, **options) -> Ended:
        """`codyra-llm` with these words as `ranks`."""
        return self.ranks(lambda rank: main([str(word) for word in words]), **options)


def zero(config: str) -> dict[str, str]:
    """What `accelerate launch` under this shipped config sets for its processes."""
    return set_by_accelerate(SHIPPED / "accelerate" / f"{config}.yaml")


@cache
def set_by_accelerate(file: Path) -> dict[str, str]:
    """The same of any config for DeepSpeed, which is imported here with what its engine imports later, as
    torch's compiler, so that the processes need not do so."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed.module_inject.auto_ep_config
    import deepspeed.runtime.zero.muon.muon_optimizer

    assert deepspeed.ops.__compatible_ops__  # looked for once

    words = ["--config_file", str(file), "--main_process_port", "0", "x.py"]
    asked = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(accelerate_launch, "deepspeed_launcher", asked.append)
        accelerate_launch.launch_command(accelerate_launch.launch_command_parser().parse_args(words))
    prepared = prepare_deepspeed_cmd_env(asked[0])[1]
    return {key: value for key, value in prepared.items() if os.environ.get(key) != value}
