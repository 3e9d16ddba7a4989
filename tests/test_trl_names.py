"""What a user of TRL knows holds here: `--config FILE`, recipes anywhere, and the names of TRL's fields."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from conftest import REPO_ROOT
from peft import get_peft_model
from peft.tuners.lora import LoraLayer

from siq_vl.loading import load_model
from siq_vl.training import starting_model
from siq_vl.training.arguments import LINEARS, ModelArguments
from siq_vl.training.checkpoints import model_and_adapter, run_settings, settings_unnamed_before
from siq_vl.training.quantization import dequantized, merge_adapter
from siq_vl.training.recipes import RECIPES, parse_recipe, read_settings
from siq_vl.training.resume import checkpoint_to_resume, mark_complete
from siq_vl.training.run import mixture_for_stage
from siq_vl.training.stages import freeze_for_stage
from siq_vl.training.starting_model import load_for_stage

TINY = {"vision_tower": "backbones/siglip2-tiny", "language_model": "backbones/qwen2.5-tiny"}
SHIPPED = ["--model_name_or_path", str(REPO_ROOT)]


def write(path: Path, **fields) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(fields))
    return path


# --config FILE


def test_config_is_a_file_anywhere_and_the_command_line_wins(tmp_path, monkeypatch):
    file = write(
        tmp_path / "deep" / "mine.yaml", **TINY, learning_rate="1e-4", lora_r=4, max_steps=7, output_dir="here"
    )
    monkeypatch.chdir(tmp_path)
    recipe = parse_recipe(("1", "2"), ["--stage", "2", "--config", "deep/mine.yaml", "--lora_r", "8"])
    assert (recipe.training.learning_rate, recipe.model.lora_r, recipe.training.max_steps) == (1e-4, 8, 7)
    assert (recipe.name, recipe.training.output_dir) == ("mine", "here")
    # Nothing of recipe tiny is under it; what it does not state is TRL's or ours.
    assert recipe.run.effective_batch_size == 0 and recipe.training.weight_decay == 0.0
    assert recipe.training.lr_scheduler_type == "linear" and recipe.training.save_strategy == "steps"
    equals = parse_recipe(("1", "2"), ["--stage=2", f"--config={file}", "--lora-r=8"])
    assert equals.model == recipe.model


def test_config_beside_a_recipe_changes_what_it_states(tmp_path):
    file = write(tmp_path / "mine.yaml", learning_rate=0.5)
    recipe = parse_recipe(("2",), ["--recipe", "tiny", "--config", str(file)])
    assert (recipe.training.learning_rate, recipe.model.lora_alpha, recipe.name) == (0.5, 128, "tiny")


def test_environment_variables_of_a_config_are_set(tmp_path, monkeypatch):
    monkeypatch.setenv("SIQ_VL_TEST", "before")
    file = write(tmp_path / "mine.yaml", env={"SIQ_VL_TEST": 3})
    parse_recipe(("2",), ["--config", str(file)])
    assert os.environ["SIQ_VL_TEST"] == "3"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_stepz": 3}, "mine.yaml has --max_stepz, which stage 2 does not know"),
        ({"direct_share": 0.5}, "mine.yaml has --direct_share, which stage 2 does not know"),
        ({"base": "mine.yaml"}, "stands on itself"),
        ({"base": "nowhere.yaml"}, "nowhere.yaml cannot be read as YAML"),
        ({"lora_r": 0}, "lora_r is 0; .* in mine.yaml or on the command line"),
    ],
)
def test_files_that_cannot_be_meant_are_refused(tmp_path, fields, message):
    file = write(tmp_path / "mine.yaml", **fields)
    with pytest.raises(ValueError, match=message):
        parse_recipe(("2",), ["--config", str(file)])


def test_the_former_use_of_config_names_the_flag_that_took_its_place():
    with pytest.raises(
        ValueError, match="config is 'internvl_chartqa', and there is no such file.*--variant internvl_"
    ):
        parse_recipe(("3",), ["--recipe", "siq-vl-0.5b", "--config", "internvl_chartqa"])


# Recipes anywhere


def test_a_recipe_is_any_folder_and_its_paths_are_found_from_anywhere(tmp_path, monkeypatch):
    """Stage 1 of a recipe outside the repository: backbones of the repository, rows beside the recipe."""
    folder = tmp_path / "recipes" / "of-mine"
    write(folder / "common.yaml", max_steps=2, effective_batch_size=4, report_to="none", seed=5)
    write(folder / "stage1.yaml", base="common.yaml", **TINY, sources=[{"path": "rows.jsonl"}])
    write(folder / "stage2-odd.yaml", base="common.yaml", seed=6)
    messages = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "This."}]
    (folder / "rows.jsonl").write_text(json.dumps({"messages": messages}) + "\n")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    recipe = parse_recipe(("1", "2"), ["--stage", "1", "--recipe", "../recipes/of-mine"])
    assert (recipe.name, recipe.training.output_dir) == ("of-mine", "outputs/of-mine/stage1")
    assert (recipe.training.seed, recipe.training.max_steps) == (5, 2)
    _, processor = load_for_stage(recipe)
    rows = mixture_for_stage(recipe, "answer", processor).rows
    assert rows[0]["messages"][-1]["content"][0]["text"] == "This."
    odd = parse_recipe(("1", "2"), ["--stage", "2", "--recipe", str(folder), "--variant", "odd"])
    assert (odd.training.seed, odd.training.output_dir) == (6, "outputs/of-mine/stage2-odd")
    with pytest.raises(ValueError, match="train_sft.py --stage 1 --recipe .*recipes/of-mine` first"):
        load_for_stage(odd)


def test_a_folder_that_would_write_over_a_recipe_of_the_repo_is_refused(tmp_path):
    write(tmp_path / "tiny" / "stage1.yaml", **TINY)
    with pytest.raises(ValueError, match="where this repository's recipe tiny leaves its own: give the folder another"):
        parse_recipe(("1",), ["--recipe", str(tmp_path / "tiny")])
    assert parse_recipe(("1",), ["--recipe", str(RECIPES / "tiny")]).folder == RECIPES / "tiny"


def test_a_later_file_wins_over_its_base():
    settings = read_settings(RECIPES / "siq-vl-1.5b" / "stage3.yaml")
    assert (settings["dtype"], settings["direct_share"], settings["seed"]) == ("bfloat16", 0.15, 42)
    assert "base" not in settings


# TRL's names


def test_attention_reaches_language_model_and_tower(tmp_path):
    for stage, more in (("1", []), ("2", SHIPPED), ("2", [*SHIPPED, "--load_in_4bit"])):
        recipe = parse_recipe((stage,), ["--attn_implementation", "eager", "--output_dir", str(tmp_path), *more])
        model, _ = load_for_stage(recipe)
        assert model.language_model.config._attn_implementation == "eager"
        assert model.model.vision_tower.config._attn_implementation == "eager"


@pytest.mark.parametrize(("flag", "scale"), [("--lora_r", 32 / 16), ("--use_rslora", 32 / math.sqrt(16))])
def test_rank_stabilized_lora_has_another_scale(make_model, flag, scale):
    flags = [flag, "16"] if flag == "--lora_r" else [flag, "--lora_r", "16"]
    arguments = parse_recipe(("2",), [*flags, "--lora_alpha", "32"]).model
    model = make_model()
    adapted = get_peft_model(model, freeze_for_stage(model, "2", arguments))
    scales = {module.scaling["default"] for module in adapted.modules() if isinstance(module, LoraLayer)}
    assert scales == {scale}


def test_dora_trains_magnitudes_and_merges_to_the_same_function(make_model):
    model = make_model()
    arguments = parse_recipe(("2",), ["--use_dora", "--lora_r", "2"]).model
    adapted = get_peft_model(model, freeze_for_stage(model, "2", arguments)).eval()
    magnitudes = [weight for name, weight in adapted.named_parameters() if "lora_magnitude_vector" in name]
    assert magnitudes and all(weight.requires_grad for weight in magnitudes)
    for name, weight in adapted.named_parameters():
        if "lora_" in name:
            weight.data += 0.1 * torch.rand_like(weight)
    ids = torch.arange(5, 15)[None]
    with torch.no_grad():
        before = adapted(input_ids=ids).logits
        torch.testing.assert_close(adapted.merge_and_unload()(input_ids=ids).logits, before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("flags", "layer", "check"),
    [
        (["--load_in_8bit"], "Linear8bitLt", lambda weight: weight.dtype == torch.int8),
        (
            ["--load_in_4bit", "--bnb_4bit_quant_type", "fp4"],
            "Linear4bit",
            lambda weight: weight.quant_state.quant_type == "fp4" and weight.quant_state.nested,
        ),
        (
            ["--load_in_4bit", "--no_use_bnb_nested_quant", "--bnb_4bit_quant_storage", "bfloat16"],
            "Linear4bit",
            lambda weight: (
                weight.quant_state.quant_type == "nf4"
                and not weight.quant_state.nested
                and weight.dtype == torch.bfloat16
            ),
        ),
    ],
    ids=["int8", "fp4", "nf4"],
)
def test_the_language_model_is_quantized_as_asked(tmp_path, flags, layer, check):
    pytest.importorskip("bitsandbytes")
    recipe = parse_recipe(("2",), [*SHIPPED, *flags, "--bf16", "false", "--output_dir", str(tmp_path)])
    model, _ = load_for_stage(recipe)
    quantized = {name: module for name, module in model.named_modules() if type(module).__name__ == layer}
    assert quantized and all(name.startswith("model.language_model.") for name in quantized)
    assert all(check(module.weight) for module in quantized.values())
    whole, plain = load_model(str(REPO_ROOT)), dequantized(model)
    for name in quantized:
        before, after = whole.get_submodule(name).weight, plain.get_submodule(name).weight
        assert after.dtype == torch.float32 and 0 < (after - before).abs().max() < 0.25 * before.abs().max()


def test_training_on_int8_merges_into_what_was_trained_on(tmp_path):
    """The merged checkpoint is the dequantized base and the adapter, not the weights from before."""
    pytest.importorskip("bitsandbytes")
    recipe = parse_recipe(("2",), [*SHIPPED, "--load_in_8bit", "--lora_r", "2", "--output_dir", str(tmp_path)])
    model, _ = load_for_stage(recipe)
    adapted = get_peft_model(model, freeze_for_stage(model, "2", recipe.model))
    loss = adapted(input_ids=torch.arange(5, 15)[None], labels=torch.arange(5, 15)[None]).loss
    loss.backward()
    assert any(weight.grad is not None and weight.grad.any() for weight in adapted.parameters())
    adapted.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    merged, says = merge_adapter(adapted, tmp_path / "adapter", recipe.model)
    assert "trained on an int8 base and merged into that base, dequantized to float32" in says
    name = "model.language_model.layers.0.self_attn.q_proj"
    again, _ = load_for_stage(recipe)
    # An adapter that has learnt nothing changes nothing.
    torch.testing.assert_close(merged.get_submodule(name).weight, dequantized(again).get_submodule(name).weight)


def test_a_revision_is_asked_of_the_hub(monkeypatch, tmp_path):
    asked = {}
    monkeypatch.setattr(starting_model, "load_model", lambda path, **more: asked.update({"model": (path, more)}))
    monkeypatch.setattr(
        starting_model, "load_processor", lambda path, **more: asked.update({"processor": (path, more)})
    )
    chosen = ["--model_name_or_path", "someone/siq-vl", "--model_revision", "v2", "--trust_remote_code"]
    starting_model._load(parse_recipe(("2",), [*chosen, "--output_dir", str(tmp_path)]))
    assert [(path, more["revision"]) for path, more in asked.values()] == [("someone/siq-vl", "v2")] * 2
    with pytest.raises(ValueError, match="model_revision is 'v2', but stage 1 joins two backbones"):
        parse_recipe(("1",), ["--model_revision", "v2"])


@pytest.mark.parametrize(
    ("given", "meant"),
    [(["all-linear"], list(LINEARS)), (["q_proj"], ["q_proj"]), (["q_proj", "v_proj"], ["q_proj", "v_proj"])],
)
def test_target_modules_are_named_as_in_peft(given, meant):
    assert parse_recipe(("2",), ["--lora_target_modules", *given]).model.lora_target_modules == meant


def test_dataset_name_is_a_source():
    names = ["--dataset_name", "someone/rows", "--dataset_config", "part", "--dataset_train_split", "validation"]
    [source] = parse_recipe(("2",), ["--recipe", "siq-vl-0.5b", *names, "--dataset_streaming"]).data.sources
    assert (source.path, source.subset, source.split, source.streaming) == ("someone/rows", "part", "validation", True)


def test_datasets_are_sources_whichever_is_stated_last(tmp_path):
    datasets = [{"path": "a/b", "name": "part", "split": "test", "data_files": "x.parquet"}, {"path": "c/d"}]
    file = write(tmp_path / "mine.yaml", datasets=datasets, streaming=True)
    beside = ["--recipe", "siq-vl-0.5b", "--config", str(file)]
    first, second = parse_recipe(("2",), beside).data.sources
    assert (first.path, first.subset, first.split, first.data_files) == ("a/b", "part", "test", "x.parquet")
    assert (second.path, second.split) == ("c/d", "train") and first.streaming and second.streaming
    [source] = parse_recipe(("2",), [*beside, "--dataset_name", "e/f"]).data.sources[:1]
    assert source.path == "a/b"  # as in TRL, `datasets` win
    [source] = parse_recipe(("2",), [*beside, "--sources", "figures"]).data.sources
    assert source.path == "figures"


def test_what_is_always_so_is_accepted():
    training = parse_recipe(("2",), ["--assistant_only_loss", "--trust_remote_code", "--use_peft"]).training
    assert not training.assistant_only_loss  # TRL would change the chat template


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--packing"], "packing is true, but TRL packs text alone: use batching: packed"),
        (["--padding_free"], "padding_free is true, but TRL packs text alone"),
        (["--use_liger_kernel"], "use_liger_kernel is true, but Liger has no kernels"),
        (["--model_init_kwargs", "{}"], "model_init_kwargs is .* use attn_implementation, dtype, model_revision"),
        (
            ["--chat_template_path", "x.jinja"],
            "chat_template_path is 'x.jinja', but texts are made by the checkpoint's",
        ),
        (["--eos_token", "</s>"], "eos_token is '</s>', but texts are made by the checkpoint's own processor"),
        (["--dataset_text_field", "body"], "dataset_text_field is 'body', but .* use sources"),
        (["--dataset_kwargs", '{"skip_prepare_dataset": true}'], "dataset_kwargs is .*: drop it"),
        (["--dataset_num_proc", "4"], "dataset_num_proc is 4, .* use dataloader_num_workers"),
        (["--shuffle_dataset"], "shuffle_dataset is true, but rows are drawn at random in any case"),
        (["--truncation_mode", "keep_end"], "truncation_mode is 'keep_end', but a row longer than max_length"),
        (["--packing_strategy", "wrapped"], "packing_strategy is 'wrapped', but TRL packs text alone"),
        (["--eval_packing", "true"], "eval_packing is true, but evaluation pads"),
        (["--pad_to_multiple_of", "8"], "pad_to_multiple_of is .*8.*, but a batch is padded to its longest row"),
        (
            ["--completion_only_loss", "false"],
            "completion_only_loss is false, but the loss is always on every assistant",
        ),
        (["--auto_find_batch_size"], "auto_find_batch_size is true, but it would change how many samples"),
        (["--eval_strategy", "steps"], "eval_strategy is 'steps', but stages 1 and 2 validate nothing"),
        (["--test_split_size", "0.1"], "test_split_size is 0.1, but stages 1 and 2 validate nothing"),
        (["--dataset_test_split", "dev"], "dataset_test_split is 'dev', but stages 1 and 2 validate nothing"),
        (["--ignore_bias_buffers"], "ignore_bias_buffers is true, but this model has no such buffers"),
        (["--dataset_config", "part"], "dataset_config is set, but what is trained on are the sources"),
        (["--sources", "figures", "--dataset_name", "a/b"], "sources and dataset_name are both set"),
        (["--dtype", "auto"], "dtype is 'auto'; it must be 'float32' or 'bfloat16'"),
        (["--lora_modules_to_save", "lm_head"], "lora_modules_to_save is .'lm_head'., but the projector always trains"),
        (["--lora_target_parameters", "x"], "lora_target_parameters is .'x'., but these decoders have no parameters"),
        (["--lora_task_type", "SEQ_CLS"], "lora_task_type is 'SEQ_CLS', but the model writes texts"),
        (["--load_in_8bit", "--load_in_4bit"], "can't use 8 bit and 4 bit precision at the same time"),
    ],
)
def test_what_cannot_work_is_refused_with_what_to_use_instead(arguments, message):
    with pytest.raises(ValueError, match=message):
        parse_recipe(("2",), arguments)


@pytest.mark.parametrize("name", ["load_in_8bit", "use_rslora", "use_dora", "use_peft"])
def test_stage_1_has_no_adapter(make_model, name):
    with pytest.raises(ValueError, match=rf"{name} (goes with LoRA|is set, but stage 1 trains the projector alone)"):
        recipe = parse_recipe(("1",), [f"--{name}"])
        freeze_for_stage(make_model(), "1", recipe.model)


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        ({"columns": ["a"]}, "columns of a/b is .* use sources"),
        ({"fraction": 0.5}, "fraction of a/b is 0.5, which is not read here: use sources with a weight"),
        ({"data_dir": "x"}, "data_dir of a/b is 'x'"),
        ({"data_files": ["x", "y"]}, "data_files of a/b is .*name one file an entry"),
    ],
)
def test_parts_of_a_dataset_that_mean_something_else_are_refused(tmp_path, dataset, message):
    file = write(tmp_path / "mine.yaml", datasets=[{"path": "a/b", **dataset}])
    with pytest.raises(ValueError, match=message):
        parse_recipe(("2",), ["--config", str(file)])


def test_a_run_that_an_earlier_version_began_goes_on(tmp_path):
    """Its checkpoints name no field that has come since; the fields had their defaults then."""
    recipe = parse_recipe(("2",), ["--output_dir", str(tmp_path)])
    settings = run_settings(recipe)
    for name in ("model.attn_implementation", "model.model_revision", "adapter.use_rslora", "adapter.load_in_8bit"):
        del settings[name]
    (tmp_path / "checkpoint-3").mkdir()
    mark_complete(tmp_path / "checkpoint-3", 3, settings)
    defaults = settings_unnamed_before()
    assert checkpoint_to_resume(tmp_path, run_settings(recipe), defaults).name == "checkpoint-3"
    changed = parse_recipe(("2",), ["--output_dir", str(tmp_path), "--use_rslora"])
    with pytest.raises(ValueError, match="adapter.use_rslora = False, and now it is True"):
        checkpoint_to_resume(tmp_path, run_settings(changed), defaults)
    model, adapter = model_and_adapter(ModelArguments())
    assert "lora_r" in adapter and "lora_r" not in model and "dtype" in model


# --help

HELP = [["train_sft.py"], ["train_distill.py"], ["ask.py"], ["app.py"], ["export_idefics3.py"], ["export_onnx.py"]]
HELP += [["export_gguf.py"], ["export_web.py"]]


@pytest.mark.parametrize("command", HELP, ids=" ".join)
def test_help_imports_nothing_that_takes_seconds(command, tmp_path):
    shown = subprocess.run(
        [sys.executable, "-X", "importtime", *command, "--help"], cwd=REPO_ROOT, capture_output=True, text=True
    )
    assert shown.returncode == 0 and "--help" in shown.stdout
    imported = {
        line.rpartition("|")[2].strip() for line in shown.stderr.splitlines() if line.startswith("import time:")
    }
    assert not imported & {"torch", "transformers", "datasets", "peft", "accelerate", "matplotlib"}
