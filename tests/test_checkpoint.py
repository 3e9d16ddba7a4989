"""Saved checkpoints: loaded by a stranger who has nothing but the folder, with equal results."""

import ast
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor

from siq_vl.configuration_siq_vl import AUTO_MAP, TRANSFORMERS_4
from siq_vl.loading import load_checkpoint
from siq_vl.modeling_siq_vl import SiQVLForConditionalGeneration
from siq_vl.processing_siq_vl import SiQVLProcessor

REPO_ROOT = Path(__file__).resolve().parent.parent
CODE_FILES = [
    "configuration_siq_vl.py",
    "generation_siq_vl.py",
    "image_processing_siq_vl.py",
    "modeling_siq_vl.py",
    "processing_siq_vl.py",
]
AUTO_MODELS_WITH_LOGITS = {
    "AutoModelForImageTextToText",
    "AutoModelForCausalLM",
    "AutoModelForVision2Seq" if TRANSFORMERS_4 else "AutoModelForMultimodalLM",
}


@pytest.mark.parametrize("dialect", ["native", "foreign"])
def test_a_stranger_gets_equal_logits(checkpoint, as_a_stranger, make_image, dialect):
    """Reads a checkpoint as this major of transformers saved it, and with what only the other major writes taken out."""
    model = SiQVLForConditionalGeneration.from_pretrained(checkpoint).eval()
    if dialect == "foreign":
        config = json.loads((checkpoint / "config.json").read_text())
        own, other = ("rope_theta", "rope_parameters")[:: 1 if TRANSFORMERS_4 else -1]
        assert other in config["text_config"]
        config["text_config"].pop(own, None)
        (checkpoint / "config.json").write_text(json.dumps(config))
    (results,) = as_a_stranger(checkpoint, picture=make_image(size=(50, 20)))
    with torch.no_grad():
        expected = model(**results["inputs"])
        hidden = model.model(**results["inputs"]).last_hidden_state
    assert results["config"] == "SiQVLConfig" and results["processor"] == "SiQVLProcessor"
    assert results["logits"].keys() == AUTO_MODELS_WITH_LOGITS
    for logits in results["logits"].values():
        assert torch.equal(logits, expected.logits)
    assert results["hidden"].keys() == {"AutoModel"}
    assert torch.equal(results["hidden"]["AutoModel"], hidden)
    assert results["text"] == results["tokenizer_text"]
    assert results["pipeline"] == results["answer"]


def test_saving_again_changes_nothing(checkpoint, tmp_path):
    again = tmp_path / "again"
    SiQVLForConditionalGeneration.from_pretrained(checkpoint).save_pretrained(again)
    SiQVLProcessor.from_pretrained(checkpoint, trust_remote_code=True).save_pretrained(again)
    for name in (
        "config.json",
        "processor_config.json",
        "chat_template.jinja",
        "tokenizer_config.json",
        "tokenizer.json",
    ):
        first, second = ((folder / name).read_text() for folder in (checkpoint, again))
        if name.endswith(".json"):
            first, second = json.loads(first), json.loads(second)
        if name == "config.json":  # loading writes the type of the weights into the sub-configurations
            for config in (first, second):
                config["text_config"].pop("dtype", None), config["vision_config"].pop("dtype", None)
        if name == "tokenizer_config.json":  # loading adds keys that say how the tokenizer was loaded
            second = {key: value for key, value in second.items() if key in first}
        assert first == second, name
    first, second = load_file(checkpoint / "model.safetensors"), load_file(again / "model.safetensors")
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_folder_has_all_that_a_stranger_needs(checkpoint):
    config = json.loads((checkpoint / "config.json").read_text())
    assert config["auto_map"] == AUTO_MAP
    assert config["architectures"] == ["SiQVLForConditionalGeneration"]
    for name in CODE_FILES:
        assert (checkpoint / name).read_text() == (REPO_ROOT / name).read_text()
    names = {path.name for path in checkpoint.iterdir()}
    assert {"chat_template.jinja", "preprocessor_config.json", "processor_config.json", "tokenizer.json"} <= names
    assert not any(name.endswith(".bin") for name in names)


def test_weights_have_the_names_of_both_majors(checkpoint):
    names = load_file(checkpoint / "model.safetensors").keys()
    assert "model.vision_tower.encoder.layers.0.self_attn.q_proj.weight" in names
    assert "model.projector.linear.weight" in names
    assert "model.language_model.layers.0.self_attn.q_proj.weight" in names
    assert not any("vision_model" in name or ".head." in name or name == "lm_head.weight" for name in names)


def test_tokenizer_config_is_readable_by_both_majors(checkpoint):
    config = json.loads((checkpoint / "tokenizer_config.json").read_text())
    assert not isinstance(config.get("extra_special_tokens"), list)
    assert "<|image_pad|>" in config["additional_special_tokens"]
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"


def test_auto_map_of_a_hub_checkpoint_becomes_local_on_saving(make_config, tmp_path):
    config = make_config(auto_map={"AutoConfig": "someone/siq-vl--configuration_siq_vl.SiQVLConfig"})
    config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["auto_map"] == AUTO_MAP


def test_half_precision_survives(make_model, tmp_path):
    make_model().to(torch.bfloat16).save_pretrained(tmp_path)
    model = SiQVLForConditionalGeneration.from_pretrained(tmp_path, dtype="auto")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_untied_output_layer_is_saved(make_model, tmp_path):
    model = make_model(text={"tie_word_embeddings": False})
    model.save_pretrained(tmp_path)
    loaded = SiQVLForConditionalGeneration.from_pretrained(tmp_path)
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)
    assert not torch.equal(loaded.lm_head.weight, loaded.get_input_embeddings().weight)


def test_processor_refuses_to_push_while_saving(processor, tmp_path):
    with pytest.raises(ValueError, match="use `processor.push_to_hub"):
        processor.save_pretrained(tmp_path, push_to_hub=True)


@pytest.mark.parametrize("name", CODE_FILES)
def test_code_files_travel_well(name):
    """They import only libraries and each other, and hide no import from the checker that reads them as text."""
    source = (REPO_ROOT / name).read_text()
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            assert node.level == 1 and f"{node.module}.py" in CODE_FILES
        elif isinstance(node, ast.ImportFrom):
            assert node.module.partition(".")[0] != "siq_vl"
        assert not isinstance(node, ast.Assert)
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None
        if isinstance(node, ast.FunctionDef):
            docstring = ast.get_docstring(node) or ""
            assert node.end_lineno - node.lineno - docstring.count("\n") <= 60, node.name
    imports = sum(isinstance(node, ast.ImportFrom) and bool(node.level) for node in ast.walk(tree))
    assert sum(line.strip().startswith("from .") for line in source.splitlines()) == imports
    assert "TYPE_CHECKING" not in source


class TestDamage:
    """A checkpoint that is not whole is refused with the file's name and the cure, whichever file it is."""

    @pytest.fixture(scope="class")
    def kept(self, tmp_path_factory):
        """The shipped checkpoint, without its code files; each test damages a copy."""
        folder = tmp_path_factory.mktemp("kept")
        for file in [*REPO_ROOT.glob("*.json"), REPO_ROOT / "chat_template.jinja", REPO_ROOT / "model.safetensors"]:
            shutil.copy(file, folder)
        return folder

    @pytest.fixture
    def folder(self, kept, tmp_path):
        """Files that may be written anew, but not into: the weights of all copies are one file."""
        folder = tmp_path / "copy"
        shutil.copytree(kept, folder, copy_function=lambda source, target: Path(target).hardlink_to(source))
        return folder

    @staticmethod
    def replace(file, contents: bytes):
        file.unlink()
        file.write_bytes(contents)

    def change(self, file, **changes):
        fields = json.loads(file.read_text())
        for name, value in changes.items():
            place = fields
            *parents, last = name.split("__")
            for parent in parents:
                place = place[parent]
            place[last] = value
        self.replace(file, json.dumps(fields).encode())

    def refused(self, folder, message):
        with pytest.raises(ValueError, match=message) as error:
            load_checkpoint(str(folder))
        cures = "copy|save|pass another|correct|set one|choose|install|train it first|look it up|is the usual"
        assert re.search(cures, str(error.value))

    def test_undamaged(self, folder):
        model, processor = load_checkpoint(str(folder))
        assert not model.training and processor.image_seq_length == model.config.image_seq_length

    @pytest.mark.parametrize(
        "name",
        [
            "config.json",
            "model.safetensors",
            "tokenizer.json",
            "tokenizer_config.json",
            "preprocessor_config.json",
            "processor_config.json",
            "chat_template.jinja",
        ],
    )
    @pytest.mark.parametrize("damage", ["absent", "empty", "cut off", "binary", "another's"])
    def test_a_file(self, folder, name, damage):
        file = folder / name
        contents = file.read_bytes()
        if damage == "absent":
            file.unlink()
        else:
            another = {"cut off": contents[: 2 * len(contents) // 3], "binary": bytes(range(256)), "another's": b"[1]"}
            self.replace(file, another.get(damage, b""))
        expected = re.escape(name) if damage != "absent" or name != "config.json" else "no config.json"
        self.refused(folder, expected)

    @pytest.mark.parametrize(
        ("name", "changes", "message"),
        [
            ("config.json", {"model_type": "llava"}, "of a model of type 'llava', not 'siq_vl'"),
            ("config.json", {"text_config__model_type": "unheard_of"}, "text_config does not describe a model of type"),
            (
                "config.json",
                {"text_config__hidden_size": "a"},
                "(text_config does not describe|config.json and its weights)",
            ),
            (
                "config.json",
                {"text_config__hidden_size": 48},
                "config.json and its weights are damaged or not of one model",
            ),
            ("config.json", {"vision_config__image_size": None}, "vision_config"),
            ("config.json", {"pixel_shuffle_factor": 1}, "config.json and its weights are damaged or not of one model"),
            (
                "config.json",
                {"projector_type": "mlp"},
                "lacks weights that its config.json asks for: 2, model.projector",
            ),
            (
                "config.json",
                {"projector_bias": False},
                "holds weights that its config.json has no place for: 1, model.proj",
            ),
            ("processor_config.json", {"patch_size": 7}, "patch_size is 7 in the processor .* and 12 in config.json"),
            ("processor_config.json", {"pixel_shuffle_factor": 3}, "pixel_shuffle_factor is 3 in the processor"),
            ("preprocessor_config.json", {"image_mean": "a"}, "preprocessor_config.json is damaged"),
            (
                "preprocessor_config.json",
                {"image_processor_type": "Unheard"},
                "no preprocessor_config.json that can be read",
            ),
        ],
    )
    def test_a_field(self, folder, name, changes, message):
        self.change(folder / name, **changes)
        self.refused(folder, message)

    @pytest.mark.parametrize(
        "lost", ["model.projector.", "model.vision_tower.encoder.layers.0.", "model.language_model.norm"]
    )
    def test_lost_weights(self, folder, lost):
        weights = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        save_file(
            {name: weight for name, weight in weights.items() if not name.startswith(lost)},
            folder / "model.safetensors",
            {"format": "pt"},
        )
        self.refused(folder, rf"lacks weights that its config.json asks for: \d+, {lost}")

    def test_a_lost_shard(self, checkpoint):
        model = SiQVLForConditionalGeneration.from_pretrained(checkpoint)
        (checkpoint / "model.safetensors").unlink()
        model.save_pretrained(checkpoint, max_shard_size="40KB")
        load_checkpoint(str(checkpoint))
        shard = next(checkpoint.glob("model-00002-*.safetensors"))
        shard.write_bytes(shard.read_bytes()[:-100])
        self.refused(checkpoint, f"{shard.name} is damaged")
        shard.unlink()
        self.refused(checkpoint, f"{shard.name} is not there, which model.safetensors.index.json names")

    @pytest.mark.parametrize("loader", [AutoProcessor, SiQVLProcessor])
    def test_plain_loading_of_the_processor(self, checkpoint, loader):
        self.replace(checkpoint / "tokenizer.json", b'{"version"')
        with pytest.raises(OSError, match="has no tokenizer.json .* that can be read: copy the files"):
            loader.from_pretrained(checkpoint, trust_remote_code=True)
