"""Which rows come when: shuffled, differently for each seed and pass, each once; and by what pictures are known."""

import json
from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image

from siq_vl.data import sources
from siq_vl.data.conversations import Conversation, Dropped, message, with_markers
from siq_vl.data.feature_cache.pictures import CachedPictures
from siq_vl.data.feature_cache.store import ENTRY, FeatureLayout, FeatureStore, FeatureWriter
from siq_vl.data.filters import Duplicates, filtered
from siq_vl.data.mixture_config import FilterConfig, MixtureConfig, SourceConfig
from siq_vl.data.mixtures import build_mixture
from siq_vl.data.preprocessing import DropLog
from siq_vl.data.sources import Source

LAYOUT = FeatureLayout(2, 2, 8, "float32")


@pytest.fixture
def texts(tmp_path):
    """Writes sources of numbered rows of text; returns the path of each."""

    def write(name: str, count: int) -> str:
        path = tmp_path / f"{name}.jsonl"
        rows = [{"prompt": f"{name} {number}?", "completion": f"{name} {number}"} for number in range(count)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    return write


def numbers(rows) -> list[int]:
    return [int(row["messages"][-1]["content"][0]["text"].split()[-1]) for row in rows]


def mixed(*paths: str, seed: int = 0, count: int | None = None, **options) -> list[dict]:
    listed = [{"path": path, **options} for path in paths]
    return list(build_mixture(MixtureConfig(sources=listed, data_seed_offset=seed), "answer", count).rows)


def test_stored_rows_are_drawn_and_mixed_at_random(texts):
    one, other = texts("one", 40), texts("other", 40)
    rows = mixed(one, other)
    names = [row["source"] for row in rows]
    assert Counter(names) == {"one.jsonl": 40, "other.jsonl": 40}
    runs = 1 + sum(a != b for a, b in zip(names, names[1:], strict=False))
    assert 25 < runs < 60  # 2 blocks where sources follow one another; 41 by chance
    assert sorted(numbers(rows)) == sorted(2 * list(range(40)))
    again, differently = mixed(one, other), mixed(one, other, seed=1)
    assert numbers(again) == numbers(rows) != numbers(differently)
    assert [row["source"] for row in differently] != names


def test_a_part_of_a_source_is_drawn_at_random(texts):
    path = texts("one", 60)
    drawn, others = (set(numbers(mixed(path, count=20, seed=seed))) for seed in (0, 1))
    assert len(drawn) == len(others) == 20
    assert drawn != set(range(20)) and drawn != others
    bounded = numbers(mixed(path, max_samples=15))
    assert len(bounded) == 15 and max(bounded) > 15


def test_the_plan_alone_shuffles_too(texts, monkeypatch):
    """Were the rows of a source taken in their order, the plan would still mix them; and the other way round."""
    path = texts("one", 40)
    order = numbers(mixed(path, count=40))
    assert order != sorted(order)
    kept = build_mixture(MixtureConfig(sources=[{"path": path}]), "answer", 40).rows
    places = kept.with_format(None)["position"]
    assert places != sorted(places)  # the plan
    assert [n for _, n in sorted(zip(places, order, strict=True))] != sorted(order)  # what was looked through


def test_streams_are_shuffled_anew_in_each_pass(texts):
    stored, streamed = texts("one", 30), texts("two", 30)
    listed = [{"path": stored, "weight": 1.0}, {"path": streamed, "weight": 1.0, "streaming": True}]
    rows = build_mixture(MixtureConfig(sources=listed), "answer", None).rows
    read = list(islice(iter(rows), 120))
    for name in ("one.jsonl", "two.jsonl"):
        own = [row for row in read if row["source"] == name]
        first, second = numbers(own[:30]), numbers(own[30:60])
        assert sorted(first) == sorted(second) == list(range(30))
        assert first != list(range(30)) and first != second


def test_long_streams_are_shuffled_from_their_first_row_on(monkeypatch):
    monkeypatch.setattr(sources, "_SHUFFLE_BUFFER", 10)
    made = list(sources._shuffled(iter(range(100)), 0))
    assert sorted(made) == list(range(100))
    assert made[:90] != list(range(90)) and made[90:] != sorted(made[90:])
    assert set(made[:20]) != set(range(20)) and made[:90] != sorted(made[:90])
    assert made != list(sources._shuffled(iter(range(100)), 1))


def test_files_of_a_stream_come_in_any_order_and_rows_keep_their_numbers(tmp_path):
    for file in range(6):
        rows = [{"prompt": "?", "completion": f"row {10 * file + row}"} for row in range(3)]
        Dataset.from_list(rows).to_parquet(tmp_path / f"part{file}.parquet")
    source = Source(SourceConfig(str(tmp_path), streaming=True))
    seen = {}
    for seed in (0, 1):
        read = [(number, row["completion"]) for number, row in source.stream(0, 1, seed)]
        assert len({number for number, _ in read}) == 18
        seen[seed] = read
    assert seen[0] != seen[1] and sorted(seen[0]) == sorted(seen[1])
    parts = [{row["completion"] for _, row in source.stream(part, 2, 0)} for part in (0, 1)]
    assert not parts[0] & parts[1] and len(parts[0] | parts[1]) == 18
    monkey = pytest.MonkeyPatch()
    with monkey.context() as patch:
        patch.setattr(sources, "_shuffled", lambda items, seed: items)  # the order of files alone
        firsts = {tuple(row["completion"] for _, row in source.stream(0, 1, seed))[::3] for seed in range(4)}
        assert len(firsts) > 1


def test_stored_rows_are_dealt_out_to_readers(texts):
    source = Source(SourceConfig(texts("one", 20)))
    parts = [[number for number, _ in source.stream(part, 2, 0)] for part in (0, 1)]
    assert sorted(parts[0] + parts[1]) == list(range(20)) and len(parts[0]) == len(parts[1]) == 10
    assert parts[0] != sorted(parts[0])


def test_rows_of_other_splits_are_left_out(tmp_path):
    rows = {str(number): {"split": split} for number, split in enumerate((1, 2, 3, "train", "val", "test"))}
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    read = {split: [row["id"] for row in sources.read_annotations(tmp_path / "rows.json", split)]
            for split in ("train", "validation", "val", "test")}  # fmt: skip
    assert read == {"train": ["0", "3"], "validation": ["1", "4"], "val": ["1", "4"], "test": ["2", "5"]}


# By what pictures are known


def test_pictures_are_known_by_all_that_makes_them(tmp_path):
    """Equal bytes are other pictures where they are decoded, shaped or typed otherwise."""
    pictures = CachedPictures(FeatureStore(tmp_path / "store", LAYOUT))
    image = Image.fromarray(np.arange(6 * 4 * 3, dtype=np.uint8).reshape(6, 4, 3))
    image.save(tmp_path / "picture.png")
    encoded = (tmp_path / "picture.png").read_bytes()
    keys = {pictures.from_encoded(encoded, side, lambda: image).key for side in (None, 3, 4096)}
    assert len(keys) == 3
    assert pictures.from_encoded(tmp_path / "picture.png", 3, lambda: image).key in keys
    tall, wide = np.asarray(image), np.asarray(image).reshape(4, 6, 3)
    assert pictures.from_pixels(tall).key == pictures.from_pixels(image).key != pictures.from_pixels(wide).key
    assert pictures.from_pixels(wide).size == (6, 4) and pictures.from_pixels(tall).size == (4, 6)
    floats = np.random.default_rng(0).random((4, 2, 3))
    assert pictures.from_pixels(floats).key != pictures.from_pixels(floats.view(np.float32).reshape(4, 4, 3)).key
    zeros = np.zeros((2, 2, 3), np.float64), np.zeros((2, 2, 3), np.int64)
    assert len({pictures.from_pixels(each).key for each in zeros}) == 2
    assert pictures.from_pixels(tall).key not in keys


def test_a_key_is_found_by_both_of_its_halves(tmp_path):
    store = FeatureStore(tmp_path, LAYOUT)
    keys = [high.to_bytes(8, "little") + low.to_bytes(8, "little") for high in (1, 2) for low in (1, 2, 3)]
    packed = [LAYOUT.pack(torch.full((2, 4, 8), float(place))) for place in range(6)]
    with FeatureWriter(tmp_path, LAYOUT) as writer:
        for key, part in zip(keys, packed, strict=True):
            writer.add(key, (3, 5), part)
    with FeatureWriter(tmp_path, LAYOUT) as writer:  # stored twice, as by two processes
        writer.add(keys[4], (3, 5), packed[4])
    store.refresh()
    assert len(store) == 6
    for place, key in enumerate(keys):
        entry = store.find(key)
        assert (int(entry["height"]), int(entry["width"]), int(entry["tiles"])) == (3, 5, 2)
        assert store.read([entry]).unique().tolist() == [place]
    assert store.find(keys[0][:8] + (9).to_bytes(8, "little")) is None
    assert ENTRY.itemsize == 36  # what stores hold, in this order
    assert ENTRY.names == ("high", "low", "shard", "first", "tiles", "height", "width")


def test_small_numbers_keep_their_scale(tmp_path):
    """int8 has a scale for each patch, and rounds."""
    layout = FeatureLayout(2, 2, 8, "int8")
    features = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(0))
    features *= torch.tensor([1e-3, 1.0, 1e3, 0.0])[None, :, None]
    read = layout.unpack(torch.from_numpy(layout.pack(features))).reshape(2, 4, 8)
    largest = features.abs().amax(-1, keepdim=True)
    assert ((read - features).abs() <= largest / 127 / 2 * 1.001).all()
    assert torch.isfinite(read).all() and not read[:, 3].any()
    with pytest.raises(ValueError, match="states another layout"):
        for other in (layout, LAYOUT):
            FeatureStore(tmp_path, other)


# What is left out


def conversation(*answers: str, images=(), ratings=()) -> Conversation:
    turns = [turn for answer in answers for turn in (message("user", "What?"), message("assistant", answer))]
    turns[0] = message("user", "What?", len(images))
    return Conversation(list(images), turns, {"formatting": list(ratings)} if ratings else {})


def kept(made: Conversation, **config) -> list[str]:
    try:
        return filtered(made, FilterConfig(**config)).texts("assistant")
    except Dropped as dropped:
        return [dropped.reason]


def test_bounds_themselves_are_kept():
    made = conversation("four", "sixsix")
    assert kept(made, min_answer_characters=4, max_answer_characters=6, max_turns=2) == ["four", "sixsix"]
    assert kept(made, min_answer_characters=5) == ["answer too short"]
    assert kept(made, max_answer_characters=5) == ["answer too long"]
    assert kept(made, max_turns=1) == ["too many turns"]
    rated = conversation("a", "b", "c", images=["x"], ratings=[2, 3, None])
    assert kept(rated, min_ratings={"formatting": 3}) == ["b", "c"]
    few = conversation("a", "b", ratings=[3])  # turns beyond the ratings were not rated either
    assert kept(few, min_ratings={"formatting": 3}) == ["a", "b"]
    left = filtered(rated, FilterConfig(min_ratings={"formatting": 3}))
    assert [part["type"] for part in left.messages[0]["content"]] == ["image", "text"]  # the picture went on to "b"
    assert kept(conversation("Yes. I am sorry, but no", "ok"), drop_refusals=True) == ["Yes. I am sorry, but no", "ok"]
    assert kept(conversation("ok", "I'm sorry, but no. Yes"), drop_refusals=True) == ["refusal"]


def test_duplicates_are_pictures_in_their_order_with_their_questions():
    config = FilterConfig(drop_duplicate_images=True, drop_duplicate_questions=True)
    seen = Duplicates()
    seen.check(conversation("a", images=["x", "y"]), [b"x", b"y"], config)
    seen.check(conversation("a", images=["y", "x"]), [b"y", b"x"], config)
    with pytest.raises(Dropped, match="duplicate image"):
        seen.check(conversation("b", images=["x", "y"]), [b"x", b"y"], config)
    questions = FilterConfig(drop_duplicate_questions=True)
    seen.check(conversation("a", images=["z"]), [b"z"], questions)  # the same question about another picture
    with pytest.raises(Dropped, match="duplicate question"):
        seen.check(conversation("b", images=["z"]), [b"z"], questions)
    images = FilterConfig(drop_duplicate_images=True)
    for _ in range(2):  # text alone is no picture twice
        Duplicates().check(conversation("a"), [], images)
    both = Duplicates()
    both.check(conversation("a"), [], images)
    both.check(conversation("b"), [], images)


def test_paths_of_a_sub_folder_come_first(tmp_path, make_image):
    (tmp_path / "part").mkdir()
    for number, folder in enumerate((tmp_path, tmp_path / "part")):
        make_image(number).save(folder / "same.png")
    make_image(2).save(tmp_path / "above.png")
    rows = [{"image": name, "prompt": "?", "completion": "!"} for name in ("same.png", "above.png")]
    (tmp_path / "part" / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = Source(SourceConfig(str(tmp_path), subset="part"))
    assert source.roots == [tmp_path / "part", Path(tmp_path)]


def test_pictures_come_before_the_first_question():
    assert [part["type"] for part in message("user", "What?", 2)["content"]] == ["image", "image", "text"]
    turns = [("system", "Be kind."), ("user", "One?"), ("assistant", "1"), ("user", "Two?"), ("assistant", "2")]
    placed = [[part["type"] for part in turn["content"]] for turn in with_markers(turns, 1)]
    assert placed == [["text"], ["image", "text"], ["text"], ["text"], ["text"]]
    marked = with_markers([("user", "before <image>\nafter"), ("assistant", "1")], 1)
    assert [part.get("text") for part in marked[0]["content"]] == ["before ", None, "after"]


def test_a_row_that_is_left_out_counts_once(tmp_path):
    log = DropLog(0.5, tmp_path / "log.jsonl")
    for _ in range(3):
        log.add("a", 1, Dropped("broken", "again", defect=True))
    log.add("a", 2, Dropped("unwanted"))
    assert log.merged() == {"a": {"broken": 1, "unwanted": 1}} and log.defects == {"a": 1}
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 2
    few = DropLog(0.02)
    few.read["a"] = 100
    for row in range(2):
        few.add("a", row, Dropped("broken", defect=True))
    with pytest.raises(ValueError, match="3 of 100 rows read from a are broken"):
        few.add("a", 3, Dropped("broken", defect=True))


def test_readers_of_a_stream_draw_figures_of_their_own(texts):
    listed = [
        {"path": "figures", "weight": 1.0, "max_samples": 4},
        {"path": texts("one", 8), "weight": 1.0, "streaming": True},
    ]
    rows = build_mixture(MixtureConfig(sources=listed), "answer", None, readers=2).rows
    drawn = []
    for part in range(2):
        read = islice(iter(rows.shard(2, part)), 24)
        drawn.append([np.asarray(row["images"][0]).tobytes() for row in read if row["source"] == "figures"])
    assert not set(drawn[0]) & set(drawn[1])
    assert [len(set(each)) for each in drawn] == [2, 2]  # four in all, over and over


def test_readers_of_a_stream_share_its_bound(texts):
    listed = [{"path": texts("one", 8), "max_samples": 4, "streaming": True}]
    rows = build_mixture(MixtureConfig(sources=listed), "answer", None, readers=2).rows
    first, second = (Counter(numbers(islice(iter(rows.shard(2, part)), 10))) for part in range(2))
    assert not first.keys() & second.keys()
    assert sorted(first.values()) == sorted(second.values()) == [5, 5]  # the same two of four, over and over


def test_shares_are_those_of_the_rows_that_are_used(texts):
    listed = [{"path": texts(name, 9), "weight": weight} for name, weight in (("one", 3.0), ("other", 1.0))]
    report = build_mixture(MixtureConfig(sources=listed), "answer", 7).report
    assert [(each.used, each.share) for each in report.sources] == [(5, 5 / 7), (2, 2 / 7)]
