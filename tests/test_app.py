"""The page in a headless browser: what users do, what they get wrong, and what stays out of the HTML.

Needs requirements-app.txt and Chromium: the system's (`apt-get install chromium`), or Playwright's own (`playwright install
--with-deps chromium`), or another one that `SIQ_VL_CHROMIUM` names. Without them these tests are skipped, and say so;
with `SIQ_VL_NEED_BROWSER=1`, as in CI, they fail.
"""

import json
import os
import re
import shutil
import threading
from pathlib import Path
from urllib.request import Request, urlopen

import pytest
from PIL import Image

from siq_vl.data.figures.dataset import FigureSample, sample
from siq_vl.loading import load_checkpoint

REPO_ROOT = Path(__file__).resolve().parent.parent
NEEDED = os.environ.get("SIQ_VL_NEED_BROWSER") == "1"
if not NEEDED:
    pytest.importorskip("gradio", reason="gradio is not installed: pip install -r requirements-app.txt")
    pytest.importorskip("playwright", reason="playwright is not installed: pip install -r requirements-app.txt")

from playwright.sync_api import Browser, BrowserContext, Error, Page, expect, sync_playwright  # noqa: E402

from app import checkpoints  # noqa: E402
from siq_vl.page.layout import build_page, held_out_examples, launch_options  # noqa: E402
from siq_vl.page.streaming import StreamingModel  # noqa: E402

HOSTILE = "What color is the <img src=x onerror=\"document.title='owned'\"> {{value}} ${1 + 1}?"
DONE = ".siq-card[data-state=done]"


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


class Gate(StreamingModel):
    """A model that a test can hold: `before` runs before each answer, an `endless` one never ends, `closed` says that it did."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.before, self.endless, self.closed = lambda: None, False, threading.Event()

    def stream(self, *arguments):
        self.before()
        try:
            for output in super().stream(*arguments):
                yield output
                while self.endless:
                    yield output
        finally:
            self.closed.set()


@pytest.fixture(scope="module")
def streaming() -> Gate:
    return Gate("stage 3", *load_checkpoint(str(REPO_ROOT)))


@pytest.fixture(scope="module")
def serve():
    pages = []

    def start(*models) -> str:
        page = build_page(models)
        pages.append(page)
        _, address, _ = page.launch(prevent_thread_lock=True, quiet=True, **launch_options())
        return address

    start.pages = pages
    yield start
    for page in pages:
        page.close(verbose=False)


@pytest.fixture(scope="module")
def address(serve, streaming) -> str:
    return serve(streaming)


@pytest.fixture
def visit(browser: Browser):
    """Opens the page as a user of their own; whatever is asked of another machine is noted, and refused."""
    contexts, strangers = [], []

    def refuse(route):
        strangers.append(route.request.url)
        route.abort()

    def open_page(address: str, **options) -> Page:
        context: BrowserContext = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **options})
        contexts.append(context)
        context.route(re.compile(r"^(?!http://127\.0\.0\.1|http://localhost|data:|blob:)"), refuse)
        page = context.new_page()
        page.goto(address)
        expect(page.locator("#ask")).to_be_visible(timeout=30_000)
        expect(page.locator("#picture img")).to_be_visible()
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not strangers, "the page asks other machines for something"


@pytest.fixture
def put(tmp_path):
    """Puts a picture of a drawn figure, its question, or something else, into the page."""

    def fill(page: Page, drawn: FigureSample, question: str | None = None) -> None:
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.png"
        drawn.image.save(path)
        upload(page, path)
        page.locator("#question textarea").fill(question or drawn.question.text)

    return fill


def upload(page: Page, path: Path) -> None:
    before = page.locator("#picture img").get_attribute("src")
    page.locator("#picture button[aria-label='Clear'], #picture button[aria-label='Remove Image']").first.click()
    page.locator("#picture input[type=file]").set_input_files(path)
    if path.suffix == ".png" and is_picture(path):
        expect(page.locator("#picture img")).not_to_have_attribute("src", before)


def is_picture(path: Path) -> bool:
    return path.read_bytes().startswith(b"\x89PNG")


def ask(page: Page) -> None:
    page.locator("#ask").click()


def answer_of(page: Page, card: int = 0):
    return page.locator(DONE).nth(card).locator(".siq-answer p label > span").first


def figure(place: int) -> FigureSample:
    return sample("test", place, domain="charts", hard=False)


def keep(page: Page, name: str) -> None:
    folder = REPO_ROOT / "outputs" / "page"
    folder.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=folder / f"{name}.png", full_page=True)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("desktop", {}),
        ("phone", {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True}),
        ("dark", {"color_scheme": "dark"}),
    ],
)
def test_upload_ask_and_see_reasoning_and_answer_apart(visit, put, address, name, options):
    page, drawn = visit(address, **options), figure(3)
    put(page, drawn)
    ask(page)
    expect(answer_of(page)).to_have_text(drawn.question.answer, timeout=30_000)
    steps = page.locator(".siq-reasoning li")
    assert steps.count() >= 2
    assert drawn.question.answer not in steps.first.locator("span").first.inner_text()
    expect(page.locator(".siq-heat:visible")).to_have_count(1)  # the answer's
    words = steps.last.locator(".siq-look").first
    shown = words.locator("> span").first
    shown.tap() if options.get("has_touch") else shown.hover()
    expect(words.locator(".siq-heat")).to_be_visible()
    expect(page.locator(".siq-heat:visible")).to_have_count(1)
    picture, heat = page.locator(".siq-seen img").bounding_box(), words.locator(".siq-heat img").bounding_box()
    assert all(abs(picture[side] - heat[side]) < 1 for side in picture), (picture, heat)
    assert page.evaluate("document.documentElement.scrollWidth") <= page.viewport_size["width"]
    keep(page, name)


def test_thinking_off_answers_at_once(visit, put, address):
    page, drawn = visit(address), figure(0)
    put(page, drawn)
    page.locator("#thinking input").uncheck()
    ask(page)
    expect(answer_of(page)).not_to_be_empty(timeout=30_000)
    expect(page.locator(".siq-reasoning")).to_have_count(0)


def test_an_example_is_loaded_and_others_are_one_click_away(visit, address):
    page, examples = visit(address), held_out_examples()
    expect(page.locator("#question textarea")).to_have_value(examples[0].question.text)
    page.locator("#examples tbody tr").nth(2).click()
    expect(page.locator("#question textarea")).to_have_value(examples[2].question.text)
    ask(page)
    expect(answer_of(page)).to_have_text(examples[2].question.answer, timeout=30_000)


def test_a_bad_file_is_refused_kindly_and_the_page_goes_on(visit, put, address, tmp_path):
    page, drawn = visit(address), figure(3)
    bad = tmp_path / "<img src=x onerror=alert(1)>.png"
    bad.write_text("no picture at all")
    upload(page, bad)
    message = page.locator(".toast-wrap").get_by_text("is not a picture that can be read")
    expect(message).to_be_visible(timeout=15_000)
    assert page.locator(".toast-wrap img").count() == 0
    expect(page.locator("#picture input[type=file]")).to_be_attached()  # the box is empty again
    ask(page)
    expect(page.get_by_text("There is no picture yet")).to_be_visible(timeout=15_000)
    page.locator("#picture input[type=file]").set_input_files(saved(drawn.image, tmp_path / "good.png"))
    expect(page.locator("#picture img")).to_be_visible()
    page.locator("#question textarea").fill(drawn.question.text)
    ask(page)
    expect(answer_of(page)).to_have_text(drawn.question.answer, timeout=30_000)


def saved(image: Image.Image, path: Path) -> Path:
    image.save(path)
    return path


@pytest.mark.parametrize(
    ("question", "message"), [("  ", "The question is empty"), ("why? " * 400, "shorten the question")]
)
def test_questions_that_cannot_be_answered(visit, address, question, message):
    page = visit(address)
    page.locator("#question textarea").fill(question)
    ask(page)
    expect(page.get_by_text(message)).to_be_visible(timeout=15_000)


def test_a_picture_of_too_many_pixels_is_refused(visit, address, tmp_path):
    page = visit(address)
    upload(page, saved(Image.new("1", (12_000, 12_000)), tmp_path / "huge.png"))
    expect(page.get_by_text("too many pixels to be opened safely").first).to_be_visible(timeout=30_000)


def test_html_in_a_question_is_shown_as_text(visit, address):
    page = visit(address)
    page.locator("#question textarea").fill(HOSTILE)
    ask(page)
    expect(page.locator(DONE)).to_have_count(1, timeout=30_000)
    assert page.locator(".siq-question").inner_text() == HOSTILE
    assert page.locator(".siq-question *").count() == 0
    assert page.title() == "SiQ-VL"


def test_two_users_at_once_get_their_own_answers(visit, put, address, streaming):
    drawn = [figure(0), figure(3)]
    pages = [visit(address), visit(address)]
    for page, one in zip(pages, drawn, strict=True):
        put(page, one)
    both = threading.Barrier(2, timeout=20)  # neither answer begins before the other is under way
    streaming.before = both.wait
    try:
        for page in pages:
            ask(page)
        for page, one in zip(pages, drawn, strict=True):
            expect(page.locator(".siq-question")).to_have_text(one.question.text, timeout=30_000)
            expect(answer_of(page)).to_have_text(one.question.answer, timeout=30_000)
    finally:
        streaming.before = lambda: None
    assert drawn[0].question.answer != drawn[1].question.answer and not both.broken


@pytest.mark.parametrize("leave", ["stop", "close"])
def test_an_answer_ends_when_it_is_stopped_or_its_page_is_closed(visit, address, streaming, leave):
    page = visit(address)
    streaming.endless = True
    streaming.closed.clear()
    try:
        ask(page)
        expect(page.locator(".siq-card[data-state=thinking]")).to_have_count(1, timeout=30_000)
        if leave == "close":
            page.context.close()
        else:
            page.locator("#stop").click()
            expect(page.locator(".siq-card[data-state=stopped]")).to_have_count(1, timeout=30_000)
        assert streaming.closed.wait(30)
    finally:
        streaming.endless = False
    if leave == "stop":
        ask(page)
        expect(page.locator(DONE)).to_have_count(1, timeout=30_000)


def test_two_checkpoints_answer_side_by_side(visit, put, serve, streaming):
    other = StreamingModel("another", streaming.model, streaming.processor, 12)
    page, drawn = visit(serve(streaming, other)), figure(3)
    put(page, drawn)
    ask(page)
    expect(page.locator(DONE)).to_have_count(2, timeout=30_000)
    assert page.locator(".siq-name").all_inner_texts() == ["stage 3", "another"]
    expect(answer_of(page)).to_have_text(drawn.question.answer)
    expect(page.locator(DONE).nth(1).locator(".siq-answer")).to_contain_text("No answer within the bound")
    left, right = (page.locator(".siq-card").nth(place).bounding_box() for place in (0, 1))
    assert left["x"] + left["width"] <= right["x"] and abs(left["y"] - right["y"]) < 2
    keep(page, "two")


@pytest.mark.parametrize("marked", [True, False], ids=["as a file", "unmarked"])
def test_only_what_was_uploaded_is_opened(serve, streaming, marked):
    address = serve(streaming)
    (check,) = [place for place, event in serve.pages[-1].fns.items() if event.name == "_check"]
    upload = {"path": str(REPO_ROOT / "docs" / "app.png")}
    if marked:
        upload["meta"] = {"_type": "gradio.FileData"}
    body = {"fn_index": check, "session_hash": f"stranger {marked}", "data": [upload, "Why?"]}
    headers = {"Content-Type": "application/json"}
    urlopen(Request(f"{address}gradio_api/queue/join", json.dumps(body).encode(), headers)).close()
    with urlopen(f"{address}gradio_api/queue/data?session_hash=stranger%20{marked}", timeout=30) as events:
        (done,) = [line for line in events if b"process_completed" in line]
    assert json.loads(done.removeprefix(b"data: "))["success"] is False


def test_checkpoints_are_named():
    assert checkpoints(["a=x/y", "outputs/tiny/stage3"]) == {"a": "x/y", "stage3": "outputs/tiny/stage3"}
    with pytest.raises(ValueError, match="a name of its own"):
        checkpoints(["a=x", "a=y"])
    with pytest.raises(ValueError, match="NAME=CHECKPOINT"):
        checkpoints(["=x"])
