"""Sizes and memory: the report's numbers, and estimates held against what autograd really keeps."""

import sys

import pytest
import torch
from peft import get_peft_model

from siq_vl.modeling_siq_vl import SiQVLForConditionalGeneration
from siq_vl.planning.sizes import TrainingSetup, count, main, parse_options, training_memory
from siq_vl.training.arguments import STAGES, ModelArguments
from siq_vl.training.backbones import model_config
from siq_vl.training.recipes import RECIPES, recipe_names
from siq_vl.training.stages import freeze_for_stage

SMALL_LANGUAGE_MODEL = "Qwen/Qwen2.5-0.5B-Instruct"


def counted(stage="2", lora_r=64, language_model=SMALL_LANGUAGE_MODEL):
    return count(model_config(ModelArguments(language_model=language_model)), stage, ModelArguments(lora_r=lora_r))


def test_the_reports_table():
    sizes = counted()
    assert sizes.vision == 316_742_656 and sizes.vision_tower == 304_147_456
    assert sizes.language_model == 494_032_768 and sizes.lora == 35_192_832
    assert sizes.text == 529_225_600
    assert sizes.projector == 3_670_912
    assert sizes.total == 849_639_168
    assert sizes.trainable == 38_863_744
    assert round(100 * sizes.trainable_share, 2) == 4.57


def test_rank_16():
    sizes = counted(lora_r=16)
    assert sizes.trainable == 12_469_120
    assert round(100 * sizes.trainable_share, 1) == 1.5


def test_stage_1_trains_the_projector_alone():
    sizes = counted(stage="1")
    assert sizes.lora == 0 and sizes.trainable == sizes.projector == 3_670_912


def test_the_larger_language_model():
    """Added up by hand from the published shape: 28 layers, 1536 wide, 12 heads of 128 with 2 for keys and values."""
    sizes = counted(language_model="Qwen/Qwen2.5-1.5B-Instruct")
    width, keys, inner, vocabulary = 1536, 2 * 128, 8960, 151_936
    attention = 2 * width * width + 2 * width * keys + width + 2 * keys  # queries, keys and values have a bias
    assert sizes.language_model == 28 * (attention + 3 * width * inner + 2 * width) + width + vocabulary * width
    rows_and_columns = 2 * 2 * width + 2 * (width + keys) + 3 * (width + inner)
    assert sizes.lora == 28 * 64 * rows_and_columns
    assert sizes.projector == 4 * 1024 * width + width


@pytest.mark.parametrize(
    ("recipe", "stage"),
    [(name, stage) for name in recipe_names() for stage in STAGES if (RECIPES / name / f"stage{stage}.yaml").exists()],
)
def test_every_recipe_has_a_table(monkeypatch, capsys, recipe, stage):
    monkeypatch.setattr(sys, "argv", ["sizes", "--recipe", recipe, "--stage", stage])
    main()
    printed = capsys.readouterr().out
    assert f"recipe {recipe}, stage {stage}" in printed
    assert "| **trainable** |" in printed and "| optimizer |" in printed


def test_options_win_over_the_recipe():
    options = parse_options(["--recipe", "tiny", "--lora_r", "3", "--no-bf16"])
    assert options.lora_r == 3 and options.bf16 is False
    assert options.language_model == "backbones/qwen2.5-tiny" and options.gradient_checkpointing is False


def kept_by_autograd(config, stage, batch_size, length, bf16, checkpointing) -> int:
    """Bytes that a forward pass leaves for the backward pass, weights and attention masks aside."""
    model = SiQVLForConditionalGeneration(config).train()
    peft_config = freeze_for_stage(model, stage, ModelArguments(lora_r=1))
    model = get_peft_model(model, peft_config) if peft_config else model
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    kept = {}

    def keep(tensor):
        if tensor.untyped_storage().data_ptr() not in own and tensor.shape[-2:] != (length, length):
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    input_ids = torch.full((batch_size, length), 9)
    input_ids[:, : config.image_seq_length] = config.image_token_id
    pixel_values = torch.randn(batch_size, 3, config.vision_config.image_size, config.vision_config.image_size)
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=bf16),
    ):
        outputs = model(input_ids=input_ids, pixel_values=pixel_values, labels=input_ids, use_cache=False)
    assert outputs.loss.requires_grad
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("stage", ["1", "2"])
def test_activations_are_what_autograd_keeps(make_config, stage, bf16, checkpointing):
    """Within 5%, from the growth with the number of layers."""
    shape = {"hidden_size": 128, "intermediate_size": 384}
    estimated, kept = [], []
    for n_layers in (2, 6):
        config = make_config(text={**shape, "num_hidden_layers": n_layers})
        sizes = count(config, stage, ModelArguments(lora_r=1))
        memory = training_memory(config, sizes, 2, 80, TrainingSetup(bf16=bf16, checkpointing=checkpointing))
        estimated.append(memory.activations)
        kept.append(kept_by_autograd(config, stage, 2, 80, bf16, checkpointing))
    assert estimated[1] - estimated[0] == pytest.approx(kept[1] - kept[0], rel=0.05)
    if not checkpointing:  # which adds a layer that is computed again, and so not kept
        log_probabilities = 4 * 2 * 80 * config.text_config.vocab_size
        assert estimated[1] + log_probabilities == pytest.approx(kept[1], rel=0.05)


def test_optimizer_gradients_and_weights(make_config):
    config = make_config(projector_bias=False)
    sizes = count(config, "1", ModelArguments())
    memory = training_memory(config, sizes, 1, 10, TrainingSetup())
    model = SiQVLForConditionalGeneration(config)
    freeze_for_stage(model, "1", ModelArguments())
    optimizer = torch.optim.AdamW(weight for weight in model.parameters() if weight.requires_grad)
    model.model.projector(torch.randn(1, 16, 16), 4, 4).sum().backward()
    optimizer.step()
    moments = sum(state[name].nbytes for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq"))
    assert memory.optimizer == moments
    assert memory.gradients == sum(weight.grad.nbytes for weight in model.parameters() if weight.grad is not None)
    assert memory.weights == sum(weight.nbytes for weight in model.parameters())
    assert memory.total == memory.weights + memory.gradients + memory.optimizer + memory.activations + memory.transient


@pytest.mark.parametrize(("batch_size", "length"), [(0, 8), (1, 0)])
def test_refuses_an_empty_batch(make_config, batch_size, length):
    config = make_config()
    sizes = count(config, "1", ModelArguments())
    with pytest.raises(ValueError, match=f"batch size is {batch_size} and length {length}; both must be at least 1"):
        training_memory(config, sizes, batch_size, length, TrainingSetup())
