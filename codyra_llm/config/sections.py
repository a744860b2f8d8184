"""The sections of a recipe, except for the method's."""

import re
from ipaddress import ip_address
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from codyra_llm.core.parsing import PathText
from codyra_llm.core.schema import Fraction, NotNegative, Positive, Strict, Tokens

TRACE, FILE = "trace", "benchmark.yaml"
SHIPPED = (TRACE, "olora", "superni")  # benchmarks known by name; their data is not shipped

Epochs = Annotated[int, Field(ge=1, le=1000)]
NewTokens = Annotated[int, Field(ge=1, le=1 << 20)]


class JudgeSection(Strict, frozen=True):
    """The model that compares the answers of base and final model. Its key is never part of a recipe."""

    base_url: str | None = Field(
        default=None,
        description="URL of an OpenAI-compatible endpoint, e.g. http://localhost:8000/v1; null: no judging",
    )
    model: str | None = Field(default=None, description="the judge, as the endpoint names it")
    key_variable: str | None = Field(
        default="OPENAI_API_KEY",
        description="environment variable that holds the key; null: the endpoint needs none",
    )
    temperature: NotNegative | None = Field(
        default=0.0, description="the judge's; null: not sent, for models that accept none"
    )
    max_tokens: int | None = Field(
        default=1024,
        ge=16,
        le=1 << 20,
        description="most tokens of a verdict and its reasons; null: not sent",
    )
    timeout: Positive = Field(default=120.0, description="seconds for one request")
    retries: int = Field(
        default=5,
        ge=0,
        le=100,
        description="retries of a request that failed with 408, 409, 429, 5xx or no answer",
    )
    parallel: int = Field(default=4, ge=1, le=256, description="requests at the same time")

    @model_validator(mode="before")
    @classmethod
    def _holds_no_secret(cls, given: Any) -> Any:
        names = map(str, given) if isinstance(given, dict) else ()
        secret = re.compile("key|token$|secret|passw")
        found = [name for name in names if name != "key_variable" and secret.search(name)]
        if found:
            raise ValueError(
                f"'{found[0][:100]}' does not belong in a recipe, which is copied into runs and exports; put "
                "the key into an environment variable and give that one's name as 'key_variable'"
            )
        return given

    @field_validator("key_variable")
    @classmethod
    def _names_a_variable(cls, name: str | None) -> str | None:
        if name is not None and not re.fullmatch(r"[A-Z][A-Z0-9_]{0,63}", name):
            raise ValueError(  # without the value, which may be the key itself
                "this is not a name of an environment variable in capitals, such as OPENAI_API_KEY; give the "
                "name, not the key"
            )
        return name

    @field_validator("base_url")
    @classmethod
    def _is_an_address(cls, url: str | None) -> str | None:
        scheme = ""
        try:
            parts = urlsplit(url or "http://none")
            scheme, host = parts.scheme, parts.hostname or ""
            is_ip = ":" in host or re.fullmatch(r"[\d.]+", host)
            if is_ip:
                ip_address(host)
            wrong = (
                parts.port == 0
                or not (is_ip or re.fullmatch(r"[a-z\d._-]+", host))
                or "@" in parts.netloc
                or parts.query
            )
        except ValueError:  # a port that is not a number, a wrong IP address, a bracket that is not closed
            wrong = True
        if wrong or scheme not in ("http", "https"):
            raise ValueError(
                "this is not an address of an endpoint; give one like http://localhost:8000/v1, without a "
                "user, a password or a query"
            )
        return url

    @model_validator(mode="after")
    def _endpoint_needs_model(self) -> "JudgeSection":
        if self.base_url and not self.model:
            raise ValueError("'base_url' needs 'model'; give the name that the endpoint has for the judge")
        return self


class OpenEndedSection(Strict, frozen=True):
    """Prompts that the base and the final model answer side by side."""

    prompts: PathText | None = Field(
        default=None,
        description="a file with a field or column 'prompt' (of the kinds in docs/own_data.md), or a "
        "folder of such files; null: none",
    )
    files: list[str] | None = Field(
        default=None, min_length=1, description="names of files in the folder, without suffix; default: all"
    )
    max_new_tokens: NewTokens = Field(default=512, description="most tokens of an answer")
    limit: int | None = Field(default=None, ge=1, description="prompts of each file, drawn by the seed")
    seed: int = Field(default=0, ge=0, lt=1 << 32, description="seed of that draw")
    judge: JudgeSection = JudgeSection()


class ModelSection(Strict, frozen=True):
    """The base model, and how it is computed."""

    path: PathText = Field(
        description="hub id, folder, .gguf file, or a shipped small LLaMA: 'mini', 'mini-1' or 'mini-2'"
    )
    revision: str | None = Field(default=None, description="branch, tag or commit of a hub id")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto",
        description="auto: bfloat16 on a GPU that has it, and for a base that is not stored in float32 on a "
        "CPU with instructions for it; else float32; a resumed run keeps the dtype that it began with",
    )
    attention: Literal["sdpa", "eager", "flash_attention_2"] | None = Field(
        default=None, description="default: sdpa if the family supports it, else eager (gemma2)"
    )
    quantization: Literal["nf4", "int8"] | None = Field(
        default=None,
        description="train on a base whose projections are packed in 4 or "
        "8 bits (bitsandbytes); evaluation and export use the full weights",
    )
    gradient_checkpointing: bool = Field(
        default=False, description="recompute each block in backward, which saves memory and takes time"
    )
    fused: bool = Field(
        default=True, description="the hand-written LoRA functions; false: the same maths in plain autograd"
    )


class DataSection(Strict, frozen=True):
    """The tasks, their order and how much of each is read."""

    benchmark: PathText = Field(
        default="trace",
        description="trace, olora, superni, or a folder with a benchmark.yaml (docs/own_data.md)",
    )
    root: PathText | None = Field(
        default=None,
        description="folder that holds <task>/{train,eval,test}.json, or 'mini' (made on first "
        "use); default: the benchmark's folder, if it is one of your own",
    )
    protocol: str | None = Field(
        default=None,
        description="the protocol that supplies lengths, batch size, learning rate, schedule, betas and loss "
        "average where they are not given, and the accuracy rule; for trace: trace or treelora; default: "
        "the first",
    )
    tasks: list[str] | int = Field(
        default=1, description="names in order, or the number of one of the benchmark's orders"
    )
    epochs: Epochs | dict[str, Epochs] | None = Field(
        default=None,
        description="for all tasks, or by task; default: each task's own (docs/trace_protocol.md), 1 for "
        "tasks that are not the benchmark's",
    )
    max_prompt_tokens: Tokens | None = Field(
        default=None, ge=8, description="most tokens of a prompt, BOS included; longer ones are cut"
    )
    max_answer_tokens: Tokens | None = Field(
        default=None,
        ge=2,
        description="most tokens of a training answer and its EOS; a longer one is cut and has no EOS",
    )
    truncation: Literal["left", "middle"] = Field(
        default="left", description="which part of a long prompt is cut; left: as TRACE"
    )
    chat_template: bool = Field(
        default=False, description="put every prompt into the tokenizer's chat template; TRACE does not"
    )
    max_train_examples: int | None = Field(default=None, ge=1, description="only the first N of each task")
    batching: Literal["auto", "buckets", "packed"] = Field(
        default="auto",
        description="buckets: rows of similar length, "
        "padded; packed: one row without padding; auto: packed if a GPU "
        "has a kernel for it. Does not change the result",
    )

    @model_validator(mode="after")
    def _data_is_elsewhere(self) -> "DataSection":
        if self.root is None and self.benchmark == TRACE:
            raise ValueError("'root' is missing; add it: the folder that holds TRACE's tasks, or mini")
        if self.root is None and self.benchmark in SHIPPED:
            raise ValueError(
                f"'root' is missing; add it: the folder that holds the data of {self.benchmark}, which its "
                "authors give (docs/own_data.md)"
            )
        return self


class OptimSection(Strict, frozen=True):
    """AdamW on each task; its moments start from zero there unless the method carries them over."""

    lr: Positive | None = Field(default=None, description="learning rate")
    schedule: Literal["constant", "cosine"] | None = Field(
        default=None,
        description="schedule of the learning rate within a task, after the warm-up; cosine ends at 0",
    )
    warmup: NotNegative = Field(
        default=0.0,
        description="steps at the start of a task in which the learning rate rises linearly, before the "
        "schedule; below 1: their share of the task's steps",
    )
    batch_size: Tokens | None = Field(
        default=None, ge=1, description="examples per optimizer step, over all ranks"
    )
    loss_average: Literal["token", "sample"] | None = Field(
        default=None,
        description="token: the mean over all labelled tokens of the global batch; sample: over the "
        "examples' means",
    )
    betas: tuple[Fraction, Fraction] | None = Field(default=None, description="AdamW's β₁ and β₂")
    weight_decay: NotNegative = Field(default=0.0, description="AdamW's, multiplied by the learning rate")
    max_grad_norm: Positive = Field(
        default=1.0,
        description="the gradient of all trained parameters is scaled down to this norm if it is larger",
    )
    micro_batch_tokens: Tokens | None = Field(
        default=None,
        ge=16,
        description="tokens per forward and rank, padding "
        "included; default 4096 on a CPU, 16384 on a GPU; halved if memory runs "
        "out. Does not change the result",
    )
    validate_every: int | None = Field(
        default=None,
        ge=1,
        description="steps between measurements of the loss on the eval split; default: never",
    )
    keep_best: bool = Field(default=False, description="end each task at the step with the lowest eval loss")

    @field_validator("warmup")
    @classmethod
    def _whole_steps_or_a_share(cls, value: float) -> float:
        if value >= 1 and value != int(value):
            raise ValueError(f"{value:g} is neither a number of steps nor a share of them; give 10, or 0.1")
        return value

    @model_validator(mode="after")
    def _best_needs_validation(self) -> "OptimSection":
        if self.keep_best and not self.validate_every:
            raise ValueError("'keep_best' needs 'validate_every'; give the steps between validations")
        return self


class EvalSection(Strict, frozen=True):
    """The greedy answers that are scored after each task."""

    when: Literal["each", "ends"] = Field(
        default="each",
        description="each: all of `tasks` after every task; ends: after every task only that task, and all "
        "of them after the last, which costs far less but leaves `forgetting` unknown",
    )
    tasks: Literal["seen", "all"] = Field(default="seen", description="all: unseen tasks too")
    zero_shot: bool = Field(default=False, description="also evaluate before the first task")
    split: Literal["test", "eval"] = Field(
        default="test", description="which split is scored; eval: for choosing settings"
    )
    max_new_tokens: NewTokens | dict[str, NewTokens] | None = Field(
        default=None, description="most tokens of an answer, for all tasks, or by task"
    )
    max_examples: int | None = Field(default=None, ge=1, description="only the first N of each task")
    backend: Literal["torch", "vllm"] = Field(
        default="torch",
        description="what generates answers; vllm: an optional package, on one GPU of the first process",
    )
    batch_tokens: Tokens | None = Field(
        default=None,
        ge=16,
        description="tokens (prompt and answer) that torch decodes at once; "
        "default 4096 on a CPU, on a GPU as many as fit into half of its free memory, at most 131072",
    )


class GeneralSection(Strict, frozen=True):
    """General ability: what the model can do apart from the tasks."""

    data: PathText | None = Field(
        default=None,
        description="mini: mini-TRACE's probes; hub: lm-evaluation-harness's own tasks; a "
        "folder: task YAMLs on local files, as docs/evaluation.md says; null: no "
        "measurement",
    )
    tasks: list[str] | None = Field(
        default=None,
        min_length=1,
        description="names; default: all of the hub's suite, or all whose files are in the folder",
    )
    trust_code: bool = Field(
        default=False,
        description="run the functions, metrics and data sets that a folder's own task files name; read "
        "them first",
    )
    limit: int | None = Field(
        default=None, ge=1, description="examples of each task, drawn by the seed, for a quick look"
    )
    seed: int = Field(
        default=0,
        ge=0,
        lt=1 << 32,
        description="which examples `limit` draws; separate from the run's seed, so that all "
        "runs answer the same ones",
    )
    when: Literal["ends", "each"] = Field(
        default="ends",
        description="ends: before the first task and after the last; each: after every task too",
    )

    @model_validator(mode="after")
    def _mini_is_whole(self) -> "GeneralSection":
        if self.data == "mini" and (self.tasks or self.limit):
            raise ValueError(
                "'tasks' and 'limit' are for hub and folders, mini has four small probes; leave them out"
            )
        return self


class SaveSection(Strict, frozen=True):
    """Checkpoints inside a task, from which a stopped run resumes."""

    minutes: Positive | None = Field(
        default=10.0, description="time between checkpoints inside a task; null: only when asked to stop"
    )
    keep: int = Field(default=1, ge=1, description="how many checkpoints inside a task are kept")
