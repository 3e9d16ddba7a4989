"""The `openai` teacher: any OpenAI-compatible server, with many requests in flight.

It speaks to the chat-completions route through aiohttp, whose requests cost the client a fifth of the processor time of
other clients' or less: at hundreds of requests a second that decides whether the server or the client is the bottleneck.

To scale out, let the servers do it. One address: `vllm serve MODEL --data-parallel-size 8` on one machine, the same over
Ray (`--data-parallel-backend ray`) on several, or any load balancer. Many addresses: one server a GPU or machine, all
given to `--base_url`; a request goes to the one with the fewest under way, and one that fails stands aside for a while.
`--in_flight` should be a little above what all servers together work on at once, so that a request waits wherever a place
falls free. Other jobs can work on another part of the questions with a store of their own: shards of several stores load
together.

A server is not trusted. Nothing that it answers stops a run: what cannot be read is the verdict on its own question. A
request takes `timeout` seconds at most, however slowly bytes arrive, and no more of a reply is held than `_MAX_REPLY`
bytes. A run stops where no question can be answered: there is no server, or it refuses the key or the model to everyone,
or nothing has been answered for long.
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
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from math import isfinite
from typing import Any
from urllib.parse import urlsplit

import aiohttp

from siq_vl.distill.questions import EncodedPicture
from siq_vl.distill.teachers.base import Teacher, TeacherLost, TeacherReply, TeacherRequest

logger = logging.getLogger(__name__)

_AGAIN = frozenset({408, 409, 425, 429, *range(500, 600)}) - {501, 505}
_DENIED = {
    401: "the server refuses the key",
    403: "the server refuses access",
    404: "the server knows neither route nor model of that name",
}
_MAX_REPLY = 16 << 20  # bytes, decompressed
_MAX_TEXT = 1 << 20  # characters of a message; no model writes more, and verification reads all of them
_MAX_TOKENS = 1 << 31  # a count above it is none
_MAX_PAUSE = 60.0  # seconds, whatever a server asks for
_FIRST_PATIENCE = 60.0  # seconds that a server which can be reached has for its first answer, from its first failure
_ERROR_SECONDS = 5.0  # for the body of an error, whose status is known


class _Again(Exception):
    """This attempt failed and another may succeed; `wait` is what the server asked for, in seconds."""

    def __init__(self, reason: str, wait: float = 0.0):
        super().__init__(reason)
        self.wait = wait


class _Unreachable(_Again):
    """No connection came about."""


class _Refused(Exception):
    """The server will not answer this request, however often it is asked."""


class _Denied(Exception):
    """The server refuses the key, the model or this request: what the others get will tell which."""


@dataclass
class _Endpoint:
    url: str
    busy: int = 0
    rests_until: float = 0.0
    failures: int = 0


@dataclass(frozen=True)
class ServerSettings:
    """How servers are asked; the fields' help says what each of them is."""

    _argument_group_name = "teacher openai: the servers"

    base_url: list[str] = field(
        default_factory=lambda: ["http://127.0.0.1:8000/v1"],
        metadata={"help": "one or several, each with its /v1; a request goes to the one with the fewest under way"},
    )
    api_key_env: str = field(
        default="OPENAI_API_KEY", metadata={"help": "environment variable with the key; an unset one means no key"}
    )
    in_flight: int = field(default=64, metadata={"help": "requests under way at once, over all servers"})
    timeout: float = field(default=300.0, metadata={"help": "seconds an attempt may take"})
    backoff: float = field(
        default=1.0,
        metadata={
            "help": "seconds before the second try; doubled for each further one, at random between half and all"
        },
    )
    attempts: int = field(default=6, metadata={"help": "tries of one request"})

    def __post_init__(self) -> None:
        for url in self.base_url:
            parts = urlsplit(url)
            if parts.username or parts.password or parts.query:
                raise ValueError(
                    f"the base URL of {parts.hostname} carries a user, password or query: put the key into the "
                    f"environment variable {self.api_key_env} instead"
                )
            if parts.scheme not in ("http", "https") or not parts.hostname:
                raise ValueError(f"base URL is {url!r}; it must look like http://host:8000/v1")
            try:
                _ = parts.port
            except ValueError as error:
                raise ValueError(f"base URL is {url!r}: {error}") from error
        for name in ("in_flight", "attempts", "timeout"):
            if not (getattr(self, name) > 0 and isfinite(getattr(self, name))):
                raise ValueError(f"{name} is {getattr(self, name)}; it must be positive")
        if not (self.backoff >= 0 and isfinite(self.backoff)):
            raise ValueError(f"backoff is {self.backoff}; it must be 0 or more seconds")


class ServerTeacher(Teacher):
    """A model behind a server; the key is read from the environment when it is needed and kept nowhere.

    Args:
        model: the model's name on the server.
        settings: which servers, and how they are asked.
        sampling: fields of the request body beside model and messages, `max_tokens` among them.
        revision: of the model, for the store; a server does not tell.
        prompts_family: the templates that suit the model.
        system: the text of a system turn, which may be empty; None: there is none.
        patience: seconds without any answer after which the run stops; a server that never answered gets a minute of
            them, and an address where there is none gets none.
    """

    kind = "openai"
    prompts_family = "default"

    def __init__(
        self,
        model: str,
        settings: ServerSettings | None = None,
        *,
        sampling: Mapping | None = None,
        revision: str = "",
        prompts_family: str = "default",
        system: str | None = None,
        patience: float = 900.0,
    ):
        if not model:
            raise ValueError("the openai teacher needs the model's name on the server: pass --model")
        if not (patience > 0 and isfinite(patience)):
            raise ValueError(f"patience is {patience}; it must be positive")
        settings = settings or ServerSettings()
        self._settings = settings
        self._sampling = dict(sampling or {})
        for name in ("model", "messages", "stream"):
            if name in self._sampling:
                raise ValueError(f"sampling names {name!r}, which is not for it to set: leave it out")
        self._patience = patience
        self.name = model
        self.revision = revision
        self.prompts_family = prompts_family
        self._system = system
        bound = self._sampling.get("max_tokens")
        if isinstance(bound, int):
            self.max_new_tokens = bound
        # As many are made ready as are under way: a slot is refilled at once, after a burst of answers too.
        self.in_flight = 2 * settings.in_flight
        self._slots = asyncio.Semaphore(settings.in_flight)
        self._endpoints = [_Endpoint(url.rstrip("/")) for url in settings.base_url]
        self._failures, self._first_failure, self._last_success = 0, 0.0, 0.0
        self._denied = 0  # requests in a row, of those denied
        self._reached = False  # whether any connection came about
        self._answered = False  # whether any request was
        self._undecided = 0  # requests begun, neither ended nor denied
        self._news = asyncio.Condition()  # of these two
        self._session: aiohttp.ClientSession | None = None

    def settings(self) -> dict:
        settings = dict(self._sampling)
        if self._system is not None:
            settings["system"] = self._system
        return settings

    async def close(self) -> None:
        if self._session:
            await self._session.close()
            self._session = None

    async def generate(self, requests: Sequence[TeacherRequest]) -> list[TeacherReply]:
        replies = []
        for request in requests:
            self._undecided += 1
            try:
                replies.append(await self._answer(request))
            finally:
                await self._decided()
        return replies

    async def _decided(self) -> None:
        self._undecided -= 1
        async with self._news:
            self._news.notify_all()

    async def _answer(self, request: TeacherRequest) -> TeacherReply:
        """Try a request until it is answered, refused, or has been tried often enough."""
        body = json.dumps(self._body(request)).encode()
        started = 0.0
        read = written = 0  # tokens of all attempts: an empty message is paid for, too
        attempt = 0
        reason = ""  # why there is no answer yet
        finish_reason = ""
        final = False  # whether another attempt would be in vain
        while not final and attempt < self._settings.attempts:
            wait = 0.0
            try:
                async with self._slots:
                    started = started or time.perf_counter()
                    reply = await self._try(body)
            except _Unreachable as error:
                # Nobody was asked, so no attempt is used up; `_failed` ends the waiting.
                attempt = max(attempt, 1)
                reason = str(error)
            except _Again as error:
                attempt += 1
                reason = str(error)
                wait = error.wait
            except _Refused as error:
                attempt += 1
                reason = str(error)
                final = True
            except _Denied as error:
                await self._only_this_one(error)
                attempt += 1
                reason = str(error)
                final = True
            else:
                attempt += 1
                read += reply.prompt_tokens
                written += reply.completion_tokens
                if reply.text.strip():
                    seconds = time.perf_counter() - started
                    return TeacherReply(reply.text, reply.finish_reason, read, written, seconds, attempt)
                reason = "the message was empty"
                # It would be cut or withheld again, and paid for again.
                if reply.finish_reason != "stop":
                    finish_reason = reply.finish_reason
                    reason = f"{reason} ({finish_reason})"
                    final = True
            if not final and attempt < self._settings.attempts:
                await asyncio.sleep(self._pause(max(attempt, 1), wait))
        seconds = time.perf_counter() - started
        return TeacherReply("", finish_reason, read, written, seconds, attempt, self._redacted(reason))

    async def _only_this_one(self, denied: _Denied) -> None:
        """Return where others are answered; wait until the requests under way have told.

        Raises:
            TeacherLost: nobody is.
        """
        await self._decided()
        try:
            async with self._news:
                await self._news.wait_for(lambda: self._answered or not self._undecided)
        finally:
            self._undecided += 1
        self._denied += 1
        if not self._answered or self._denied >= max(10, 2 * self._settings.in_flight):
            raise TeacherLost(
                f"{denied}: check --model, --base_url and the key in the environment variable "
                f"{self._settings.api_key_env}; what is done is kept, and the same command goes on from there"
            )

    def _body(self, request: TeacherRequest) -> dict:
        content = []
        for picture in request.pictures:
            content.append({"type": "image_url", "image_url": {"url": data_url(picture)}})
        content.append({"type": "text", "text": request.prompt})
        messages: list[dict] = []
        if self._system is not None:
            messages.append({"role": "system", "content": self._system})
        messages.append({"role": "user", "content": content})
        body: dict[str, Any] = {"model": self.name, "messages": messages}
        body.update(self._sampling)
        if isinstance(body.get("seed"), int):
            body["seed"] += request.repeat  # the samples of one question are different ones
        return body

    def _pause(self, attempt: int, asked_for: float) -> float:
        longest = min(_MAX_PAUSE, self._settings.backoff * 2 ** (attempt - 1))
        return max(min(asked_for, _MAX_PAUSE), random.uniform(longest / 2, longest))

    def _pick(self) -> _Endpoint:
        now = time.monotonic()
        awake = [endpoint for endpoint in self._endpoints if endpoint.rests_until <= now]
        return min(awake or self._endpoints, key=lambda endpoint: (endpoint.busy, endpoint.failures))

    async def _try(self, body: bytes) -> TeacherReply:
        endpoint = self._pick()
        endpoint.busy += 1
        try:
            async with asyncio.timeout(self._settings.timeout):
                said = await self._post(endpoint.url, body)
        except (_Again, aiohttp.ClientError, TimeoutError, OSError) as error:
            if isinstance(error, aiohttp.ClientConnectorError):
                failure: _Again = _Unreachable(_named(error))
            elif isinstance(error, TimeoutError):
                failure = _Again(f"no answer in {self._settings.timeout:g} s")
            else:
                failure = error if isinstance(error, _Again) else _Again(_named(error))
            self._failed(endpoint, failure)
            raise failure from error
        finally:
            endpoint.busy -= 1
        endpoint.failures = self._failures = self._denied = 0
        self._last_success = time.monotonic()
        self._answered = True
        return said

    def _failed(self, endpoint: _Endpoint, failure: _Again) -> None:
        endpoint.failures += 1
        self._failures += 1
        self._reached = self._reached or not isinstance(failure, _Unreachable)
        now = time.monotonic()
        self._first_failure = self._first_failure or now
        if endpoint.failures >= 5 and len(self._endpoints) > 1:
            endpoint.rests_until = now + min(60.0, 2.0 ** min(endpoint.failures - 4, 6))
        if self._last_success:
            silent, patience = now - self._last_success, self._patience
        else:
            silent = now - self._first_failure
            patience = min(_FIRST_PATIENCE, self._patience) if self._reached else 0.0
        if self._failures >= max(10, 2 * self._settings.in_flight) and silent >= patience:
            raise TeacherLost(
                f"{self._failures} attempts in a row have failed: see that the server is up and --base_url is right "
                f"(the last: {self._redacted(str(failure))}); what is done is kept, and the same command goes on from "
                "there"
            )

    async def _post(self, url: str, body: bytes) -> TeacherReply:
        if self._session is None:
            connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=30)
            self._session = aiohttp.ClientSession(
                connector=connector, timeout=aiohttp.ClientTimeout(total=None), cookie_jar=aiohttp.DummyCookieJar()
            )
        headers = {"content-type": "application/json"}
        if key := os.environ.get(self._settings.api_key_env, "").strip():
            headers["authorization"] = f"Bearer {key}"
        # A redirect could carry the key to another host: it is refused.
        async with self._session.post(
            f"{url}/chat/completions", data=body, headers=headers, allow_redirects=False
        ) as reply:
            if reply.status != 200:
                raise await self._fault(reply)
            raw = bytearray()
            while chunk := await reply.content.readany():
                raw += chunk
                if len(raw) > _MAX_REPLY:
                    raise _Again(f"the reply is longer than {_MAX_REPLY >> 20} MiB")
        return _read_completion(bytes(raw))

    async def _fault(self, reply: aiohttp.ClientResponse) -> Exception:
        if reply.status in _AGAIN:
            return _Again(f"status {reply.status}", _seconds(reply.headers.get("retry-after", "")))
        if reply.status in _DENIED:
            return _Denied(f"{_DENIED[reply.status]} (status {reply.status})")
        if 300 <= reply.status < 400:
            return _Refused(f"status {reply.status}: redirects are not followed, give --base_url the final address")
        text = b""
        with suppress(aiohttp.ClientError, TimeoutError):  # the status is known, whatever becomes of the body
            async with asyncio.timeout(_ERROR_SECONDS):
                text = await reply.content.read(400)
        told = " ".join(text.decode(errors="replace").split())
        return _Refused(f"status {reply.status}: {told}" if told else f"status {reply.status}")

    def _redacted(self, text: str) -> str:
        key = os.environ.get(self._settings.api_key_env)
        text = text.replace(key, "[key]") if key else text
        return re.sub(r"(?i)bearer\s+\S+|\bsk-[\w-]{8,}", "[key]", text)[:300]


def data_url(picture: EncodedPicture) -> str:
    """Return a picture as a `data:` URL, in its own encoding where servers know it, else as PNG."""
    mime, data = picture.mime, picture.data
    if mime is None:
        mime, data = "image/png", EncodedPicture.encode(picture.image).data
    return f"data:{mime};base64,{base64.b64encode(data).decode()}"


def _named(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _seconds(retry_after: str) -> float:
    """Return the seconds that a `Retry-After` header asks for, given as a number or a date; 0 where it asks for none."""
    try:
        seconds = float(retry_after)
    except ValueError:
        try:
            date = parsedate_to_datetime(retry_after)
            seconds = (date.replace(tzinfo=date.tzinfo or UTC) - datetime.now(UTC)).total_seconds()
        except (ValueError, TypeError, OverflowError):
            return 0.0
    return min(max(0.0, seconds), _MAX_PAUSE) if seconds == seconds else 0.0


def _read_completion(raw: bytes) -> TeacherReply:
    """Read a chat completion; servers with a reasoning parser give the reasoning in a field of its own.

    Raises:
        _Again: it holds no message. A field beside the message that makes no sense is as good as a missing one.
    """
    try:
        reply = json.loads(raw, parse_int=_whole)
    except (ValueError, RecursionError) as error:
        raise _Again(f"the reply is no chat completion ({type(error).__name__})") from error
    reply = _object(reply)
    choices = reply.get("choices")
    choice = _object(choices[0]) if isinstance(choices, list) and choices else {}
    message = choice.get("message")
    if not isinstance(message, dict):
        told = _text(_object(reply.get("error")).get("message")) or "it has no message"
        raise _Again(f"the reply is no chat completion: {told}")
    content = message.get("content")
    if content is not None and not isinstance(content, str | list):
        raise _Again(f"the reply is no chat completion: its message is {type(content).__name__}, not text")
    text = _text(content)
    reasoning = _text(message.get("reasoning_content")) or _text(message.get("reasoning"))
    if isinstance(content, list):
        text, thinking = _read_parts(content)
        reasoning = reasoning or thinking
    text = text or _text(message.get("refusal"))
    if reasoning.strip() and "</think>" not in text:
        text = f"<think>{reasoning}</think>{text}"
    usage = _object(reply.get("usage"))
    finish_reason = _text(choice.get("finish_reason"))[:40] or "stop"
    if len(text) > _MAX_TEXT:
        finish_reason = "length"
    return TeacherReply(
        text[:_MAX_TEXT],
        finish_reason,
        _tokens(usage.get("prompt_tokens")),
        _tokens(usage.get("completion_tokens")),
    )


def _read_parts(parts: Sequence) -> tuple[str, str]:
    """Return the text and the reasoning of a message in parts; the reasoning is text, or parts of its own."""
    text = reasoning = ""
    for part in parts:
        text += _text(_object(part).get("text"))
        thinking = _object(part).get("thinking")
        if isinstance(thinking, list):
            for inner in thinking:
                reasoning += _text(_object(inner).get("text"))
        else:
            reasoning += _text(thinking)
    return text, reasoning


def _object(value: object) -> Mapping:
    """Return a JSON object; an empty one for anything else."""
    if isinstance(value, dict):
        return value
    return {}


def _text(value: object) -> str:
    """Return a JSON string; an empty one for anything else."""
    if isinstance(value, str):
        return value
    return ""


def _whole(digits: str) -> int | None:
    """Read an integer of JSON; one that no column holds is None, and never costs the text beside it."""
    if len(digits) > 18:
        return None
    return int(digits)


def _tokens(value: object) -> int:
    """Return a count of tokens; 0 where there is none, or none that can be."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return 0
    try:
        count = int(value)
    except (ValueError, OverflowError):
        return 0
    if not 0 <= count < _MAX_TOKENS:
        return 0
    return count
