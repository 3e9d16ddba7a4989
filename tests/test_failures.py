"""What fails is counted, named and left alone; what only looks done is not taken for it."""

from contextlib import nullcontext
from io import BytesIO
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from PIL import Image

from siq_vl.ablation.jobs import Job, Jobs
from siq_vl.data.conversations import Conversation, message
from siq_vl.data.feature_cache.pictures import CachedPicture, encode
from siq_vl.data.feature_cache.store import FeatureLayout, FeatureStore, FeatureWriter
from siq_vl.data.images import decode_image
from siq_vl.data.mixtures import build_mixture
from siq_vl.distill.pipeline import Run
from siq_vl.distill.prompts import Prompts
from siq_vl.distill.questions import EncodedPicture, TraceQuestion
from siq_vl.distill.teachers.base import Teacher, TeacherReply
from siq_vl.distill.traces import TraceStore
from siq_vl.distill.verification import Verification
from siq_vl.evaluation.items import items_of
from siq_vl.training import callbacks
from siq_vl.training.arguments import DataArguments


class Mute(Teacher):
    """Has an answer to every second question."""

    name, kind = "mute", "figures"

    def settings(self) -> dict:
        return {}

    async def generate(self, asked):
        texts = ["", "<think>it is red</think><answer>red</answer>"]
        return [
            TeacherReply(texts[len(one.question.id) % 2], error="" if len(one.question.id) % 2 else "lost")
            for one in asked
        ]


def test_failed_traces_are_counted_by_what_failed(tmp_path):
    questions = [TraceQuestion("a" * count, "What?") for count in (1, 2, 4)]
    questions.append(TraceQuestion("b", "What?", sources=(EncodedPicture(b"no picture"),)))
    with TraceStore(tmp_path) as store:
        progress = Run(Mute(), Prompts(), store, Verification(language=""), progress=False).over(questions)
    assert (progress.made, progress.failed, progress.skipped) == (4, 3, 0)
    assert progress.failures["lost"] == 2 and sum(progress.failures.values()) == 3
    assert progress.rejected == {"teacher_error": 3}


def test_a_job_that_fails_is_not_done_though_its_file_is_there(tmp_path):
    made = tmp_path / "made"
    write = f"-c \"import sys; open({str(made)!r}, 'w').close(); sys.exit(int({{status}}))\""
    told = []
    for status in (3, 0):
        jobs = Jobs([Job("job", write.format(status=status), made)], tmp_path / "logs", 1, told.append)
        jobs.run()
        assert list(jobs.failures) == (["job"] if status else []) and list(jobs.seconds) == ([] if status else ["job"])
    assert "exit status 3" in told[0]


@pytest.mark.parametrize("max_side", [None, 5])
def test_a_picture_that_pillow_only_warns_of_is_refused_unread(max_side, monkeypatch):
    encoded = BytesIO()
    Image.new("RGB", (11, 11)).save(encoded, "PNG")
    assert decode_image(encoded.getvalue(), "it", max_side).mode == "RGB"
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # a warning up to twice as many, an error above
    monkeypatch.setattr(Image.Image, "load", lambda image: pytest.fail("it was decoded"))
    with pytest.raises(ValueError, match="too many pixels to be opened safely"):
        decode_image(encoded.getvalue(), "it", max_side)


def test_a_row_that_could_not_be_read_is_not_tried_again(tmp_path, make_image):
    for number in range(3):
        make_image(number).save(tmp_path / f"{number}.png")
    rows = [f'{{"image": "{number}.png", "prompt": "{number}?", "completion": "{number}"}}\n' for number in range(3)]
    (tmp_path / "rows.jsonl").write_text("".join(rows))
    source = {"path": str(tmp_path / "rows.jsonl")}
    mixture = build_mixture(DataArguments(sources=[source], max_bad_share=1.0), "answer", None)
    (tmp_path / "1.png").write_bytes(b"no picture")
    mixture.report.drops.read.clear()
    answers = [[row["messages"][-1] for row in mixture.rows] for _ in range(3)]
    assert answers[0] == answers[1] == answers[2]
    # Nine places are filled by nine rows that can be read; the damaged one was read once.
    assert mixture.report.drops.read["rows.jsonl"] == 9 + 1


def test_a_question_shows_the_pictures_up_to_it_alone():
    turns = [message("user", "first?", 1), message("assistant", "one"), message("user", "second?", 2)]
    conversation = Conversation(["a", "b", "c"], [*turns, message("assistant", "two")])

    class Source(list):
        name, split, streaming, adapter = "rows", "test", False, len

        def conversation(self, row):
            return conversation

    first, second = items_of(Source([{}]))
    assert (list(first.images), list(second.images)) == (["a"], ["a", "b", "c"])
    assert (first.question, first.golds, second.question, second.golds) == ("first?", ("one",), "second?", ("two",))


@pytest.mark.parametrize("training", [True, False])
def test_a_model_that_is_asked_while_it_trains_goes_on_training(training, make_model, processor, monkeypatch):
    model = make_model().train(training)
    seen = []
    monkeypatch.setattr(callbacks, "generate_texts", lambda model, *_, **__: seen.append(model.training) or [])
    callback = callbacks.SampleCallback([], processor, 1, 1)
    accelerator = Accelerator(cpu=True)
    callback.trainer = SimpleNamespace(
        model_wrapped=model, accelerator=accelerator, compute_loss_context_manager=nullcontext
    )
    assert callback._answers() == [] and seen == [False]
    assert model.training is training


@pytest.mark.parametrize("size", [(16, 64), (64, 16), (16, 16)])
def test_stored_features_take_the_tokens_of_the_pictures_height_and_width(size, tmp_path, processor, make_image):
    """With tiles that are no squares, a picture and the same one on its side are cut in different ways."""
    patch = processor.patch_size
    processor.image_processor.size, processor.max_tiles = {"height": 4 * patch, "width": 2 * patch}, 8
    image, text = make_image(size=size), "<|image_pad|> What?"
    wanted = processor(images=[image], text=[text], add_special_tokens=False)
    layout = FeatureLayout(4, 2, 8, "float32")
    store = FeatureStore(tmp_path, layout)
    with FeatureWriter(tmp_path, layout) as writer:
        tiles = layout.pack(torch.zeros(len(wanted["pixel_values"]), 8, 8))
        writer.add(b"k" * 16, (image.height, image.width), tiles)
    store.refresh()
    entry = store.find(b"k" * 16)
    stored = CachedPicture(b"k" * 16, (int(entry["width"]), int(entry["height"])), entry, store)
    ids, tensors = encode(processor, [stored], [text])
    assert ids == wanted["input_ids"] and len(tensors["vision_features"]) == len(wanted["pixel_values"])
