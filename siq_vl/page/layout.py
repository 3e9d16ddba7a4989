"""The Gradio page: a picture, a question, and a card for each checkpoint's answer."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.utils import get_upload_folder
from PIL import Image

from siq_vl.data.images import decode_image, find_under
from siq_vl.page.cards import card, empty_card, picture_address
from siq_vl.page.examples import held_out_examples
from siq_vl.page.streaming import StreamingModel

_STYLE = Path(__file__).with_name("style.css")
_FONT = ("ui-sans-serif", "system-ui", "sans-serif")  # of the reader's own machine: nothing is fetched
_MONO = ("ui-monospace", "monospace")
# Marks the cards that were still growing; what they say already stays.
_STOP = "() => document.querySelectorAll('.siq-card:not([data-state=done], [data-state=idle])').forEach(c => c.dataset.state = 'stopped')"
_LARGEST_FILE = "20mb"


# What the picture box sends, or None where it is empty. By `preprocess=False` Gradio opens nothing, so that files are
# opened, and refused, here.
Upload = Mapping[str, Any]


def _opened(upload: Upload) -> Image.Image:
    """Return the uploaded picture; errors as of `decode_image`, with the name that the user knows.

    The path comes from the browser, and Gradio checks it only where the request says that it is a file's.
    """
    try:
        path = find_under(str(upload.get("path")), [Path(get_upload_folder())])
    except OSError as error:
        raise ValueError("the picture is no upload of this page: drop it into the box again") from error
    return decode_image(path, upload.get("orig_name") or "the file")


def build_page(models: Sequence[StreamingModel], at_once: int = 2) -> gr.Blocks:
    """Return the page.

    Args:
        models: the checkpoints, each with a card of its own.
        at_once: answers of one checkpoint under way at the same time; further ones wait in Gradio's queue.
    """
    examples = held_out_examples()
    unbounded = max(model.max_new_tokens for model in models)
    with gr.Blocks(title="SiQ-VL", analytics_enabled=False) as page:
        gr.HTML(
            "<div class='siq-head'><h1>SiQ-VL</h1><p>Ask about a picture, and watch the model reason before it answers.</p></div>"
        )
        with gr.Row(equal_height=False):
            with gr.Column(scale=4, min_width=320):
                picture = gr.Image(
                    examples[0].image, show_label=False, sources=["upload", "clipboard"], height=270, elem_id="picture",
                    format="png", buttons=[],
                )  # fmt: skip
                question = gr.Textbox(
                    examples[0].question.text, label="Question", lines=2, max_lines=4, elem_id="question"
                )
                thinking = gr.Checkbox(True, label="Think step by step first", elem_id="thinking")
                longest = gr.Slider(
                    1, unbounded, unbounded, step=1, label="Tokens of reasoning, at most", elem_id="longest", buttons=[]
                )
                with gr.Row():
                    ask = gr.Button("Ask", variant="primary", scale=3, min_width=160, elem_id="ask")
                    stop = gr.Button("Stop", scale=1, min_width=80, elem_id="stop")
            with gr.Column(scale=4 + 4 * len(models), min_width=320), gr.Row(equal_height=False):
                cards = [gr.HTML(empty_card(model.name), elem_classes="siq-slot") for model in models]
        with gr.Column(elem_id="examples"):
            gr.Examples(
                [[drawn.image, drawn.question.text] for drawn in examples], [picture, question],
                label="Examples: drawings that no training showed",
            )  # fmt: skip
        event: dict[str, Any] = {"preprocess": False, "api_visibility": "private"}
        picture.upload(_checked_upload, picture, picture, show_progress="hidden", **event)
        asked = gr.on([ask.click, question.submit], _check, [picture, question], None, show_progress="hidden", **event)
        # Every checkpoint answers by itself, into its own card, once the question is found to be in order.
        answers = []
        for place, (model, its_card) in enumerate(zip(models, cards, strict=True)):
            answer = asked.success(
                _answer_with(model),
                [picture, question, thinking, longest],
                its_card,
                show_progress="minimal",
                concurrency_limit=at_once,
                concurrency_id=f"answer {place}",
                **event,
            )
            answers.append(answer)
        stop.click(None, cancels=answers, js=_STOP)
    return page


def launch_options() -> dict[str, Any]:
    """Return what `Blocks.launch` needs: nothing is fetched from elsewhere, and no API beside the page is offered."""
    return {
        "theme": _theme(),
        "css_paths": [_STYLE],
        "footer_links": [],
        "max_file_size": _LARGEST_FILE,
        "ssr_mode": False,
    }


def _theme() -> gr.themes.Base:
    theme = gr.themes.Soft(primary_hue="orange", neutral_hue="slate", font=_FONT, font_mono=_MONO)
    subdued = "*body_text_color_subdued"
    return theme.set(
        block_title_background_fill="transparent",
        block_title_background_fill_dark="transparent",
        block_title_text_color=subdued,
        block_title_text_color_dark=subdued,
        body_background_fill="*neutral_50",
        body_text_color_subdued="*neutral_500",
        block_border_width="1px",
        block_shadow="none",
        block_radius="14px",
    )


def _answer_with(model: StreamingModel) -> Callable[[Upload, str, bool, int], Iterator[str]]:
    """Return what Gradio calls for a question: it yields the model's card as the answer grows."""

    def answer(upload: Upload, question: str, thinking: bool, longest: int) -> Iterator[str]:
        image = _opened(upload)
        address = picture_address(image)
        try:
            bound = longest if thinking and longest < model.max_new_tokens else None
            for output in model.stream(image, question, thinking, bound):
                yield card(model.name, address, image.width / image.height, question, output)
        except ValueError as error:
            raise _page_error(error) from error

    return answer


def _check(upload: Upload | None, question: str) -> None:
    """Refuse what no checkpoint can answer, once for all of them."""
    if upload is None:
        raise gr.Error(
            "There is no picture yet: drop one into the box, or take an example.",
            title="No picture",
            print_exception=False,
        )
    if not question.strip():
        raise gr.Error(
            "The question is empty: ask something about the picture.", title="No question", print_exception=False
        )
    try:
        _opened(upload)
    except ValueError as error:
        raise _page_error(error) from error


def _checked_upload(upload: Upload | None) -> Any:
    """Take a file that is no picture out of the box again, and say why."""
    try:
        if upload is not None:
            _opened(upload)
    except ValueError as error:
        gr.Warning(escape(str(error)), title="Not a picture")
        return None
    return gr.skip()


def _page_error(error: ValueError) -> gr.Error:
    """Return an error that the page shows. Gradio reads messages as HTML, and this one may hold a file's name."""
    return gr.Error(escape(str(error)), title="That did not work", print_exception=False)
