"""
Transformers' own test mixins, run against SiQ-VL.

They are in the source of transformers, not in its wheel. `make test-hf` downloads the source distribution of the
installed release and runs this file; `SIQ_VL_TRANSFORMERS_SOURCE` may name an unpacked one, or a checkout of the
release. The source distribution lacks the mixins for generation and export, a checkout has them all.
"""

import importlib
import os
import shutil
import sys
import tempfile
import types
import unittest
from pathlib import Path
from unittest import mock

import pytest
import torch
from conftest import REPO_ROOT, SiglipImageProcessor, build_tokenizer
from PIL import Image
from transformers.models.auto import modeling_auto

from siq_vl.configuration_siq_vl import SiQVLConfig
from siq_vl.modeling_siq_vl import SiQVLForConditionalGeneration, SiQVLModel
from siq_vl.processing_siq_vl import SiQVLProcessor

SOURCE = os.environ.get("SIQ_VL_TRANSFORMERS_SOURCE")
if SOURCE is None:
    pytest.skip("SIQ_VL_TRANSFORMERS_SOURCE is not set: run `make test-hf`", allow_module_level=True)
SOURCE = Path(SOURCE).resolve()


def local_path(url: str) -> str:
    """A file in place of one on the Hub: the tests of processors ask for it."""
    path = Path(tempfile.gettempdir()) / f"siq_vl_{Path(url).stem}.png"
    if not path.exists():
        Image.effect_noise((48, 32), 64).convert("RGB").save(path)
    return str(path)


def import_tests(*names: str) -> list[types.ModuleType]:
    """
    Imports modules of transformers' `tests` folder under the name that they give themselves.

    What the source distribution leaves out of that folder is replaced by an empty mixin; what fetches files from the
    Hub by files made here.
    """
    stand_ins = {
        "tests.generation.test_utils": {"GenerationTesterMixin": type("GenerationTesterMixin", (), {})},
        "tests.exporters.test_export": {"ExportTesterMixin": type("ExportTesterMixin", (), {})},
        "tests.utils.test_configuration_utils": {"config_common_kwargs": {}},
    }
    (SOURCE / "tests" / "__init__.py").touch()  # read by one of the modules; the source distribution lacks it
    package = types.ModuleType("tests")
    package.__path__ = [str(SOURCE / "tests")]
    sys.modules["tests"] = package
    for name in ("utils", "utils.fetch_hub_objects_for_ci", "fetch_hub_objects_for_ci"):
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].url_to_local_path = local_path
    for name, contents in stand_ins.items():
        path = SOURCE / "tests" / Path(*name.split(".")[1:]).with_suffix(".py")
        if not path.exists():
            for absent in (name.rpartition(".")[0], name):
                sys.modules[absent] = types.ModuleType(absent)
            vars(sys.modules[name]).update(contents)
    return [importlib.import_module(f"tests.{name}") for name in names]


configuration_common, modeling_common, processing_common, generation = import_tests(
    "test_configuration_common", "test_modeling_common", "test_processing_common", "generation.test_utils"
)


class SiQVLModelTester:
    """Makes the tiny configuration and the inputs that the mixins run on: one image at the start of each row."""

    def __init__(self, parent):
        self.parent = parent
        self.batch_size = 3
        self.is_training = True
        self.vision_config = {
            "hidden_size": 32,
            "intermediate_size": 37,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": 8,
            "patch_size": 2,
        }
        self.text_config = {
            "model_type": "qwen2",
            "vocab_size": 99,
            "hidden_size": 32,
            "intermediate_size": 37,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
            "tie_word_embeddings": False,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
        }
        self.hidden_size = self.text_config["hidden_size"]
        self.num_hidden_layers = self.text_config["num_hidden_layers"]
        self.num_attention_heads = self.text_config["num_attention_heads"]
        self.seq_length = 7 + self.get_config().image_seq_length

    def get_config(self) -> SiQVLConfig:
        return SiQVLConfig(
            vision_config=self.vision_config,
            text_config=self.text_config,
            image_token_id=3,
            vision_start_token_id=4,
            vision_end_token_id=5,
        )

    def prepare_config_and_inputs(self):
        config, vision = self.get_config(), self.vision_config
        shape = [self.batch_size, 3, vision["image_size"], vision["image_size"]]
        return config, modeling_common.floats_tensor(shape)

    def prepare_config_and_inputs_for_common(self):
        config, pixel_values = self.prepare_config_and_inputs()
        n_special = 6
        input_ids = modeling_common.ids_tensor([self.batch_size, self.seq_length], 99 - n_special) + n_special
        input_ids[:, : config.image_seq_length] = config.image_token_id
        return config, {
            "pixel_values": pixel_values,
            "input_ids": input_ids,
            "attention_mask": torch.ones_like(input_ids),
        }


class SiQVLModelTest(modeling_common.ModelTesterMixin, generation.GenerationTesterMixin, unittest.TestCase):
    all_model_classes = (SiQVLModel, SiQVLForConditionalGeneration)
    all_generative_model_classes = (SiQVLForConditionalGeneration,)
    pipeline_model_mapping = {"image-text-to-text": SiQVLForConditionalGeneration}
    # Read on transformers 4 only, as its own vision-language models set them.
    test_pruning = False
    test_head_masking = False
    _is_composite = True
    # Read on transformers 5 only: do not pass over a model whose year the test cannot find.
    test_can_init_all_missing_weights_before_2023 = True

    @classmethod
    def setUpClass(cls):
        # The mixins ask the mappings of the auto classes which models take labels; a model with its own code is in none.
        for names, model in [
            (modeling_auto.MODEL_MAPPING_NAMES, SiQVLModel),
            (modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, SiQVLForConditionalGeneration),
        ]:
            cls.enterClassContext(mock.patch.dict(names, {SiQVLConfig.model_type: model.__name__}))
        known = modeling_auto.MODEL_MAPPING._extra_content
        cls.enterClassContext(mock.patch.dict(known, {SiQVLConfig: SiQVLModel}))

    def setUp(self):
        self.model_tester = SiQVLModelTester(self)
        self.config_tester = configuration_common.ConfigTester(
            self, config_class=SiQVLConfig, has_text_modality=False, common_properties=["image_token_id"]
        )

    def test_config(self):
        self.config_tester.run_common_tests()


class SiQVLProcessorTest(processing_common.ProcessorTesterMixin, unittest.TestCase):
    processor_class = SiQVLProcessor

    @classmethod
    def setUpClass(cls):
        cls.tmpdirname = tempfile.mkdtemp()
        cls.full_tmpdirname = None
        image_processor = SiglipImageProcessor(size={"height": 32, "width": 32})
        processor = SiQVLProcessor(image_processor, build_tokenizer(), **cls.prepare_processor_dict())
        processor.save_pretrained(cls.tmpdirname)
        cls.image_token = processor.image_token

    @classmethod
    def tearDownClass(cls):
        shutil.rmtree(cls.tmpdirname)

    @staticmethod
    def prepare_processor_dict():
        template = (REPO_ROOT / "chat_template.jinja").read_text(encoding="utf-8")
        return {"chat_template": template, "patch_size": 8}
