"""What a recipe says of the model and of the run.

`ModelArguments` is TRL's `ModelConfig`, every field under its own name, and what a SiQ-VL model has beside. Options
alone, with nothing that loads: a script knows its command line before it imports what takes seconds.
"""

from dataclasses import dataclass, field

from trl.trainer.model_config import ModelConfig

from siq_vl.data.mixture_config import MixtureConfig

STAGES = ("1", "2", "3")
BATCHING = ("padded", "length_grouped", "packed")
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")  # of a Qwen2.5 layer
# What PEFT calls every linear layer; here, every one of the language model.
ALL_LINEARS = "all-linear"

# The fields that settings and resumed runs have always called `adapter`; all others are the `model`.
ADAPTER_FIELDS = (
    "lora_r",
    "lora_alpha",
    "lora_dropout",
    "lora_target_modules",
    "use_rslora",
    "use_dora",
    "load_in_4bit",
    "load_in_8bit",
    "bnb_4bit_quant_type",
    "use_bnb_nested_quant",
    "bnb_4bit_quant_storage",
    "vision_lora",
    "unfreeze_vision_layers",
)

# Fields of `ModelConfig` that cannot mean anything here: the value that they must keep, and what to use instead.
_REFUSED = {
    "lora_target_parameters": (
        None,
        "these decoders have no parameters outside linear layers: use lora_target_modules",
    ),
    "lora_modules_to_save": (
        None,
        "the projector always trains whole, and beside it LoRA alone: use unfreeze_vision_layers for the vision tower, "
        "lora_target_modules for the language model",
    ),
    "lora_task_type": ("CAUSAL_LM", "the model writes texts and nothing else: leave it out"),
}


@dataclass
class ModelArguments(ModelConfig):
    """Where the model comes from, how it is held, and what LoRA is put on it.

    Stage 1 builds it from the two backbones; later stages start from `model_name_or_path`, by default the previous
    stage's checkpoint of the same recipe. LoRA goes on the language model, optionally over a quantized base (QLoRA); the
    projector trains beside it, whole. The vision tower is frozen unless it gets a LoRA of its own, or its last layers are
    unfrozen.
    """

    dtype: str = field(
        default="float32",
        metadata={
            "help": "Type of the frozen weights, 'float32' or 'bfloat16'; what trains is always float32.",
        },
    )
    lora_r: int = field(default=64, metadata={"help": "LoRA rank."})
    lora_alpha: int = field(default=16, metadata={"help": "LoRA scaling factor."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout on the LoRA branch."})
    lora_target_modules: list[str] = field(
        default_factory=lambda: list(LINEARS),
        metadata={
            "help": "Linear layers of the language model that get an adapter; by default all, whatever their names."
        },
    )
    use_bnb_nested_quant: bool = field(default=True, metadata={"help": "QLoRA: quantize the scales, too."})

    vision_tower: str | None = field(default=None, metadata={"help": "Backbone of stage 1: a folder or Hub id."})
    language_model: str | None = field(default=None, metadata={"help": "Backbone of stage 1: a folder or Hub id."})
    projector_type: str = field(default="linear", metadata={"help": "'linear' or 'mlp'."})
    pixel_shuffle_factor: int = field(default=2, metadata={"help": "Side of the block of patches merged to one token."})
    random_weights: bool = field(
        default=False,
        metadata={"help": "Build the full-size model with random weights, from its sizes alone: to measure, offline."},
    )
    vision_lora: bool = field(default=False, metadata={"help": "LoRA of the same rank on the vision tower's linears."})
    unfreeze_vision_layers: int = field(
        default=0, metadata={"help": "Train this many last layers of the vision tower, whole."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        # TRL turns a list of one into its entry, and PEFT knows no list as all linear layers.
        if self.lora_target_modules in (None, ALL_LINEARS):
            self.lora_target_modules = list(LINEARS)
        elif isinstance(self.lora_target_modules, str):
            self.lora_target_modules = [self.lora_target_modules]
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f"dtype is {self.dtype!r}; it must be 'float32' or 'bfloat16'")
        if self.lora_r < 1:
            raise ValueError(f"lora_r is {self.lora_r}; it must be at least 1")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"lora_dropout is {self.lora_dropout}; it must be at least 0 and less than 1")
        if self.bnb_4bit_quant_type not in ("nf4", "fp4"):
            raise ValueError(f"bnb_4bit_quant_type is {self.bnb_4bit_quant_type!r}; it must be 'nf4' or 'fp4'")
        if self.unfreeze_vision_layers < 0:
            raise ValueError(f"unfreeze_vision_layers is {self.unfreeze_vision_layers}; it must be 0 or more")
        if self.vision_lora and self.unfreeze_vision_layers:
            raise ValueError(
                f"vision_lora is set and unfreeze_vision_layers is {self.unfreeze_vision_layers}; the tower takes one of "
                "the two: drop the other"
            )
        for name, (allowed, reason) in _REFUSED.items():
            value = getattr(self, name)
            if value != allowed:
                raise ValueError(f"{name} is {value!r}, but {reason}")

    @property
    def quantized(self) -> bool:
        """Whether the language model's linear layers are held in 4 or 8 bits."""
        return self.load_in_4bit or self.load_in_8bit


class DataArguments(MixtureConfig):
    """What stages 1 and 2 are trained on; stage 3 has `TraceArguments` beside it, and takes no sources."""


@dataclass
class RunArguments:
    """How the run goes about it: nothing here changes what is learnt, but for the effective batch size."""

    effective_batch_size: int = field(
        default=0,
        metadata={
            "help": "Samples an optimizer step, over all processes. Gradient accumulation is computed from it, and "
            "per_device_train_batch_size is the most that one device takes at once. 0: as the two say."
        },
    )
    batching: str = field(
        default="padded",
        metadata={
            "help": "'padded'; 'length_grouped': batches of rows of like length, padded; 'packed': rows packed together, "
            "with no padding. The samples of a step are the same in the first and the last."
        },
    )
    pack_tokens: int = field(
        default=2048, metadata={"help": "Packed: the most tokens of a packed row, which is one forward pass."}
    )
    pack_buffer: int = field(
        default=32,
        metadata={
            "help": "Packed: how many samples of a step a device reads at once, to be packed together. Takes the place "
            "of per_device_train_batch_size."
        },
    )
    dry_run: bool = field(default=False, metadata={"help": "Print the plan and stop before any training."})
    free_memory_steps: int = field(
        default=0, metadata={"help": "Collect garbage and empty the accelerator's cache every so many steps."}
    )
    sample_steps: int = field(
        default=0, metadata={"help": "Let the model answer fixed held-out rows every so many steps; 0: never."}
    )
    sample_count: int = field(default=8, metadata={"help": "How many held-out rows it answers."})
    sample_tokens: int = field(default=128, metadata={"help": "The most tokens it may answer with."})
    emergence_steps: int = field(
        default=0,
        metadata={"help": "Stage 3: measure the reasoning on held-out questions every so many steps; 0: never."},
    )
    emergence_count: int = field(default=120, metadata={"help": "How many held-out questions that takes."})

    def __post_init__(self) -> None:
        for name in ("effective_batch_size", "free_memory_steps", "sample_steps", "emergence_steps"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be 0 or more")
        if self.batching not in BATCHING:
            raise ValueError(f"batching is {self.batching!r}; it must be one of {', '.join(BATCHING)}")
        for name in ("sample_count", "sample_tokens", "emergence_count", "pack_tokens", "pack_buffer"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")


@dataclass
class HubArguments:
    """Where the finished checkpoint is pushed; taken from the fields of `TrainingArguments` that have these names.

    Kept apart from them so that the trainer pushes nothing by itself and writes the token into no file.
    """

    push_to_hub: bool = False
    repo_id: str | None = None
    revision: str | None = None
    private: bool | None = None
    token: str | None = field(default=None, repr=False)
