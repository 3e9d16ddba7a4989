"""
POPE and CHAIR from COCO's own annotation files: hallucination on photographs, where no drawn truth is at hand.

    python -m siq_vl.evaluation.coco pope instances_val2014.json pope.jsonl --negatives adversarial
    python evaluate_vqa.py --model NAME=CHECKPOINT --source pope.jsonl --image_folder val2014 --metric yes_no

    python -m siq_vl.evaluation.coco chair instances_val2014.json chair.jsonl --captions captions_val2014.json
    python evaluate_vqa.py --model NAME=CHECKPOINT --source chair.jsonl --image_folder val2014
    python -m siq_vl.evaluation.coco score chair.jsonl outputs/evaluation/NAME.jsonl

`pope` writes yes-or-no questions about objects, half of them about objects that are not there; `chair` asks for
descriptions and writes down which objects are there; `score` counts the objects that descriptions mention and the pictures
lack. Annotations: the files `instances_*.json` and `captions_*.json` that COCO publishes. The synonyms of CHAIR's paper are
no part of this repo: `--synonyms FILE` takes them, an object a line, its name among the words, which commas part.
"""

import argparse
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from random import Random

from siq_vl import cli
from siq_vl.evaluation.metrics import METRICS, object_mentions
from siq_vl.evaluation.predictions import read_predictions
from siq_vl.evaluation.tables import markdown

NEGATIVES = ("random", "popular", "adversarial")
# POPE asks about pictures with more than three kinds of objects, three times about one that is there, three about others.
_QUESTIONS = 3
_DESCRIBE = "Describe this image in detail."


def read_objects(path: Path) -> tuple[dict[str, set[str]], list[str]]:
    """Read an `instances_*.json`.

    Returns:
        By the file name of each picture, the names of the objects that it has; and all names, in the file's order.

    Raises:
        ValueError: the file is none of COCO's.
    """
    content = _read(path, ("images", "annotations", "categories"))
    name_of = {category["id"]: category["name"] for category in content["categories"]}
    file_of = {image["id"]: image["file_name"] for image in content["images"]}
    objects: dict[str, set[str]] = {file: set() for file in file_of.values()}
    for annotation in content["annotations"]:
        objects[file_of[annotation["image_id"]]].add(name_of[annotation["category_id"]])
    return objects, list(name_of.values())


def read_captions(path: Path) -> dict[str, list[str]]:
    """Read a `captions_*.json`: by the file name of each picture, its captions.

    Raises:
        ValueError: the file is none of COCO's.
    """
    content = _read(path, ("images", "annotations"))
    file_of = {image["id"]: image["file_name"] for image in content["images"]}
    captions: dict[str, list[str]] = {}
    for annotation in content["annotations"]:
        if "caption" not in annotation:
            raise ValueError(f"{path} has an annotation without `caption`: pass a captions_*.json")
        captions.setdefault(file_of[annotation["image_id"]], []).append(annotation["caption"].strip())
    return captions


def _read(path: Path, keys: Sequence[str]) -> dict:
    if not path.is_file():
        raise ValueError(f"{path} does not exist: pass an annotation file of COCO's, such as instances_val2014.json")
    content = json.loads(path.read_text(encoding="utf-8"))
    missing = [key for key in keys if key not in content]
    if missing:
        raise ValueError(
            f"{path} has no {', '.join(missing)}: pass an annotation file of COCO's, such as instances_val2014.json"
        )
    return content


def pope_rows(
    objects: Mapping[str, set[str]], names: Sequence[str], negatives: str, count: int, seed: int
) -> list[dict]:
    """Return POPE's questions: six about each picture, three about objects that it has and three about others.

    Source: Li et al., "Evaluating Object Hallucination in Large Vision-Language Models", EMNLP 2023, section 5.

    Args:
        objects: by picture, the objects that it has.
        names: every name of an object.
        negatives: which absent objects are asked about: `"random"` ones; `"popular"` ones, which most pictures have;
            `"adversarial"` ones, which stand most often beside those that are there.
        count: pictures, at random from those with more than three kinds of objects.
        seed: of all draws.

    Raises:
        ValueError: unknown negatives, or no picture with more than three kinds of objects.
    """
    if negatives not in NEGATIVES:
        raise ValueError(f"negatives is {negatives!r}; it must be one of {', '.join(NEGATIVES)}")
    rng = Random(seed)
    usable = sorted(file for file, shown in objects.items() if len(shown) > _QUESTIONS)
    if not usable:
        raise ValueError(f"none of {len(objects)} pictures has more than {_QUESTIONS} kinds of objects, as POPE wants")
    pictures_with: Counter[str] = Counter()
    pictures_with_both: Counter[tuple[str, str]] = Counter()
    for shown in objects.values():
        pictures_with.update(shown)
        for pair in combinations(sorted(shown), 2):
            pictures_with_both.update([pair, pair[::-1]])

    rows = []
    for file in rng.sample(usable, min(count, len(usable))):
        present = sorted(objects[file])
        absent = [name for name in names if name not in objects[file]]
        rng.shuffle(absent)  # of those that are equally common, too, some are picked at random
        if negatives == "popular":
            absent.sort(key=lambda name: -pictures_with[name])
        elif negatives == "adversarial":
            beside: Counter[str] = Counter()
            for name in absent:
                for other in present:
                    beside[name] += pictures_with_both[name, other]
            absent.sort(key=lambda name: -beside[name])
        for there, not_there in zip(rng.sample(present, _QUESTIONS), absent, strict=False):
            for name, answer in ((there, "yes"), (not_there, "no")):
                article = "an" if name[0] in "aeiou" else "a"
                question = f"Is there {article} {name} in the image?"
                rows.append({"image": file, "question": question, "answer": answer, "type": negatives})
    return rows


def read_synonyms(path: Path | None, names: Sequence[str]) -> dict[str, list[str]]:
    """Return the words for every object: those of its line in the file, or its name alone.

    Raises:
        ValueError: a line without the name of an object.
    """
    vocabulary: dict[str, list[str]] = {name: [] for name in names}
    if path is None:
        return vocabulary
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        words = [word.strip() for word in line.split(",") if word.strip()]
        named = [word for word in words if word in vocabulary]
        if words and not named:
            raise ValueError(
                f"line {number} of {path} is {line!r}; one of its words must be an object of the annotations"
            )
        if words:
            vocabulary[named[0]] += words
    return vocabulary


def chair_rows(
    objects: Mapping[str, set[str]],
    captions: Mapping[str, Sequence[str]],
    vocabulary: Mapping[str, Sequence[str]],
    count: int,
    seed: int,
) -> list[dict]:
    """Return requests for descriptions, each with the objects that the picture has: annotated, or in one of its captions.

    Args:
        objects: by picture, the objects that are annotated.
        captions: by picture, its reference captions.
        vocabulary: words by object.
        count: pictures, at random from those with captions.
        seed: of the draw.

    Raises:
        ValueError: the two files share no picture.
    """
    usable = sorted(set(objects) & set(captions))
    if not usable:
        raise ValueError("no picture has both objects and captions: pass two annotation files of one split")
    rows = []
    for file in Random(seed).sample(usable, min(count, len(usable))):
        shown = set(objects[file])
        for caption in captions[file]:
            shown.update(object_mentions(caption, vocabulary))
        rows.append(
            {"image": file, "question": _DESCRIBE, "answer": captions[file][0], "objects": sorted(shown)}
        )  # fmt: skip
    return rows


def chair_table(rows: Sequence[Mapping], predictions: Path, vocabulary: Mapping[str, Sequence[str]]) -> str:
    """Return CHAIR of a model's descriptions, with what it depends on: how much they say.

    Args:
        rows: what `chair_rows` returned.
        predictions: what `evaluate_vqa.py` kept of the model.
        vocabulary: words by object.

    Raises:
        ValueError: the predictions are of other rows.
    """
    descriptions, objects = [], []
    for prediction in read_predictions(predictions):
        place = int(prediction.id.rpartition("/")[2])
        if place >= len(rows) or prediction.question != rows[place]["question"]:
            raise ValueError(
                f"{predictions} answers {prediction.id}, {prediction.question!r}, which is none of the rows"
            )
        if prediction.scored:
            descriptions.append(prediction.output)
            objects.append(rows[place]["objects"])
    found = METRICS["chair"].compute(descriptions, objects, vocabulary=vocabulary)
    mentioned = sum(row["mentioned"] for row in found["per_sample"])
    words = sum(len(description.split()) for description in descriptions)
    return markdown(
        [
            ["descriptions", "CHAIRs, %", "CHAIRi, %", "objects each", "words each"],
            [
                str(len(descriptions)),
                f"{100 * found['chair_s']:.1f}",
                f"{100 * found['chair_i']:.1f}",
                f"{mentioned / len(descriptions):.1f}",
                f"{words / len(descriptions):.1f}",
            ],
        ]
    )


def _parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    pope = commands.add_parser("pope", help="write questions about objects that are there, and about others")
    chair = commands.add_parser("chair", help="write requests for descriptions, with the objects that are there")
    score = commands.add_parser("score", help="print CHAIR of the descriptions that evaluate_vqa.py kept")
    for command in (pope, chair):
        command.add_argument("instances", type=Path, help="COCO's instances_*.json")
        command.add_argument("rows", type=Path, help="the file to write, JSON lines")
        command.add_argument("--count", type=int, default=500, help="pictures, drawn at random")
        command.add_argument("--seed", type=int, default=0, help="of the draws")
    pope.add_argument("--negatives", choices=NEGATIVES, default="random", help="which absent objects are asked about")
    chair.add_argument("--captions", type=Path, required=True, help="COCO's captions_*.json of the same split")
    score.add_argument("rows", type=Path, help="what `chair` wrote")
    score.add_argument("predictions", type=Path, help="what evaluate_vqa.py kept, <output>/<name>.jsonl")
    chair.add_argument("--synonyms", type=Path, help="words for the objects, an object a line, with commas")
    return parser.parse_args()


def main() -> None:
    """Run the command."""
    options = _parse_options()
    # The words for objects lie beside the rows: a model is scored by those that its pictures' objects were found with.
    words_file = options.rows.with_suffix(".words.json")
    if options.command == "score":
        rows = [json.loads(line) for line in options.rows.read_text(encoding="utf-8").splitlines()]
        vocabulary = json.loads(words_file.read_text(encoding="utf-8"))
        cli.say(chair_table(rows, options.predictions, vocabulary))
        return
    objects, names = read_objects(options.instances)
    options.rows.parent.mkdir(parents=True, exist_ok=True)
    if options.command == "pope":
        rows = pope_rows(objects, names, options.negatives, options.count, options.seed)
    else:
        vocabulary = read_synonyms(options.synonyms, names)
        rows = chair_rows(objects, read_captions(options.captions), vocabulary, options.count, options.seed)
        words_file.write_text(json.dumps(vocabulary), encoding="utf-8")
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    options.rows.write_text("".join(lines), encoding="utf-8")
    cli.say(f"{len(rows)} questions: {options.rows}")


if __name__ == "__main__":
    cli.run(main)
