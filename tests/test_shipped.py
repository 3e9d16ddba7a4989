"""What the repo ships: the tiny backbones, and the checkpoint that the repo itself is."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast, Qwen2ForCausalLM

from siq_vl.evaluation import predictions as kept
from siq_vl.evaluation.figures import held_out_items
from siq_vl.loading import load_checkpoint
from siq_vl.pretraining.gates import failures, gate_accuracies

REPO_ROOT = Path(__file__).resolve().parent.parent
BACKBONES = REPO_ROOT / "backbones"


def test_backbones_are_small():
    assert sum(path.stat().st_size for path in BACKBONES.rglob("*") if path.is_file()) <= 16 * 2**20


def test_measured_gates_are_those_of_the_shipped_language_model():
    folder = BACKBONES / "qwen2.5-tiny"
    model = Qwen2ForCausalLM.from_pretrained(folder)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    measured = json.loads((BACKBONES / "measured.json").read_text())
    for name, again in gate_accuracies(model, tokenizer, count=50, types=("value", "sum")).items():
        assert again["steps"] == pytest.approx(measured["gates"][name]["steps"], abs=0.15), name
    assert measured["gates_missed"] == failures(measured["gates"]) == []
    assert measured["training"].keys() == {"text", "vision", "captions"}


def test_the_repo_is_a_checkpoint(tmp_path):
    """Load the repo as a stranger would: another folder, nothing on the path, a private module cache."""
    held_out_items(1)[0].image.save(tmp_path / "picture.png")
    program = f"""
from PIL import Image
import transformers
from transformers import AutoProcessor
name = "AutoModelForVision2Seq" if transformers.__version__.startswith("4.") else "AutoModelForImageTextToText"
path = {str(REPO_ROOT)!r}
model = getattr(transformers, name).from_pretrained(path, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(path, trust_remote_code=True)
messages = [{{"role": "user", "content": [{{"type": "image"}}, {{"type": "text", "text": "Describe the image."}}]}}]
text = processor.apply_chat_template(messages, add_generation_prompt=True)
inputs = processor(images=Image.open("picture.png"), text=text, return_tensors="pt")
output = model.generate(**inputs, max_new_tokens=64, do_sample=False)
print(processor.post_process_image_text_to_text(output[:, inputs["input_ids"].shape[1]:])[0])
"""
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONPATH", None)
    command = [sys.executable, "-I", "-c", program]
    ran = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.strip()


@pytest.fixture(scope="module")
def answers() -> list[kept.Prediction]:
    model, processor = load_checkpoint(str(REPO_ROOT))
    return kept.predict(model, processor, held_out_items(90))


def test_the_repo_reasons_and_answers(answers):
    ordinary = [answer for answer in answers if answer.group == "held out"]
    assert sum(answer.well_formed for answer in ordinary) / len(ordinary) > 0.95
    # The README's table has the figure; this only says that the weights are the trained ones.
    assert sum(answer.correct for answer in ordinary) / len(ordinary) > 0.85
