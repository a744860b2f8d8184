"""The model as it was after any task of a run: a merged Hugging Face folder, or a PEFT adapter on the
original base.
"""

import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from codyra_llm.config.benchmark import digest
from codyra_llm.core.errors import Fault
from codyra_llm.core.files import replacing, write_json, write_text
from codyra_llm.experiment.setup import Setup
from codyra_llm.lora.update import Update
from codyra_llm.models.weights import save_weights
from codyra_llm.store.archive import Archive
from codyra_llm.store.folder import RunFolder

LINEAGE = (
    "codyra_llm.json"  # in every export: the recipe and the task after which, by which `evaluate` scores it
)


def write_merged(
    setup: Setup, archive: Archive, after: int, without: int | None, out: Path, card: str = ""
) -> None:
    """A plain Hugging Face folder (safetensors, config, tokenizer): the very weights that were evaluated.
    `card`: its README.md.

    Raises Fault for a method that is no plain model.
    """
    refuse_unmerged(setup, without)
    model = setup.model(archive, after, without)
    model.config.use_cache = True
    with replacing(out) as temporary:
        save_weights(model, setup.tokenizer, temporary)
        _write_lineage(setup, archive, after, without, temporary)
        _write_card(card, temporary)


def write_peft(
    setup: Setup, archive: Archive, after: int, without: int | None, out: Path, card: str = ""
) -> None:
    """One PEFT LoRA adapter that holds the sum of the updates on the original base: ΔW =
    [s₁B₁w₁|s₂B₂w₂|…]·[A₁;A₂;…].

    Raises Fault where peft is missing or all ranks were pruned.
    """
    refuse_unmerged(setup, without)
    if setup.method.trains == "all weights":
        raise Fault(
            f"format peft holds adapters, and {setup.method.name} trains all weights; export with "
            f"--format merged"
        )
    try:
        from peft import LoraConfig
    except ImportError:
        raise Fault("format peft needs the package peft; install codyra-llm[peft]") from None
    factors = _concatenated(archive.terms(after, without))
    if not factors:
        raise Fault(
            f"there is nothing to export: no rank of {', '.join(archive.tasks[: after + 1]) or 'the base'} "
            "is left; export with --format merged"
        )
    ranks = {site: len(a) for site, (a, _) in factors.items()}
    config = LoraConfig(
        task_type="CAUSAL_LM",
        base_model_name_or_path=setup.recipe.model.path,
        inference_mode=True,
        r=max(ranks.values()),
        lora_alpha=max(ranks.values()),
        lora_dropout=0.0,
        target_modules=list(ranks),
        rank_pattern=ranks,
        alpha_pattern=ranks,
    )
    tensors = {
        f"base_model.model.{site}.lora_{key}.weight": factor.contiguous()
        for site, pair in factors.items()
        for key, factor in zip("AB", pair, strict=True)
    }
    with replacing(out) as temporary:
        temporary.mkdir()
        config.save_pretrained(temporary)
        save_file(tensors, temporary / "adapter_model.safetensors", {"format": "pt"})
        setup.tokenizer.save_pretrained(temporary)
        _write_lineage(setup, archive, after, without, temporary)
        _write_card(card, temporary)


def _write_lineage(setup: Setup, archive: Archive, after: int, without: int | None, folder: Path) -> None:
    write_json(
        folder / LINEAGE,
        {
            "recipe": setup.recipe.model_dump(mode="json"),
            "lineage": archive.lineage[after + 1],
            "benchmark": digest(setup.recipe.data.benchmark),
            "after": archive.tasks[after] if after >= 0 else None,
            "without": None if without is None else archive.tasks[without],
        },
    )


def _write_card(card: str, folder: Path) -> None:
    if card:
        write_text(folder / "README.md", card)


def refuse_unmerged(setup: Setup, without: int | None) -> None:
    if without is not None and not setup.method.separable:
        raise Fault(
            f"--without: {setup.method.name} keeps no part of a task's own that could be left out; export "
            f"without --without"
        )
    if not setup.method.merges:
        raise Fault(
            f"a {setup.method.name} run is no plain model after a task, since what it adds depends on the "
            "prompt; export with --format stage, and ask it with `codyra-llm generate OUT@TASK`"
        )


def write_stage(folder: RunFolder, after: int, out: Path, card: str = "") -> None:
    """The part of a run folder that answers as the model did after task `after`: recipe, manifest, updates
    and states up to it. The base model stays where the recipe names it."""
    archive = folder.archive()
    with replacing(out) as temporary:
        for part in ("updates", "state"):
            (temporary / part).mkdir(parents=True)
        for name in ("recipe.json", "manifest.json"):
            shutil.copy(folder.path / name, temporary / name)
        for index, file in enumerate(archive.files[: after + 1]):
            shutil.copy(file, temporary / "updates" / file.name)
            if folder.state(index).is_file():
                shutil.copy(folder.state(index), temporary / "state")
        _write_card(card, temporary)


def _concatenated(terms: list[Update]) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """(A, s·B·diag(w)) of all updates by site, in float32; sites without a rank are left out."""
    parts: dict[str, list] = {}
    for update in terms:
        for site, (a, b, w) in update.adapters.items():
            if len(a):
                parts.setdefault(site, []).append((a, update.scale * (b if w is None else b * w)))
    return {
        site: (torch.cat([a for a, _ in pairs]), torch.cat([b for _, b in pairs], 1))
        for site, pairs in parts.items()
    }
