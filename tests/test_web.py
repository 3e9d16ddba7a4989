"""The page with no server, in a headless browser: its answers are PyTorch's, and nothing is asked of another machine.

Needs requirements-export.txt, requirements-app.txt, `npm ci --ignore-scripts` in web/, Node and Chromium.
"""

import json
import os
import re
import shutil
import subprocess

import numpy as np
import pytest
from conftest import REPO_ROOT
from exported import NEEDED, need, shipped, shipped_onnx
from PIL import Image

need("onnx", "onnxscript", "onnxruntime", "playwright")
if not NEEDED and (shutil.which("node") is None or not (REPO_ROOT / "web" / "node_modules").exists()):
    pytest.skip("node is not installed, or `npm ci --ignore-scripts` has not been run in web/", allow_module_level=True)

from playwright.sync_api import Error, Page, expect, sync_playwright  # noqa: E402

import export_web as script  # noqa: E402
from benchmarks.engines import ask_page, served  # noqa: E402
from siq_vl.export import web_page  # noqa: E402
from siq_vl.export.web_page import build_page  # noqa: E402
from siq_vl.page.parts import take_apart  # noqa: E402

N_QUESTIONS = 20
HOSTILE = "What color is the <img src=x onerror=\"document.title='owned'\"> {{value}} ${1 + 1}?"
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def ours():
    return shipped(N_QUESTIONS)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    return shipped_onnx(tmp_path_factory.mktemp("onnx") / "siq-vl")


@pytest.fixture(scope="module")
def folder(ours, exported, tmp_path_factory):
    folder = tmp_path_factory.mktemp("web")
    build_page(ours.model.config, ours.processor, exported, folder, "fp32", 160)
    return folder


@pytest.fixture(scope="module")
def address(folder):
    with served(folder) as address:
        yield address


@pytest.fixture(scope="module")
def pictures(ours, tmp_path_factory):
    return ours.write(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        chromium = os.environ.get("SIQ_VL_CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
        try:
            browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        except Error as error:
            if NEEDED:
                raise
            pytest.skip(f"no browser: apt-get install chromium, or playwright install chromium ({error!s:.80})")
        yield browser
        browser.close()


@pytest.fixture
def visit(browser, address):
    """Opens the page as a user of their own; whatever is asked of another machine is noted, and so are its errors."""
    contexts, strangers, errors = [], [], []

    def refuse(route):
        strangers.append(route.request.url)
        route.abort()

    def open_page(**options) -> Page:
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **options})
        contexts.append(context)
        context.route(re.compile(r"^(?!http://127\.0\.0\.1|data:|blob:)"), refuse)
        page = context.new_page()
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(address)
        page.locator("#card[data-state=idle]").wait_for(timeout=60_000)
        expect(page.locator("#picture")).to_have_attribute("src", re.compile("^blob:"), timeout=30_000)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not strangers and not errors


def keep(page: Page, name: str) -> None:
    folder = REPO_ROOT / "outputs" / "page"
    folder.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=folder / f"web-{name}.png", full_page=True)


def test_answers_are_pytorchs_and_it_works_offline(visit, ours, pictures):
    page = visit()
    page.context.set_offline(True)
    outputs = []
    for item, picture in zip(ours.items, pictures, strict=True):
        outputs.append(ask_page(page, picture, item.question))
    assert outputs == ours.outputs
    page.locator(".example").nth(2).click()  # without a network, too
    expect(page.locator("#question")).to_have_value(re.compile("ham"))
    page.locator("#ask").click()
    expect(page.locator(".siq-question")).to_contain_text("ham")
    page.locator("#card[data-state=done]").wait_for()


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("desktop", {}),
        ("phone", {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True}),
        ("dark", {"color_scheme": "dark"}),
    ],
)
def test_reasoning_answer_and_where_it_looked(visit, ours, pictures, name, options):
    page = visit(**options)
    output = ask_page(page, pictures[1], ours.items[1].question)
    pieces = take_apart(output)
    expect(page.locator(".siq-answer p")).to_have_text(pieces.answer.text)
    assert page.locator(".siq-reasoning li").count() == len(pieces.steps) >= 2
    expect(page.locator(".siq-seen canvas")).to_be_visible()
    expect(page.locator(".siq-seen figcaption")).to_have_text(re.compile(r"^\d+% of the attention was on the picture$"))
    heat = "document.querySelector('.siq-seen canvas').toDataURL()"
    before = page.evaluate(heat)
    words = page.locator(".siq-reasoning .siq-look").first
    words.tap() if options.get("has_touch") else words.hover()
    assert page.evaluate(heat) != before
    picture, veil = page.locator(".siq-seen img").bounding_box(), page.locator(".siq-seen canvas").bounding_box()
    assert all(abs(picture[side] - veil[side]) < 1 for side in picture), (picture, veil)
    assert page.evaluate("document.documentElement.scrollWidth") <= page.viewport_size["width"]
    keep(page, name)


def test_by_keyboard_alone(visit):
    page = visit()
    page.locator("#question").focus()
    page.keyboard.press("Control+A")
    page.keyboard.type("Is there a boat?")
    page.keyboard.press("Enter")
    page.locator("#card[data-state=done]").wait_for()
    expect(page.locator(".siq-question")).to_have_text("Is there a boat?")
    expect(page.locator(".siq-answer p")).not_to_be_empty()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "thinking"
    page.keyboard.press("Space")
    page.locator("#question").press("Enter")
    expect(page.locator(".siq-reasoning")).to_be_hidden()
    page.locator("#card[data-state=done]").wait_for()
    assert "</think>" not in page.locator("#card").get_attribute("data-output")


def test_a_bad_file_is_refused_kindly_and_the_page_goes_on(visit, ours, pictures, tmp_path):
    page = visit()
    bad = tmp_path / "<b>no.png"
    bad.write_text("no picture at all")
    page.locator("#file").set_input_files(bad)
    expect(page.locator("#message")).to_have_text(
        f"{bad.name} is not a picture that can be read: take a PNG, JPEG or WebP."
    )
    page.locator("#ask").click()
    expect(page.locator("#message")).to_contain_text("There is no picture yet")
    page.locator("#file").set_input_files(pictures[0])
    expect(page.locator("#picture")).to_have_attribute("src", re.compile("^blob:"))
    page.locator("#question").fill(ours.items[0].question)
    page.locator("#ask").click()
    page.locator("#card[data-state=done]").wait_for()
    assert page.locator("#card").get_attribute("data-output") == ours.outputs[0]
    page.locator("#question").fill("  ")
    page.locator("#ask").click()
    expect(page.locator("#message")).to_contain_text("The question is empty")
    page.locator("#question").fill("why? " * 900)
    page.locator("#ask").click()
    expect(page.locator("#message")).to_contain_text("shorten the question")


def test_html_in_a_question_is_shown_as_text(visit):
    page = visit()
    page.locator("#question").fill(HOSTILE)
    page.locator("#ask").click()
    page.locator("#card[data-state=done]").wait_for()
    assert page.locator(".siq-question").inner_text() == HOSTILE and page.locator(".siq-question *").count() == 0
    assert page.title() == "SiQ-VL"


def test_reasoning_is_bounded_and_stopped(visit):
    page = visit()
    page.locator("#longest").fill("5")
    page.locator("#ask").click()
    page.locator("#card[data-state=done]").wait_for()
    output = page.locator("#card").get_attribute("data-output")
    assert "</think><answer>" in output and len(output.partition("</think>")[0].split()) <= 6
    # Asked and stopped at once: whatever comes afterwards changes nothing.
    page.evaluate("document.querySelector('#ask').click(); document.querySelector('#stop').click()")
    expect(page.locator("#card")).to_have_attribute("data-state", "stopped")
    page.wait_for_timeout(300)
    expect(page.locator("#card")).to_have_attribute("data-state", "stopped")
    page.locator("#ask").click()
    page.locator("#card[data-state=done]").wait_for()


def in_node(script: str, *arguments: str) -> str:
    command = ["node", "--input-type=module", "-e", script, *arguments]
    return subprocess.run(command, cwd=REPO_ROOT / "web", check=True, capture_output=True, text=True).stdout


def test_pictures_are_resized_as_pillow_does(tmp_path):
    sizes = [(7, 5), (96, 96), (33, 200), (250, 61), (1, 1)]
    filters = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
    expected, task = [], []
    for place, (width, height) in enumerate(sizes):
        pixels = np.random.default_rng(place).integers(0, 256, (height, width, 3), dtype=np.uint8)
        for name, resample in filters.items():
            expected.append(np.asarray(Image.fromarray(pixels).resize((48, 40), resample)).ravel().tolist())
            task.append([pixels.ravel().tolist(), width, height, 48, 40, name])
    (tmp_path / "task.json").write_text(json.dumps(task))
    script = """
        import { readFileSync } from "node:fs";
        import { resize } from "./picture.js";
        const task = JSON.parse(readFileSync(process.argv[1]));
        console.log(JSON.stringify(task.map((one) => Array.from(resize(...one)))));
    """
    assert json.loads(in_node(script, str(tmp_path / "task.json"))) == expected


@pytest.mark.parametrize(
    "text",
    [
        "<think> a: b, c. d\ne 3. f</think><answer> 7</answer>",
        "<think>1. one. 2. two",
        "<think>a</think><ans",
        "plain",
        "",
        "<think></think><answer>yes</answer>",
    ],
)
def test_outputs_are_taken_apart_as_in_python(text):
    script = 'import { takeApart } from "./parts.js"; console.log(JSON.stringify(takeApart(process.argv[1])));'
    found, pieces = json.loads(in_node(script, text)), take_apart(text)
    steps = [[{"text": part.text, "start": part.start, "end": part.end} for part in step] for step in pieces.steps]
    assert found["steps"] == steps
    assert (found["answer"] or {}).get("text") == (pieces.answer and pieces.answer.text)


def test_script(exported, tmp_path, monkeypatch, capsys):
    options = ["--exported", str(exported), "--kind", "int8", "--max_new_tokens", "32"]
    monkeypatch.setattr("sys.argv", ["export_web.py", str(REPO_ROOT), str(tmp_path), *options])
    script.main()
    assert "python -m http.server" in capsys.readouterr().out
    int8 = exported / "onnx" / "vision_encoder_int8.onnx"
    assert (tmp_path / "model" / "vision_encoder.onnx").read_bytes() == int8.read_bytes()
    assert json.loads((tmp_path / "model" / "settings.json").read_text(encoding="utf-8"))["max_new_tokens"] == 32


def test_refuses(ours, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(ours.processor.image_processor, "resample", Image.Resampling.LANCZOS)
    with pytest.raises(ValueError, match="the page resizes by bilinear, bicubic alone"):
        build_page(ours.model.config, ours.processor, folder / "nothing", tmp_path, "fp32", 160)
    monkeypatch.setattr(web_page, "_MODULES", tmp_path / "no modules")
    with pytest.raises(ValueError, match="run `npm ci --ignore-scripts` in web/ first"):
        build_page(ours.model.config, ours.processor, folder, tmp_path, "fp32", 160)
