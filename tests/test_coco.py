"""POPE and CHAIR from COCO's annotation files: a miniature by hand, and every number worked out."""

import json
import sys
from pathlib import Path

import pytest
from PIL import Image

import evaluate_vqa
from siq_vl.data.sources import Source, SourceConfig
from siq_vl.evaluation import coco
from siq_vl.evaluation.items import items_of
from siq_vl.evaluation.predictions import judge, write_predictions
from siq_vl.evaluation.tables import yes_no_table

NAMES = ["person", "dog", "cat", "apple", "dining table", "car", "bus", "kite", "bench"]
# Objects of each picture. Beside a person stand: dog 3 times, cat twice, dining table twice, car and bus once.
OBJECTS = {
    "1.jpg": ["person", "dog", "cat", "dining table"],
    "2.jpg": ["person", "dog", "cat", "dining table", "car"],
    "3.jpg": ["person", "dog", "bus"],
    "4.jpg": ["apple", "kite"],
    "5.jpg": ["apple", "kite"],
    "6.jpg": ["apple"],
    "7.jpg": [],
}
CAPTIONS = {"1.jpg": ["A man with a dog.", "Two people and an apple"], "4.jpg": ["a red kite"]}


def instances() -> dict:
    annotations = []
    for image, names in enumerate(OBJECTS.values()):
        # An object that is there twice is annotated twice.
        annotations += [{"image_id": image, "category_id": 10 + NAMES.index(name)} for name in (*names, *names[:1])]
    return {
        "images": [{"id": place, "file_name": file} for place, file in enumerate(OBJECTS)],
        "categories": [{"id": 10 + place, "name": name, "supercategory": "?"} for place, name in enumerate(NAMES)],
        "annotations": annotations,
    }


def captions() -> dict:
    files = list(OBJECTS)
    annotations = []
    for file, texts in CAPTIONS.items():
        annotations += [{"image_id": files.index(file), "caption": f"{text}\n"} for text in texts]
    return {"images": instances()["images"], "annotations": annotations}


def write_miniature(folder: Path, instances_file: str, captions_file: str, pictures: str) -> None:
    (folder / instances_file).write_text(json.dumps(instances()))
    (folder / captions_file).write_text(json.dumps(captions()))
    (folder / pictures).mkdir()
    for place, file in enumerate(OBJECTS):
        Image.new("RGB", (96, 96), (30 * place, 99, 99)).save(folder / pictures / file)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    write_miniature(tmp_path, "instances.json", "captions.json", "pictures")
    (tmp_path / "synonyms.txt").write_text("man, people, person\n\ntable, dining table\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def command(folder, monkeypatch, capsys):
    def run(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["coco", *arguments])
        coco.main()
        return capsys.readouterr().out

    return run


def rows_of(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("negatives", coco.NEGATIVES)
def test_pope_asks_three_times_about_what_is_there_and_three_times_about_what_is_not(command, folder, negatives):
    command("pope", "instances.json", "pope.jsonl", "--negatives", negatives)
    rows = rows_of(folder / "pope.jsonl")
    assert {row["image"] for row in rows} == {"1.jpg", "2.jpg"}  # the others have three kinds of objects at most
    for row in rows:
        name = row["question"].removeprefix("Is there an " if " an " in row["question"] else "Is there a ")
        name = name.removesuffix(" in the image?")
        assert (row["answer"] == "yes") == (name in OBJECTS[row["image"]])
        assert (" an apple " in row["question"]) == (name == "apple")
    for image in ("1.jpg", "2.jpg"):
        questions = [row["question"] for row in rows if row["image"] == image]
        assert len(questions) == len(set(questions)) == 6


def absent_objects(rows, image: str) -> set[str]:
    questions = [row["question"] for row in rows if row["image"] == image and row["answer"] == "no"]
    return {name for name in NAMES for question in questions if f" {name} in" in question}


def test_popular_and_adversarial_objects():
    objects = {file: set(names) for file, names in OBJECTS.items()}
    popular = coco.pope_rows(objects, NAMES, "popular", 9, 0)
    assert absent_objects(popular, "2.jpg") >= {"apple", "kite"}  # in three and two pictures; the bus in one
    # With what the first picture shows: the car four times (in the second), the bus twice (in the third), others never.
    adversarial = coco.pope_rows(objects, NAMES, "adversarial", 9, 0)
    assert absent_objects(adversarial, "1.jpg") >= {"car", "bus"}
    assert coco.pope_rows(objects, NAMES, "random", 1, 0) != coco.pope_rows(objects, NAMES, "random", 1, 1)
    assert len(coco.pope_rows(objects, NAMES, "random", 1, 0)) == 6
    with pytest.raises(ValueError, match="negatives is 'rare'; it must be one of random, popular, adversarial"):
        coco.pope_rows(objects, NAMES, "rare", 1, 0)
    with pytest.raises(ValueError, match="none of 1 pictures has more than 3 kinds of objects"):
        coco.pope_rows({"3.jpg": objects["3.jpg"]}, NAMES, "random", 1, 0)


def test_pope_is_evaluated_as_a_source(command, folder, monkeypatch, capsys):
    command("pope", "instances.json", "pope.jsonl")

    def run(model, processor, items, path, settings, *, identity, progress):
        return [judge(item, "No." if place == 0 else "It is hard to say" if place == 1 else "Yes, there is") for place, item in enumerate(items)]  # fmt: skip

    monkeypatch.setattr(evaluate_vqa, "run", run)
    monkeypatch.setattr(evaluate_vqa, "load_any", lambda *arguments, **options: (None, None))
    arguments = ["--model", "m=.", "--source", "pope.jsonl", "--image_folder", "pictures", "--metric", "yes_no"]
    monkeypatch.setattr(sys, "argv", ["evaluate_vqa.py", *arguments])
    evaluate_vqa.main()
    # Of twelve: a false no; what is neither, where no was right, counts as a yes; five right ones and five false ones.
    tp, fp, fn = 5, 6, 1
    precision, recall = tp / (tp + fp), tp / (tp + fn)
    expected = [tp / 12, precision, recall, 2 * tp / (2 * tp + fp + fn), 10 / 12, 1 / 12]
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| m ")]
    assert [cell.strip() for cell in line.strip("|").split("|")] == ["m", "12", *(f"{100 * x:.1f}" for x in expected)]


def test_chair_counts_what_neither_annotators_nor_captions_saw(command, folder):
    command("chair", "instances.json", "chair.jsonl", "--captions", "captions.json", "--synonyms", "synonyms.txt")
    rows = rows_of(folder / "chair.jsonl")
    by_image = {row["image"]: row["objects"] for row in rows}
    # The apple of a caption counts; a man is a person.
    assert by_image == {"1.jpg": ["apple", "cat", "dining table", "dog", "person"], "4.jpg": ["apple", "kite"]}
    source = Source(SourceConfig(path="chair.jsonl", split="test", image_folder="pictures"))
    items = items_of(source)
    assert [item.open_images()[0].size for item in items] and items[0].question == "Describe this image in detail."
    # One description names a man, a table and a bus that is not there; the other one a kite.
    said = {"1.jpg": "A man at a table, and a bus", "4.jpg": "Kites!"}
    predictions = [judge(item, said[row["image"]]) for item, row in zip(items, rows, strict=True)]
    write_predictions(predictions, folder / "model.jsonl")
    *_, line = command("score", "chair.jsonl", "model.jsonl").splitlines()
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells == ["2", "50.0", f"{100 / 4:.1f}", "2.0", "4.5"]
    others = [judge(item, "a") for item in items_of(Source(SourceConfig(path="chair.jsonl", split="test")))]
    write_predictions([*others, *others], folder / "other.jsonl")
    (folder / "chair.jsonl").write_text(json.dumps({**rows[0], "question": "What?"}) + "\n")
    with pytest.raises(ValueError, match="answers chair.jsonl/0, 'Describe this image in detail.', which is none of"):
        command("score", "chair.jsonl", "other.jsonl")


def test_other_files_are_refused(command, folder):
    with pytest.raises(ValueError, match="nothing.json does not exist: pass an annotation file"):
        command("pope", "nothing.json", "pope.jsonl")
    with pytest.raises(ValueError, match="captions.json has no categories: pass an annotation file"):
        command("pope", "captions.json", "pope.jsonl")
    with pytest.raises(ValueError, match="instances.json has an annotation without `caption`"):
        command("chair", "instances.json", "chair.jsonl", "--captions", "instances.json")
    (folder / "synonyms.txt").write_text("zebra, horse\n")
    with pytest.raises(
        ValueError, match="line 1 of synonyms.txt is 'zebra, horse'; one of its words must be an object"
    ):
        command("chair", "instances.json", "c.jsonl", "--captions", "captions.json", "--synonyms", "synonyms.txt")


def test_the_table_of_a_model_without_scores_is_empty():
    assert len(yes_no_table({"m": []}).splitlines()) == 2
