"""Generation beyond the basics of test_modeling.py: other ways to decode, and what they cost."""

import inspect

import pytest
import torch
from test_modeling import IMAGE, V4, prompts

IMAGES = (2, 0, 1)


def generate(model, inputs, **kwargs):
    """New tokens alone, of shape `(batch_size, new_tokens)`."""
    kwargs = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, **kwargs}
    return model.generate(**inputs, **kwargs)[:, inputs["input_ids"].shape[1] :]


@pytest.fixture
def encoded():
    """Counts the images that a model's vision tower encodes."""

    def count(model) -> list[int]:
        counts = []
        model.model.vision_tower.register_forward_pre_hook(
            lambda module, args, kwargs: counts.append(kwargs["pixel_values"].shape[0]), with_kwargs=True
        )
        return counts

    return count


MODES = {
    "greedy": {},
    "sampling": {"do_sample": True},
    "several": {"do_sample": True, "num_return_sequences": 3},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "sampled beams": {"num_beams": 2, "do_sample": True},
    "static cache": {"cache_implementation": "static"},
}


class TestEveryMode:
    @pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
    def test_encodes_each_image_once(self, make_model, make_image, processor, encoded, mode):
        model, inputs = make_model(), prompts(processor, make_image, *IMAGES)
        counts = encoded(model)
        outputs = generate(model, inputs, **mode)
        assert outputs.shape == (len(IMAGES) * mode.get("num_return_sequences", 1), 6)
        assert counts == [sum(IMAGES)]

    @pytest.mark.parametrize("mode", [{"num_beams": 3, "num_return_sequences": 3}, {"num_beams": 2}])
    def test_beams_with_and_without_cache(self, make_model, make_image, processor, mode):
        model, inputs = make_model(), prompts(processor, make_image, *IMAGES)
        assert torch.equal(generate(model, inputs, **mode), generate(model, inputs, **mode, use_cache=False))

    @pytest.mark.parametrize("mode", [{"num_beams": 3}, {"cache_implementation": "static"}])
    def test_left_padded_batch_equals_singles(self, make_model, make_image, processor, mode):
        model, inputs = make_model(), prompts(processor, make_image, *IMAGES)
        together = generate(model, inputs, **mode)
        for row, images in enumerate(inputs["pixel_values"].split(IMAGES)):
            single = {"input_ids": inputs["input_ids"][row, inputs["attention_mask"][row].bool()][None]}
            if len(images):
                single["pixel_values"] = images
            assert torch.equal(together[row], generate(model, single, **mode)[0])

    def test_static_cache_equals_dynamic(self, make_model, make_image, processor):
        model, inputs = make_model(), prompts(processor, make_image, *IMAGES)
        assert torch.equal(generate(model, inputs), generate(model, inputs, cache_implementation="static"))

    def test_each_sampled_copy_equals_a_single(self, make_model, make_image, processor):
        """With the temperature near zero sampling is greedy: each copy must see the images of its own prompt."""
        model, inputs = make_model(), prompts(processor, make_image, *IMAGES)
        copies = generate(model, inputs, do_sample=True, temperature=1e-4, num_return_sequences=2)
        assert torch.equal(copies, generate(model, inputs).repeat_interleave(2, dim=0))

    @pytest.mark.parametrize("kept", [1, 3])
    def test_refuses_chunks_that_cut_an_image(self, make_model, make_image, processor, kept):
        inputs = processor(images=[make_image()], text=f"What{IMAGE}?", return_tensors="pt")
        before = inputs["input_ids"][0].tolist().index(processor.image_token_id)
        with pytest.raises(ValueError, match="prefill_chunk_size"):
            generate(make_model(), inputs, prefill_chunk_size=before + kept)

    def test_stops_at_the_end_of_a_turn(self, make_model, make_image, processor):
        model, inputs = make_model(), prompts(processor, make_image, 1, 2)
        free = generate(model, inputs)
        stopped = generate(model, inputs, min_new_tokens=0, eos_token_id=int(free[0, 2]))
        assert torch.equal(stopped[0, :3], free[0, :3])
        assert (stopped[0, 3:] == model.generation_config.pad_token_id).all()

    @pytest.mark.parametrize("mode", [{}, {"do_sample": True, "top_k": 1}, {"num_beams": 2}])
    def test_writes_no_placeholder(self, make_model, make_image, processor, mode):
        """Even a model that would like to: its answer could not be read in a second turn."""
        model, inputs = make_model(), prompts(processor, make_image, 1, 0)

        def prefer_placeholders(module, args, logits):
            logits[..., processor.image_token_id] += 1e4
            return logits

        model.lm_head.register_forward_hook(prefer_placeholders)
        assert (model(**inputs).logits.argmax(-1) == processor.image_token_id).all()
        assert not (generate(model, inputs, **mode) == processor.image_token_id).any()


class TestSpeculation:
    @pytest.mark.parametrize("images", [0, 2])
    def test_prompt_lookup(self, make_model, make_image, processor, encoded, images):
        model, inputs = make_model(), prompts(processor, make_image, images)
        end = {"max_new_tokens": 12, "eos_token_id": processor.tokenizer.eos_token_id}
        expected = generate(model, inputs, **end)
        counts = encoded(model)
        assert torch.equal(generate(model, inputs, **end, prompt_lookup_num_tokens=4), expected)
        assert counts == ([images] if images else [])

    def test_prompt_lookup_that_finds_placeholders(self, make_model, make_image, processor):
        """What followed the prompt's last token the first time was an image."""
        model = make_model()
        prompt = processor(images=[make_image()], text=f"{IMAGE}What<|vision_start|>", return_tensors="pt")
        end = {"eos_token_id": processor.tokenizer.eos_token_id}
        expected = generate(model, prompt, **end)
        outputs = generate(model, prompt, **end, prompt_lookup_num_tokens=3, max_matching_ngram_size=1)
        assert torch.equal(outputs, expected)

    @pytest.mark.parametrize("seed", [0, 1])
    def test_assisted(self, make_model, make_image, processor, encoded, seed):
        """The assistant, of equal or of other weights, sees the same image; the answer is the model's own."""
        model, inputs = make_model(), prompts(processor, make_image, 2)
        assistant = make_model(seed=seed)
        expected = generate(model, inputs, max_new_tokens=8)
        counts, assistants = encoded(model), encoded(assistant)
        outputs = generate(model, inputs, max_new_tokens=8, assistant_model=assistant)
        assert torch.equal(outputs, expected)
        assert counts == [2] and set(assistants) == {2}


class TestChat:
    @pytest.mark.parametrize("mode", [{}, {"do_sample": True, "temperature": 1e-4}])
    def test_three_turns_on_one_cache(self, make_model, make_image, processor, encoded, mode):
        """An image in the first and in the third turn, none in the second."""
        from transformers import DynamicCache

        model = make_model()
        cache = DynamicCache() if V4 else DynamicCache(config=model.config)
        counts, sequence, pixels = encoded(model), None, []
        for turn, text in enumerate([f"{IMAGE}What?", "Here?", f"And {IMAGE}{IMAGE}?"]):
            new = [make_image(10 * turn + index) for index in range(text.count("<|image_pad|>"))]
            inputs = processor(images=new or None, text=text, return_tensors="pt")
            if sequence is not None:
                inputs["input_ids"] = torch.cat([sequence, inputs["input_ids"]], dim=1)
            del inputs["attention_mask"]
            if new:
                pixels.append(inputs["pixel_values"])
            expected = generate(model, {**inputs, "pixel_values": torch.cat(pixels)}, max_new_tokens=3, **mode)
            counts.clear()
            answer = generate(model, inputs, past_key_values=cache, max_new_tokens=3, **mode)
            assert torch.equal(answer, expected)
            assert counts == ([len(new)] if new else [])
            sequence = torch.cat([inputs["input_ids"], answer], dim=1)


class TestLogitsToKeep:
    def test_indices(self, make_model, make_image, processor):
        model, inputs = make_model(), prompts(processor, make_image, 1)
        kept = torch.tensor([0, 3, 7])
        with torch.no_grad():
            torch.testing.assert_close(model(**inputs, logits_to_keep=kept).logits, model(**inputs).logits[:, kept])

    def test_generation_asks_for_the_last_alone(self, make_model, make_image, processor):
        model, inputs = make_model(), prompts(processor, make_image, 1, 2)
        lengths = []
        model.lm_head.register_forward_pre_hook(lambda module, args: lengths.append(args[0].shape[1]))
        generate(model, inputs, max_new_tokens=3, min_new_tokens=3)
        assert lengths == [1, 1, 1]


def test_a_step_asks_for_one_signature_at_most(make_model, processor, make_image, monkeypatch):
    """transformers would ask each logits processor, and 5 asks for that of remote code."""
    model = make_model()
    inputs = processor(images=make_image(0), text=f"{IMAGE}What?", return_tensors="pt")
    asked = []
    signature = inspect.signature
    monkeypatch.setattr(inspect, "signature", lambda *args, **kwargs: asked.append(1) or signature(*args, **kwargs))
    counts = []
    for new_tokens in (2, 22):
        del asked[:]
        model.generate(**inputs, max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False)
        counts.append(len(asked))
    assert counts[1] - counts[0] <= 20
