"""The model: against transformers' own classes, and against itself under batching, caching and generation."""

from dataclasses import dataclass

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModel, Idefics3Config, Idefics3ForConditionalGeneration
from transformers.models.idefics3.modeling_idefics3 import Idefics3Connector

from siq_vl import modeling_siq_vl
from siq_vl.configuration_siq_vl import SiQVLConfig, tokens_per_image
from siq_vl.modeling_siq_vl import SiQVLForConditionalGeneration, pixel_shuffle

IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
V4 = transformers.__version__.startswith("4.")
# With a tied output layer accelerate takes no map of the whole model from which one layer is excepted.
OFFLOADED = {
    "model.vision_tower": "cpu",
    "model.projector": "cpu",
    "model.language_model.embed_tokens": "cpu",
    "model.language_model.layers.0": "cpu",
    "model.language_model.layers.1": "disk",
    "model.language_model.norm": "cpu",
    "model.language_model.rotary_emb": "cpu",
    "lm_head": "cpu",
}


def prompts(processor, make_image, *n_images, padding_side="left"):
    """Model inputs for one prompt of its own length for each number of images."""
    images = [[make_image(10 * row + index) for index in range(count)] for row, count in enumerate(n_images)]
    text = [f"{IMAGE * count} What is shown{' here' * row}?" for row, count in enumerate(n_images)]
    flat = [image for group in images for image in group] or None
    return processor(images=flat, text=text, padding=True, padding_side=padding_side, return_tensors="pt")


@pytest.fixture
def count_encoded(monkeypatch):
    """Counts the images that a model's vision tower encodes."""

    def count(model) -> list[int]:
        encoded = []
        model.model.vision_tower.register_forward_pre_hook(
            lambda module, args, kwargs: encoded.append(kwargs["pixel_values"].shape[0]), with_kwargs=True
        )
        return encoded

    return count


@pytest.fixture
def uncompiled():
    """Flex attention without the half a minute that compiling it takes."""
    with torch.compiler.set_stance("force_eager"):
        yield


@dataclass
class StepCost:
    """What a step computes: how often each layer of the tower, and the floating-point operations of its parts."""

    tower_layers: list[int]
    tower_flops: int
    flops: int


def cost_of_a_step(model, inputs) -> StepCost:
    """Counts the forward and backward pass of one step."""
    layers = model.model.vision_tower.encoder.layers
    counts = [0] * len(layers)

    def count(index):
        def hook(module, args):
            counts[index] += 1

        return hook

    # Hooks of a layer itself do not run again on transformers 5, where it is computed again.
    hooks = [layer.mlp.register_forward_pre_hook(count(index)) for index, layer in enumerate(layers)]
    with FlopCounterMode(display=False) as counter:
        model(**inputs, labels=inputs["input_ids"], use_cache=False).loss.backward()
    for hook in hooks:
        hook.remove()
    tower = counter.get_flop_counts()["SiQVLForConditionalGeneration.model.vision_tower"]
    return StepCost(counts, sum(tower.values()), counter.get_total_flops())


def gradients_of(model, inputs) -> dict[str, torch.Tensor]:
    """The gradients of one step, by the parameter's name."""
    model.zero_grad()
    model(**inputs, labels=inputs["input_ids"], use_cache=False).loss.backward()
    return {name: part.grad.clone() for name, part in model.named_parameters() if part.grad is not None}


class TestTokensPerImage:
    @pytest.mark.parametrize(
        ("size", "patch", "factor", "expected"),
        [(512, 16, 2, 256), (384, 14, 2, 196), (96, 12, 2, 16), (96, 12, 3, 9), (32, 8, 1, 16)],
    )
    def test_known_sizes(self, size, patch, factor, expected):
        assert tokens_per_image(size, size, patch, factor) == expected

    def test_rectangle(self):
        assert tokens_per_image(48, 80, 16, 2) == 2 * 3

    @pytest.mark.parametrize(("size", "patch", "factor"), [(8, 16, 2), (32, 0, 2)])
    def test_refuses_an_image_smaller_than_a_patch(self, size, patch, factor):
        with pytest.raises(ValueError, match=f"patch_size is {patch} for an image of {size} x {size}"):
            tokens_per_image(size, size, patch, factor)

    def test_refuses_a_factor_of_zero(self):
        with pytest.raises(ValueError, match="pixel_shuffle_factor is 0, but must be at least 1"):
            tokens_per_image(32, 32, 8, 0)

    @pytest.mark.parametrize(("image_size", "factor"), [(32, 2), (24, 2), (40, 3), (32, 1)])
    def test_config_processor_and_model_agree(self, make_model, processor, make_image, image_size, factor):
        model = make_model(vision={"image_size": image_size}, pixel_shuffle_factor=factor)
        processor.image_processor.size = {"height": image_size, "width": image_size}
        processor.pixel_shuffle_factor = factor
        inputs = prompts(processor, make_image, 1)
        n_placeholders = int((inputs["input_ids"] == model.config.image_token_id).sum())
        features = model.get_image_features(inputs["pixel_values"]).pooler_output
        assert model.config.image_seq_length == processor.image_seq_length == n_placeholders == features.shape[1]


class TestPixelShuffle:
    @pytest.mark.parametrize("factor", [1, 2, 4])
    def test_equals_idefics3(self, factor):
        features = torch.randn(2, 64, 6)
        reference = Idefics3Connector.pixel_shuffle(None, features, factor)
        torch.testing.assert_close(pixel_shuffle(features, 8, 8, factor), reference, rtol=0, atol=0)

    def test_channel_order_is_dy_dx_c(self):
        features = torch.arange(2 * 4 * 3).reshape(1, 8, 3)  # 2 x 4 patches of 3 channels
        first = pixel_shuffle(features, 2, 4, 2)[0, 0]
        assert first.tolist() == torch.cat([features[0, 0], features[0, 1], features[0, 4], features[0, 5]]).tolist()

    def test_pads_an_odd_grid(self):
        shuffled = pixel_shuffle(torch.ones(1, 9, 2), 3, 3, 2)
        assert shuffled.shape == (1, 4, 8)
        assert shuffled.sum(dim=-1).tolist() == [[8, 4, 4, 2]]

    def test_refuses_a_wrong_grid(self):
        with pytest.raises(ValueError, match="Got 9 patches for each image, but a grid of 4 x 4 has 16"):
            pixel_shuffle(torch.ones(1, 9, 2), 4, 4, 2)


class TestConfig:
    def test_defaults_are_the_papers(self):
        config = SiQVLConfig()
        assert config.image_seq_length == 256
        assert config.vision_config.vision_use_head is False
        text = config.to_diff_dict()["text_config"]
        assert text["rope_theta"] == text["rope_parameters"]["rope_theta"] == 1000000.0
        assert config.tie_word_embeddings is True

    def test_paper_sizes(self):
        with torch.device("meta"):
            model = SiQVLForConditionalGeneration(SiQVLConfig())
        sizes = {name: sum(p.numel() for p in module.parameters()) for name, module in model.model.named_children()}
        assert sizes == {"vision_tower": 304_147_456, "projector": 3_670_912, "language_model": 494_032_768}
        assert model.lm_head.weight.shape == (151936, 896)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"projector_type": "perceiver"}, "projector_type is 'perceiver', but must be one of"),
            ({"pixel_shuffle_factor": 0}, "pixel_shuffle_factor is 0, but must be at least 1"),
            ({"pixel_shuffle_factor": 1.5}, "pixel_shuffle_factor is 1.5, but must be an integer"),
            ({"projector_bias": None}, "projector_bias is None, but must be a boolean"),
            ({"image_token_id": 999_999}, "image_token_id is 999999, but must be an integer from 0 to"),
            ({"image_token_id": 3, "vision_start_token_id": 3}, "these must differ"),
            ({"vision": {"model_type": "clip_vision_model"}}, "vision_config.model_type is 'clip_vision_model'"),
            ({"vision": {"patch_size": 64}}, "patch_size is 64 for an image of 32 x 32"),
        ],
    )
    def test_refuses(self, make_config, change, message):
        with pytest.raises(ValueError, match=message):
            make_config(**change)

    def test_refuses_a_sub_config_of_another_kind(self):
        with pytest.raises(ValueError, match="text_config is a str, but must be a configuration, a dict or None"):
            SiQVLConfig(text_config="Qwen/Qwen2.5-0.5B-Instruct")

    @pytest.mark.parametrize("tied", [True, False])
    def test_tying_follows_the_text_config(self, make_config, tied):
        config = make_config(text={"tie_word_embeddings": tied})
        model = SiQVLForConditionalGeneration(config)
        assert config.tie_word_embeddings is tied
        assert (model.lm_head.weight is model.get_input_embeddings().weight) is tied

    def test_tying_can_be_changed_on_the_whole_config(self, make_config, tmp_path):
        config = make_config()
        config.tie_word_embeddings = False
        model = SiQVLForConditionalGeneration(config)
        model.save_pretrained(tmp_path)
        loaded = SiQVLForConditionalGeneration.from_pretrained(tmp_path)
        assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)
        assert loaded.lm_head.weight is not loaded.get_input_embeddings().weight

    def test_does_not_share_sub_configs_with_the_caller(self, make_config):
        vision_config = make_config().vision_config
        vision_config.vision_use_head = True
        assert SiQVLConfig(vision_config=vision_config).vision_config.vision_use_head is False
        assert vision_config.vision_use_head is True

    @pytest.mark.parametrize("saved_by", [4, 5])
    @pytest.mark.parametrize("scaling", [{}, {"rope_type": "linear", "factor": 2.0}])
    def test_rope_settings_survive_a_change_of_major(self, make_config, saved_by, scaling):
        names = {4: {"rope_theta": 5e5, "rope_scaling": scaling or None}}
        names[5] = {"rope_parameters": {"rope_type": "default", **scaling, "rope_theta": 5e5}}
        fields = make_config().to_dict()
        for name in ("rope_theta", "rope_scaling", "rope_parameters"):
            fields["text_config"].pop(name, None)
        fields["text_config"].update(names[saved_by])
        config = SiQVLConfig.from_dict(SiQVLConfig.from_dict(fields).to_diff_dict())
        saved = config.to_diff_dict()["text_config"]
        assert saved["rope_theta"] == saved["rope_parameters"]["rope_theta"] == 5e5
        assert (
            (saved["rope_scaling"] or {}).get("factor")
            == saved["rope_parameters"].get("factor")
            == scaling.get("factor")
        )
        rotary = SiQVLForConditionalGeneration(config).model.language_model.rotary_emb
        expected = 5e5 ** -(torch.arange(0, 6, 2) / 6) / scaling.get("factor", 1.0)
        torch.testing.assert_close(rotary.inv_freq, expected)


class TestForward:
    @pytest.mark.skipif(V4, reason="Idefics3 of transformers 4 computes wrong vision positions in fp32")
    def test_equals_idefics3(self, make_model, make_image, processor):
        model = make_model(projector_bias=False)
        config = Idefics3Config(
            vision_config={**model.config.vision_config.to_dict(), "model_type": "idefics3_vision"},
            text_config=model.config.text_config.to_dict(),
            scale_factor=2,
            image_token_id=model.config.image_token_id,
            tie_word_embeddings=True,
        )
        reference = Idefics3ForConditionalGeneration(config).eval()
        names = {
            "vision_tower": "vision_model",
            "language_model": "text_model",
            "projector.linear": "connector.modality_projection.proj",
        }
        weights = {}
        for name, weight in model.state_dict().items():
            for ours, theirs in names.items():
                name = name.replace(f"model.{ours}.", f"model.{theirs}.")
            weights[name] = weight
        reference.load_state_dict(weights)
        inputs = prompts(processor, make_image, 1, 1)
        pixel_values = inputs.pop("pixel_values")
        with torch.no_grad():
            ours = model(**inputs, pixel_values=pixel_values).logits
            theirs = reference(**inputs, pixel_values=pixel_values[:, None]).logits
        visible = inputs["attention_mask"].bool()
        torch.testing.assert_close(ours[visible], theirs[visible], rtol=1e-5, atol=1e-5)

    def test_mlp_projector_is_a_residual_around_the_first_layer(self, make_model):
        projector = make_model(projector_type="mlp").model.projector
        features = torch.randn(2, 16, 16)
        hidden = projector.linear(pixel_shuffle(features, 4, 4, 2))
        expected = hidden + projector.residual[1](torch.nn.functional.gelu(hidden))
        torch.testing.assert_close(projector(features, 4, 4), expected)

    def test_projector_takes_the_type_of_its_weights(self, make_model):
        projector = make_model().model.projector.to(torch.bfloat16)
        assert projector(torch.randn(1, 16, 16), 4, 4).dtype == torch.bfloat16

    @pytest.mark.parametrize("padding_side", ["left", "right"])
    def test_padded_batch_equals_singles(self, make_model, make_image, processor, padding_side):
        model = make_model()
        batch = prompts(processor, make_image, 0, 1, 2, padding_side=padding_side)
        position_ids = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        with torch.no_grad():
            logits = model(**batch, position_ids=position_ids).logits
            for row, images in enumerate(batch["pixel_values"].split([0, 1, 2])):
                visible = batch["attention_mask"][row].bool()
                single = {"input_ids": batch["input_ids"][row, visible][None]}
                if len(images):
                    single["pixel_values"] = images
                torch.testing.assert_close(logits[row, visible], model(**single).logits[0], rtol=1e-4, atol=1e-5)

    def test_images_matter(self, make_model, make_image, processor):
        model, inputs = make_model(), prompts(processor, make_image, 1)
        with torch.no_grad():
            one = model(**inputs).logits
            other = model(**{**inputs, "pixel_values": -inputs["pixel_values"]}).logits
        assert (one - other).abs().max() > 1e-3

    def test_vision_features_equal_pixel_values(self, make_model, make_image, processor, count_encoded):
        model, inputs = make_model(), prompts(processor, make_image, 2, 1)
        with torch.no_grad():
            features = model.get_image_features(inputs["pixel_values"]).last_hidden_state
            expected = model(**inputs)
            encoded = count_encoded(model)
            del inputs["pixel_values"]
            outputs = model(**inputs, vision_features=features)
        assert features.shape == (3, 16, 16)
        assert torch.equal(outputs.logits, expected.logits)
        assert encoded == []

    def test_image_features_contract(self, make_model, make_image, processor):
        outputs = make_model().get_image_features(prompts(processor, make_image, 2)["pixel_values"])
        assert outputs.last_hidden_state.shape == (2, 16, 16)
        assert outputs.pooler_output.shape == (2, 4, 24)

    def test_embeddings_in_place_of_ids(self, make_model, make_image, processor):
        model, inputs = make_model(), prompts(processor, make_image, 1, 2)
        with torch.no_grad():
            expected = model(**inputs).logits
            input_ids = inputs.pop("input_ids")
            logits = model(**inputs, inputs_embeds=model.get_input_embeddings()(input_ids)).logits
        assert torch.equal(logits, expected)

    def test_logits_to_keep(self, make_model, make_image, processor):
        model, inputs = make_model(), prompts(processor, make_image, 1)
        with torch.no_grad():
            torch.testing.assert_close(model(**inputs, logits_to_keep=2).logits, model(**inputs).logits[:, -2:])

    def test_loss_is_shifted_cross_entropy_over_labels(self, make_model, make_image, processor):
        model, inputs = make_model(), prompts(processor, make_image, 1, 0)
        labels = inputs["input_ids"].clone()
        labels[:, :-4] = -100
        with torch.no_grad():
            outputs = model(**inputs, labels=labels)
            summed = model(**inputs, labels=labels, num_items_in_batch=2).loss
        expected = torch.nn.functional.cross_entropy(outputs.logits[:, -5:-1].flatten(0, 1), labels[:, -4:].flatten())
        torch.testing.assert_close(outputs.loss, expected)
        torch.testing.assert_close(summed, expected * 8 / 2)

    def test_tuple_output(self, make_model, make_image, processor):
        model, inputs = make_model(), prompts(processor, make_image, 1)
        with torch.no_grad():
            outputs = model(**inputs, return_dict=False, use_cache=False)
        assert isinstance(outputs, tuple) and torch.equal(outputs[0], model(**inputs).logits)

    @pytest.mark.parametrize("implementation", ["sdpa", "eager", "flex_attention"])
    def test_attention_implementations_agree(self, make_model, make_image, processor, uncompiled, implementation):
        model, inputs = make_model(), prompts(processor, make_image, 1)
        with torch.no_grad():
            expected = model(**inputs).logits
            model.set_attn_implementation(implementation)
            torch.testing.assert_close(model(**inputs).logits, expected, rtol=1e-4, atol=1e-5)
        tower_attention = model.model.vision_tower.encoder.layers[0].self_attn
        assert tower_attention.config._attn_implementation == implementation

    @pytest.mark.gpu
    def test_flash_attention(self, make_model, make_image, processor):
        pytest.importorskip("flash_attn")
        model, inputs = make_model().to("cuda", torch.bfloat16), prompts(processor, make_image, 1).to("cuda")
        with torch.no_grad():
            expected = model(**inputs).logits
            model.set_attn_implementation("flash_attention_2")
            torch.testing.assert_close(model(**inputs).logits, expected, rtol=5e-2, atol=5e-2)

    @pytest.mark.parametrize("images", [0, 1])
    def test_compiles_without_graph_breaks(self, make_model, make_image, processor, images):
        model, inputs = make_model(), prompts(processor, make_image, images)
        torch.compiler.reset()
        with torch.no_grad():
            logits = torch.compile(model, backend="eager", fullgraph=True)(**inputs).logits
            torch.testing.assert_close(logits, model(**inputs).logits)

    def test_compiled_model_still_counts_placeholders(self, make_model, make_image, processor):
        model, inputs = make_model(), prompts(processor, make_image, 2)
        inputs["pixel_values"] = inputs["pixel_values"][:1]
        torch.compiler.reset()
        with pytest.raises(RuntimeError, match="Image features and image tokens do not match"), torch.no_grad():
            torch.compile(model, backend="eager", fullgraph=True)(**inputs)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision(self, make_model, make_image, processor, dtype):
        """Pixels stay in float32, as the processor makes them; outputs are as far off as the rounding."""
        model, inputs = make_model(), prompts(processor, make_image, 1, 0)
        with torch.no_grad():
            expected = model(**inputs).logits
            logits = model.to(dtype)(**inputs).logits
        assert logits.dtype == dtype
        error = (logits.float() - expected)[inputs["attention_mask"].bool()].norm() / expected.norm()
        assert error < 8 * torch.finfo(dtype).eps

    @pytest.mark.parametrize("device_map", ["cpu", {"": "cpu"}, OFFLOADED])
    def test_device_map(self, make_model, make_image, processor, tmp_path, device_map):
        model, inputs = make_model(), prompts(processor, make_image, 1, 2)
        model.save_pretrained(tmp_path)
        loaded = SiQVLForConditionalGeneration.from_pretrained(
            tmp_path, device_map=device_map, offload_folder=tmp_path / "offload"
        )
        with torch.no_grad():
            torch.testing.assert_close(loaded(**inputs).logits, model(**inputs).logits)
        weight = loaded.model.language_model.layers[1].mlp.up_proj.weight
        assert (weight.device.type == "meta") is (device_map is OFFLOADED)

    def test_filled_after_meta_init(self, make_model, make_image, processor):
        model, inputs = make_model(), prompts(processor, make_image, 1)
        with torch.device("meta"):
            empty = SiQVLForConditionalGeneration(model.config)
        empty.load_state_dict(model.state_dict(), assign=True)
        buffers = dict(model.named_buffers())
        for name, _ in list(empty.named_buffers()):  # neither major keeps these in a checkpoint
            parent, _, leaf = name.rpartition(".")
            setattr(empty.get_submodule(parent), leaf, buffers[name])
        with torch.no_grad():
            assert torch.equal(empty(**inputs).logits, model(**inputs).logits)


class TestForwardRefuses:
    def test_too_few_images(self, make_model, make_image, processor):
        inputs = prompts(processor, make_image, 2)
        inputs["pixel_values"] = inputs["pixel_values"][:1]
        with pytest.raises(ValueError, match="Image features and image tokens do not match: tokens: 8, features 4"):
            make_model()(**inputs)

    @pytest.mark.parametrize("use", ["generate", "train"])
    def test_placeholders_without_images(self, make_model, make_image, processor, use):
        model, inputs = make_model(), prompts(processor, make_image, 1)
        del inputs["pixel_values"]
        call = model.generate if use == "generate" else model.train()
        with pytest.raises(ValueError, match="Image features and image tokens do not match: tokens: 4, features 0"):
            call(**inputs)

    def test_only_warns_of_placeholders_without_images_in_a_forward_pass(
        self, make_model, make_image, processor, monkeypatch
    ):
        """As transformers' own models read such text without complaint, and its tests run it."""
        warnings = []
        monkeypatch.setattr(modeling_siq_vl.logger, "warning_once", warnings.append)
        inputs = prompts(processor, make_image, 1)
        del inputs["pixel_values"]
        make_model()(**inputs)
        assert len(warnings) == 1 and "tokens: 4, features 0. No images were given" in warnings[0]

    def test_both_kinds_of_images(self, make_model, make_image, processor):
        inputs = prompts(processor, make_image, 1)
        with pytest.raises(ValueError, match="both or neither of pixel_values and vision_features"):
            make_model()(**inputs, vision_features=torch.zeros(1, 16, 16))

    def test_both_ids_and_embeddings(self, make_model):
        with pytest.raises(ValueError, match="both or neither of input_ids and inputs_embeds"):
            make_model()(input_ids=torch.tensor([[7]]), inputs_embeds=torch.zeros(1, 1, 24))

    def test_pixels_of_another_size(self, make_model, processor, make_image):
        inputs = prompts(processor, make_image, 1)
        inputs["pixel_values"] = inputs["pixel_values"][..., :15]
        with pytest.raises(ValueError, match=r"must be \(n_images, 3, 32, 32\), or .* multiples of the patch size, 8"):
            make_model()(**inputs)


class TestTraining:
    def test_batch_without_images_reaches_the_projector(self, make_model, processor, make_image):
        model = make_model().train().requires_grad_(False)
        model.model.projector.requires_grad_(True)
        inputs = prompts(processor, make_image, 0)
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        assert all(torch.all(parameter.grad == 0) for parameter in model.model.projector.parameters())

    def test_batch_without_images_reaches_a_trainable_tower(self, make_model, processor, make_image):
        model, inputs = make_model().train(), prompts(processor, make_image, 0)
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []

    def test_batch_without_images_has_the_same_loss(self, make_model, processor, make_image):
        model, inputs = make_model(), prompts(processor, make_image, 0)
        expected = model(**inputs, labels=inputs["input_ids"]).loss
        assert torch.equal(model.train()(**inputs, labels=inputs["input_ids"]).loss, expected)

    @pytest.mark.parametrize("reentrant", [True, False])
    def test_gradient_checkpointing_changes_nothing(self, make_model, processor, make_image, reentrant):
        model, inputs = make_model().train(), prompts(processor, make_image, 1, 2)
        gradients = []
        for checkpointing in (False, True):
            if checkpointing:
                model.gradient_checkpointing_enable({"use_reentrant": reentrant})
                model.enable_input_require_grads()
            model.zero_grad()
            model(**inputs, labels=inputs["input_ids"], use_cache=False).loss.backward()
            gradients.append(
                {
                    name: parameter.grad.clone()
                    for name, parameter in model.named_parameters()
                    if parameter.grad is not None
                }
            )
        assert (
            model.model.vision_tower.encoder.gradient_checkpointing
            and model.model.language_model.gradient_checkpointing
        )
        for name in ("model.projector.linear.weight", "model.language_model.layers.0.mlp.up_proj.weight"):
            torch.testing.assert_close(gradients[0][name], gradients[1][name])

    @pytest.mark.parametrize("reentrant", [True, False])
    def test_checkpointing_spares_a_frozen_tower(self, make_model, processor, make_image, reentrant):
        model, inputs = make_model(vision={"num_hidden_layers": 4}).train(), prompts(processor, make_image, 1, 2)
        model.requires_grad_(False)
        model.model.projector.requires_grad_(True)
        plain = cost_of_a_step(model, inputs)
        with FlopCounterMode(display=False) as language_model, torch.no_grad():
            model.model(input_ids=torch.ones_like(inputs["input_ids"]), use_cache=False)
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()  # as TRL does with PEFT, and transformers 5 always
        checkpointed = cost_of_a_step(model, inputs)
        assert checkpointed.tower_layers == plain.tower_layers == [1, 1, 1, 1]
        assert checkpointed.tower_flops == plain.tower_flops
        # The language model alone is computed once more.
        assert plain.flops < checkpointed.flops <= plain.flops + language_model.get_total_flops()

    @pytest.mark.parametrize("reentrant", [True, False])
    def test_checkpointing_computes_the_trained_layers_of_a_tower_alone_again(
        self, make_model, processor, make_image, reentrant
    ):
        model, inputs = make_model(vision={"num_hidden_layers": 4}).train(), prompts(processor, make_image, 1)
        model.requires_grad_(False)
        model.model.projector.requires_grad_(True)
        model.model.vision_tower.encoder.layers[2:].requires_grad_(True)
        plain = gradients_of(model, inputs)
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        checkpointed = gradients_of(model, inputs)
        assert checkpointed.keys() == plain.keys()
        assert {"model.vision_tower.encoder.layers.2.mlp.fc1.weight", "model.projector.linear.weight"} < plain.keys()
        for name, gradient in plain.items():
            torch.testing.assert_close(checkpointed[name], gradient)
        assert cost_of_a_step(model, inputs).tower_layers == [1, 1, 2, 2]

    @pytest.mark.parametrize("reentrant", [True, False])
    @pytest.mark.parametrize("enabled_first", [True, False])
    def test_checkpointing_trains_what_peft_puts_into_the_tower(
        self, make_model, processor, make_image, reentrant, enabled_first
    ):
        gradients = []
        for checkpointing in (False, True):
            model, inputs = make_model(vision={"num_hidden_layers": 3}).train(), prompts(processor, make_image, 2)
            if checkpointing and enabled_first:
                model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            torch.manual_seed(0)
            targets = r".*\.(language_model|vision_tower)\..*\.(q_proj|v_proj)"
            wrapped = get_peft_model(
                model,
                LoraConfig(
                    r=2,
                    target_modules=targets,
                    modules_to_save=["projector", "vision_tower.encoder.layers.1"],
                    init_lora_weights=False,
                ),
            ).train()
            if checkpointing and not enabled_first:
                model.gradient_checkpointing_enable({"use_reentrant": reentrant})
                model.enable_input_require_grads()
            gradients.append(gradients_of(wrapped, inputs))
        plain, checkpointed = gradients
        assert checkpointed.keys() == plain.keys()
        for part in ("layers.0.self_attn.q_proj.lora_A", "layers.1.modules_to_save.default.mlp.fc1.weight"):
            assert any(f"vision_tower.encoder.{part}" in name for name in plain)
        for name, gradient in plain.items():
            torch.testing.assert_close(checkpointed[name], gradient)

    @pytest.mark.parametrize("tied", [True, False])
    def test_resized_embeddings(self, make_model, processor, make_image, tmp_path, tied):
        model, inputs = make_model(text={"tie_word_embeddings": tied}), prompts(processor, make_image, 1)
        vocab_size = model.config.text_config.vocab_size
        with torch.no_grad():
            expected = model(**inputs).logits
            model.resize_token_embeddings(vocab_size + 3)
            logits = model(**inputs).logits
        assert logits.shape[-1] == model.config.text_config.vocab_size == vocab_size + 3
        torch.testing.assert_close(logits[..., :vocab_size], expected)
        assert (model.lm_head.weight is model.get_input_embeddings().weight) is tied
        model.save_pretrained(tmp_path)
        with torch.no_grad():
            assert torch.equal(SiQVLForConditionalGeneration.from_pretrained(tmp_path)(**inputs).logits, logits)


class TestPacking:
    @pytest.fixture
    def packed(self, processor, make_image):
        """Two samples with one image each, packed into one row, and the two on their own."""
        rows = [prompts(processor, make_image, 1) for _ in range(2)]
        rows[1]["pixel_values"] = rows[1]["pixel_values"].flip(-1)
        lengths = [row["input_ids"].shape[1] for row in rows]
        packed = {
            "input_ids": torch.cat([row["input_ids"] for row in rows], dim=1),
            "pixel_values": torch.cat([row["pixel_values"] for row in rows]),
            "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
        }
        return packed, rows

    @pytest.mark.parametrize("implementation", ["sdpa", "eager", "flex_attention"])
    def test_equals_singles(self, make_model, packed, uncompiled, implementation):
        model, (packed, rows) = make_model(), packed
        model.set_attn_implementation(implementation)
        with torch.no_grad():
            logits = model(**packed, use_cache=False).logits
            expected = torch.cat([model(**row).logits for row in rows], dim=1)
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("implementation", ["sdpa", "eager"])
    def test_gradients_equal_singles(self, make_model, packed, implementation):
        packed, rows = packed
        gradients = []
        for packing in (True, False):
            model = make_model().train()
            model.set_attn_implementation(implementation)
            batches = [packed] if packing else rows
            for batch in batches:
                labels, positions = batch["input_ids"].clone(), batch.get("position_ids")
                labels[:, 0] = -100
                if positions is not None:
                    labels[positions == 0] = -100
                model(**batch, labels=labels, num_items_in_batch=10, use_cache=False).loss.backward()
            gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
        for name, gradient in gradients[0].items():
            torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-3, atol=1e-4, msg=name)

    @pytest.mark.parametrize("cache", [None, False, True, "dynamic", "static"])
    @pytest.mark.parametrize("mask", [None, "ones", "gap"])
    @pytest.mark.parametrize(("rows", "rows_of_positions"), [(1, 1), (2, 2), (2, 1)])
    def test_is_right_or_refused(self, make_model, packed, cache, mask, rows, rows_of_positions):
        """Every way to call with restarting positions: samples see only themselves, or there is an error."""
        model, (packed, singles) = make_model(), packed
        first = singles[0]["input_ids"].shape[1]
        calls = {name: torch.cat([value] * rows) for name, value in packed.items()}
        calls["position_ids"] = calls["position_ids"][:rows_of_positions]
        if mask is not None:
            calls["attention_mask"] = torch.ones_like(calls["input_ids"])
            calls["attention_mask"][:, first - 1] = int(mask == "ones")
        if cache in ("dynamic", "static"):
            config = model.config.text_config
            make_cache = {
                "dynamic": lambda: transformers.DynamicCache(config=config),
                "static": lambda: transformers.StaticCache(config=config, max_cache_len=64),
            }
            calls["past_key_values"] = make_cache[cache]()
        elif cache is not None:
            calls["use_cache"] = cache
        if (rows, mask, cache) != (1, None, False):
            with pytest.raises(ValueError, match="samples packed into a row would see each other"):
                model(**calls)
            return
        with torch.no_grad():
            expected = model(**singles[1]).logits
            torch.testing.assert_close(model(**calls).logits[:, first:], expected, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("side", ["left", "right"])
    def test_padding_is_no_packing(self, make_model, make_image, processor, side):
        model, inputs = make_model(), prompts(processor, make_image, 0, 2, padding_side=side)
        positions = (inputs["attention_mask"].cumsum(-1) - 1).masked_fill(inputs["attention_mask"] == 0, 1)
        assert model(**inputs, position_ids=positions).logits.isfinite().all()

    @pytest.mark.parametrize(
        ("rows", "masked", "use_cache", "message"),
        [
            (1, False, True, "1 rows, attention_mask None and use_cache=True"),
            (1, False, None, "1 rows, attention_mask None and use_cache=True"),
            (1, True, False, "1 rows, attention_mask given and use_cache=False"),
            (2, False, False, "2 rows, attention_mask None and use_cache=False"),
        ],
    )
    def test_refuses_what_would_mix_the_samples(self, make_model, packed, rows, masked, use_cache, message):
        packed = {name: torch.cat([value] * rows) for name, value in packed[0].items()}
        if masked:
            packed["attention_mask"] = torch.ones_like(packed["input_ids"])
        with pytest.raises(ValueError, match=f"samples packed into a row would see each other in a batch of {message}"):
            make_model()(**packed, use_cache=use_cache)


class TestGeneration:
    def test_cached_equals_uncached(self, make_model, make_image, processor, count_encoded):
        model, inputs = make_model(), prompts(processor, make_image, 0, 1, 2)
        encoded = count_encoded(model)
        cached = model.generate(**inputs, max_new_tokens=6, do_sample=False)
        assert encoded == [3]
        uncached = model.generate(**inputs, max_new_tokens=6, do_sample=False, use_cache=False)
        assert torch.equal(cached, uncached)

    def test_left_padded_batch_equals_singles(self, make_model, make_image, processor):
        model, batch = make_model(), prompts(processor, make_image, 0, 1, 2)
        length = batch["input_ids"].shape[1]
        together = model.generate(**batch, max_new_tokens=5, do_sample=False)[:, length:]
        for row, images in enumerate(batch["pixel_values"].split([0, 1, 2])):
            visible = batch["attention_mask"][row].bool()
            single = {"input_ids": batch["input_ids"][row, visible][None]}
            if len(images):
                single["pixel_values"] = images
            alone = model.generate(**single, max_new_tokens=5, do_sample=False)[:, int(visible.sum()) :]
            width = alone.shape[1]
            assert torch.equal(together[row, :width], alone[0])

    @pytest.mark.parametrize("images_as", ["pixel_values", "vision_features"])
    @pytest.mark.parametrize("mode", [{"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}])
    def test_several_images_with_beams(self, make_model, make_image, processor, count_encoded, mode, images_as):
        """Compared with prompts whose images were put into the embeddings by hand, so that nothing is left to expand."""
        mode = {**mode, "max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True, "output_scores": True}
        model, batch = make_model(), prompts(processor, make_image, 2, 0, 1)
        with torch.no_grad():
            features = model.get_image_features(batch["pixel_values"])
            embeddings = model.get_input_embeddings()(batch["input_ids"])
        embeddings[batch["input_ids"] == processor.image_token_id] = features.pooler_output.flatten(0, 1)
        if images_as == "vision_features":
            del batch["pixel_values"]
            batch["vision_features"] = features.last_hidden_state
        encoded, length = count_encoded(model), batch["input_ids"].shape[1]
        outputs = model.generate(**batch, **mode)
        assert encoded == ([3] if images_as == "pixel_values" else [])
        expected = model.generate(inputs_embeds=embeddings, attention_mask=batch["attention_mask"], **mode)
        assert torch.equal(outputs.sequences[:, length:], expected.sequences)
        torch.testing.assert_close(outputs.sequences_scores, expected.sequences_scores)

    def test_sampled_copies_see_their_own_images(self, make_model, make_image, processor):
        model, inputs = make_model(), prompts(processor, make_image, 2, 1)
        _, expanded = model._expand_inputs_for_generation(expand_size=2, **inputs)
        features = model.get_image_features(inputs["pixel_values"]).last_hidden_state
        assert torch.equal(expanded["vision_features"], features[[0, 1, 0, 1, 2, 2]])

    def test_expanding_refuses_a_wrong_number_of_images(self, make_model, make_image, processor):
        inputs = prompts(processor, make_image, 2)
        inputs["pixel_values"] = inputs["pixel_values"][:1]
        with pytest.raises(ValueError, match="Image features and image tokens do not match"):
            make_model().generate(**inputs, num_beams=2, max_new_tokens=2)

    @pytest.mark.parametrize("mode", [{}, {"num_beams": 2}])
    def test_from_embeddings(self, make_model, make_image, processor, mode):
        model, inputs = make_model(), prompts(processor, make_image, 1, 2)
        length = inputs["input_ids"].shape[1]
        expected = model.generate(**inputs, max_new_tokens=3, do_sample=False, **mode)[:, length:]
        embeddings = model.get_input_embeddings()(inputs.pop("input_ids")).detach()
        outputs = model.generate(**inputs, inputs_embeds=embeddings, max_new_tokens=3, do_sample=False, **mode)
        assert torch.equal(outputs, expected)

    @pytest.mark.parametrize("resend", [True, False])
    def test_second_turn_on_a_kept_cache(self, make_model, make_image, processor, count_encoded, resend):
        model = make_model()
        first, second = make_image(1), make_image(2)
        turn_one = processor(images=[first], text=f"{IMAGE}What?", return_tensors="pt")
        cache = transformers.DynamicCache(config=model.config) if not V4 else transformers.DynamicCache()
        sequence = model.generate(**turn_one, past_key_values=cache, max_new_tokens=3, do_sample=False)
        answer = f"{IMAGE}Here?"
        both = processor(images=[second], text=answer, return_tensors="pt")
        input_ids = torch.cat([sequence, both["input_ids"]], dim=1)
        pixels = torch.cat([turn_one["pixel_values"], both["pixel_values"]])
        expected = model.generate(input_ids=input_ids, pixel_values=pixels, max_new_tokens=3, do_sample=False)
        encoded = count_encoded(model)
        outputs = model.generate(
            input_ids=input_ids,
            pixel_values=pixels if resend else both["pixel_values"],
            past_key_values=cache,
            max_new_tokens=3,
            do_sample=False,
        )
        assert torch.equal(outputs, expected)
        assert encoded == [1]


class TestFromBackbones:
    def build(self, backbones, special_ids, **kwargs):
        return SiQVLForConditionalGeneration.from_backbones(**backbones, **special_ids, **kwargs)

    def test_takes_both_backbones(self, backbones, special_ids):
        model = self.build(backbones, special_ids, projector_type="mlp", pixel_shuffle_factor=1)
        decoder = transformers.AutoModelForCausalLM.from_pretrained(backbones["language_model"])
        for name, weight in decoder.model.state_dict().items():
            assert torch.equal(weight, model.model.language_model.state_dict()[name])
        tower = AutoModel.from_pretrained(backbones["vision_tower"]).eval()
        pixels = torch.randn(1, 3, 32, 32)
        with torch.no_grad():
            assert torch.equal(tower(pixels).last_hidden_state, model.get_image_features(pixels).last_hidden_state)
        assert model.config.projector_type == "mlp" and model.config.image_seq_length == 16
        assert model.lm_head.weight is model.get_input_embeddings().weight
        assert model.generation_config.eos_token_id == decoder.generation_config.eos_token_id
        assert not model.training and "head" not in dict(model.model.vision_tower.named_children())

    @pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
    def test_dtype(self, backbones, special_ids, name):
        model = self.build(backbones, special_ids, **{name: torch.bfloat16})
        assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
        assert model.model.language_model.rotary_emb.inv_freq.dtype == torch.float32

    def test_vision_part_of_a_whole_siglip(self, backbones, special_ids, tmp_path):
        config = transformers.SiglipConfig(
            vision_config=transformers.AutoConfig.from_pretrained(backbones["vision_tower"]).to_dict(),
            text_config={"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 50},
        )
        siglip = transformers.SiglipModel(config)
        siglip.save_pretrained(tmp_path / "siglip")
        model = self.build({**backbones, "vision_tower": str(tmp_path / "siglip")}, special_ids)
        expected = siglip.vision_model.embeddings.patch_embedding.weight
        assert torch.equal(model.model.vision_tower.embeddings.patch_embedding.weight, expected)

    @pytest.mark.parametrize("prefix", ["", "vision_model."])
    def test_tower_saved_by_either_major(self, backbones, special_ids, prefix):
        from safetensors.torch import load_file, save_file

        path = f"{backbones['vision_tower']}/model.safetensors"
        weights = {prefix + name.removeprefix("vision_model."): weight for name, weight in load_file(path).items()}
        save_file(weights, path, metadata={"format": "pt"})
        model = self.build(backbones, special_ids)
        expected = weights[f"{prefix}post_layernorm.weight"]
        assert torch.equal(model.model.vision_tower.post_layernorm.weight, expected)
        expected = weights[f"{prefix}encoder.layers.1.mlp.fc1.weight"]
        assert torch.equal(model.model.vision_tower.encoder.layers[1].mlp.fc1.weight, expected)

    def test_refuses_a_tower_that_lacks_weights(self, backbones, special_ids):
        from safetensors.torch import load_file, save_file

        path = f"{backbones['vision_tower']}/model.safetensors"
        weights = {name: weight for name, weight in load_file(path).items() if "post_layernorm" not in name}
        save_file(weights, path, metadata={"format": "pt"})
        with pytest.raises(ValueError, match="lacks 2 weights of the vision tower"):
            self.build(backbones, special_ids)

    def test_refuses_another_kind_of_tower(self, backbones, special_ids):
        with pytest.raises(ValueError, match="is a checkpoint of type 'qwen2', but the vision tower must be"):
            self.build({**backbones, "vision_tower": backbones["language_model"]}, special_ids)
