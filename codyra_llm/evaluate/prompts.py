"""Open-ended prompts, which have no reference answer: what a recipe asks for, and reading their files."""

import os
import re
from ipaddress import ip_address
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from ..errors import Fault, nearest
from ..examples import record_faults, refuse
from ..schema import NotNegative, Positive, Strict
from ..sources import READERS, rows
from ..untrusted import PathText
from .suite import drawn

RECORD = 'records {"prompt": text}'


class JudgeSection(Strict):
    """Who compares the answers of base and final model. The key itself is never part of a recipe."""

    base_url: str | None = Field(None, description="of an OpenAI-compatible endpoint, e.g. http://localhost:8000/v1; null: "
                                                   "no judging")
    model: str | None = Field(None, description="the judge, as the endpoint names it")
    key_variable: str | None = Field("OPENAI_API_KEY", description="environment variable that holds the key; null: the "
                                                                   "endpoint asks for none")
    temperature: NotNegative | None = Field(0.0, description="null: not sent, for models that take none")
    max_tokens: int | None = Field(1024, ge=16, le=1 << 20, description="of a verdict and its reasons; null: not sent")
    timeout: Positive = Field(120.0, description="seconds for one request")
    retries: int = Field(5, ge=0, le=100, description="of a request that failed with 408, 409, 429, 5xx or no answer")
    parallel: int = Field(4, ge=1, le=256, description="requests at the same time")

    @model_validator(mode="before")
    @classmethod
    def _holds_no_secret(cls, given: Any) -> Any:
        names = map(str, given) if isinstance(given, dict) else ()
        if found := [name for name in names if name != "key_variable" and re.search("key|token$|secret|passw", name)]:
            raise ValueError(f"'{found[0][:100]}' does not belong in a recipe, which is copied into runs and exports; put the "
                             f"key into an environment variable and give that one's name as 'key_variable'")
        return given

    @field_validator("key_variable")
    @classmethod
    def _names_a_variable(cls, name: str | None) -> str | None:
        if name is not None and not re.fullmatch(r"[A-Z][A-Z0-9_]{0,63}", name):  # does not repeat what may be the key
            raise ValueError("this is no name of an environment variable in capitals, such as OPENAI_API_KEY; give the name, "
                             "not the key")
        return name

    @field_validator("base_url")
    @classmethod
    def _is_an_address(cls, url: str | None) -> str | None:
        try:
            parts = urlsplit(url or "http://none")
            host = parts.hostname or ""
            if number := ":" in host or re.fullmatch(r"[\d.]+", host):
                ip_address(host)
            wrong = parts.port == 0 or not (number or re.fullmatch(r"[a-z\d._-]+", host)) or "@" in parts.netloc or parts.query
        except ValueError:  # no number as port, no IP address, a bracket without its other
            wrong = True
        if wrong or parts.scheme not in ("http", "https"):
            raise ValueError("this is no address of an endpoint; give one like http://localhost:8000/v1, without a user, a "
                             "password or a query")
        return url

    @model_validator(mode="after")
    def _endpoint_needs_model(self) -> "JudgeSection":
        if self.base_url and not self.model:
            raise ValueError("'base_url' needs 'model'; give the name that the endpoint has for the judge")
        return self


class OpenEndedSection(Strict):
    """Prompts that the base and the final model answer side by side."""

    prompts: PathText | None = Field(None, description="a file (.json, .jsonl, .csv with a field or column 'prompt'), or a "
                                                       "folder of such; null: none")
    files: list[str] | None = Field(None, min_length=1, description="names of files of the folder, without suffix; default: "
                                                                    "all")
    max_new_tokens: int = Field(512, ge=1, le=1 << 20, description="of an answer")
    limit: int | None = Field(None, ge=1, description="prompts of each file, drawn by the seed")
    seed: int = Field(0, ge=0, lt=1 << 32, description="of that draw")
    judge: JudgeSection = JudgeSection()


def find(section: OpenEndedSection) -> dict[str, list[str]]:
    """The prompts that a recipe asks for, by the file's name without suffix. Raises one Fault with all that is wrong."""
    if section.prompts is None:
        return {}
    root = Path(os.path.expanduser(os.path.expandvars(section.prompts)))
    if not root.exists():
        raise Fault(f"open_ended.prompts: there is no file or folder '{section.prompts}'; give a .json, .jsonl or .csv file, a "
                    f"folder of such, or null")
    paths = sorted(p for p in (root.iterdir() if root.is_dir() else [root]) if p.suffix in READERS and p.is_file())
    known = {path.stem: path for path in paths}
    faults = [f"open_ended.files: '{name}' is no file of {root}.{nearest(name, known)} Known: {', '.join(known) or 'none'}"
              for name in section.files or () if name not in known]
    if not known or len(known) < len(paths):
        found = "two files of one name" if known else "no .json, .jsonl or .csv"
        faults.append(f"open_ended.prompts: {root} holds {found}; give files with {RECORD}, each of another name")
    if faults:
        raise Fault(*faults)
    found = {name: _read(known[name]) for name in dict.fromkeys(section.files or known)}
    return {name: [prompts[i] for i in drawn(name, {name: len(prompts)}, section.limit, section.seed)[name]]
            for name, prompts in found.items()}


def _read(path: Path) -> list[str]:
    if not (records := rows(path, RECORD)):
        raise Fault(f"{path} holds no record, expected {RECORD}; write at least one")
    faults = []
    for number, record in enumerate(records):
        where = f"{path}: record {number}"
        own = record_faults({**record, "answer": ""} if isinstance(record, dict) else record, "test", where)
        empty = not own and not record["prompt"].strip()
        faults += own + [f"{where}: 'prompt' is empty; fill it in or remove the record"] * empty
    refuse(faults, path, len(records))
    return [record["prompt"] for record in records]
