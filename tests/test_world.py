"""The drawn world: the same everywhere, consistent with itself, honest about its splits, and true to its labels."""

import hashlib
import re
from collections import Counter
from dataclasses import replace
from random import Random

import numpy as np
import pytest

from siq_vl.data.figures.rows import row
from siq_vl.data.world import lexicon
from siq_vl.data.world.canvas import Canvas, bordered, turned
from siq_vl.data.world.charts import Chart, ColumnChart, PieChart
from siq_vl.data.world.dataset import DOMAINS, LOOKS, SPLITS, STYLES, content_split, rationale, sample
from siq_vl.data.world.documents import Form, Receipt, Signs
from siq_vl.data.world.figure import NATIVE, NOT_SHOWN, Look
from siq_vl.data.world.fonts import CHARACTERS, FACES, HELD_OUT_FACES, letter
from siq_vl.data.world.labels import cell_words, character_labels
from siq_vl.data.world.scenes import Scene

# Of pixels, captions, questions and answers of 90 training samples. It changes only when the world changes, and then
# every number measured on it has to be measured again.
FINGERPRINT = "592b21870d2b42f91830a77795b9f6e899d78d5b8cead3b866b215b95e460912"
FACE = FACES[0]


def made(split: str, count: int, **options) -> list:
    return [sample(split, index, **options) for index in range(count)]


def test_same_bytes_everywhere():
    digest = hashlib.sha256()
    for each in made("train", 90):
        digest.update(each.image.tobytes())
        digest.update("|".join((each.figure.caption, each.question.text, each.question.answer)).encode())
    assert digest.hexdigest() == FINGERPRINT


def test_seed_and_index_decide_the_sample():
    first, again, other = sample("train", 7), sample("train", 7), sample("train", 7, seed=1)
    assert first == again
    assert first.drawn.image.tobytes() == again.drawn.image.tobytes()
    assert first.drawn.letters == again.drawn.letters
    assert first.figure != other.figure


@pytest.mark.parametrize("look", LOOKS)
def test_a_look_changes_no_fact(look):
    for index in range(12):
        usual, dressed = sample("test", index, seed=3), sample("test", index, seed=3, look=look)
        assert (dressed.figure, dressed.question) == (usual.figure, usual.question)


def test_held_out_faces_are_not_trained_on():
    families = {face.family for face in Look().faces}
    assert not families & {face.family for face in HELD_OUT_FACES}
    assert LOOKS["fonts"].faces == HELD_OUT_FACES


@pytest.mark.parametrize("split", SPLITS)
def test_splits_are_disjoint_by_content(split):
    assert {content_split(each.figure) for each in made(split, 200) if each.figure.domain != "nothing"} == {split}


@pytest.mark.parametrize("hard", [None, False, True])
@pytest.mark.parametrize("split", SPLITS)
def test_every_split_has_samples_of_either_sort(split, hard):
    for index in range(12):
        drawn = sample(split, index, hard=hard, seed=9)
        assert drawn.drawn.image.mode == "RGB"
        assert hard is None or drawn.hard == hard


def test_neither_order_nor_drawing_moves_a_content_to_another_split():
    for each in made("train", 400, domain="charts", hard=False):
        figure = each.figure
        assert isinstance(figure, Chart)
        backwards = replace(figure, entries=figure.entries[::-1], top=100, title="Rain")
        as_pie = PieChart(figure.about, figure.entries, 100, True, "")
        assert content_split(backwards) == content_split(as_pie) == "train"
    for each in made("test", 100, domain="scenes"):
        assert content_split(Scene(each.figure.objects[::-1])) == "test"


def test_no_training_content_is_evaluated():
    trained = {each.figure.content for seed in range(2) for each in made("train", 800, seed=seed)}
    evaluated = {each.figure.content for split in SPLITS[1:] for each in made(split, 150)}
    assert not trained & evaluated


def test_training_never_shows_held_out_combinations():
    for each in made("train", 1000):
        figure = each.figure
        if isinstance(figure, Scene):
            assert not {(color, name) for name, color, _ in figure.objects} & lexicon.HELD_OUT_OBJECTS
        elif isinstance(figure, Chart):
            assert (figure.about, len(figure.entries)) not in lexicon.HELD_OUT_SERIES
        elif isinstance(figure, Signs):
            assert not {word for _, word in figure.boards} & lexicon.HELD_OUT_SIGNS
            assert not any(word in each.question.text.split() for word in lexicon.HELD_OUT_SIGNS)
        elif isinstance(figure, Form):
            names = {name for name, _ in figure.fields}
            assert not any(set(pair) <= names for pair in lexicon.HELD_OUT_FIELDS)


def test_every_kind_and_question_type_occurs():
    samples = made("test", 600)
    assert {each.figure.kind for each in samples} == {
        "scene", "columns", "rows", "line", "pie", "stack", "receipt", "sign", "form", "plate", "book", "nothing",
    }  # fmt: skip
    for domain in DOMAINS:
        types = {each.question.type for each in samples if each.figure.domain == domain}
        assert types >= {"yes_no", "unanswerable"}
    assert 0.08 < sum(each.hard for each in samples) / len(samples) < 0.22


def test_only_what_is_not_shown_is_unanswerable():
    asked = Counter()
    for each in made("train", 900, hard=False):
        declined = each.question.answer == NOT_SHOWN
        asked[each.figure.domain, declined] += 1
        assert declined == (each.question.type == "unanswerable")
        if declined and each.figure.facts:
            (step,) = each.question.steps
            assert step.removeprefix("no ") not in {word for fact in each.figure.facts for word in fact}
    for domain in DOMAINS:
        assert 0.03 < asked[domain, True] / (asked[domain, True] + asked[domain, False]) < 0.14
    assert asked["nothing", True]


def answer_from_caption(question: str, caption: str) -> str | None:
    """Work an answer out from the caption alone, by other code than the world's; None where it does not know how."""
    kind, _, listed = caption.partition(": ")
    facts = [fact.split() for fact in listed.split(", ")]
    if kind in ("columns", "rows", "line", "pie", "receipt"):
        values = {key: int(value) for key, value in facts if value.isdigit()}
        named = [word for word in re.findall(r"\w+", question) if word in values]
        if question.startswith(("What is the sum of all", "What is the total", "How much is everything")):
            return str(sum(values.values()))
        if question.startswith(("What is the sum of", "How much are")) and len(named) == 2:
            return str(values[named[0]] + values[named[1]])
        if "difference between" in question or question.startswith("How far apart"):
            return str(abs(values[named[0]] - values[named[1]]))
        if question.startswith(("Is ", "Does ")) and len(named) == 2:
            return "yes" if values[named[0]] > values[named[1]] else "no"
        if question.startswith(("What is the value of", "How much is")):
            return str(values[named[0]]) if named else NOT_SHOWN
        if question.startswith(("Which is the highest", "Which one has the most", "Which item costs the most")):
            return max(values, key=values.get)
        return None
    if kind == "scene":
        place_of = {name: place for place, name, _ in facts}
        color_of = {name: color for _, name, color in facts}
        last = question[:-1].split()[-1]
        if question.startswith("Where is"):
            return place_of.get(last, NOT_SHOWN)
        if question.startswith("What color is the") and " next to " not in question:
            return color_of.get(last, NOT_SHOWN)
        if question.startswith("How many objects are there"):
            return str(len(facts))
        if match := re.match(r"How many objects are (\w+)", question):
            return str(list(color_of.values()).count(match[1]))
        if match := re.match(r"Is the (\w+) further left than the (\w+)", question):
            one, other = (lexicon.PLACES.index(place_of[name]) % 3 for name in match.groups())
            return "yes" if one < other else "no"
        return None
    if kind == "form" and question.startswith(("What is the", "What does the form say for")):
        return dict(facts).get(question[:-1].split()[-1], NOT_SHOWN)
    return None


def test_answers_follow_from_captions():
    checked = Counter()
    for each in [*made("train", 1500), *made("test", 90, hard=True)]:
        expected = answer_from_caption(each.question.text, each.figure.caption)
        if expected is not None:
            assert each.question.answer == expected, (each.question.text, each.figure.caption)
            checked[each.figure.domain] += 1
    assert min(checked[domain] for domain in DOMAINS) > 130


def test_rationales_state_true_facts_and_true_arithmetic():
    sums = 0
    for each in made("train", 800):
        text = rationale(each.figure, each.question)
        assert text.startswith(each.figure.caption)
        for left, operator, right, result in re.findall(r"(\d+) ([+-]) (\d+) = (\d+)", text):
            assert int(left) + int(right) * (1 if operator == "+" else -1) == int(result)
            sums += 1
        for left, sign, right in re.findall(r"(\d+) ([<>]) (\d+)", text):
            assert (int(left) > int(right)) == (sign == ">")
    assert sums > 60


def test_values_off_an_axis_can_be_told_apart():
    for each in made("train", 300, domain="charts", hard=True):
        figure = each.figure
        if isinstance(figure, Chart) and not figure.printed:
            assert all(value % max(1, figure.top // 20) == 0 for _, value in figure.entries)
            assert figure.hard


def test_rows_for_training_can_be_made_of_samples():
    told = row(sample("train", 4), "answer")
    assert told["completion"][0]["content"][0]["text"] == sample("train", 4).question.answer
    assert told["images"][0].mode == "RGB"


def test_pictures_have_many_sizes_and_large_ones_are_large():
    sizes = {each.image.size for each in made("train", 60)}
    assert len(sizes) > 20
    assert all(min(size) >= 0.7 * NATIVE and max(size) <= 3 * NATIVE for size in sizes)
    assert all(max(each.image.size) > 1.7 * NATIVE for each in made("train", 10, look="large", domain="documents"))


@pytest.mark.parametrize("face", [*FACES, *HELD_OUT_FACES], ids=lambda face: face.file)
def test_every_face_has_every_character_where_the_labels_say(face):
    shapes = {letter(character, face, 22).mask.tobytes() for character in CHARACTERS}
    assert len(shapes) == len(CHARACTERS)
    for text in ("oxo", "888"):
        for size in (11, 22):
            lettering = letter(text, face, size)
            ink = np.asarray(lettering.mask, dtype=float)
            # Every letter has ink about its centre, and the ink of a symmetric text is about the middle of all.
            for centre in lettering.centres:
                low, high = round(centre - 0.3 * size), round(centre + 0.3 * size)
                assert ink[:, max(0, low) : high].sum() > 0
            middle = (ink.sum(0) * np.arange(ink.shape[1])).sum() / ink.sum()
            assert abs(middle - np.mean(lettering.centres)) < 0.16 * size
            rows = (ink.sum(1) * np.arange(ink.shape[0])).sum() / ink.sum()
            assert abs(rows - lettering.middle) < 0.16 * size


def test_marks_move_with_the_picture():
    canvas = Canvas(160, 100, (255, 255, 255))
    canvas.pen.rectangle((118, 28, 126, 36), fill=(255, 0, 0))
    canvas.mark((118, 28, 126, 36), seen=("red",))
    for changed in (
        turned(canvas.drawn, 3.5, (255, 255, 255)),
        turned(canvas.drawn, -3.5, (255, 255, 255)),
        bordered(canvas.drawn, 12, 5, -20, 7, (0, 0, 0)),
        canvas.drawn.resized(128, 128),
        turned(canvas.drawn, 2, (0, 0, 0)).resized(96, 200),
    ):
        left, top, right, bottom = changed.regions[0].box
        red, green, _ = changed.image.getpixel((round((left + right) / 2), round((top + bottom) / 2)))
        assert (red, green) == (255, 0)


def test_characters_are_labelled_in_the_half_patch_of_their_centre():
    canvas = Canvas(32, 16, (255, 255, 255))
    canvas.write(11, 4, "A", FACE, 11, (0, 0, 0), align=0.5)
    canvas.write(29, 13, "7", FACE, 11, (0, 0, 0), align=0.5)
    labels = character_labels(canvas.drawn, 8)
    assert labels.shape == (8, 2)
    found = {(int(patch), int(half)): CHARACTERS[labels[patch, half] - 1] for patch, half in np.argwhere(labels)}
    assert found == {(1, 0): "A", (7, 1): "7"}


def test_cells_know_what_they_show_and_what_it_belongs_to():
    canvas = Canvas(64, 32, (255, 255, 255))
    canvas.write(2, 8, "Jan", FACE, 12, (0, 0, 0), facts=("Jan", "12"))
    canvas.mark((34, 18, 46, 30), facts=("Jan", "12"))
    ids = {"Jan": 0, "12": 1, "Feb": 2}
    seen, facts = cell_words(canvas.drawn, 16, ids)
    assert seen.shape == facts.shape == (8, 3)
    assert seen[0].tolist() == [True, False, False]
    assert facts[0].tolist() == facts[6].tolist() == [True, True, False]
    assert not facts[3].any()


def test_printed_facts_are_where_they_are_labelled():
    """Of every word of a fact that a receipt prints there is a region that names it, inside the picture."""
    for each in made("train", 40, domain="documents", hard=False):
        if isinstance(each.figure, Receipt):
            drawn = each.figure.paint(Look(finished=False), Random(0))
            seen = {word for region in drawn.regions for word in region.seen}
            assert {word for fact in each.figure.facts for word in fact} <= seen
            width, height = drawn.image.size
            for one in drawn.letters:
                assert 0 <= one.x < width and 0 <= one.y < height


def test_colours_survive_where_they_are_asked_for():
    assert ColumnChart.gray and Receipt.gray
    assert not Scene.gray and not Signs.gray


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "tests"}, "split is 'tests'; it must be one of train"),
        ({"domain": "maps"}, "domain is 'maps'; it must be one of scenes"),
        ({"look": "blue"}, "look is 'blue'; it must be one of trained"),
        ({"domain": "scenes", "hard": True}, "'scenes', which has no hard samples"),
        ({"split": "combinations", "domain": "documents", "hard": True}, "'combinations' has no hard documents"),
    ],
)
def test_wrong_arguments_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        sample(options.pop("split", "test"), 0, **options)


def test_unknown_style_is_refused():
    each = sample("test", 0)
    assert [bool(rationale(each.figure, each.question, style)) for style in STYLES] == [True] * 3
    with pytest.raises(ValueError, match="style is 'long'; it must be one of structured"):
        rationale(each.figure, each.question, "long")
