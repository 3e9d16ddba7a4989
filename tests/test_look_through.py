"""Looking a source through in batches: the same rows as one by one, with less work, and once for all starts."""

import json

import pyarrow
import pytest
from datasets import Dataset

from siq_vl.data.collation import supervised_segments
from siq_vl.data.conversations import Conversation, Dropped, message
from siq_vl.data.mixture_config import MixtureConfig, SourceConfig
from siq_vl.data.mixtures import build_mixture
from siq_vl.data.preprocessing import DropLog, Preprocessor
from siq_vl.data.shapes import Shapes
from siq_vl.data.sources import Source, _marked

MAX_LENGTH = 60
GOOD = [("human", "<image>\nWhat is this?"), ("gpt", "a cat")]


def row(turns, image="images/0.png"):
    said = [{"from": who, "value": text} for who, text in turns]
    return {"image": image, "conversations": said} if image else {"conversations": said}


def odd_rows() -> list:
    """Rows that pass, rows that are left out for every reason, and rows just below and above the greatest length."""
    rows = [row(GOOD), row(GOOD, "images/none.png"), row(GOOD, "../outside.png"), {"conversations": 3}, [], None]
    rows += [row([("human", "<image>\nSay <think> or <|im_end|>"), ("gpt", "a")])]
    rows += [
        row([("human", text), ("gpt", answer)], None)
        for text in ("a < b?", " spaced ", "", "é𝒳")
        for answer in ("", " x", "y")
    ]
    rows += [row([*GOOD, ("human", "And\nthere?"), ("gpt", "b")]), row([("system", "Be brief."), *GOOD]), row(GOOD[:1])]
    rows += [row([("human", "<image>\n" + "a" * length), ("gpt", "é" * 3)]) for length in range(0, 50)]
    rows += [row([("human", "ab " * (length // 3)), ("gpt", "b")], None) for length in range(0, 90, 2)]
    return rows


@pytest.fixture
def folder(tmp_path, make_image):
    (tmp_path / "rows" / "images").mkdir(parents=True)
    make_image(0).save(tmp_path / "rows" / "images" / "0.png")
    (tmp_path / "rows" / "rows.json").write_text(json.dumps(odd_rows()))
    return tmp_path / "rows"


def mixture(folder, processor, log, processes=1, max_length=MAX_LENGTH, **source):
    config = MixtureConfig(sources=[SourceConfig(str(folder), **source)], max_bad_share=1.0)
    return build_mixture(
        config, "answer", None, processor=processor, max_length=max_length, drop_log=log, processes=processes
    )


def one_by_one(source, preprocessor) -> dict:
    """Why each row is left out, judged on its own, its conversation rendered in full."""
    verdicts = {}
    for number in range(len(source)):
        try:
            preprocessor._shapes._shapes.clear()
            preprocessor.conversation(source, source[number])
        except Dropped as dropped:
            verdicts[number] = dropped.reason, dropped.detail
    return verdicts


@pytest.mark.parametrize("processes", [1, 2])
def test_batches_judge_as_rows_one_by_one(folder, processor, tmp_path, processes):
    expected = one_by_one(Source(SourceConfig(str(folder))), Preprocessor(DropLog(1.0), processor, MAX_LENGTH))
    assert len({reason for reason, _ in expected.values()}) >= 7 and len(expected) < len(odd_rows()) / 2
    built = mixture(folder, processor, tmp_path / "log", processes)
    noted = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()[1:]]
    assert {line["row"]: (line["reason"], line["detail"]) for line in noted} == expected
    assert built.report.sources[0].read == len(odd_rows())
    assert built.report.sources[0].kept == len(odd_rows()) - len(expected)


def test_a_conversation_is_rendered_once_a_shape(tmp_path, processor, monkeypatch):
    rows = [row([("human", f"What is {number}?"), ("gpt", str(number))], None) for number in range(300)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    calls = []
    render = type(processor).apply_chat_template
    monkeypatch.setattr(
        type(processor), "apply_chat_template", lambda *args, **kwargs: calls.append(1) or render(*args, **kwargs)
    )
    tokenized = []
    tokenize = type(processor.tokenizer).__call__
    monkeypatch.setattr(
        type(processor.tokenizer), "__call__", lambda *args, **kwargs: tokenized.append(1) or tokenize(*args, **kwargs)
    )
    mixture(tmp_path / "rows.json", processor, None, max_length=500)
    assert len(calls) <= 2 * 10  # of two renderings each: the stand-ins, and a check at each doubling
    assert len(tokenized) <= 2  # what the tokenizer puts before a text, and no row


def test_a_start_reads_what_another_has_looked_at(folder, processor, tmp_path, monkeypatch):
    first = mixture(folder, processor, tmp_path / "first")
    judged = Preprocessor.judged
    looked = []

    def count(self, source, rows):
        looked.extend(rows)
        return judged(self, source, rows)

    monkeypatch.setattr(Preprocessor, "judged", count)
    second = mixture(folder, processor, tmp_path / "second")
    assert len(looked) == 2  # those whose picture might have come
    assert second.rows.with_format(None)[:] == first.rows.with_format(None)[:]
    assert second.report.to_dict() == first.report.to_dict()
    assert sorted((tmp_path / "second").read_text().splitlines()) == sorted(
        (tmp_path / "first").read_text().splitlines()
    )
    del looked[:]
    mixture(folder, processor, tmp_path / "longer", max_length=MAX_LENGTH + 1)
    mixture(folder, processor, tmp_path / "filtered", filters={"min_answer_characters": 2})
    (folder / "rows.json").write_text(json.dumps([*odd_rows(), row(GOOD)]))
    third = mixture(folder, processor, tmp_path / "changed")
    assert len(looked) == 3 * len(odd_rows()) + 1
    (folder / "images" / "none.png").write_bytes((folder / "images" / "0.png").read_bytes())
    assert mixture(folder, processor, tmp_path / "came").report.sources[0].kept == third.report.sources[0].kept + 1


def test_a_damaged_file_is_made_again(folder, processor, tmp_path, data_cache):
    import datasets

    kept = mixture(folder, processor, None, max_length=47).report.sources[0].kept
    for file in (datasets.config.HF_DATASETS_CACHE / "siq_vl").glob("*.json"):
        file.write_text(file.read_text()[:30])
    assert mixture(folder, processor, None, max_length=47).report.sources[0].kept == kept


def test_too_many_broken_rows_stop_every_start(tmp_path, processor):
    (tmp_path / "rows.json").write_text(json.dumps([row(GOOD, "none.png")] * 50 + [row(GOOD, None)] * 50))
    for _ in range(2):
        with pytest.raises(ValueError, match="6 of .* rows read from rows.json are broken"):
            config = MixtureConfig(sources=[SourceConfig(str(tmp_path / "rows.json"))], max_bad_share=0.05)
            build_mixture(config, "answer", None, processor=processor)


def test_pictures_in_the_rows_are_not_read(tmp_path, make_image):
    picture = make_image(0)
    rows = {"images": [[picture, picture], [], None], "texts": [[{"user": "a", "assistant": "b"}]] * 3}
    Dataset.from_dict(rows).to_parquet(tmp_path / "rows.parquet")
    source = Source(SourceConfig(str(tmp_path / "rows.parquet")))
    found = source.without_pictures([1, 0, 2])
    assert [each["texts"] for each in found] == [source[number]["texts"] for number in (1, 0, 2)]
    assert [[image["bytes"] for image in each["images"] or []] for each in found] == [[], [b"\0", b"\0"], []]
    assert [each["images"] is None for each in found] == [source[number]["images"] is None for number in (1, 0, 2)]


@pytest.mark.parametrize("start", [0, 1, 3])
def test_marks_stand_for_bytes_in_any_column(start):
    values = [
        {"a": [b"one", b"", None], "b": {"bytes": b"x", "path": "p"}, "c": [{"bytes": None}, None], "d": b"z"},
        {"a": None, "b": None, "c": [], "d": None},
        {"a": [], "b": {"bytes": b"", "path": None}, "c": None, "d": b""},
        {"a": [b"two"], "b": {"bytes": None, "path": ""}, "c": [{"bytes": b"y"}], "d": b"w"},
        {"a": [b"3"], "b": {"bytes": b"v", "path": "q"}, "c": [None], "d": b"u"},
    ]

    def with_marks(value):
        if isinstance(value, bytes):
            return b"\0" if value else b""
        if isinstance(value, dict):
            return {name: with_marks(part) for name, part in value.items()}
        return [with_marks(part) for part in value] if isinstance(value, list) else value

    table = pyarrow.Table.from_pylist(values).slice(start)
    for large in (False, True):
        if large:
            at = table.schema.get_field_index("a")
            table = table.set_column(at, "a", table["a"].cast(pyarrow.large_list(pyarrow.large_binary())))
        marked = pyarrow.table({name: _marked(table.column(name)) for name in table.column_names})
        marked.validate(full=True)
        assert marked.to_pylist() == with_marks(values[start:])


@pytest.mark.parametrize(
    "content",
    ["{{ text | trim }}", "{{ text | upper }}", "{{ text | replace('cat', 'dog') }}", "{{ text.split('<')[0] }}"],
)
def test_shapes_are_rendered_as_the_template_does(processor, content):
    """Also by a template that looks into texts, once it has been seen to."""
    processor.chat_template = (
        "{% for message in messages %}[{{ message.role }}]{% for part in message.content %}{% if part.type == 'text' %}"
        "{% set text = part.text %}" + content + "{% else %}<|image_pad|>{% endif %}{% endfor %}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    shapes = Shapes(processor)
    for text in ("a cat?", "a cat?", " b ", "a<b", "", "a cat?", "c"):
        messages = [
            message("user", text, images=1),
            message("assistant", f"{text}."),
            message("user", "x"),
            message("assistant", "y"),
        ]
        conversation = Conversation(["picture"], messages)
        assert shapes.segments(conversation) == supervised_segments(processor, messages, {})
