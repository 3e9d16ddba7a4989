"""
Parameters and training memory of a model, from configurations alone: nothing is downloaded, no weight is allocated.

    python -m siq_vl.planning.sizes                                                    # the report's model, stage 2
    python -m siq_vl.planning.sizes --language_model Qwen/Qwen2.5-1.5B-Instruct --lora_r 16
    python -m siq_vl.planning.sizes --recipe tiny --stage 1 --length 256

`--recipe` takes backbones, rank, batch size, precision and checkpointing from one stage of a recipe; every option given
beside it wins. The memory is the peak of one GPU's tensors, with pixels and a frozen tower: it leaves out what the
framework itself takes (a CUDA context, fragmentation), and nothing is shared out over devices. `benchmarks/memory.py`
holds it against what is measured.
"""

import argparse
from dataclasses import dataclass

import torch
from peft import get_peft_model
from transformers import AutoConfig, AutoModel, PretrainedConfig

from siq_vl import cli
from siq_vl.configuration_siq_vl import TRANSFORMERS_4, SiQVLConfig
from siq_vl.modeling_siq_vl import SiQVLForConditionalGeneration
from siq_vl.training.arguments import STAGES, ModelArguments
from siq_vl.training.backbones import LANGUAGE_MODEL, model_config
from siq_vl.training.recipes import Recipe, parse_recipe
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
        transient: what comes and goes, at its largest, and never all of it at once.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    transient: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations + self.transient


@dataclass(frozen=True)
class TrainingSetup:
    """What the memory of a run depends on, beside the model and the batch. Trained weights are always float32.

    Args:
        bf16: bfloat16 autocast, as in the recipes, or float32 throughout.
        checkpointing: gradient checkpointing, by which a layer keeps its input alone.
        bf16_weights: frozen weights in bfloat16 (`dtype: bfloat16`), or in float32.
        nf4: the language model's linear layers in NF4 (`load_in_4bit`).
        nested: their scales quantized, too (`use_bnb_nested_quant`).
        on_cpu: where the output layer works in several float32 copies.
    """

    bf16: bool = True
    checkpointing: bool = True
    bf16_weights: bool = False
    nf4: bool = False
    nested: bool = True
    on_cpu: bool = False

    @classmethod
    def of(cls, recipe: Recipe) -> "TrainingSetup":
        """Return the setup of a recipe's stage."""
        return cls(
            bf16=recipe.training.bf16,
            checkpointing=recipe.training.gradient_checkpointing,
            bf16_weights=recipe.model.dtype == "bfloat16",
            nf4=recipe.model.load_in_4bit and recipe.stage != "1",
            nested=recipe.model.use_bnb_nested_quant,
            on_cpu=recipe.training.use_cpu,
        )

    @property
    def computed_bytes(self) -> int:
        """Bytes of a number that a linear layer computes, or reads under autocast."""
        return 2 if self.bf16 else 4

    @property
    def frozen_bytes(self) -> int:
        """Bytes of a frozen weight that is not in NF4, and of a number of the stream between the layers."""
        return 2 if self.bf16_weights else 4

    @property
    def casts_frozen(self) -> bool:
        """Whether autocast copies frozen float32 weights to bfloat16."""
        return self.bf16 and not self.bf16_weights


def count(config: SiQVLConfig, stage: str, adapter: ModelArguments) -> Sizes:
    """Count the parameters of a model in a stage, on the meta device.

    Raises:
        ValueError: unknown stage.
    """
    with_head = config.to_dict()["vision_config"] | {"vision_use_head": True}
    with torch.device("meta"):
        model = SiQVLForConditionalGeneration(config)
        tower = AutoModel.from_config(AutoConfig.for_model(**with_head))
    # Counted before adapters are put into them.
    vision_tower = _numel(model.model.vision_tower)
    projector = _numel(model.model.projector)
    language_model = _numel(model.model.language_model)
    if not config.tie_word_embeddings:
        language_model += model.lm_head.weight.numel()
    peft_config = freeze_for_stage(model, stage, adapter)
    trained = model
    if peft_config is not None:
        trained = get_peft_model(model, peft_config)
    lora = trainable = 0
    for name, weight in trained.named_parameters():
        if "lora_" in name:
            lora += weight.numel()
        if weight.requires_grad:
            trainable += weight.numel()
    return Sizes(
        vision_tower=vision_tower,
        pooling_head=_numel(tower) - vision_tower,
        language_model=language_model,
        lora=lora,
        projector=projector,
        trainable=trainable,
    )


def _numel(module: torch.nn.Module) -> int:
    return sum(weight.numel() for weight in module.parameters())


def predicted_memory(
    recipe: Recipe, config: SiQVLConfig, sizes: Sizes, batch_size: int, length: int, supervised: int | None = None
) -> Memory:
    """Return what one device holds at most while a recipe's stage trains, in bytes.

    Args:
        recipe: what would be run.
        config: of its model.
        sizes: of its model.
        batch_size: samples on the device at once.
        length: tokens of a sample, image tokens included.
        supervised: see `training_memory`.
    """
    return training_memory(config, sizes, batch_size, length, TrainingSetup.of(recipe), supervised)


def training_memory(
    config: SiQVLConfig,
    sizes: Sizes,
    batch_size: int,
    length: int,
    setup: TrainingSetup,
    supervised: int | None = None,
) -> Memory:
    """Estimate what one device holds at most while it trains with a frozen tower, in bytes.

    Trained weights are float32 and have a gradient (4 bytes) and AdamW's two moments (8). Activations are those kept for
    the backward pass, see `layer_activations`.

    Args:
        config: configuration of the model.
        sizes: what `count` returned for it.
        batch_size: samples on the device at once.
        length: tokens of a sample, image tokens included.
        setup: precision, checkpointing, device.
        supervised: tokens of the batch that have a label; all that are not of images where it is not known.

    Raises:
        ValueError: batch size or length below 1.
    """
    if batch_size < 1 or length < 1:
        raise ValueError(f"batch size is {batch_size} and length {length}; both must be at least 1")
    if supervised is None:
        supervised = batch_size * max(1, length - config.image_seq_length)
    text, tokens = config.text_config, batch_size * length

    # What one decoder layer would keep for its backward pass: activations, and autocast's copies of its weights.
    layer = tokens * layer_activations(text, setup.bf16, adapted=sizes.lora > 0)
    if setup.casts_frozen and not setup.nf4:
        layer += layer_casts(text)
    # What the projector reads, a block of patches a token.
    block = config.vision_config.hidden_size * config.pixel_shuffle_factor**2
    kept = batch_size * config.image_seq_length * block * setup.computed_bytes
    # The last layer's output, which the final norm reads in float32.
    kept += tokens * 4 * text.hidden_size
    stream = tokens * setup.frozen_bytes * text.hidden_size
    recomputed = 0
    if setup.checkpointing:
        # Embeddings with the images in their places, and every layer's input. One layer at a time is computed again.
        kept += stream + text.num_hidden_layers * stream
        recomputed = layer
    else:
        kept += text.num_hidden_layers * layer

    # The peak is in the output layer, in the backward pass of a decoder layer, or before all that in the tower.
    after_forward = max(
        _output_layer_transient(config, supervised, setup), recomputed + _layer_transient(config, tokens, setup)
    )
    peak = max(kept + after_forward, _tower_transient(config, batch_size, setup))
    return Memory(
        weights=_weight_bytes(config, sizes, setup),
        gradients=4 * sizes.trainable,
        optimizer=8 * sizes.trainable,
        activations=kept,
        transient=peak - kept,
    )


def _output_layer_transient(config: SiQVLConfig, supervised: int, setup: TrainingSetup) -> int:
    """Bytes of one tile of the logits of supervised tokens, and of the gradient of the hidden states.

    TRL projects 4096 tokens at most to 32,768 vocabulary entries at most at once.
    """
    hidden, size = config.text_config.hidden_size, setup.computed_bytes
    entries = min(config.text_config.vocab_size, _TILE[1])
    tile = min(supervised, _TILE[0]) * entries
    working = tile * size
    if setup.on_cpu:
        # Eight float32 tiles for the gradient of the logits; or, later, float32 copies of bfloat16 tiles and weights.
        copies = 0
        if setup.bf16:
            copies = (tile + entries * hidden) * 4
        working += max(tile * 8 * 4, copies)
    working += supervised * hidden * (4 + size)
    if setup.casts_frozen:
        working += entries * hidden * size
    return working


def _layer_transient(config: SiQVLConfig, tokens: int, setup: TrainingSetup) -> int:
    """Bytes of one decoder layer's backward pass, beside what the layer has kept for it."""
    inner, hidden, size = config.text_config.intermediate_size, config.text_config.hidden_size, setup.computed_bytes
    backward = tokens * (3 * inner * size + 2 * hidden * 4)
    if setup.nf4:
        # One weight at a time is made whole again.
        backward += inner * hidden * size
    return backward


def _tower_transient(config: SiQVLConfig, batch_size: int, setup: TrainingSetup) -> int:
    """Bytes of the forward pass of one layer of the vision tower, which is frozen and keeps nothing."""
    vision, size = config.vision_config, setup.computed_bytes
    patches = batch_size * (vision.image_size // vision.patch_size) ** 2
    forward = patches * (2 * vision.hidden_size * setup.frozen_bytes + 2 * vision.intermediate_size * size)
    if setup.casts_frozen:
        forward += vision.hidden_size * vision.intermediate_size * size
    return forward


def _weight_bytes(config: SiQVLConfig, sizes: Sizes, setup: TrainingSetup) -> int:
    """Bytes of the weights, and of the untrained twin of the projector that PEFT keeps beside an adapter."""
    frozen = sizes.vision_tower + sizes.language_model
    trained = sizes.lora + sizes.projector
    if sizes.lora:
        trained += sizes.projector
    if not setup.nf4:
        return frozen * setup.frozen_bytes + 4 * trained
    linear = config.text_config.num_hidden_layers * _linear_weights(config.text_config)
    # A float32 scale a block; nested, a byte a block and a float32 scale a block of those.
    scales = 4 / _NF4_BLOCK
    if setup.nested:
        scales = 1 / _NF4_BLOCK + 4 / (_NF4_BLOCK * _NF4_NESTED_BLOCK)
    return round((frozen - linear) * setup.frozen_bytes + linear * (0.5 + scales) + 4 * trained)


def layer_activations(text: PretrainedConfig, bf16: bool, adapted: bool) -> int:
    """Bytes for each token that one decoder layer keeps for the backward pass, with sdpa or flash attention.

    The inputs of the two norms are float32. Queries, keys, values and the attention's output, and the MLP's gate, up and
    activated gate, are in the autocast type. LoRA keeps the input of its linear layers: autocast makes a copy for each,
    without it layers share. Frozen linear layers keep no input, and neither does anything in the frozen tower.
    """
    hidden, inner, head_dim = text.hidden_size, text.intermediate_size, _head_dim(text)
    queries = text.num_attention_heads * head_dim
    keys = text.num_key_value_heads * head_dim
    if TRANSFORMERS_4:
        keys = queries  # transformers 4 repeats them for sdpa
    computed = 2 * queries + 2 * keys + 3 * inner
    if not bf16:
        if adapted:
            computed += 2 * hidden + inner
        return 2 * 4 * hidden + 4 * computed
    if adapted:
        computed += 5 * hidden + queries + inner
    return 2 * 4 * hidden + 2 * computed


def layer_casts(text: PretrainedConfig) -> int:
    """Bytes of the bfloat16 copies of one layer's linear weights, which autocast keeps for the backward pass."""
    return 2 * _linear_weights(text)


def _linear_weights(text: PretrainedConfig) -> int:
    """Weights of the seven linear layers of one decoder layer, without biases."""
    attention = 2 * (text.num_attention_heads + text.num_key_value_heads) * _head_dim(text)
    return text.hidden_size * (attention + 3 * text.intermediate_size)


def _head_dim(text: PretrainedConfig) -> int:
    return getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads


def size_table(sizes: Sizes, lora_r: int) -> str:
    """Return the parameters as a markdown table, each part with its share of the total."""
    adapter = "LoRA: none in this stage"
    if sizes.lora:
        adapter = f"LoRA, r={lora_r}"
    parts = {
        "vision tower": sizes.vision_tower,
        "its pooling head (left out)": sizes.pooling_head,
        "**vision**": sizes.vision,
        "language model": sizes.language_model,
        adapter: sizes.lora,
        "**text**": sizes.text,
        "**projector**": sizes.projector,
        "**total**": sizes.total,
        "**trainable**": sizes.trainable,
    }
    lines = ["| part | parameters | share |", "|---|---:|---:|"]
    for name, number in parts.items():
        lines.append(f"| {name} | {number:,} | {100 * number / sizes.total:.2f}% |")
    return "\n".join(lines)


def memory_table(memory: Memory) -> str:
    """Return the memory as a markdown table."""
    lines = ["| memory | MiB |", "|---|---:|"]
    for name, number in {**vars(memory), "**total**": memory.total}.items():
        lines.append(f"| {name} | {number / MIB:,.1f} |")
    return "\n".join(lines)


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
    # The first look says which recipe the other options default to.
    chosen = parser.parse_args(argv)
    parser.set_defaults(**_recipe_defaults(chosen.recipe, chosen.stage))
    return parser.parse_args(argv)


def _recipe_defaults(name: str | None, stage: str) -> dict:
    """Return what a recipe says of the options, and of the setup what no option sets."""
    if name is None:
        model, adapter, batch_size, setup = ModelArguments(), ModelArguments(), 1, TrainingSetup()
    else:
        recipe = parse_recipe((stage,), ["--recipe", name])
        # Later stages inherit the model of stage 1.
        model = parse_recipe(("1",), ["--recipe", name]).model
        adapter, setup = recipe.model, TrainingSetup.of(recipe)
        batch_size = recipe.training.per_device_train_batch_size
    return {
        "vision_tower": model.vision_tower,
        "language_model": model.language_model,
        "projector_type": model.projector_type,
        "pixel_shuffle_factor": model.pixel_shuffle_factor,
        "dtype": model.dtype,
        "lora_r": adapter.lora_r,
        "load_in_4bit": adapter.load_in_4bit,
        "batch_size": batch_size,
        "bf16": setup.bf16,
        "gradient_checkpointing": setup.checkpointing,
        "nested": setup.nested,
    }


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
    setup = TrainingSetup(
        bf16=options.bf16,
        checkpointing=options.gradient_checkpointing,
        bf16_weights=options.dtype == "bfloat16",
        nf4=options.load_in_4bit and options.stage != "1",
        nested=options.nested,
        on_cpu=False,  # what a GPU needs, asked on whatever machine
    )
    supervised = None
    if options.supervised:
        supervised = options.batch_size * options.supervised
    memory = training_memory(config, sizes, options.batch_size, options.length, setup, supervised)

    title = model.language_model or LANGUAGE_MODEL
    if options.recipe:
        title = f"recipe {options.recipe}"
    print(f"\n{title}, stage {options.stage}\n\n{size_table(sizes, options.lora_r)}")
    precision = "bf16" if options.bf16 else "float32"
    checkpointing = "gradient checkpointing" if options.gradient_checkpointing else "no gradient checkpointing"
    print(f"\nTraining, {options.batch_size} x {options.length} tokens, {precision}, {checkpointing}, AdamW\n")
    print(memory_table(memory))


if __name__ == "__main__":
    cli.run(main)
