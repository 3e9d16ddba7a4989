"""
Miniatures of the data sets: their configurations, splits, file names, columns and types, and a handful of drawn rows each.

What of a layout is read off a public page, and what is assumed, is said in docs/hub.md.
"""

import io
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from random import Random
from typing import Any

import yaml
from datasets import ClassLabel, Dataset, Features, Image, List, Value
from PIL import Image as Pictures
from PIL import ImageDraw

ROWS = 32  # of each split
COUNT = 2  # what the miniatures of the teachers answer to every question
_TEXT, _NUMBER = Value("string"), Value("int64")
_RATINGS = ("relevance", "visual_dependency", "image_correspondence", "formatting")
_WORDS = {2: "two", 3: "three", 4: "four"}
# What a question counts, by the number of the picture; the number itself is drawn from the seed.
_THINGS = ("bars", "boats", "letters", "apples", "windows", "signs", "books", "lamps")
FINEVISION = (
    ("sharegpt4v(coco)", "sharegpt4v(knowledge)", "sharegpt4v(llava)", "sharegpt4v(sam)")
    + ("LLaVA_Instruct_150K", "cocoqa", "chartqa", "ocrvqa", "textvqa")
)  # fmt: skip


class Drawn:
    """One drawn picture and what there is to say of it.

    Args:
        seed: decides all of it.
        index: of the row.
    """

    def __init__(self, seed: str, index: int):
        random = Random(f"{seed}/{index}")
        self.index = index
        self.thing = _THINGS[index % len(_THINGS)]
        # Most pictures show what the teachers say that they show; verification has to reject the others.
        self.count = COUNT if index % 4 else 3
        self.question = f"How many {self.thing} are shown in picture {index}?"
        self.caption = (
            f"Picture {index} shows {_WORDS[self.count]} {self.thing} side by side, each of them painted in its own colour, "
            "on a plain background without any other things."
        )
        # Wide, high and square ones; one in eight is larger than the models read.
        self.size = ((96, 96), (128, 96), (96, 144), (640, 480))[index % 8 // 2 if index % 8 else 3]
        self.background = random.choice(("white", "ivory", "lavender", "honeydew"))
        self.colours = [tuple(random.randrange(40, 220) for _ in range(3)) for _ in range(self.count)]

    def image(self) -> Pictures.Image:
        """Return the picture; of every eight, one is grey and one has a palette."""
        picture = Pictures.new("RGB", self.size, self.background)
        pen = ImageDraw.Draw(picture)
        width, height = self.size
        for place, colour in enumerate(self.colours):
            left = width * (2 * place + 1) // (2 * self.count + 1)
            pen.rectangle((left, height // 4, left + width // (3 * self.count), height * 3 // 4), fill=colour)
        if self.index % 8 == 5:
            return picture.convert("L")
        if self.index % 8 == 6:
            return picture.convert("P")
        return picture

    def encoded(self, name: str) -> dict[str, Any]:
        """Return the picture as `datasets` stores it in a table."""
        buffer = io.BytesIO()
        kind = "JPEG" if name.endswith("jpg") and self.index % 8 != 6 else "PNG"
        self.image().save(buffer, kind)
        return {"bytes": buffer.getvalue(), "path": name}


def finevision(subset: str, split: str, count: int) -> tuple[Features, list[dict]]:
    """FineVision: pictures and turns in lists, four ratings a turn and the least of each."""
    features: dict[str, Any] = {
        "images": List(Image()),
        "texts": List({"user": _TEXT, "assistant": _TEXT}),
        "source": _TEXT,
    }
    for rating in _RATINGS:
        features |= {f"{rating}_ratings": List(_NUMBER), f"{rating}_min": _NUMBER}
    rows = []
    for index in range(count):
        drawn = Drawn(subset, index)
        turns = [_finevision_turn(subset, drawn)]
        if subset in ("ocrvqa", "LLaVA_Instruct_150K", "cocoqa"):  # several questions about one picture
            turns.append({"user": f"Is there a picture of {drawn.thing}?", "assistant": "Yes"})
        row: dict[str, Any] = {
            "images": [drawn.encoded(f"{index}.png")],
            "texts": turns,
            "source": subset,
        }
        for place, rating in enumerate(_RATINGS):
            scores = [(index + place) % 4 + 2 for _ in turns]
            row |= {f"{rating}_ratings": scores, f"{rating}_min": min(scores)}
        rows.append(row)
    return Features(features), rows


def _finevision_turn(subset: str, drawn: Drawn) -> dict[str, str]:
    if subset.startswith("sharegpt4v"):
        return {"user": "What do you see happening in this image?", "assistant": drawn.caption}
    answer = str(drawn.count) if subset in ("chartqa", "ocrvqa") else _WORDS[drawn.count]
    if subset == "LLaVA_Instruct_150K":
        return {"user": drawn.question, "assistant": f"There are {_WORDS[drawn.count]} {drawn.thing} in the picture."}
    return {"user": f"{drawn.question}\nAnswer the question with a single word.", "assistant": answer}


def scienceqa(subset: str, split: str, count: int) -> tuple[Features, list[dict]]:
    """ScienceQA: a question with choices, the index of the right one, and a picture or none."""
    texts = ("hint", "task", "grade", "subject", "topic", "category", "skill", "lecture", "solution")
    features = {"image": Image(), "question": _TEXT, "choices": List(_TEXT), "answer": Value("int8")}
    rows = []
    for index in range(count):
        drawn = Drawn(f"scienceqa/{split}", index)
        rows.append(
            {
                "image": drawn.encoded("image.png") if index % 2 else None,
                "question": drawn.question,
                "choices": ["two", "three", "four"],
                "answer": drawn.count - 2,
                **dict.fromkeys(texts, ""),
                "hint": "" if index % 3 else "Look at the picture.",
                "task": "closed choice",
                "grade": "grade2",
                "subject": "natural science",
                "lecture": "Counting tells how many things there are.",
                "solution": f"There are {_WORDS[drawn.count]}.",
            }
        )
    return Features({**features, **dict.fromkeys(texts, _TEXT)}), rows


def textvqa(subset: str, split: str, count: int) -> tuple[Features, list[dict]]:
    """TextVQA: a question and ten answers; of the test split there are none."""
    features = {
        "image_id": _TEXT,
        "question_id": Value("int32"),
        "question": _TEXT,
        "question_tokens": List(_TEXT),
        "image": Image(),
        "image_width": Value("int32"),
        "image_height": Value("int32"),
        "flickr_original_url": _TEXT,
        "flickr_300k_url": _TEXT,
        "answers": List(_TEXT),
        "image_classes": List(_TEXT),
        "set_name": _TEXT,
    }
    rows = []
    for index in range(count):
        drawn = Drawn(f"textvqa/{split}", index)
        answers = [str(drawn.count)] * 7 + [_WORDS[drawn.count]] * 3
        rows.append(
            {
                "image_id": f"{index:016x}",
                "question_id": index,
                "question": drawn.question.casefold(),
                "question_tokens": drawn.question.casefold().strip("?").split(),
                "image": drawn.encoded(f"{index:016x}.jpg"),
                "image_width": drawn.size[0],
                "image_height": drawn.size[1],
                "flickr_original_url": "",
                "flickr_300k_url": "",
                "answers": [""] * 10 if split == "test" else answers,
                "image_classes": ["Poster"],
                "set_name": {"validation": "val"}.get(split, split),
            }
        )
    return Features(features), rows


def chartqa(subset: str, split: str, count: int) -> tuple[Features, list[dict]]:
    """ChartQA: `query`, and `label`, a list of one."""
    features = {
        "image": Image(),
        "query": _TEXT,
        "label": List(_TEXT),
        "human_or_machine": ClassLabel(names=["human", "machine"]),
    }
    rows = []
    for index in range(count):
        drawn = Drawn(f"chartqa/{split}", index)
        query, label = drawn.question, [str(drawn.count)]
        rows.append(
            {"image": drawn.encoded(f"{index}.png"), "query": query, "label": label, "human_or_machine": index % 2}
        )
    return Features(features), rows


def ocrvqa(subset: str, split: str, count: int) -> tuple[Features, list[dict]]:
    """OCR-VQA: several questions on one book cover."""
    features = {
        "image": Image(),
        "image_id": _TEXT,
        "questions": List(_TEXT),
        "answers": List(_TEXT),
        "ocr_tokens": List(_TEXT),
        "title": _TEXT,
        "authorName": _TEXT,
        "genre": _TEXT,
        "image_width": _NUMBER,
        "image_height": _NUMBER,
        "image_url": _TEXT,
        "set_name": _TEXT,
    }
    rows = []
    for index in range(count):
        drawn = Drawn(f"ocrvqa/{split}", index)
        rows.append(
            {
                "image": drawn.encoded(f"{index}.jpg"),
                "image_id": f"{index:010}",
                "questions": [drawn.question, "Is this a cookbook?"],
                "answers": [str(drawn.count), "No"],
                "ocr_tokens": ["A", "BOOK"],
                "title": "A Book",
                "authorName": "Nobody",
                "genre": "Reference",
                "image_width": drawn.size[0],
                "image_height": drawn.size[1],
                "image_url": "",
                "set_name": split,
            }
        )
    return Features(features), rows


Rows = Callable[[str, str, int], tuple[Features, list[dict]]]
# By id: how rows are made, the licence of the card, and, by configuration and split, the files.
TABLES: Mapping[str, tuple[Rows, str | None, Mapping[str, Mapping[str, tuple[str, ...]]]]] = {
    "HuggingFaceM4/FineVision": (
        finevision,
        None,
        {subset: {"train": (f"{subset}/train-00000-of-00001.parquet",)} for subset in FINEVISION},
    ),
    "derek-thomas/ScienceQA": (
        scienceqa,
        "cc-by-sa-4.0",
        {
            "default": {
                "train": ("data/train-00000-of-00001-1028f23e353fbe3e.parquet",),
                "validation": ("data/validation-00000-of-00001-6c7328ff6c84284c.parquet",),
                "test": ("data/test-00000-of-00001-f0e719df791966ff.parquet",),
            }
        },
    ),
    "lmms-lab/textvqa": (
        textvqa,
        None,
        {
            "default": {
                "train": ("data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"),
                "validation": ("data/validation-00000-of-00001.parquet",),
                "test": ("data/test-00000-of-00001.parquet",),
            }
        },
    ),
    "HuggingFaceM4/ChartQA": (
        chartqa,
        "gpl-3.0",
        {
            "default": {
                "train": ("data/train-00000-of-00001-49492f364babfa44.parquet",),
                "val": ("data/val-00000-of-00001-0f11003c77497969.parquet",),
                "test": ("data/test-00000-of-00001-e2cd0b7a0f9eb20d.parquet",),
            }
        },
    ),
    "howard-hou/OCR-VQA": (
        ocrvqa,
        None,
        {
            "default": {
                "train": ("data/train-00000-of-00001.parquet",),
                "validation": ("data/validation-00000-of-00001.parquet",),
                "test": ("data/test-00000-of-00001.parquet",),
            }
        },
    ),
}
LLAVA = "liuhaotian/LLaVA-Instruct-150K"
LLAVA_FILE = "llava_instruct_150k.json"


def write_data(folder: Path, ids: tuple[str, ...] | None = None, count: int = ROWS) -> None:
    """Write the miniatures of data sets below `folder/datasets`.

    Args:
        folder: of the rehearsal's Hub.
        ids: which; all by default.
        count: rows of a split.
    """
    for id, (rows_of, licence, configs) in TABLES.items():
        if ids is None or id in ids:
            write_table(folder / "datasets" / id, rows_of, licence, configs, count)
    if ids is None or LLAVA in ids:
        write_llava(folder / "datasets" / LLAVA, count)


def write_table(
    folder: Path,
    rows_of: Rows,
    licence: str | None,
    configs: Mapping[str, Mapping[str, tuple[str, ...]]],
    count: int,
    renamed: Mapping[str, str] | None = None,
) -> None:
    """Write one data set of parquet files and its card, as `push_to_hub` of `datasets` lays it out.

    Args:
        folder: of the data set.
        rows_of: makes the rows of a configuration's split.
        licence: of the card; None leaves it out.
        configs: by configuration and split, the files.
        count: rows of a split.
        renamed: columns that get another name, to rehearse a layout that has changed.
    """
    about, files_of = [], []
    for config, splits in configs.items():
        told, found = [], []
        features = Features()
        for split, files in splits.items():
            features, rows = rows_of(config, split, count)
            table = Dataset.from_list(rows, features=features)
            for old, new in (renamed or {}).items():
                table = table.rename_column(old, new)
            size = 0
            for place, file in enumerate(files):
                path = folder / file
                path.parent.mkdir(parents=True, exist_ok=True)
                table.shard(len(files), place, contiguous=True).to_parquet(path)
                size += path.stat().st_size
            told.append({"name": split, "num_bytes": size, "num_examples": len(rows)})
            features = table.features
            found.append({"split": split, "path": f"{Path(files[0]).parent}/{split}-*"})
        size = sum(each["num_bytes"] for each in told)
        described = features._to_yaml_list()
        about.append(
            {"config_name": config, "features": described, "splits": told, "download_size": size, "dataset_size": size}
        )
        files_of.append({"config_name": config, "data_files": found})
    card: dict[str, Any] = {"dataset_info": about if len(about) > 1 else about[0], "configs": files_of}
    if licence is not None:
        card["license"] = licence
    (folder / "README.md").write_text(f"---\n{yaml.safe_dump(card, sort_keys=False)}---\n\nA miniature.\n")


def write_llava(folder: Path, count: int) -> None:
    """Write LLaVA-Instruct: JSON files that name COCO's pictures; the pictures are elsewhere."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for index in range(count):
        drawn = Drawn("llava", index)
        turns = [
            {"from": "human", "value": f"{drawn.question}\n<image>"},
            {"from": "gpt", "value": f"There are {_WORDS[drawn.count]} {drawn.thing} in the picture."},
        ]
        rows.append({"id": f"{index:012}", "image": f"{index:012}.jpg", "conversations": turns})
    for name in (LLAVA_FILE, "detail_23k.json"):
        (folder / name).write_text(json.dumps(rows))
    card = {"license": "cc-by-4.0", "task_categories": ["visual-question-answering"]}
    (folder / "README.md").write_text(f"---\n{yaml.safe_dump(card)}---\n\nA miniature.\n")


def write_coco(folder: Path, count: int = ROWS) -> None:
    """Write the pictures that the miniature of LLaVA-Instruct names, as COCO's archive unpacks them."""
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        Drawn("llava", index).image().convert("RGB").save(folder / f"{index:012}.jpg")
