"""A run that is ended at any moment goes on from its last whole checkpoint, as if it had never been ended.

Each run is a process of its own, which is really killed. The processes are forked from one that has imported
everything, so that a run takes a second.
"""

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from siq_vl.training.resume import MARKER, discard_incomplete, is_complete, last_complete_checkpoint, mark_complete

REPO_ROOT = Path(__file__).resolve().parent.parent
STEPS, SAVED_EVERY = 8, 2

# Reads one JSON object a line, forks a run for each, and answers with how the run ended.
SERVER = """
import json, os, resource, signal, sys
sys.path.insert(0, {root!r})
import torch
torch.set_num_threads(1)
from transformers import TrainerCallback
import train_sft
from siq_vl import cli
from siq_vl.training import run
from siq_vl.training.trainer import SiQVLTrainer

class Event(TrainerCallback):
    def __init__(self, kind, step):
        self.kind, self.step = kind, step
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            if self.kind == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if self.kind == "interrupt":
                signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever runs the tests may ignore it
                os.kill(os.getpid(), signal.SIGINT)
            if self.kind == "disk full":
                resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))

def kill_while_saving(step):
    original = SiQVLTrainer._save_rng_state
    def save(self, folder):
        if self.state.global_step == step:
            os.kill(os.getpid(), signal.SIGKILL)
        original(self, folder)
    SiQVLTrainer._save_rng_state = save

def start(job):
    made = run.make_trainer
    def make_trainer(*arguments):
        trainer = made(*arguments)
        trainer.add_callback(Event(job["kind"], job["step"]))
        return trainer
    run.make_trainer = make_trainer
    if job["kind"] == "kill while saving":
        kill_while_saving(job["step"])
    sys.argv = ["train_sft.py", *job["arguments"]]
    sys.stdout = sys.stderr
    cli.run(train_sft.main)

for line in sys.stdin:
    job = json.loads(line)
    child = os.fork()
    if child == 0:
        log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1), os.dup2(log, 2)
        status = 1
        try:
            start(job)
            status = 0
        except SystemExit as ended:
            status = ended.code if isinstance(ended.code, int) else 2
            print(ended, file=sys.stderr)
        except BaseException:
            import traceback
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Runs:
    """Runs of `train_sft.py` on a few steps of recipe `tiny`."""

    def __init__(self, folder: Path):
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
        environment.pop("ACCELERATE_MIXED_PRECISION", None)
        self.folder = folder
        self.errors = (folder / "server.log").open("w")
        self.server = subprocess.Popen(
            [sys.executable, "-c", SERVER.format(root=str(REPO_ROOT))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
            cwd=folder,
            env=environment,
        )

    def run(self, output: str, *overrides: str, kind: str = "", step: int = 0, stage: str = "1") -> int:
        """Run to the end, or to what happens at a step; return the exit status, the negative signal where killed."""
        arguments = ["--stage", stage, "--output_dir", output, "--max_steps", str(STEPS), "--effective_batch_size", "2"]
        arguments += ["--logging_steps", "1", "--save_strategy", "steps", "--save_steps", str(SAVED_EVERY)]
        arguments += ["--save_total_limit", "2", "--dataloader_num_workers", "0", "--warmup_steps", "2", *overrides]
        job = {"arguments": arguments, "kind": kind, "step": step, "log": str(self.folder / "run.log")}
        self.server.stdin.write(json.dumps(job) + "\n")
        self.server.stdin.flush()
        answer = self.server.stdout.readline()
        assert answer, (self.folder / "server.log").read_text()
        return int(answer)

    @property
    def log(self) -> str:
        return (self.folder / "run.log").read_text()

    def losses(self, output: str) -> list[tuple[int, float, float]]:
        lines = (self.folder / output / "training_log.jsonl").read_text().splitlines()
        entries = [entry for entry in map(json.loads, lines) if "loss" in entry]
        return [(entry["step"], entry["loss"], entry["grad_norm"]) for entry in entries]

    def close(self) -> None:
        self.server.stdin.close()
        self.server.wait()
        self.errors.close()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    runs = Runs(tmp_path_factory.mktemp("runs"))
    yield runs
    runs.close()


@pytest.fixture(scope="module")
def uninterrupted(runs) -> list[tuple[int, float, float]]:
    assert runs.run("whole") == 0, runs.log
    losses = runs.losses("whole")
    assert [step for step, _, _ in losses] == list(range(1, STEPS + 1))
    return losses


def test_killed_at_random_steps_it_goes_on_as_if_it_had_not_been(runs, uninterrupted):
    """Five kills, all in one run; another seed draws other steps."""
    steps = sorted(random.Random(0).sample(range(1, STEPS), 5))
    for step in steps:
        assert runs.run("killed", kind="kill", step=step) == -signal.SIGKILL, runs.log
        assert not (runs.folder / "killed" / "config.json").exists()
    assert runs.run("killed") == 0, runs.log
    if steps[-1] > SAVED_EVERY:
        assert "going on from" in runs.log
    assert runs.losses("killed") == uninterrupted, steps


def test_killed_while_it_saves_it_passes_over_the_half_written_checkpoint(runs, uninterrupted):
    assert runs.run("halved", kind="kill while saving", step=4) == -signal.SIGKILL, runs.log
    half = runs.folder / "halved" / "checkpoint-4"
    assert half.exists() and not is_complete(half)
    assert runs.run("halved") == 0, runs.log
    assert "checkpoint-4 is not complete" in runs.log and "after step 2" in runs.log
    assert runs.losses("halved") == uninterrupted


def test_interrupted_it_says_how_to_go_on_and_does(runs, uninterrupted):
    assert runs.run("interrupted", kind="interrupt", step=5) == 130, runs.log
    assert "goes on from its last checkpoint when the same command is given again" in runs.log
    assert last_complete_checkpoint(runs.folder / "interrupted").name == "checkpoint-4"
    assert runs.run("interrupted") == 0, runs.log
    assert runs.losses("interrupted") == uninterrupted


def test_a_full_disk_leaves_the_last_good_checkpoint(runs, uninterrupted):
    """The limit on the size of files makes writing fail as a full disk does, in the middle of a file."""
    assert runs.run("full", kind="disk full", step=3) == 2  # in one line
    assert "the checkpoint of step 4 could not be written" in runs.log
    assert "the last complete one is full/checkpoint-2" in runs.log
    assert last_complete_checkpoint(runs.folder / "full").name == "checkpoint-2"
    assert runs.run("full") == 0, runs.log
    assert runs.losses("full") == uninterrupted


def test_stage_2_goes_on_with_its_adapter(runs, uninterrupted):
    options = ("--model_name_or_path", "whole", "--lora_dropout", "0.1")
    assert runs.run("second", *options, stage="2") == 0, runs.log
    assert runs.run("second-killed", *options, stage="2", kind="kill", step=5) == -signal.SIGKILL
    assert runs.run("second-killed", *options, stage="2") == 0, runs.log
    assert runs.losses("second-killed") == runs.losses("second")


def test_other_settings_do_not_go_on_from_these_checkpoints(runs, uninterrupted):
    assert runs.run("whole", "--learning_rate", "1e-4") == 2
    assert "was made with training.learning_rate = 0.01, and now it is 0.0001" in runs.log
    assert "pass another --output_dir, or remove the checkpoints" in runs.log
    assert runs.losses("whole") == uninterrupted


def test_old_checkpoints_are_removed_but_the_last_two(runs, uninterrupted):
    kept = sorted(path.name for path in (runs.folder / "whole").glob("checkpoint-*"))
    assert kept == [f"checkpoint-{STEPS - SAVED_EVERY}", f"checkpoint-{STEPS}"]


def make_checkpoint(folder: Path, step: int, complete: bool = True) -> Path:
    checkpoint = folder / f"checkpoint-{step}"
    checkpoint.mkdir(parents=True)
    (checkpoint / "model.safetensors").write_bytes(b"0" * 100)
    (checkpoint / "trainer_state.json").write_text("{}")
    if complete:
        mark_complete(checkpoint, step, {})
    return checkpoint


@pytest.mark.parametrize("harm", ["cut", "removed", "no marker", "half a marker"])
def test_a_checkpoint_with_anything_missing_is_not_complete(tmp_path, harm):
    checkpoint = make_checkpoint(tmp_path, 100)
    assert is_complete(checkpoint)
    if harm == "cut":
        (checkpoint / "model.safetensors").write_bytes(b"0" * 99)
    elif harm == "removed":
        (checkpoint / "trainer_state.json").unlink()
    elif harm == "no marker":
        (checkpoint / MARKER).unlink()
    else:
        (checkpoint / MARKER).write_text((checkpoint / MARKER).read_text()[:20])
    assert not is_complete(checkpoint)


def test_the_last_complete_checkpoint_is_the_newest_by_step(tmp_path):
    assert last_complete_checkpoint(tmp_path) is None
    for step in (1000, 200, 90):
        make_checkpoint(tmp_path, step)
    make_checkpoint(tmp_path, 1100, complete=False)
    (tmp_path / "checkpoint-best").mkdir()
    assert last_complete_checkpoint(tmp_path).name == "checkpoint-1000"
    discard_incomplete(tmp_path)
    assert not (tmp_path / "checkpoint-1100").exists()
    assert (tmp_path / "checkpoint-best").exists() and (tmp_path / "checkpoint-200").exists()
