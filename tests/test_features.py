"""Stored vision features: equal to pixels in training, safe against a kill, never stale, and used only where they pay."""

import json
import logging
import os
import pickle
import re
import signal
import socket
import time
from collections import namedtuple
from functools import partial
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import PartialState
from datasets import Dataset
from PIL import Image
from processes import CONTEXT
from torch.utils.data import DataLoader

from siq_vl.data.collation import ConversationCollator
from siq_vl.data.conversations import message
from siq_vl.data.feature_cache import build as features_build
from siq_vl.data.feature_cache import store as features_store
from siq_vl.data.feature_cache.build import cached_rows, store_of, what_features_depend_on
from siq_vl.data.feature_cache.pictures import CachedPicture, CachedPictures, with_cached_pictures
from siq_vl.data.feature_cache.store import ENTRY, FeatureLayout, FeatureStore, FeatureWriter
from siq_vl.data.images import decode_image
from siq_vl.data.mixture_config import FeatureArguments
from siq_vl.modeling_siq_vl import SiQVLForConditionalGeneration
from siq_vl.planning.plan import plan
from siq_vl.processing_siq_vl import SiQVLProcessor
from siq_vl.training import stored_features
from siq_vl.training.recipes import parse_recipe
from siq_vl.training.run import make_trainer, mixture_for_stage
from siq_vl.training.starting_model import load_for_stage

LAYOUT = FeatureLayout(2, 3, 8, "float32")

pytestmark = pytest.mark.usefixtures("own_precision")


def key(number: int) -> bytes:
    return number.to_bytes(16, "little")


def features(number: int, tiles: int = 1, layout: FeatureLayout = LAYOUT) -> torch.Tensor:
    generator = torch.Generator().manual_seed(number)
    return torch.randn(tiles, layout.rows * layout.columns, layout.width, generator=generator)


def write(folder: Path, numbers, layout: FeatureLayout = LAYOUT, tiles: int = 1) -> None:
    with FeatureWriter(folder, layout) as writer:
        for number in numbers:
            writer.add(key(number), (10, number), layout.pack(features(number, tiles, layout)))


# The store


@pytest.mark.parametrize(("dtype", "error"), [("float32", 0.0), ("bfloat16", 2**-8), ("int8", 0.02)])
def test_what_is_stored_is_read_back(dtype, error, tmp_path):
    layout = FeatureLayout(2, 3, 8, dtype)
    store = FeatureStore(tmp_path, layout)
    write(tmp_path, range(5), layout, tiles=3)
    store.refresh()
    entries = [store.find(key(number)) for number in (4, 0, 4)]
    assert [(entry["height"], entry["width"]) for entry in entries] == [(10, 4), (10, 0), (10, 4)]
    read = store.read(entries)
    wanted = torch.cat([features(number, 3, layout) for number in (4, 0, 4)]).unflatten(1, (2, 3))
    assert read.shape == (9, 2, 3, 8)
    assert (read.float() - wanted).abs().max() <= error * wanted.abs().max()
    assert store.find(key(9)) is None
    assert sum(path.stat().st_size for path in tmp_path.glob("*.features")) == 15 * layout.tile_bytes


def test_several_writers_and_processes_share_a_store(tmp_path):
    store = FeatureStore(tmp_path, LAYOUT)
    with FeatureWriter(tmp_path, LAYOUT) as first, FeatureWriter(tmp_path, LAYOUT) as second:
        for number in range(20):
            (first, second)[number % 2].add(key(number), (1, 1), LAYOUT.pack(features(number)))
        second.add(key(0), (1, 1), LAYOUT.pack(features(0)))  # twice does no harm
    store.refresh()
    assert len(store) == 20
    other = pickle.loads(pickle.dumps(store))
    for reader in (store, other):
        for number in range(20):
            assert torch.equal(reader.read([reader.find(key(number))]).flatten(1, 2), features(number))


def test_a_full_shard_is_followed_by_another(tmp_path, monkeypatch):
    monkeypatch.setattr("siq_vl.data.feature_cache.store.SHARD_BYTES", 3 * LAYOUT.tile_bytes)
    store = FeatureStore(tmp_path, LAYOUT)
    write(tmp_path, range(3))
    store.refresh()
    assert torch.equal(store.read([store.find(key(1))]).flatten(1, 2), features(1))
    write(tmp_path, range(3, 11))
    store.refresh()
    assert sorted(path.stat().st_size // LAYOUT.tile_bytes for path in tmp_path.glob("*.features")) == [2, 3, 3, 3]
    for number in range(11):
        assert torch.equal(store.read([store.find(key(number))]).flatten(1, 2), features(number))


def test_what_a_writer_left_half_written_is_never_read(tmp_path):
    store = FeatureStore(tmp_path, LAYOUT)
    write(tmp_path, range(4))
    index, data = next(tmp_path.glob("*.index")), next(tmp_path.glob("*.features"))
    whole = data.stat().st_size
    with open(data, "ab") as file:
        file.write(b"x" * (LAYOUT.tile_bytes // 2))
    with open(index, "ab") as file:
        file.write(b"x" * (ENTRY.itemsize - 1))
    store.refresh()
    assert len(store) == 4
    assert store.discard_unfinished() == LAYOUT.tile_bytes // 2
    assert data.stat().st_size == whole
    os.truncate(data, whole - 1)  # and an entry whose features are gone is no entry
    store.refresh()
    assert len(store) == 3 and store.find(key(3)) is None


def test_a_live_writer_keeps_what_it_has_not_flushed(tmp_path):
    store = FeatureStore(tmp_path, LAYOUT)
    with FeatureWriter(tmp_path, LAYOUT, flush_seconds=1e9) as writer:
        for number in range(200):  # more than a file's buffer holds
            writer.add(key(number), (1, 1), LAYOUT.pack(features(number)))
        assert store.discard_unfinished() == 0
        store.refresh()
        assert len(store) == 0
    store.refresh()
    assert len(store) == 200


def test_memory_does_not_grow_with_the_number_of_pictures(tmp_path):
    layout = FeatureLayout(32, 32, 64, "bfloat16")  # 128 KiB a picture
    store = FeatureStore(tmp_path, layout)
    packed = layout.pack(features(0, 1, layout))
    with FeatureWriter(tmp_path, layout) as writer:
        for number in range(1600):
            writer.add(key(number), (1, 1), packed)
    store.refresh()

    def resident() -> int:
        """Bytes of the store's features among the memory of this process, whatever else it holds."""
        pages, counts = 0, False
        for line in Path("/proc/self/smaps").read_text().splitlines():
            if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
                counts = str(tmp_path) in line and line.endswith(".features")
            elif counts and line.startswith("Rss:"):
                pages += int(line.split()[1])  # KiB
        return 1024 * pages

    def read(numbers) -> None:
        for number in numbers:
            store.read([store.find(key(number))])

    read(range(100))
    before = resident()
    read(range(1600))
    assert resident() - before < 20 * 2**20 < 1500 * layout.tile_bytes
    mapped = store._mapped(int(store.find(key(0))["shard"]))
    _ = sum(mapped[::4096])  # what is not let go is seen
    assert resident() > 20 * 2**20


# Pictures and rows


@pytest.fixture
def photos(tmp_path, make_image):
    """A source of 10 rows: one picture, two, or none; two rows share one. Returns the path of its JSONL."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(8):
        make_image(number, size=(40 + 30 * number, 64)).save(folder / f"{number}.png")
    shown = [["0.png"], ["1.png", "2.png"], [], ["3.png"], [], ["4.png"], ["5.png", "6.png"], ["7.png"], ["0.png"], []]
    rows = []
    for number, names in enumerate(shown):
        content = [{"type": "image"}] * len(names) + [{"type": "text", "text": f"What is it, {number}?"}]
        turns = [{"role": "user", "content": content}, message("assistant", f"it is number {number}")]
        rows.append({"images": names, "messages": turns})
    path = folder / "photos.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def recipe_for(photos: Path, folder: Path, *overrides: str):
    arguments = ["--stage", "1", "--sources", str(photos), "--max_steps", "-1", "--num_train_epochs", "2"]
    arguments += ["--effective_batch_size", "2", "--per_device_train_batch_size", "1", "--logging_steps", "1"]
    arguments += [
        "--dataloader_num_workers",
        "0",
        "--learning_rate",
        "1e-3",
        "--warmup_steps",
        "0",
        "--output_dir",
        str(folder / "run"),
    ]
    arguments += ["--feature_cache_dir", str(folder / "features"), *overrides]
    return parse_recipe(("1",), arguments)


def run(photos: Path, folder: Path, *overrides: str, max_tiles: int = 1):
    """Train and return the loss of each batch, the norm of each step's gradients, and the trainer."""
    recipe = recipe_for(photos, folder, *overrides)
    model, processor = load_for_stage(recipe)
    processor.max_tiles = max_tiles
    trainer = make_trainer(recipe, model, processor, mixture_for_stage(recipe, "answer", processor).rows)
    losses, step = [], trainer.training_step  # the trainer's log would round them

    def noted(*arguments, **options):
        losses.append(step(*arguments, **options).item())
        return torch.tensor(losses[-1])

    trainer.training_step = noted
    trainer.train()
    norms = [entry["grad_norm"] for entry in trainer.state.log_history if "loss" in entry]
    return torch.tensor(losses), torch.tensor(norms), trainer


@pytest.mark.parametrize("max_tiles", [1, 4])
@pytest.mark.parametrize(
    ("precision", "dtype", "tolerance"),
    [("false", "float32", 1e-6), ("true", "bfloat16", 2e-3), ("true", "int8", 2e-2)],
)
def test_losses_and_gradients_are_those_of_pixels(photos, tmp_path, precision, dtype, tolerance, max_tiles):
    options = ("--bf16", precision, "--feature_cache_dtype", dtype)
    wanted, wanted_norms, _ = run(photos, tmp_path, *options, "--feature_cache", "off", max_tiles=max_tiles)
    losses, norms, trainer = run(photos, tmp_path, *options, "--feature_cache", "auto", max_tiles=max_tiles)
    assert (len(losses), len(norms)) == (20, 10)
    torch.testing.assert_close(losses, wanted, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(norms, wanted_norms, rtol=10 * tolerance, atol=10 * tolerance)
    batches = [trainer.data_collator([row]) for row in trainer.train_dataset]
    shown = [batch for batch in batches if "vision_features" in batch]
    assert len(shown) == 7 and not any("pixel_values" in batch for batch in batches)
    tiles = {batch["vision_features"].shape[0] for batch in shown}
    assert tiles == {1, 2} if max_tiles == 1 else max(tiles) > 4


def test_text_alone_trains_from_the_store(photos, tmp_path):
    rows = [row for row in map(json.loads, photos.read_text().splitlines()) if not row["images"]]
    photos.write_text("".join(json.dumps(row) + "\n" for row in rows))
    wanted, _, _ = run(photos, tmp_path, "--feature_cache", "off")
    losses, _, _ = run(photos, tmp_path, "--feature_cache", "on")
    assert torch.equal(losses, wanted)


def test_a_broken_picture_gives_its_place_to_the_next_row(photos, tmp_path):
    (photos.parent / "3.png").write_bytes(b"no picture")
    options = ("--bf16", "false", "--feature_cache_dtype", "float32")
    wanted, _, _ = run(photos, tmp_path, *options, "--feature_cache", "off")
    losses, _, trainer = run(photos, tmp_path, *options, "--feature_cache", "on")
    torch.testing.assert_close(losses, wanted, rtol=1e-6, atol=1e-6)
    assert len({image.key for row in trainer.train_dataset for image in row["images"]}) == 7


def test_pictures_are_decoded_once_in_all(photos, tmp_path, monkeypatch):
    decoded = []

    def counting(*arguments):
        decoded.append(arguments)
        return decode_image(*arguments)

    monkeypatch.setattr("siq_vl.data.preprocessing.decode_image", counting)
    _, _, trainer = run(photos, tmp_path, "--feature_cache", "on")
    # TRL looks at the first row, and the first pass names all pictures: neither decodes any.
    assert len(decoded) == 8
    trainer.model.model.vision_tower.forward = None  # another run, another epoch: neither pixels nor tower
    trainer.train()
    assert len(decoded) == 8


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_loader_processes_read_the_store(photos, tmp_path, context):
    recipe = recipe_for(photos, tmp_path, "--feature_cache", "on")
    model, processor = load_for_stage(recipe)
    rows = mixture_for_stage(recipe, "answer", processor).rows
    rows = cached_rows(rows, model, processor, recipe.features, bf16=True, workers=1)
    collate = ConversationCollator(processor)
    here = [collate([row]) for row in rows]
    there = list(DataLoader(rows, 1, num_workers=1, collate_fn=collate, multiprocessing_context=context))
    assert [batch.keys() for batch in here] == [batch.keys() for batch in there]
    for first, second in zip(here, there, strict=True):
        assert all(torch.equal(first[name], second[name]) for name in first)


def test_pictures_that_are_drawn_are_known_by_their_pixels(tmp_path):
    arguments = ["--stage", "1", "--train_samples", "12", "--output_dir", str(tmp_path / "run")]
    recipe = parse_recipe(("1",), [*arguments, "--feature_cache_dir", str(tmp_path / "features")])
    model, processor = load_for_stage(recipe)
    rows = mixture_for_stage(recipe, "caption", processor).rows
    cached = cached_rows(rows, model, processor, recipe.features)
    assert len({row["images"][0].key for row in cached}) == 12
    batch = ConversationCollator(processor)([rows[3]])
    features = ConversationCollator(processor)([cached[3]])["vision_features"]
    wanted = model.get_image_features(batch["pixel_values"], return_dict=True).last_hidden_state
    torch.testing.assert_close(features.flatten(1, 2).float(), wanted, rtol=2**-8, atol=1e-4)


def test_a_picture_that_changed_is_not_read_from_the_store(photos, tmp_path, make_image):
    recipe = recipe_for(photos, tmp_path)
    model, processor = load_for_stage(recipe)
    rows = mixture_for_stage(recipe, "answer", processor).rows
    cached = cached_rows(rows, model, processor, recipe.features)
    make_image(99).save(photos.parent / "1.png")
    with pytest.raises(ValueError, match="1 of 2 pictures of a batch have no stored features"):
        [ConversationCollator(processor)([row]) for row in cached]
    again = cached_rows(rows, model, processor, recipe.features)
    assert sum("vision_features" in ConversationCollator(processor)([row]) for row in again) == 7


# What features depend on


def test_another_tower_or_preprocessing_has_another_store(make_model, processor, tmp_path):
    settings = FeatureArguments(feature_cache_dir=str(tmp_path))
    seen = set()

    def is_new(model, processor, settings=settings, bf16=False) -> bool:
        folder = store_of(model, processor, settings, bf16).folder
        known = folder in seen
        seen.add(folder)
        return not known

    model = make_model()
    assert is_new(model, processor) and not is_new(make_model(), processor)
    assert is_new(make_model(seed=1), processor)
    assert is_new(model, processor, bf16=True)
    assert is_new(model, processor, FeatureArguments(feature_cache_dir=str(tmp_path), feature_cache_dtype="int8"))
    with torch.no_grad():
        model.model.vision_tower.post_layernorm.bias[0] += 1e-6
    assert is_new(model, processor)
    with torch.no_grad():
        model.model.projector.linear.weight += 1  # what comes after the tower does not matter
        model.lm_head.weight += 1
    assert not is_new(model, processor)
    for name, value in (("image_mean", [0.4, 0.5, 0.5]), ("resample", 0), ("size", {"height": 24, "width": 24})):
        setattr(processor.image_processor, name, value)
        assert is_new(model, processor), name
    processor.max_tiles = 4
    assert is_new(model, processor)


def test_fingerprint_is_written_down_and_the_same_on_both_majors(make_model, processor, tmp_path):
    about = what_features_depend_on(make_model(), processor, bf16=False)
    store = store_of(make_model(), processor, FeatureArguments(feature_cache_dir=str(tmp_path)), False)
    assert json.loads((store.folder / "about.json").read_text()) == {**about, "layout": vars(store.layout)}
    assert about["images"]["resample"] == 3 and about["size"] == [32, 32]
    names = sorted(make_model().model.vision_tower.state_dict())
    assert names[0] == "embeddings.patch_embedding.bias"  # without the level that one of the majors adds
    with pytest.raises(ValueError, match="states another layout"):
        FeatureStore(store.folder, LAYOUT)


# Ended while building


def _drawn(batch, size):
    images = []
    for number in batch["index"]:
        pixels = np.random.default_rng(number).integers(0, 256, (size, size, 3)).astype(np.uint8)
        images.append([decode_image(_png(pixels), "noise")])
    return {"images": images}


def _png(pixels: np.ndarray) -> bytes:
    buffer = BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def _noise(count: int) -> Dataset:
    return Dataset.from_dict({"index": range(count)}).with_transform(partial(_drawn, size=32))


def _build_slowly(checkpoint: Path, folder: Path, count: int) -> None:
    """In a process of its own: builds a store, flushing every picture, a tenth of a second for each batch."""
    torch.set_num_threads(1)
    features_store.FeatureWriter.__init__.__defaults__ = (0.0,)
    features_build._TILES_AT_ONCE = 4
    model = SiQVLForConditionalGeneration.from_pretrained(checkpoint)
    processor = SiQVLProcessor.from_pretrained(checkpoint, trust_remote_code=True)
    model.model.vision_tower.register_forward_hook(lambda *_: time.sleep(0.1))
    cached_rows(_noise(count), model, processor, FeatureArguments(feature_cache_dir=str(folder)))


def test_a_killed_build_goes_on_where_it_was(checkpoint, processor, make_model, tmp_path):
    folder, count = tmp_path / "features", 200
    child = CONTEXT.Process(target=_build_slowly, args=(checkpoint, folder, count))
    child.start()
    deadline = time.monotonic() + 120
    while sum(path.stat().st_size for path in folder.rglob("*.index")) < 40 * ENTRY.itemsize:
        assert child.is_alive() and time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    assert child.exitcode == -signal.SIGKILL
    model, settings = make_model(), FeatureArguments(feature_cache_dir=str(folder))
    half = store_of(model, processor, settings, False)
    done = len(half)
    assert 40 <= done < count
    encoded = []
    hook = model.model.vision_tower.register_forward_hook(lambda *passed: encoded.append(len(passed[2][0])))
    rows = cached_rows(_noise(count), model, processor, settings)
    assert sum(encoded) == count - done
    hook.remove()
    store = store_of(model, processor, settings, False)
    assert len(store) == count
    for index in (0, done - 1, done, count - 1):
        picture = rows[index]["images"][0]
        pixels = processor(images=[_noise(count)[index]["images"][0]], return_tensors="pt")["pixel_values"]
        wanted = model.get_image_features(pixels, return_dict=True).last_hidden_state
        torch.testing.assert_close(
            store.read([picture.entry]).flatten(1, 2).float(), wanted.float(), rtol=2**-8, atol=1e-4
        )


def _build_with_others(rank: int, port: int, checkpoint: Path, folder: Path, count: int, results) -> None:
    """In one of two processes: builds its share, and says how many tiles its tower saw and how many are stored."""
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="localhost")
    os.environ.update(MASTER_PORT=str(port), ACCELERATE_USE_CPU="1")
    state = PartialState(cpu=True)
    model = SiQVLForConditionalGeneration.from_pretrained(checkpoint)
    processor = SiQVLProcessor.from_pretrained(checkpoint, trust_remote_code=True)
    seen = []
    model.model.vision_tower.register_forward_hook(lambda *passed: seen.append(len(passed[2][0])))
    rows = cached_rows(_noise(count), model, processor, FeatureArguments(feature_cache_dir=str(folder)))
    results.put((state.num_processes, sum(seen), len({row["images"][0].entry.tobytes() for row in rows})))
    state.destroy_process_group()


def test_processes_share_the_work(checkpoint, tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    results = CONTEXT.Queue()
    given = (port, checkpoint, tmp_path / "features", 31, results)
    children = [CONTEXT.Process(target=_build_with_others, args=(rank, *given)) for rank in range(2)]
    for child in children:
        child.start()
    found = [results.get(timeout=240) for _ in children]
    for child in children:
        child.join()
    assert sorted(found) == [(2, 15, 31), (2, 16, 31)]
    assert len(list((tmp_path / "features").rglob("*.features"))) == 2


# Where it pays


def decided(caplog) -> str:
    return " ".join(record.getMessage() for record in caplog.records if "vision features" in record.getMessage())


def prepared(recipe):
    model, processor = load_for_stage(recipe)
    return make_trainer(recipe, model, processor, mixture_for_stage(recipe, "answer", processor).rows)


@pytest.mark.parametrize(
    ("tower", "read", "says"),
    [
        (
            9e-3,
            1e-3,
            "stored: each of 10 rows is read 2 times; a tile's features take 9 ms to compute and 1 ms to read",
        ),
        (
            2e-3,
            1e-3,
            "not stored: a tile's features take 2 ms to compute and 1 ms to read, which does not pay for 2 times",
        ),
    ],
)
def test_what_reading_costs_decides(photos, tmp_path, caplog, monkeypatch, tower, read, says):
    monkeypatch.setattr(stored_features, "tile_costs", lambda *given: features_build.TileCosts(tower, read))
    with caplog.at_level(logging.INFO):
        prepared(recipe_for(photos, tmp_path))
    assert says in decided(caplog)


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_costs_are_measured_on_a_tile(make_model, processor, monkeypatch, dtype):
    model, seen = make_model(), []
    model.model.vision_tower.register_forward_hook(lambda *passed: seen.append(tuple(passed[2][0].shape[:2])))
    costs = features_build.tile_costs(model.train(), processor, dtype, False)
    assert seen == [(1, 16)] * 3 and model.model.vision_tower.training
    assert min(costs.read, costs.tower) > 0
    assert not features_build.TileCosts(1.0, 0.5).pay(2) and features_build.TileCosts(1.0, 0.4).pay(2)


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (("--num_train_epochs", "1"), "not stored: no row is read more than once, and 0% of the pictures"),
        (("--feature_cache", "off"), "not stored: feature_cache is off"),
        (("--unfreeze_vision_layers", "1"), "not stored: the vision tower trains"),
        (("--blind", "true"), "not stored: pictures are withheld"),
        (("--feature_cache_gb", "1e-6"), "not stored: the features take .* more than feature_cache_gb=1e-06"),
        ((), "stored: each of 10 rows is read 2 times"),
        (("--max_steps", "8", "--num_train_epochs", "1"), "stored: each of 10 rows is read 1.6 times"),
    ],
)
def test_features_are_stored_where_it_pays(photos, tmp_path, caplog, overrides, says):
    caplog.set_level(logging.INFO)
    trainer = prepared(recipe_for(photos, tmp_path, *overrides))
    assert re.search(f"vision features are {says}", decided(caplog))
    images = [image for row in trainer.train_dataset for image in row["images"]]
    assert all(isinstance(image, CachedPicture) == says.startswith("stored") for image in images)
    stored = list((tmp_path / "features").rglob("*.features"))
    assert bool(stored) == says.startswith("stored")


def test_one_epoch_reads_what_another_run_stored(photos, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    prepared(recipe_for(photos, tmp_path))
    caplog.clear()
    trainer = prepared(recipe_for(photos, tmp_path, "--num_train_epochs", "1"))
    assert "100% of the pictures are stored from another run" in decided(caplog)
    assert isinstance(trainer.train_dataset[0]["images"], list)
    assert all(isinstance(image, CachedPicture) for row in trainer.train_dataset for image in row["images"])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("--unfreeze_vision_layers", "1"), "feature_cache is on, but the vision tower trains"),
        (("--blind", "true"), "feature_cache is on, but pictures are withheld"),
        (("--feature_cache_gb", "1e-6"), "the features take 0.000131 GB, beside 0 GB in .*feature_cache_gb=1e-06"),
    ],
)
def test_what_cannot_be_stored_is_refused(photos, tmp_path, overrides, message):
    with pytest.raises(ValueError, match=message):
        prepared(recipe_for(photos, tmp_path, "--feature_cache", "on", *overrides))


def test_a_full_disk_is_refused_before_anything_is_computed(photos, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")(2**40, 2**40 - 5, 5)
    monkeypatch.setattr("siq_vl.data.feature_cache.build.shutil.disk_usage", lambda folder: usage)
    with pytest.raises(ValueError, match="has 5e-09 GB free"):
        prepared(recipe_for(photos, tmp_path, "--feature_cache", "on"))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("--feature_cache", "maybe"), "feature_cache is 'maybe'; it must be 'auto', 'on' or 'off'"),
        (("--feature_cache_gb", "0"), "feature_cache_gb is 0"),
        (("--feature_cache_dtype", "int4"), "feature_cache_dtype is 'int4'; it must be one of bfloat16, float32, int8"),
    ],
)
def test_unknown_settings_are_refused(photos, tmp_path, overrides, message):
    with pytest.raises(ValueError, match=message):
        recipe_for(photos, tmp_path, *overrides)


def test_the_error_of_fewer_bits_is_stated(photos, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    prepared(recipe_for(photos, tmp_path, "--feature_cache", "on", "--feature_cache_dtype", "int8"))
    text = " ".join(record.getMessage() for record in caplog.records)
    mean, largest = map(
        float, re.search(r"stored in int8 they differ by (\S+) on average, (\S+) at most", text).groups()
    )
    assert 1e-4 < mean < largest < 0.05


def test_the_plan_says_what_would_be_stored(photos, tmp_path):
    assert "computed once and stored in" in plan(recipe_for(photos, tmp_path), "answer")
    assert "each of" not in plan(recipe_for(photos, tmp_path, "--num_train_epochs", "1"), "answer")
    once = parse_recipe(("1",), ["--stage", "1", "--output_dir", str(tmp_path)])
    assert "not stored: no row is read more than once" in plan(once, "caption")
    assert not (tmp_path / "features").exists()


def test_any_rows_with_pictures_can_be_keyed(tmp_path, make_image):
    pictures = CachedPictures(FeatureStore(tmp_path, LAYOUT))
    keyed = with_cached_pictures(Dataset.from_dict({"images": [[make_image(0)], []]}), pictures)
    assert keyed[0]["images"][0].size == (32, 32) and keyed[1]["images"] == []
    image = make_image(1, size=(20, 30)).quantize(16)
    other = image.copy()
    other.putpalette(bytes(reversed(image.getpalette())))  # the same indices of other colours
    assert image.tobytes() == other.tobytes()
    one, two, three, four = (
        pictures.from_pixels(each) for each in (image, other, image.convert("RGB"), np.asarray(image.convert("RGB")))
    )
    assert one.key == three.key == four.key != two.key
    assert one.size == four.size == (20, 30)
