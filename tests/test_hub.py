"""Model cards, and pushing to a server that answers as the Hub does: what arrives, what is tried again, what leaks."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from fake_hub import USER, FakeHub
from huggingface_hub import utils

from siq_vl import hub as pushing
from siq_vl.hub import model_card, push_stage

REPO_ROOT = Path(__file__).resolve().parent.parent
TOKEN = "hf_aTokenThatMustNotBeSeenAnywhere"
RUN = ["--stage", "1", "--max_steps", "2", "--effective_batch_size", "2", "--logging_steps", "1"]


@pytest.fixture(scope="module")
def hub():
    # A session that was opened offline stays offline: begin with a new one, and leave none that is not.
    new_session = getattr(utils, "reset_sessions", None) or utils.close_session
    server = FakeHub(TOKEN, trouble={"/commit/": [503], "/preupload/": ["drop"]})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        new_session()
        yield server
    new_session()
    server.close()


def environment(folder: Path, hub: FakeHub, **more: str) -> dict[str, str]:
    left_out = (
        "ACCELERATE_MIXED_PRECISION",
        "HF_TOKEN",
        "HF_HUB_OFFLINE",
        "TRANSFORMERS_OFFLINE",
        "HF_DATASETS_OFFLINE",
    )
    kept = {name: value for name, value in os.environ.items() if name not in left_out}
    own = {"HF_ENDPOINT": hub.address, "HF_HOME": str(folder / "hf"), "HF_MODULES_CACHE": str(folder / "modules")}
    return {**kept, "OMP_NUM_THREADS": "1", "HF_HUB_DISABLE_TELEMETRY": "1", **own, **more}


@pytest.fixture(scope="module")
def pushed(tmp_path_factory, hub) -> tuple[Path, str]:
    """The folder in which a run trained and pushed, and all it printed, with every debug line of every library."""
    folder = tmp_path_factory.mktemp("pushed")
    command = [sys.executable, str(REPO_ROOT / "train_sft.py"), *RUN, "--output_dir", "stage1"]
    command += [
        "--save_strategy",
        "steps",
        "--save_steps",
        "1",
        "--dataloader_num_workers",
        "0",
        "--push_to_hub",
        "true",
    ]
    command += ["--hub_token", TOKEN]
    verbose = {"HF_HUB_VERBOSITY": "debug", "HF_DEBUG": "1", "TRANSFORMERS_VERBOSITY": "debug"}
    ran = subprocess.run(command, cwd=folder, env=environment(folder, hub, **verbose), capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    return folder, ran.stdout + ran.stderr


def test_a_run_pushes_a_complete_checkpoint_to_a_branch_of_its_stage(pushed, hub):
    folder, _ = pushed
    files = hub.files[f"{USER}/tiny", "stage-1"]
    assert {
        "README.md",
        "config.json",
        "model.safetensors",
        "modeling_siq_vl.py",
        "configuration_siq_vl.py",
        "processing_siq_vl.py",
        "tokenizer.json",
        "chat_template.jinja",
        "training_settings.json",
        "training_log.jsonl",
        "learning_curve.svg",
    } <= files.keys()
    assert not any(name.startswith(("checkpoint-", ".incomplete", "runs", "samples")) for name in files)
    for name, content in files.items():
        if name != ".gitattributes":
            assert content == (folder / "stage1" / name).read_bytes(), name
    assert hub.commits[f"{USER}/tiny", "stage-1"] == ["Stage 1 of recipe tiny"]


def test_what_failed_was_tried_again(pushed, hub):
    _, printed = pushed
    assert len([path for path in hub.troubled if "/repos/create" not in path]) == 2  # other tests trouble these
    assert "trying again" in printed or "Retrying in" in printed  # newer clients do some of it themselves


def test_the_token_is_in_no_log_and_in_no_file(pushed, hub):
    folder, printed = pushed
    assert TOKEN not in printed
    for path in folder.rglob("*"):
        if path.is_file():
            assert TOKEN.encode() not in path.read_bytes(), path
    for files in hub.files.values():
        assert not any(TOKEN.encode() in content for content in files.values())


def test_nothing_names_the_machine(pushed, hub):
    folder, _ = pushed
    for name, content in hub.files[f"{USER}/tiny", "stage-1"].items():
        for private in (str(folder), str(REPO_ROOT)):
            assert private.encode() not in content, name


def test_a_stranger_loads_what_was_pushed(pushed, hub, tmp_path):
    program = f"""
import transformers
from transformers import AutoProcessor
name = "AutoModelForVision2Seq" if transformers.__version__.startswith("4.") else "AutoModelForImageTextToText"
options = {{"revision": "stage-1", "trust_remote_code": True}}
model = getattr(transformers, name).from_pretrained("{USER}/tiny", **options)
processor = AutoProcessor.from_pretrained("{USER}/tiny", **options)
print(type(model).__name__, type(processor).__name__, float(sum(weight.double().sum() for weight in model.parameters())))
"""
    command = [sys.executable, "-I", "-c", program]
    ran = subprocess.run(command, cwd=tmp_path, env=environment(tmp_path, hub), capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    names, _, weights = ran.stdout.strip().rpartition(" ")
    assert names == "SiQVLForConditionalGeneration SiQVLProcessor"
    from siq_vl.modeling_siq_vl import SiQVLForConditionalGeneration

    local = SiQVLForConditionalGeneration.from_pretrained(pushed[0] / "stage1")
    assert float(weights) == float(sum(weight.double().sum() for weight in local.parameters()))


def test_the_card_says_how_to_load_this_very_checkpoint(pushed, hub):
    card = hub.files[f"{USER}/tiny", "stage-1"]["README.md"].decode()
    assert f'from_pretrained("{USER}/tiny", revision="stage-1", trust_remote_code=True)' in card
    metadata = yaml.safe_load(card.split("---")[1])
    assert metadata["pipeline_tag"] == "image-text-to-text" and metadata["library_name"] == "transformers"
    assert metadata["license"] == "apache-2.0" and "stage-1" in metadata["tags"]
    assert "![training loss](learning_curve.svg)" in card
    assert "| figures | 100.0% | 4 | 4 of 4 | none |" in card
    assert "| samples a step | 2 |" in card


@pytest.fixture
def checkpoint_folder(pushed, tmp_path) -> Path:
    """A copy of the trained checkpoint, without its trainer's checkpoints."""
    for path in (pushed[0] / "stage1").iterdir():
        if path.is_file():
            (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


@pytest.fixture
def here(hub, monkeypatch):
    """`push_stage` in this process, at the fake Hub."""
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.address)
    monkeypatch.setattr(pushing.time, "sleep", lambda seconds: None)


def test_scores_go_into_the_card_and_its_metadata(checkpoint_folder, hub, here):
    (checkpoint_folder / "scores.json").write_text(json.dumps({"ChartQA": {"accuracy": 61.5}}))
    address = push_stage(checkpoint_folder, repo_id="team/scored", revision="main", token=TOKEN)
    card = hub.files["team/scored", "main"]["README.md"].decode()
    assert address.startswith(f"{hub.address}/team/scored/commit/")
    assert "| ChartQA | accuracy | 61.5 |" in card and 'from_pretrained("team/scored", trust_remote_code' in card
    (entry,) = yaml.safe_load(card.split("---")[1])["model-index"]
    assert entry["results"][0]["metrics"][0] == {"type": "accuracy", "value": 61.5}


def test_pushing_again_changes_the_same_branch(checkpoint_folder, hub, here):
    for _ in range(2):
        push_stage(checkpoint_folder, repo_id="team/twice", token=TOKEN)
    assert ("team/twice", "stage-1") in hub.files


def test_a_refusal_ends_it_at_once_and_names_no_token(checkpoint_folder, here, caplog):
    caplog.set_level(logging.DEBUG)
    with pytest.raises(
        ValueError, match="the Hub refuses create_repo .*check the repository's name and that the token"
    ):
        push_stage(checkpoint_folder, repo_id="team/refused", token="hf_anotherToken")
    assert "hf_anotherToken" not in caplog.text and "trying again" not in caplog.text


@pytest.mark.parametrize("answer", [503, "drop"])
def test_after_the_last_attempt_it_says_that_nothing_is_lost(checkpoint_folder, hub, here, caplog, answer):
    hub.trouble["/repos/create"] = [answer] * 100
    with pytest.raises(ValueError, match="create_repo failed 3 times .*complete on disk; run the same command again"):
        push_stage(checkpoint_folder, repo_id="team/never", token=TOKEN, attempts=3)
    hub.trouble["/repos/create"] = []
    assert caplog.text.count("trying again") == 2
    assert TOKEN not in caplog.text


def test_a_folder_without_a_checkpoint_is_not_pushed(tmp_path):
    with pytest.raises(ValueError, match="holds no checkpoint"):
        push_stage(tmp_path)


def settings(**changes) -> dict:
    training = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4, "learning_rate": 1e-3, "seed": 1}
    basic = {"stage": "2", "recipe": "siq-vl-0.5b", "seconds": 1.0, "steps": 5, "final_loss": 2.0, "adapter": None}
    return {**basic, "training": training, "model": {}, "data": {}, **changes}


def test_a_card_names_backbones_and_data_sets_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = settings(
        backbones={"vision_tower": "google/siglip2-large-patch16-512", "language_model": "backbones/qwen2.5-tiny"},
        data={"sources": [{"path": "HuggingFaceM4/FineVision"}, {"path": "figures"}, {"path": "/data/mine.jsonl"}]},
    )
    metadata = yaml.safe_load(model_card(made).split("---")[1])
    assert metadata["base_model"] in ("google/siglip2-large-patch16-512", ["google/siglip2-large-patch16-512"])
    assert metadata["datasets"] == ["HuggingFaceM4/FineVision"]


def test_a_card_of_random_weights_says_so():
    assert "**Random weights.**" in model_card(settings(model={"random_weights": True}))
    assert "Random weights" not in model_card(settings())
