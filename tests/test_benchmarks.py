"""Every benchmark runs; what they compute besides times is right."""

import logging
import runpy
import sys

import datasets
import pytest
import torch
from conftest import REPO_ROOT
from peft import get_peft_model
from PIL import Image, ImageChops
from torch.utils.flop_counter import FlopCounterMode
from transformers.utils import logging as transformers_logging

from siq_vl.evaluation.predictions import judge
from siq_vl.evaluation.statistics import clustered_ratio
from siq_vl.results import by_name, read_results, table_rows
from siq_vl.training.arguments import ModelArguments
from siq_vl.training.stages import count_parameters, freeze_for_stage

BENCHMARKS = REPO_ROOT / "benchmarks"
# What a benchmark's table has to name.
SHOWN = {
    "training": ["plain TRL, pixels, padded", "packed rows", "stored vision features", "all levers"],
    "idefics3": ["Idefics3, plain TRL", "SiQ-VL, plain TRL", "SiQ-VL, all levers"],
    "generation": ["time to first token", "decoding", "SiQ-VL, static cache"],
    "checkpointing": ["tower without a graph", "checkpointing as it is", "tower hooked and checkpointed"],
    "loader": ["pictures decoded, 0 processes", "stored features, 0 processes"],
    "start_up": ["as before", "first start", "next start", "first row of a stream"],
    "memory": ["| stage 1 | no | 2 |", "| LoRA | yes | 2 |"],
    "scaling": ["tokens a row", "pictures in", "MiB resident"],
    "step": ["tokens/s", "| sdpa |"],
    "fits": ["PREDICTION", "| 8 GB | 0.5B | 3 | QLoRA |"],
}


@pytest.fixture(autouse=True)
def as_it_was(monkeypatch):
    """Lets benchmarks be imported, and undoes what they silence."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    verbosity = transformers_logging.get_verbosity()
    yield
    logging.disable(logging.NOTSET)
    transformers_logging.set_verbosity(verbosity)
    transformers_logging.enable_progress_bar()
    datasets.enable_progress_bars()


@pytest.mark.parametrize("name", SHOWN)
def test_runs(name, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [name, "--quick", "--results", "kept.json"])
    runpy.run_path(str(BENCHMARKS / f"{name}.py"), run_name="__main__")
    printed = capsys.readouterr().out
    assert all(text in printed for text in SHOWN[name])
    lines = [line for table in read_results(tmp_path / "kept.json")["tables"].values() for line in table]
    assert lines and all(f"| {' | '.join(line)} |" in printed for line in lines)


def test_tiles_are_measured_as_a_user_gets_them(monkeypatch, capsys, tmp_path, processor):
    """All tiles and the thumbnail of pictures that show the whole figure, mostly across the borders of tiles."""
    import anyres

    asked = {}

    def predict(model, processor, items):
        asked[len(asked)] = processor.max_tiles, [item.image for item in items]
        return [judge(item, f"<answer>{item.answer}</answer>") for item in items]

    monkeypatch.setattr(anyres, "predict", predict)
    monkeypatch.setattr(anyres, "load_checkpoint", lambda path: (None, processor))
    results = tmp_path / "anyres.json"
    monkeypatch.setattr(sys, "argv", ["anyres", "--count", "8", "--results", str(results)])
    anyres.main()
    lines = table_rows(capsys.readouterr().out)
    assert [line[:4] for line in lines[1:]] == [
        ["in one tile", "all tiles and the thumbnail", "8", "8"],
        ["in one tile", "plain resize", "8", "8"],
        ["in one tile", "upper bound: the right tile alone", "8", "8"],
        ["anywhere", "all tiles and the thumbnail", "8", "8"],
        ["anywhere", "plain resize", "8", "8"],
    ]
    assert read_results(results)["tables"]["anyres"] == lines
    assert [tiles for tiles, _ in asked.values()] == [4, 1, 1, 4, 1]
    alone, straddling = asked[2][1], 0
    for _, pictures in (asked[0], asked[3]):
        for figure, picture in zip(alone, pictures, strict=True):
            assert picture.size == (192, 192) and len(processor(images=picture, max_tiles=4)["pixel_values"]) == 5
            blank = Image.new("RGB", picture.size, picture.getpixel((0, 0)))
            left, top, right, bottom = ImageChops.difference(picture, blank).getbbox()
            inner = ImageChops.difference(figure, blank.crop((0, 0, 96, 96))).getbbox()
            drawn = picture.crop((left, top, right, bottom))
            assert drawn.tobytes() == figure.crop(inner).tobytes()
            straddling += left < 96 < right or top < 96 < bottom
    assert straddling >= 6


def test_questions_are_counted(monkeypatch, capsys, tmp_path):
    import questions

    monkeypatch.setattr(sys, "argv", ["questions", "--count", "30", "--share", "0.001"])
    questions.main()
    lines = by_name(table_rows(capsys.readouterr().out))
    assert lines["all"]["n"] == "30" and lines["new combinations"]["n"] == "6"
    assert {line["in the language model's text"] for line in lines.values()} == {"0"}
    twice = [questions.sample("test", index, hard=False) for index in (0, 0, 1, 2)]
    assert questions.widest(twice) == pytest.approx((6 / 4) ** 0.5)


def test_a_cluster_counts_once():
    """Four scores in two clusters that agree are two scores: the error is sqrt(2) times as large."""
    assert clustered_ratio([0, 0, 1, 1], ["a", "a", "b", "b"]) == pytest.approx(2**0.5)
    assert clustered_ratio([0, 0, 1, 1], ["a", "b", "c", "d"]) == pytest.approx(1)
    with pytest.raises(ValueError, match="got 2 scores, 1 of them distinct, and 2 clusters"):
        clustered_ratio([1, 1], ["a", "b"])


def test_ratios_are_taken_within_a_round():
    import common

    rates = iter([10.0, 30.0, 40.0, 10.0, 20.0, 80.0])  # warmed up, then back and forth
    measured = common.interleaved(
        {name: lambda: {"rate": next(rates)} for name in ("baseline", "lever")}, repetitions=2
    )
    assert [each["rate"] for each in measured["baseline"]] == [40.0, 80.0]
    assert [each["rate"] for each in measured["lever"]] == [10.0, 20.0]
    assert "| lever | 15 | 10 to 20 | 0.25 | 0.25 to 0.25 |" in common.ratio_table(measured, "rate", "samples/s")
    slower = common.ratio_table(measured, "rate", "s", lower_is_better=True)
    assert "| lever | 15 | 10 to 20 | 4.00 | 4 to 4 |" in slower


def test_the_peak_is_what_is_held_at_once():
    import memory

    def work():
        kept = torch.ones(1000)  # 4000 bytes, throughout
        for _ in range(3):
            torch.ones(2000)  # 8000 bytes, one at a time
        return kept

    assert 12_000 <= memory.peak_on_cpu(work) < 16_000


@pytest.mark.parametrize("stage", ["1", "2"])
def test_operations_of_a_step(make_model, stage):
    """Held against torch's own count, of a forward and a backward pass."""
    import fits

    model = make_model(vision={"hidden_size": 64}, text={"hidden_size": 64, "intermediate_size": 160})
    model.set_attn_implementation("eager")  # products that the counter sees one by one
    config, batch_size, length = model.config, 2, 40
    peft_config = freeze_for_stage(model, stage, ModelArguments(lora_r=4))
    trained = get_peft_model(model, peft_config) if peft_config else model
    lora = count_parameters(trained)[0].get("LoRA", 0)
    ids = torch.full((batch_size, length), 9)
    ids[:, : config.image_seq_length] = config.image_token_id
    side = config.vision_config.image_size
    with FlopCounterMode(display=False) as counter:
        trained(input_ids=ids, labels=ids, pixel_values=torch.rand(batch_size, 3, side, side)).loss.backward()
    flops = fits.step_flops(config, batch_size, length, batch_size * length, lora)
    assert flops == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_the_largest_batch_fits_and_the_next_does_not(make_config):
    import fits

    run = fits.Run("0.5b", "2", "LoRA", False, 64)
    config = make_config()
    sizes = fits.count(config, "2", ModelArguments(lora_r=4))
    limit = fits.predicted(run, config, sizes, 8) + 1
    assert fits.largest_batch(run, config, sizes, limit) == 8
    assert fits.predicted(run, config, sizes, 16) > limit
    assert fits.largest_batch(run, config, sizes, 1000) == 0


@pytest.mark.parametrize(("method", "checkpointing"), [("stage 1", False), ("LoRA", True)])
def test_predicted_memory_is_within_a_tenth_of_the_measured_peak(method, checkpointing, monkeypatch, tmp_path):
    import memory

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["memory", "--repetitions", "1"])
    options = memory.parse_options()
    options.length, options.supervised = 256, 48
    setting = memory.Setting(method, checkpointing, 1)
    predicted = memory.predicted_peak(options, setting).total
    assert predicted == pytest.approx(memory.measured_peak(options, setting), rel=0.1)
