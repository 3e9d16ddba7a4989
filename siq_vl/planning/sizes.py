"""
Parameters and training memory of a model, from configurations alone: nothing is downloaded, no weight is allocated.

    python -m siq_vl.planning.sizes                                                    # the report's model, stage 2
    python -m siq_vl.planning.sizes --language_model Qwen/Qwen2.5-1.5B-Instruct --lora_r 16
    python -m siq_vl.planning.sizes --recipe tiny --stage 1 --length 256

`--recipe` takes backbones, rank, batch size, precision and checkpointing from one stage of a recipe; every option given
beside it wins. The memory is the peak of one device's tensors, with pixels and a frozen tower: it leaves out what the
framework itself takes (a CUDA context, fragmentation), and nothing is shared out over devices. `benchmarks/memory.py`
holds it against what is measured.
"""

import argparse
from dataclasses import dataclass, fields

import torch
from peft import get_peft_model
from transformers import AutoConfig, AutoModel, PretrainedConfig
from trl import SFTConfig

from siq_vl import cli
from siq_vl.configuration_siq_vl import TRANSFORMERS_4, SiQVLConfig
from siq_vl.modeling_siq_vl import SiQVLForConditionalGeneration
from siq_vl.training.arguments import STAGES, ModelArguments
from siq_vl.training.backbones import LANGUAGE_MODEL, model_config
from siq_vl.training.recipes import parse_recipe
from siq_vl.training.stages import freeze_for_stage

MIB = 2**20
_TILE = (4096, 32_768)  # tokens and vocabulary entries that TRL's output layer works on at once
_NF4_BLOCK, _NF4_NESTED_BLOCK = 64, 256  # weights that share a scale, and scales that share one


@dataclass
class Sizes:
    """Numbers of parameters. The pooling head is what the report counts with the tower, and SiQ-VL leaves out."""

    vision_tower: int
    pooling_head: int
    language_model: int
    lora: int
    projector: int
    trainable: int

    @property
    def vision(self) -> int:
        return self.vision_tower + self.pooling_head

    @property
    def text(self) -> int:
        return self.language_model + self.lora

    @property
    def total(self) -> int:
        return self.vision + self.text + self.projector

    @property
    def trainable_share(self) -> float:
        return self.trainable / self.total


@dataclass
class Memory:
    """Bytes that training holds at its peak, part by part.

    Args:
        weights: of the model, and the untrained twins that PEFT keeps of what trains whole.
        gradients: of what trains; there in every forward pass but the first of an accumulated step.
        optimizer: AdamW's moments.
        activations: kept for the backward pass.
        transient: what comes and goes, at its largest; see `transient_memory`.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    transient: int

    @property
    def total(self) -> int:
        return sum(getattr(self, field.name) for field in fields(self))


def count(config: SiQVLConfig, stage: str, adapter: ModelArguments) -> Sizes:
    """Count the parameters of a model in a stage, on the meta device.

    Raises:
        ValueError: unknown stage.
    """
    with_head = config.to_dict()["vision_config"] | {"vision_use_head": True}
    with torch.device("meta"):
        model = SiQVLForConditionalGeneration(config)
        tower = AutoModel.from_config(AutoConfig.for_model(**with_head))
    parts = {name: _numel(module) for name, module in model.model.named_children()}
    untied = 0 if config.tie_word_embeddings else model.lm_head.weight.numel()
    peft_config = freeze_for_stage(model, stage, adapter)
    trained = get_peft_model(model, peft_config) if peft_config else model
    return Sizes(
        vision_tower=parts["vision_tower"],
        pooling_head=_numel(tower) - parts["vision_tower"],
        language_model=parts["language_model"] + untied,
        lora=sum(weight.numel() for name, weight in trained.named_parameters() if "lora_" in name),
        projector=parts["projector"],
        trainable=sum(weight.numel() for weight in trained.parameters() if weight.requires_grad),
    )


def training_memory(
    config: SiQVLConfig,
    sizes: Sizes,
    batch_size: int,
    length: int,
    *,
    bf16: bool = True,
    checkpointing: bool = True,
    supervised: int | None = None,
    bf16_weights: bool = False,
    nf4: bool = False,
    nested: bool = True,
    device: str = "cuda",
) -> Memory:
    """Estimate what one device holds at most while it trains with a frozen tower, in bytes.

    Trained weights are float32 and have a gradient (4 bytes) and AdamW's two moments (8). Activations are those kept for
    the backward pass, see `layer_activations`. With checkpointing each layer keeps its input alone.

    Args:
        config: configuration of the model.
        sizes: what `count` returned for it.
        batch_size: samples on the device at once.
        length: tokens of a sample, image tokens included.
        bf16: bfloat16 autocast, as in the recipes, or float32 throughout.
        checkpointing: gradient checkpointing.
        supervised: tokens of the batch that have a label; all that are not of images where it is not known.
        bf16_weights: frozen weights in bfloat16 (`dtype: bfloat16`), or in float32.
        nf4: the language model's linear layers in NF4 (`load_in_4bit`).
        nested: their scales quantized, too (`use_bnb_nested_quant`).
        device: "cuda", or "cpu", where the output layer works in several float32 copies.

    Raises:
        ValueError: batch size or length below 1.
    """
    if batch_size < 1 or length < 1:
        raise ValueError(f"batch size is {batch_size} and length {length}; both must be at least 1")
    text, tokens = config.text_config, batch_size * length
    if supervised is None:
        supervised = batch_size * max(1, length - config.image_seq_length)
    adapted, stream = sizes.lora > 0, 2 if bf16_weights else 4
    casts = layer_casts(text) if bf16 and not bf16_weights and not nf4 else 0
    layer = tokens * layer_activations(text, bf16, adapted) + casts
    layer_input = tokens * stream * text.hidden_size
    width = config.vision_config.hidden_size * config.pixel_shuffle_factor**2
    images = batch_size * config.image_seq_length * width * (2 if bf16 else 4)  # what the projector reads
    # The last layer's output, which the final norm reads in float32, and embeddings with the images in their places.
    kept = images + tokens * (4 * text.hidden_size + (stream if checkpointing else 0) * text.hidden_size)
    kept += text.num_hidden_layers * (layer_input if checkpointing else layer)
    passing = transient_memory(
        config, batch_size, tokens, supervised, bf16=bf16, bf16_weights=bf16_weights, nf4=nf4, device=device
    )
    recomputed = layer if checkpointing else 0
    peak = max(kept + max(passing["output layer"], recomputed + passing["layer"]), passing["vision tower"])
    return Memory(
        weights=_weight_bytes(config, sizes, 2 if bf16_weights else 4, nf4, nested),
        gradients=4 * sizes.trainable,
        optimizer=8 * sizes.trainable,
        activations=kept,
        transient=peak - kept,
    )


def transient_memory(
    config: SiQVLConfig,
    batch_size: int,
    tokens: int,
    supervised: int,
    *,
    bf16: bool,
    bf16_weights: bool,
    nf4: bool,
    device: str,
) -> dict[str, int]:
    """Bytes of what comes and goes in a step, beside the activations that are kept; never all of it at once.

    Args:
        config: configuration of the model.
        batch_size: samples on the device at once.
        tokens: tokens of the batch.
        supervised: tokens that have a label.
        bf16: bfloat16 autocast.
        bf16_weights: frozen weights in bfloat16.
        nf4: the language model's linear layers in NF4.
        device: see `training_memory`.

    Returns:
        `output layer`: one tile of the logits of supervised tokens, TRL's 4096 x 32,768 at most, and the gradient of the
        hidden states. `layer`: one decoder layer's backward pass. `vision tower`: one layer's forward pass.
    """
    text, vision, size = config.text_config, config.vision_config, 2 if bf16 else 4
    inner, hidden = text.intermediate_size, text.hidden_size
    cast = size if bf16 and not bf16_weights else 0  # copies of frozen float32 weights
    entries = min(text.vocab_size, _TILE[1])
    tile = min(supervised, _TILE[0]) * entries
    working = tile * size
    if device == "cpu":  # eight float32 tiles for the gradient of the logits; then, of bfloat16 ones, float32 copies
        working += max(tile * 8 * 4, (tile + entries * hidden) * 4 if bf16 else 0)
    head = working + supervised * hidden * (4 + size) + entries * hidden * cast
    backward = tokens * (3 * inner * size + 2 * hidden * 4) + (inner * hidden * size if nf4 else 0)
    patches = batch_size * (vision.image_size // vision.patch_size) ** 2
    stream = 2 if bf16_weights else 4
    tower = patches * (2 * vision.hidden_size * stream + 2 * vision.intermediate_size * size)
    tower += vision.hidden_size * vision.intermediate_size * cast
    return {"output layer": head, "layer": backward, "vision tower": tower}


def _weight_bytes(config: SiQVLConfig, sizes: Sizes, whole: int, nf4: bool, nested: bool) -> int:
    """Bytes of the weights; `whole` is that of a frozen weight that is not in NF4."""
    text = config.text_config
    adapted = sizes.lora > 0
    frozen = sizes.vision_tower + sizes.language_model
    linear = text.num_hidden_layers * _linear_weights(text) if nf4 else 0
    scales = 1 / _NF4_BLOCK + 4 / (_NF4_BLOCK * _NF4_NESTED_BLOCK) if nested else 4 / _NF4_BLOCK
    trained = sizes.lora + sizes.projector * (2 if adapted else 1)
    return round((frozen - linear) * whole + linear * (0.5 + scales) + 4 * trained)


def layer_activations(text: PretrainedConfig, bf16: bool, adapted: bool) -> int:
    """Bytes for each token that one decoder layer keeps for the backward pass, with sdpa or flash attention.

    The inputs of the two norms are float32. Queries, keys, values and the attention's output, and the MLP's gate, up and
    activated gate, are in the autocast type. LoRA keeps the input of its linear layers: autocast makes a copy for each,
    without it layers share. Frozen linear layers keep no input, and neither does anything in the frozen tower.
    """
    size, hidden, inner = (2 if bf16 else 4), text.hidden_size, text.intermediate_size
    head_dim = getattr(text, "head_dim", None) or hidden // text.num_attention_heads
    queries = text.num_attention_heads * head_dim
    keys = queries if TRANSFORMERS_4 else text.num_key_value_heads * head_dim  # transformers 4 repeats them for sdpa
    kept = 2 * 4 * hidden + size * (2 * queries + 2 * keys + 3 * inner)
    if adapted:
        kept += size * (5 * hidden + queries + inner) if bf16 else size * (2 * hidden + inner)
    return kept


def layer_casts(text: PretrainedConfig) -> int:
    """Bytes of the bfloat16 copies of one layer's linear weights, which autocast keeps for the backward pass."""
    return 2 * _linear_weights(text)


def _linear_weights(text: PretrainedConfig) -> int:
    """Weights of the seven linear layers of one decoder layer, without biases."""
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    attention = 2 * text.num_attention_heads * head_dim + 2 * text.num_key_value_heads * head_dim
    return text.hidden_size * (attention + 3 * text.intermediate_size)


def size_table(sizes: Sizes, lora_r: int) -> str:
    """Return the parameters as a markdown table, each part with its share of the total."""
    rows = [
        ("vision tower", sizes.vision_tower),
        ("its pooling head (left out)", sizes.pooling_head),
        ("**vision**", sizes.vision),
        ("language model", sizes.language_model),
        (f"LoRA, r={lora_r}" if sizes.lora else "LoRA: none in this stage", sizes.lora),
        ("**text**", sizes.text),
        ("**projector**", sizes.projector),
        ("**total**", sizes.total),
        ("**trainable**", sizes.trainable),
    ]
    lines = ["| part | parameters | share |", "|---|---:|---:|"]
    lines += [f"| {name} | {number:,} | {100 * number / sizes.total:.2f}% |" for name, number in rows]
    return "\n".join(lines)


def memory_table(memory: Memory) -> str:
    """Return the memory as a markdown table."""
    rows = [(field.name, getattr(memory, field.name)) for field in fields(memory)] + [("**total**", memory.total)]
    lines = ["| memory | MiB |", "|---|---:|"]
    return "\n".join(lines + [f"| {name} | {number / MIB:,.1f} |" for name, number in rows])


def parse_options(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line; what is not given comes from the recipe, or from the defaults of all recipes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", help="a folder of recipes/; by default the report's model")
    parser.add_argument("--stage", choices=STAGES, default="2")
    parser.add_argument("--vision_tower", help="a folder or a Hub id")
    parser.add_argument("--language_model", help="likewise; those of the recipes are known offline")
    parser.add_argument("--projector_type")
    parser.add_argument("--pixel_shuffle_factor", type=int)
    parser.add_argument("--lora_r", type=int)
    parser.add_argument("--batch_size", type=int, help="samples on a device at once")
    parser.add_argument("--length", type=int, default=1024, help="tokens of a sample, image tokens included")
    parser.add_argument(
        "--supervised", type=int, help="tokens of a sample that have a label; by default all of its text"
    )
    parser.add_argument(
        "--load_in_4bit", action=argparse.BooleanOptionalAction, help="QLoRA: the language model in NF4"
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="of the frozen weights")
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction)
    parser.add_argument("--gradient_checkpointing", action=argparse.BooleanOptionalAction)
    options = parser.parse_args(argv)
    for name, value in _recipe_defaults(options.recipe, options.stage).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    return options


def _recipe_defaults(recipe: str | None, stage: str) -> dict:
    if recipe is None:
        model, adapter = ModelArguments(), ModelArguments()
        training = {"batch_size": 1, "bf16": True, "gradient_checkpointing": True}
    else:
        parsed = parse_recipe((stage,), ["--recipe", recipe])
        # Later stages inherit the model of stage 1.
        model, adapter = parse_recipe(("1",), ["--recipe", recipe]).model, parsed.model
        settings: SFTConfig = parsed.training
        training = {
            "batch_size": settings.per_device_train_batch_size,
            "bf16": settings.bf16,
            "gradient_checkpointing": settings.gradient_checkpointing,
        }
    names = ("vision_tower", "language_model", "projector_type", "pixel_shuffle_factor", "dtype")
    adapted = {"lora_r": adapter.lora_r, "load_in_4bit": adapter.load_in_4bit}
    return {name: getattr(model, name) for name in names} | adapted | training


def _numel(module: torch.nn.Module) -> int:
    return sum(weight.numel() for weight in module.parameters())


def main() -> None:
    options = parse_options()
    model = ModelArguments(
        vision_tower=options.vision_tower,
        language_model=options.language_model,
        projector_type=options.projector_type,
        pixel_shuffle_factor=options.pixel_shuffle_factor,
    )
    config = model_config(model)
    sizes = count(config, options.stage, ModelArguments(lora_r=options.lora_r))
    memory = training_memory(
        config,
        sizes,
        options.batch_size,
        options.length,
        bf16=options.bf16,
        checkpointing=options.gradient_checkpointing,
        supervised=options.supervised and options.batch_size * options.supervised,
        bf16_weights=options.dtype == "bfloat16",
        nf4=options.load_in_4bit and options.stage != "1",
    )
    name = f"recipe {options.recipe}" if options.recipe else model.language_model or LANGUAGE_MODEL
    print(f"\n{name}, stage {options.stage}\n\n{size_table(sizes, options.lora_r)}")
    precision = "bf16" if options.bf16 else "float32"
    checkpointing = "gradient checkpointing" if options.gradient_checkpointing else "no gradient checkpointing"
    print(f"\nTraining, {options.batch_size} x {options.length} tokens, {precision}, {checkpointing}, AdamW\n")
    print(memory_table(memory))


if __name__ == "__main__":
    cli.run(main)
