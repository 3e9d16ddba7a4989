"""Sources in their published schemas, the labels of conversations, and training on rows of which some are broken."""

import copy
import io
import json
import struct
import zlib
from itertools import islice
from pathlib import Path
from random import Random

import pytest
import torch
from datasets import ClassLabel, Dataset, Features, List, Value
from datasets import Image as ImageFeature
from PIL import Image
from torch.utils.data import DataLoader
from trl import SFTConfig
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from siq_vl import cli
from siq_vl.data import remote
from siq_vl.data import sources as sources_module
from siq_vl.data.collation import ConversationCollator, supervised_segments
from siq_vl.data.conversations import Dropped, text_of
from siq_vl.data.figures.rows import training_rows
from siq_vl.data.images import FORMATS, decode_image, find_under, open_image
from siq_vl.data.mixture_config import SourceConfig
from siq_vl.data.mixtures import build_mixture
from siq_vl.data.preprocessing import DropLog
from siq_vl.data.sources import Source
from siq_vl.training.arguments import DataArguments, ModelArguments
from siq_vl.training.recipes import Recipe
from siq_vl.training.run import DROP_LOG, make_trainer, mixture_for_stage

TEXT, TEXTS, PICTURE = Value("string"), List(Value("string")), ImageFeature()
RATINGS = ("relevance", "image_correspondence", "visual_dependency", "formatting")


def encoded(image: Image.Image, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


@pytest.fixture
def picture(make_image) -> dict:
    """A picture as `datasets` stores it."""
    return {"bytes": encoded(make_image(1)), "path": None}


@pytest.fixture
def folder(tmp_path, make_image) -> Path:
    """A folder for rows, with pictures under the names that the data sets give theirs."""
    root = tmp_path / "source"
    names = ("000000033471.jpg", "train/1/image.png", "train_images/0054c91397f2fe05.jpg", "png/two_col_1.png")
    names += ("documents/xnbl0037_1.png", "images/0001234567.jpg", "COCO_train2014_000000000042.jpg", "cat.png")
    for seed, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        make_image(seed).save(root / name)
    return root


def write_json(path: Path, content) -> Path:
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def write_lines(path: Path, rows: list) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), "utf-8")
    return path


def write_parquet(path: Path, rows: list[dict], features: dict) -> Path:
    Dataset.from_list(rows, features=Features(features)).to_parquet(path)
    return path


# One writer for each published schema; each returns what a recipe says about the source.


def finevision(folder: Path, picture: dict) -> dict:
    numbers = {f"{name}_ratings": [5, 4] for name in RATINGS} | {f"{name}_min": 4 for name in RATINGS}
    row = {"images": [picture], "texts": [], "source": "sharegpt4v(knowledge)", **numbers}
    row["texts"] = [{"user": "Who?", "assistant": "Ada."}, {"user": "When?", "assistant": "1843."}]
    kinds = {name: List(Value("int64")) if name.endswith("ratings") else Value("int64") for name in numbers}
    features = {"images": List(PICTURE), "texts": List({"user": TEXT, "assistant": TEXT}), "source": TEXT, **kinds}
    subset = folder / "sharegpt4v(knowledge)"
    subset.mkdir()
    write_parquet(subset / "train-00000-of-00001.parquet", [row], features)
    return {"path": str(folder), "subset": subset.name}


def llava_instruct(folder: Path, picture: dict) -> dict:
    talk = [
        {"from": "human", "value": "Who?\n<image>"},
        {"from": "gpt", "value": "Ada."},
        {"from": "human", "value": "When?"},
        {"from": "gpt", "value": "1843."},
    ]
    row = {"id": "000000033471", "image": "000000033471.jpg", "conversations": talk}
    return {"path": str(write_json(folder / "llava_instruct_150k.json", [row])), "image_folder": str(folder)}


def trl_messages(folder: Path, picture: dict) -> dict:
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Who?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "Ada."}]},
        {"role": "user", "content": [{"type": "text", "text": "When?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "1843."}]},
    ]
    return {"path": str(write_lines(folder / "rows.jsonl", [{"images": ["cat.png"], "messages": messages}]))}


def trl_inline(folder: Path, picture: dict) -> dict:
    content = [{"type": "image", "image": "cat.png"}, {"type": "text", "text": "Who?"}]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "Ada."}]
    messages += [{"role": "user", "content": "When?"}, {"role": "assistant", "content": "1843."}]
    return {"path": str(write_lines(folder / "rows.jsonl", [{"messages": messages}]))}


def trl_parquet(folder: Path, picture: dict) -> dict:
    turns = [("user", "Who?"), ("assistant", "Ada."), ("user", "When?"), ("assistant", "1843.")]
    row = {"images": [picture], "messages": [{"role": role, "content": text} for role, text in turns]}
    features = {"images": List(PICTURE), "messages": List({"role": TEXT, "content": TEXT})}
    return {"path": str(write_parquet(folder / "rows.parquet", [row], features))}


def saved_to_disk(folder: Path, picture: dict) -> dict:
    row = {
        "images": [picture],
        "texts": [{"user": "Who?", "assistant": "Ada."}, {"user": "When?", "assistant": "1843."}],
    }
    features = Features({"images": List(PICTURE), "texts": List({"user": TEXT, "assistant": TEXT})})
    Dataset.from_list([row], features=features).save_to_disk(folder / "saved")
    return {"path": str(folder / "saved")}


def ocrvqa(folder: Path, picture: dict) -> dict:
    row = {"imageURL": "http://images/0001234567.jpg", "questions": ["Who?", "When?"], "answers": ["Ada.", "1843."]}
    rows = {"0001234567": {**row, "title": "Notes", "authorName": "Ada", "genre": "Science", "split": 1}}
    rows["0007654321"] = {**rows["0001234567"], "split": 3}
    return {"path": str(write_json(folder / "dataset.json", rows))}


def ocrvqa_hub(folder: Path, picture: dict) -> dict:
    row = {"image": picture, "image_id": "0001234567", "questions": ["Who?", "When?"], "answers": ["Ada.", "1843."]}
    row |= {"ocr_tokens": ["Notes"], "title": "Notes", "authorName": "Ada", "genre": "Science", "set_name": "train"}
    features = {name: TEXTS if isinstance(value, list) else TEXT for name, value in row.items()} | {"image": PICTURE}
    return {"path": str(write_parquet(folder / "rows.parquet", [row], features))}


def scienceqa(folder: Path, picture: dict) -> dict:
    row = {"question": "Who?", "choices": ["Bob", "Ada"], "answer": 1, "hint": "Look.", "image": "image.png"}
    row |= {"task": "closed choice", "grade": "grade2", "subject": "history", "topic": "", "category": "", "skill": ""}
    rows = {"1": {**row, "lecture": "", "solution": "Ada.", "split": "train"}, "2": {**row, "split": "test"}}
    write_json(folder / "pid_splits.json", {"train": ["1"], "test": ["2"]})
    return {"path": str(write_json(folder / "problems.json", rows))}


def scienceqa_hub(folder: Path, picture: dict) -> dict:
    row = {"image": picture, "question": "Who?", "choices": ["Bob", "Ada"], "answer": 1, "hint": "Look.", "task": ""}
    row |= {"grade": "", "subject": "", "topic": "", "category": "", "skill": "", "lecture": "", "solution": "Ada."}
    features = {name: TEXT for name in row} | {"image": PICTURE, "choices": TEXTS, "answer": Value("int8")}
    return {"path": str(write_parquet(folder / "train-00000.parquet", [row], features))}


def textvqa(folder: Path, picture: dict) -> dict:
    row = {"question": "Who?", "image_id": "0054c91397f2fe05", "image_classes": ["Person"], "image_width": 32}
    row |= {"flickr_original_url": "https://flickr/1.jpg", "flickr_300k_url": "", "image_height": 32, "question_id": 0}
    row |= {"answers": ["Bob", *["Ada."] * 9], "question_tokens": ["who"], "set_name": "train"}
    content = {"dataset_type": "train", "dataset_name": "textvqa", "dataset_version": "0.5.1", "data": [row]}
    return {"path": str(write_json(folder / "TextVQA_0.5.1_train.json", content))}


def textvqa_hub(folder: Path, picture: dict) -> dict:
    row = {"image_id": "0054c91397f2fe05", "question_id": 0, "question": "Who?", "question_tokens": ["who"]}
    row |= {"image": picture, "image_width": 32, "image_height": 32, "flickr_original_url": "", "flickr_300k_url": ""}
    row |= {"answers": ["Bob", *["Ada."] * 9], "image_classes": ["Person"], "set_name": "train", "ocr_tokens": ["Ada"]}
    kinds = {str: TEXT, int: Value("int32"), list: TEXTS, dict: PICTURE}
    features = {name: kinds[type(value)] for name, value in row.items()}
    return {"path": str(write_parquet(folder / "rows.parquet", [row], features))}


def chartqa(folder: Path, picture: dict) -> dict:
    row = {"imgname": "two_col_1.png", "query": "Who?", "label": "Ada."}
    return {"path": str(write_json(folder / "train_human.json", [row]))}


def chartqa_hub(folder: Path, picture: dict) -> dict:
    row = {"image": picture, "query": "Who?", "label": ["Ada."], "human_or_machine": 0}
    kind = ClassLabel(names=["human", "machine"])
    features = {"image": PICTURE, "query": TEXT, "label": TEXTS, "human_or_machine": kind}
    return {"path": str(write_parquet(folder / "rows.parquet", [row], features))}


def cocoqa(folder: Path, picture: dict) -> dict:
    (folder / "train").mkdir(exist_ok=True)
    for name, line in (("questions", "Who?"), ("answers", "Ada."), ("img_ids", "42"), ("types", "0")):
        (folder / "train" / f"{name}.txt").write_text(line + "\n", encoding="utf-8")
    return {"path": str(folder), "subset": "train"}


def docvqa(folder: Path, picture: dict) -> dict:
    row = {"questionId": 337, "question": "Who?", "image": "documents/xnbl0037_1.png", "docId": 279}
    row |= {"ucsf_document_id": "xnbl0037", "ucsf_document_page_no": "1", "answers": ["Ada.", "ada"]}
    content = {"dataset_name": "docvqa", "dataset_split": "train", "dataset_version": "1.0", "data": [row]}
    return {"path": str(write_json(folder / "train_v1.0.json", content))}


def docvqa_hub(folder: Path, picture: dict) -> dict:
    row = {"questionId": "337", "question": "Who?", "question_types": ["layout"], "image": picture, "docId": 279}
    row |= {"ucsf_document_id": "xnbl0037", "ucsf_document_page_no": "1", "answers": ["Ada.", "ada"], "data_split": ""}
    kinds = {str: TEXT, int: Value("int64"), list: TEXTS, dict: PICTURE}
    features = {name: kinds[type(value)] for name, value in row.items()}
    return {"path": str(write_parquet(folder / "rows.parquet", [row], features))}


def trl_plain(folder: Path, picture: dict) -> dict:
    return {
        "path": str(write_lines(folder / "r.jsonl", [{"image": "cat.png", "prompt": "Who?", "completion": "Ada."}]))
    }


def image_folder(folder: Path, picture: dict) -> dict:
    write_lines(folder / "metadata.jsonl", [{"file_name": "cat.png", "text": "Ada."}])
    return {"path": str(folder), "instruction": "Who?"}


CONVERSATIONS = (
    finevision, llava_instruct, trl_messages, trl_inline, trl_parquet, saved_to_disk, ocrvqa, ocrvqa_hub
)  # fmt: skip
QUESTIONS = (textvqa, textvqa_hub, chartqa, chartqa_hub, cocoqa, docvqa, docvqa_hub, trl_plain, image_folder)
CHOICES = (scienceqa, scienceqa_hub)
WANTED = {
    **dict.fromkeys(
        CONVERSATIONS, [("user", "Who?"), ("assistant", "Ada."), ("user", "When?"), ("assistant", "1843.")]
    ),
    **dict.fromkeys(QUESTIONS, [("user", "Who?"), ("assistant", "Ada.")]),
    **dict.fromkeys(CHOICES, [("user", "Who?\nLook.\nA. Bob\nB. Ada"), ("assistant", "B")]),
}


def first_row(mixture) -> dict:
    return next(iter(mixture.rows))


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("writer", WANTED, ids=lambda writer: writer.__name__)
def test_every_published_schema_becomes_one_row_format(writer, streaming, folder, picture, processor):
    source = {**writer(folder, picture), "streaming": streaming}
    row = first_row(build_mixture(DataArguments(sources=[source], max_bad_share=0), "answer", 1, processor=processor))
    assert [(message["role"], text_of(message)) for message in row["messages"]] == WANTED[writer]
    first = row["messages"][0]["content"]
    assert sum(part["type"] == "image" for part in first) == 1
    assert [image.size for image in row["images"]] == [(32, 32)]
    batch = ConversationCollator(processor)([row])
    answers = "".join(text + "<|im_end|>" for role, text in WANTED[writer] if role == "assistant")
    assert processor.decode(batch["labels"][batch["labels"] != -100]) == answers


def test_original_annotations_give_only_their_split(folder, picture):
    assert len(Source(SourceConfig(**scienceqa(folder, picture)))) == 1
    assert len(Source(SourceConfig(**ocrvqa(folder, picture), split="test"))) == 1


def test_instruction_is_added_to_questions(folder, picture):
    config = SourceConfig(**textvqa(folder, picture), instruction="Answer with one word.")
    source = Source(config)
    assert source.conversation(source[0]).texts("user") == ["Who?\nAnswer with one word."]


@pytest.mark.parametrize("streaming", [False, True])
def test_hub_ids_go_to_load_dataset(streaming, folder, picture, monkeypatch):
    asked = {}
    original = sources_module.load_dataset
    local = finevision(folder, picture)
    file = next((folder / local["subset"]).iterdir())

    def load(path, **options):
        if path == "parquet":
            return original(path, **options)
        asked.update(path=path, **options)
        return original("parquet", data_files=str(file), split="train", streaming=options["streaming"])

    monkeypatch.setattr(sources_module, "load_dataset", load)
    source = {"path": "HuggingFaceM4/FineVision", "subset": "sharegpt4v(knowledge)", "streaming": streaming}
    mixture = build_mixture(DataArguments(sources=[source]), "caption", 1)
    assert first_row(mixture)["source"] == "HuggingFaceM4/FineVision/sharegpt4v(knowledge)"
    assert asked == {
        "path": "HuggingFaceM4/FineVision",
        "name": "sharegpt4v(knowledge)",
        "data_files": None,
        "split": "train",
        "streaming": streaming,
    }


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda root: {"path": str(root / "nowhere")}, "there is no source"),
        (lambda root: {"path": str(write_lines(root / "x.jsonl", [{"a": 1}]))}, "columns a fit no known format"),
        (lambda root: {"path": str(write_json(root / "x.json", {"a": 1}))}, "neither a list of rows"),
        (lambda root: {"path": str(root), "image_folder": str(root / "nowhere")}, "image_folder .* is not a folder"),
        (lambda root: {"path": str(root)}, "holds no .parquet, .jsonl or .json"),
        (lambda root: {"path": "x", "format": "llama"}, "format is 'llama'; it must be one of finevision, llava"),
        (
            lambda root: {"path": str(write_lines(root / "x.jsonl", [{"image": "cat.png", "text": "A cat."}]))},
            "asks no question: set `instruction`",
        ),
    ],
)
def test_bad_sources_are_refused(make, message, folder):
    with pytest.raises(ValueError, match=message):
        build_mixture(DataArguments(sources=[make(folder)]), "answer", 1)


def test_files_of_cocoqa_must_be_aligned(folder, picture):
    config = cocoqa(folder, picture)
    (folder / "train" / "answers.txt").write_text("Ada.\nBob.\n")
    with pytest.raises(ValueError, match="questions.txt 1, answers.txt 2, img_ids.txt 1"):
        Source(SourceConfig(**config))


def test_odd_characters_end_no_line_of_cocoqa(folder, picture):
    """A line separator in one question, and bytes that are no UTF-8 in another, leave the files aligned."""
    config = cocoqa(folder, picture)
    texts = {"questions": b"Who\xe2\x80\xa8is it?\n\xff?\n", "answers": b"Ada.\nBob.\n", "img_ids": b"42\nx\n"}
    for name, content in texts.items():
        (folder / "train" / f"{name}.txt").write_bytes(content)
    source = Source(SourceConfig(**config))
    assert source.conversation(source[0]).texts("user") == ["Who\u2028is it?"]
    with pytest.raises(Dropped, match="img_id is a text, where a whole number"):
        source.conversation(source[1])


# Labels


@pytest.mark.parametrize("task", ["caption", "answer", "reason"])
def test_batches_of_single_turns_equal_those_of_trl(task, processor):
    rows = list(training_rows("train", 5, task, seed=3, **({"direct_share": 0.5} if task == "reason" else {})))
    rows.append({**rows[0], "images": [], "prompt": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]})
    ours = ConversationCollator(processor)(rows)
    theirs = DataCollatorForVisionLanguageModeling(processor, completion_only_loss=True)(copy.deepcopy(rows))
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name])


def talk(turns: int, system: bool = False) -> list[dict]:
    messages = [{"role": "system", "content": [{"type": "text", "text": "Be brief."}]}] if system else []
    for turn in range(turns):
        content = [{"type": "text", "text": f"question {turn}"}]
        messages.append({"role": "user", "content": [{"type": "image"}] * (turn == 0) + content})
        messages.append({"role": "assistant", "content": [{"type": "text", "text": f"answer {turn}"}]})
    return messages


def test_labels_are_every_assistant_turn_and_its_end(processor, make_image):
    rows = [{"images": [make_image(turns)], "messages": talk(turns, turns == 2)} for turns in (1, 2, 5)]
    batch = ConversationCollator(processor)(rows)
    for row, ids, labels, mask in zip(rows, batch["input_ids"], batch["labels"], batch["attention_mask"], strict=True):
        runs, previous = [], False
        for token, label in zip(ids.tolist(), labels.tolist(), strict=True):
            assert label in (-100, token)
            if label != -100:
                runs = [*runs, [label]] if not previous else [*runs[:-1], [*runs[-1], label]]
            previous = label != -100
        answers = [text_of(message) for message in row["messages"] if message["role"] == "assistant"]
        assert [processor.decode(run) for run in runs] == [f"{answer}<|im_end|>" for answer in answers]
        rendered = processor.apply_chat_template(row["messages"], tokenize=False)
        assert processor.decode(ids[mask == 1]) == processor.expand_image_tokens(rendered)


def test_one_conversation_trains_as_its_turns_one_by_one(processor, make_model, make_image):
    """The gradient on a conversation is that of one row a turn, with the history as its prompt."""
    model = make_model().train()
    row = {"images": [make_image()], "messages": talk(3)}
    by_turn = [
        {"images": row["images"], "prompt": row["messages"][:end], "completion": row["messages"][end : end + 1]}
        for end in (1, 3, 5)
    ]
    gradients = []
    for rows in ([row], by_turn):
        model.zero_grad()
        batch = ConversationCollator(processor)(rows)
        count = (batch["labels"] != -100).sum()
        model(**batch, num_items_in_batch=count).loss.backward()
        gradients.append(model.model.projector.linear.weight.grad.clone())
    torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-4)


def test_a_template_that_rewrites_turns_is_refused(processor):
    processor.chat_template = "{{ messages | length }}{% for m in messages %}{{ m['role'] }}{% endfor %}"
    with pytest.raises(ValueError, match="needs a template that only appends"):
        supervised_segments(processor, talk(2), {})


def test_a_batch_is_never_cut(processor, make_image):
    row = {"images": [make_image()], "messages": talk(2)}
    length = ConversationCollator(processor)([row])["input_ids"].shape[1]
    assert ConversationCollator(processor, length)([row])["input_ids"].shape[1] == length
    with pytest.raises(ValueError, match=rf"{length} tokens, more than max_length={length - 1}"):
        ConversationCollator(processor, length - 1)([row])


# Pictures


def test_pictures_come_from_under_their_folder(folder, tmp_path, make_image):
    make_image().save(tmp_path / "outside.png")
    (folder / "link.png").symlink_to(tmp_path / "outside.png")
    assert find_under("train/1/image.png", [folder]) == (folder / "train/1/image.png").resolve()
    assert find_under(str(folder / "cat.png"), [folder]).name == "cat.png"
    for name in ("../outside.png", str(tmp_path / "outside.png"), "train/../../outside.png", "link.png", "/etc/passwd"):
        with pytest.raises(PermissionError, match="is not inside"):
            find_under(name, [folder])
    with pytest.raises(FileNotFoundError, match="no file dog.png"):
        find_under("dog.png", [folder])


def test_large_pictures_are_scaled_while_they_are_read(tmp_path):
    for kind in ("png", "jpg"):
        Image.new("RGB", (20000, 40), (200, 30, 30)).save(tmp_path / f"long.{kind}")
        image = open_image(tmp_path / f"long.{kind}", max_side=512)
        assert image.size == (512, 1)
        assert all(abs(a - b) < 4 for a, b in zip(image.getpixel((9, 0)), (200, 30, 30), strict=True))


def bomb() -> bytes:
    """A PNG whose header promises 20,000 x 20,000 pixels."""
    content = bytearray(encoded(Image.new("RGB", (8, 8))))
    content[16:24] = struct.pack(">II", 20000, 20000)
    content[29:33] = struct.pack(">I", zlib.crc32(bytes(content[12:29])))
    return bytes(content)


def test_bombs_are_refused_by_their_header():
    with pytest.raises(ValueError, match="too many pixels"):
        decode_image(bomb(), "bomb")


def test_pictures_are_turned_upright(tmp_path):
    image = Image.new("RGB", (8, 4))
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(tmp_path / "turned.jpg", exif=exif)
    assert open_image(tmp_path / "turned.jpg").size == (4, 8)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_damage_ends_in_a_picture_or_a_value_error(kind, make_image):
    assert kind in FORMATS
    whole, rng, refused = encoded(make_image(), kind), Random(kind), 0
    for _ in range(150):
        content = bytearray(whole[: rng.randrange(len(whole))] if rng.random() < 0.5 else whole)
        for _ in range(rng.randrange(6)):
            if content:
                content[rng.randrange(len(content))] = rng.randrange(256)
        try:
            assert decode_image(bytes(content), "damaged").mode == "RGB"
        except ValueError as error:
            assert "damaged" in str(error)
            refused += 1
    assert refused > 0


# Training on what is not all sound


def recipe_for(tmp_path: Path, rows: Path, stage: str = "1", batch: int = 4, **options) -> Recipe:
    """Three steps on a source, on the tiny model."""
    training = {"max_steps": 3, "max_length": 512, **options.pop("training", {})}
    return Recipe(
        stage=stage,
        name="test",
        model=ModelArguments(lora_r=2),
        data=DataArguments(**{"sources": [{"path": str(rows), **options.pop("source", {})}], **options}),
        training=SFTConfig(
            output_dir=str(tmp_path / "out"),
            per_device_train_batch_size=batch,
            learning_rate=1e-2,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            **training,
        ),
    )


def train(recipe: Recipe, model, processor):
    """Train, check that every loss is a number and that weights moved; return the report and what the log names."""
    Path(recipe.training.output_dir).mkdir(parents=True, exist_ok=True)
    mixture = mixture_for_stage(recipe, "answer", processor)
    trainer = make_trainer(recipe, model, processor, mixture.rows)
    projector = next(
        weight for name, weight in trainer.model.named_parameters() if "projector" in name and weight.requires_grad
    )
    before = projector.detach().clone()
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == recipe.training.max_steps
    assert all(loss == loss and loss > 0 for loss in losses)
    log = Path(recipe.training.output_dir) / DROP_LOG
    named = [json.loads(line) for line in log.read_text().splitlines()][1:]
    return mixture.report.to_dict()["sources"], named, not torch.equal(before, projector)


def good(name: str, number: int) -> dict:
    return {"image": name, "prompt": f"What is number {number}?", "completion": f"Figure {number}."}


@pytest.fixture
def mended(folder, make_image):
    """Writes twelve good rows and some others; returns the file."""

    def write(*others) -> Path:
        for number in range(12):
            make_image(number).save(folder / f"{number}.png")
        rows = [good(f"{number}.png", number) for number in range(12)]
        return write_lines(folder / "rows.jsonl", [*rows[:6], *others, *rows[6:]])

    return write


def break_file(folder: Path, kind: str, make_image) -> None:
    if kind == "truncated":
        content = encoded(make_image(5, (64, 64)), "JPEG")
        (folder / "bad.jpg").write_bytes(content[: len(content) // 2])
    elif kind == "text":
        (folder / "bad.jpg").write_text("not a picture")
    elif kind == "bomb":
        (folder / "bad.jpg").write_bytes(bomb())
    elif kind == "loop":
        (folder / "bad.jpg").symlink_to("bad.jpg")


BROKEN = {
    "truncated": (good("bad.jpg", 99), "image that cannot be read"),
    "text": (good("bad.jpg", 99), "image that cannot be read"),
    "bomb": (good("bad.jpg", 99), "image too large"),
    "missing": (good("nowhere.png", 99), "missing image"),
    "escape": (good("../../secret.png", 99), "image outside the folder"),
    "remote": (good("https://example.org/cat.png", 99), "remote image"),
    "empty answer": ({**good("1.png", 99), "completion": "  "}, "empty answer"),
    "no answer": ({"image": "1.png", "prompt": "Who?", "completion": None}, "row that cannot be read"),
    "no json": ('{"image": "1.png", "pro', "row that cannot be read"),
    "markers": ({**good("1.png", 99), "prompt": "<image> and <image>?"}, "image markers do not fit"),
    "forged": ({**good("1.png", 99), "prompt": "<|image_pad|>?"}, "special token in the text"),
    "half a character": ({**good("1.png", 99), "completion": "a\ud800"}, "text that is not Unicode"),
    "another template": ({**good("1.png", 99), "chat_template_kwargs": {"chat_template": "x"}}, "template option"),
    "loop": (good("bad.jpg", 99), "missing image"),
    "too long": ({**good("1.png", 99), "completion": "word " * 200}, "longer than max_length"),
}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", BROKEN)
def test_training_goes_on_past_a_bad_row(kind, streaming, mended, folder, tmp_path, make_image, make_model, processor):
    row, reason = BROKEN[kind]
    break_file(folder, kind, make_image)
    # 24 rows of a source of 13: each is read, and the bad one gives its place to another.
    recipe = recipe_for(tmp_path, mended(row), batch=8, source={"streaming": streaming})
    counts, named, moved = train(recipe, make_model(), processor)
    assert moved
    assert counts[0]["dropped"] == {reason: 1}
    assert {(entry["source"], entry["row"], entry["reason"]) for entry in named} == {("rows.jsonl", 6, reason)}
    assert all(entry["detail"] or kind == "empty answer" for entry in named)


def test_20000_pixels_and_text_rows_train(mended, folder, tmp_path, make_model, processor):
    Image.new("RGB", (20000, 60), (9, 99, 9)).save(folder / "long.png")
    text_only = {"prompt": "Say hello.", "completion": "Hello."}
    recipe = recipe_for(tmp_path, mended(good("long.png", 50), text_only), batch=8)
    counts, named, moved = train(recipe, make_model(), processor)
    assert moved and named == [] and counts[0]["kept"] == counts[0]["available"] == 14


@pytest.mark.parametrize("stage", ["1", "2"])
def test_batches_without_any_image_train(stage, folder, tmp_path, make_model, processor):
    rows = [{"prompt": f"Say {number}.", "completion": f"It is {number}."} for number in range(8)]
    counts, _, moved = train(
        recipe_for(tmp_path, write_lines(folder / "r.jsonl", rows), stage), make_model(), processor
    )
    assert counts[0]["used"] == 12
    assert not moved  # nothing to see, nothing for the projector to learn from; the steps ran all the same


def test_single_rows_a_batch_keep_their_number(mended, tmp_path, make_model, processor):
    recipe = recipe_for(tmp_path, mended(good("nowhere.png", 99)), batch=1, training={"max_steps": 13})
    counts, _, moved = train(recipe, make_model(), processor)
    assert moved and counts[0]["used"] == 13 and counts[0]["kept"] == 12


def test_reading_in_worker_processes_counts_too(mended, folder, tmp_path, make_image, make_model, processor):
    break_file(folder, "truncated", make_image)
    options = {"dataloader_num_workers": 2, "max_steps": 4}
    recipe = recipe_for(tmp_path, mended(good("bad.jpg", 99)), batch=8, training=options)
    counts, _, _ = train(recipe, make_model(), processor)
    assert counts[0]["dropped"] == {"image that cannot be read": 1}


@pytest.mark.parametrize("streaming", [False, True])
def test_too_many_bad_rows_stop_the_run(streaming, folder, tmp_path, make_image, make_model, processor):
    break_file(folder, "truncated", make_image)
    rows = write_lines(
        folder / "rows.jsonl", [good("bad.jpg" if number % 3 else "cat.png", number) for number in range(30)]
    )
    recipe = recipe_for(tmp_path, rows, batch=8, source={"streaming": streaming}, max_bad_share=0.02)
    with pytest.raises(
        ValueError, match=r"3 of \d+ rows read from rows.jsonl are broken, more than max_bad_share=0.02"
    ):
        train(recipe, make_model(), processor)


def test_an_error_of_a_loader_process_is_one_line(folder, tmp_path, make_image, make_model, processor):
    break_file(folder, "text", make_image)
    rows = write_lines(folder / "rows.jsonl", [good("bad.jpg" if row else "cat.png", row) for row in range(30)])
    recipe = recipe_for(tmp_path, rows, batch=8, max_bad_share=0.02, training={"dataloader_num_workers": 1})
    with pytest.raises(SystemExit, match=r"^error: 3 of \d+ rows read from rows.jsonl are broken"):
        cli.run(lambda: train(recipe, make_model(), processor))


def test_bad_rows_stop_before_training_where_looking_is_enough(folder, tmp_path, processor):
    rows = write_lines(folder / "rows.jsonl", [good("nowhere.png", number) for number in range(30)])
    recipe = recipe_for(tmp_path, rows)
    with pytest.raises(ValueError, match=r"6 of 6 rows .*missing image: 6; .*named in dropped_rows.jsonl"):
        mixture_for_stage(recipe, "answer", processor)


def test_a_source_of_long_rows_alone_is_refused(folder, tmp_path, processor):
    rows = write_lines(folder / "rows.jsonl", [{**good("cat.png", 1), "completion": "word " * 200}] * 3)
    with pytest.raises(ValueError, match=r"nothing is left of rows.jsonl, 3 rows: .*longer than max_length.*: 3"):
        mixture_for_stage(recipe_for(tmp_path, rows), "answer", processor)


def test_max_length_counts_image_tokens_exactly(folder, processor):
    rows = write_lines(folder / "rows.jsonl", [good("cat.png", 1)])
    whole = build_mixture(DataArguments(sources=[{"path": str(rows)}]), "answer", 1, processor=processor)
    length = ConversationCollator(processor)([first_row(whole)])["input_ids"].shape[1]
    options = {"task": "answer", "count": 1, "processor": processor}
    data = DataArguments(sources=[{"path": str(rows)}])
    assert first_row(build_mixture(data, max_length=length, **options))
    with pytest.raises(ValueError, match="nothing is left of rows.jsonl, 1 rows: .'longer than max_length'"):
        build_mixture(data, max_length=length - 1, **options)


def test_the_log_starts_anew_with_another_mixture_only(tmp_path):
    log = DropLog(1.0, tmp_path / "log.jsonl")
    log.begin({"mixture": "one"})
    log.add("a", 1, Dropped("refusal"))
    log.add("a", 1, Dropped("refusal"))  # the same row again, by another process or after a restart
    again = DropLog(1.0, tmp_path / "log.jsonl")
    again.begin({"mixture": "one"})
    assert again.merged() == {"a": {"refusal": 1}}
    again.begin({"mixture": "two"})
    assert again.merged() == {}


def test_remote_pictures_are_fetched_when_allowed(folder, monkeypatch, make_image):
    asked = []

    class Opener:
        def open(self, url, timeout):
            asked.append(url)
            return io.BytesIO(encoded(make_image(3)))

    monkeypatch.setattr(remote, "build_opener", lambda *handlers: Opener())
    monkeypatch.setattr("socket.getaddrinfo", lambda *_, **__: [(0, 0, 0, "", ("93.184.216.34", 443))])
    rows = write_lines(folder / "rows.jsonl", [good("https://example.org/cat.png", 1)])
    source = {"path": str(rows), "allow_remote_images": True}
    row = first_row(build_mixture(DataArguments(sources=[source]), "answer", 1))
    assert row["images"][0].tobytes() == make_image(3).tobytes()
    assert set(asked) == {"https://example.org/cat.png"}
    rows = write_lines(folder / "rows.jsonl", [good("file:///etc/passwd", 1)])
    mixture = build_mixture(DataArguments(sources=[source]), "answer", 1)
    with pytest.raises(ValueError, match="no row of rows.jsonl can be read"):
        first_row(mixture)


@pytest.mark.parametrize("files", [1, 3])
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_streams_are_dealt_out_to_their_readers(kind, files, tmp_path):
    """Two loader processes read every row of a pass once between them, whether they share files or rows."""
    for file in range(files):
        rows = [{"prompt": f"{file}/{row}?", "completion": f"{file}/{row}\u2028"} for row in range(6)]
        path = tmp_path / f"train-{file}.{kind}"
        if kind == "parquet":
            write_parquet(path, rows, {"prompt": TEXT, "completion": TEXT})
        else:
            path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    source = {"path": str(tmp_path), "streaming": True}
    mixture = build_mixture(DataArguments(sources=[source]), "answer", None, readers=2)
    loader = DataLoader(mixture.rows, batch_size=3, num_workers=2, collate_fn=lambda rows: rows)
    batches = list(islice(loader, files * 2 if files == 1 else 8))
    read = [text_of(row["messages"][-1]) for batch in batches for row in batch]
    everything = {f"{file}/{row}\u2028" for file in range(files) for row in range(6)}
    assert set(read) == everything
    if files == 1:
        assert len(read) == len(everything)
