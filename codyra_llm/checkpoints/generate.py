"""Answer one prompt with a checkpoint or with any stage of a run."""

from pathlib import Path

import torch

from codyra_llm.config.sections import DataSection
from codyra_llm.core.errors import Fault
from codyra_llm.data.encoding import Encoder
from codyra_llm.evaluate.generate import generate_ids
from codyra_llm.experiment.setup import prepare
from codyra_llm.models import loading
from codyra_llm.models.tokenizer import load_tokenizer
from codyra_llm.runtime import launch
from codyra_llm.store.folder import RunFolder


def answer(source: str, prompt: str, new: int) -> str:
    """The greedy answer to `prompt` of a model (folder, hub id, .gguf) or of RUN@TASK, at most `new` tokens.

    A stage of a run reads the prompt as the run does (its lengths, its chat template); a method that must be
    told the prompt's task is told TASK.
    """
    launch.leave_out_cudnn_attention()
    run, at, task = source.rpartition("@")
    device = launch.device()
    if at and (Path(run) / "recipe.json").is_file():
        folder = RunFolder(Path(run))
        setup = prepare(folder.recipe, open_ended=False)
        setup.verify(folder)
        archive = folder.archive()
        index = archive.index(task)
        number = setup.recipe.tasks.index(task) if index >= 0 else None
        model, conditions = setup.stage(folder, index, device)
        encoder = setup.encoder
    elif at and Path(run).is_dir():
        raise Fault(f"{run} is not a run folder (it has no recipe.json); give RUN@TASK or a model folder")
    else:
        base = loading.resolve(source, None)
        if faults := loading.check(base):
            raise Fault(*faults)
        model, tokenizer = loading.load(base, torch.float32), load_tokenizer(base)
        limit = (positions := getattr(model.config, "max_position_embeddings", 4096)) - new
        if limit < 8:
            raise Fault(
                f"--max-new-tokens: {new} leaves no room for a prompt in the model's {positions} positions; "
                "lower it"
            )
        encoder = Encoder(
            tokenizer, DataSection(root="-", max_prompt_tokens=limit, max_answer_tokens=new + 2)
        )
        model, conditions, number = model.to(device).eval(), None, None
    ids = [encoder.prompt(prompt)[0]]
    ids = generate_ids(
        model, ids, new, encoder.tokenizer.eos_token_id, conditions and conditions(ids, number)
    )
    return encoder.tokenizer.decode(ids[0], skip_special_tokens=True)
