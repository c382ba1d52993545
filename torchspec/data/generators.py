"""Who answers in ``regenerate``: an engine in this process, which is given token ids, or a server with OpenAI's chat interface, which is given messages."""

from __future__ import annotations

import http.client
import json
import os
import random
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Any, Protocol

from torchspec.data.conversations import Conversation, Message, RowError, parse
from torchspec.data.exact_ids import ExactRows, Generated
from torchspec.data.render import Renderer
from torchspec.engines.engine import Generator, Sampling
from torchspec.errors import UserError
from torchspec.files import dumps
from torchspec.network import check_url
from torchspec.proxies import around, opener, through

_AGAIN = {408, 409, 425, 429, 500, 502, 503, 504}
"""HTTP codes after which the same request may succeed."""
_LONGEST_WAIT = 30.0


@dataclass(frozen=True)
class Reply:
    """What came of one question."""

    index: int
    message: Message | None
    """The assistant's; None where there is none."""
    finish: str = "stop"
    """stop or length."""
    tokens: int = 0
    generated: Generated | None = None
    """Its ids; None where a server only gives words."""
    understood: bool = True
    """The message is what later ones may follow; False: it is the text as it came, control tokens included."""
    problem: str = ""


class Answerer(Protocol):
    """Gives the next assistant message of conversations."""

    def answer(self, asked: Sequence[Conversation], sampling: Sampling) -> Iterator[Reply]:
        """One reply for each, in the order they come."""
        ...

    def as_ids(self, row: dict[str, Any], generated: Sequence[Generated], *, kept: bool) -> dict[str, Any]:
        """As :meth:`torchspec.data.exact_ids.ExactRows.as_ids`; empty where ids are not known."""
        ...

    def close(self) -> None: ...


class EngineAnswerer:
    """Asks a generator, with prompts rendered by the target's chat template.

    Args:
        generator: owned by this.
        renderer: of the target; makes the prompts.
        trained: renderer of the target as training has it by default; None takes the same.
    """

    def __init__(self, generator: Generator, renderer: Renderer, trained: Renderer | None = None) -> None:
        self._generator, self._renderer, self._rows = generator, renderer, ExactRows(trained or renderer)

    def as_ids(self, row: dict[str, Any], generated: Sequence[Generated], *, kept: bool) -> dict[str, Any]:
        return self._rows.as_ids(row, generated, kept=kept)

    def answer(self, asked: Sequence[Conversation], sampling: Sampling) -> Iterator[Reply]:
        prompts: list[list[int]] = []
        owners: list[int] = []
        for index, conversation in enumerate(asked):
            try:
                prompts.append(self._renderer.prompt(conversation, len(conversation.messages)))
                owners.append(index)
            except RowError as error:
                yield Reply(index, None, problem=str(error))
        for given in self._generator.generate(prompts, sampling) if prompts else ():
            index = owners[given.index]
            conversation = asked[index]
            if not self._renderer.text_of(given.ids).strip():
                yield Reply(index, None, tokens=len(given.ids), problem=f"got an empty answer to message {len(conversation.messages) - 1}")
                continue
            message = self._rows.message(conversation, given.ids, cut=given.finish == "length")
            yield Reply(
                index,
                message or {"role": "assistant", "content": self._renderer.decode(given.ids)},
                given.finish,
                len(given.ids),
                generated=Generated(prompts[given.index], given.ids),
                understood=message is not None,
            )

    def close(self) -> None:
        self._generator.close()


class ServerAnswerer:
    """Asks a server's ``/chat/completions``; the key, if it wants one, is in the environment variable OPENAI_API_KEY.

    Args:
        url: of the interface, such as ``http://127.0.0.1:8000/v1``.
        model: name under which the server has the target.
        concurrency: requests at once.
        retries: further attempts at a request that failed for a passing reason, with growing pauses.
        timeout: seconds for one answer.
        extra: added to every request (``chat_template_kwargs``, ``top_k``, ...).

    Raises:
        UserError: no server there, or it has no such model.
    """

    def __init__(self, url: str, *, model: str, concurrency: int, retries: int = 5, timeout: float = 600.0, extra: Mapping[str, Any] | None = None) -> None:
        check_url(url, field="server", example="http://HOST:8000/v1")
        self._url, self._model, self._concurrency = url.rstrip("/"), model, concurrency
        self._retries, self._timeout, self._extra = retries, timeout, dict(extra or {})
        self._stopped, self._opener = threading.Event(), opener(url)
        try:
            served = [str(entry.get("id")) for entry in self._send("/models", None, timeout=20.0).get("data", [])]
        except (OSError, ValueError, http.client.HTTPException, TypeError, AttributeError, RecursionError) as error:
            raise UserError(
                "server", url, f"does not answer{through(url)} ({_said(error)})", f"start it, or mend the address (it ends with /v1){around(url)}"
            ) from error
        if model not in served:
            raise UserError("target", model, f"is not served by {url} (it has {', '.join(served) or 'nothing'})", "give the name that the server uses")

    def answer(self, asked: Sequence[Conversation], sampling: Sampling) -> Iterator[Reply]:
        pool = ThreadPoolExecutor(self._concurrency, thread_name_prefix="asking")
        try:
            waiting = [pool.submit(self._ask, index, conversation, sampling) for index, conversation in enumerate(asked)]
            for done in as_completed(waiting):
                yield done.result()
        finally:
            self._stopped.set()  # threads that pause between attempts end now
            pool.shutdown(wait=True, cancel_futures=True)
            self._stopped.clear()

    def as_ids(self, row: dict[str, Any], generated: Sequence[Generated], *, kept: bool) -> dict[str, Any]:
        return {}

    def close(self) -> None:
        """Nothing is open between calls."""

    def _ask(self, index: int, conversation: Conversation, sampling: Sampling) -> Reply:
        body = {
            "model": self._model,
            "messages": [_outgoing(message) for message in conversation.messages],
            "max_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "seed": sampling.seed,
            **({"tools": conversation.tools} if conversation.tools else {}),
            **self._extra,
        }
        if conversation.template_args:
            body["chat_template_kwargs"] = {**self._extra.get("chat_template_kwargs", {}), **conversation.template_args}
        attempt = 0
        while True:
            try:
                return _incoming(index, len(conversation.messages), self._send("/chat/completions", body, timeout=self._timeout))
            except urllib.error.HTTPError as error:
                passing, problem = error.code in _AGAIN, _said(error)
                wait = float(error.headers.get("Retry-After", "0")) if str(error.headers.get("Retry-After", "")).isdecimal() else 0.0
            except (OSError, ValueError, http.client.HTTPException, KeyError, IndexError, TypeError, AttributeError, RecursionError) as error:
                passing, problem, wait = isinstance(error, OSError | http.client.HTTPException), _said(error), 0.0
            attempt += 1
            if not passing or attempt > self._retries or self._stopped.is_set():
                return Reply(index, None, problem=f"the server gave no answer{through(self._url)} after {attempt} attempts ({problem})")
            self._stopped.wait(min(max(wait, 0.5 * 2**attempt * random.uniform(0.5, 1.0)), _LONGEST_WAIT))

    def _send(self, path: str, body: dict[str, Any] | None, *, timeout: float) -> dict[str, Any]:
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get("OPENAI_API_KEY"):
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(self._url + path, None if body is None else dumps(body).encode(), headers)
        with self._opener.open(request, timeout=timeout) as response:
            answered = json.loads(response.read())
        if not isinstance(answered, dict):
            raise ValueError("the answer is no JSON object")
        return answered


def _outgoing(message: Message) -> Message:
    """A message as the interface has it: arguments of calls as text."""
    sent = dict(message)
    if "tool_calls" in message:
        calls = message["tool_calls"]
        sent["tool_calls"] = [
            {"id": call.get("id", f"call_{i}"), "type": "function", "function": {**call["function"], "arguments": json.dumps(call["function"]["arguments"])}}
            for i, call in enumerate(calls)
        ]
    return sent


def _incoming(index: int, position: int, answered: dict[str, Any]) -> Reply:
    choice = answered["choices"][0]
    given = choice["message"]
    content, calls = given.get("content") or "", given.get("tool_calls") or []
    thought = given.get("reasoning_content") or given.get("reasoning")
    tokens = int((answered.get("usage") or {}).get("completion_tokens") or 0)
    if not content.strip() and not calls:
        return Reply(index, None, tokens=tokens, problem=f"got an empty answer to message {position - 1}")
    if choice.get("finish_reason") == "content_filter":
        return Reply(index, None, tokens=tokens, problem=f"got an answer to message {position - 1} that the server's content filter cut")
    message: Message = {"role": "assistant", "content": content}
    if thought:
        message["reasoning_content"] = thought
    if calls:
        message["tool_calls"] = [{"id": call.get("id"), "type": "function", "function": call["function"]} for call in calls]
    try:
        parse(json.dumps({"messages": [{"role": "user", "content": "x"}, message]}).encode())
    except RowError as error:  # a call whose arguments are no JSON, half a character
        return Reply(index, None, tokens=tokens, problem=f"got an answer to message {position - 1} that training cannot read ({error})")
    return Reply(index, message, "length" if choice.get("finish_reason") == "length" else "stop", tokens)


def _said(error: BaseException) -> str:
    """An error in a few words; of HTTP also what the server wrote."""
    text = f"{type(error).__name__}: {error}"
    if isinstance(error, urllib.error.HTTPError):
        try:
            wrote = error.read(300).decode(errors="replace")
        except (OSError, http.client.HTTPException) as broken:  # its text ends early
            wrote = f"{error.reason} ({type(broken).__name__})"
        text = f"HTTP {error.code}: {wrote}"
    return " ".join(text.split())[:300]
