"""The processor: placeholders, images of every kind, the chat template, and TRL's collator around it."""

import numpy as np
import pytest
import torch
from PIL import Image
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from siq_vl.processing_siq_vl import SiQVLProcessor, to_rgb

IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"


def turn(role, *parts):
    """A message of images (`None`) and texts."""
    return {
        "role": role,
        "content": [{"type": "image"} if part is None else {"type": "text", "text": part} for part in parts],
    }


class TestCall:
    def test_expands_each_placeholder(self, processor, make_image):
        text = [f"{IMAGE}a", f"{IMAGE}b{IMAGE}", "c"]
        inputs = processor(images=[make_image(i) for i in range(3)], text=text, padding=True, return_tensors="pt")
        assert (inputs["input_ids"] == processor.image_token_id).sum(dim=1).tolist() == [4, 8, 0]
        assert inputs["pixel_values"].shape == (3, 3, 32, 32)
        assert set(inputs) == {"input_ids", "attention_mask", "pixel_values"} == set(processor.model_input_names)

    def test_text_around_images_is_kept(self, processor, make_image):
        inputs = processor(images=make_image(), text=f"a{IMAGE}b")
        pads = "<|image_pad|>" * 4
        assert processor.decode(inputs["input_ids"][0]) == f"a<|vision_start|>{pads}<|vision_end|>b"

    @pytest.mark.parametrize("arrange", [list, tuple, lambda images: [[images[0]], [], [images[1], images[2]]]])
    def test_images_flat_or_by_sample(self, processor, make_image, arrange):
        images, text = [make_image(i) for i in range(3)], [IMAGE, "a", IMAGE * 2]
        pixels = processor(images=arrange(images), text=text, return_tensors=None)["pixel_values"]
        for index, image in enumerate(images):
            expected = processor(images=image, text=IMAGE, return_tensors="np")["pixel_values"][0]
            np.testing.assert_array_equal(pixels[index], expected)

    def test_pixels_are_those_of_the_image_processor(self, processor, make_image):
        image = make_image(size=(50, 20))
        expected = processor.image_processor(image, return_tensors="pt")["pixel_values"]
        assert torch.equal(processor(images=image, return_tensors="pt")["pixel_values"], expected)

    def test_images_alone(self, processor, make_image):
        assert list(processor(images=[make_image()], return_tensors="pt")) == ["pixel_values"]

    def test_text_alone(self, processor):
        inputs = processor(text="a")
        assert list(inputs) == ["input_ids", "attention_mask"] and len(inputs["input_ids"]) == 1

    def test_path(self, processor, make_image, tmp_path):
        make_image().save(tmp_path / "image.png")
        inputs = processor(images=str(tmp_path / "image.png"), text=IMAGE, return_tensors="pt")
        assert torch.equal(inputs["pixel_values"], processor(images=make_image(), return_tensors="pt")["pixel_values"])

    def test_arrays(self, processor, make_image):
        expected = processor(images=make_image(), return_tensors="pt")["pixel_values"]
        assert torch.equal(processor(images=np.asarray(make_image()), return_tensors="pt")["pixel_values"], expected)

    @pytest.mark.parametrize("nested", [True, False])
    def test_keyword_arguments_reach_both_parts(self, processor, make_image, nested):
        kwargs = {"text_kwargs": {"padding": "max_length", "max_length": 12}, "images_kwargs": {"do_normalize": False}}
        flat = {name: value for group in kwargs.values() for name, value in group.items()}
        inputs = processor(images=make_image(), text=IMAGE, return_tensors="pt", **(kwargs if nested else flat))
        assert inputs["input_ids"].shape == (1, 12) and inputs["pixel_values"].min() >= 0

    def test_marks_image_tokens_on_request(self, processor, make_image):
        inputs = processor(images=make_image(), text=IMAGE + "a", return_mm_token_type_ids=True, return_tensors="pt")
        assert inputs["mm_token_type_ids"].tolist() == [[0, 1, 1, 1, 1, 0, 0]]

    def test_leaves_its_arguments_alone(self, processor, make_image):
        text, images = [IMAGE], [[make_image()]]
        processor(images=images, text=text)
        assert text == [IMAGE] and len(images) == 1


class TestCallRefuses:
    def test_nothing(self, processor):
        with pytest.raises(ValueError, match="Got neither images nor text"):
            processor()

    @pytest.mark.parametrize(("n_images", "n_placeholders"), [(1, 2), (2, 1), (0, 1), (1, 0)])
    def test_other_numbers_of_images_and_placeholders(self, processor, make_image, n_images, n_placeholders):
        images = [make_image()] * n_images or None
        message = f"Got {n_images} images for texts with {n_placeholders} placeholders.*pass all images"
        with pytest.raises(ValueError, match=message):
            processor(images=images, text=IMAGE * n_placeholders)

    def test_images_of_the_wrong_sample(self, processor, make_image):
        message = r"Got \[1, 1\] images for texts with \[2, 0\] placeholders.*one list of images for each text"
        with pytest.raises(ValueError, match=message):
            processor(images=[[make_image()], [make_image()]], text=[IMAGE * 2, "a"])

    def test_truncation_inside_an_image(self, processor, make_image):
        message = "Truncation to max_length=3 leaves 2 of the 4 image tokens of text 0: raise max_length"
        with pytest.raises(ValueError, match=message):
            processor(images=make_image(), text=IMAGE, truncation=True, max_length=3)

    def test_truncation_after_an_image_is_fine(self, processor, make_image):
        inputs = processor(images=make_image(), text=IMAGE + "abc", truncation=True, max_length=7)
        assert len(inputs["input_ids"][0]) == 7

    def test_tokenizer_without_the_special_tokens(self, processor, monkeypatch):
        vocabulary = processor.tokenizer.get_vocab()
        del vocabulary["<|image_pad|>"]
        monkeypatch.setattr(type(processor.tokenizer), "get_vocab", lambda self: vocabulary)
        with pytest.raises(ValueError, match=r"The tokenizer has no token <\|image_pad\|>, but SiQ-VL needs each of"):
            SiQVLProcessor(processor.image_processor, processor.tokenizer)


class TestToRGB:
    @pytest.mark.parametrize(
        "mode", ["1", "L", "P", "RGB", "RGBA", "LA", "PA", "CMYK", "YCbCr", "HSV", "I", "I;16", "F"]
    )
    @pytest.mark.parametrize("size", [(1, 1), (7, 300), (64, 32)])
    def test_every_mode_and_size(self, processor, mode, size):
        pixels = processor(images=Image.new(mode, size), return_tensors="pt")["pixel_values"]
        assert pixels.shape == (1, 3, 32, 32) and pixels.isfinite().all() and pixels.abs().max() <= 1.001

    @pytest.mark.parametrize("mode", ["RGBA", "LA"])
    def test_transparency_becomes_white(self, mode):
        channels = {"RGBA": (255, 0, 0, 0), "LA": (0, 0)}[mode]
        assert to_rgb(Image.new(mode, (1, 1), channels)).getpixel((0, 0)) == (255, 255, 255)

    def test_half_transparency_is_blended(self):
        red, green, blue = to_rgb(Image.new("RGBA", (1, 1), (0, 0, 255, 128))).getpixel((0, 0))
        assert (abs(red - 127) <= 1, abs(green - 127) <= 1, blue) == (True, True, 255)

    def test_transparent_palette_entry_becomes_white(self, tmp_path):
        image = Image.new("P", (2, 1))
        image.putpalette([255, 0, 0, 0, 255, 0])
        image.putpixel((1, 0), 1)
        image.save(tmp_path / "image.png", transparency=0)
        image = to_rgb(Image.open(tmp_path / "image.png"))
        assert [image.getpixel((x, 0)) for x in (0, 1)] == [(255, 255, 255), (0, 255, 0)]

    def test_sixteen_bits_are_scaled_not_clipped(self, tmp_path):
        Image.fromarray(np.array([[0, 257 * 100, 65535]], dtype=np.uint16)).save(tmp_path / "image.png")
        image = to_rgb(Image.open(tmp_path / "image.png"))
        assert [image.getpixel((x, 0))[0] for x in range(3)] == [0, 100, 255]

    def test_eight_bits_in_a_wide_mode_are_kept(self):
        assert to_rgb(Image.new("I", (1, 1), 100)).getpixel((0, 0)) == (100, 100, 100)

    def test_rgb_is_not_copied(self, make_image):
        image = make_image()
        assert to_rgb(image) is image


class TestChatTemplate:
    def test_turns(self, processor):
        messages = [
            {"role": "system", "content": "Be brief."},
            turn("user", None, "What is ", "this?"),
            {"role": "assistant", "content": " A cat.\n"},
        ]
        expected = (
            "<|im_start|>system\nBe brief.<|im_end|>\n"
            f"<|im_start|>user\n{IMAGE}What is this?<|im_end|>\n"
            "<|im_start|>assistant\n A cat.\n<|im_end|>"
        )
        assert processor.apply_chat_template(messages) == expected
        assert processor.tokenizer.apply_chat_template(messages, tokenize=False) == expected

    @pytest.mark.parametrize(
        ("kwargs", "ending"),
        [
            ({}, ""),
            ({"enable_thinking": False}, "<think></think>"),
            ({"enable_thinking": True}, ""),
            ({"enable_thinking": None}, ""),
        ],
    )
    def test_generation_prompt(self, processor, kwargs, ending):
        text = processor.apply_chat_template([turn("user", "Hi")], add_generation_prompt=True, **kwargs)
        assert text == f"<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n{ending}"

    def test_no_system_prompt_is_added(self, processor):
        assert "system" not in processor.apply_chat_template([turn("user", "Hi")])

    def test_images_between_texts(self, processor):
        text = processor.apply_chat_template([turn("user", "a", None, "b", None)])
        assert text == f"<|im_start|>user\na{IMAGE}b{IMAGE}<|im_end|>"

    def test_refuses_other_content(self, processor):
        with pytest.raises(ValueError, match="Content of type video is not supported"):
            processor.apply_chat_template([{"role": "user", "content": [{"type": "video"}]}])

    def test_tokenizes_with_images(self, processor, make_image):
        image = make_image()
        messages = [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "What?"}]}]
        inputs = processor.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        text = processor.apply_chat_template(messages, add_generation_prompt=True)
        expected = processor(images=image, text=text, return_tensors="pt")
        assert all(torch.equal(inputs[name], expected[name]) for name in expected)


class TestForServing:
    def test_number_of_tokens(self, processor):
        counts = processor._get_num_multimodal_tokens(image_sizes=[[10, 20], [500, 400]])
        assert (counts.num_image_tokens, counts.num_image_patches) == ([4, 4], [1, 1])

    def test_replacement(self, processor):
        assert processor.replace_image_token({}, 0) == processor.expand_image_tokens("<|image_pad|>")

    def test_decoding(self, processor):
        ids = processor(text=["a<|im_end|>", "b<|im_end|>"], return_tensors="pt")["input_ids"]
        assert processor.batch_decode(ids) == ["a<|im_end|>", "b<|im_end|>"]
        assert processor.post_process_image_text_to_text(ids) == ["a", "b"]


class TestTRLCollator:
    def rows(self, make_image, *n_images):
        return [
            {
                "images": [make_image(10 * row + index) for index in range(count)],
                "prompt": [{"role": "user", "content": "What" + "?" * row}],
                "completion": [{"role": "assistant", "content": "A cat" + "!" * row}],
            }
            for row, count in enumerate(n_images)
        ]

    @pytest.mark.parametrize("n_images", [(1, 1), (2, 0, 1), (0, 0)])
    def test_labels_are_the_answer_and_its_end(self, processor, make_image, n_images):
        collator = DataCollatorForVisionLanguageModeling(processor, completion_only_loss=True)
        batch = collator(self.rows(make_image, *n_images))
        for row, labels in enumerate(batch["labels"]):
            assert processor.decode(labels[labels != -100]) == f"A cat{'!' * row}<|im_end|>"
        assert ("pixel_values" in batch) is any(n_images)
        assert (batch["input_ids"] == processor.image_token_id).sum(dim=1).tolist() == [4 * n for n in n_images]

    def test_batch_trains_the_model(self, processor, make_image, make_model):
        collator = DataCollatorForVisionLanguageModeling(processor, completion_only_loss=True)
        model = make_model().train()
        model(**collator(self.rows(make_image, 2, 0, 1)), use_cache=False).loss.backward()
        assert model.model.projector.linear.weight.grad.abs().max() > 0

    def test_whole_conversations(self, processor, make_image):
        rows = [
            {"images": row["images"], "messages": row["prompt"] + row["completion"]}
            for row in self.rows(make_image, 1, 0)
        ]
        batch = DataCollatorForVisionLanguageModeling(processor)(rows)
        assert batch["input_ids"].shape == batch["labels"].shape and batch["pixel_values"].shape[0] == 1


class TestFromBackbones:
    def test_reads_sizes_and_token_ids(self, backbones, make_image):
        processor = SiQVLProcessor.from_backbones(**backbones, pixel_shuffle_factor=4)
        assert (processor.patch_size, processor.pixel_shuffle_factor, processor.image_seq_length) == (8, 4, 1)
        assert processor.tokenizer.convert_ids_to_tokens(
            [processor.vision_start_token_id, processor.image_token_id, processor.vision_end_token_id]
        ) == ["<|vision_start|>", "<|image_pad|>", "<|vision_end|>"]
        messages = [turn("user", None, "Hi")]
        assert processor.apply_chat_template(messages) == processor.tokenizer.apply_chat_template(
            messages, tokenize=False
        )

    def test_keeps_the_tokenizer_as_its_file_has_it(self, backbones, processor):
        loaded = SiQVLProcessor.from_backbones(**backbones).tokenizer
        text = "e\u0301 12<|im_end|>"  # Qwen's own tokenizer would compose the accented letter
        assert loaded(text)["input_ids"] == processor.tokenizer(text)["input_ids"]


def test_placeholders_are_found_in_the_expanded_text(processor, make_image):
    texts = ["a <|image_pad|> b <|image_pad|>", "c"]
    inputs = processor(images=[make_image()] * 2, text=texts, return_text_replacement_offsets=True)
    assert [len(offsets) for offsets in inputs["text_replacement_offsets"]] == [2, 0]
    expanded = processor.expand_image_tokens(texts[0])
    for offset in inputs["text_replacement_offsets"][0]:
        assert texts[0][slice(*offset["span"])] == offset["text"] == "<|image_pad|>"
        assert expanded[slice(*offset["new_span"])] == offset["replacement"] == "<|image_pad|>" * 4


def test_saving_leaves_the_processor_equal_to_its_copy(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    assert SiQVLProcessor.from_pretrained(tmp_path).to_dict() == processor.to_dict()
