"""
The same held-out questions in every engine that a checkpoint is exported to: how many answers are the same, and how fast.

    python benchmarks/engines.py --count 100 --engines onnxruntime node chromium llama.cpp

Each engine reads what its own export wrote (export_onnx.py, export_gguf.py), with its own tokenizer and chat template where
it has them. "Same text" counts greedy outputs, reasoning included, that are PyTorch's to the letter; "same answer" those whose
final answer is; "right" those that are right. Speeds are tokens per second of processor time, one thread, the reading of
picture and question included; Chromium's is by the clock. Needs requirements-export.txt; `node` and `chromium` need
`npm ci --ignore-scripts` in web/ as well, and `chromium` playwright and a browser.
"""

import argparse
import base64
import copy
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import torch

REPO_ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO_ROOT))

from siq_vl.evaluation.generation import rendered  # noqa: E402
from siq_vl.evaluation.held_out import held_out_items  # noqa: E402
from siq_vl.evaluation.items import Item  # noqa: E402
from siq_vl.evaluation.tables import markdown  # noqa: E402
from siq_vl.loading import load_checkpoint  # noqa: E402
from siq_vl.modeling_siq_vl import SiQVLForConditionalGeneration  # noqa: E402
from siq_vl.parsing.answers import matches, parse  # noqa: E402
from siq_vl.processing_siq_vl import SiQVLProcessor  # noqa: E402
from siq_vl.results import checksum_of_weights, write_results  # noqa: E402

MAX_NEW_TOKENS = 160


@dataclass(frozen=True)
class Answer:
    """What an engine said; `tokens` counts those that it generated, `seconds` what they and the prompt took."""

    text: str
    tokens: int
    seconds: float


@dataclass(frozen=True)
class Asked:
    """What engines are asked with: the checkpoint, its questions, and the folder that exports and answers go to."""

    model: SiQVLForConditionalGeneration
    processor: SiQVLProcessor
    items: Sequence[Item]
    folder: Path

    def questions(self) -> Path:
        """Write the pictures and questions as files, and return the list of them."""
        entries = []
        for place, item in enumerate(self.items):
            item.image.save(self.folder / f"{place}.png")
            entries.append({"image": f"{place}.png", "question": item.question})
        path = self.folder / "questions.json"
        path.write_text(json.dumps(entries), encoding="utf-8")
        return path


def in_torch(asked: Asked) -> list[Answer]:
    """Return the answers of the checkpoint itself, one question at a time, as engines are asked."""
    answers = []
    for item in asked.items:
        inputs = _inputs(asked, item)
        begin = time.process_time()
        with torch.inference_mode():
            output = asked.model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
        seconds = time.process_time() - begin
        tokens = output[:, inputs["input_ids"].shape[1] :]
        answers.append(
            Answer(asked.processor.batch_decode(tokens, skip_special_tokens=True)[0], tokens.shape[1], seconds)
        )
    return answers


def in_onnxruntime(asked: Asked, kind: str) -> list[Answer]:
    """Return the answers of onnxruntime in Python."""
    from siq_vl.export.onnx_model import OnnxModel

    model = OnnxModel(asked.folder / "onnx", kind, threads=1)
    answers = []
    for item in asked.items:
        inputs = _inputs(asked, item)
        begin = time.process_time()
        tokens = list(model.generate(inputs["input_ids"].numpy(), inputs["pixel_values"].numpy(), MAX_NEW_TOKENS))
        seconds = time.process_time() - begin
        answers.append(Answer(asked.processor.decode(tokens, skip_special_tokens=True), len(tokens), seconds))
    return answers


def in_node(asked: Asked, kind: str) -> list[Answer]:
    """Return the answers of transformers.js in Node, which prepares text and pictures itself."""
    made = asked.folder / "node.json"
    script = str(REPO_ROOT / "web" / "answer.mjs")
    files = [str(asked.folder / "onnx"), str(asked.questions()), str(made)]
    subprocess.run(["node", script, *files, kind, str(MAX_NEW_TOKENS)], check=True)
    entries = json.loads(made.read_text(encoding="utf-8"))
    return [Answer(entry["text"], len(entry["tokens"]), entry["seconds"]) for entry in entries]


def in_chromium(asked: Asked, kind: str) -> list[Answer]:
    """Return the answers of the page with no server, in a headless browser; pictures and questions go in as a user's do."""
    from playwright.sync_api import sync_playwright

    from siq_vl.export.web_page import build_page

    folder = asked.folder / "web"
    build_page(asked.model.config, asked.processor, asked.folder / "onnx", folder, kind, MAX_NEW_TOKENS)
    asked.questions()
    answers = []
    with served(folder) as address, sync_playwright() as playwright:
        chromium = shutil.which("chromium") or shutil.which("chromium-browser")
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page()
        page.goto(address)
        page.locator("#card[data-state=idle]").wait_for(timeout=120_000)
        for place, item in enumerate(asked.items):
            begin = time.perf_counter()
            text = ask_page(page, asked.folder / f"{place}.png", item.question)
            seconds = time.perf_counter() - begin
            tokens = len(asked.processor.tokenizer(text)["input_ids"])
            answers.append(Answer(text, tokens, seconds))
        browser.close()
    return answers


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """Serve a folder on this machine, as any static server does; yields the address."""
    handler = partial(_SilentHandler, directory=str(folder))
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _SilentHandler(SimpleHTTPRequestHandler):
    def log_message(self, *arguments: object) -> None:
        pass


def ask_page(page, picture: Path, question: str, timeout: int = 60_000) -> str:
    """Put a picture into the page, ask, and return all that the model wrote."""
    before = page.locator("#picture").get_attribute("src")
    page.locator("#file").set_input_files(picture)
    page.wait_for_function("before => document.querySelector('#picture').src !== before", arg=before, timeout=timeout)
    page.locator("#question").fill(question)
    page.locator("#ask").click()
    page.locator("#card[data-state=done]").wait_for(timeout=timeout)
    return page.locator("#card").get_attribute("data-output")


def in_llama_cpp(asked: Asked, kind: str) -> list[Answer]:
    """Return the answers of llama.cpp's own server, which prepares text and pictures itself."""
    asked.questions()
    with_pictures = "f32" if kind == "f32" else "f16"
    server = llama_server(asked.folder / "gguf", kind, with_pictures, asked.processor.image_seq_length)
    answers = []
    for place, item in enumerate(asked.items):
        begin = time.process_time()
        choice = ask_llama(server, asked.folder / f"{place}.png", item.question)
        seconds = time.process_time() - begin
        tokens = [entry["id"] for entry in choice["logprobs"]["content"]]
        answers.append(Answer(asked.processor.decode(tokens, skip_special_tokens=True), len(tokens), seconds))
    return answers


def llama_server(folder: Path, kind: str, with_pictures: str, tokens_per_image: int):
    """Return llama.cpp's server with an exported model, one thread."""
    import xllamacpp

    options = xllamacpp.CommonParams()
    options.model.path = str(folder / f"model-{kind}.gguf")
    options.mmproj.path = str(folder / f"mmproj-{with_pictures}.gguf")
    options.image_min_tokens = options.image_max_tokens = tokens_per_image
    options.cpuparams.n_threads = options.cpuparams_batch.n_threads = 1
    options.n_ctx, options.n_parallel, options.verbosity = 1024, 1, 0
    options.use_jinja, options.warmup, options.ui = True, False, False
    return xllamacpp.Server(options)


def ask_llama(server, picture: Path, question: str, **options) -> dict:
    """Return what llama.cpp's chat API answers, greedily, with the ids and probabilities of the tokens."""
    address = "data:image/png;base64," + base64.b64encode(picture.read_bytes()).decode()
    content = [{"type": "image_url", "image_url": {"url": address}}, {"type": "text", "text": question}]
    request = {
        "messages": [{"role": "user", "content": content}],
        "max_tokens": MAX_NEW_TOKENS,
        "temperature": 0,
        "reasoning_format": "none",
        "cache_prompt": False,
        "logprobs": True,
        **options,
    }
    return server.handle_chat_completions(request)["choices"][0]


def _inputs(asked: Asked, item: Item) -> dict:
    text = rendered(asked.processor, item.messages, {})
    return asked.processor(images=list(item.images), text=text, return_tensors="pt")


KINDS: dict[str, tuple[Callable[[Asked, str], list[Answer]], tuple[str, ...]]] = {
    "onnxruntime": (in_onnxruntime, ("fp32", "fp16", "int8", "q4")),
    "node": (in_node, ("fp32", "fp16", "int8", "q4")),
    "chromium": (in_chromium, ("fp32", "fp16", "int8", "q4")),
    "llama.cpp": (in_llama_cpp, ("f32", "f16", "q8_0", "q4_k")),
}


def row(
    engine: str, kind: str, answers: Sequence[Answer], reference: Sequence[Answer], asked: Asked, size: str
) -> list:
    """Return the cells of an engine's line."""
    same_text = same_answer = right = 0
    for answer, original, item in zip(answers, reference, asked.items, strict=True):
        final = parse(answer.text).answer
        same_text += answer.text == original.text
        same_answer += final == parse(original.text).answer
        right += final is not None and any(matches(final, gold) for gold in item.golds)
    speed = sum(answer.tokens for answer in answers) / sum(answer.seconds for answer in answers)
    counts = [str(same_text), str(same_answer), str(right), str(len(answers))]
    return [engine, kind, size, *counts, f"{speed:.0f}"]


def size_of(asked: Asked, engine: str, kind: str) -> str:
    """Return the size of what an engine reads, in MiB."""
    from siq_vl.export.onnx_sessions import SESSIONS, SUFFIXES

    if engine == "llama.cpp":
        with_pictures = "f32" if kind == "f32" else "f16"
        names = (f"model-{kind}", f"mmproj-{with_pictures}")
        return f"{sum((asked.folder / 'gguf' / f'{name}.gguf').stat().st_size for name in names) / 2**20:.1f}"
    files = [asked.folder / "onnx" / "onnx" / f"{name}{SUFFIXES[kind]}.onnx" for name in SESSIONS]
    return f"{sum(file.stat().st_size for file in files) / 2**20:.1f}"


def export_all(asked: Asked, engines: Sequence[str]) -> None:
    """Export the checkpoint for the engines, where that is not done; a folder of another checkpoint is to be deleted."""
    from siq_vl.export.gguf_files import export_gguf
    from siq_vl.export.onnx_sessions import export_onnx

    if set(engines) - {"llama.cpp"} and not (asked.folder / "onnx").exists():
        model = copy.deepcopy(asked.model)  # its language model's attention is changed by the export
        export_onnx(model, asked.processor, asked.folder / "onnx", attention=True)
    if "llama.cpp" in engines and not (asked.folder / "gguf").exists():
        export_gguf(asked.model, asked.processor, asked.folder / "gguf")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(REPO_ROOT), help="a checkpoint's folder")
    parser.add_argument("--count", type=int, default=100, help="held-out questions")
    parser.add_argument("--engines", nargs="+", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--folder", type=Path, default=REPO_ROOT / "outputs" / "engines", help="for what is exported")
    parser.add_argument("--results", type=Path, metavar="FILE.json", help="keep the table in this file, too")
    options = parser.parse_args()
    torch.set_num_threads(1)
    model, processor = load_checkpoint(options.model)
    items = [item for item in held_out_items(options.count) if item.group == "held out"]
    options.folder.mkdir(parents=True, exist_ok=True)
    asked = Asked(model, processor, items, options.folder)
    reference = in_torch(asked)
    export_all(asked, options.engines)
    weights = sum(weight.nbytes for weight in model.parameters()) / 2**20
    lines = [["engine", "weights", "MiB", "same text", "same answer", "right", "of", "tokens/s"]]
    lines.append(row("PyTorch", "fp32", reference, reference, asked, f"{weights:.1f}"))
    for engine in options.engines:
        answer, kinds = KINDS[engine]
        for kind in kinds:
            lines.append(row(engine, kind, answer(asked, kind), reference, asked, size_of(asked, engine, kind)))
            print(lines[-1], flush=True)
    table = markdown(lines)
    print(table)
    if options.results is not None:
        write_results(options.results, {"engines": table}, {"weights": {"model": checksum_of_weights(options.model)}})


if __name__ == "__main__":
    main()
