"""The parts of the page that need no browser: streams, attention, heat maps, and the HTML of the cards."""

import threading
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from siq_vl.data.figures.dataset import sample
from siq_vl.data.figures.rows import user_turn
from siq_vl.evaluation.generation import generate_texts
from siq_vl.loading import load_checkpoint
from siq_vl.page.attention import ImageTokenLayout, attention_to_image, eager_twin, picture_layout
from siq_vl.page.cards import card, empty_card, picture_address
from siq_vl.page.parts import take_apart
from siq_vl.page.streaming import Output, StreamingModel
from siq_vl.parsing.answers import TAGS, matches, parse

REPO_ROOT = Path(__file__).resolve().parent.parent
HOSTILE = "<img src=x onerror=alert(1)> & \"quoted\" 'too' </article><script>alert(2)</script> {{value}} ${value}"


@pytest.fixture(scope="module")
def shipped() -> StreamingModel:
    return StreamingModel("shipped", *load_checkpoint(str(REPO_ROOT)))


@pytest.fixture
def streaming(make_model, processor) -> StreamingModel:
    """A tiny random model that never ends by itself."""
    model = make_model(text={"max_position_embeddings": 128})
    model.generation_config.eos_token_id = None
    return StreamingModel("tiny", model, processor, max_new_tokens=40)


class TestStream:
    def test_last_output_is_that_of_plain_generation_and_all_others_grow_to_it(self, streaming, make_image):
        outputs = list(streaming.stream(make_image(), " Why? "))
        (text,) = generate_texts(
            streaming.model, streaming.processor, [user_turn("Why?")], [[make_image()]], max_new_tokens=40
        )
        assert outputs[-1].text == text and [output.finished for output in outputs].count(True) == 1
        texts = [output.text for output in outputs]
        assert all(later.startswith(earlier) for earlier, later in zip(texts, texts[1:], strict=False))

    def test_thinking_can_be_switched(self, shipped):
        drawn = sample("test", 0, domain="charts", hard=False)
        for thinking in (True, False):
            *_, last = shipped.stream(drawn.image, drawn.question.text, thinking)
            assert bool(take_apart(last.text).steps) is thinking
            assert take_apart(last.text).answer

    def test_closing_ends_the_generation(self, streaming, make_image):
        steps, seen = threading.Semaphore(0), []

        def wait(*_):
            seen.append(steps.acquire(timeout=20))

        streaming.model.register_forward_hook(wait)
        steps.release(8)
        stream = streaming.stream(make_image(), "Why?")
        next(stream)
        (thread,) = [thread for thread in threading.enumerate() if thread.name.startswith("answer")]
        stream.close()
        steps.release(100)
        thread.join(timeout=20)
        assert not thread.is_alive()
        assert len(seen) <= 10 and all(seen)

    def test_an_error_of_the_model_reaches_the_reader(self, streaming, make_image, monkeypatch):
        def fail(*_, **__):
            raise RuntimeError("out of memory")

        monkeypatch.setattr(streaming.model, "generate", fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            list(streaming.stream(make_image(), "Why?"))

    @pytest.mark.parametrize(
        ("question", "match"), [(" \n", "question is empty"), ("Why? " * 40, "shorten the question")]
    )
    def test_questions_that_cannot_be_answered(self, streaming, make_image, question, match):
        with pytest.raises(ValueError, match=match):
            next(streaming.stream(make_image(), question))


class TestAttention:
    def test_is_that_of_one_eager_pass_over_the_whole_text(self, streaming, make_image):
        inputs = streaming._inputs(make_image(), "Why?", True)
        made = streaming.model.generate(**inputs, max_new_tokens=12, do_sample=False, return_dict_in_generate=True)
        start, ids = inputs["input_ids"].shape[1], made.sequences
        twin = eager_twin(streaming.model)
        found = attention_to_image(twin, ids, made.past_key_values, start)

        whole = {**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
        layers = twin(**whole, output_attentions=True, use_cache=False).attentions
        mean = torch.stack(layers).mean((0, 1, 2)).detach()  # (position, position)
        torch.testing.assert_close(mean.sum(-1), torch.ones(len(mean)))
        on_image = ids[0] == streaming.processor.image_token_id
        expected = mean[start - 1 : -1][:, on_image]
        assert found.shape == (12, streaming.processor.image_seq_length) == tuple(expected.shape)
        np.testing.assert_allclose(found, expected.numpy(), rtol=1e-4, atol=1e-6)

    def test_twin_shares_weights_and_leaves_the_model_alone(self, streaming):
        twin = eager_twin(streaming.model)
        assert all(a is b for a, b in zip(streaming.model.parameters(), twin.parameters(), strict=True))
        assert twin.language_model.config._attn_implementation == "eager"
        assert streaming.model.language_model.config._attn_implementation == "sdpa"

    def test_where_the_shipped_model_says_a_place_it_looks_there(self, shipped):
        """The clause "top-left fish blue" was written looking at the top left: the sum over each quarter of the picture."""
        corners = {"top-left": 0, "top-right": 1, "bottom-left": 2, "bottom-right": 3}
        right, said = 0, 0
        for index in range(12):
            drawn = sample("test", index, domain="scenes", hard=False)
            *_, last = shipped.stream(drawn.image, drawn.question.text)
            for part in take_apart(last.text).steps[0]:
                place = part.text.split()[0]
                if place in corners:
                    heat, share = last.attention.of(part.start, part.end)
                    quarters = heat.reshape(2, heat.shape[0] // 2, 2, heat.shape[1] // 2).sum((1, 3)).flatten()
                    right, said = right + (quarters.argmax() == corners[place]), said + 1
                    assert 0 < share < 1
        assert said > 20 and right > 0.9 * said


class TestHeatMap:
    def test_even_grid(self):
        layout = ImageTokenLayout(1, 1, height=32, width=64, patch=8, factor=2)
        assert layout.token_grid == (2, 4)
        heat = layout.heat_map(np.arange(8.0))
        assert heat.shape == (4, 8)
        np.testing.assert_allclose(heat[::2, ::2] * 4, np.arange(8.0).reshape(2, 4))
        np.testing.assert_allclose(heat[1::2, 1::2], heat[::2, ::2])

    def test_padding_of_odd_grids_and_what_patches_leave_over(self):
        # 43 pixels: five patches of 8 and three pixels that the tower does not see; a sixth patch is padding.
        layout = ImageTokenLayout(1, 1, height=43, width=43, patch=8, factor=2)
        assert layout.token_grid == (3, 3)
        for token, (top, left, bottom, right) in {0: (0, 0, 16, 16), 2: (0, 32, 16, 40), 8: (32, 32, 40, 40)}.items():
            heat = layout.heat_map(np.eye(9)[token])
            expected = np.zeros((43, 43))
            expected[top:bottom, left:right] = 1 / ((bottom - top) * (right - left))
            np.testing.assert_allclose(heat, expected)

    @pytest.mark.parametrize("size", [(64, 96), (96, 32), (32, 32), (64, 70)])
    @pytest.mark.parametrize("max_tiles", [1, 6])
    def test_lies_where_the_processor_took_the_token_from(self, processor, size, max_tiles):
        """A white spot in the picture is found in the tiles that the processor makes, and again in the heat map."""
        processor.max_tiles = max_tiles
        height, width = size
        for row, column in ((0, 0), (height - 16, 0), (height // 2, width - 16)):
            pixels = np.zeros((height, width, 3), np.uint8)
            pixels[row : row + 16, column : column + 16] = 255
            made = processor(images=Image.fromarray(pixels), text="<|image_pad|>", return_tensors="np")
            tiles = made["pixel_values"][:, 0] + 1
            tokens = tiles.reshape(len(tiles), 2, 16, 2, 16).sum((2, 4))
            layout = picture_layout(processor, height, width)
            weights = tokens.flatten() / tokens.sum()
            assert len(weights) == (made["input_ids"] == processor.image_token_id).sum()
            heat = layout.heat_map(weights)
            assert heat.sum() == pytest.approx(1)
            tall, wide = height / heat.shape[0], width / heat.shape[1]
            hottest = np.argwhere(heat > 0.999 * heat.max())
            assert any(row - tall < y * tall < row + 16 and column - wide < x * wide < column + 16 for y, x in hottest)
            spread = (hottest.max(0) - hottest.min(0) + 1) * (tall, wide)  # it is one place, no larger than a token's
            assert (spread <= (height / 2 + 1, width / 2 + 1)).all()

    def test_another_number_of_weights_is_refused(self):
        with pytest.raises(ValueError, match=r"\(7,\), but the picture has 20 image tokens \(5 x 2 x 2\)"):
            ImageTokenLayout(2, 2, 32, 32, 8, 2).heat_map(np.ones(7))


class TestReading:
    TEXT = "<think> scene: a b, c d. 1.5 < 2\n2. so: it is</think>\n<answer> it <b> </answer>"

    def test_parts_lie_where_they_say(self):
        pieces = take_apart(self.TEXT)
        assert [[part.text for part in step] for step in pieces.steps] == [
            ["scene:", "a b,", "c d."],
            ["1.5 < 2"],
            ["so:", "it is"],
        ]
        parts = [*(part for step in pieces.steps for part in step), pieces.answer]
        assert all(self.TEXT[part.start : part.end] == part.text for part in parts)
        assert pieces.answer.text == parse(self.TEXT).answer == "it <b>"

    def test_a_growing_text_never_shows_a_tag_in_the_making(self):
        for length in range(len(self.TEXT)):
            pieces = take_apart(self.TEXT[:length])
            shown = [part.text for step in pieces.steps for part in step] + [
                pieces.answer.text if pieces.answer else ""
            ]
            assert not any(piece in text for text in shown for tag in TAGS for piece in (tag[:3], tag))

    @pytest.mark.parametrize(("text", "answer"), [("", None), ("7", "7"), ("<think>hm", None), ("<answer>7", "7")])
    def test_other_outputs(self, text, answer):
        found = take_apart(text).answer
        assert (found.text if found else None) == answer


class Tags(HTMLParser):
    def __init__(self, page: str):
        super().__init__()
        self.seen, self.text = set(), ""
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.seen.add(tag)
        assert not any(name.startswith("on") for name, _ in attributes)

    def handle_data(self, data):
        self.text += data


class TestCards:
    def test_nothing_from_outside_becomes_html(self, shipped):
        drawn = sample("test", 0, hard=False)
        *_, real = shipped.stream(drawn.image, drawn.question.text)
        said = Output(f"<think>{HOSTILE}</think><answer>{HOSTILE}</answer>", True)
        known = {"article", "header", "span", "p", "div", "figure", "img", "h3", "ol", "li", "label", "input", "small"}
        address = picture_address(drawn.image)
        for page in (
            card(HOSTILE, address, 1.0, HOSTILE, said),
            card(HOSTILE, address, 1.0, HOSTILE, Output(f"<think>{HOSTILE}")),
            card(HOSTILE, address, 1.0, HOSTILE, real),
            empty_card(HOSTILE),
        ):
            tags = Tags(page)
            assert tags.seen <= known
            assert HOSTILE in tags.text

    def test_answer_and_reasoning_stand_apart_and_each_part_has_its_heat_map(self, shipped):
        drawn = sample("test", 1, hard=False)
        *_, last = shipped.stream(drawn.image, drawn.question.text)
        page = card("m", picture_address(drawn.image), 1.0, drawn.question.text, last)
        answer, reasoning = page.split("<h3>Reasoning</h3>")
        assert f"<span>{drawn.question.answer}</span>" in answer.split("<h3>Answer</h3>")[1]
        assert matches(parse(last.text).answer, drawn.question.answer)
        pieces = take_apart(last.text)
        assert reasoning.count("<li>") == len(pieces.steps)
        assert page.count("siq-heat'><img src='data:image/png") == 1 + sum(map(len, pieces.steps))

    def test_an_answer_that_never_came(self):
        page = card("m", "data:,", 1.0, "Why?", Output("<think>and so on", True))
        assert "No answer within the bound on tokens." in page
