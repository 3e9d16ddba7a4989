"""The `openai` teacher: any OpenAI-compatible server, with many requests in flight.

It speaks to the chat-completions route through aiohttp, whose requests cost the client a fifth of the processor time of
other clients' or less: at hundreds of requests a second that decides whether the server or the client is the bottleneck.

To scale out, let the servers do it. One address: `vllm serve MODEL --data-parallel-size 8` on one machine, the same over
Ray (`--data-parallel-backend ray`) on several, or any load balancer. Many addresses: one server a GPU or machine, all
given to `--base_url`; a request goes to the one with the fewest under way, and one that fails stands aside for a while.
`--in_flight` should be a little above what all servers together work on at once, so that a request waits wherever a place
falls free. Other jobs can work on another part of the questions with a store of their own: shards of several stores load
together.
"""

import asyncio
import base64
import json
import logging
import os
import random
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import aiohttp

from siq_vl.distill.questions import Picture
from siq_vl.distill.teachers.base import Asked, Said, Teacher, TeacherLost

logger = logging.getLogger(__name__)

_AGAIN = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 520, 522, 524, 529})
_NEVER = {
    401: "the server refuses the key",
    403: "the server refuses access",
    404: "the server knows neither route nor model of that name",
}
_MAX_REPLY = 16 << 20


class _Again(Exception):
    """This attempt failed and another may succeed; `wait` is what the server asked for, in seconds."""

    def __init__(self, reason: str, wait: float = 0.0):
        super().__init__(reason)
        self.wait = wait


class _Unreachable(_Again):
    """No connection came about."""


class _Refused(Exception):
    """The server will not answer this request, however often it is asked."""


@dataclass
class _Endpoint:
    url: str
    busy: int = 0
    rests_until: float = 0.0
    failures: int = 0


@dataclass(frozen=True)
class ServerSettings:
    """How a server is asked.

    Attributes:
        model: the model's name on the server.
        base_urls: one or several, each with its `/v1`; a request goes to the one with the fewest under way.
        key_variable: the environment variable that holds the key; an unset one means no key.
        sampling: fields of the request body beside model and messages, `max_tokens` among them.
        in_flight: requests under way at once, over all servers.
        timeout: seconds an attempt may take.
        attempts: how often a request is tried in all.
        backoff: seconds before the second attempt, doubled for each further one up to a minute, then drawn at random
            between half of it and all.
        patience: seconds without any answer after which the run stops; a server that never answered gets none.
    """

    model: str
    base_urls: Sequence[str] = ("http://127.0.0.1:8000/v1",)
    key_variable: str = "OPENAI_API_KEY"
    sampling: Mapping = field(default_factory=dict)
    in_flight: int = 64
    timeout: float = 300.0
    attempts: int = 6
    backoff: float = 1.0
    patience: float = 900.0

    def __post_init__(self) -> None:
        if not self.model:
            raise ValueError("the openai teacher needs the model's name on the server: pass --model")
        for url in self.base_urls:
            parts = urlsplit(url)
            if parts.username or parts.password or parts.query:
                raise ValueError(
                    f"the base URL of {parts.hostname} carries a user, password or query: put the key into the "
                    f"environment variable {self.key_variable} instead"
                )
            if parts.scheme not in ("http", "https") or not parts.hostname:
                raise ValueError(f"base URL is {url!r}; it must look like http://host:8000/v1")
        for name in ("in_flight", "attempts", "timeout", "patience"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be positive")


class ServerTeacher(Teacher):
    """A model behind a server; the key is read from the environment when it is needed and kept nowhere."""

    kind = "openai"
    prompts_family = "default"

    def __init__(self, settings: ServerSettings, *, revision: str = "", prompts_family: str = "default"):
        self._settings = settings
        self.name, self.revision, self.prompts_family = settings.model, revision, prompts_family
        # As many are made ready as are under way: a slot is refilled at once, after a burst of answers too.
        self.in_flight = 2 * settings.in_flight
        self._slots = asyncio.Semaphore(settings.in_flight)
        self._endpoints = [_Endpoint(url.rstrip("/")) for url in settings.base_urls]
        self._failures, self._last_success = 0, 0.0
        self._session: aiohttp.ClientSession | None = None

    def settings(self) -> dict:
        return dict(self._settings.sampling)

    async def close(self) -> None:
        if self._session:
            await self._session.close()
            self._session = None

    async def generate(self, asked: Sequence[Asked]) -> list[Said]:
        return [await self._answer(one) for one in asked]

    async def _answer(self, asked: Asked) -> Said:
        body = json.dumps(self._body(asked)).encode()
        started, read, written, attempt, reason = 0.0, 0, 0, 0, ""
        while attempt < self._settings.attempts:
            wait = 0.0
            try:
                async with self._slots:
                    started = started or time.perf_counter()
                    said = await self._try(body)
            except _Unreachable as error:  # nobody was asked: no attempt is used up, `_failed` ends the waiting
                attempt, reason = max(attempt, 1), str(error)
            except _Again as error:
                attempt, reason, wait = attempt + 1, str(error), error.wait
            except _Refused as error:
                attempt, reason = self._settings.attempts, str(error)
            else:
                attempt, reason = attempt + 1, "the message was empty"
                read, written = read + said.prompt_tokens, written + said.completion_tokens  # paid, even if empty
                if said.text.strip():
                    seconds = time.perf_counter() - started
                    return Said(said.text, said.finish_reason, read, written, seconds, attempt)
            if attempt < self._settings.attempts:
                await asyncio.sleep(self._pause(max(attempt, 1), wait))
        return Said("", "", read, written, time.perf_counter() - started, attempt, self._redacted(reason))

    def _body(self, asked: Asked) -> dict:
        content = [{"type": "image_url", "image_url": {"url": data_url(picture)}} for picture in asked.pictures]
        content.append({"type": "text", "text": asked.prompt})
        body: dict[str, Any] = {"model": self._settings.model, "messages": [{"role": "user", "content": content}]}
        body.update(self._settings.sampling)
        if "seed" in body:
            body["seed"] += asked.repeat  # the samples of one question are different ones
        return body

    def _pause(self, attempt: int, asked_for: float) -> float:
        longest = min(60.0, self._settings.backoff * 2 ** (attempt - 1))
        return max(min(asked_for, 60.0), random.uniform(longest / 2, longest))

    def _pick(self) -> _Endpoint:
        now = time.monotonic()
        awake = [endpoint for endpoint in self._endpoints if endpoint.rests_until <= now]
        return min(awake or self._endpoints, key=lambda endpoint: (endpoint.busy, endpoint.failures))

    async def _try(self, body: bytes) -> Said:
        endpoint = self._pick()
        endpoint.busy += 1
        try:
            async with asyncio.timeout(self._settings.timeout):
                said = await self._post(endpoint.url, body)
        except (_Again, aiohttp.ClientError, TimeoutError, OSError) as error:
            self._failed(endpoint)
            if isinstance(error, _Again):
                raise
            if isinstance(error, TimeoutError):
                raise _Again(f"no answer in {self._settings.timeout:g} s") from error
            kind = _Unreachable if isinstance(error, aiohttp.ClientConnectorError) else _Again
            raise kind(f"{type(error).__name__}: {error}") from error
        finally:
            endpoint.busy -= 1
        endpoint.failures = self._failures = 0
        self._last_success = time.monotonic()
        return said

    def _failed(self, endpoint: _Endpoint) -> None:
        endpoint.failures += 1
        self._failures += 1
        now = time.monotonic()
        if endpoint.failures >= 5 and len(self._endpoints) > 1:
            endpoint.rests_until = now + min(60.0, 2.0 ** min(endpoint.failures - 4, 6))
        silent = now - self._last_success if self._last_success else self._settings.patience
        if self._failures >= max(10, 2 * self._settings.in_flight) and silent >= self._settings.patience:
            raise TeacherLost(
                f"{self._failures} attempts in a row have failed: see that the server is up and --base_url is right; "
                "what is done is kept, and the same command goes on from there"
            )

    async def _post(self, url: str, body: bytes) -> Said:
        if self._session is None:
            connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=30)
            self._session = aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=None))
        headers = {"content-type": "application/json"}
        if key := os.environ.get(self._settings.key_variable):
            headers["authorization"] = f"Bearer {key}"
        # A redirect could carry the key to another host: it is refused.
        async with self._session.post(
            f"{url}/chat/completions", data=body, headers=headers, allow_redirects=False
        ) as reply:
            if reply.status != 200:
                raise await self._fault(reply)
            raw = b""
            while (chunk := await reply.content.readany()) and len(raw) <= _MAX_REPLY:
                raw += chunk
        return _read_completion(raw)

    async def _fault(self, reply: aiohttp.ClientResponse) -> Exception:
        if reply.status in _AGAIN:
            return _Again(f"status {reply.status}", _seconds(reply.headers.get("retry-after", "")))
        if reply.status in _NEVER:
            return TeacherLost(
                f"{_NEVER[reply.status]} (status {reply.status}): check --model, --base_url and the key in the "
                f"environment variable {self._settings.key_variable}"
            )
        text = (await reply.content.read(400)).decode(errors="replace")
        return _Refused(f"status {reply.status}: {' '.join(text.split())}")

    def _redacted(self, text: str) -> str:
        key = os.environ.get(self._settings.key_variable)
        text = text.replace(key, "[key]") if key else text
        return re.sub(r"(?i)bearer\s+\S+|\bsk-[\w-]{8,}", "[key]", text)[:300]


def data_url(picture: Picture) -> str:
    """Return a picture as a `data:` URL, in its own encoding where servers know it, else as PNG."""
    mime, data = picture.mime, picture.data
    if mime is None:
        mime, data = "image/png", Picture.encode(picture.image).data
    return f"data:{mime};base64,{base64.b64encode(data).decode()}"


def _seconds(retry_after: str) -> float:
    try:
        return max(0.0, float(retry_after))
    except ValueError:  # a date: the backoff alone decides
        return 0.0


def _read_completion(raw: bytes) -> Said:
    """Read a chat completion; servers with a reasoning parser give the reasoning in a field of its own."""
    try:
        reply = json.loads(raw)
        choice = reply["choices"][0]
        message, usage = choice["message"], reply.get("usage") or {}
        text = message.get("content") or ""
        reasoning = message.get("reasoning_content") or message.get("reasoning") or ""
        if not isinstance(text, str) or not isinstance(reasoning, str):
            raise TypeError("the message is not text")
        if reasoning.strip() and "</think>" not in text:
            text = f"<think>{reasoning}</think>{text}"
        return Said(
            text,
            str(choice.get("finish_reason") or "stop"),
            int(usage.get("prompt_tokens") or 0),
            int(usage.get("completion_tokens") or 0),
        )
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise _Again(f"the reply is no chat completion ({type(error).__name__})") from error
