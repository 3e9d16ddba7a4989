"""Tiny models, tokenizers, processors and checkpoints, all made in memory from random weights: offline, on CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import transformers
from accelerate.state import AcceleratorState
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM, SiglipVisionConfig, SiglipVisionModel

REPO_ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO_ROOT))

from siq_vl.configuration_siq_vl import SiQVLConfig  # noqa: E402
from siq_vl.modeling_siq_vl import SiQVLForConditionalGeneration  # noqa: E402
from siq_vl.processing_siq_vl import SiQVLProcessor  # noqa: E402

if transformers.__version__.startswith("4."):
    from transformers import SiglipImageProcessor
else:
    from transformers import SiglipImageProcessorPil as SiglipImageProcessor


SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"]
VISION = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}
TEXT = {
    "hidden_size": 24,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": True,
}


BEGAN_WITH = frozenset(os.environ)

# What all else stands on is tested first, and what trains or starts many processes last; all others in between.
FIRST = ("test_modeling", "test_processing", "test_images", "test_checkpoint", "test_recipes", "test_data")
LAST = ("test_traces", "test_training", "test_resume", "test_distributed", "test_shipped", "test_majors", "test_readme")


def pytest_collection_modifyitems(config, items):
    """Orders the test files by what they protect; the order within a file stays. A random order is left as it is."""
    if config.getoption("random_order_enabled", False):
        return

    def place(item) -> int:
        name = Path(item.fspath).stem
        return FIRST.index(name) if name in FIRST else len(FIRST) + (LAST.index(name) + 1 if name in LAST else 0)

    items.sort(key=place)


@pytest.fixture(scope="session", autouse=True)
def data_cache(tmp_path_factory):
    """Keeps what `datasets` stores of the tests' files away from the user's cache."""
    patch = pytest.MonkeyPatch()
    patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
    yield
    patch.undo()


@pytest.fixture(autouse=True)
def environment_as_it_was():
    """No test sees what another has left in the environment; accelerate leaves the precision of the last trainer there."""
    for name in [name for name in os.environ if name.startswith("ACCELERATE_") and name not in BEGAN_WITH]:
        del os.environ[name]
    before = dict(os.environ)
    yield
    for name in os.environ.keys() - before.keys() - {"PYTEST_CURRENT_TEST"}:
        del os.environ[name]
    os.environ.update({name: value for name, value in before.items() if name != "PYTEST_CURRENT_TEST"})


@pytest.fixture
def own_precision(monkeypatch):
    """The test computes in no precision of one before it, which accelerate keeps for the whole process."""
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    AcceleratorState._reset_state(reset_partial_state=True)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with Qwen's special tokens and no merges to speak of."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["system user assistant What is shown here?"], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        additional_special_tokens=SPECIAL_TOKENS[1:],
    )


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer()


@pytest.fixture(scope="session")
def special_ids(tokenizer) -> dict[str, int]:
    """The ids that a `SiQVLConfig` needs."""
    return {
        "image_token_id": tokenizer.convert_tokens_to_ids("<|image_pad|>"),
        "vision_start_token_id": tokenizer.convert_tokens_to_ids("<|vision_start|>"),
        "vision_end_token_id": tokenizer.convert_tokens_to_ids("<|vision_end|>"),
    }


@pytest.fixture
def processor() -> SiQVLProcessor:
    """A processor of its own for each test: 4 tokens for an image of 32 x 32 pixels."""
    template = (REPO_ROOT / "chat_template.jinja").read_text(encoding="utf-8")
    tokenizer = build_tokenizer()
    tokenizer.chat_template = template
    image_processor = SiglipImageProcessor(size={"height": VISION["image_size"], "width": VISION["image_size"]})
    return SiQVLProcessor(
        image_processor, tokenizer, chat_template=template, patch_size=VISION["patch_size"], pixel_shuffle_factor=2
    )


@pytest.fixture
def make_config(tokenizer, special_ids):
    """Makes a tiny `SiQVLConfig`; `vision` and `text` change fields of the sub-configurations."""

    def make(vision=None, text=None, **kwargs) -> SiQVLConfig:
        return SiQVLConfig(
            vision_config={**VISION, **(vision or {})},
            text_config={"model_type": "qwen2", **TEXT, "vocab_size": len(tokenizer), **(text or {})},
            **{**special_ids, **kwargs},
        )

    return make


@pytest.fixture
def make_model(make_config, tokenizer):
    """Makes a tiny model in evaluation mode, with weights large enough for outputs that depend on the inputs."""

    def make(seed=0, **kwargs) -> SiQVLForConditionalGeneration:
        torch.manual_seed(seed)
        model = SiQVLForConditionalGeneration(make_config(**kwargs))
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.normal_(std=0.3, generator=generator)
        model.generation_config.pad_token_id = tokenizer.pad_token_id
        return model.eval()

    return make


@pytest.fixture
def make_image():
    """Makes an RGB image of coloured noise; each seed has a colour of its own."""

    def make(seed=0, size=(32, 32)) -> Image.Image:
        width, height = size
        generator = np.random.default_rng(seed)
        colour = generator.integers(0, 192, 3)
        return Image.fromarray((colour + generator.integers(0, 64, (height, width, 3))).astype(np.uint8))

    return make


@pytest.fixture
def backbones(tmp_path, processor) -> dict[str, str]:
    """Folders of a tiny vision tower, with its pooling head, and a tiny language model."""
    torch.manual_seed(0)
    vision, language = tmp_path / "vision", tmp_path / "language"
    SiglipVisionModel(SiglipVisionConfig(**VISION)).save_pretrained(vision)
    processor.image_processor.save_pretrained(vision)
    text_config = Qwen2Config(
        **TEXT, vocab_size=len(processor.tokenizer), eos_token_id=processor.tokenizer.eos_token_id
    )
    Qwen2ForCausalLM(text_config).save_pretrained(language)
    processor.tokenizer.save_pretrained(language)
    return {"vision_tower": str(vision), "language_model": str(language)}


@pytest.fixture
def checkpoint(tmp_path, make_model, processor) -> Path:
    """Folder of a saved tiny model and its processor."""
    folder = tmp_path / "checkpoint"
    make_model().save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def run_clean(arguments, work: Path, python: str = sys.executable) -> subprocess.CompletedProcess:
    """Runs a python program in a new process that sees neither this repository nor any cache of its code.

    Args:
        arguments: what follows `python -I` on the command line.
        work: folder that is made for it; holds its empty working folder and its private module cache.
        python: interpreter to run it with.
    """
    (work / "empty").mkdir(parents=True)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_MODULES_CACHE": str(work / "modules"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    process = subprocess.run(
        [python, "-I", *map(str, arguments)],
        cwd=work / "empty",
        env=environment,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    assert process.returncode == 0, process.stderr
    return process


@pytest.fixture
def as_a_stranger(tmp_path):
    """Lets `stranger.py` examine checkpoints in a clean process; returns what it found, folder by folder."""
    runs = []

    def examine(*folders, picture: Image.Image, python: str = sys.executable, resave: Path | None = None) -> list[dict]:
        work = tmp_path / f"stranger{len(runs)}"
        runs.append(work)
        work.mkdir()
        picture.save(work / "picture.png")
        task = {"folders": [str(folder) for folder in folders], "picture": str(work / "picture.png")}
        task["results"] = str(work / "results.pt")
        if resave is not None:
            task["resave"] = str(resave)
        process = run_clean([Path(__file__).with_name("stranger.py"), json.dumps(task)], work / "process", python)
        assert "newly initialized" not in process.stderr and "MISSING" not in process.stderr
        return torch.load(work / "results.pt")

    return examine
