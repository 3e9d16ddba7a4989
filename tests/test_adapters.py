"""LoRA and QLoRA: what is adapted, what the adapter holds, and that merging changes nothing."""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import TrainerCallback

from siq_vl.data.figures.rows import training_rows
from siq_vl.modeling_siq_vl import SiQVLForConditionalGeneration
from siq_vl.training.arguments import ModelArguments
from siq_vl.training.quantization import load_quantized
from siq_vl.training.recipes import parse_recipe
from siq_vl.training.run import make_trainer, train_and_save
from siq_vl.training.stages import count_parameters, freeze_for_stage
from siq_vl.training.starting_model import load_for_stage

pytestmark = pytest.mark.usefixtures("own_precision")

SHORT = ("--max_steps", "3", "--effective_batch_size", "4", "--logging_steps", "1", "--dataloader_num_workers", "0")


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> Path:
    """A checkpoint to start stage 2 from: the two backbones, joined."""
    folder = tmp_path_factory.mktemp("start")
    model, processor = load_for_stage(parse_recipe(("1",), ["--output_dir", str(folder)]))
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def train(start: Path, folder: Path, *overrides: str):
    """Train three steps of stage 2 in float32; return the recipe and a batch of its data."""
    paths = ["--output_dir", str(folder), "--model_name_or_path", str(start)]
    recipe = parse_recipe(("2",), [*SHORT, "--learning_rate", "5e-3", "--bf16", "false", *paths, *overrides])
    model, processor = load_for_stage(recipe)
    trainer = make_trainer(recipe, model, processor, training_rows("train", 12, "answer", seed=9))
    train_and_save(trainer, processor, recipe)
    return recipe, trainer.data_collator([trainer.train_dataset[index] for index in range(4)])


def logits(model: torch.nn.Module, batch: dict) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**batch).logits


def assert_exact(merged: torch.Tensor, adapted: torch.Tensor) -> None:
    """Equal to 1e-5 of the largest logit: float32 adds up in another order once the adapter is merged."""
    torch.testing.assert_close(merged, adapted, rtol=0, atol=1e-5 * adapted.abs().max().item())


def merged_logits(folder: Path, batch: dict) -> torch.Tensor:
    return logits(SiQVLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32), batch)


def changed(before: Path, after: Path) -> set[str]:
    first, second = load_file(before / "model.safetensors"), load_file(after / "model.safetensors")
    return {name for name in first if not torch.equal(first[name], second[name])}


@pytest.mark.parametrize(
    ("overrides", "tower"),
    [
        ([], ()),
        (["--vision_lora", "true"], ("q_proj.weight", "k_proj.weight", "out_proj.weight", "fc1.weight", "fc2.weight")),
        (["--unfreeze_vision_layers", "1"], ("fc1.weight", "fc1.bias", "layer_norm1.weight", "post_layernorm.weight")),
    ],
    ids=["language model", "vision LoRA", "last vision layer"],
)
def test_adapter_and_merged_checkpoint_are_one_function(start, tmp_path, overrides, tower):
    _, batch = train(start, tmp_path, *overrides)
    base = SiQVLForConditionalGeneration.from_pretrained(start, dtype=torch.float32)
    original = logits(base, batch)
    adapted = logits(PeftModel.from_pretrained(base, str(tmp_path / "adapter")), batch)
    assert (adapted - original).abs().max() > 0.1
    assert_exact(merged_logits(tmp_path, batch), adapted)
    vision = {name for name in changed(start, tmp_path) if ".vision_tower." in name}
    assert all(any(name.endswith(wanted) for name in vision) for wanted in tower)
    assert bool(vision) == bool(tower)
    if "--unfreeze_vision_layers" in overrides:
        last = max(int(name.split(".layers.")[1].split(".")[0]) for name in vision if ".layers." in name)
        assert all(f".layers.{last}." in name or "post_layernorm" in name for name in vision)
    if "--vision_lora" in overrides:
        assert not any("embeddings" in name or "norm" in name or name.endswith(".bias") for name in vision)


def test_the_adapter_holds_all_that_trains(start, tmp_path):
    train(start, tmp_path, "--unfreeze_vision_layers", "1")
    names = load_file(tmp_path / "adapter" / "adapter_model.safetensors").keys()
    assert any("projector.linear.weight" in name for name in names)
    assert any("vision_tower.encoder.layers" in name and "fc1.weight" in name for name in names)
    assert not any("embed_tokens" in name or "lm_head" in name for name in names)


def test_qlora_trains_saves_reloads_and_merges(start, tmp_path):
    recipe, batch = train(start, tmp_path, "--load_in_4bit", "true")
    base = load_quantized(str(start), recipe.model, torch.float32, torch.float32)
    original = logits(base, batch)
    reloaded = logits(PeftModel.from_pretrained(base, str(tmp_path / "adapter")), batch)
    assert (reloaded - original).abs().max() > 0.1
    assert_exact(merged_logits(tmp_path, batch), reloaded)
    says = "trained on an NF4 base and merged into that base, dequantized to float32"
    assert says in json.loads((tmp_path / "training_settings.json").read_text())["merged_into"]
    card = (tmp_path / "README.md").read_text()
    assert says in card and "on an NF4 base (QLoRA)" in card
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())


def test_only_the_language_model_is_quantized_and_what_trains_is_float32(start, tmp_path):
    paths = ["--output_dir", str(tmp_path), "--model_name_or_path", str(start)]
    recipe = parse_recipe(("2",), [*SHORT, *paths, "--load_in_4bit", "true"])
    model, processor = load_for_stage(recipe)
    packed = {name for name, weight in model.named_parameters() if type(weight).__name__ == "Params4bit"}
    linears = model.config.text_config.num_hidden_layers * 7
    assert len(packed) == linears and all(".language_model.layers." in name for name in packed)
    trainer = make_trainer(recipe, model, processor, training_rows("train", 12, "answer", seed=9))
    trained, frozen = count_parameters(trainer.model)
    assert trained.keys() == {"LoRA", "projector"}
    assert {weight.dtype for weight in trainer.model.parameters() if weight.requires_grad} == {torch.float32}
    plain = SiQVLForConditionalGeneration.from_pretrained(start)
    assert frozen["language_model"] == sum(weight.numel() for weight in plain.model.language_model.parameters())


class EvaluateEveryStep(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_evaluate = True


def test_qlora_goes_on_after_an_evaluation(start, tmp_path):
    """Bitsandbytes repacks NF4 weights in evaluation mode on some processors, after which training would fail."""
    paths = ["--output_dir", str(tmp_path), "--model_name_or_path", str(start)]
    recipe = parse_recipe(("2",), [*SHORT, *paths, "--load_in_4bit", "true"])
    model, processor = load_for_stage(recipe)
    trainer = make_trainer(recipe, model, processor, training_rows("train", 12, "answer", seed=9))
    trainer.eval_dataset = training_rows("validation", 4, "answer")
    trainer.add_callback(EvaluateEveryStep())
    trainer.train()
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(losses) == 3 and losses[0] != losses[-1]


def test_a_bfloat16_base_keeps_what_trains_in_float32(start, tmp_path):
    paths = ["--output_dir", str(tmp_path), "--model_name_or_path", str(start)]
    recipe = parse_recipe(("2",), [*SHORT, *paths, "--dtype", "bfloat16"])
    model, processor = load_for_stage(recipe)
    trainer = make_trainer(recipe, model, processor, training_rows("train", 12, "answer", seed=9))
    types = {
        flag: {weight.dtype for name, weight in trainer.model.named_parameters() if weight.requires_grad == flag}
        for flag in (True, False)
    }
    assert types[True] == {torch.float32}
    assert torch.bfloat16 in types[False]
    train_and_save(trainer, processor, recipe)
    saved = load_file(tmp_path / "model.safetensors")
    assert {weight.dtype for weight in saved.values()} == {torch.float32}  # merged without rounding


def test_settings_without_a_place_are_refused(make_model):
    model = make_model()
    with pytest.raises(ValueError, match="unfreeze_vision_layers is 9, but the vision tower has 2 layers"):
        freeze_for_stage(model, "2", ModelArguments(unfreeze_vision_layers=9))
    with pytest.raises(ValueError, match="load_in_4bit and vision_lora go with LoRA"):
        freeze_for_stage(model, "1", ModelArguments(load_in_4bit=True))


def test_stage_1_can_unfreeze_the_towers_last_layers(make_model):
    model = make_model()
    assert freeze_for_stage(model, "1", ModelArguments(unfreeze_vision_layers=1)) is None
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    kept = (".projector.", ".vision_tower.encoder.layers.1.", ".vision_tower.post_layernorm.")
    assert all(any(part in name for part in kept) for name in trained)
    assert all(any(part in name for name in trained) for part in kept)
