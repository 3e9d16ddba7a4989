"""The three stages: what is supervised, what changes, what is left behind, and what is refused."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from siq_vl.data.figures.rows import training_rows
from siq_vl.modeling_siq_vl import SiQVLForConditionalGeneration
from siq_vl.training.arguments import ModelArguments
from siq_vl.training.recipes import parse_recipe
from siq_vl.training.run import make_trainer, rows_needed, train_and_save
from siq_vl.training.stages import freeze_for_stage
from siq_vl.training.starting_model import load_for_stage

SHORT = (
    "--max_steps",
    "3",
    "--effective_batch_size",
    "4",
    "--logging_steps",
    "1",
    "--dataloader_num_workers",
    "0",
)
TASKS = {"1": "caption", "2": "answer", "3": "reason"}


def parse(stage: str, *overrides: str):
    return parse_recipe(("1", "2", "3"), ["--stage", stage, *SHORT, *overrides])


def trainer_for(recipe, task: str):
    model, processor = load_for_stage(recipe)
    rows = training_rows(
        "train", rows_needed(recipe), task, seed=9, **({"direct_share": 0.5} if task == "reason" else {})
    )
    return make_trainer(recipe, model, processor, rows), processor


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.fixture(scope="module")
def stages(tmp_path_factory) -> dict[str, Path]:
    """Three short stages, each from the last: folders by stage, and the weights that stage 1 began with as "0"."""
    root = tmp_path_factory.mktemp("stages")
    folders = {"0": root / "stage0"}
    for stage, task in TASKS.items():
        folders[stage] = root / f"stage{stage}"
        overrides = ["--output_dir", str(folders[stage])]
        if stage != "1":
            overrides += ["--model_name_or_path", str(folders[str(int(stage) - 1)])]
        recipe = parse(stage, *overrides)
        trainer, processor = trainer_for(recipe, task)
        if stage == "1":
            trainer.model.save_pretrained(folders["0"])
        train_and_save(trainer, processor, recipe)
    return folders


@pytest.mark.parametrize("stage", ["1", "2", "3"])
def test_labels_are_the_response_and_its_end_of_turn(stage, tmp_path):
    overrides = ["--output_dir", str(tmp_path)]
    if stage != "1":  # the data path does not depend on the weights: any checkpoint will do
        load_for_stage(parse("1", "--output_dir", str(tmp_path)))[0].save_pretrained(tmp_path / "start")
        load_for_stage(parse("1", "--output_dir", str(tmp_path)))[1].save_pretrained(tmp_path / "start")
        overrides += ["--model_name_or_path", str(tmp_path / "start")]
    recipe = parse(stage, *overrides)
    trainer, processor = trainer_for(recipe, TASKS[stage])
    rows = [trainer.train_dataset[index] for index in range(8)]
    wanted = [row["completion"][0]["content"][0]["text"] + "<|im_end|>" for row in rows]
    if stage == "3":  # rows answered without thinking carry the empty think tags in their prompt
        wanted = [text.removeprefix("<think></think>") for text in wanted]
        assert any("<think>" not in text for text in wanted)
    batch = trainer.data_collator(rows)
    assert batch["pixel_values"].shape[0] == len(rows)
    for labels, text in zip(batch["labels"], wanted, strict=True):
        supervised = labels[labels != -100]
        assert torch.equal(supervised, torch.tensor(processor.tokenizer(text)["input_ids"]))
        decoded = processor.tokenizer.decode(supervised)
        assert decoded.replace(" ", "") == text.replace(" ", "")


def changed(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


def test_stage_1_changes_the_projector_alone(stages):
    before, after = weights(stages["0"]), weights(stages["1"])
    assert changed(before, after) == {name for name in before if ".projector." in name} != set()


@pytest.mark.parametrize("stage", ["2", "3"])
def test_later_stages_change_projector_and_adapted_layers(stages, stage):
    before, after = weights(stages[str(int(stage) - 1)]), weights(stages[stage])
    linears = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    intended = {
        name
        for name in before
        if ".projector." in name
        or (".language_model." in name and name.endswith(tuple(f"{linear}.weight" for linear in linears)))
    }
    assert changed(before, after) == intended
    assert len([name for name in intended if ".language_model." in name]) == 7 * 4


def test_every_stage_leaves_a_complete_checkpoint(stages):
    for stage in TASKS:
        names = {path.name for path in stages[stage].iterdir()}
        assert names >= {
            "config.json",
            "model.safetensors",
            "tokenizer.json",
            "chat_template.jinja",
            "processor_config.json",
            "preprocessor_config.json",
            "configuration_siq_vl.py",
            "modeling_siq_vl.py",
            "processing_siq_vl.py",
            "README.md",
            "training_settings.json",
            "training_log.jsonl",
        }
        assert ("adapter" in names) == (stage != "1")
        assert ".incomplete" not in names
        config = json.loads((stages[stage] / "config.json").read_text())
        assert config["auto_map"]["AutoModelForVision2Seq"] == "modeling_siq_vl.SiQVLForConditionalGeneration"


def test_merged_checkpoint_equals_adapter_on_its_base(stages):
    from peft import PeftModel

    base = SiQVLForConditionalGeneration.from_pretrained(stages["1"])
    adapted = PeftModel.from_pretrained(base, stages["2"] / "adapter").eval()
    merged = SiQVLForConditionalGeneration.from_pretrained(stages["2"]).eval()
    ids = torch.arange(10, 60).reshape(2, 25)
    torch.testing.assert_close(adapted(input_ids=ids).logits, merged(input_ids=ids).logits, atol=1e-4, rtol=1e-4)


def test_one_seed_gives_one_loss_curve(tmp_path):
    curves = []
    for name in ("first", "second"):
        trainer, _ = trainer_for(parse("1", "--output_dir", str(tmp_path / name)), "caption")
        trainer.train()
        curves.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert len(curves[0]) == 3
    assert curves[0] == curves[1]
    trainer, _ = trainer_for(parse("1", "--output_dir", str(tmp_path / "third"), "--seed", "7"), "caption")
    trainer.train()
    assert [entry["loss"] for entry in trainer.state.log_history if "loss" in entry] != curves[0]


def test_a_crash_while_saving_leaves_no_checkpoint(stages, tmp_path, monkeypatch):
    recipe = parse("1", "--output_dir", str(tmp_path))
    trainer, processor = trainer_for(recipe, "caption")

    def full_disk(*arguments, **options):
        raise OSError("no space left on device")

    monkeypatch.setattr(type(processor), "save_pretrained", full_disk)
    with pytest.raises(OSError, match="no space left"):
        train_and_save(trainer, processor, recipe)
    assert not (tmp_path / "config.json").exists()


def test_overrides_win_over_the_yaml(tmp_path):
    recipe = parse("2", "--lora_r", "8", "--learning_rate", "1e-5", "--output_dir", str(tmp_path))
    assert (recipe.model.lora_r, recipe.training.learning_rate) == (8, 1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--stage", "4"], "stage is '4'"),
        ([], "stage is None"),
        (["--stage", "1", "--recipe", "huge"], "recipe is 'huge'; it must be one of .*tiny"),
        (["--stage", "2", "--lora_r", "0"], "lora_r is 0"),
        (["--stage", "2", "--direct_share", "0.1"], "direct_share"),
        (["--stage", "2", "--variant", "quick"], "variant is 'quick'; stage 2 of recipe 'tiny' has its default alone"),
    ],
)
def test_bad_recipes_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        parse_recipe(("1", "2"), arguments)


def test_stage_2_without_stage_1_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        ValueError, match=r"holds no checkpoint: run `python train_sft.py --stage 1 --recipe tiny` first"
    ):
        load_for_stage(parse("2"))
    assert list(tmp_path.rglob("config.json")) == []


def test_unknown_stage_freezes_nothing(make_model):
    with pytest.raises(ValueError, match="stage is '9'"):
        freeze_for_stage(make_model(), "9", ModelArguments())
