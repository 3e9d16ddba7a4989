"""
A chat-completions server that does sums, slowly or badly: what the teachers' tests and the throughput benchmark ask.

    python tests/chat_server.py --latency 0.2 --slots 64

It prints its port, answers `POST /v1/chat/completions` after `--latency` seconds, at most `--slots` at a time (the rest
wait in line), and with probability `--faults` it fails in one of `FAULTS` ways instead. `GET /counts` tells what it did.
"""

import argparse
import asyncio
import base64
import json
import random
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

FAULTS = ("500", "429", "hang", "cut", "garbage", "empty")


class Server:
    """One server; `counts` has the number of requests, of each fault, and the longest line of requests served at once."""

    def __init__(self, latency: float = 0.0, slots: int = 1000, faults: float = 0.0, seed: int = 0, key: str = ""):
        self.latency, self.faults, self.key = latency, faults, key
        self.slots = asyncio.Semaphore(slots)
        self.random = random.Random(seed)
        self.counts = dict.fromkeys(("requests", "answered", "serving", "peak", *FAULTS), 0)
        self.first = self.last = 0.0
        self.seen: list[dict] = []
        self.keep_bodies = False

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                length = re.search(rb"content-length: *(\d+)", head, re.IGNORECASE)
                body = await reader.readexactly(int(length.group(1)) if length else 0)
                if not await self.respond(head, body, writer):
                    break
        except (asyncio.IncompleteReadError, asyncio.CancelledError, ConnectionError):
            pass
        finally:
            writer.close()

    async def respond(self, head: bytes, body: bytes, writer: asyncio.StreamWriter) -> bool:
        """Answer one request; return whether the connection lives on."""
        if head.startswith(b"GET"):
            self._send(writer, 200, {**self.counts, "seconds": self.last - self.first})
            return True
        self.counts["requests"] += 1
        self.first = self.first or time.perf_counter()
        if self.key and f"authorization: bearer {self.key}".encode().lower() not in head.lower():
            sent = re.search(rb"authorization: *bearer *(\S+)", head, re.IGNORECASE)
            told = sent.group(1).decode() if sent else "none"
            self._send(writer, 401, {"error": {"message": f"Incorrect API key provided: {told}"}})
            return True
        async with self.slots:
            self.counts["serving"] += 1
            self.counts["peak"] = max(self.counts["peak"], self.counts["serving"])
            await asyncio.sleep(self.latency)
            self.counts["serving"] -= 1
        fault = self.random.choice(FAULTS) if self.random.random() < self.faults else None
        if fault:
            self.counts[fault] += 1
            return await self._fail(fault, writer)
        self.counts["answered"] += 1
        self._send(writer, 200, _completion(self._answer(body)))
        self.last = time.perf_counter()
        return True

    def _answer(self, body: bytes) -> str:
        if self.keep_bodies:
            self.seen.append(json.loads(body))
        asked = re.search(rb"How much is (\d+) \+ (\d+)", body)
        a, b = (int(number) for number in asked.groups()) if asked else (0, 0)
        return f"<think>The picture asks for {a} + {b}. {a} + {b} = {a + b}.</think><answer>{a + b}</answer>"

    async def _fail(self, fault: str, writer: asyncio.StreamWriter) -> bool:
        if fault == "hang":
            await asyncio.sleep(3600)
        elif fault == "cut":
            whole = json.dumps(_completion("<think>I was about to")).encode()
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n")
            writer.write(b"content-length: %d\r\n\r\n" % len(whole) + whole[: len(whole) // 2])
            await writer.drain()
            return False
        elif fault == "garbage":
            self._send(writer, 200, None, raw=b"<html>\xff\xfe gateway says hello")
        elif fault == "empty":
            self._send(writer, 200, _completion(""))
        else:
            self._send(writer, int(fault), {"error": {"message": "try again"}}, "retry-after: 0\r\n")
        return True

    @staticmethod
    def _send(
        writer: asyncio.StreamWriter, status: int, content: dict | None, extra: str = "", raw: bytes = b""
    ) -> None:
        body = raw or json.dumps(content).encode()
        writer.write(
            f"HTTP/1.1 {status} X\r\ncontent-type: application/json\r\n{extra}content-length: {len(body)}\r\n\r\n".encode()
            + body
        )


@contextmanager
def serving(server: Server | None = None, **options) -> Iterator[tuple[Server, str]]:
    """Run a server, by default one that is made with the options, in a thread; yields it and its base URL."""
    loop, started, address = asyncio.new_event_loop(), threading.Event(), []
    server = server or Server(**options)

    async def start() -> None:
        listening = await asyncio.start_server(server.serve, "127.0.0.1", 0, limit=1 << 26, backlog=1024)
        address.append(listening.sockets[0].getsockname()[1])
        started.set()

    def run() -> None:
        loop.run_until_complete(start())
        loop.run_forever()
        for task in asyncio.all_tasks(loop):
            task.cancel()
        loop.run_until_complete(asyncio.sleep(0))
        loop.close()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    started.wait()
    try:
        yield server, f"http://127.0.0.1:{address[0]}/v1"
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()


def _completion(text: str) -> dict:
    return {
        "id": "1",
        "object": "chat.completion",
        "created": 0,
        "model": "adder",
        "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}],
        "usage": {"prompt_tokens": 10, "completion_tokens": len(text.split()), "total_tokens": 10 + len(text.split())},
    }


def sent_picture(body: dict) -> bytes:
    """Return the bytes of the first picture of a recorded request."""
    parts = body["messages"][0]["content"]
    url = next(part["image_url"]["url"] for part in parts if part["type"] == "image_url")
    return base64.b64decode(url.partition("base64,")[2])


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--latency", type=float, default=0.2)
    parser.add_argument("--slots", type=int, default=64)
    parser.add_argument("--faults", type=float, default=0.0)
    parser.add_argument("--port", type=int, default=0)
    options = parser.parse_args()
    server = Server(options.latency, options.slots, options.faults)
    listening = await asyncio.start_server(server.serve, "127.0.0.1", options.port, limit=1 << 26, backlog=1024)
    print(listening.sockets[0].getsockname()[1], flush=True)  # noqa: T201
    await listening.serve_forever()


if __name__ == "__main__":
    asyncio.run(main())
