"""All methods by name. Naming one imports nothing: settings and class are imported when first asked for.

This table is the one place where a lower package names a higher one: as text, not by an import.
"""

from collections.abc import Iterator, MutableMapping
from importlib import import_module
from typing import Any, NamedTuple

from codyra_llm.core.errors import Fault


class Entry(NamedTuple):
    """Where a method is, as "module:Class": the class below codyra_llm.methods, its settings below
    codyra_llm.config.methods."""

    method: str
    settings: str


class Registry(MutableMapping[str, Any]):
    """Methods by name. `METHODS[name]` is the class; `METHODS["mine"] = Mine` adds one."""

    def __init__(self, entries: dict[str, Entry]):
        self._entries: dict[str, Entry | type] = dict(entries)
        self._shipped = frozenset(entries)

    def ships(self, name: str) -> bool:
        """Whether the method of this name is the package's own."""
        return name in self._shipped

    def __getitem__(self, name: str) -> Any:
        entry = self._entries[name]
        if isinstance(entry, Entry):
            entry = self._entries[name] = _imported("codyra_llm.methods." + entry.method)
        return entry

    def settings(self, name: str) -> Any:
        """The class of a method's section; neither the method nor torch is imported for it."""
        entry = self._entries[name]
        if isinstance(entry, Entry):
            return _imported("codyra_llm.config.methods." + entry.settings)
        return entry.Config

    def __setitem__(self, name: str, method: Any) -> None:
        """Raises Fault for the name of a shipped method, for what is not a class of this name, and for
        settings that can't be made by naming the method alone."""
        if name in self._shipped:
            raise Fault(f"method '{name}' is one of codyra_llm's own; give yours another name")
        if getattr(method, "name", None) != name:
            raise Fault(
                f"method '{name}' is registered with {method!r}, whose `name` is "
                f"{getattr(method, 'name', None)!r}; give both the same name"
            )
        if not isinstance(method, type):
            raise Fault(
                f"method '{name}' is registered with {method!r}, which is not a class; give the class"
            )
        _check_settings(name, method)
        self._entries[name] = method

    def __delitem__(self, name: str) -> None:
        del self._entries[name]

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


def _check_settings(name: str, method: type) -> None:
    """Raises Fault where the class of the method's settings is that of another method, as where it was
    inherited, or where a setting has no default."""
    settings = getattr(method, "Config", None)
    fields = getattr(settings, "model_fields", {})
    given = fields["name"].default if "name" in fields else None
    if given != name:
        found = "it has none" if settings is None else f"that of {settings.__name__} is {given!r}"
        raise Fault(
            f"method '{name}' needs settings of its own, a class `Config` with the field `name: "
            f'Literal["{name}"] = "{name}"`; {found}'
        )
    required = [key for key, field in fields.items() if field.is_required()]
    if settings and required:
        raise Fault(
            f"method '{name}': {', '.join(required)} of {settings.__name__} must have a default, so that a "
            "recipe can give the method's name alone; add one"
        )


def _imported(place: str) -> Any:
    module, _, name = place.partition(":")
    return getattr(import_module(module), name)


METHODS = Registry(
    {
        "none": Entry("baselines.none:NoMethod", "baselines:NoneConfig"),
        "icl": Entry("baselines.icl:Icl", "baselines:IclConfig"),
        "seqft": Entry("baselines.seqft:SeqFt", "baselines:SeqFtConfig"),
        "seqlora": Entry("sequential.seqlora:SeqLora", "sequential:SeqLoraConfig"),
        "mtl": Entry("baselines.mtl:Mtl", "baselines:MtlConfig"),
        "single": Entry("experts.single:Single", "experts:SingleConfig"),
        "replay": Entry("sequential.replay:Replay", "sequential:ReplayConfig"),
        "ilora": Entry("sequential.ilora:Ilora", "sequential:IloraConfig"),
        "ilora_mixed": Entry("sequential.ilora_mixed:IloraMixed", "sequential:IloraMixedConfig"),
        "rcl": Entry("sequential.rcl:Rcl", "sequential:RclConfig"),
        "ewc": Entry("regularised.ewc:Ewc", "regularised:EwcConfig"),
        "gem": Entry("projection.gem:Gem", "projection:GemConfig"),
        "agem": Entry("projection.agem:AGem", "projection:AGemConfig"),
        "ogd": Entry("projection.ogd:Ogd", "projection:OgdConfig"),
        "lwf": Entry("regularised.lwf:Lwf", "regularised:LwfConfig"),
        "l2p": Entry("prompts.l2p:L2p", "prompts:L2pConfig"),
        "dualprompt": Entry("prompts.dualprompt:DualPrompt", "prompts:DualPromptConfig"),
        "pp": Entry("prompts.pp:ProgressivePrompts", "prompts:PpConfig"),
        "olora": Entry("regularised.olora:OLora", "regularised:OLoraConfig"),
        "sora": Entry("sequential.sora:Sora", "sequential:SoraConfig"),
        "inflora": Entry("projection.inflora:InfLora", "projection:InfLoraConfig"),
        "treelora": Entry("regularised.treelora:TreeLora", "regularised:TreeLoraConfig"),
        "treelora_repo": Entry("regularised.treelora_repo:TreeLoraRepo", "regularised:TreeLoraRepoConfig"),
        "hidelora": Entry("experts.hidelora:HideLora", "experts:HideLoraConfig"),
        "hidelora_treelora_repo": Entry(
            "regularised.hidelora_treelora_repo:HideLoraRepo", "regularised:HideLoraRepoConfig"
        ),
        "color": Entry("experts.color:Color", "experts:ColorConfig"),
        "sapt": Entry("experts.sapt:Sapt", "experts:SaptConfig"),
        "duallora": Entry("experts.duallora:DualLora", "experts:DualLoraConfig"),
        "gainlora": Entry("experts.gainlora:GainLora", "experts:GainLoraConfig"),
        "clora": Entry("regularised.clora:CLora", "regularised:CLoraConfig"),
        "ewclora": Entry("regularised.ewclora:EwcLora", "regularised:EwcLoraConfig"),
        "dream": Entry("regularised.dream:Dream", "regularised:DreamConfig"),
        "sdft": Entry("regularised.sdft:Sdft", "regularised:SdftConfig"),
        "keeplora": Entry("projection.keeplora:KeepLora", "projection:KeepLoraConfig"),
        "osft": Entry("projection.osft:Osft", "projection:OsftConfig"),
        "osft_lora": Entry("projection.osft_lora:OsftLora", "projection:OsftLoraConfig"),
        "slao": Entry("sequential.slao:Slao", "sequential:SlaoConfig"),
        "pm": Entry("sequential.pm:PerturbMerge", "sequential:PmConfig"),
        "codyra": Entry("sequential.codyra:Codyra", "sequential:CodyraConfig"),
        "codyra_drift": Entry("sequential.codyra_drift:CodyraDrift", "sequential:CodyraDriftConfig"),
    }
)
