"""The page and its Markdown tables, read back."""

import html
import json
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from siq_vl.evaluation import predictions as kept
from siq_vl.evaluation.held_out import held_out_items
from siq_vl.evaluation.report import select, write_report
from siq_vl.evaluation.summaries import summarize, table3
from siq_vl.evaluation.tables import comparison_line, type_table


@pytest.fixture(scope="module")
def items():
    return held_out_items(30)


@pytest.fixture(scope="module")
def answers(items):
    """A first model that is right on even places, a second that is right on odd ones and makes up a fact on each third."""

    def say(place: int, item, parity: int) -> str:
        if parity and place % 3 == 0:
            return f"<think>{item.caption}. zebra <b>here</b></think><answer>{'wrong' if place % 2 == 0 else item.answer}</answer>"
        return item.answer if place % 2 == parity else "<i>wrong</i>"

    return {
        name: [kept.judge(item, say(place, item, parity)) for place, item in enumerate(items)]
        for parity, name in enumerate(("stage 1", "stage 2"))
    }


class Page(HTMLParser):
    """Collects what the tests ask about; refuses tags that do not close."""

    def __init__(self, text: str):
        super().__init__()
        self.cards, self.images, self.addresses, self.open = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        if tag == "article":
            self.cards.append((found["data-domain"], json.loads(found["data-marks"])))
        if tag == "img":
            self.images.append(found["src"])
        self.addresses += [value for name, value in attributes if name in ("src", "href")]
        if tag in ("article", "table", "svg", "details", "script", "figure"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag in ("article", "table", "svg", "details", "script", "figure"):
            assert self.open.pop() == tag


def test_page_holds_every_question_with_its_picture_and_the_marks_that_filters_read(items, answers, tmp_path):
    write_report(tmp_path / "page.html", items, answers, {"Table": "a < b"}, {"stage 1": [(1, 2.0), (2, 1.0)]})
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    page = Page(text)
    assert not page.open
    assert len(page.cards) == len(page.images) == len(items)
    assert all(address.startswith("data:image/png;base64,") for address in page.addresses)
    for place, (item, (domain, marks)) in enumerate(zip(items, page.cards, strict=True)):
        assert domain == item.domain
        assert marks["stage 1"][0] is (place % 2 == 0)
        assert marks["stage 2"][0] is (place % 2 == 1)
        assert marks["stage 2"][1] is answers["stage 2"][place].hallucinated
        assert (marks["stage 2"][2] > 0) is (place % 3 == 0)
        assert html.escape(item.question) in text
    assert "<i>wrong" not in text and "<b>here" not in text and "a &lt; b" in text
    assert "http" not in text.replace("http-equiv", "")


def test_markdown_holds_the_tables(items, answers, tmp_path):
    write_report(tmp_path / "page.html", items, answers, notes=["stage 2 over stage 1: nothing"])
    written = (tmp_path / "page.md").read_text(encoding="utf-8")
    assert type_table(answers) in written
    assert (
        table3({name: summarize([p for p in made if p.group == "held out"]) for name, made in answers.items()})
        in written
    )
    assert written.endswith("- stage 2 over stage 1: nothing\n")


def test_table3_is_computed_from_the_predictions(items):
    half = [kept.judge(item, item.answer if place % 2 else "nonsense") for place, item in enumerate(items[:20])]
    found = summarize(half)
    assert found.accuracy == 0.5
    assert found.curve[:4] == [0, 0.5, pytest.approx(1 / 3), 0.5]
    assert found.length == 0
    said = [kept.judge(item, f"<think>{item.reasoning}</think><answer>{item.answer}</answer>") for item in items[:20]]
    assert (summarize(said).rouge_l, summarize(said).hallucination, summarize(said).well_formed) == (1, 0, 1)
    rows = {line.split("|")[1].strip(): line for line in table3({"half": found, "said": summarize(said)}).splitlines()}
    assert "50.0" in rows["accuracy, percent"] and "0.500" in rows["- the report's: 1 - accuracy"]
    assert rows["ROUGE-L of the rationale"].split("|")[3].strip() == "1.000"


def test_questions_that_cannot_be_scored_are_shown_and_not_counted(items, tmp_path):
    broken = replace(items[0], images=(b"not a picture",))
    made = [kept.judge(broken, "", kept.IMAGE, "it is damaged"), *(kept.judge(item, item.answer) for item in items[1:])]
    write_report(tmp_path / "page.html", [broken, *items[1:]], {"model": made})
    page = Page((tmp_path / "page.html").read_text(encoding="utf-8"))
    assert page.cards[0][1]["model"][0] is None
    assert len(page.images) == len(items) - 1
    assert summarize(made).accuracy == 1


def test_gallery_has_some_of_every_filter(items):
    wanted = {"won": 3, "lost": 7, "made up": 11}
    first = [
        kept.judge(item, "nonsense" if place == wanted["won"] else item.answer) for place, item in enumerate(items)
    ]
    second = [
        kept.judge(item, "nonsense" if place == wanted["lost"] else item.answer) for place, item in enumerate(items)
    ]
    second[wanted["made up"]] = replace(second[wanted["made up"]], stated=2, contradicted=1)
    shown = select(items, [{"a": a, "b": b} for a, b in zip(first, second, strict=True)], 6)
    assert len(shown) == 6
    assert {items[place].id for place in wanted.values()} <= {item.id for item in shown}
    assert select(items, [], 100) == items


def test_comparison_line(items, answers):
    line = comparison_line("stage 2 over stage 1", answers["stage 1"], answers["stage 2"])
    won = sum(place % 2 for place in range(len(items)))
    assert f"{won} wrong -> right, {len(items) - won} right -> wrong" in line
    assert "McNemar's exact p = 1" in line
