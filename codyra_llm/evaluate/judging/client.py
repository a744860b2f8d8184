"""The judge: a model behind an OpenAI-compatible endpoint."""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from importlib.util import find_spec
from threading import Event
from typing import Any

from codyra_llm.config.sections import JudgeSection
from codyra_llm.core.errors import Fault
from codyra_llm.runtime import signals


def require(section: JudgeSection) -> None:
    """Raises Fault where the judge can't be asked: without the package, its key or a usable proxy."""
    _client(section).close()


def _client(section: JudgeSection) -> Any:
    """An OpenAI client for the endpoint. Raises Fault without the package, the key or a usable proxy."""
    if find_spec("openai") is None:
        raise Fault(
            "open_ended.judge: judging needs the package openai, which is not installed; install "
            "codyra-llm[judge], or set open_ended.judge.base_url to null"
        )
    key = os.environ.get(section.key_variable or "", "").strip()
    if section.key_variable and not (key and key.isascii() and key.isprintable()):
        raise Fault(
            f"open_ended.judge.key_variable: the environment variable {section.key_variable} holds no key; "
            "export it, or set key_variable to null for an endpoint that asks for none"
        )
    from openai import OpenAI  # an extra, and slow to import

    try:
        return OpenAI(
            base_url=section.base_url,
            api_key=key or "none",
            timeout=section.timeout,
            max_retries=section.retries,
        )
    except ValueError as error:  # raised for the proxy that the environment names
        raise Fault(
            f"open_ended.judge.base_url: {section.base_url} can't be asked ({error}); correct the "
            "environment's proxy, such as HTTP_PROXY"
        ) from None


def replies(section: JudgeSection, asked: dict[str, str]) -> Iterator[tuple[str, str]]:
    """Ask these questions, given by digest, several at a time; yields (digest, reply) as replies come.

    Raises Fault when the endpoint still fails after all retries, and Stopped when the process was asked to
    stop; both only after the questions in progress are done.
    """
    client, ended, faults = _client(section), Event(), []

    def ask_one(digest: str) -> tuple[str, str] | None:
        if ended.is_set():
            return None
        try:
            return digest, _ask(client, section, asked[digest])
        except Fault:
            ended.set()
            raise

    with client, ThreadPoolExecutor(section.parallel) as pool:
        try:
            for future in as_completed([pool.submit(ask_one, digest) for digest in asked]):
                if signals.asked():
                    ended.set()
                error = future.exception()
                if isinstance(error, Fault):
                    faults += error.messages
                    continue
                reply = future.result()  # raises any other error
                if reply:  # None: the question was not asked, since an earlier one failed
                    yield reply
        finally:
            ended.set()
    if faults:
        raise Fault(faults[0])
    signals.check()


def _ask(client: Any, section: JudgeSection, text: str) -> str:
    """The judge's reply to one question. Raises Fault where the endpoint fails."""
    from openai import OpenAIError

    asked = {"temperature": section.temperature, "max_tokens": section.max_tokens}
    given: dict[str, Any] = {key: value for key, value in asked.items() if value is not None}
    try:
        reply = client.chat.completions.create(
            model=section.model, messages=[{"role": "user", "content": text}], **given
        )
    except (OpenAIError, ValueError) as error:  # ValueError: a body that is not JSON
        raise Fault(
            f"open_ended.judge: {section.base_url} failed ({_reason(error, section)}); what was judged is "
            "kept, give the same command again once the endpoint answers, or set open_ended.judge.base_url "
            "to null"
        ) from None
    choices = getattr(reply, "choices", None)
    if not choices or getattr(choices[0], "message", None) is None:
        raise Fault(
            f"open_ended.judge.base_url: {section.base_url} gave no chat completion; correct it, it often "
            "ends in /v1"
        )
    return choices[0].message.content or ""


def _reason(error: Exception, section: JudgeSection) -> str:
    """What happened, without the text of the reply, which may repeat the key."""
    from openai import APIConnectionError, APIStatusError, APITimeoutError

    if isinstance(error, APITimeoutError):
        return f"no answer within {section.timeout:g} s, after {section.retries} retries"
    if isinstance(error, APIConnectionError):
        return f"no connection, after {section.retries} retries"
    if isinstance(error, APIStatusError):
        hint = {
            401: ", the key is not taken",
            403: ", the key may not do this",
            404: f", is '{section.model}' known there?",
            429: f", too many requests, after {section.retries} retries",
        }
        return f"status {error.status_code}{hint.get(error.status_code, '')}"
    return f"{type(error).__name__}, its reply can't be read"
