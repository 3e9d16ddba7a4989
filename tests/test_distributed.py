"""Two processes learn what one learns: every stage, with rows without pictures on one of them, or on both."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

REPO_ROOT = Path(__file__).resolve().parent.parent

# Runs the three stages one after the other; the same program in one process and in each of two.
PROGRAM = """
import json, os, sys
root, folder, batch = sys.argv[1], sys.argv[2], sys.argv[3]
sys.path.insert(0, root)
import torch
torch.set_num_threads(1)
from datasets import Dataset
from siq_vl.data.figures.dataset import sample
from siq_vl.data.figures.rows import row
from siq_vl.training.starting_model import load_for_stage
from siq_vl.training.recipes import parse_recipe
from siq_vl.training.run import hold_out, make_trainer, train_and_save
from siq_vl.data.figures.rows import training_rows

def draw(batch, task):
    # Rows 0, 3, 4, 5, 8, 11, 12, 13, ... have no picture: each process meets them alone, and both at once.
    made = []
    for index in batch["index"]:
        blind = index % 8 in (0, 3, 4, 5)
        made.append({**row(sample("train", index, seed=9), task, blind=blind), "source": "text" if blind else "pictures"})
    return {name: [each[name] for each in made] for name in made[0]}

for stage, task in (("1", "caption"), ("2", "answer"), ("3", "reason")):
    start = [] if stage == "1" else ["--model_name_or_path", f"{folder}/stage{int(stage) - 1}"]
    recipe = parse_recipe((stage,), ["--stage", stage, "--output_dir", f"{folder}/stage{stage}", "--max_steps", "6",
        "--effective_batch_size", "2", "--per_device_train_batch_size", batch, "--logging_steps", "1", "--warmup_steps",
        "1", "--learning_rate", "2e-3", "--bf16", "false", "--dataloader_num_workers", "0", "--sample_steps", "3",
        "--sample_count", "2", "--sample_tokens", "4", *start])
    rows = Dataset.from_dict({"index": range(12)}).with_transform(lambda batch: draw(batch, task))
    model, processor = load_for_stage(recipe)
    trainer = make_trainer(recipe, model, processor, rows, list(training_rows("validation", 2, task)))
    train_and_save(trainer, processor, recipe)
    training = recipe.training
    # In one piece: two processes write to the same pipe.
    sys.stderr.write(f"{stage} {training.world_size} {training.gradient_accumulation_steps}\\n")
"""


def environment() -> dict[str, str]:
    left_out = ("ACCELERATE_MIXED_PRECISION", "RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    kept = {name: value for name, value in os.environ.items() if name not in left_out}
    return {**kept, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[int, Path]:
    """What one process and what two processes leave, by their number."""
    root = tmp_path_factory.mktemp("distributed")
    program = root / "program.py"
    program.write_text(PROGRAM)
    folders = {}
    launchers = {
        1: [sys.executable],
        2: [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"],
    }
    for count, launcher in launchers.items():
        folders[count] = root / f"of{count}"
        command = [*launcher, str(program), str(REPO_ROOT), str(folders[count]), "2"]
        ran = subprocess.run(command, env=environment(), cwd=root, capture_output=True, text=True)
        assert ran.returncode == 0, ran.stdout + ran.stderr
        assert f"1 {count} 1" in ran.stderr and f"3 {count} 1" in ran.stderr
    return folders


def log_of(folder: Path) -> list[dict]:
    entries = map(json.loads, (folder / "training_log.jsonl").read_text().splitlines())
    return [entry for entry in entries if "loss" in entry]


@pytest.mark.parametrize("stage", ["1", "2", "3"])
def test_two_processes_have_the_losses_of_one(folders, stage):
    one, two = (log_of(folders[count] / f"stage{stage}") for count in (1, 2))
    assert len(one) == len(two) == 6
    for first, second in zip(one, two, strict=True):
        assert second["loss"] == pytest.approx(first["loss"], abs=1e-4)
        assert second["grad_norm"] == pytest.approx(first["grad_norm"], rel=1e-3)


@pytest.mark.parametrize("stage", ["1", "2", "3"])
def test_two_processes_have_the_weights_of_one(folders, stage):
    one, two = (load_file(folders[count] / f"stage{stage}" / "model.safetensors") for count in (1, 2))
    assert one.keys() == two.keys()
    assert all((one[name] - two[name]).abs().max() < 1e-3 for name in one)


@pytest.mark.parametrize("stage", ["1", "2", "3"])
def test_the_loss_of_a_source_is_that_over_all_processes(folders, stage):
    one, two = (log_of(folders[count] / f"stage{stage}") for count in (1, 2))
    seen = set()
    for first, second in zip(one, two, strict=True):
        names = {name for name in first if name.startswith("loss/")}
        assert names == {name for name in second if name.startswith("loss/")}
        for name in names:
            assert second[name] == pytest.approx(first[name], abs=1e-4)
        assert min(first[name] for name in names) - 1e-4 <= first["loss"] <= max(first[name] for name in names) + 1e-4
        seen |= {frozenset(names)}
    # Steps without a picture, with one, and with two were among them.
    assert seen >= {frozenset({"loss/text"}), frozenset({"loss/text", "loss/pictures"})}


@pytest.mark.parametrize("count", [1, 2])
def test_samples_are_shown_once_a_step(folders, count):
    for stage in ("1", "2", "3"):
        lines = (folders[count] / f"stage{stage}" / "samples.jsonl").read_text().splitlines()
        entries = [json.loads(line) for line in lines]
        assert [entry["step"] for entry in entries] == [0, 3, 6]
        assert all(len(entry["answers"]) == 2 for entry in entries)


def test_the_settings_say_how_many_there_were(folders):
    for count, folder in folders.items():
        settings = json.loads((folder / "stage2" / "training_settings.json").read_text())
        assert settings["processes"] == count
        assert settings["effective_batch_size"] == 2
        assert settings["training"]["per_device_train_batch_size"] == 2 // count
