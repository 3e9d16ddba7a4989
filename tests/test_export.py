"""Exported checkpoints: Idefics3 loads them without remote code, and sees, computes and says the same."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.models.idefics3.modeling_idefics3 import Idefics3VisionEmbeddings

from siq_vl.configuration_siq_vl import TRANSFORMERS_4
from siq_vl.data.figures.rows import user_turn
from siq_vl.evaluation.held_out import held_out_items
from siq_vl.export.idefics3 import (
    IDEFICS3_TOKENS,
    export_idefics3,
    idefics3_config,
    idefics3_processor,
    positions_are_exact,
)
from siq_vl.loading import load_checkpoint

REPO_ROOT = Path(__file__).resolve().parent.parent
NARROW = {"hidden_size": 16, "num_attention_heads": 2}  # as wide as the tower: any projector bias can be folded
computes = pytest.mark.skipif(
    TRANSFORMERS_4, reason="Idefics3 of transformers 4 computes wrong vision positions in fp32"
)


def chat(n_images, text):
    return [{"role": "user", "content": [{"type": "image"}] * n_images + [{"type": "text", "text": text}]}]


def exported(model, processor, folder, **kwargs):
    """Exports, and loads what was written as anybody would who has never heard of SiQ-VL."""
    export_idefics3(model, processor, folder, **kwargs)
    native, loading = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    assert type(native).__module__.startswith("transformers.")
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    return native.eval(), AutoProcessor.from_pretrained(folder)


def prepared(processor, messages, images):
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    return processor(images=images, text=text, return_tensors="pt")


def assert_same_answers(model, processor, native, native_processor, messages, images, n_tokens=12):
    ours = prepared(processor, messages, images)
    theirs = prepared(native_processor, messages, [images])
    assert torch.equal(ours["input_ids"], theirs["input_ids"])
    assert torch.equal(ours["pixel_values"], theirs["pixel_values"][0])
    with torch.no_grad():
        torch.testing.assert_close(native(**theirs).logits, model(**ours).logits, rtol=1e-4, atol=1e-4)
    length, texts = ours["input_ids"].shape[1], []
    for generator, tokens, inputs in ((model, processor, ours), (native, native_processor, theirs)):
        output = generator.generate(**inputs, max_new_tokens=n_tokens, do_sample=False)[:, length:]
        texts.append(tokens.batch_decode(output, skip_special_tokens=True))
    assert texts[0] == texts[1] and texts[0][0].strip()


class TestShippedCheckpoint:
    """The trained checkpoint that the repo is, whose language model is wider than its tower."""

    @pytest.fixture(scope="class")
    def shipped(self):
        model, processor = load_checkpoint(str(REPO_ROOT))
        return model.to("cpu"), processor

    def test_its_bias_has_no_place_in_the_tower(self, shipped, tmp_path):
        with pytest.raises(ValueError, match=r"192 values from 128 leave a relative residual of 0\.\d+, above 1e-6"):
            export_idefics3(*shipped, tmp_path)

    @computes
    def test_a_wider_tower_says_the_same(self, shipped, tmp_path):
        native, native_processor = exported(*shipped, tmp_path, widen_tower=True)
        for item in held_out_items(6)[:3]:
            assert_same_answers(*shipped, native, native_processor, user_turn(item.question), [item.image], n_tokens=48)


@computes
@pytest.mark.parametrize(
    "change",
    [
        {"projector_bias": False},
        {"text": NARROW},
        {"text": {**NARROW, "tie_word_embeddings": False}, "pixel_shuffle_factor": 1},
        {"text": NARROW, "vision": {"image_size": 96}, "pixel_shuffle_factor": 3},
    ],
    ids=["no bias", "folded", "untied", "factor 3"],
)
def test_computes_the_same(make_model, make_image, processor, tmp_path, change):
    model = with_bias(make_model(**change))
    side = model.config.vision_config.image_size
    processor.image_processor.size = {"height": side, "width": side}
    processor.pixel_shuffle_factor = model.config.pixel_shuffle_factor
    native, native_processor = exported(model, processor, tmp_path)
    images = [make_image(seed, size) for seed, size in enumerate([(50, 20), (32, 32), (9, 77)])]
    assert_same_answers(model, processor, native, native_processor, chat(2, "What is é here?\n\n1 < 2"), images[:2])
    assert_same_answers(model, processor, native, native_processor, chat(1, " "), images[2:])


def with_bias(model):
    """Gives the projector a bias that matters."""
    if model.config.projector_bias:
        torch.nn.init.normal_(model.model.projector.linear.bias, generator=torch.Generator().manual_seed(1))
    return model


@computes
def test_widening_is_as_good_as_folding(make_model, make_image, processor, tmp_path):
    model = with_bias(make_model(text=NARROW))
    folded, native_processor = exported(model, processor, tmp_path / "folded")
    widened, _ = exported(model, processor, tmp_path / "widened", widen_tower=True)
    inputs = prepared(native_processor, chat(1, "What?"), [[make_image()]])
    with torch.no_grad():
        torch.testing.assert_close(folded(**inputs).logits, widened(**inputs).logits, rtol=1e-4, atol=1e-4)
    assert widened.config.vision_config.hidden_size == 2 * folded.config.vision_config.hidden_size


def test_the_bias_is_not_lost(make_model, processor, tmp_path):
    """What was folded is what the projector's bias adds."""
    model = with_bias(make_model(text=NARROW))
    export_idefics3(model, processor, tmp_path)
    native = AutoModelForImageTextToText.from_pretrained(tmp_path)
    change = native.model.vision_model.post_layernorm.bias - model.model.vision_tower.post_layernorm.bias
    added = native.model.connector.modality_projection.proj(change.repeat(4))
    torch.testing.assert_close(added, model.model.projector.linear.bias, rtol=1e-4, atol=1e-4)
    assert model.model.projector.linear.bias.abs().max() > 1


# Idefics3 of transformers 4 reads RGB alone as SiQ-VL does; its other modes come out white or are refused.
@pytest.mark.parametrize("mode", ["RGB"] if TRANSFORMERS_4 else ["RGB", "L", "P", "1", "CMYK", "RGBA"])
def test_processors_agree(processor, make_image, tmp_path, mode):
    native = idefics3_processor(processor)
    native.save_pretrained(tmp_path)
    native = AutoProcessor.from_pretrained(tmp_path)
    images = [make_image(seed, size).convert(mode) for seed, size in enumerate([(50, 20), (32, 32), (9, 77), (1, 1)])]
    messages = chat(3, "Two turns") + [{"role": "assistant", "content": "Yes."}] + chat(1, "é\n\n<b>")
    ours, theirs = prepared(processor, messages, images), prepared(native, messages, [images])
    assert torch.equal(ours["input_ids"], theirs["input_ids"])
    assert torch.equal(ours["attention_mask"], theirs["attention_mask"])
    assert torch.equal(ours["pixel_values"], theirs["pixel_values"][0])
    assert theirs["pixel_attention_mask"].all()
    assert theirs.keys() == {"input_ids", "attention_mask", "pixel_values", "pixel_attention_mask"}
    assert len(native.tokenizer) == len(processor.tokenizer)  # no id beyond the embeddings
    for name, renamed in IDEFICS3_TOKENS.items():
        assert native.tokenizer.convert_tokens_to_ids(renamed) == processor.tokenizer.convert_tokens_to_ids(name)


@computes
def test_idefics3_has_the_positions_of_siglip_where_we_say_so(make_config):
    """For every grid up to that of 1024 pixels in patches of 16."""
    exact = set()
    for side in range(1, 65):
        config = make_config(vision={"image_size": side * 8, "hidden_size": 2}, pixel_shuffle_factor=1)
        embeddings = Idefics3VisionEmbeddings(idefics3_config(config).vision_config).requires_grad_(False)
        torch.nn.init.zeros_(embeddings.patch_embedding.weight)
        torch.nn.init.zeros_(embeddings.patch_embedding.bias)
        mask = torch.ones(1, side, side, dtype=torch.bool)
        found = embeddings(torch.zeros(1, 3, side * 8, side * 8), mask)[0]
        if torch.equal(found, embeddings.position_embedding.weight):
            exact.add(side)
    assert exact == {side for side in range(1, 65) if positions_are_exact(side)}
    assert {8, 16, 24, 27, 28, 32} <= exact and 40 not in exact


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"projector_type": "mlp"}, "projector_type is 'mlp', but Idefics3's connector is one linear layer"),
        ({"vision": {"image_size": 24}}, "makes 3 x 3 patches, which do not divide by pixel_shuffle_factor 2"),
        ({"vision": {"image_size": 320}}, "40 x 40 patches, a grid in which Idefics3 gives some patches the position"),
        ({}, "24 values from 16 leave a relative residual of"),
    ],
)
def test_refuses(make_model, processor, tmp_path, change, message):
    model = with_bias(make_model(**change))
    processor.image_processor.size = dict.fromkeys(("height", "width"), model.config.vision_config.image_size)
    with pytest.raises(ValueError, match=message):
        export_idefics3(model, processor, tmp_path)
    assert not list(tmp_path.iterdir())


def test_refuses_a_processor_of_another_size(make_model, processor, tmp_path):
    processor.image_processor.size = {"height": 32, "width": 48}
    with pytest.raises(ValueError, match="resizes pictures to 32 x 48 in up to 1 tiles, but Idefics3"):
        export_idefics3(make_model(projector_bias=False), processor, tmp_path)


def test_rope_and_end_of_turn_are_kept(make_model, processor, tmp_path):
    model = make_model(projector_bias=False, text={"rope_theta": 5e5})
    model.generation_config.eos_token_id = processor.tokenizer.eos_token_id
    export_idefics3(model, processor, tmp_path)
    native, tokens = AutoModelForImageTextToText.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)
    assert torch.equal(native.model.text_model.rotary_emb.inv_freq, model.model.language_model.rotary_emb.inv_freq)
    assert (
        native.generation_config.eos_token_id == tokens.tokenizer.eos_token_id == model.generation_config.eos_token_id
    )
    text = (tmp_path / "config.json").read_text()
    assert '"rope_theta": 500000.0' in text and '"rope_parameters"' in text and "auto_map" not in text


def test_script(checkpoint, tmp_path, monkeypatch, capsys):
    script, output = str(REPO_ROOT / "export_idefics3.py"), str(tmp_path / "out")
    monkeypatch.setattr(sys, "argv", [script, str(checkpoint), output, "--widen_tower"])
    runpy.run_path(script, run_name="__main__")
    assert "is an Idefics3ForConditionalGeneration checkpoint" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "idefics3"
    with pytest.raises(SystemExit, match="is not empty: pass a new folder"):
        runpy.run_path(script, run_name="__main__")
