"""Where a bound begins, and what is as it was afterwards: the cases that no other test has an eye on."""

import base64
import io
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import get_peft_model
from PIL import Image
from test_remote import OK, serve  # noqa: F401 - a fixture
from transformers import GenerationConfig

from siq_vl.data import packing, remote
from siq_vl.data.conversations import Dropped, message
from siq_vl.data.feature_cache import build
from siq_vl.data.feature_cache.build import FeaturesTooLarge, cached_rows, store_of
from siq_vl.data.figures.dataset import sample
from siq_vl.data.mixture_config import FeatureArguments
from siq_vl.data.packing import PackingCollator
from siq_vl.data.preprocessing import DropLog
from siq_vl.data.remote import download_image, is_public
from siq_vl.distill.training_rows import Descriptions
from siq_vl.distill.verification import RuleInput, Verification
from siq_vl.modeling_siq_vl import SiQVLForConditionalGeneration, scale_and_cap
from siq_vl.processing_siq_vl import SiQVLProcessor, load_rgb
from siq_vl.training.arguments import ModelArguments
from siq_vl.training.stages import count_parameters, freeze_for_stage

# Addresses


def test_an_address_with_a_scope_is_not_public():
    assert is_public("2606:4700:4700::1111") and not is_public("2606:4700:4700::1111%eth0")


def test_an_endless_picture_is_not_read_to_its_end(serve, monkeypatch):  # noqa: F811
    monkeypatch.setattr(remote, "MAX_BYTES", 1 << 20)
    sent = []

    def send(connection):
        connection.sendall(OK + b"\r\n")
        for _ in range(128):  # far more than the system holds ready for a slow reader
            connection.sendall(bytes(1 << 20))
            sent.append(1)

    server = serve(send)
    with pytest.raises(ValueError, match="larger than 1 MiB"):
        download_image(server.url)
    server.thread.join(10)
    assert len(sent) < 128


# Stored features


def test_what_a_folder_holds_counts_against_its_budget(tmp_path):
    settings = FeatureArguments(feature_cache_dir=str(tmp_path), feature_cache_gb=1e-6)
    assert build._refusal(600, settings) is None and "feature_cache_gb" in build._refusal(1001, settings)
    (tmp_path / "other").mkdir()
    (tmp_path / "other/0.features").write_bytes(bytes(500))
    assert build._refusal(500, settings) is None and "beside" in build._refusal(600, settings)


@pytest.mark.parametrize("training", [True, False])
def test_a_tower_that_was_at_work_is_as_it_was(training, make_model):
    model = make_model().train(training)
    with pytest.raises(ValueError, match="broken"), build._tower_at_work(model, "cpu"):
        assert not model.model.vision_tower.training and not model.model.projector.training
        raise ValueError("broken")
    assert model.model.vision_tower.training is model.model.projector.training is training


def test_every_tile_counts_before_features_are_computed(tmp_path, make_model, make_image, processor):
    model, rows = make_model(), Dataset.from_dict({"number": [0, 1]})
    processor.max_tiles = 4
    rows = rows.with_transform(
        lambda batch: {
            "images": [[make_image(number, (64, 64))] for number in batch["number"]],
            "messages": [[message("user", "?", 1), message("assistant", "!")] for _ in batch["number"]],
        }
    )
    settings = FeatureArguments(feature_cache_dir=str(tmp_path), feature_cache_gb=1.0)
    tile = store_of(model, processor, settings, False).layout.tile_bytes
    with pytest.raises(FeaturesTooLarge, match="feature_cache_gb"):
        cached_rows(rows, model, processor, replace(settings, feature_cache_gb=(2 * 5 - 0.5) * tile / 1e9))
    cached_rows(rows, model, processor, replace(settings, feature_cache_gb=(2 * 5 + 0.5) * tile / 1e9))


# Packing


def test_the_first_label_of_a_packed_sample_is_not_learnt():
    """It would be predicted from the sample before, whatever the collator says."""

    def collate(samples):
        ids = torch.tensor(samples)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}

    (row,) = PackingCollator(collate, 8, image_token_id=0)([[1, 2, 3], [4, 5, 6]])
    assert row["labels"].tolist() == [[-100, 2, 3, -100, 5, 6]]
    assert SimpleNamespace(**row).use_cache is False


def test_images_of_unlike_sizes_are_not_dealt_out():
    def collate(samples):
        ids = torch.tensor(samples)
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}
        return {**batch, "pixel_values": torch.zeros(2, 3, 4, 4)}

    pack = PackingCollator(collate, 8, image_token_id=9)
    assert len(pack([[9, 9, 1], [9, 9, 2]]).rows[0]["pixel_values"]) == 2
    for samples in ([[9, 9, 9], [9, 1, 2]], [[9, 9, 9], [9, 9, 1]], [[9, 1, 2], [3, 4, 5]]):
        with pytest.raises(ValueError, match="images of one batch must have equally many"):
            pack(samples)


def test_samples_of_a_packed_row_keep_to_their_own_sliding_window():
    torch.manual_seed(0)
    lengths, window = [3, 7, 2, 6], 4
    sample = torch.repeat_interleave(torch.arange(4), torch.tensor(lengths))
    place = torch.arange(sum(lengths))
    apart = place[:, None] - place
    mask = (sample[:, None] == sample) & (apart >= 0) & (apart < window)
    query, key, value = torch.randn(3, 1, 2, sum(lengths), 4).unbind()
    module = SimpleNamespace(is_causal=True, training=False)
    options = {"sliding_window": window, "scaling": 0.5}
    found, _ = packing._sdpa_by_sample(module, query, key, value, mask[None, None], lengths, **options)
    scores = (0.5 * query @ key.transpose(2, 3)).masked_fill(~mask, -torch.inf)
    torch.testing.assert_close(found, (scores.softmax(-1) @ value).transpose(1, 2))


# Verification


def verdict(output: str, golds: tuple[str, ...] = (), *, kind: str = "open", choices=(), hinted=False, **rules):
    trace = RuleInput("What is it?", golds, kind, choices, output, "stop", hinted, "")
    return Verification(**{"language": "", **rules}).judge(trace)


def traced(rationale: str, answer: str) -> str:
    return f"<think>{rationale}</think><answer>{answer}</answer>"


def test_a_refusal_opens_the_reasoning_or_is_the_answer_unless_it_is_right():
    unknown = "It cannot be determined"
    assert verdict(traced("There is no clock in it.", unknown)) == ["refusal"]
    assert verdict(traced("There is no clock in it.", unknown), (unknown,)) == []
    assert verdict(traced("I cannot see the image.", "red"), ("red",)) == ["refusal"]
    seen = "The first bar is blue and reaches to four. " * 4
    assert verdict(traced(f"{seen}I cannot see the picture of a third.", "blue"), ("blue",)) in ([], ["repetition"])


def test_a_conclusion_is_what_the_last_sentence_or_the_named_answer_says():
    assert verdict(traced("3 + 4 = 7. Then 7 + 1 = 8", "8")) == []
    assert verdict(traced("3 + 4 = 7. Then 7 + 1 = 8", "7")) == ["contradiction"]
    assert verdict(traced("so 3 + 4 = 7", "8"), kind="choice", choices=("7", "8")) == []
    assert verdict(traced("the answer is red", "blue")) == ["contradiction"]
    assert verdict(traced("the answer is one of those that are written on the left side of it", "red")) == []


def test_bounds_of_the_length_are_within():
    for least, most, rules in ((3, 9, []), (1, 3, []), (4, 9, ["length"]), (1, 2, ["length"])):
        assert verdict(traced("one two three", "red"), min_words=least, max_words=most) == rules


def test_only_a_trace_with_a_hint_can_leak_it():
    leaking = traced("according to the hint it is red", "red")
    assert verdict(leaking) == [] and verdict(leaking, hinted=True) == ["hint"]
    assert verdict(leaking, hinted=True, skip_rules=("hint",)) == []


def test_an_answer_with_no_gold_one_is_not_wrong_and_none_is_no_trace():
    assert verdict(traced("it is red", "red"), ()) == [] and verdict(traced("it is red", "red"), ("blue",)) == [
        "answer"
    ]
    assert verdict("<think>it is red</think>", ("red",)) == ["parse"]


def test_a_script_that_the_question_quotes_is_not_foreign():
    said = traced("the sign says 出口", "exit")
    assert verdict(said, language="en") == ["language"]
    assert verdict(said, ("出口", "exit"), language="en") == []


def test_a_caption_of_a_drawn_figure_is_for_its_own_question(tmp_path):
    descriptions = Descriptions(tmp_path, DropLog(1.0))
    drawn = sample("train", 0, seed=0, domain="scenes")
    row = {"sample_id": "train/0/scenes/0", "question": drawn.question.text}
    assert descriptions.of(row) == drawn.figure.caption
    with pytest.raises(Dropped, match="neither caption nor OCR text"):
        descriptions.of({**row, "question": "Is it another one?"})


# The model


@pytest.mark.parametrize(("height", "width"), [(16, 64), (64, 16)])
def test_pictures_of_another_shape_are_read_by_their_rows(height, width, make_model):
    """These have as many patches as a picture of the usual size, so that nothing fails by itself."""
    model, pixels = make_model().model, torch.randn(1, 3, height, width)
    with torch.no_grad():
        made = model.get_image_features(pixels)
        interpolated = model.vision_tower(pixels, interpolate_pos_encoding=True).last_hidden_state
        torch.testing.assert_close(made.last_hidden_state, interpolated)
        torch.testing.assert_close(made.pooler_output, model.projector(interpolated, height // 8, width // 8))


def test_a_projector_without_a_bias_has_none(make_model):
    for kind in ("linear", "mlp"):
        projector = make_model(projector_type=kind, projector_bias=False).model.projector
        assert not [name for name, _ in projector.named_parameters() if name.endswith("bias")]


def test_placeholders_among_embeddings_are_known_by_every_channel(make_model):
    model = make_model().model
    embedded = model.get_input_embeddings()(torch.tensor([[model.config.image_token_id, 0]])).detach().clone()
    embedded[0, 1, 0] = embedded[0, 0, 0]
    assert model._find_placeholders(None, embedded).tolist() == [[True, False]]


@pytest.mark.parametrize("positions", [[0, 0], [0, 1, 1, 2], [0, 1, 2, 0]])
def test_positions_that_do_not_rise_begin_another_sample(positions, make_model):
    model, ids = make_model(), torch.zeros(1, len(positions), dtype=torch.long)
    with pytest.raises(ValueError, match="position_ids restart inside a row"):
        model(input_ids=ids, position_ids=torch.tensor([positions]), use_cache=True)
    model(input_ids=ids, position_ids=torch.arange(len(positions))[None], use_cache=True)


def test_a_decoder_gives_its_ids_for_generation_and_not_its_sampling(backbones, special_ids):
    folder = backbones["language_model"]
    ids = {"bos_token_id": 3, "eos_token_id": 5, "pad_token_id": 4}
    GenerationConfig(**ids, do_sample=True, temperature=0.3).save_pretrained(folder)
    made = SiQVLForConditionalGeneration.from_backbones(**backbones, **special_ids).generation_config
    assert {name: getattr(made, name) for name in ids} == ids and not made.do_sample


def test_capped_logits_keep_their_scale():
    capped = SimpleNamespace(model_type="gemma2", final_logit_softcapping=2.0)
    assert scale_and_cap(torch.tensor([0.002, 100.0]), capped).tolist() == pytest.approx([0.002, 2.0])


# What trains


def test_an_adapter_has_the_rank_scale_and_dropout_of_its_settings(make_model):
    asked = ModelArguments(lora_r=4, lora_alpha=7, lora_dropout=0.25)
    made = freeze_for_stage(make_model(), "2", asked)
    assert (made.r, made.lora_alpha, made.lora_dropout) == (4, 7, 0.25)


def test_the_last_layers_of_the_tower_train(make_model):
    model = make_model(vision={"num_hidden_layers": 3})
    freeze_for_stage(model, "2", ModelArguments(unfreeze_vision_layers=2))
    trained = [next(layer.parameters()).requires_grad for layer in model.model.vision_tower.encoder.layers]
    assert trained == [False, True, True]
    with pytest.raises(ValueError, match="unfreeze_vision_layers is 4, but the vision tower has 3 layers"):
        freeze_for_stage(model, "2", ModelArguments(unfreeze_vision_layers=4))


def test_the_tower_has_an_adapter_where_one_is_asked_for_and_no_twin_is_counted(make_model):
    for vision_lora in (False, True):
        model = make_model()
        wrapped = get_peft_model(model, freeze_for_stage(model, "2", ModelArguments(lora_r=2, vision_lora=vision_lora)))
        adapted = [name for name, _ in wrapped.named_parameters() if "vision_tower" in name and "lora_" in name]
        assert bool(adapted) is vision_lora
        trained, frozen = count_parameters(wrapped)
        assert "projector" in trained and "projector" not in frozen


# Images


def test_transparent_pixels_become_white_whatever_says_so():
    keyed = Image.new("RGB", (2, 1), (255, 0, 0))
    keyed.putpixel((1, 0), (0, 0, 9))
    keyed.info["transparency"] = (255, 0, 0)
    for image, wanted in ((keyed, [(255, 255, 255), (0, 0, 9)]), (Image.new("RGBA", (1, 1)), [(255, 255, 255)])):
        assert list(load_rgb(image).getdata()) == wanted


def test_16_bits_are_rounded_and_what_is_infinite_is_refused():
    values = np.array([[0, 128, 129, 257 * 7 + 200, 33000, 65535]], np.uint16)  # 33000 / 256 is nearer to 129
    assert np.asarray(load_rgb(Image.fromarray(values)))[0, :, 0].tolist() == [0, 0, 1, 8, 128, 255]
    for bad in (np.nan, np.inf, -np.inf):
        with pytest.raises(ValueError, match="not finite"):
            load_rgb(Image.fromarray(np.array([[0.5, bad]], np.float32)))


def test_a_tensor_that_could_be_both_has_its_channels_first():
    assert load_rgb(torch.zeros(3, 5, 3)).shape == (5, 3, 3) and load_rgb(np.zeros((3, 5, 3))).shape == (3, 5, 3)


def test_what_is_no_base64_is_not_decoded():
    file = io.BytesIO()
    Image.new("RGB", (2, 1)).save(file, "PNG")
    text = base64.b64encode(file.getvalue()).decode()
    assert load_rgb(text).size == (2, 1)
    # Decoders that skip what is no base64 would find the picture in the last two.
    for wrong in ("a name of no file!", f"!{text}", f"{text[:20]}*{text[20:]}"):
        with pytest.raises(ValueError, match="no URL, no file and no base64 text"):
            load_rgb(wrong)


# The configuration


@pytest.mark.parametrize("name", ["image_token_id", "vision_start_token_id", "vision_end_token_id"])
def test_special_tokens_are_in_the_vocabulary(name, make_config, tokenizer):
    size = len(tokenizer) + 1
    assert getattr(make_config(text={"vocab_size": size}, **{name: size - 1}), name) == size - 1
    for outside in (-1, size):
        with pytest.raises(ValueError, match=f"{name} is {outside}, but must be an integer from 0 to {size - 1}"):
            make_config(text={"vocab_size": size}, **{name: outside})


# The processor


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"max_length": True}, "max_length is True"),
        ({"pad_to_multiple_of": True}, "pad_to_multiple_of is True"),
        ({"image_std": 0}, "image_std is 0"),
        ({"image_std": [1.0, 0.0, 1.0]}, "image_std is"),
        ({"size": {"height": 1 << 20, "width": 1 << 20}}, "may have at most"),
    ],
)
def test_keywords_without_meaning_are_named(keywords, message, processor, make_image):
    with pytest.raises(ValueError, match=message):
        processor(images=[make_image()], text=["<|image_pad|>"], **keywords)


@pytest.mark.parametrize("half", ["\ud800", "\ud805", "\udbff", "\udfff"])
def test_half_a_character_is_refused(half, processor):
    with pytest.raises(ValueError, match="half a character"):
        processor(text=[f"a{half}"])


def test_a_message_needs_a_role(processor):
    for message_ in ({"content": "a"}, {"role": None, "content": "a"}, {"role": 1, "content": "a"}):
        with pytest.raises(ValueError, match="a dict with a role"):
            processor.apply_chat_template([message_])


def test_sizes_are_height_and_width_and_what_is_not_resized_is_not_cut(processor):
    processor.max_tiles = 4
    assert processor._tile_size({"size": {"height": 32, "width": 64}}) == (32, 64)
    assert [processor._max_tiles(each) for each in ({}, {"do_resize": True}, {"do_resize": False})] == [4, 4, 1]


def test_what_a_tokenizer_puts_around_a_text():
    def beginning(before: list[int], after: list[int]) -> list[int]:
        tokenizer = lambda text, add_special_tokens=True: {  # noqa: E731
            "input_ids": [*before, 7, *after] if add_special_tokens else [7]
        }
        return SiQVLProcessor.beginning_ids.fget(SimpleNamespace(tokenizer=tokenizer))

    assert beginning([], []) == [] and beginning([1, 2], []) == [1, 2]
    for before, after in (([], [3]), ([1], [3])):
        with pytest.raises(ValueError, match="adds at the end would close"):
            beginning(before, after)


def test_a_tokenizer_without_a_pad_token_makes_no_processor(processor):
    processor.tokenizer.pad_token = None
    with pytest.raises(ValueError, match="no pad token"):
        SiQVLProcessor(processor.image_processor, processor.tokenizer)
