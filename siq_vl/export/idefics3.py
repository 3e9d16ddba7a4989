"""
SiQ-VL checkpoints as native Idefics3 checkpoints, for engines that know Idefics3 and run no remote code.

Idefics3 computes the same function: a SigLIP tower, a pixel shuffle in the same channel order, a linear map, and any
language model. Two things it lacks are made up for here, exactly:

- its linear map has no bias, so the projector's is moved into the tower's last layer norm;
- its processor has an image syntax of its own, so the tokens of SiQ-VL take the names that it writes.

What stays different: in chats an image is `<image>`, and a user's text that spells one of Idefics3's tokens is read as that
token; 16-bit pictures are clipped by Idefics3's image processor, which transformers 4 wants in RGB; the
`mm_token_type_ids` that its processor returns on request mark other tokens, which its model does not read; and Idefics3 of
transformers 4 itself computes wrong positions in float32.
"""

import json
import logging
from pathlib import Path

import torch
from tokenizers import Tokenizer
from transformers import Idefics3Config, Idefics3ForConditionalGeneration, Idefics3Processor, PreTrainedTokenizerFast

from siq_vl.configuration_siq_vl import TRANSFORMERS_4, SiQVLConfig
from siq_vl.modeling_siq_vl import SiQVLForConditionalGeneration
from siq_vl.processing_siq_vl import SiQVLProcessor

if TRANSFORMERS_4:
    from transformers import Idefics3ImageProcessor
else:
    from transformers import Idefics3ImageProcessorPil as Idefics3ImageProcessor

logger = logging.getLogger(__name__)

# Idefics3's processor writes an image as `<fake_token_around_image><global-img><image>...<image><fake_token_around_image>`.
# Tokenizers match the longest added token first, so the first two tags together can be one token, and the same ids come
# out as from `<|vision_start|><|image_pad|>...<|image_pad|><|vision_end|>`.
IDEFICS3_TOKENS = {
    "<|vision_start|>": "<fake_token_around_image><global-img>",
    "<|image_pad|>": "<image>",
    "<|vision_end|>": "<fake_token_around_image>",
    "<|im_end|>": "<end_of_utterance>",
}
IDEFICS3_MODULES = {
    "model.vision_tower.": "model.vision_model.",
    "model.projector.linear.": "model.connector.modality_projection.proj.",
    "model.language_model.": "model.text_model.",
}
POST_NORM_BIAS = "model.vision_tower.post_layernorm.bias"
PROJECTION = "model.projector.linear.weight"
PROJECTION_BIAS = "model.projector.linear.bias"


def export_idefics3(
    model: SiQVLForConditionalGeneration, processor: SiQVLProcessor, folder: Path, widen_tower: bool = False
) -> None:
    """Write a model and its processor as an `Idefics3ForConditionalGeneration` checkpoint.

    Args:
        model: any SiQ-VL model with a linear projector.
        processor: its processor.
        folder: where to write.
        widen_tower: make room for a projector bias that the tower cannot hold, see `widen`.

    Raises:
        ValueError: Idefics3 cannot express the model.
    """
    config, weights = model.config, model.state_dict()
    check_expressible(config, processor)
    if PROJECTION_BIAS in weights:
        without_bias = widen if widen_tower else fold
        weights, config = without_bias(weights, config)
    native = Idefics3ForConditionalGeneration._from_config(idefics3_config(config), dtype=model.dtype)
    # Every weight has its place, and every place its weight, or torch refuses.
    native.load_state_dict({_renamed(name): weight for name, weight in weights.items()})
    native.generation_config = model.generation_config
    native.save_pretrained(folder)
    native_processor = idefics3_processor(processor)
    native_processor.save_pretrained(folder)
    _make_readable_by_both_majors(Path(folder), config, native_processor)


def check_expressible(config: SiQVLConfig, processor: SiQVLProcessor) -> None:
    """Refuse what Idefics3 has no counterpart for.

    Raises:
        ValueError: the projector has more than one layer, pictures are not resized to one square of the tower's size, the
            grid of patches would be padded, or Idefics3 would round positions in it wrongly.
    """
    decoder = config.text_config.model_type
    if decoder in ("granite", "cohere", "cohere2", "gemma", "gemma2", "gemma3_text"):
        raise ValueError(
            f"The language model is of type {decoder!r}, which scales or caps its logits or embeddings, but Idefics3 does "
            "not: only checkpoints with another language model can be exported."
        )
    size, tiles = processor.image_processor.size, processor.max_tiles
    if (size["height"], size["width"], tiles) != (config.vision_config.image_size, config.vision_config.image_size, 1):
        raise ValueError(
            f"The processor resizes pictures to {size['height']} x {size['width']} in up to {tiles} tiles, but Idefics3 "
            f"cuts tiles in a way of its own, and its tower takes {config.vision_config.image_size} pixels a side: "
            "export with a processor of that size and one tile."
        )
    if config.projector_type != "linear":
        raise ValueError(
            f"projector_type is {config.projector_type!r}, but Idefics3's connector is one linear layer: only "
            "checkpoints with projector_type 'linear' can be exported."
        )
    side = config.vision_config.image_size // config.vision_config.patch_size
    if side % config.pixel_shuffle_factor:
        raise ValueError(
            f"The tower makes {side} x {side} patches, which do not divide by pixel_shuffle_factor "
            f"{config.pixel_shuffle_factor}; SiQ-VL pads such a grid and Idefics3 cannot: only checkpoints whose grid "
            "divides can be exported."
        )
    if not positions_are_exact(side):
        raise ValueError(
            f"The tower makes {side} x {side} patches, a grid in which Idefics3 gives some patches the position of their "
            "neighbour, by rounding: only checkpoints with another grid (8, 16, 24, 28 and 32 are right) can be exported."
        )


def positions_are_exact(side: int) -> bool:
    """Whether Idefics3 finds the position of each patch in a grid of `side` x `side`.

    It looks up `i * (1 / side)`, in single precision, among the boundaries `1 / side, 2 / side, ...`.
    """
    positions = torch.arange(side)
    fractions = (positions * (1.0 / torch.tensor(side))).clamp(max=1 - 1e-6)
    return torch.equal(torch.bucketize(fractions, torch.arange(1 / side, 1.0, 1 / side), right=True), positions)


def fold(weights: dict[str, torch.Tensor], config: SiQVLConfig) -> tuple[dict[str, torch.Tensor], SiQVLConfig]:
    """Move the projector's bias into the bias of the tower's last layer norm.

    A change d of that bias reaches the projector at each of the `factor**2` positions of a block, and adds
    `W (1 x d) = (sum of the positions' parts of W) d` to its output. This must be the bias b; d is the smallest solution.

    Args:
        weights: state dict of a SiQ-VL model with a projector bias.
        config: its configuration.

    Returns:
        A state dict that computes the same without a projector bias, and the unchanged configuration.

    Raises:
        ValueError: there is no solution, which is the rule where the language model is wider than the tower.
    """
    weights = dict(weights)
    bias = weights.pop(PROJECTION_BIAS).double()
    # Solved by singular values, since the matrix may lack rank, and in double precision, since the residual decides.
    summed = _by_position(weights[PROJECTION], config).double().sum(dim=1)  # (text_width, width)
    change = torch.linalg.lstsq(summed, bias[:, None], driver="gelsd").solution[:, 0]
    residual = float((summed @ change - bias).norm() / bias.norm().clamp(min=1e-30))
    if residual > 1e-6:
        raise ValueError(
            f"The projector's bias cannot be folded into the tower: {bias.numel()} values from {change.numel()} leave "
            f"a relative residual of {residual:.2g}, above 1e-6. Train with projector_bias=False, or export with "
            "widen_tower, at the price of a tower of twice the width."
        )
    # What rounding to the weight's own type loses of it is said, not hidden.
    before = weights[POST_NORM_BIAS]
    weights[POST_NORM_BIAS] = (before.double() + change).to(before.dtype)
    stored = float((summed @ (weights[POST_NORM_BIAS].double() - before.double()) - bias).abs().max())
    logger.info("folded the projector's bias: relative residual %.2g, %.2g at most after rounding", residual, stored)
    return weights, config


def widen(weights: dict[str, torch.Tensor], config: SiQVLConfig) -> tuple[dict[str, torch.Tensor], SiQVLConfig]:
    """Make room for any projector bias, in a tower of twice the width that computes the same.

    Every channel of the residual stream is there twice, so that each layer norm sees the same mean and variance; the
    layers read the first copy and write both, and the added attention heads are zero. The last layer norm turns the
    second copy into constants, one of which is 1: through it the projector reads its bias.

    Args:
        weights: state dict of a SiQ-VL model with a projector bias.
        config: its configuration.

    Returns:
        State dict and configuration of a model without a projector bias.
    """
    width = config.vision_config.hidden_size
    weights = dict(weights)
    bias = weights.pop(PROJECTION_BIAS)
    projection = _by_position(weights[PROJECTION], config)
    for name, weight in weights.items():
        if not name.startswith("model.vision_tower."):
            continue
        if name.endswith("position_embedding.weight"):  # (n_patches, width): a channel is a column
            weights[name] = torch.cat([weight, weight], dim=1)
        elif any(part in name for part in ("q_proj", "k_proj", "v_proj")):
            # Read the first copy; the queries, keys and values of the added heads are zero.
            weights[name] = _padded(weight, [2 * width] * weight.ndim)
        elif "fc1.weight" in name:  # reads the first copy, and is no wider inside
            weights[name] = _padded(weight, [weight.shape[0], 2 * width])
        elif "fc1.bias" not in name:
            # Writes both copies. What attention hands over is as wide as its heads: the added ones are not read.
            weights[name] = torch.cat([weight, weight])
            if "out_proj.weight" in name:
                weights[name] = _padded(weights[name], [2 * width, 2 * width])
    # A norm's output is 0 in the second copy, by its weight and bias, except for one channel of 1.
    norm = POST_NORM_BIAS.removesuffix("bias")
    weights[norm + "weight"][width:] = 0
    weights[norm + "bias"][width:] = 0
    weights[norm + "bias"][width] = 1
    # Of a block's positions one is enough to add the bias.
    n_positions = projection.shape[1]
    projection = _padded(projection, [projection.shape[0], n_positions, 2 * width])
    projection[:, 0, width] = bias
    weights[PROJECTION] = projection.flatten(1)
    wider = SiQVLConfig.from_dict(config.to_dict())
    wider.vision_config.hidden_size = 2 * width
    wider.vision_config.num_attention_heads = 2 * config.vision_config.num_attention_heads
    return weights, wider


def idefics3_config(config: SiQVLConfig) -> Idefics3Config:
    """Return the configuration of the Idefics3 model that computes what a SiQ-VL model computes."""
    fields = config.to_dict()
    vision = fields["vision_config"]
    vision.pop("vision_use_head", None)  # Idefics3's tower has none to leave out
    vision["model_type"] = "idefics3_vision"
    text = fields["text_config"]
    if text["model_type"] == "qwen2":  # says it to engines that run Idefics3's language model as Llama with options
        text["qkv_bias"] = True
    return Idefics3Config(
        vision_config=vision,
        text_config=text,
        scale_factor=config.pixel_shuffle_factor,
        image_token_id=config.image_token_id,
        tie_word_embeddings=config.tie_word_embeddings,
        pad_token_id=config.text_config.pad_token_id,
        bos_token_id=config.text_config.bos_token_id,
        eos_token_id=config.text_config.eos_token_id,
    )


def idefics3_processor(processor: SiQVLProcessor) -> Idefics3Processor:
    """Return the Idefics3 processor that makes the token ids and pixels of a SiQ-VL processor.

    In chats and texts an image is `<image>` alone: the processor adds the tags around it.
    """
    ours = processor.image_processor
    side = ours.size["height"]
    # `size` is what engines compute tile counts from; the resize itself is the one to `max_image_size`, as in SiQ-VL.
    image_processor = Idefics3ImageProcessor(
        do_resize=False,
        size={"longest_edge": side},
        max_image_size={"longest_edge": side},
        do_image_splitting=False,
        resample=ours.resample,
        do_rescale=ours.do_rescale,
        rescale_factor=ours.rescale_factor,
        do_normalize=ours.do_normalize,
        image_mean=ours.image_mean,
        image_std=ours.image_std,
    )
    # Idefics3's processor writes the tags around an image itself.
    template = _in_idefics3_tokens(processor.chat_template)
    template = template.replace(_in_idefics3_tokens("<|vision_start|><|image_pad|><|vision_end|>"), "<image>")
    tokenizer = idefics3_tokenizer(processor.tokenizer)
    tokenizer.chat_template = template
    return Idefics3Processor(
        image_processor, tokenizer, image_seq_len=processor.image_seq_length, chat_template=template
    )


def idefics3_tokenizer(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """Return a tokenizer with the same ids, in which SiQ-VL's image and end-of-turn tokens have Idefics3's names."""
    # A tokenizer has no way to rename a token, but its description in JSON has.
    fields = json.loads(tokenizer.backend_tokenizer.to_str())
    for token in fields["added_tokens"]:
        token["content"] = IDEFICS3_TOKENS.get(token["content"], token["content"])
    vocab = fields["model"]["vocab"]
    if isinstance(vocab, dict):  # where added tokens may stand as well
        for ours, theirs in IDEFICS3_TOKENS.items():
            if ours in vocab:
                vocab[theirs] = vocab.pop(ours)
    # Those with a role (end of sequence, padding) go by its name; all further special tokens in one list.
    special = {}
    for role, token in tokenizer.special_tokens_map.items():
        if token and role not in ("additional_special_tokens", "extra_special_tokens"):
            special[role] = _in_idefics3_tokens(str(token))
    others = []
    for token in tokenizer.all_special_tokens:
        renamed = _in_idefics3_tokens(token)
        if renamed not in special.values():
            others.append(renamed)
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(fields)),
        additional_special_tokens=others,
        padding_side=tokenizer.padding_side,
        model_max_length=tokenizer.model_max_length,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
        **special,
    )


def _in_idefics3_tokens(text: str) -> str:
    """Write a text that has SiQ-VL's special tokens with Idefics3's."""
    for ours, theirs in IDEFICS3_TOKENS.items():
        text = text.replace(ours, theirs)
    return text


def _renamed(name: str) -> str:
    for ours, theirs in IDEFICS3_MODULES.items():
        name = name.replace(ours, theirs)
    return name


def _by_position(projection: torch.Tensor, config: SiQVLConfig) -> torch.Tensor:
    """The projector's weight, `(text_width, factor**2 * width)`, as `(text_width, factor**2, width)`."""
    return projection.reshape(projection.shape[0], -1, config.vision_config.hidden_size)


def _padded(weight: torch.Tensor, shape: list[int]) -> torch.Tensor:
    """The weight in the corner of zeros of the given shape."""
    padded = weight.new_zeros(shape)
    corner = tuple(map(slice, weight.shape))
    padded[corner] = weight
    return padded


def _make_readable_by_both_majors(folder: Path, config: SiQVLConfig, processor: Idefics3Processor) -> None:
    """Write what one major of transformers saves under a name that the other does not read."""
    fields, text = read_json(folder / "config.json"), json.loads(config.to_json_string())["text_config"]
    names = ("rope_theta", "rope_scaling", "rope_parameters")
    fields["text_config"].update({name: text[name] for name in names if name in text})
    write_json(folder / "config.json", fields)
    processor.image_processor.save_pretrained(folder)  # transformers 5 writes it into processor_config.json only
    fields = read_json(folder / "tokenizer_config.json") | {"tokenizer_class": "PreTrainedTokenizerFast"}
    if isinstance(fields.get("extra_special_tokens"), list):
        fields["additional_special_tokens"] = fields.pop("extra_special_tokens")
    write_json(folder / "tokenizer_config.json", fields)


def read_json(path: Path) -> dict:
    """Return the fields of a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def write_json(path: Path, fields: dict) -> None:
    """Write fields as a JSON file, in the form that transformers gives it."""
    path.write_text(json.dumps(fields, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
