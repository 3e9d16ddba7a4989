"""Two processes learn what one learns: every stage, with rows without pictures on one of them, or on both."""

import importlib.util
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
root, folder, batch, kind, *engine = sys.argv[1:]
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

if kind == "fsdp2":
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType
    begin = AcceleratorState.__init__

    def shard_on_cpu(self, *args, **kwargs):
        # accelerate shards on accelerators alone, and says nothing: these processes claim to have some.
        if PartialState._shared_state.get("distributed_type") == DistributedType.MULTI_CPU:
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        begin(self, *args, **kwargs)

    AcceleratorState.__init__ = shard_on_cpu

def draw(batch, task):
    # Rows 0, 3, 4, 5, 8, 11, 12, 13, ... have no picture: each process meets them alone, and both at once.
    made = []
    for index in batch["index"]:
        blind = index % 8 in (0, 3, 4, 5)
        made.append({**row(sample("train", index, seed=9), task, blind=blind), "source": "text" if blind else "pictures"})
    return {name: [each[name] for each in made] for name in made[0]}

# Stage 2 twice: the second time with stored features and, where the engine has them, packed rows.
levers = ["--feature_cache", "on", "--feature_cache_dtype", "float32", "--feature_cache_dir", f"{folder}/features"]
if not kind.startswith("zero"):
    levers += ["--batching", "packed", "--pack_tokens", "256"]
runs = (("1", "caption", "stage1", []), ("2", "answer", "stage2", []), ("3", "reason", "stage3", []))
for stage, task, name, more in (*runs, ("2", "answer", "levers", levers)):
    start = [] if stage == "1" else ["--model_name_or_path", f"{folder}/stage{int(stage) - 1}"]
    recipe = parse_recipe((stage,), ["--stage", stage, "--output_dir", f"{folder}/{name}", "--max_steps", "6",
        "--effective_batch_size", "2", "--per_device_train_batch_size", batch, "--logging_steps", "1", "--warmup_steps",
        "1", "--learning_rate", "2e-3", "--bf16", "false", "--dataloader_num_workers", "0", "--sample_steps", "3",
        "--sample_count", "2", "--sample_tokens", "4", *start, *more, *engine])
    rows = Dataset.from_dict({"index": range(12)}).with_transform(lambda batch: draw(batch, task))
    model, processor = load_for_stage(recipe)
    trainer = make_trainer(recipe, model, processor, rows, list(training_rows("validation", 2, task)))
    train_and_save(trainer, processor, recipe)
    training = recipe.training
    sharding = trainer.accelerator.distributed_type.value
    # In one piece: two processes write to the same pipe.
    sys.stderr.write(f"{stage} {training.world_size} {training.gradient_accumulation_steps} {sharding}\\n")
"""


def environment() -> dict[str, str]:
    left_out = ("ACCELERATE_MIXED_PRECISION", "RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    kept = {name: value for name, value in os.environ.items() if name not in left_out}
    return {**kept, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}


FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
}
SHARDED = {"ddp": "MULTI_CPU", "fsdp2": "FSDP", "zero2": "DEEPSPEED", "zero3": "DEEPSPEED"}
KINDS = list(SHARDED)
# Largest differences from one process, of losses and of weights. ZeRO adds gradients up in buckets: where they are nearly
# nothing, AdamW's first steps make a whole step of the last digits.
NEAR = {"ddp": (1e-4, 1e-3), "fsdp2": (1e-4, 1e-3), "zero2": (1e-3, 5e-3), "zero3": (1e-3, 5e-3)}


class Runs(dict):
    """What one process and what two processes leave, by how they share the work; run when first asked for."""

    def __init__(self, root: Path) -> None:
        super().__init__()
        self.root = root
        (root / "program.py").write_text(PROGRAM)

    def __missing__(self, kind: str) -> Path:
        folder = self.root / kind
        engine: list[str] = []
        if kind.startswith("zero"):
            if importlib.util.find_spec("deepspeed") is None:
                pytest.skip("deepspeed is not installed: `make test-devices` installs it")
            zero = {"stage": int(kind[-1]), "stage3_gather_16bit_weights_on_model_save": True}
            settings = {"zero_optimization": zero, "bf16": {"enabled": "auto"}, "gradient_clipping": "auto"}
            settings |= {"train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto"}
            file = self.root / f"{kind}.json"
            file.write_text(json.dumps(settings))
            engine = ["--deepspeed", str(file)]
        launcher = [sys.executable]
        if kind != "one":
            launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
            engine += ["--use_cpu", "true", "--ddp_backend", "gloo"]
        command = [*launcher, str(self.root / "program.py"), str(REPO_ROOT), str(folder), "2", kind, *engine]
        variables = {**environment(), **(FSDP2 if kind == "fsdp2" else {})}
        self[kind] = folder  # what failed is not run again for the next test
        ran = subprocess.run(command, env=variables, cwd=self.root, capture_output=True, text=True, timeout=600)
        assert ran.returncode == 0, ran.stdout + ran.stderr
        said = "1 1 NO" if kind == "one" else f"2 1 {SHARDED[kind]}"
        assert f"1 {said}" in ran.stderr and f"3 {said}" in ran.stderr
        return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Runs:
    return Runs(tmp_path_factory.mktemp("distributed"))


def log_of(folder: Path) -> list[dict]:
    entries = map(json.loads, (folder / "training_log.jsonl").read_text().splitlines())
    return [entry for entry in entries if "loss" in entry]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stage", ["1", "2", "3"])
def test_two_processes_have_the_losses_of_one(folders, stage, kind):
    one, two = (log_of(folders[name] / f"stage{stage}") for name in ("one", kind))
    assert len(one) == len(two) == 6
    for first, second in zip(one, two, strict=True):
        assert second["loss"] == pytest.approx(first["loss"], abs=NEAR[kind][0])
        assert second["grad_norm"] == pytest.approx(first["grad_norm"], rel=1e-3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stage", ["1", "2", "3"])
def test_two_processes_have_the_weights_of_one(folders, stage, kind):
    one, two = (load_file(folders[name] / f"stage{stage}" / "model.safetensors") for name in ("one", kind))
    assert one.keys() == two.keys()
    for name in one:
        differences = (one[name] - two[name]).abs()
        assert differences.max() < NEAR[kind][1]
        assert differences.mean() < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_stored_features_and_packed_rows_have_the_losses_of_neither(folders, kind):
    one, two = (log_of(folders[name] / folder) for name, folder in (("one", "stage2"), (kind, "levers")))
    assert len(one) == len(two) == 6
    for first, second in zip(one, two, strict=True):
        assert second["loss"] == pytest.approx(first["loss"], abs=NEAR[kind][0])
        assert second["grad_norm"] == pytest.approx(first["grad_norm"], rel=1e-3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stage", ["1", "2", "3"])
def test_the_loss_of_a_source_is_that_over_all_processes(folders, stage, kind):
    one, two = (log_of(folders[name] / f"stage{stage}") for name in ("one", kind))
    seen = set()
    for first, second in zip(one, two, strict=True):
        names = {name for name in first if name.startswith("loss/")}
        assert names == {name for name in second if name.startswith("loss/")}
        for name in names:
            assert second[name] == pytest.approx(first[name], abs=NEAR[kind][0])
        assert min(first[name] for name in names) - 1e-4 <= first["loss"] <= max(first[name] for name in names) + 1e-4
        seen |= {frozenset(names)}
    # Steps without a picture, with one, and with two were among them.
    assert seen >= {frozenset({"loss/text"}), frozenset({"loss/text", "loss/pictures"})}


@pytest.mark.parametrize("kind", ["one", *KINDS])
def test_samples_are_shown_once_a_step(folders, kind):
    for stage in ("1", "2", "3"):
        lines = (folders[kind] / f"stage{stage}" / "samples.jsonl").read_text().splitlines()
        entries = [json.loads(line) for line in lines]
        assert [entry["step"] for entry in entries] == [0, 3, 6]
        assert all(len(entry["answers"]) == 2 for entry in entries)


def test_the_settings_say_how_many_there_were(folders):
    for count, kind in ((1, "one"), (2, "ddp")):
        settings = json.loads((folders[kind] / "stage2" / "training_settings.json").read_text())
        assert settings["processes"] == count
        assert settings["effective_batch_size"] == 2
        assert settings["training"]["per_device_train_batch_size"] == 2 // count
