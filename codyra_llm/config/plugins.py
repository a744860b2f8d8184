"""Methods and metrics from outside the package: a Python file that the user names (`--plugin FILE`), or an
installed package with entry points in the groups `codyra_llm.methods` and `codyra_llm.metrics`.

Code runs only where the user has installed or named it: no recipe, benchmark or checkpoint can ask for any.
"""

import hashlib
import sys
from collections.abc import Iterable, Sequence
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import ModuleType
from typing import Any

from codyra_llm.config.registry import METHODS
from codyra_llm.core.errors import Fault
from codyra_llm.core.files import file_sha256
from codyra_llm.metrics.own import SHIPPED as SHIPPED_METRICS
from codyra_llm.metrics.own import metric
from codyra_llm.metrics.text import METRICS, ExampleMean

GROUPS = {"method": "codyra_llm.methods", "metric": "codyra_llm.metrics"}
Origin = dict[str, str]  # {"file", "sha256"} or {"package", "version"}
_origins: dict[str, Origin] = {}  # by "method anchor", "metric keyword"


def load(files: Sequence[str | Path]) -> None:
    """Run these Python files, which register methods and metrics. A file that was loaded before and has not
    changed is not run again. Raises one Fault with every file that can't be."""
    faults = []
    for file in files:
        try:
            _load(Path(file).expanduser().resolve())
        except Fault as fault:
            faults += fault.messages
    if faults:
        raise Fault(*faults)


def _load(path: Path) -> None:
    if not path.is_file():
        raise Fault(
            f"--plugin: there is no file {path}; give a Python file that registers a method or metric"
        )
    source = path.read_bytes()
    origin = {"file": str(path), "sha256": hashlib.sha256(source).hexdigest()}
    earlier = [name for name, known in _origins.items() if known.get("file") == origin["file"]]
    if earlier and all(_origins[name] == origin and _is_registered(name) for name in earlier):
        return
    for name in earlier:  # registered by an earlier version of the file
        _drop(name)
    before = _registered()
    try:
        _execute(path, source)
    except Exception as error:
        for name in _registered() - before:
            _drop(name)
        reason = error.messages[0] if isinstance(error, Fault) else f"{type(error).__name__}: {error}"
        raise Fault(
            f"--plugin: {path} can't be loaded ({reason}{_place(error, path)}); correct it"
        ) from error
    added = _registered() - before
    if not added:
        raise Fault(
            f"--plugin: {path} registers no method and no metric; write METHODS[NAME] = CLASS, or "
            "@metric(NAME) over a function, as docs/extending.md shows"
        )
    _origins.update(dict.fromkeys(added, origin))


def _execute(path: Path, source: bytes) -> None:
    """Run the bytes whose hash is kept: no cached code of an earlier version, and none is left behind."""
    name = f"codyra_llm_plugin_{path.stem}"
    module = ModuleType(name)
    module.__file__ = str(path)
    sys.modules[name] = module  # before it runs, as for any import: classes look their module up
    exec(compile(source, str(path), "exec"), module.__dict__)


def _place(error: BaseException, path: Path) -> str:
    """The line of the file at which the error occurred, if it occurred there."""
    lines, trace = [], error.__traceback__
    while trace:
        if trace.tb_frame.f_code.co_filename == str(path):
            lines.append(trace.tb_lineno)
        trace = trace.tb_next
    return f", line {lines[-1]}" if lines else ""


def _registered() -> set[str]:
    """The methods and metrics in the registries that are not shipped, as keys of `_origins`."""
    methods = {f"method {name}" for name in METHODS if not METHODS.ships(name)}
    return methods | {f"metric {name}" for name in METRICS if name not in SHIPPED_METRICS}


def _is_registered(name: str) -> bool:
    return name in _registered()


def _drop(name: str) -> None:
    kind, _, plain = name.partition(" ")
    _origins.pop(name, None)
    (METHODS if kind == "method" else METRICS).pop(plain, None)


def has_method(name: object) -> bool:
    """Whether there is a method of that name: shipped, of a loaded file, or of an installed package, which is
    imported then. Raises Fault for one that can't be imported."""
    return isinstance(name, str) and (name in METHODS or _installed("method", name))


def has_metric(name: str) -> bool:
    """`has_method`, for a metric."""
    return name in METRICS or _installed("metric", name)


def load_installed() -> None:
    """Import the methods and metrics of all installed packages, to list them. Raises one Fault with all that
    can't be."""
    faults = []
    for kind, group in GROUPS.items():
        for name in sorted({found.name for found in entry_points(group=group)}):
            try:
                _installed(kind, name)
            except Fault as fault:
                faults += fault.messages
    if faults:
        raise Fault(*faults)


def _installed(kind: str, name: str) -> bool:
    """Whether an installed package has an entry point of this name, which is loaded and registered. Raises
    Fault for one that can't be."""
    found = list(entry_points(group=GROUPS[kind], name=name))
    if not found:
        return False
    packages = ", ".join(sorted(map(_package, found)))
    is_shipped = METHODS.ships(name) if kind == "method" else name in SHIPPED_METRICS
    if is_shipped:
        raise Fault(
            f"{kind} '{name}' of package {packages} has the name of a shipped one; uninstall the package"
        )
    if len(found) > 1:
        raise Fault(f"{kind} '{name}' comes from several packages, {packages}; uninstall all but one of them")
    try:
        _register(kind, name, found[0].load())
    except Exception as error:
        raise Fault(
            f"{kind} '{name}' of package {packages} can't be loaded ({type(error).__name__}: {error}); fix "
            "or uninstall the package"
        ) from error
    version = found[0].dist.version if found[0].dist else "unknown"
    _origins[f"{kind} {name}"] = {"package": packages, "version": version}
    return True


def _package(found: EntryPoint) -> str:
    return found.dist.name if found.dist else found.value


def _register(kind: str, name: str, loaded: Any) -> None:
    """Register what an entry point loads: a method's class, a metric's class, or a function, which may have
    registered itself by `@metric`."""
    if kind == "method":
        METHODS[name] = loaded
    elif name not in METRICS and isinstance(loaded, type) and issubclass(loaded, ExampleMean):
        METRICS[name] = loaded
    elif name not in METRICS:
        metric(name)(loaded)


def is_loaded(file: Path) -> bool:
    """Whether the user has named this file as a plug-in."""
    return any(origin.get("file") == str(file.resolve()) for origin in _origins.values())


def files() -> list[str]:
    """The files that another process must load to know the same methods and metrics as this one."""
    known = [_origin(name) for name in sorted(_registered())]
    return sorted({origin["file"] for origin in known if "file" in origin})


def used(method: str, metrics: Iterable[str]) -> dict[str, Origin]:
    """The origin of those methods and metrics that are not shipped, by "method NAME" and "metric NAME"."""
    names = [f"method {method}", *(f"metric {name}" for name in metrics)]
    return {name: _origin(name) for name in dict.fromkeys(names) if _is_registered(name)}


def still(recorded: dict[str, Origin]) -> dict[str, Origin]:
    """Where the methods and metrics of this record come from in this process; without those that are not
    registered here."""
    return {name: _origin(name) for name in recorded if _is_registered(name)}


def _origin(name: str) -> Origin:
    """For what a script or notebook registered itself: the script's file, if there is one."""
    if name in _origins:
        return _origins[name]
    kind, _, plain = name.partition(" ")
    defined = (METHODS if kind == "method" else METRICS)[plain].__module__
    file = getattr(sys.modules.get(defined), "__file__", None)
    if file is None or not Path(file).is_file():
        return {"module": defined}
    return {"file": str(Path(file).resolve()), "sha256": file_sha256(Path(file))}


def missing(recorded: dict[str, Origin], where: str) -> list[str]:
    """For each plug-in that `where` was made with and that is not known here, a sentence with the remedy."""
    return [
        f"{where} was made with {name}, which is not known here; {_remedy(origin)}"
        for name, origin in recorded.items()
        if not _known(name)
    ]


def _known(name: str) -> bool:
    """Whether it is registered, or an installed package has it, which is imported then."""
    kind, _, plain = name.partition(" ")
    return has_method(plain) if kind == "method" else has_metric(plain)


def _remedy(origin: Origin) -> str:
    if "file" in origin:
        return f"give --plugin {origin['file']} (sha256 {origin['sha256'][:12]})"
    if "package" in origin:
        return f"install {origin['package']} {origin['version']}"
    return f"register it first, as module {origin.get('module')} did"


def changed(recorded: dict[str, Origin], now: dict[str, Origin], where: str) -> list[str]:
    """A sentence for each plug-in whose file has other content than when `where` was made; its path may
    differ."""
    sentences = []
    for name, origin in recorded.items():
        before, after = origin.get("sha256"), now.get(name, {}).get("sha256")
        if before and before != after:
            sentences.append(
                f"{where} was made with another version of {name} (sha256 {before[:12]}, now "
                f"{(after or 'none')[:12]}); give the file as it was"
            )
    return sentences
