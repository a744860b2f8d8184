"""The model as it was after any task of a run: a merged Hugging Face folder, or a PEFT adapter on the
original base.
"""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import torch

from codyra_llm.benchmarks.trace.mini.make import BASES
from codyra_llm.config.benchmark import digest
from codyra_llm.core.errors import Fault
from codyra_llm.core.files import replacing, write_json, write_text
from codyra_llm.core.tensors import own_device, save_tensors
from codyra_llm.experiment.setup import Setup
from codyra_llm.lora.merge import stored_weight
from codyra_llm.lora.one_adapter import OneAdapter, one_adapter
from codyra_llm.lora.update import Update
from codyra_llm.models import families, saved
from codyra_llm.models.ends import name_ends, named_ends
from codyra_llm.models.weights import WeightReader
from codyra_llm.runtime import signals
from codyra_llm.store import observer
from codyra_llm.store.archive import Archive
from codyra_llm.store.folder import RunFolder

# In every export: the recipe, the last task learnt and whether the chat template writes its prompts, by which
# `evaluate` and `generate` ask the model.
LINEAGE = "codyra_llm.json"


def write_merged(
    setup: Setup,
    archive: Archive,
    after: int,
    without: int | None,
    out: Path,
    card: str = "",
    dtype: torch.dtype | None = None,
) -> None:
    """A plain Hugging Face folder: the base's own files, and its weights with the updates, summed in float32
    and cast once to `dtype`, by default the one that the base stores each in. `card`: its README.md. The
    generation config names every token that ends an answer in evaluation.

    The weights equal those that were evaluated, on the same kind of device, if `dtype` is that of the
    evaluation (model.dtype). Raises Fault for a method whose model is not a plain one.
    """
    refuse_unmerged(setup, without)
    with replacing(out) as temporary:
        saved.copy_model(setup.base, temporary, _changes(setup, archive.terms(after, without)), dtype)
        name_ends(temporary, setup.encoder.ends)
        _write_lineage(setup, archive, after, without, temporary)
        _write_card(card, temporary)


def write_gguf_folder(
    setup: Setup,
    archive: Archive,
    after: int,
    without: int | None,
    out: Path,
    card: str = "",
    kind: str = "f16",
) -> Path:
    """A folder with the merged model as a GGUF file, a Modelfile for Ollama, lineage and card. The updates
    are summed in float32 and cast once to `kind` (of gguf_file.TYPES). A model that has learnt no chats gets
    no chat template, since the tools that find one apply it to every prompt. Returns the file's path in
    `out`.

    Raises Fault for a method whose model is not a plain one, and for a model that llama.cpp would compute
    differently.
    """
    from codyra_llm.formats import gguf_file, ollama  # useful only for this format

    refuse_unmerged(setup, without)
    name = f"{out.name}-{kind}.gguf"
    with replacing(out) as temporary:
        temporary.mkdir()
        changes = _changes(setup, archive.terms(after, without))
        learnt = setup.recipe.tasks[: after + 1] or setup.recipe.tasks
        chats = any(setup.recipe.by_template(task) for task in learnt)
        gguf_file.write_gguf(setup.base, temporary / name, changes, kind, out.name, chats=chats)
        saved.copy_files(setup.base, temporary, saved.TERMS)
        stops = setup.tokenizer.convert_ids_to_tokens(sorted(setup.encoder.ends - {setup.encoder.eos}))
        template = ollama.chat_template(setup.tokenizer) if chats else ollama.PLAIN
        write_text(temporary / "Modelfile", ollama.modelfile(name, template, setup.longest, stops))
        _write_lineage(setup, archive, after, without, temporary)
        _write_card(card, temporary)
    return out / name


def _changes(setup: Setup, terms: list[Update]) -> Callable[[str, torch.Tensor], torch.Tensor]:
    """For each weight, by the name that the base stores it under, a function of its value after `terms`;
    other towers are unchanged. Sums are taken where those of the evaluated model are, so that they are equal
    to the last bit. Raises Fault if the base does not store a weight that they change."""
    family = families.family_in(setup.base)
    known = set(WeightReader(setup.base).handle_of)
    changed = {f"{site}.weight" for update in terms for site in update.adapters}
    changed |= {name for update in terms for name in update.dense}
    missing = sorted(changed - known)
    if missing:
        raise Fault(
            f"{setup.base} stores no weight {missing[0]}, which the run has trained; restore the model that "
            "the run began with"
        )
    tied = families.text_config(setup.base).tie_word_embeddings
    # A tied head has no weight of its own: its changes are those of the embeddings.
    tied_to = {f"{family.head}.weight": f"{family.embeddings}.weight"} if tied else {}
    device = own_device()

    def changed_weight(name: str, base: torch.Tensor) -> torch.Tensor:
        signals.check()
        observer.at(f"the final model, {name}")
        own = family.own_name(name)
        if own is None:  # of another tower
            return base
        own = tied_to.get(own, own)
        if own not in changed:
            return base
        return stored_weight(own, base.to(device), terms).to(base.device)

    return changed_weight


def write_peft(
    setup: Setup,
    archive: Archive,
    after: int,
    without: int | None,
    out: Path,
    card: Callable[[list[str]], str] | None = None,
    rank: int | None = None,
) -> OneAdapter:
    """One PEFT LoRA adapter that holds the sum of the updates on the original base, in float32, of one rank
    and with alpha = rank at every site, so that readers of any kind scale it by 1. `rank`: cut it to this
    rank (vLLM takes 16 by default). `card` makes its README.md from the facts about the rank.

    Raises Fault where peft is missing or all ranks were pruned.
    """
    refuse_unmerged(setup, without)
    if setup.method.archives_weights:
        raise Fault(
            f"format peft holds adapters, and {setup.method.name} trains {setup.method.trains}; export with "
            f"--format merged"
        )
    try:
        from peft import LoraConfig
    except ImportError:
        raise Fault("format peft needs the package peft; install codyra-llm[peft]") from None
    one = one_adapter(archive.terms(after, without), rank)
    if one is None:
        raise Fault(
            f"there is nothing to export: no rank of {', '.join(archive.tasks[: after + 1]) or 'the base'} "
            "is left; export with --format merged"
        )
    config = LoraConfig(
        task_type="CAUSAL_LM",
        base_model_name_or_path=_base_path(setup),
        revision=setup.recipe.model.revision,
        inference_mode=True,
        r=one.rank,
        lora_alpha=one.rank,
        lora_dropout=0.0,
        target_modules=_targets(setup, set(one.factors)),
    )
    with replacing(out) as temporary:
        temporary.mkdir()
        config.save_pretrained(temporary)
        save_tensors(_peft_tensors(setup, one), temporary / "adapter_model.safetensors", {"format": "pt"})
        saved.copy_files(setup.base, temporary, (*saved.TOKENIZER, *saved.TERMS))
        cut = {"rank": one.rank, "error": one.error, "sites": one.relative()} if one.errors else None
        _write_lineage(setup, archive, after, without, temporary, {"truncation": cut} if cut else {})
        _write_card(card(adapter_notes(setup, one)) if card else "", temporary)
    return one


def _peft_tensors(setup: Setup, one: OneAdapter) -> dict[str, torch.Tensor]:
    """The adapter's factors under the names that PEFT gives them."""
    family = families.family_in(setup.base)
    tensors = {}
    for site, (a, b) in one.factors.items():
        prefix = f"base_model.model.{family.whole_name(site)}"
        tensors[f"{prefix}.lora_A.weight"] = a.contiguous()
        tensors[f"{prefix}.lora_B.weight"] = b.contiguous()
    return tensors


def _base_path(setup: Setup) -> str:
    """Where PEFT is to find the base: its hub id, or the folder in which the run found it, or made it of a
    base of mini-TRACE's or a GGUF file. A folder's path is whole: in another place a relative one would be
    taken for a hub id, and transformers knows no "~"."""
    named = setup.recipe.model.path
    is_here = os.path.exists(os.path.expanduser(named)) or named in BASES
    return str(setup.base.absolute()) if is_here else named


def _targets(setup: Setup, sites: set[str]) -> list[str]:
    """What goes into PEFT's `target_modules`: the projections' names, as most readers expect, if they match
    the adapted sites and nothing else; otherwise the full names of the sites. Other towers (images, sound)
    have layers with the same names."""
    family = families.family_in(setup.base)
    names = {site.rpartition(".")[2] for site in sites}
    modules = {name.removesuffix(".weight") for name in WeightReader(setup.base).handle_of}
    every = {module for module in modules if module.rpartition(".")[2] in names}
    if every == sites and family.tower is None:
        return sorted(names)
    return sorted(family.whole_name(site) for site in sites)


def adapter_notes(setup: Setup, one: OneAdapter) -> list[str]:
    """What one should know about an adapter of the run: its rank, and the ends of answers that the base's own
    files, by which servers stop, don't name."""
    missing = sorted(setup.encoder.ends - set(named_ends(setup.base)))
    if not missing:
        return rank_notes(one)
    tokens = ", ".join(setup.tokenizer.convert_ids_to_tokens(missing))
    return [
        *rank_notes(one),
        f"Answers end at {tokens} too, which the base's generation config does not name; give servers "
        f"stop_token_ids={missing}, and transformers' `generate` all of "
        f"eos_token_id={sorted(setup.encoder.ends)}.",
    ]


def rank_notes(one: OneAdapter) -> list[str]:
    """What a card says about an adapter's rank."""
    if not one.errors:
        summed = (
            f"The adapter's rank {one.rank} is the sum over {one.parts} tasks of the ranks that each has at "
            "a site, at the site where it is largest; the others are filled up with zeros."
            if one.parts > 1
            else f"The adapter's rank is {one.rank}; sites of a smaller one are filled up with zeros."
        )
        return [f"{summed} `--rank R` of the export cuts it, for servers that take less."]
    worst, error = next(iter(one.relative().items()), ("any site", 0.0))
    return [
        f"The sum of the tasks' updates, of rank up to {one.whole}, is cut to rank {one.rank} by its "
        f"singular values: ‖ΔW - BA‖ / ‖ΔW‖ is {one.error:.3g} over all sites and at most {error:.3g} at one "
        f"of them ({worst}); each site's is in {LINEAGE}. The scores above are those of the whole sum."
    ]


def _write_lineage(
    setup: Setup,
    archive: Archive,
    after: int,
    without: int | None,
    folder: Path,
    more: dict | None = None,
) -> None:
    write_json(folder / LINEAGE, _lineage(setup, archive, after, without) | (more or {}))


def _lineage(setup: Setup, archive: Archive, after: int, without: int | None) -> dict:
    """Where an export comes from: the recipe, and the hash of the base and of all updates in it."""
    return {
        "recipe": setup.recipe.model_dump(mode="json"),
        "lineage": archive.lineage[after + 1],
        "benchmark": digest(setup.recipe.data.benchmark),
        "after": archive.tasks[after] if after >= 0 else None,
        "chat": setup.recipe.by_template(setup.recipe.tasks[max(after, 0)]),
        "without": None if without is None else archive.tasks[without],
    }


def _write_card(card: str, folder: Path) -> None:
    if card:
        write_text(folder / "README.md", card)


def refuse_unmerged(setup: Setup, without: int | None) -> None:
    """Raises Fault where the update of task `without` can't be left out, and where the method's model after a
    task is not a plain one."""
    if without is not None and not setup.method.separable:
        raise Fault(
            f"--without: {setup.method.name} keeps no part of a task's own that could be left out; export "
            f"without --without"
        )
    if not setup.method.merges:
        raise Fault(
            f"a {setup.method.name} run is not a plain model after a task, since what it adds depends on the "
            "prompt; export with --format stage, and ask it with `codyra-llm generate OUT@TASK`"
        )


def write_stage(folder: RunFolder, after: int, out: Path, card: str = "") -> None:
    """The part of a run folder that answers as the model did after task `after`: recipe, manifest, updates
    and states up to it. The base model stays where the recipe names it."""
    with replacing(out) as temporary:
        for part in ("updates", "state"):
            (temporary / part).mkdir(parents=True)
        for file in _of_stage(folder, after):
            shutil.copy(file, temporary / file.relative_to(folder.path))
        _write_card(card, temporary)


def _of_stage(folder: RunFolder, after: int) -> list[Path]:
    """The files of a run that a stage after task `after` consists of."""
    updates = folder.archive().files[: after + 1]
    states = [folder.state(index) for index in range(len(updates))]
    own = [folder.path / name for name in ("recipe.json", "manifest.json")]
    return [*own, *updates, *(state for state in states if state.is_file())]
