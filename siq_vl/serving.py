"""What the server checks before `transformers serve` sees a request: every refusal is a 400 that says why.

Requests for other paths than a chat's, the models' list and the health check are not passed on: they load other models
(with the code that these carry), unload the served one, or take prompts and pictures unchecked.
"""

import asyncio
import base64
import binascii
import json
import math
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from PIL import Image
from transformers import PreTrainedModel

from siq_vl.data.images import decode_image, find_under
from siq_vl.data.remote import MAX_BYTES, download_image, is_remote
from siq_vl.processing_siq_vl import SiQVLProcessor

CHAT = "/v1/chat/completions"
PATHS = (CHAT, "/v1/models", "/health")
ROLES = ("system", "user", "assistant")
MAX_BODY_BYTES = 64 << 20
MAX_NEW_TOKENS = 1024  # where a request does not say, and the context has room
AT_ONCE = 2  # requests whose pictures are decoded side by side
_SEED_LIMIT = 2**63

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class Refused(ValueError):
    """A request that is not answered; its text says why."""

    def __init__(self, reason: str, status: int = 400):
        super().__init__(reason)
        self.status = status


@dataclass(frozen=True)
class Allowed:
    """Where clients may take pictures from, beside the request itself.

    Args:
        folder: files below it; none by default.
        remote: public web addresses.
    """

    folder: Path | None = None
    remote: bool = False


class RequestCheck:
    """Checks the body of a chat request, and puts its pictures into it.

    Args:
        model: the served model.
        processor: its processor.
        allowed: where pictures may come from.
    """

    def __init__(self, model: PreTrainedModel, processor: SiQVLProcessor, allowed: Allowed):
        self.processor, self.allowed = processor, allowed
        text_config = model.config.get_text_config()
        self.context, self.vocabulary = text_config.max_position_embeddings, text_config.vocab_size
        # No text with more characters than this can fit, so that it is not worth counting its tokens.
        self.most_characters = self.context * max(map(len, processor.tokenizer.get_vocab()))

    def __call__(self, content: bytes) -> dict[str, Any]:
        """Return the body to pass on: pictures decoded once and embedded, and a bound on the answer that fits.

        Raises:
            Refused: what is asked for is malformed, unsupported, unsafe, or longer than the context.
        """
        body = _parsed(content)
        _check_fields(body, self.vocabulary)
        messages, sizes = self._messages(body.get("messages"))
        room = self.context - self._length(messages, sizes, body)
        if room < 1:
            raise Refused(
                f"the prompt takes {self.context - room} tokens, but the model reads {self.context}, answer included: "
                "shorten it or leave pictures out"
            )
        asked = body.pop("max_tokens", None)
        asked = asked if body.get("max_completion_tokens") is None else body["max_completion_tokens"]
        if asked is not None and asked > room:
            raise Refused(
                f"the prompt takes {self.context - room} tokens and the answer up to {_shown(asked)}, but the model reads "
                f"{self.context}: ask for at most {room} tokens, or shorten the prompt"
            )
        if asked is None and body.get("generation_config") is not None:
            asked = json.loads(body["generation_config"]).get("max_new_tokens")
            asked = None if asked is None else min(asked, room)
        body["max_completion_tokens"] = min(room, MAX_NEW_TOKENS) if asked is None else asked
        if body.get("logit_bias"):  # which generation takes as fractions alone
            body["logit_bias"] = {token: float(bias) for token, bias in body["logit_bias"].items()}
        body["messages"] = messages
        return body

    def _messages(self, given: Any) -> tuple[list[dict], list[tuple[int, int]]]:
        """Return the messages with their pictures embedded, and the pictures' sizes (height, width)."""
        if not isinstance(given, list) or not given:
            raise Refused(f"messages is {_shown(given)}; it must be a list with at least one message")
        parts = [part for message in given for part in _parts_of(message)]
        texts = [part["text"] for part in parts if part["type"] == "text"]
        pictures = [part for part in parts if part["type"] == "image_url"]
        # What is cheap to count comes before anything is decoded.
        if sum(map(len, texts)) > self.most_characters:
            raise Refused(
                f"the prompt has {sum(map(len, texts))} characters, far more than the model reads: shorten it"
            )
        if len(pictures) * self.processor.image_seq_length >= self.context:
            raise Refused(
                f"the request has {len(pictures)} pictures of at least {self.processor.image_seq_length} tokens each, but the "
                f"model reads {self.context}: send fewer"
            )
        messages, sizes = [], []
        for message in given:
            content = []
            for part in _parts_of(message):
                if part["type"] == "text":
                    content.append(part)
                    continue
                data, image = self._picture(_address_of(part))
                sizes.append(image.size[::-1])
                encoded = base64.b64encode(data).decode()
                content.append({"type": "image_url", "image_url": {"url": f"data:image/png;base64,{encoded}"}})
            messages.append({"role": message["role"], "content": content})
        return messages, sizes

    def _picture(self, address: str) -> tuple[bytes, Image.Image]:
        """Return a picture's bytes, and the picture."""
        name = repr(address if len(address) <= 80 else f"{address[:77]}...")
        try:
            data = self._bytes_of(address, name)
            return data, decode_image(data, f"the picture {name}")
        except Refused:
            raise
        except ValueError as error:
            raise Refused(str(error)) from error

    def _bytes_of(self, address: str, name: str) -> bytes:
        scheme = address[:8].lower()
        if scheme.startswith("data:"):
            kind, comma, encoded = address.partition(",")
            if not comma or not kind.lower().endswith(";base64"):
                raise Refused(f"the picture {name} is not in base64: write data:image/png;base64,...")
            try:
                return base64.b64decode("".join(unquote(encoded).split()), validate=True)
            except (binascii.Error, ValueError) as error:
                raise Refused(f"the picture {name} is not valid base64 ({error}): encode it again") from error
        if is_remote(address) and not scheme.startswith("file://"):
            if not self.allowed.remote:
                raise Refused(f"{name} is a remote picture, and this server reads none: send it as a data: address")
            return download_image(address)
        folder = self.allowed.folder
        if folder is None:
            raise Refused(f"{name} names a file, and this server reads none: send the picture as a data: address")
        try:
            path = find_under(unquote(address[7:]) if scheme.startswith("file://") else address, [folder])
            if path.stat().st_size > MAX_BYTES:
                raise Refused(f"{name} is larger than {MAX_BYTES >> 20} MiB: make it smaller first")
            return path.read_bytes()
        except FileNotFoundError as error:
            raise Refused(f"{name} is not there: give the path of a file below the server's folder") from error
        except Refused:
            raise
        except (OSError, ValueError) as error:  # out of the folder, or a name that no file system takes
            raise Refused(f"{name} cannot be read: give the path of a file below the server's folder") from error

    def _length(self, messages: list[dict], sizes: list[tuple[int, int]], body: Mapping[str, Any]) -> int:
        """Return the tokens of the prompt."""
        plain = []
        for message in messages:
            content = [part if part["type"] == "text" else {"type": "image"} for part in message["content"]]
            plain.append({"role": message["role"], "content": content})
        options = body.get("chat_template_kwargs") or {}
        text = self.processor.apply_chat_template(plain, tokenize=False, add_generation_prompt=True, **options)
        length = len(self.processor.tokenizer(text, add_special_tokens=False)["input_ids"]) - len(sizes)
        if sizes:
            length += sum(self.processor._get_num_multimodal_tokens(image_sizes=sizes)["num_image_tokens"])
        return length


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _parsed(content: bytes) -> dict[str, Any]:
    """Return the body as an object; not a number and infinity are no JSON, and half a character is no text."""

    def refuse(name: str) -> None:
        raise Refused(f"the body holds {name}, which is not JSON: send a number")

    try:
        body = json.loads(content, parse_constant=refuse)
        json.dumps(body, ensure_ascii=False).encode()
    except Refused:
        raise
    except RecursionError as error:
        raise Refused("the body is nested too deeply: send plain messages") from error
    except ValueError as error:
        raise Refused(f"the body is not JSON in UTF-8 ({error}): send an object with messages") from error
    if not isinstance(body, dict):
        raise Refused(f"the body is {_shown(body)}; it must be an object with messages")
    return body


def _parts_of(message: Any) -> list[dict]:
    """Return the checked parts of a message's content, each a text or a picture."""
    if not isinstance(message, dict):
        raise Refused(f"a message is {_shown(message)}; it must be an object with role and content")
    if message.get("role") not in ROLES:
        raise Refused(f"role is {_shown(message.get('role'))}; it must be one of {', '.join(ROLES)}")
    for name in ("tool_calls", "function_call", "tool_call_id", "audio"):
        if message.get(name):
            raise Refused(f"{name} is set in a message, but this model calls no tools and makes no sound: leave it out")
    content = message.get("content")
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(parts, list) or not parts or content == "":
        raise Refused(f"content is {_shown(content)}; it must be a text, or a list of texts and pictures, not empty")
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text":
            if not isinstance(part.get("text"), str):
                raise Refused(f"text is {_shown(part.get('text'))}; it must be a string")
        elif kind == "image_url":
            if not _address_of(part):
                raise Refused("image_url holds no address: write {'url': 'data:image/png;base64,...'}")
        else:
            raise Refused(f"a part of content is {_shown(part)}; its type must be text or image_url")
    return parts


def _address_of(part: Mapping[str, Any]) -> str:
    address = part.get("image_url")
    if isinstance(address, dict):
        address = address.get("url")
    return address if isinstance(address, str) else ""


def _is_number(value: Any, least: float, most: float) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    # False of NaN, too, which Python's reader of JSON takes.
    return least <= value <= most


def _is_count(value: Any, least: int, most: float) -> bool:
    return isinstance(value, int) and _is_number(value, least, most)


def _check_fields(body: Mapping[str, Any], vocabulary: int) -> None:
    """Refuse values that the server would fail at, and whatever it would ignore in silence."""
    rules: dict[str, tuple[Callable[[Any], bool], str]] = {
        "model": (lambda value: isinstance(value, str), "the name of the served model"),
        "stream": (lambda value: isinstance(value, bool), "true or false"),
        "max_tokens": (lambda value: _is_count(value, 1, math.inf), "a whole number from 1 on"),
        "max_completion_tokens": (lambda value: _is_count(value, 1, math.inf), "a whole number from 1 on"),
        "temperature": (lambda value: _is_number(value, 0, 2), "a number from 0 to 2"),
        "top_p": (lambda value: _is_number(value, 1e-6, 1), "a number above 0, at most 1"),
        "frequency_penalty": (
            lambda value: _is_number(value, -0.99, 2),
            "a number above -1, at most 2: one more than it is the repetition penalty",
        ),
        "seed": (lambda value: _is_count(value, 0, _SEED_LIMIT - 1), "a whole number from 0 to 2**63 - 1"),
        "stop": (_is_stop, "a text, or at most 16 of them, each of 1 to 200 characters"),
        "logit_bias": (
            lambda value: _is_bias(value, vocabulary),
            f"an object of token ids below {vocabulary} with numbers from -100 to 100",
        ),
        "chat_template_kwargs": (
            lambda value: (
                isinstance(value, dict)
                and all(name == "enable_thinking" and isinstance(on, bool) for name, on in value.items())
            ),
            "{'enable_thinking': true} or false",
        ),
        "generation_config": (
            _is_generation_config,
            f"the JSON text of an object with no more than {', '.join(_GENERATION)}, each within its bounds",
        ),
        "n": (lambda value: value == 1 and not isinstance(value, bool), "1: one answer is made"),
        "logprobs": (lambda value: value is False, "false: no probabilities are returned"),
        "top_logprobs": (lambda value: value == 0 and not isinstance(value, bool), "0: no probabilities are returned"),
        "presence_penalty": (lambda value: value == 0 and not isinstance(value, bool), "0: there is none"),
        "response_format": (lambda value: value == {"type": "text"}, "{'type': 'text'}"),
        "modalities": (lambda value: value == ["text"], "['text']"),
        "tools": (lambda value: value == [], "left out: this model calls no tools"),
        "tool_choice": (lambda value: value in ("none", "auto"), "left out: this model calls no tools"),
    }
    for name in ("functions", "function_call", "audio", "prediction", "web_search_options"):
        rules[name] = (lambda value: False, "left out: it is not supported")
    for name, (holds, rule) in rules.items():
        if body.get(name) is not None and not holds(body[name]):
            raise Refused(f"{name} is {_shown(body[name])}; it must be {rule}")


# What `transformers chat` sends of a generation configuration; the rest would be another way to hold up the server.
_GENERATION: dict[str, Callable[[Any], bool]] = {
    "max_new_tokens": lambda value: _is_count(value, 1, math.inf),
    "do_sample": lambda value: isinstance(value, bool),
    "temperature": lambda value: _is_number(value, 1e-3, 2),
    "top_p": lambda value: _is_number(value, 1e-6, 1),
    "top_k": lambda value: _is_count(value, 0, 1_000_000),
    "repetition_penalty": lambda value: _is_number(value, 0.01, 3),
    "eos_token_id": lambda value: _is_count(value, 0, 10_000_000),
    "pad_token_id": lambda value: _is_count(value, 0, 10_000_000),
    "transformers_version": lambda value: isinstance(value, str),
}


def _is_generation_config(value: Any) -> bool:
    if not isinstance(value, str):
        return False
    try:
        given = json.loads(value)
    except (ValueError, RecursionError):
        return False
    return isinstance(given, dict) and all(
        name in _GENERATION and (setting is None or _GENERATION[name](setting)) for name, setting in given.items()
    )


def _is_stop(value: Any) -> bool:
    texts = [value] if isinstance(value, str) else value
    return (
        isinstance(texts, list)
        and 1 <= len(texts) <= 16
        and all(isinstance(text, str) and 1 <= len(text) <= 200 for text in texts)
    )


def _is_bias(value: Any, vocabulary: int) -> bool:
    return isinstance(value, dict) and all(
        len(token) < 10
        and token.isascii()
        and token.isdigit()
        and int(token) < vocabulary
        and _is_number(bias, -100, 100)
        for token, bias in value.items()
    )


class Guard:
    """ASGI middleware that passes on what `check` lets through.

    Args:
        app: the server.
        check: makes the body to pass on from the one that came.
    """

    def __init__(self, app: Callable, check: Callable[[bytes], dict[str, Any]]):
        self.app, self.check = app, check
        self._free = asyncio.Semaphore(AT_ONCE)

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answer one connection."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        try:
            if scope["path"] not in PATHS:
                raise Refused(f"there is no {scope['path']}: this server offers {', '.join(PATHS)}", status=404)
            if scope["path"] == CHAT and scope["method"] == "POST":
                content = await _read(receive)
                async with self._free:
                    body = await asyncio.to_thread(self.check, content)
                scope, receive = _with_body(scope, receive, json.dumps(body).encode())
        except Refused as refused:
            await _refuse(send, refused)
            return
        await self.app(scope, receive, send)


async def _read(receive: Receive) -> bytes:
    content = bytearray()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise Refused("the client has gone")
        content += message.get("body", b"")
        if len(content) > MAX_BODY_BYTES:
            raise Refused(f"the body is larger than {MAX_BODY_BYTES >> 20} MiB: send smaller pictures", status=413)
        if not message.get("more_body"):
            return bytes(content)


def _with_body(scope: Message, receive: Receive, content: bytes) -> tuple[Message, Receive]:
    """Return a request with another body; what comes after it (the client leaving) is as before."""
    given = [{"type": "http.request", "body": content, "more_body": False}]

    async def receive_given() -> Message:
        return given.pop() if given else await receive()

    kept = [(name, value) for name, value in scope["headers"] if name not in (b"content-length", b"content-type")]
    new = [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode())]
    return {**scope, "headers": [*kept, *new]}, receive_given


async def _refuse(send: Send, refused: Refused) -> None:
    """Answer as OpenAI's clients expect it."""
    kind = "not_found_error" if refused.status == 404 else "invalid_request_error"
    error = {"message": str(refused), "type": kind, "param": None, "code": None}
    content = json.dumps({"error": error}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode())]
    if refused.status == 413:
        headers.append((b"connection", b"close"))  # the rest of the body is not read
    await send({"type": "http.response.start", "status": refused.status, "headers": headers})
    await send({"type": "http.response.body", "body": content})
