"""AnyRes: large pictures cut into tiles, and images of another size than the tower was trained on."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import SiglipVisionModel

from siq_vl.configuration_siq_vl import tile_grid, tiles_per_image
from siq_vl.data.figures.drawing import canvas, write
from siq_vl.data.figures.rows import user_turn
from siq_vl.evaluation.held_out import held_out_items
from siq_vl.evaluation.predictions import judge
from siq_vl.evaluation.shifts import in_a_quarter
from siq_vl.loading import load_checkpoint
from siq_vl.modeling_siq_vl import SiQVLForConditionalGeneration
from siq_vl.processing_siq_vl import SiQVLProcessor

REPO_ROOT = Path(__file__).resolve().parent.parent
IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
# Width and height, tiles of at most 4 with the thumbnail. A tile of `processor` is 32 x 32 pixels and 4 tokens.
SIZES = {(32, 32): 1, (10, 20): 1, (64, 64): 5, (70, 30): 3, (30, 70): 3, (20, 400): 5, (500, 90): 5, (640, 480): 5}


def pixels(processor, image, **kwargs):
    return processor(images=image, return_tensors="pt", **kwargs)["pixel_values"]


class TestTileGrid:
    @pytest.mark.parametrize(
        ("size", "max_tiles", "expected"),
        [
            ((1000, 1000), 1, (1, 1)),
            ((1000, 1000), 3, (1, 1)),  # a strip would keep no more of a square than one tile does
            ((1000, 1000), 4, (2, 2)),
            ((1000, 1000), 8, (2, 2)),
            ((1000, 1000), 9, (3, 3)),
            ((1000, 2000), 2, (1, 2)),
            ((2000, 1000), 4, (2, 1)),
            ((1080, 1920), 6, (2, 3)),
            ((100, 9000), 4, (1, 4)),
            ((9000, 100), 4, (4, 1)),
            ((100, 100), 9, (1, 1)),
            ((101, 101), 9, (1, 1)),  # two tiles a side would enlarge it almost twice
            ((150, 150), 9, (2, 2)),
            ((1, 1), 9, (1, 1)),
        ],
    )
    def test_known_pictures(self, size, max_tiles, expected):
        assert tile_grid(*size, 100, 100, max_tiles) == expected

    def test_properties(self):
        """On random pictures: within bounds, no side enlarged by more than a third, none of the better grids missed."""
        generator = np.random.default_rng(0)
        for _ in range(500):
            height, width = (int(side) for side in np.exp(generator.uniform(0, 9, 2)))
            tile_height, tile_width, max_tiles = (int(value) for value in generator.integers(1, [200, 200, 13]))
            rows, columns = tile_grid(height, width, tile_height, tile_width, max_tiles)
            assert rows >= 1 and columns >= 1 and rows * columns <= max_tiles
            assert rows == 1 or rows * tile_height <= 4 / 3 * height
            assert columns == 1 or columns * tile_width <= 4 / 3 * width
            assert tile_grid(width, height, tile_width, tile_height, max_tiles) == (columns, rows)
            kept = min(1, rows * tile_height / height, columns * tile_width / width)
            fewer = tile_grid(height, width, tile_height, tile_width, max(max_tiles - 1, 1))
            assert min(1, fewer[0] * tile_height / height, fewer[1] * tile_width / width) <= kept
            n_tiles = tiles_per_image(height, width, tile_height, tile_width, max_tiles)
            assert n_tiles == (1 if rows * columns == 1 else rows * columns + 1)

    @pytest.mark.parametrize("max_tiles", [0, -1, 1.5, True, "4", None])
    def test_refuses_other_numbers_of_tiles(self, processor, max_tiles):
        message = "max_tiles is .*, but must be an integer of at least 1"
        with pytest.raises(ValueError, match=message):
            tile_grid(8, 8, 8, 8, max_tiles)
        with pytest.raises(ValueError, match=message):
            SiQVLProcessor(processor.image_processor, processor.tokenizer, max_tiles=max_tiles)
        if max_tiles is not None:
            with pytest.raises(ValueError, match=message):
                processor(images=Image.new("RGB", (8, 8)), max_tiles=max_tiles)

    def test_refuses_an_empty_picture(self):
        with pytest.raises(ValueError, match="Got a picture of 0 x 8 pixels"):
            tile_grid(0, 8, 8, 8, 4)


class TestProcessor:
    @pytest.mark.parametrize("size", SIZES)
    def test_off_by_default(self, processor, make_image, size):
        image = make_image(size=size)
        expected = processor.image_processor(image, return_tensors="pt")["pixel_values"]
        assert torch.equal(pixels(processor, image), expected)
        assert torch.equal(pixels(processor, image, max_tiles=1), expected)

    @pytest.mark.parametrize("size", SIZES)
    def test_tokens_follow_the_tiles(self, processor, make_image, size):
        inputs = processor(images=make_image(size=size), text=IMAGE, max_tiles=4, return_tensors="pt")
        assert inputs["pixel_values"].shape == (SIZES[size], 3, 32, 32)
        assert (inputs["input_ids"] == processor.image_token_id).sum() == 4 * SIZES[size]

    def test_tiles_are_the_picture_row_by_row_and_then_the_whole(self, processor, make_image):
        parts = [[make_image(3 * row + column) for column in range(3)] for row in range(2)]
        picture = Image.new("RGB", (96, 64))
        for row, column in np.ndindex(2, 3):
            picture.paste(parts[row][column], (32 * column, 32 * row))
        expected = pixels(processor, [part for row in parts for part in row] + [picture])
        assert torch.equal(pixels(processor, picture, max_tiles=6), expected)

    def test_arrays_become_the_same_tiles(self, processor, make_image):
        image = make_image(size=(70, 90))
        expected = pixels(processor, image, max_tiles=6)
        assert len(expected) == 7
        for array in (np.array(image), np.array(image).transpose(2, 0, 1), torch.from_numpy(np.array(image))):
            assert torch.equal(pixels(processor, array, max_tiles=6), expected)

    def test_batch_is_the_singles_one_after_the_other(self, processor, make_image):
        processor.max_tiles = 4
        images = [make_image(seed, size) for seed, size in enumerate(SIZES)]
        text = [IMAGE, IMAGE * 3, "none", f"a{IMAGE}b{IMAGE}", IMAGE * 2]
        inputs = processor(images=images, text=text, padding=True, return_tensors="pt")
        assert torch.equal(inputs["pixel_values"], torch.cat([pixels(processor, image) for image in images]))
        counts = list(SIZES.values())
        expected = [4 * sum(group) for group in (counts[:1], counts[1:4], [], counts[4:6], counts[6:])]
        assert (inputs["input_ids"] == processor.image_token_id).sum(dim=1).tolist() == expected

    @pytest.mark.parametrize("options", [{}, {"max_tiles": 2}, {"max_tiles": 9}, {"size": {"height": 16, "width": 24}}])
    def test_serving_hooks_know_what_a_call_makes(self, processor, make_image, options):
        processor.max_tiles = 4
        images = [make_image(size=size) for size in SIZES]
        counts = processor._get_num_multimodal_tokens([(image.height, image.width) for image in images], **options)
        inputs = processor(
            images=images,
            text=[IMAGE] * len(images),
            return_text_replacement_offsets=True,
            return_tensors=None,
            **options,
        )
        assert counts.num_image_tokens == [row.count(processor.image_token_id) for row in inputs["input_ids"]]
        assert counts.num_image_patches == [len(pixels(processor, image, **options)) for image in images]
        assert sum(counts.num_image_patches) == len(inputs["pixel_values"])
        for count, (entry,) in zip(counts.num_image_tokens, inputs["text_replacement_offsets"], strict=True):
            assert entry["type"] == "image" and entry["replacement"] == processor.image_token * count

    def test_replacements_are_where_the_offsets_say(self, processor, make_image):
        text = f"a{IMAGE}bc{IMAGE}"
        images = [make_image(size=(64, 64)), make_image()]
        inputs = processor(images=images, text=text, max_tiles=4, return_text_replacement_offsets=True)
        expanded = processor.decode(inputs["input_ids"][0])
        (entries,) = inputs["text_replacement_offsets"]
        assert [len(entry["replacement"]) for entry in entries] == [len(processor.image_token) * n for n in (20, 4)]
        for entry in entries:
            assert text[slice(*entry["span"])] == entry["text"] == processor.image_token
            assert expanded[slice(*entry["new_span"])] == entry["replacement"]

    def test_text_for_features_that_are_kept(self, processor, make_image):
        processor.max_tiles = 4
        images, text = [make_image(size=(70, 30)), make_image()], f"{IMAGE}a{IMAGE}"
        ids = processor(images=images, text=text)["input_ids"]
        expanded = processor.expand_image_tokens(text, image_sizes=[(30, 70), (32, 32)])
        assert processor.tokenizer([expanded])["input_ids"] == ids
        with pytest.raises(ValueError, match="Got no image_sizes, but max_tiles is 4"):
            processor.expand_image_tokens(text)
        with pytest.raises(ValueError, match="Got 1 images for texts with 2 placeholders"):
            processor.expand_image_tokens(text, image_sizes=[(30, 70)])

    def test_is_saved(self, processor, tmp_path):
        processor.max_tiles = 6
        processor.save_pretrained(tmp_path)
        assert SiQVLProcessor.from_pretrained(tmp_path, trust_remote_code=True).max_tiles == 6

    def test_from_backbones(self, backbones):
        assert SiQVLProcessor.from_backbones(**backbones, max_tiles=4).max_tiles == 4

    def test_in_a_conversation(self, processor, make_image):
        processor.max_tiles = 4
        content = [{"type": "image", "image": make_image(size=(64, 64))}, {"type": "text", "text": "What?"}]
        messages = [{"role": "user", "content": content}]
        inputs = processor.apply_chat_template(messages, tokenize=True, return_dict=True)
        assert inputs["input_ids"][0].count(processor.image_token_id) == 20 and len(inputs["pixel_values"]) == 5

    def test_truncation_inside_a_tile_is_refused(self, processor, make_image):
        with pytest.raises(ValueError, match="max_length=12 leaves 11 of the 20 image tokens"):
            processor(images=make_image(size=(64, 64)), text=IMAGE, max_tiles=4, truncation=True, max_length=12)

    def test_images_that_are_not_resized_are_not_cut(self, processor, make_image):
        assert pixels(processor, make_image(size=(64, 64)), max_tiles=4, do_resize=False).shape == (1, 3, 64, 64)


class TestModel:
    def batch(self, processor, make_image, **options):
        """Three prompts with pictures of 5 and 1, no, and 3 tiles."""
        images = [make_image(0, (64, 64)), make_image(1), make_image(2, (70, 30))]
        text = [f"{IMAGE}a{IMAGE}b", "none", f"What is{IMAGE}?"]
        options = {"max_tiles": 4, **options}
        return processor(images=images, text=text, padding=True, padding_side="left", return_tensors="pt", **options)

    def embeddings(self, model, processor, batch):
        """Embeddings with the images put in by hand."""
        with torch.no_grad():
            features = model.get_image_features(batch["pixel_values"]).pooler_output
            embeddings = model.get_input_embeddings()(batch["input_ids"])
        embeddings[batch["input_ids"] == processor.image_token_id] = features.flatten(0, 1)
        return embeddings

    # The second size is of 2 x 6 patches, which no square grid could be taken for.
    @pytest.mark.parametrize("options", [{}, {"size": {"height": 16, "width": 48}}], ids=["trained size", "other size"])
    @pytest.mark.parametrize("mode", [{"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}])
    def test_beams(self, make_model, make_image, processor, mode, options):
        mode = {**mode, "max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True, "output_scores": True}
        model, batch = make_model(), self.batch(processor, make_image, **options)
        outputs = model.generate(**batch, **mode)
        embeddings = self.embeddings(model, processor, batch)
        expected = model.generate(inputs_embeds=embeddings, attention_mask=batch["attention_mask"], **mode)
        assert torch.equal(outputs.sequences[:, batch["input_ids"].shape[1] :], expected.sequences)
        torch.testing.assert_close(outputs.sequences_scores, expected.sequences_scores)

    @pytest.mark.parametrize("options", [{}, {"size": {"height": 16, "width": 48}}], ids=["trained size", "other size"])
    def test_copies_see_their_own_tiles(self, make_model, make_image, processor, options):
        model, batch = make_model(), self.batch(processor, make_image, **options)
        n_tiles = len(batch["pixel_values"])
        first = n_tiles - len(pixels(processor, make_image(2, (70, 30)), **{"max_tiles": 4, **options}))
        _, expanded = model._expand_inputs_for_generation(expand_size=2, **batch)
        kept = torch.cat([torch.arange(first)] * 2 + [torch.arange(first, n_tiles)] * 2)
        expected = model.get_image_features(batch["pixel_values"]).pooler_output[kept]
        assert torch.equal(
            model.get_image_features(vision_features=expanded["vision_features"]).pooler_output, expected
        )

    @pytest.mark.parametrize("options", [{}, {"size": {"height": 16, "width": 48}}], ids=["trained size", "other size"])
    def test_cached_equals_uncached_and_singles(self, make_model, make_image, processor, options):
        model, batch = make_model(), self.batch(processor, make_image, **options)
        length = batch["input_ids"].shape[1]
        # Without a cache, a placeholder that the model happens to say would ask for an image.
        mode = {"max_new_tokens": 5, "do_sample": False, "suppress_tokens": [processor.image_token_id]}
        cached = model.generate(**batch, **mode)
        assert torch.equal(cached, model.generate(**batch, **mode, use_cache=False))
        options = {"max_tiles": 4, **options}
        single = processor(images=make_image(2, (70, 30)), text=f"What is{IMAGE}?", return_tensors="pt", **options)
        alone = model.generate(**single, **mode)[:, single["input_ids"].shape[1] :]
        assert torch.equal(cached[2, length : length + alone.shape[1]], alone[0])


class TestOtherSizes:
    SIZE = {"height": 48, "width": 80}

    @pytest.mark.parametrize("size", [SIZE, {"height": 8, "width": 8}, {"height": 40, "width": 16}, 64])
    def test_tokens_follow_the_pixels(self, make_model, make_image, processor, size):
        inputs = processor(images=[make_image(1), make_image(2)], text=IMAGE * 2, size=size, return_tensors="pt")
        rows, columns = (side // 8 for side in inputs["pixel_values"].shape[2:])
        n_tokens = -(-rows // 2) * -(-columns // 2)
        assert (inputs["input_ids"] == processor.image_token_id).sum() == 2 * n_tokens
        outputs = make_model()(**inputs)
        assert outputs.image_hidden_states.shape == (2, n_tokens, 24)

    def test_an_image_processor_of_another_size(self, make_model, make_image, processor):
        processor.image_processor.size = dict(self.SIZE)
        assert processor.image_seq_length == 3 * 5
        inputs = processor(images=make_image(), text=IMAGE, return_tensors="pt")
        assert make_model()(**inputs).logits.shape[1] == 15 + 2

    def test_images_that_are_not_resized(self, make_model, make_image, processor):
        inputs = processor(images=make_image(size=(80, 48)), text=IMAGE, do_resize=False, return_tensors="pt")
        assert inputs["pixel_values"].shape == (1, 3, 48, 80)
        assert make_model()(**inputs).logits.shape[1] == 15 + 2

    def test_positions_are_those_of_siglip(self, make_model, make_image, processor, make_config):
        """SigLIP of transformers itself, asked to interpolate, gives the same features."""
        model = make_model()
        tower = SiglipVisionModel(make_config().vision_config).eval()
        weights = model.model.vision_tower.state_dict()
        prefix = "vision_model." if any(name.startswith("vision_model.") for name in tower.state_dict()) else ""
        tower.load_state_dict({prefix + name: weight for name, weight in weights.items()})
        images = pixels(processor, [make_image(1), make_image(2)], size=self.SIZE)
        with torch.no_grad():
            expected = tower(pixel_values=images, interpolate_pos_encoding=True).last_hidden_state
            features = model.get_image_features(images).last_hidden_state
        assert torch.equal(features, expected)
        assert not torch.allclose(features[:, :16], model.get_image_features(images[..., :32, :32]).last_hidden_state)

    def test_vision_features_carry_their_grid(self, make_model, make_image, processor):
        model = make_model()
        inputs = processor(images=make_image(), text=IMAGE, size=self.SIZE, return_tensors="pt")
        expected = model(**inputs).logits
        features = model.get_image_features(inputs.pop("pixel_values")).last_hidden_state
        assert torch.equal(model(**inputs, vision_features=features.unflatten(1, (6, 10))).logits, expected)
        with pytest.raises(ValueError, match="Got 60 patches for each image, but a grid of 4 x 4 has 16"):
            model(**inputs, vision_features=features)

    @pytest.mark.parametrize(
        ("size", "message"),
        [
            ({"height": 30, "width": 32}, "have 30 x 32 pixels, but both sides must be multiples of the patch size, 8"),
            ({"height": 32, "width": 33}, "have 32 x 33 pixels, but both sides must be multiples"),
            ({"height": 0, "width": 32}, "integers of at least 1"),
            ({"height": -8, "width": 32}, "integers of at least 1"),
            ({"height": 32.0, "width": 32}, "(integers of at least 1|of the wrong type: correct it .*'size')"),
            ({"shortest_edge": 32}, 'must be {"height": ..., "width": ...}'),
            (0, "integers of at least 1"),
        ],
    )
    @pytest.mark.parametrize("max_tiles", [1, 4])
    def test_refuses(self, processor, make_image, size, message, max_tiles):
        with pytest.raises(ValueError, match=message):
            processor(images=make_image(), text=IMAGE, size=size, max_tiles=max_tiles)

    def test_refuses_images_of_several_sizes(self, processor, make_image):
        images = [make_image(), make_image(size=(40, 32))]
        with pytest.raises(ValueError, match="must all be .3, height, width. of one size"):
            processor(images=images, text=IMAGE * 2, do_resize=False)

    @pytest.mark.parametrize("shape", [(1, 3, 36, 32), (1, 3, 0, 32), (1, 1, 32, 32), (3, 32, 32)])
    def test_the_model_refuses(self, make_model, shape):
        with pytest.raises(ValueError, match="multiples of the patch size, 8: prepare images with the processor"):
            make_model().get_image_features(torch.zeros(shape))


class TestWhatTilesKeep:
    """With the checkpoint of this repo, which reads drawn pictures of 96 x 96 pixels."""

    @pytest.fixture(scope="class")
    def shipped(self) -> tuple[SiQVLForConditionalGeneration, SiQVLProcessor]:
        return load_checkpoint(str(REPO_ROOT))

    def test_a_small_text_in_a_corner(self, shipped):
        """Two large pictures that differ in a word alone: the word is there in a tile, and lost in the plain resize."""
        _, processor = shipped
        large, words = [], []
        for text in ("EXIT", "STOP"):
            word, pen = canvas((250, 250, 250))
            write(pen, 60, 80, text)
            words.append(word)
            large.append(Image.new("RGB", (768, 768), (250, 250, 250)))
            large[-1].paste(word, (672, 672))
        tiles = pixels(processor, large, max_tiles=64).unflatten(0, (2, 65))
        assert torch.equal(
            tiles[:, 63], pixels(processor, words)
        )  # the corner, exactly as if it were the whole picture
        resized = pixels(processor, large)
        assert torch.equal(tiles[:, 64], resized)  # the thumbnail is the plain resize
        difference = (tiles[0] - tiles[1]).abs().amax(dim=(1, 2, 3))
        assert (difference[:63] == 0).all()
        assert difference[63] > 1.5  # black for white, in a range from -1 to 1
        assert difference[64] < difference[63] / 5

    def test_a_figure_in_a_quarter(self, shipped):
        """The tower sees the figure as if it were alone, so the model reads it there; in the plain resize it cannot."""
        model, processor = shipped
        items = [item for item in held_out_items(30) if item.group == "held out"]
        large = [in_a_quarter(item.image, index % 4) for index, item in enumerate(items)]
        tiles = pixels(processor, large, max_tiles=4).unflatten(0, (len(items), 5))
        quarter, thumbnail = tiles[torch.arange(len(items)), torch.arange(len(items)) % 4], tiles[:, 4]
        assert torch.equal(quarter, pixels(processor, [item.image for item in items]))
        assert torch.equal(thumbnail, pixels(processor, large))

        prompts = [
            processor.apply_chat_template(user_turn(item.question, 1), add_generation_prompt=True) for item in items
        ]
        options = {"padding": True, "padding_side": "left", "return_tensors": "pt"}
        inputs = processor(images=large, text=prompts, **options)
        length = inputs["input_ids"].shape[1]
        correct = []
        for images in (quarter, thumbnail):
            outputs = model.generate(**{**inputs, "pixel_values": images}, max_new_tokens=128, do_sample=False)
            texts = processor.post_process_image_text_to_text(outputs[:, length:])
            correct.append(sum(judge(item, text).correct for item, text in zip(items, texts, strict=True)))
        assert correct[0] > 2 * correct[1] and correct[0] >= len(items) / 3
