"""Recipes: every YAML parses and has a plan, the effective batch is kept, and what cannot run is refused."""

import runpy
import sys
from pathlib import Path

import pytest
import yaml

from siq_vl.planning.plan import count_tokens, plan
from siq_vl.planning.sizes import count, predicted_memory
from siq_vl.training.backbones import planned_config, random_model
from siq_vl.training.callbacks import FreeMemoryCallback
from siq_vl.training.recipes import RECIPES, REPO_ROOT, parse_recipe
from siq_vl.training.run import rows_needed
from siq_vl.training.settings import keep_effective_batch

TASKS = {"1": "caption", "2": "answer", "3": "reason"}
YAMLS = sorted(RECIPES.glob("*/stage*.yaml"))
PAPER = [path for path in YAMLS if path.parent.name.startswith("siq-vl")]


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """Names on the Hub fail at once, instead of after a search for a network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def files_behind(path: Path) -> list[Path]:
    """Return a recipe's file, its base, the base of that and so on."""
    files = [path]
    while base := yaml.safe_load(files[-1].read_text()).get("base"):
        files.append(files[-1].parent / base)
    return files


def name_of(path: Path) -> str:
    return f"{path.parent.name}-{path.stem}"


def parse(path: Path, *overrides: str):
    stage, _, config = path.stem.removeprefix("stage").partition("-")
    chosen = ["--stage", stage, "--recipe", path.parent.name, *(["--variant", config] if config else [])]
    return parse_recipe((stage,), [*chosen, *overrides])


def plan_of(path: Path, *overrides: str) -> str:
    recipe = parse(path, *overrides)
    return plan(recipe, TASKS[recipe.stage])


def test_there_are_recipes():
    assert {path.parent.name for path in YAMLS} == {"tiny", "siq-vl-0.5b", "siq-vl-1.5b"}
    for folder in RECIPES.iterdir():
        assert {"stage1.yaml", "stage2.yaml"} <= {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("path", YAMLS, ids=name_of)
def test_every_recipe_parses_and_has_a_plan(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = plan_of(path, "--sources", "figures")
    recipe = parse(path)
    for section in ("Model", "Parameters", "Data", "Steps", "Tokens", "Memory of one device"):
        assert f"\n{section}" in text
    training, batch = recipe.training, recipe.run.effective_batch_size
    assert f"{training.max_steps:,} steps" in text or f"{training.num_train_epochs:g} epochs" in text
    if recipe.stage != "3":
        assert batch == (128 if path in PAPER else 32)
    assert f"{batch} samples a step" in text
    assert rows_needed(recipe) == (recipe.data.train_samples or training.max_steps * batch)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("path", PAPER, ids=name_of)
def test_the_reports_numbers(path):
    recipe = parse(path)
    training, stage = recipe.training, recipe.stage
    assert training.per_device_train_batch_size in (1, 2)
    assert training.gradient_checkpointing and training.bf16
    assert recipe.run.free_memory_steps > 0
    if stage == "3":
        return
    assert training.learning_rate == {"1": 1e-3, "2": 2e-5}[stage]
    assert training.gradient_accumulation_steps * training.per_device_train_batch_size == 128
    if stage == "1":
        assert training.max_steps == 1000
        assert recipe.model.vision_tower == "google/siglip2-large-patch16-512"
        size = "0.5B" if "0.5b" in path.parent.name else "1.5B"
        assert recipe.model.language_model == f"Qwen/Qwen2.5-{size}-Instruct"
        assert [source.name for source in recipe.data.sources] == ["HuggingFaceM4/FineVision/sharegpt4v(knowledge)"]
    else:
        assert (recipe.model.lora_r, recipe.model.lora_alpha) == (64, 16)
        assert len(recipe.model.lora_target_modules) == 7


@pytest.mark.parametrize("path", PAPER, ids=name_of)
def test_what_the_report_does_not_say_is_marked(path):
    silent = ("lr_scheduler_type", "warmup_steps", "optim", "weight_decay", "max_grad_norm", "seed", "bf16", "dtype")
    lines = {}
    # What a file states wins over what its base does.
    for file in reversed(files_behind(path)):
        for line in file.read_text().splitlines():
            if ":" in line:
                lines[line.split(":")[0]] = line
    for name in silent:
        marked = "# report silent" in lines[name] or (path.stem.startswith("stage3") and "# report: " in lines[name])
        assert marked or (path.stem, name) == ("stage3-internvl-chartqa", "lr_scheduler_type"), name


def test_the_reports_totals_are_printed(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    arguments = ["--recipe", "siq-vl-0.5b", "--sources", "figures", "--dry_run"]
    printed = {}
    for stage in ("1", "2"):
        monkeypatch.setattr(sys, "argv", ["train_sft.py", "--stage", stage, *arguments])
        runpy.run_path(str(REPO_ROOT / "train_sft.py"), run_name="__main__")
        printed[stage] = capsys.readouterr().out
    for text in printed.values():
        for total in ("316,742,656", "494,032,768", "3,670,912", "849,639,168", "38,863,744", "4.57%"):
            assert total in text
    assert "529,225,600" in printed["2"]
    assert "stage 2 with LoRA r=64 trains 38,863,744 of 849,639,168 = 4.57%" in printed["1"]
    assert list(tmp_path.iterdir()) == []


def test_a_plan_says_what_it_cannot_read(tmp_path):
    text = plan_of(RECIPES / "siq-vl-0.5b" / "stage1.yaml", "--sources", str(tmp_path / "nowhere"))
    assert "cannot be read here: there is no source" in text
    assert "256 an image; texts are counted where the data can be read" in text


def test_a_plan_counts_the_tokens_that_are_trained_on(processor, make_image):
    def row(n_images: int) -> dict:
        content = [{"type": "image"}] * n_images + [{"type": "text", "text": "ab"}]
        return {
            "images": [make_image()] * n_images,
            "prompt": [{"role": "user", "content": content}],
            "completion": [{"role": "assistant", "content": [{"type": "text", "text": "cde"}]}],
        }

    counted = count_tokens(processor, [row(1), row(0)])
    assert counted.rows == 2
    assert counted.image == processor.image_seq_length / 2
    answer = len(processor.tokenizer("cde<|im_end|>")["input_ids"])
    assert counted.supervised == answer
    # One image more is its tokens and the two marks around it.
    assert counted.mean == counted.longest - (processor.image_seq_length + 2) / 2


def test_predicted_memory_knows_the_types_of_frozen_weights():
    path = RECIPES / "siq-vl-0.5b" / "stage2.yaml"
    weights = {}
    for name, overrides in {
        "float32": [],
        "bfloat16": ["--dtype", "bfloat16"],
        "nf4": ["--load_in_4bit", "true"],
    }.items():
        recipe = parse(path, *overrides)
        config, _ = planned_config(recipe)
        sizes = count(config, "2", recipe.model)
        weights[name] = predicted_memory(recipe, config, sizes, 1, 1024).weights
    frozen = 304_147_456 + 494_032_768
    assert weights["float32"] - weights["bfloat16"] == 2 * frozen
    linears = 494_032_768 - 151_936 * 896
    assert weights["float32"] - weights["nf4"] == pytest.approx(3.48 * linears, rel=0.01)


@pytest.mark.parametrize(("processes", "per_device", "accumulated"), [(1, 2, 64), (2, 2, 32), (8, 2, 8), (64, 2, 1)])
def test_the_effective_batch_is_kept(monkeypatch, processes, per_device, accumulated):
    training = parse(RECIPES / "siq-vl-0.5b" / "stage1.yaml").training
    training.gradient_accumulation_steps = 1
    monkeypatch.setattr(type(training), "world_size", property(lambda self: processes))
    keep_effective_batch(training, 128)
    assert training.per_device_train_batch_size == per_device
    assert training.gradient_accumulation_steps == accumulated


def test_a_device_takes_less_where_all_together_would_take_too_much(monkeypatch):
    training = parse(RECIPES / "tiny" / "stage1.yaml").training
    monkeypatch.setattr(type(training), "world_size", property(lambda self: 4))
    keep_effective_batch(training, 32)
    assert (training.per_device_train_batch_size, training.gradient_accumulation_steps) == (8, 1)


def test_an_effective_batch_that_does_not_divide_is_refused(monkeypatch):
    training = parse(RECIPES / "siq-vl-0.5b" / "stage1.yaml").training
    monkeypatch.setattr(type(training), "world_size", property(lambda self: 3))
    with pytest.raises(ValueError, match="effective_batch_size is 128, but 3 processes x .* 2 = 6 samples at once"):
        keep_effective_batch(training, 128)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gradient_accumulation_steps", "3"], "gradient_accumulation_steps is 3, but effective_batch_size 32"),
        (["--effective_batch_size", "-1"], "effective_batch_size is -1; it must be 0 or more"),
        (["--sample_steps", "-1"], "sample_steps is -1"),
        (["--sample_count", "0"], "sample_count is 0; it must be at least 1"),
        (["--save_total_limit", "1"], "save_total_limit is 1, which deletes the last good checkpoint"),
        (["--dtype", "float16"], "dtype is 'float16'; it must be 'float32' or 'bfloat16'"),
        (["--dtype", "bfloat16", "--bf16", "false"], "dtype is bfloat16 and bf16 is false"),
        (["--lora_dropout", "1"], "lora_dropout is 1.0"),
        (["--unfreeze_vision_layers", "-2"], "unfreeze_vision_layers is -2"),
        (["--vision_lora", "true", "--unfreeze_vision_layers", "2"], "the tower takes one of the two"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        parse(RECIPES / "tiny" / "stage2.yaml", *arguments)


def test_saving_out_of_step_with_logging_is_warned_of(caplog):
    parse(RECIPES / "tiny" / "stage1.yaml", "--save_strategy", "steps", "--save_steps", "15")
    assert "save_steps 15 is no multiple of logging_steps 10" in caplog.text


def test_the_token_is_taken_out_of_the_trainers_settings():
    recipe = parse(RECIPES / "tiny" / "stage1.yaml", "--push_to_hub", "true", "--hub_token", "hf_secret")
    assert recipe.hub.push_to_hub and recipe.hub.token == "hf_secret"
    assert not recipe.training.push_to_hub
    assert "hf_secret" not in repr(recipe) + str(recipe.training.to_dict())


def test_random_weights_make_a_model_that_its_tokenizer_fits(make_config, monkeypatch, caplog):
    small = make_config(text={"vocab_size": 1000})
    monkeypatch.setattr("siq_vl.training.backbones.planned_config", lambda recipe: (small, "small sizes"))
    model, processor = random_model(parse(RECIPES / "siq-vl-0.5b" / "stage1.yaml", "--random_weights", "true"))
    assert "RANDOM WEIGHTS, in the sizes of small sizes" in caplog.text
    assert len(processor.tokenizer) <= model.config.text_config.vocab_size
    assert processor.image_seq_length == model.config.image_seq_length
    assert processor.image_token_id == model.config.image_token_id
    for name in ("image_token_id", "vision_start_token_id", "vision_end_token_id"):
        assert getattr(processor, name) == getattr(model.config, name)


def test_memory_is_freed_at_intervals():
    class State:
        global_step = 0

    callback = FreeMemoryCallback(3)
    for State.global_step in range(1, 10):
        callback.on_step_end(None, State, None)
    assert callback.times == 3
    callback.on_evaluate(None, State, None)
    callback.on_save(None, State, None)
    assert callback.times == 5


@pytest.mark.parametrize("path", sorted((REPO_ROOT / "accelerate_configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_configs_are_read(path):
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(path))
    assert config.num_processes >= 1
    kinds = {"cpu": "MULTI_GPU", "ddp": "MULTI_GPU", "fsdp2": "FSDP", "zero2": "DEEPSPEED", "zero3": "DEEPSPEED"}
    assert str(config.distributed_type).endswith(kinds[path.stem])
    assert config.use_cpu == (path.stem == "cpu")
    stated = yaml.safe_load(path.read_text())
    if path.stem == "fsdp2":
        assert stated["fsdp_config"]["fsdp_version"] == 2
    if path.stem.startswith("zero"):
        assert stated["deepspeed_config"]["zero_stage"] == int(path.stem[-1])


def test_there_is_a_config_for_each_engine():
    names = {path.stem for path in (REPO_ROOT / "accelerate_configs").glob("*.yaml")}
    assert names == {"cpu", "ddp", "fsdp2", "zero2", "zero3"}
