"""Servers that answer anything: no run ends, every question has one verdict, and nothing is asked or paid for twice."""

import asyncio
import gzip
import json
import os
import time
from collections.abc import Awaitable, Callable
from email.utils import formatdate
from pathlib import Path

import pytest
from chat_server import Server, serving

from siq_vl.distill.budget import Budget, BudgetLimits
from siq_vl.distill.pipeline import Run
from siq_vl.distill.prompts import Prompts
from siq_vl.distill.questions import TraceQuestion
from siq_vl.distill.schema import FEATURES
from siq_vl.distill.selection import Selection, record_rules, update_verdicts
from siq_vl.distill.teachers import server as teachers_server
from siq_vl.distill.teachers.base import Teacher, TeacherLost
from siq_vl.distill.teachers.server import ServerSettings, ServerTeacher, _seconds
from siq_vl.distill.traces import TraceStore
from siq_vl.distill.verification import Verification
from siq_vl.distill.yields import sealed_traces

RULES = Verification(language="")
GOOD = "<think>The picture asks for 1 + 1. 1 + 1 = 2.</think><answer>2</answer>"
QUESTIONS = [TraceQuestion(f"sum-{number}", "How much is 1 + 1?", ("2",), "number") for number in range(2)]
Act = Callable[[asyncio.StreamWriter], Awaitable[bool]]


class Hostile(Server):
    """Reads each request as it should and answers it with `act`."""

    def __init__(self, act: Act):
        super().__init__()
        self.act = act

    async def respond(self, head: bytes, body: bytes, writer: asyncio.StreamWriter) -> bool:
        self.counts["requests"] += 1
        return await self.act(writer)


# What servers do. Each of these makes an `Act`.


def raw(data: bytes, *, live: bool = False, abort: bool = False) -> Act:
    """Send these bytes; then close, reset or keep the connection."""

    async def act(writer: asyncio.StreamWriter) -> bool:
        writer.write(data)
        await writer.drain()
        if abort:
            writer.transport.abort()
        return live

    return act


def framed(status: str, body: bytes, *headers: str) -> Act:
    lines = [f"HTTP/1.1 {status}", f"content-length: {len(body)}", *headers]
    return raw("\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + body, live=True)


def says(value: object, *headers: str) -> Act:
    """Answer 200 with JSON, or with a text that is said to be JSON."""
    body = value.encode() if isinstance(value, str) else json.dumps(value).encode()
    return framed("200 OK", body, "content-type: application/json", *headers)


def completion(**changes) -> dict:
    """A good reply, some of it replaced; a change to `...` takes the field out."""
    reply = {"id": "1", "object": "chat.completion", "model": "m", "choices": [choice()], "usage": usage()}
    return {name: value for name, value in {**reply, **changes}.items() if value is not ...}


def choice(message: object = None, **changes) -> dict:
    message = {"role": "assistant", "content": GOOD} if message is None else message
    made = {"index": 0, "finish_reason": "stop", "message": message, **changes}
    return {name: value for name, value in made.items() if value is not ...}


def usage(read: object = 10, written: object = 5) -> dict:
    return {"prompt_tokens": read, "completion_tokens": written}


def message(content: object, **more) -> dict:
    return completion(choices=[choice({"role": "assistant", "content": content, **more})])


def nested(depth: int = 100_000) -> str:
    return "[" * depth + "]" * depth


def drips(first: bytes, drop: bytes, every: float) -> Act:
    async def act(writer: asyncio.StreamWriter) -> bool:
        writer.write(first)
        while True:
            await writer.drain()
            await asyncio.sleep(every)
            writer.write(drop)

    return act


def silent() -> Act:
    async def act(writer: asyncio.StreamWriter) -> bool:
        await asyncio.sleep(3600)
        return False

    return act


def large(head: bytes, piece: bytes, count: int) -> Act:
    async def act(writer: asyncio.StreamWriter) -> bool:
        writer.write(head)
        for _ in range(count):
            writer.write(piece)
            await writer.drain()
        return False

    return act


HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n"
CHUNKED = HEAD + b"transfer-encoding: chunked\r\n\r\n"
WHOLE = json.dumps(completion()).encode()
SIZED = HEAD + b"content-length: %d\r\n\r\n" % len(WHOLE)
MEGABYTE = b" " * (1 << 20)

# Replies whose words can be read: they are taken, once, whatever stands around them.
READ: dict[str, Act] = {
    "a good reply": says(completion()),
    "no id, object or model": says(completion(id=..., object=..., model=...)),
    "an id of another kind": says(completion(id={"a": [1]}, object=7, model=None)),
    "no usage": says(completion(usage=...)),
    "usage is null": says(completion(usage=None)),
    "usage is a list": says(completion(usage=[1, 2])),
    "usage is a text": says(completion(usage="many")),
    "tokens as texts": says(completion(usage=usage("10", "5"))),
    "tokens as words": says(completion(usage=usage("ten", "five"))),
    "tokens are null": says(completion(usage=usage(None, None))),
    "tokens of 2 ** 63": says(completion(usage=usage(2**63, 5))),
    "tokens of 2 ** 63 - 1": says(completion(usage=usage(2**63 - 1, 2**63 - 1))),
    "tokens of 10 ** 4000": says(completion(usage=usage(10**4000, 5))),
    "tokens of 10 ** 6000": says(json.dumps(completion()).replace(" 10,", " 1" + "0" * 6000 + ",")),
    "negative tokens": says(completion(usage=usage(-1, -(2**63) - 1))),
    "tokens are NaN": says(completion(usage=usage(float("nan"), float("nan")))),
    "tokens are infinite": says(completion(usage=usage(float("inf"), float("-inf")))),
    "tokens of 1e308": says(completion(usage=usage(1e308, 1e-308))),
    "tokens are true": says(completion(usage=usage(True, False))),
    "tokens are objects": says(completion(usage=usage({"a": 1}, [[[]]]))),
    "no finish reason": says(completion(choices=[choice(finish_reason=...)])),
    "an unknown finish reason": says(completion(choices=[choice(finish_reason="because")])),
    "a finish reason of half a character": says(completion(choices=[choice(finish_reason="\ud800")])),
    "a finish reason of a megabyte": says(completion(choices=[choice(finish_reason="x" * (1 << 20))])),
    "a finish reason that is an object": says(completion(choices=[choice(finish_reason={"a": 1})])),
    "several choices": says(completion(choices=[choice(), choice({"content": "another"}), choice({})])),
    "an index of another kind": says(completion(choices=[choice(index="first")])),
    "content in parts": says(message([{"type": "text", "text": GOOD[:20]}, {"type": "text", "text": GOOD[20:]}])),
    "thinking in parts": says(
        message([{"type": "thinking", "thinking": [{"text": "1 + 1 = 2."}]}, {"text": "<answer>2</answer>"}])
    ),
    "parts of many kinds": says(message([None, 7, "x", {"text": None}, {"thinking": None}, {"text": GOOD}])),
    "reasoning of another kind": says(message(GOOD, reasoning_content=["a"], reasoning={"b": 1})),
    "a refusal": says(message(None, refusal="I'm sorry, I cannot help with that.")),
    "tool calls beside the text": says(message(GOOD, tool_calls=[{"function": {"arguments": nested(50)}}])),
    "half a character in the text": says(message(GOOD + "\ud800 \udfff")),
    "NUL in the text": says(message("\0" + GOOD + "\0")),
    "control characters in the text": says(message("\x1b[31m\x07\u202e" + GOOD)),
    "special tokens": says(message("<|im_end|>\n<|im_start|>user\n<image><|image_pad|>" + GOOD)),
    "forged tags": says(message("<think>a</think></think><answer>2</answer><answer>3</answer>")),
    "forged tags in the reasoning": says(message("<answer>2</answer>", reasoning="a</think><answer>9</answer>")),
    "a text of a million characters": says(message(f"<think>{'word ' * 200_000}</think><answer>2</answer>")),
    "a text of more than a million characters": says(message("x" * (1 << 20) + GOOD)),
    "a field named twice": says(json.dumps(completion())[:-1] + ', "usage": {"prompt_tokens": 1e999}}'),
    "another content type": framed("200 OK", WHOLE, "content-type: image/png"),
    "no content type": framed("200 OK", WHOLE),
    "an unknown charset": framed("200 OK", WHOLE, "content-type: application/json; charset=klingon"),
    "UTF-16": framed("200 OK", json.dumps(completion()).encode("utf-16"), "content-type: application/json"),
    "gzip": framed("200 OK", gzip.compress(WHOLE), "content-encoding: gzip"),
    "a bad cookie": says(completion(), "set-cookie: a b=\x01\xff; expires=never; max-age=nan"),
    "ten thousand early hints": raw(b"HTTP/1.1 103 Early Hints\r\n\r\n" * 10_000 + SIZED + WHOLE),
    "a body up to the close": raw(HEAD + b"connection: close\r\n\r\n" + WHOLE),
}

# Replies without any words: the question's verdict says so.
UNREAD: dict[str, Act] = {
    "nothing at all": says(""),
    "null": says(None),
    "a number": says(17),
    "a list": says([completion()]),
    "HTML": framed("200 OK", b"<html><body>Hello</body></html>", "content-type: text/html"),
    "bytes": framed("200 OK", bytes(range(256)) * 9),
    "half of the JSON": says(json.dumps(completion())[:-40]),
    "two replies in one": says(json.dumps(completion()) * 2),
    "nested deep": says(nested()),
    "nested deep in a field": says('{"choices": ' + nested() + "}"),
    "objects nested deep": says('{"a":' * 100_000),
    "no choices": says(completion(choices=...)),
    "choices are null": says(completion(choices=None)),
    "choices are empty": says(completion(choices=[])),
    "choices are an object": says(completion(choices={"0": choice()})),
    "a choice is null": says(completion(choices=[None])),
    "a choice is a text": says(completion(choices=[GOOD])),
    "no message": says(completion(choices=[choice(message="text")])),
    "content is null": says(message(None)),
    "content is empty": says(message("")),
    "content is blank": says(message(" \n\t\u2003 ")),
    "content is a number": says(message(7)),
    "content is true": says(message(True)),
    "content is an object": says(message({"text": GOOD})),
    "content is an empty list": says(message([])),
    "content is NaN": says(message(float("nan"))),
    "tool calls alone": says(completion(choices=[choice({"content": None, "tool_calls": [{}]}, finish_reason="tool_calls")])),
    "withheld": says(completion(choices=[choice({"content": ""}, finish_reason="content_filter")])),
    "an error with status 200": says({"error": {"message": "overloaded", "code": 529}}),
    "errors of other kinds": says({"error": [{"message": {"a": 1}}]}),
    "a body of a hundred megabytes": large(HEAD + b"content-length: 104857600\r\n\r\n", MEGABYTE, 100),
    "a body without end": large(CHUNKED, b"100000\r\n" + MEGABYTE + b"\r\n", 10**6),
    "a gzip bomb": framed("200 OK", gzip.compress(MEGABYTE * 64, 1), "content-encoding: gzip"),
    "gzip that is none": framed("200 OK", WHOLE, "content-encoding: gzip"),
    "half of the gzip": framed("200 OK", gzip.compress(os.urandom(4000))[:900], "content-encoding: gzip"),
    "an unknown encoding": framed("200 OK", b"\x00\x01" + WHOLE, "content-encoding: klingon"),
    "chunks of no size": raw(CHUNKED + b"klingon\r\nabc\r\n"),
    "chunks of a negative size": raw(CHUNKED + b"-5\r\nabc\r\n"),
    "a negative length": raw(HEAD + b"content-length: -5\r\n\r\n" + WHOLE),
    "two lengths": raw(HEAD + b"content-length: 5\r\ncontent-length: 7\r\n\r\n" + WHOLE),
    "a length that is too long": raw(HEAD + b"content-length: 99999\r\n\r\n" + WHOLE),
    "a header of a megabyte": says(completion(), "x-long: " + "a" * (1 << 20)),
    "a hundred thousand headers": raw(HEAD + b"x-a: b\r\n" * 100_000 + b"\r\n" + WHOLE),
    "a header that is none": raw(b"HTTP/1.1 200 OK\r\nklingon\r\n\r\n" + WHOLE),
    "another protocol": raw(b"SSH-2.0-OpenSSH_9.6\r\n"),
    "the garbage of TLS": raw(b"\x15\x03\x03\x00\x02\x02\x46"),
    "a close at once": raw(b""),
    "a reset at once": raw(b"", abort=True),
    "a reset in the headers": raw(HEAD[:30], abort=True),
    "a reset in the body": raw(SIZED + WHOLE[:50], abort=True),
    "a close in the body": raw(SIZED + WHOLE[:50]),
    **{
        f"status {status}": framed(f"{status} X", body, "content-type: application/json")
        for status, body in (
            (202, b""), (204, b""), (206, WHOLE), (300, b""), (400, b'{"error": {"message": "bad"}}'), (402, b"null"),
            (405, b"<html>"), (409, b""), (413, b"\xff\xfe"), (418, b"\0" * 999), (422, b"[" * 999), (451, b"{}"),
            (500, b"<html>"), (501, b""), (503, b"busy"), (530, b""), (600, b""), (999, WHOLE),
        )
    },
    "status 101": raw(b"HTTP/1.1 101 Switching Protocols\r\nupgrade: websocket\r\nconnection: upgrade\r\n\r\n"),
    "a status that is none": raw(b"HTTP/1.1 two OK\r\n\r\n"),
    "a redirect to itself": framed("302 Found", b"", "location: /v1/chat/completions"),
    "a redirect to a file": framed("307 Temporary Redirect", b"", "location: file:///etc/hostname"),
    "a redirect to nowhere": framed("308 Permanent Redirect", b""),
    "a redirect that is none": framed("301 Moved", b"", "location: http://[::1:\x01"),
    "an error of gzip that is none": framed("400 Bad", b"hello", "content-encoding: gzip"),
    "an error whose body is cut": raw(b"HTTP/1.1 400 Bad\r\ncontent-length: 500\r\n\r\nhello"),
}  # fmt: skip

# Replies that are not over in time.
LATE: dict[str, Act] = {
    "no reply": silent(),
    "headers without end": drips(b"HTTP/1.1 200 OK\r\n", b"x-a: b\r\n", 0.05),
    "a byte now and then": drips(CHUNKED, b"1\r\n \r\n", 0.05),
    "a byte of a whole body now and then": drips(SIZED, b" ", 0.05),
    "chunks that never end": drips(CHUNKED + b"%x\r\n%s\r\n" % (len(WHOLE), WHOLE), b"", 0.05),
    "early hints without end": drips(b"", b"HTTP/1.1 103 Early Hints\r\n\r\n", 0.01),
}


def teacher_at(url: str | list[str], **settings) -> ServerTeacher:
    settings = {
        "backoff": 0.0,
        "timeout": 20.0,
        "attempts": 2,
        "in_flight": 2,
        "sampling": {"max_tokens": 64},
    } | settings
    sampling = settings.pop("sampling")
    return ServerTeacher("adder", ServerSettings([url] if isinstance(url, str) else url, **settings), sampling=sampling)


def ask(folder: Path, teacher: Teacher, questions=QUESTIONS, **options):
    with TraceStore(folder) as store:
        record_rules(store, RULES)
        progress = Run(teacher, Prompts(), store, RULES, progress=False, **options).over(questions)
        update_verdicts(store, RULES, Selection())
    return progress


def rows_of(folder: Path) -> list[dict]:
    """Every sealed trace, pictures left out; without `datasets`, whose cache costs more than all the rest."""
    return list(sealed_traces(folder, [name for name in FEATURES if name != "images"]))


@pytest.fixture(scope="module")
def sane():
    """A server that answers as it should, and its address."""
    with serving() as (server, url):
        yield server, url


@pytest.fixture(autouse=True)
def no_key(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def survives(folder: Path, act: Act, sane: tuple[Server, str], *, read: bool, **settings) -> list[dict]:
    """Run against a hostile server, then against a sane one; return what the hostile one left."""
    with serving(Hostile(act)) as (hostile, url):
        progress = ask(folder, teacher_at(url, **settings))
    left = rows_of(folder)
    assert progress.ended == "done"
    assert sorted(row["sample_id"] for row in left) == ["sum-0", "sum-1"]
    assert all(bool(row["error"]) != read for row in left), left
    assert all(row["rejected_by"] == ["teacher_error"] for row in left if not read), left
    # What was answered was asked for once, what was not as often as it may be; and the attempts are counted as they were.
    assert sum(row["attempts"] for row in left) == hostile.counts["requests"] <= len(left) * (1 if read else 2)
    # A sane server is asked for what has no answer, and only for that.
    server, url = sane
    before = server.counts["requests"]
    with TraceStore(folder) as store:
        assert store.drop_failed() == (0 if read else 2)
        Run(teacher_at(url), Prompts(), store, RULES, progress=False).over(QUESTIONS)
        update_verdicts(store, RULES, Selection())
        assert len(store.trace_ids()) == 2
    assert server.counts["requests"] - before == (0 if read else 2)
    return left


@pytest.mark.parametrize("kind", READ)
def test_words_that_can_be_read_are_taken_once(kind, tmp_path, sane):
    for row in survives(tmp_path, READ[kind], sane, read=True):
        assert 0 <= row["prompt_tokens"] < 2**31 and 0 <= row["completion_tokens"] < 2**31
        assert len(row["finish_reason"]) <= 40
        assert len(row["output"]) <= 1 << 20
        assert "\ud800" not in row["output"] + row["finish_reason"]


@pytest.mark.parametrize("kind", UNREAD)
def test_a_reply_without_words_is_the_verdict_on_its_question(kind, tmp_path, sane):
    survives(tmp_path, UNREAD[kind], sane, read=False)


@pytest.mark.parametrize("kind", LATE)
def test_a_slow_server_cannot_stretch_the_timeout(kind, tmp_path, sane):
    for row in survives(tmp_path, LATE[kind], sane, read=False, timeout=0.2, attempts=1):
        assert row["error"] == "no answer in 0.2 s"


def test_there_are_many_kinds():
    assert len(READ) + len(UNREAD) + len(LATE) >= 60


def test_a_verdict_is_final_until_told_otherwise(tmp_path, sane):
    server, url = sane
    with serving(Hostile(UNREAD["HTML"])) as (_, hostile):
        assert ask(tmp_path, teacher_at(hostile)).failed == 2
    before = server.counts["requests"]
    assert ask(tmp_path, teacher_at(url)).made == 0
    assert server.counts["requests"] == before


# Waiting, refusals, and giving up


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        ("3", 3.0), ("0.5", 0.5), ("inf", 60.0), ("1e400", 60.0), ("-inf", 0.0),
        ("nan", 0.0), ("-5", 0.0), ("", 0.0), ("soon", 0.0), ("9" * 5000, 60.0), ("Fri, 31 Dec 9999 23:59:59 GMT", 60.0),
        ("Thu, 01 Jan 1970 00:00:00 GMT", 0.0), ("Fri, 31 Dec 9999 23:59:59 -2359", 60.0), ("Fri, 99 Foo 99999 99:99:99 GMT", 0.0),
        ("\ud800", 0.0), ("\u0663", 3.0),
    ],
)  # fmt: skip
def test_a_server_can_ask_for_a_minute_and_no_more(header, seconds):
    assert _seconds(header) == seconds


def test_a_date_is_waited_for():
    assert 20 < _seconds(formatdate(time.time() + 30, usegmt=True)) <= 30


@pytest.mark.parametrize("header", ["inf", "nan", "-1", "Fri, 31 Dec 9999 23:59:59 GMT", "soon"])
def test_waiting_for_a_busy_server_ends(header, tmp_path, sane, monkeypatch):
    monkeypatch.setattr(teachers_server, "_MAX_PAUSE", 0.05)
    act = framed("429 Too Many", b"", f"retry-after: {header}")
    for row in survives(tmp_path, act, sane, read=False):
        assert row["error"] == "status 429"


@pytest.mark.parametrize(
    ("status", "told"), [(401, "refuses the key"), (403, "refuses access"), (404, "knows neither route nor model")]
)
def test_a_server_that_refuses_everyone_is_asked_no_more(status, told, tmp_path, sane):
    act = framed(f"{status} No", b'{"error": {"message": "no"}}')
    questions = [TraceQuestion(f"sum-{number}", "How much is 1 + 1?", ("2",)) for number in range(50)]
    assert ask(tmp_path, teacher_at(sane[1]), questions[:3]).made == 3
    with serving(Hostile(act)) as (hostile, url):
        with pytest.raises(TeacherLost, match=rf"{told} .*\(status {status}\).*what is done is kept"):
            ask(tmp_path, teacher_at(url), questions)
        assert hostile.counts["requests"] <= 4  # as many as are made ready for two at a time
    assert len(rows_of(tmp_path)) == 3  # nothing is recorded, so the same command goes on
    assert ask(tmp_path, teacher_at(sane[1]), questions).made == 47


@pytest.mark.parametrize("status", [401, 403, 404])
@pytest.mark.parametrize("refused", [0, 2, 5])
def test_one_refusal_among_answers_is_a_verdict(status, refused, tmp_path):
    """A proxy that dislikes one question does not end a run, be it the first, in the middle or the last."""
    turn = iter(range(100))

    async def act(writer: asyncio.StreamWriter) -> bool:
        reply = framed(f"{status} No", b"") if next(turn) == refused else says(completion())
        return await reply(writer)

    questions = [TraceQuestion(f"sum-{number}", "How much is 1 + 1?", ("2",)) for number in range(6)]
    with serving(Hostile(act)) as (hostile, url):
        assert ask(tmp_path, teacher_at(url), questions).failed == 1
    assert hostile.counts["requests"] == len(rows_of(tmp_path)) == 6


def test_a_key_that_is_refused_on_the_way_stops_the_run(tmp_path):
    turn = iter(range(1000))

    async def act(writer: asyncio.StreamWriter) -> bool:
        reply = says(completion()) if next(turn) < 20 else framed("401 No", b"")
        return await reply(writer)

    questions = [TraceQuestion(f"sum-{number}", "How much is 1 + 1?", ("2",)) for number in range(200)]
    with serving(Hostile(act)) as (hostile, url), pytest.raises(TeacherLost, match="refuses the key"):
        ask(tmp_path, teacher_at(url), questions)
    assert sum(not row["error"] for row in rows_of(tmp_path)) == 20
    assert hostile.counts["requests"] < 40


def test_a_redirect_carries_nothing_to_another_host(tmp_path, sane, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-0123456789abcdef")
    server, url = sane
    before = server.counts["requests"]
    with serving(Hostile(framed("307 Moved", b"", f"location: {url}/chat/completions"))) as (_, hostile):
        assert ask(tmp_path, teacher_at(hostile)).failed == 2
    assert server.counts["requests"] == before
    assert {row["error"] for row in rows_of(tmp_path)} == {
        "status 307: redirects are not followed, give --base_url the final address"
    }


def test_an_error_that_never_ends_costs_no_timeout(tmp_path, sane, monkeypatch):
    monkeypatch.setattr(teachers_server, "_ERROR_SECONDS", 0.1)
    act = drips(b"HTTP/1.1 400 Bad\r\ncontent-length: 999\r\n\r\n", b"", 0.05)
    for row in survives(tmp_path, act, sane, read=False):
        assert row["error"] == "status 400"


def test_a_server_that_fails_for_long_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr(teachers_server, "_FIRST_PATIENCE", 0.0)
    questions = [TraceQuestion(f"sum-{number}", "How much is 1 + 1?") for number in range(200)]
    told = r"1\d attempts in a row have failed.*the last: status 503"
    with serving(Hostile(framed("503 Busy", b""))) as (hostile, url), pytest.raises(TeacherLost, match=told):
        ask(tmp_path, teacher_at(url), questions)
    assert hostile.counts["requests"] <= 14


class Plain(Server):
    """Speaks first, and no TLS."""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 400 Bad\r\n\r\n")
        writer.close()


def test_a_server_that_speaks_no_tls_is_no_server(tmp_path):
    told = "attempts in a row have failed.*the last: Client.*SSL"
    with serving(Plain()) as (_, url), pytest.raises(TeacherLost, match=told):
        ask(tmp_path, teacher_at(url.replace("http:", "https:")))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"timeout": float("nan")}, "timeout is nan"), ({"timeout": float("inf")}, "timeout is inf"), ({"backoff": -1}, "backoff is -1"),
        ({"backoff": float("inf")}, "backoff is inf"), ({"sampling": {"stream": True}}, "sampling names 'stream'"),
    ],
)  # fmt: skip
def test_settings_that_would_wait_for_ever_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        teacher_at("http://host/v1", **settings)
    with pytest.raises(ValueError, match="Port"):
        teacher_at("http://host:99999/v1")


@pytest.mark.parametrize("kind", ["no usage", "tokens of 2 ** 63", "negative tokens", "tokens are NaN"])
def test_a_server_that_hides_what_it_took_spends_the_budget_all_the_same(kind, tmp_path):
    questions = [TraceQuestion(f"sum-{number}", "How much is 1 + 1?", ("2",)) for number in range(30)]

    def budgeted() -> tuple[Budget, str]:
        budget = Budget(BudgetLimits(4 * (1024 + 64)), max_new_tokens=64)
        with TraceStore(tmp_path) as store:
            budget.carry_over(store.spent("adder"))
        return budget, ask(tmp_path, teacher_at(url), questions, budget=budget).ended

    with serving(Hostile(READ[kind])) as (hostile, url):
        budget, ended = budgeted()
        asked = hostile.counts["requests"]
        assert ended == "budget" and 4 <= asked < 30
        assert budget.spent_in + budget.spent_out <= budget.limits.max_tokens
        again, ended = budgeted()  # and what was hidden is remembered
    assert (ended, hostile.counts["requests"]) == ("budget", asked)
