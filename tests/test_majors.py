"""
One checkpoint folder, two majors of transformers: written by one, read and saved again by the other, read by the first.

Only one major fits into an environment. `SIQ_VL_OTHER_PYTHON` names the interpreter of an environment with the other one;
`make test-majors` runs this file under both, each with the other's interpreter. Without the variable the checkpoint
goes through another process of the same major, with the same checks.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import run_clean
from PIL import Image
from safetensors.torch import load_file
from test_decoders import FAMILIES, ids_of, joined, native, with_picture

from siq_vl.configuration_siq_vl import AUTO_MAP, TRANSFORMERS_4
from siq_vl.export.idefics3 import export_idefics3

REPO_ROOT = Path(__file__).resolve().parent.parent
OTHER_PYTHON = os.environ.get("SIQ_VL_OTHER_PYTHON") or sys.executable
IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
MAJOR = 4 if TRANSFORMERS_4 else 5
ONLY_ON = {"AutoModelForVision2Seq": 4, "AutoModelForMultimodalLM": 5}


@pytest.fixture
def checkpoints(tmp_path, make_model, processor) -> list[Path]:
    """Three checkpoints: tied and linear; untied, with an MLP and scaled positions; and the one that the repo is."""
    models = [
        make_model(),
        make_model(
            projector_type="mlp",
            projector_bias=False,
            text={"tie_word_embeddings": False, "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
        ),
    ]
    folders = [tmp_path / "written" / name for name in ("tied", "untied")]
    for model, folder in zip(models, folders, strict=True):
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
    return [*folders, REPO_ROOT]


def test_the_other_interpreter_has_the_other_major():
    program = "import transformers; print(transformers.__version__)"
    ran = subprocess.run([OTHER_PYTHON, "-I", "-c", program], capture_output=True, text=True, check=True)
    other = int(ran.stdout.split(".")[0])
    assert other == (9 - MAJOR if "SIQ_VL_OTHER_PYTHON" in os.environ else MAJOR), ran.stdout


def test_a_round_trip_changes_nothing(checkpoints, as_a_stranger, make_image, tmp_path):
    picture, again = make_image(3, size=(70, 40)), tmp_path / "again"
    first = as_a_stranger(*checkpoints, picture=picture)
    other = as_a_stranger(*checkpoints, picture=picture, python=OTHER_PYTHON, resave=again)
    saved = [again / str(place) for place in range(len(checkpoints))]
    back = as_a_stranger(*saved, picture=picture)
    for written, rewritten in zip(checkpoints, saved, strict=True):
        check_files(written, rewritten)
    for here, there, home in zip(first, other, back, strict=True):
        check_found(here, there)
        check_found(here, home)
    assert [found["tied"] for found in first] == [True, False, True]


READ_DECODERS = """
import sys
import torch
from transformers import AutoModelForImageTextToText

*folders, inputs, results = sys.argv[1:]
inputs, found = torch.load(inputs), {}
for folder in folders:
    model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True, attn_implementation="eager")
    with torch.no_grad():
        found[folder] = model.eval()(**inputs).logits
torch.save(found, results)
"""


def test_every_decoder_computes_the_same_on_the_other_major(tmp_path):
    """With a picture: Gemma and Gemma 2 scale embeddings in different places on the two majors."""
    inputs = with_picture(ids_of(9)[0])
    torch.save(inputs, tmp_path / "inputs.pt")
    expected = {}
    for family in FAMILIES:
        model = joined(native(family))
        model.set_attn_implementation("eager")
        folder = str(tmp_path / family)
        model.save_pretrained(folder)
        with torch.no_grad():
            expected[folder] = model(**inputs).logits
    results = tmp_path / "results.pt"
    run_clean(["-c", READ_DECODERS, *expected, tmp_path / "inputs.pt", results], tmp_path / "run", OTHER_PYTHON)
    found = torch.load(results)
    for folder, logits in expected.items():
        torch.testing.assert_close(
            found[folder], logits, rtol=1e-4, atol=1e-4, msg=lambda text, at=folder: f"{at}: {text}"
        )


READ_EXPORT = """
import sys
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

folder, picture, text, results = sys.argv[1:]
model, processor = AutoModelForImageTextToText.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)
inputs = processor(images=[Image.open(picture)], text=text, return_tensors="pt")
with torch.no_grad():
    torch.save({**inputs, "logits": model(**inputs).logits, "name": type(model).__name__}, results)
"""


def test_an_export_is_read_by_the_other_major(make_model, processor, make_image, tmp_path):
    """Idefics3 of transformers 4 reads and prepares the same, and computes other vision positions."""
    model = make_model(projector_bias=False, text={"rope_theta": 5e5})
    export_idefics3(model, processor, tmp_path / "export")
    picture, results = tmp_path / "picture.png", tmp_path / "results.pt"
    make_image(3, size=(70, 40)).save(picture)
    run_clean(
        ["-c", READ_EXPORT, tmp_path / "export", picture, "<image>What?", results], tmp_path / "run", OTHER_PYTHON
    )
    found = torch.load(results)
    ours = processor(images=Image.open(picture), text=f"{IMAGE}What?", return_tensors="pt")
    assert found["name"] == "Idefics3ForConditionalGeneration"
    assert torch.equal(found["input_ids"], ours["input_ids"])
    assert torch.equal(found["pixel_values"][0], ours["pixel_values"])
    other = 9 - MAJOR if "SIQ_VL_OTHER_PYTHON" in os.environ else MAJOR
    if other == 5:
        with torch.no_grad():
            torch.testing.assert_close(found["logits"], model(**ours).logits, rtol=1e-4, atol=1e-4)


def test_the_environments_differ_in_transformers_alone():
    pinned, pinned_v5 = (
        {line for line in (REPO_ROOT / name).read_text().splitlines() if line and not line.startswith("#")}
        for name in ("requirements.txt", "requirements-v5.txt")
    )
    assert {line.split("=")[0] for line in pinned - pinned_v5} == {"transformers"}
    assert {line.split("=")[0] for line in pinned_v5 - pinned} == {"transformers", "fastapi", "uvicorn", "openai"}


def check_files(written: Path, rewritten: Path) -> None:
    """Weights with the same names and values, and the settings that the majors name differently under both names."""
    weights, again = (load_file(folder / "model.safetensors") for folder in (written, rewritten))
    assert weights.keys() == again.keys()
    assert all(torch.equal(weights[name], again[name]) for name in weights)
    thetas = set()
    for folder in (written, rewritten):
        config = json.loads((folder / "config.json").read_text())
        text = config["text_config"]
        assert config["auto_map"] == AUTO_MAP
        thetas |= {text["rope_theta"], text["rope_parameters"]["rope_theta"]}
        tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
        assert "<|image_pad|>" in tokenizer["additional_special_tokens"]
    assert thetas == {10_000.0 if written == REPO_ROOT else 1_000_000.0}  # 10,000 is also what a lost value becomes


def check_found(here: dict, there: dict) -> None:
    """Equal to the last bit, through every auto class that its major has."""
    for found in (here, there):
        expected = {name for name in AUTO_MAP if name.startswith("AutoModel")}
        expected -= {name for name, major in ONLY_ON.items() if major != found["major"]}
        assert found["logits"].keys() | found["hidden"].keys() == expected
        for logits in found["logits"].values():
            assert torch.equal(logits, here["logits"]["AutoModelForImageTextToText"])
    assert torch.equal(here["hidden"]["AutoModel"], there["hidden"]["AutoModel"])
    assert torch.equal(here["rotary"], there["rotary"])
    assert torch.equal(here["generated"], there["generated"])
    assert here["inputs"].keys() == there["inputs"].keys()
    assert all(torch.equal(here["inputs"][name], there["inputs"][name]) for name in here["inputs"])
    for name in (
        "config",
        "processor",
        "text",
        "tokenizer_text",
        "answer",
        "pipeline",
        "weights",
        "tied",
        "special_tokens",
        "ends",
    ):
        assert here[name] == there[name], name
