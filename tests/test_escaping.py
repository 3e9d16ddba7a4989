"""Nothing that a model, a file or a user says becomes part of a page: each text of each page is a hostile one once."""

import json
from dataclasses import replace
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from siq_vl.ablation import comparison
from siq_vl.distill import store_page as traces_page
from siq_vl.distill.yields import StoreYield, TeacherYield
from siq_vl.evaluation import predictions as kept
from siq_vl.evaluation.held_out import held_out_items
from siq_vl.evaluation.report import write_report
from siq_vl.evaluation.statistics import ratio_of_totals
from siq_vl.page.cards import card, empty_card
from siq_vl.page.streaming import Output
from siq_vl.plots import emergence_plot, learning_curve_plot, length_plot, running_accuracy_plot
from siq_vl.training.callbacks import Sample, samples_page


def hostile(name: str) -> str:
    """A text that would be an element, and would end an attribute in either kind of quotes and add another."""
    return f"{name}<evil>' evil='1' \" evil=\"2\" &lt;evil&gt;"


class Found(HTMLParser):
    """Collects the elements and the texts of a page."""

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.elements, self.attributes, self.texts = set(), set(), []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.elements.add(tag)
        self.attributes |= {name for name, _ in attributes}
        self.texts += [value for _, value in attributes if value]

    def handle_data(self, data):
        self.texts.append(data)


def check(page: str, *names: str) -> None:
    """Whether each hostile text is there as a text, and none of them as anything else."""
    found = Found(page)
    assert "evil" not in found.elements | found.attributes
    said = "\n".join(found.texts)
    for name in names:
        assert hostile(name) in said, name


def test_report(tmp_path):
    item = held_out_items(5)[0]
    item = replace(
        item, domain=hostile("domain"), type=hostile("type"), question=hostile("question"), group="test",
        golds=(hostile("gold"),), caption="", id=hostile("id"),
    )  # fmt: skip
    said = f"<think>{hostile('rationale')}</think><answer>{hostile('answer')}</answer>"
    made = replace(kept.judge(item, said), fault=hostile("fault"), detail=hostile("detail"))
    lost = replace(item, id="other", images=(b"no picture",))
    answers = {hostile("model"): [made, kept.judge(lost, said)]}
    notes, tables = [hostile("note")], {hostile("heading"): hostile("table")}
    curves = {hostile("stage"): [(1, 1.0), (2, 0.5)]}
    write_report(tmp_path / "page.html", [item, lost], answers, tables, curves, notes=notes)
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    names = "question type gold rationale answer fault detail id model note heading table stage domain"
    check(text, *names.split())
    assert {"svg", "table", "img", "pre", "option"} <= Found(text).elements  # what is meant as one is one


def test_page_of_traces(tmp_path, monkeypatch):
    row = {
        name: hostile(name) for name in ("question", "teacher", "output", "rationale", "answer", "injected", "error")
    }
    row |= {"images": [{"bytes": b"no picture"}], "golds": [hostile("gold")], "hinted": True, "verdict": "rejected"}
    row["rejected_by"] = [hostile("rule")]
    summary = StoreYield(teachers={hostile("teacher"): TeacherYield(made=1)})
    monkeypatch.setattr(traces_page, "store_yield", lambda folder: summary)
    monkeypatch.setattr(traces_page, "gallery", lambda folder, verdict, count: [row])
    page = traces_page.write_page(tmp_path, tmp_path / "page.html").read_text(encoding="utf-8")
    check(page, "question", "teacher", "rationale", "answer", "injected", "gold", "rule")
    assert "hinted" in page
    for shown in ("output", "error"):
        row |= {"rationale": "", "output": row["output"] if shown == "output" else ""}
        check(traces_page.write_page(tmp_path, tmp_path / "page.html").read_text(encoding="utf-8"), shown)


def test_samples_while_training():
    asked = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": hostile("asked")}]}]
    row = {
        "images": [Image.new("RGB", (4, 4))],
        "messages": [*asked, {"role": "assistant", "content": hostile("wanted")}],
    }
    sample = Sample.from_row(row)
    assert (sample.asked, sample.wanted) == (hostile("asked"), hostile("wanted"))
    check(samples_page([sample], [{"step": 1, "answers": [hostile("answer")]}]), "asked", "wanted", "answer")


def test_figures_and_curves():
    check(learning_curve_plot({hostile("source"): [(1, 2.0), (2, 1.0)]}, hostile("title")), "title")
    drawn = learning_curve_plot({hostile("source"): [(1, 2.0), (2, 1.0)]}, "title")
    assert f"{hostile('source')} 1.000" in Found(drawn).texts
    check(running_accuracy_plot({hostile("model"): [0.5]}), "model")
    check(length_plot({hostile("model"): [3, 4]}), "model")
    found = {"accuracy": ratio_of_totals(np.array([[0.0, 1.0]]))}
    check(comparison.plot({hostile("arm"): comparison.Result("", 0, [], found)}), "arm")
    entry = dict.fromkeys(("step", "well_formed", "length", "teacher_length", "structure", "accuracy"), 1.0)
    check(emergence_plot({hostile("run"): [entry]}), "run")


def test_a_legend_has_names_that_begin_with_an_underscore():
    entry = dict.fromkeys(("step", "well_formed", "length", "teacher_length", "structure", "accuracy"), 1.0)
    for svg in (
        learning_curve_plot({"_loss": [(1, 2.0)]}, "title"),
        running_accuracy_plot({"_loss": [0.5], "other": [0.5]}),
        length_plot({"_loss": [3, 4], "other": [2]}),
        emergence_plot({"_loss": [entry], "other": [entry]}),
    ):
        assert any(text.startswith("_loss") for text in Found(svg).texts)


@pytest.mark.parametrize("name", [r"a$\bad{$b", "$x_1$ and $y$", r"\$5 {"])
def test_names_with_dollar_signs_are_no_formulas(name):
    found = {"accuracy": ratio_of_totals(np.array([[0.0, 1.0]]))}
    drawn = running_accuracy_plot({name: [0.5]}), learning_curve_plot({"loss": [(1, 2.0)]}, name)
    for svg in (*drawn, comparison.plot({name: comparison.Result("", 0, [], found)})):
        assert name in Found(svg).texts


@pytest.mark.parametrize("finished", [True, False])
def test_answer_cards(finished):
    text = f"<think>{hostile('reasoning')}.</think><answer>{hostile('answer')}</answer>"
    made = card(hostile("name"), "data:,", 1.0, hostile("question"), Output(text, finished))
    found = Found(made + empty_card(hostile("name")))
    assert "evil" not in found.elements | found.attributes
    said = " ".join(found.texts)
    for name in ("question", "name", "answer"):
        assert hostile(name) in said
    assert "reasoning<evil>" in said


def test_marks_of_the_gallery_are_read_back_as_they_were(tmp_path):
    """What filters read: right, wrong or not scored, hallucinated, and how long."""
    items = held_out_items(5)[:2]
    made = [kept.judge(items[0], "x", kept.IMAGE, "damaged"), kept.judge(items[1], items[1].answer)]
    write_report(tmp_path / "page.html", items, {"it's": made})
    marks = [
        json.loads(value) for value in Found((tmp_path / "page.html").read_text()).texts if value.startswith('{"it')
    ]
    assert marks == [{"it's": [None, False, 0]}, {"it's": [True, False, 0]}]
    assert SimpleNamespace(**marks[0])
