"""
Every way to generate, and every output of it, against transformers' own Idefics3.

This is what transformers' `GenerationTesterMixin` holds its models to, written out anew, because no package carries that
mixin; and more, because there is a reference here: Idefics3 with the same weights computes the same function. Contrastive
search, DoLa, group beams and constrained beams are code on the Hub on both majors, and no part of transformers.
"""

import copy
import inspect

import pytest
import torch
from test_modeling import V4, prompts
from transformers import DynamicCache, GenerationMixin, Idefics3ForConditionalGeneration, StaticCache
from transformers.cache_utils import Cache, QuantizedLayer
from transformers.generation import CompileConfig

from siq_vl.export.idefics3 import _renamed, idefics3_config
from siq_vl.modeling_siq_vl import SiQVLForConditionalGeneration

NEW = 5
EVERYTHING = {
    "return_dict_in_generate": True,
    "output_scores": True,
    "output_logits": True,
    "output_hidden_states": True,
    "output_attentions": True,
}


def native_twin(model) -> Idefics3ForConditionalGeneration:
    """Idefics3 that computes what the model computes."""
    twin = Idefics3ForConditionalGeneration._from_config(
        idefics3_config(model.config), attn_implementation=model.config._attn_implementation
    )
    twin.load_state_dict({_renamed(name): weight for name, weight in model.state_dict().items()})
    twin.generation_config = copy.deepcopy(model.generation_config)
    return twin.eval()


def own_model(make_model, seed=0, **kwargs) -> SiQVLForConditionalGeneration:
    """A model that Idefics3 can express on transformers 4 too, whose Idefics3 takes wrong positions of the patches."""
    model = make_model(seed=seed, projector_bias=False, **kwargs)
    torch.nn.init.zeros_(model.model.vision_tower.embeddings.position_embedding.weight)
    model.set_attn_implementation("eager")  # the one that can give its attentions
    return model


@pytest.fixture
def pair(make_model):
    """The model and its native twin, each with what it takes for the same prompts."""
    model = own_model(make_model)
    return model, native_twin(model)


@pytest.fixture
def inputs(processor, make_image):
    return prompts(processor, make_image, 2, 1)


def native_inputs(inputs, counts=(2, 1)):
    """Idefics3 takes images sample by sample, and leaves out what is all zeros."""
    inputs = dict(inputs)
    pixels = inputs["pixel_values"]
    padded = pixels.new_zeros(len(counts), max(counts), *pixels.shape[1:])
    for row, images in enumerate(pixels.split(list(counts))):
        padded[row, : len(images)] = images
    return {**inputs, "pixel_values": padded}


def generate(model, inputs, **kwargs):
    torch.manual_seed(0)
    # Idefics3 may write a placeholder, and SiQ-VL never does.
    suppressed = {"suppress_tokens": [model.config.image_token_id]}
    return model.generate(
        **inputs,
        **{"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, **suppressed, **EVERYTHING, **kwargs},
    )


def cache_of(output) -> Cache:
    """transformers 5 calls `cache` what was `past_key_values`."""
    return output["cache"] if "cache" in output else output["past_key_values"]


def assert_same(ours, theirs, mask=None):
    """Equal answers, and scores, states and attentions of the same shapes with the same values."""
    assert type(ours) is type(theirs)
    assert torch.equal(ours.sequences, theirs.sequences)
    # What was not read from the cache is as long as the prompt; positions of padding hold anything.
    for name in ("scores", "logits", "hidden_states", "attentions"):
        first, second = getattr(ours, name, None), getattr(theirs, name, None)
        assert (first is None) == (second is None), name
        assert first is None or shapes(first) == shapes(second), name
    for first, second in zip(ours.scores, theirs.scores, strict=True):
        torch.testing.assert_close(first, second, rtol=1e-3, atol=1e-3)
    for step, (first, second) in enumerate(zip(ours.hidden_states or (), theirs.hidden_states or (), strict=True)):
        for one, other in zip(first, second, strict=True):
            torch.testing.assert_close(one[:, -1], other[:, -1], rtol=1e-3, atol=1e-3, msg=f"step {step}")


def shapes(value):
    return tuple(value.shape) if isinstance(value, torch.Tensor) else [shapes(part) for part in value]


class TestEqualsIdefics3:
    METHODS = {
        "greedy": {},
        "greedy without cache": {"use_cache": False},
        "sampling": {"do_sample": True, "top_k": 10, "top_p": 0.7, "temperature": 0.7},
        "several": {"do_sample": True, "num_return_sequences": 3},
        "beams": {"num_beams": 3, "length_penalty": 2.0, "early_stopping": False},
        "beams without cache": {"num_beams": 2, "use_cache": False},
        "several beams": {"num_beams": 3, "num_return_sequences": 2},
        "sampled beams": {"num_beams": 2, "do_sample": True, "top_k": 10},
        "static cache": {"cache_implementation": "static"},
        "beams on a static cache": {"cache_implementation": "static", "num_beams": 2},
        "processors": {"repetition_penalty": 1.2, "bad_words_ids": [[7, 8], [9]], "no_repeat_ngram_size": 2},
        "guided": {"guidance_scale": 1.5, "use_cache": True, "renormalize_logits": True},
        "all logits": {"logits_to_keep": 0},
        "until an end": {"min_new_tokens": 0, "eos_token_id": list(range(0, 300, 3))},
    }

    @pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
    def test_method(self, pair, inputs, method):
        model, twin = pair
        ours, theirs = generate(model, inputs, **method), generate(twin, native_inputs(inputs), **method)
        assert_same(ours, theirs)
        if method.get("use_cache", True):
            assert cache_of(ours).get_seq_length() == cache_of(theirs).get_seq_length()
            assert type(cache_of(ours)) is type(cache_of(theirs))

    @pytest.mark.parametrize("seed", [0, 1], ids=["itself", "another"])
    @pytest.mark.parametrize("do_sample", [False, True])
    def test_assisted(self, make_model, pair, processor, make_image, seed, do_sample):
        """The assistant's proposals change nothing; they are all taken, or none. Sampling draws otherwise than alone."""
        model, twin = pair
        inputs = prompts(processor, make_image, 1)
        assistant = own_model(make_model, seed=seed)
        assistant.generation_config.num_assistant_tokens = 2
        assistant.generation_config.num_assistant_tokens_schedule = "constant"
        options = {"do_sample": True, "temperature": 0.7} if do_sample else {}
        ours = generate(model, inputs, assistant_model=assistant, **options)
        theirs = generate(twin, native_inputs(inputs, (1,)), assistant_model=native_twin(assistant), **options)
        assert type(ours) is type(theirs) and ours.sequences.shape == theirs.sequences.shape
        if not do_sample:
            alone = generate(model, inputs)
            assert torch.equal(ours.sequences, alone.sequences) and torch.equal(ours.sequences, theirs.sequences)
            for first, second, third in zip(ours.scores, theirs.scores, alone.scores, strict=True):
                torch.testing.assert_close(first, second, rtol=1e-3, atol=1e-3)
                torch.testing.assert_close(first, third, rtol=1e-3, atol=1e-3)

    def test_prompt_lookup(self, pair, processor, make_image):
        model, twin = pair
        inputs = prompts(processor, make_image, 1)
        ours = generate(model, inputs, prompt_lookup_num_tokens=2)
        assert_same(ours, generate(twin, native_inputs(inputs, (1,)), prompt_lookup_num_tokens=2))
        assert torch.equal(ours.sequences, generate(model, inputs).sequences)

    def test_without_a_prompt(self, pair):
        model, twin = pair
        for each in pair:
            each.generation_config.bos_token_id = 50
        assert_same(generate(model, {}), generate(twin, {}))

    @pytest.mark.parametrize("num_beams", [1, 2])
    @pytest.mark.parametrize("use_cache", [True, False])
    def test_from_embeddings(self, pair, inputs, num_beams, use_cache):
        model, twin = pair
        options = {"num_beams": num_beams, "use_cache": use_cache}
        expected = generate(model, inputs, **options)
        prompt = inputs.pop("input_ids")
        embeddings = model.get_input_embeddings()(prompt)
        with_ids = generate(model, {**inputs, "input_ids": prompt, "inputs_embeds": embeddings}, **options)
        alone = generate(model, {**inputs, "inputs_embeds": embeddings}, **options)
        assert torch.equal(with_ids.sequences, expected.sequences)
        assert torch.equal(alone.sequences, expected.sequences[:, prompt.shape[1] :])
        for first, second, third in zip(expected.scores, with_ids.scores, alone.scores, strict=True):
            torch.testing.assert_close(first, second)
            torch.testing.assert_close(first, third)
        theirs = generate(twin, native_inputs({**inputs, "inputs_embeds": embeddings}), **options)
        assert torch.equal(alone.sequences, theirs.sequences)

    def test_other_embeddings_say_something_else(self, pair, inputs):
        model, _ = pair
        text = {"input_ids": inputs["input_ids"][:, -8:], "attention_mask": inputs["attention_mask"][:, -8:]}
        embeddings = model.get_input_embeddings()(text["input_ids"])
        ours = generate(model, {**text, "inputs_embeds": embeddings})
        other = generate(model, {**text, "inputs_embeds": torch.rand_like(embeddings)})
        assert not any(torch.allclose(first, second) for first, second in zip(ours.scores, other.scores, strict=True))


class TestCaches:
    def test_format(self, pair, inputs):
        model, twin = pair
        with torch.no_grad():
            outputs, theirs = model(**inputs, use_cache=True), twin(**native_inputs(inputs), use_cache=True)
        text, caches = model.config.text_config, [cache_of(each) for each in (outputs, theirs)]
        assert all(isinstance(cache, DynamicCache) for cache in caches)
        expected = (
            2,
            text.num_key_value_heads,
            inputs["input_ids"].shape[1],
            text.hidden_size // text.num_attention_heads,
        )
        for ours, native in zip(*(cache.layers for cache in caches), strict=True):
            assert ours.keys.shape == ours.values.shape == native.keys.shape == expected
            torch.testing.assert_close(ours.keys[:, :, -1], native.keys[:, :, -1], rtol=1e-3, atol=1e-3)

    def test_static_cache_has_room_for_embeddings(self, pair, inputs):
        model, _ = pair
        embeddings = model.get_input_embeddings()(inputs.pop("input_ids"))
        output = generate(model, {**inputs, "inputs_embeds": embeddings}, cache_implementation="static")
        cache = cache_of(output)
        assert isinstance(cache, StaticCache) and cache.get_seq_length() == embeddings.shape[1] + NEW - 1
        assert cache.layers[0].keys.shape[2] == embeddings.shape[1] + NEW - 1

    def test_quantized(self, pair, inputs):
        """A cache that holds rounded values is used as it is: none of them is computed anew."""

        class RoundedLayer(QuantizedLayer):
            def _quantize(self, tensor, axis):
                return (tensor * 16).round()

            def _dequantize(self, rounded):
                return rounded / 16

        model, twin = pair
        outputs = []
        for each, given in ((model, inputs), (twin, native_inputs(inputs))):
            cache = Cache(layers=[RoundedLayer(residual_length=2) for _ in range(2)])
            outputs.append(generate(each, given, past_key_values=cache))
        assert_same(*outputs)
        exact = generate(model, inputs)
        assert not torch.equal(outputs[0].scores[-1], exact.scores[-1])

    def test_goes_on_from_a_kept_cache(self, pair, inputs):
        model, twin = pair
        whole, begun = (
            generate(model, inputs, max_new_tokens=6),
            generate(model, inputs, max_new_tokens=3, min_new_tokens=3),
        )
        grown = torch.nn.functional.pad(inputs["attention_mask"], (0, 3), value=1)
        for given in ({}, {"pixel_values": inputs["pixel_values"]}):
            again = {"input_ids": begun.sequences, "attention_mask": grown, **given}
            rest = generate(
                model,
                again,
                past_key_values=cache_of(generate(model, inputs, max_new_tokens=3, min_new_tokens=3)),
                max_new_tokens=3,
                min_new_tokens=3,
            )
            assert torch.equal(rest.sequences, whole.sequences[:, : rest.sequences.shape[1]])
            for first, second in zip(rest.scores, whole.scores[3:], strict=False):
                torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-4)
        native = native_inputs(inputs)
        kept = cache_of(generate(twin, native, max_new_tokens=3, min_new_tokens=3))
        again = {"input_ids": begun.sequences, "attention_mask": grown}
        theirs = generate(twin, again, past_key_values=kept, max_new_tokens=3, min_new_tokens=3)
        assert torch.equal(rest.sequences, theirs.sequences)

    def test_goes_on_from_embeddings(self, pair, inputs):
        """A prompt of embeddings is read into a cache, and ids follow."""
        model, _ = pair
        whole = generate(model, inputs, max_new_tokens=6, min_new_tokens=6)
        prompt = inputs.pop("input_ids")
        embedded = {**inputs, "input_ids": prompt, "inputs_embeds": model.get_input_embeddings()(prompt)}
        begun = generate(model, embedded, max_new_tokens=3, min_new_tokens=3)
        again = {
            "input_ids": begun.sequences,
            "attention_mask": torch.nn.functional.pad(inputs["attention_mask"], (0, 3), value=1),
        }
        rest = generate(model, again, past_key_values=cache_of(begun), max_new_tokens=3, min_new_tokens=3)
        assert torch.equal(rest.sequences, whole.sequences)


class TestForward:
    def test_left_padding(self, pair, inputs):
        model, _ = pair
        padding = 32
        padded = {
            "input_ids": torch.nn.functional.pad(inputs["input_ids"], (padding, 0), value=0),
            "attention_mask": torch.nn.functional.pad(inputs["attention_mask"], (padding, 0), value=0),
            "pixel_values": inputs["pixel_values"],
        }

        def last_logits(given):
            positions = (given["attention_mask"].cumsum(-1) - 1).clamp(min=0)
            return model(**given, position_ids=positions, use_cache=False).logits[:, -1]

        with torch.no_grad():
            torch.testing.assert_close(last_logits(padded), last_logits(inputs), rtol=1e-4, atol=1e-4)

    def test_positions_may_be_given(self, pair, inputs):
        """transformers 5 counts on from them, and transformers 4 repeats the last, for Idefics3 too."""
        model, twin = pair
        positions = (inputs["attention_mask"].cumsum(-1) - 1).masked_fill(inputs["attention_mask"] == 0, 0)
        ours = generate(model, {**inputs, "position_ids": positions})
        assert_same(ours, generate(twin, native_inputs({**inputs, "position_ids": positions})))
        if not V4:
            assert_same(ours, generate(model, inputs))

    def test_four_dimensional_mask(self, pair):
        """Three continuations of one prefix, in one row that hides them from each other."""
        model, _ = pair
        prefix, ends = [50, 51, 52], [60, 61, 62]
        rows = torch.tensor([[*prefix, end] for end in ends])
        shared = torch.tensor([[*prefix, *ends]])
        visible = torch.tensor([[0, 0, 0, 0, 0, 0]] * 6, dtype=torch.bool)
        for index in range(6):
            visible[index, : min(index + 1, 3)] = True
            visible[index, index] = True
        mask = torch.zeros(1, 1, 6, 6).masked_fill(~visible, torch.finfo(torch.float32).min)
        with torch.no_grad():
            expected = model(rows, use_cache=False).logits[:, -1]
            positions = torch.tensor([[0, 1, 2, 3, 3, 3]])
            logits = model(shared, attention_mask=mask, position_ids=positions, use_cache=False).logits[0, -3:]
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)

    def test_logits_to_keep(self, pair, inputs):
        model, twin = pair
        with torch.no_grad():
            whole, last = model(**inputs, logits_to_keep=0).logits, model(**inputs, logits_to_keep=1).logits
            native = twin(**native_inputs(inputs), logits_to_keep=1).logits
        assert last.shape == native.shape == (2, 1, whole.shape[-1])
        torch.testing.assert_close(whole[:, -1:], last)

    def test_states_of_the_tower(self, pair, inputs):
        """On request the images' own hidden states and attentions come too, as those of Idefics3 on transformers 5."""
        model, twin = pair
        with torch.no_grad():
            images = model(**inputs, output_hidden_states=True, output_attentions=True).image_outputs
        assert images.pooler_output.shape == (3, 4, model.config.text_config.hidden_size)
        assert images.last_hidden_state.shape == (3, 16, model.config.vision_config.hidden_size)
        if V4:
            return
        assert len(images.hidden_states) == 3 and len(images.attentions) == 2
        with torch.no_grad():
            native = twin(**native_inputs(inputs), output_hidden_states=True, output_attentions=True).image_outputs
        by_image = torch.cat(list(native.pooler_output)).view_as(images.pooler_output)
        torch.testing.assert_close(by_image, images.pooler_output, rtol=1e-3, atol=1e-3)


class TestImplementations:
    @pytest.mark.parametrize("implementation", ["sdpa", "flex_attention"])
    def test_generates_as_eager_does(self, pair, inputs, implementation):
        model, _ = pair
        options = {"output_attentions": False, "output_hidden_states": False}
        expected = generate(model, inputs, **options)
        model.set_attn_implementation(implementation)
        with torch.compiler.set_stance("force_eager"):  # compiling flex attention takes half a minute
            assert_same(generate(model, inputs, **options), expected)

    def test_compiled_decoding(self, pair, inputs):
        """One graph without breaks decodes all tokens, with every output."""
        model, _ = pair
        expected = generate(model, inputs, cache_implementation="static")
        model.generation_config.compile_config = CompileConfig(backend="eager", fullgraph=True, dynamic=False)
        model.generation_config.compile_config._compile_all_devices = True
        torch.compiler.reset()
        torch._dynamo.utils.counters.clear()
        compiled = generate(model, inputs, cache_implementation="static")
        assert_same(compiled, expected)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1

    @pytest.mark.parametrize("images", [0, 2])
    def test_exports(self, pair, inputs, images):
        """`torch.export` takes the whole forward pass, with and without images."""
        model, _ = pair
        given = dict(inputs) if images else {"input_ids": torch.arange(10, 26).view(2, 8)}
        given.pop("attention_mask", None)
        with torch.no_grad():
            program = torch.export.export(model, (), {**given, "use_cache": False}, strict=False)
            torch.testing.assert_close(
                program.module()(**given, use_cache=False).logits, model(**given, use_cache=False).logits
            )


class TestContract:
    def test_is_a_generation_mixin_itself(self):
        assert GenerationMixin in SiQVLForConditionalGeneration.__bases__

    def test_takes_embeddings(self):
        names = inspect.signature(SiQVLForConditionalGeneration.prepare_inputs_for_generation).parameters
        assert (
            "inputs_embeds" in names
            and "logits_to_keep" in inspect.signature(SiQVLForConditionalGeneration.forward).parameters
        )

    def test_hands_on_what_it_does_not_know(self, pair):
        model, _ = pair
        given = {"output_attentions": True, "custom_arg": "value", "numeric_arg": 42}
        prepared = model.prepare_inputs_for_generation(
            torch.tensor([[1, 2, 3], [4, 5, 6]]),
            cache_position=torch.tensor([9]),
            position_ids=torch.arange(3).expand(2, 3),
            **given,
        )
        assert {name: prepared[name] for name in given} == given and "input_ids" in prepared

    @pytest.mark.parametrize(
        "method",
        [
            {"penalty_alpha": 0.6, "top_k": 4},
            {"dola_layers": "high"},
            {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 1.0},
            {"num_beams": 2, "force_words_ids": [[7]]},
        ],
        ids=["contrastive", "DoLa", "group beams", "constrained beams"],
    )
    def test_what_left_transformers_is_refused_as_by_idefics3(self, pair, inputs, method):
        errors = []
        for model, given in zip(pair, (inputs, native_inputs(inputs)), strict=True):
            with pytest.raises(ValueError) as error:
                generate(model, given, **method)
            errors.append(str(error.value))
        assert errors[0] == errors[1] and "trust_remote_code" in errors[0] or "custom_generate" in errors[0]
