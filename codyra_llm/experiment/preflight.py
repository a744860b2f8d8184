"""Checks before any weights load: that the launch can run the recipe, and that all its processes respond and
have the same recipe, versions and files."""

import hashlib
import json
import platform
import socket
from collections.abc import Iterable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from codyra_llm.config.differences import flat
from codyra_llm.config.recipe import Recipe
from codyra_llm.core.errors import Attempts, Fault
from codyra_llm.core.files import file_sha256
from codyra_llm.core.version import __version__
from codyra_llm.data.batches import default_tokens
from codyra_llm.evaluate import vllm
from codyra_llm.experiment import observers, open_ended
from codyra_llm.experiment.setup import Setup
from codyra_llm.runtime import heartbeat, launch

# Settings that may differ between machines: the files that they name are compared instead.
PATHS = {"model.path", "data.benchmark", "data.root", "general.data", "open_ended.prompts"}

REMEDIES = {
    "recipe": "start every process with the same recipe and overrides",
    "version": "install the same versions on every machine",
    "data": "copy the same file to every machine",
    "base": "give every machine the same weights",
    "plug-in": "give every machine the same file or package",
    "launch": "start every machine with the same accelerate config or --deepspeed_config",
}

SHOWN = 16  # characters of a hash


class Row(NamedTuple):
    """The row that one process sends; `values` by key. A key that is missing is not compared."""

    host: str
    rank: int
    values: dict[str, str]


def preflight(acc: Accelerator, setup: Setup, base: str | None) -> str:
    """Compare all processes, and return a line that describes the launch (collective). `base` is the hash of
    the weights, None where another process of the machine computes it. Raises, on all processes, one Fault
    with everything that differs."""
    host = socket.gethostname()
    own = values(setup, base, host) | engine(acc)
    with heartbeat.waiting():
        rows = gather_object([Row(host, acc.process_index, own)])
    counted = acc.reduce(torch.ones(1, device=acc.device), "sum").item()
    faults = disagreements(with_all_settings(rows))
    if counted != acc.num_processes:
        faults.append(
            f"an all-reduce over {acc.num_processes} processes counts {counted:g} of them; check the network "
            f"between {', '.join(dict.fromkeys(row.host for row in rows))}"
        )
    if faults:
        raise Fault(*faults)
    return summary(acc, setup, len({row.host for row in rows}))


def refuse_launch(setup: Setup, acc: Accelerator) -> None:
    """Raises one Fault where this launch can't run the recipe, or this machine lacks what it asks for."""
    stage, method = launch.zero_stage(acc), setup.method
    # Only the first process asks the judge, and has the key.
    faults = lacking(setup, judges=bool(setup.prompts) and acc.is_main_process)
    if stage > method.max_zero_stage:
        faults.append(
            f"method {method.name} with these settings runs up to ZeRO stage {method.max_zero_stage} (0: "
            f"without DeepSpeed), this launch has stage {stage}; choose a lower stage in the accelerate "
            "config"
        )
    if stage == 3 and setup.recipe.model.quantization:
        faults.append(
            f"model.quantization: '{setup.recipe.model.quantization}' runs up to ZeRO stage 2, this launch "
            "has stage 3, which shards floating-point weights; choose a lower stage in the accelerate "
            "config, or set it to null"
        )
    if stage and method.carries_optimizer:
        faults.append(
            "method.carry_optimizer works with one process or DDP, not with DeepSpeed; set it to false or "
            "launch without DeepSpeed"
        )
    if faults:
        raise Fault(*faults)


def refuse_lacking(setup: Setup, judges: bool) -> None:
    """Raises one Fault with all that is `lacking`."""
    faults = lacking(setup, judges)
    if faults:
        raise Fault(*faults)


def lacking(setup: Setup, judges: bool) -> list[str]:
    """What the recipe asks for and this machine does not have, one sentence each: packages of the backend and
    of the trackers and, where this process `judges`, what it takes to ask the judge."""
    tried = Attempts()
    if judges:
        tried(open_ended.require_judge, setup.recipe.open_ended.judge)
    if setup.recipe.eval.backend == "vllm":
        tried(vllm.require)
    tried(observers.check, setup.recipe.trackers)
    return tried.faults


def values(setup: Setup, base: str | None, host: str) -> dict[str, str]:
    """By key, what all processes must agree on: the resolved recipe's settings, the versions, hashes of the
    data and of the base. A key's first word is one of REMEDIES."""
    found = {f"recipe {key}": value for key, value in _settings(setup.recipe) if key not in PATHS}
    found |= {"version codyra_llm": __version__, "version python": platform.python_version()}
    found |= {f"version {name}": version(name) for name in ("torch", "transformers", "accelerate")}
    hashes = setup.stream.hashes() | setup.method.own_data(setup.stream)
    found |= {f"data {name}": digest[:SHOWN] for name, digest in hashes.items()}
    found |= {f"plug-in {name}": _version(origin) for name, origin in setup.origins.items()}
    read = [_hash(file) for ability in setup.suite.values() for file in ability.files]
    untrained = json.dumps([setup.probes, list(setup.suite), read, setup.prompts])
    found["data of general"] = hashlib.sha256(untrained.encode()).hexdigest()[:SHOWN]
    found |= {f"base {name}": _hash(setup.base / name) for name in ("config.json", "tokenizer.json")}
    found[f"base folder on {host}"] = str(setup.base)  # whose weights one process of each machine has hashed
    if base:
        found["base weights"] = base[:SHOWN]
    return found


def engine(acc: Accelerator) -> dict[str, str]:
    """The same of the engine: what it is, and DeepSpeed's version and settings."""
    stage = launch.zero_stage(acc)
    if not stage:
        return {"launch engine": "DDP"}
    plugin = acc.state.deepspeed_plugin
    assert plugin is not None, "there is a stage"
    settings = flat(plugin.deepspeed_config)
    found = {f"launch {key}": str(value) for key, value in settings.items()}
    return {"launch engine": f"ZeRO stage {stage}", "version deepspeed": version("deepspeed"), **found}


def with_all_settings(rows: list[Row]) -> list[Row]:
    """The rows in which settings of DeepSpeed that only others have are named too."""
    names = [key for row in rows for key in row.values if key.startswith("launch ")]
    completed = []
    for row in rows:
        missing = dict.fromkeys(names, "not set") if "version deepspeed" in row.values else {}
        completed.append(row._replace(values=missing | row.values))
    return completed


def disagreements(rows: Iterable[Row]) -> list[str]:
    """A sentence for each key that has several values: the key, each value and who has it, and what to do."""
    holders: dict[str, dict[str, dict[str, list[int]]]] = {}  # key, value, host: ranks
    for host, rank, found in rows:
        for key, value in found.items():
            holders.setdefault(key, {}).setdefault(value, {}).setdefault(host, []).append(rank)
    faults = []
    for key, by_value in holders.items():
        if len(by_value) > 1:
            found = ", ".join(f"{value} on {_who(hosts)}" for value, hosts in by_value.items())
            faults.append(f"{key} differs between processes: {found}; {REMEDIES[key.split()[0]]}")
    return faults


def summary(acc: Accelerator, setup: Setup, machines: int) -> str:
    """A line with processes, machines, engine and the effective batch."""
    stage, optim = launch.zero_stage(acc), setup.recipe.optim
    noun = "machines" if machines > 1 else "machine"
    idle = acc.num_processes - optim.batch_size
    share = f", so that {idle} processes have none in a step" if idle > 0 else ""
    return (
        f"{acc.num_processes} processes on {machines} {noun} "
        f"({f'ZeRO stage {stage}' if stage else 'DDP'}) agree; {optim.batch_size} examples per optimizer "
        f"step over all{share}, up to {optim.micro_batch_tokens or default_tokens(acc.device)} tokens per "
        "forward in each"
    )


def _version(origin: dict[str, str]) -> str:
    return origin.get("sha256", origin.get("version", ""))[:SHOWN]


def _hash(file: Path) -> str:
    return file_sha256(file)[:SHOWN] if file.is_file() else "no file"


def _settings(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """`section.key` and value; what is nested deeper stays one value, so that recipes of one method have the
    same keys.
    """
    for section, value in recipe.model_dump().items():
        if isinstance(value, dict):
            yield from ((f"{section}.{key}", str(inner)) for key, inner in value.items())
        else:
            yield section, str(value)


def _who(hosts: dict[str, list[int]]) -> str:
    return " and ".join(f"{host} ({_ranks(sorted(ranks))})" for host, ranks in hosts.items())


def _ranks(ranks: list[int]) -> str:
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    closed = ranks[-1] - ranks[0] == len(ranks) - 1
    return f"ranks {ranks[0]} to {ranks[-1]}" if closed else f"ranks {', '.join(map(str, ranks))}"
