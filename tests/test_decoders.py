"""Every decoder that SiQ-VL takes computes what its own class computes; every other one is refused with a reason."""

import pytest
import torch
from conftest import VISION, build_tokenizer
from test_modeling import V4
from tokenizers.processors import TemplateProcessing
from transformers import AutoConfig, AutoModelForCausalLM

from siq_vl.configuration_siq_vl import DECODERS, SiQVLConfig
from siq_vl.data.collation import ConversationCollator
from siq_vl.data.packing import SDPA_BY_SAMPLE, attend_by_sample
from siq_vl.modeling_siq_vl import SiQVLForConditionalGeneration
from siq_vl.processing_siq_vl import SiQVLProcessor
from siq_vl.training.arguments import ModelArguments
from siq_vl.training.stages import freeze_for_stage

VOCAB, IMAGE_ID, WIDTH = 96, 5, 32
COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# What each family has beside `COMMON`: the settings that change its outputs, chosen so that leaving them out is seen.
FAMILIES = {
    "qwen2": {},
    "qwen3": {},
    "llama": {},
    "mistral": {"sliding_window": 4},
    "smollm3": {"no_rope_layers": [1, 0]},
    "olmo": {},
    "olmo2": {},
    "phi3": {},
    "gemma": {},
    "gemma2": {"sliding_window": 4, "final_logit_softcapping": 1.0, "query_pre_attn_scalar": 8},
    "gemma3_text": {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
    "granite": {"logits_scaling": 8.0, "embedding_multiplier": 12.0, "residual_multiplier": 0.22},
    "cohere": {"logit_scale": 0.0625},
    "cohere2": {"logit_scale": 0.25, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
    "starcoder2": {},
    "glm": {},
    "helium": {},
}
REFUSED = {
    "gpt2": "linear layers",
    "opt": "position_ids",
    "stablelm": "lengths of the samples",
    "nemotron": "lengths of the samples",
    "lfm2": "state",
    "phi": "bias",
    "gpt_neox": "linear layers",
    "mamba": "state",
    "jamba": "state",
    "bamba": "state",
    "mixtral": "experts",
    "qwen3_moe": "experts",
    "falcon": "linear layers",
    "bloom": "position_ids",
    "bert": "both directions",
    "gemma3": "gemma3_text",
    "xglm": "nobody has checked",
}


def native(family: str, **settings):
    """A tiny model of the decoder's own class, with weights large enough for outputs that depend on the inputs."""
    config = AutoConfig.for_model(family, **{**COMMON, **FAMILIES[family], **settings})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            parameter.normal_(mean=0.0, std=0.3, generator=generator)
    return model.eval()


def joined(decoder) -> SiQVLForConditionalGeneration:
    """A SiQ-VL model with the weights of a decoder."""
    torch.manual_seed(1)
    config = SiQVLConfig(
        vision_config=VISION,
        text_config=decoder.config,
        image_token_id=IMAGE_ID,
        vision_start_token_id=3,
        vision_end_token_id=4,
    )
    model = SiQVLForConditionalGeneration(config)
    model.model.language_model.load_state_dict(decoder.model.state_dict())
    model.lm_head.load_state_dict(decoder.lm_head.state_dict())
    return model.eval()


def ids_of(*lengths: int) -> list[torch.Tensor]:
    """Token ids without placeholders, each of shape `(1, length)`."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(6, VOCAB, (1, length), generator=generator) for length in lengths]


def with_picture(ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """The ids after the four tokens of a picture, and the picture."""
    pixels = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    return {"input_ids": torch.cat([torch.full((1, 4), IMAGE_ID), ids], dim=1), "pixel_values": pixels}


@pytest.fixture(params=FAMILIES)
def pair(request):
    decoder = native(request.param)
    return request.param, decoder, joined(decoder)


def test_every_decoder_is_tested():
    assert set(FAMILIES) == set(DECODERS)


@torch.no_grad()
def test_outputs_are_those_of_the_decoders_own_class(pair):
    """Text, text and picture, cached, padded on the left, packed: compared with the class that transformers has."""
    family, decoder, model = pair
    (ids,) = ids_of(9)
    assert torch.equal(model(input_ids=ids).logits, decoder(input_ids=ids).logits)
    assert torch.equal(model(input_ids=ids, labels=ids).loss, decoder(input_ids=ids, labels=ids).loss)

    inputs = with_picture(ids)
    picture = model.get_image_features(inputs["pixel_values"], return_dict=True).pooler_output
    embeds = decoder.get_input_embeddings()(inputs["input_ids"])
    embeds[:, :4] = picture / WIDTH**0.5 if V4 and family in ("gemma", "gemma2") else picture
    expected = decoder(inputs_embeds=embeds).logits
    assert torch.equal(model(**inputs).logits, expected)
    assert not torch.allclose(
        model(**inputs).logits, model(**inputs | {"pixel_values": -inputs["pixel_values"]}).logits
    )

    generate = {"do_sample": False, "max_new_tokens": 6, "min_new_tokens": 6, "return_dict_in_generate": True}
    cached = model.generate(**inputs, **generate, output_logits=True)
    alone = model.generate(**inputs, **generate, output_logits=True, use_cache=False)
    assert torch.equal(cached.sequences, alone.sequences)
    torch.testing.assert_close(torch.stack(cached.logits), torch.stack(alone.logits), rtol=1e-4, atol=1e-4)

    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), inputs["input_ids"]], dim=1)
    other = torch.cat([torch.full((1, 4), IMAGE_ID), *ids_of(12)], dim=1)
    batch = {
        "input_ids": torch.cat([padded, other]),
        "attention_mask": torch.tensor([[0] * 3 + [1] * 13, [1] * 16]),
        "pixel_values": torch.cat([inputs["pixel_values"]] * 2),
    }
    assert torch.equal(model.generate(**batch, **generate).sequences[0, 3:], cached.sequences[0])


@torch.no_grad()
@pytest.mark.parametrize("attention", ["eager", "sdpa", SDPA_BY_SAMPLE])
def test_packed_rows_are_right_or_refused(pair, attention):
    """Samples longer and shorter than a sliding window, and a picture in one of them."""
    family, decoder, model = pair
    if family == "gemma2" and attention != "eager" and not V4:
        pytest.skip("transformers 5 has no sdpa for Gemma 2")
    if attention != SDPA_BY_SAMPLE:
        model.set_attn_implementation(attention)
    samples = [with_picture(ids_of(9)[0]), {"input_ids": ids_of(3)[0]}, {"input_ids": ids_of(11)[0]}]
    lengths = [sample["input_ids"].shape[1] for sample in samples]
    row = {
        "input_ids": torch.cat([sample["input_ids"] for sample in samples], dim=1),
        "pixel_values": samples[0]["pixel_values"],
        "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
        "use_cache": False,
    }
    expected = torch.cat([model(**sample).logits for sample in samples], dim=1)
    if attention == SDPA_BY_SAMPLE:
        with attend_by_sample(model.model.language_model.config):
            packed = model(**row, sample_lengths=lengths).logits
    else:
        packed = model(**row).logits
    torch.testing.assert_close(packed, expected, rtol=1e-4, atol=1e-4)


def test_lora_finds_every_linear(pair):
    """By structure, where the names are not those of Qwen2: Phi-3's and GLM's are fused."""
    from peft import get_peft_model

    _, _, model = pair
    linears = [name for name, module in model.model.language_model.named_modules() if type(module) is torch.nn.Linear]
    adapted = get_peft_model(model, freeze_for_stage(model, "2", ModelArguments(lora_r=2)))
    found = [name for name, _ in adapted.named_modules() if name.endswith(".lora_A.default")]
    assert linears and sorted(name.split("language_model.")[1] for name in found) == sorted(
        f"{name}.lora_A.default" for name in linears
    )


def test_layers_that_are_never_split_are_the_models_own(pair):
    _, _, model = pair
    layers = {type(layer).__name__ for layer in model.model.language_model.layers}
    assert set(model._no_split_modules) == {"SiglipEncoderLayer", *layers}


@pytest.mark.parametrize(("family", "reason"), REFUSED.items())
def test_others_are_refused_with_a_reason(family, reason):
    config = AutoConfig.for_model(family)
    with pytest.raises(ValueError, match=rf"type '{family}', but .*{reason}.*use one of qwen2, .*test_decoders"):
        SiQVLConfig(vision_config=VISION, text_config=config, image_token_id=5)


def test_a_tokenizer_without_pad_token_is_refused(processor):
    tokenizer = build_tokenizer()
    tokenizer.pad_token = None
    with pytest.raises(ValueError, match="no pad token.*tokenizer.pad_token = tokenizer.eos_token"):
        SiQVLProcessor(processor.image_processor, tokenizer)


def test_training_rows_begin_as_prompts_do(processor, make_image):
    """With a post-processor that adds a BOS, as those of Llama 3 and Gemma do."""
    bos = "<|endoftext|>"
    post = TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, processor.tokenizer.convert_tokens_to_ids(bos))]
    )
    processor.tokenizer.backend_tokenizer.post_processor = post
    prompt = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}]
    answer = [{"role": "assistant", "content": [{"type": "text", "text": "A cat."}]}]
    batch = ConversationCollator(processor)([{"images": [make_image()], "prompt": prompt, "completion": answer}])
    rendered = processor.apply_chat_template(prompt, add_generation_prompt=True)
    asked = processor(images=[make_image()], text=rendered)["input_ids"][0]
    assert asked[0] == processor.tokenizer.convert_tokens_to_ids(bos)
    assert batch["input_ids"][0, : len(asked)].tolist() == asked
    assert (batch["labels"][0, : len(asked)] == -100).all() and batch["labels"][0, len(asked)] != -100
