"""Saved checkpoints: loaded by a stranger who has nothing but the folder, with equal results."""

import ast
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from siq_vl.configuration_siq_vl import AUTO_MAP, TRANSFORMERS_4
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
