"""
Transformers' own test mixins, run against SiQ-VL.

They are in the source of transformers, not in its wheel. `make test-hf` downloads the source distribution of both majors
and runs this file on each; `SIQ_VL_TRANSFORMERS_SOURCE` may name an unpacked one, or a checkout of the release. No
package carries the mixins for generation and export; test_hf_generation.py holds the model to the same. A checkout has
them, and then they run too.

What is skipped is what cannot be had here (an accelerator, another library) or does not exist in the model (video,
experts): the last test runs each skipped test on transformers' own Idefics3, prints both reasons, and fails where
Idefics3 passes.
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
from transformers import (
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3Model,
    Idefics3Processor,
    PreTrainedTokenizerFast,
)
from transformers.models.auto import modeling_auto

from siq_vl.configuration_siq_vl import TRANSFORMERS_4, SiQVLConfig
from siq_vl.modeling_siq_vl import SiQVLForConditionalGeneration, SiQVLModel
from siq_vl.processing_siq_vl import SiQVLProcessor

SOURCE = os.environ.get("SIQ_VL_TRANSFORMERS_SOURCE")
if SOURCE is None:
    pytest.skip("SIQ_VL_TRANSFORMERS_SOURCE is not set: run `make test-hf`", allow_module_level=True)
SOURCE = Path(SOURCE).resolve()

if TRANSFORMERS_4:
    from transformers import Idefics3ImageProcessor
else:
    from transformers import Idefics3ImageProcessorPil as Idefics3ImageProcessor


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


class Recorder:
    """Hands a test's outcome on to who runs it, and keeps the reasons for which anything of it was skipped."""

    def __init__(self, result, reasons: list[str]):
        self.result, self.reasons = result, reasons

    def __getattr__(self, name):
        return getattr(self.result, name)

    def addSkip(self, test, reason):
        self.reasons.append(" ".join(str(reason).split()))
        self.result.addSkip(test, reason)


class Recorded(unittest.TestCase):
    """Notes which tests were skipped, of the class itself, and why."""

    skipped: dict[str, list[str]]

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        cls.skipped = {}

    def run(self, result=None):
        reasons: list[str] = []
        outcome = super().run(Recorder(self.defaultTestResult() if result is None else result, reasons))
        if reasons:
            self.skipped[self._testMethodName] = reasons
        return outcome


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


class AsOnTransformers(modeling_common.ModelTesterMixin, generation.GenerationTesterMixin):
    """What transformers' own vision-language models set on transformers 4."""

    test_pruning = False
    test_head_masking = False
    _is_composite = True


class SiQVLModelTest(AsOnTransformers, Recorded):
    all_model_classes = (SiQVLModel, SiQVLForConditionalGeneration)
    all_generative_model_classes = (SiQVLForConditionalGeneration,)
    pipeline_model_mapping = {"image-text-to-text": SiQVLForConditionalGeneration}
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


class SiQVLProcessorTest(processing_common.ProcessorTesterMixin, Recorded):
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


class Idefics3ModelTester(SiQVLModelTester):
    """The same sizes for Idefics3, whose images come sample by sample."""

    def get_config(self) -> Idefics3Config:
        return Idefics3Config(
            vision_config=self.vision_config, text_config=self.text_config, image_token_id=3, scale_factor=2
        )

    def prepare_config_and_inputs_for_common(self):
        _, inputs = SiQVLModelTester(self.parent).prepare_config_and_inputs_for_common()
        return self.get_config(), {**inputs, "pixel_values": inputs["pixel_values"][:, None]}


class NativeModel(AsOnTransformers, Recorded):
    __test__ = False  # run where one of ours was skipped
    all_model_classes = (Idefics3Model, Idefics3ForConditionalGeneration)
    all_generative_model_classes = (Idefics3ForConditionalGeneration,)
    pipeline_model_mapping = {"image-text-to-text": Idefics3ForConditionalGeneration}

    def setUp(self):
        self.model_tester = Idefics3ModelTester(self)


class NativeProcessor(processing_common.ProcessorTesterMixin, Recorded):
    __test__ = False
    processor_class = Idefics3Processor

    @classmethod
    def setUpClass(cls):
        cls.tmpdirname = tempfile.mkdtemp()
        cls.full_tmpdirname = None
        tokenizer: PreTrainedTokenizerFast = build_tokenizer()
        template = (REPO_ROOT / "chat_template.jinja").read_text(encoding="utf-8")
        template = template.replace("<|vision_start|><|image_pad|><|vision_end|>", "<image>")
        processor = Idefics3Processor(
            Idefics3ImageProcessor(do_image_splitting=False), tokenizer, image_seq_len=4, chat_template=template
        )
        processor.save_pretrained(cls.tmpdirname)
        cls.image_token = processor.image_token

    @classmethod
    def tearDownClass(cls):
        shutil.rmtree(cls.tmpdirname)

    @staticmethod
    def prepare_processor_dict():
        return {"image_seq_len": 4}


@pytest.mark.parametrize(
    ("own", "native"),
    [(SiQVLModelTest, NativeModel), (SiQVLProcessorTest, NativeProcessor)],
    ids=["model", "processor"],
)
def test_nothing_is_skipped_that_idefics3_passes(own, native, capsys):
    assert own.skipped, "the tests of the class come before this one: run the whole file"
    result = unittest.TestResult()
    unittest.TestSuite(native(name) for name in own.skipped).run(result)
    failed = {test.id().rpartition(".")[2]: "fails" for test, _ in [*result.failures, *result.errors]}
    lines = [f"\n{own.__name__}: {len(own.skipped)} tests skipped, and what Idefics3 does"]
    for name, reasons in sorted(own.skipped.items()):
        theirs = native.skipped.get(name, [failed.get(name, "PASSES")])
        lines.append(f"  {name}")
        lines.append(f"    SiQ-VL:   {'; '.join(dict.fromkeys(reasons))}")
        lines.append(f"    Idefics3: {'; '.join(dict.fromkeys(theirs))}")
    with capsys.disabled():
        sys.stdout.write("\n".join(lines) + "\n")
    assert own.skipped.keys() <= native.skipped.keys() | failed.keys()
