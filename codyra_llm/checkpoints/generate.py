"""Answer one prompt with a checkpoint or with any stage of a run."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from codyra_llm.checkpoints.source import Source, checkpoint_source, run_at
from codyra_llm.config.sections import DataSection
from codyra_llm.core.errors import Fault
from codyra_llm.core.schema import MOST_TOKENS
from codyra_llm.core.tensors import own_device
from codyra_llm.data.encoding import Encoder
from codyra_llm.evaluate.generate import generate_ids
from codyra_llm.experiment.setup import prepare
from codyra_llm.formats.adapter import build
from codyra_llm.formats.adapter_files import vocabulary
from codyra_llm.models import families, loading
from codyra_llm.models.ends import answer_ends
from codyra_llm.models.tokenizer import load_tokenizer, tokenizer_folder
from codyra_llm.runtime import launch, precision
from codyra_llm.store.folder import RunFolder
from codyra_llm.store.rows import Stage


@dataclass
class Answering:
    """A model, the encoder of its prompts, and for methods that need it the position of the prompt's task."""

    model: PreTrainedModel
    encoder: Encoder
    conditions: Callable | None = None  # (prompts, task) -> Condition
    number: int | None = None  # of the task in the stream


def answer(checkpoint: str, prompt: str, new: int, base: str | None = None) -> str:
    """The greedy answer to `prompt` of a model (folder, hub id, .gguf), of a PEFT adapter on its base (`base`
    or the one that it names), or of RUN@TASK, at most `new` tokens.

    A stage of a run encodes the prompt as the run does (its lengths, its chat template): of a task whose
    examples are chats it is a user's message. An export does so where the last task that it learnt did. A
    method that needs the prompt's task gets TASK. Raises Fault for a checkpoint that can't be used, and for a
    prompt without a token.
    """
    run, _ = run_at(checkpoint)
    if run and not (run / "recipe.json").is_file():
        raise Fault(f"{run} is not a run folder (it has no recipe.json); give RUN@TASK or a model folder")
    source = checkpoint_source(checkpoint, base)
    if base and not source.adapter:
        raise Fault(f"--base: {checkpoint} is not a PEFT adapter, and has its own weights; leave --base out")
    launch.leave_out_cudnn_attention()
    device = own_device()
    asked = _stage(source.run, source.after, device) if source.run else _plain(source, new, device)
    ids = asked.encoder.prompt(prompt)[0]
    if not ids:
        raise Fault("the prompt is empty, and the model's tokenizer begins no text of its own; give a prompt")
    condition = asked.conditions and asked.conditions([ids], asked.number)
    found = generate_ids(asked.model, [ids], new, asked.encoder.ends, condition)
    return asked.encoder.texts(found)[0]


def _stage(folder: RunFolder, task: str | None, device: torch.device) -> Answering:
    """The model of the run after that task."""
    assert task is not None, "a run answers at one of its stages"
    setup = prepare(folder.recipe, runs=False)
    stage = Stage.of(setup.recipe.tasks, folder.archive().index(task))
    setup.verify(folder, stage.index)
    number = stage.index if stage.step else None
    model, conditions = setup.load_stage(folder, stage, device)
    # What a user types is text, while a run's chats are written by the template before they are encoded.
    by_template = setup.recipe.by_template(stage.after if stage.step else setup.recipe.tasks[0])
    encoder = setup.encoder.of_chats() if by_template else setup.encoder
    return Answering(model, encoder, conditions, number)


def dtype_on(device: torch.device) -> torch.dtype:
    """The dtype of a model that belongs to no run: float32 on a CPU; on a GPU, as in a run, bfloat16 where it
    has units for that, since in float32 a model of 8 billion weights takes 32 GB."""
    low = device.type == "cuda" and precision.multiplies_bfloat16()
    return torch.bfloat16 if low else torch.float32


def _plain(source: Source, new: int, device: torch.device) -> Answering:
    """A model that belongs to no run, or an adapter on its base; prompts may have all positions that `new`
    tokens leave."""
    base = loading.resolve(source.model, source.revision)
    reads = tokenizer_folder(source.adapter, base)
    added = vocabulary(source.adapter) if source.adapter else None
    faults = loading.check(base, source.chat, reads, added)
    if faults:
        raise Fault(*faults)
    dtype = dtype_on(device)
    model = build(base, source.adapter, dtype, None) if source.adapter else loading.load(base, dtype)
    positions = getattr(model.config, "max_position_embeddings", None) or 4096
    limit = min(positions, MOST_TOKENS) - new
    if limit < 8:
        raise Fault(
            f"--max-new-tokens: {new} leaves no room for a prompt in the model's {positions} positions; "
            "lower it"
        )
    tokenizer = load_tokenizer(reads)
    section = DataSection(
        root="-", max_prompt_tokens=limit, max_answer_tokens=new + 2, chat_template=source.chat
    )
    embedded = added or families.text_config(base).vocab_size  # how many tokens have an embedding
    encoder = Encoder(tokenizer, section, answer_ends(base, tokenizer), embedded)
    return Answering(model.to(device).eval(), encoder)
