"""What is written: all or nothing, and in an order in which a kill at any moment leaves something sound behind."""

import json
import os
from pathlib import Path
from types import SimpleNamespace

import pyarrow.parquet as pq
import pytest
import torch
from conftest import REPO_ROOT

from siq_vl.data.feature_cache.store import FeatureLayout, FeatureStore, FeatureWriter, _replace
from siq_vl.distill import traces
from siq_vl.distill.schema import FEATURES
from siq_vl.distill.traces import TraceStore
from siq_vl.evaluation import predictions as kept
from siq_vl.evaluation.held_out import held_out_items
from siq_vl.files import write_text
from siq_vl.pretraining import loop
from siq_vl.results import write_results
from siq_vl.training import checkpoints, resume, trainer

LAYOUT = FeatureLayout(2, 2, 8, "float32")


class Killed(BaseException):
    """Stands for the end of the process."""


@pytest.fixture
def killed_before_it_is_in_place(monkeypatch):
    """Ends whatever would put a file in its place."""

    def kill(*arguments) -> None:
        raise Killed

    def arm() -> None:
        monkeypatch.setattr(os, "replace", kill)

    return arm


def trace(number: int) -> dict:
    row = {name: "" for name in FEATURES}
    row |= {"trace_id": f"{number:016x}", "sample_id": f"sample {number}", "images": [b"bytes"], "hinted": False}
    row |= {name: [] for name in ("image_paths", "golds", "choices", "rejected_by")}
    row |= {name: 0 for name in ("repeat", "prompt_tokens", "completion_tokens", "attempts", "rationale_tokens")}
    return {**row, "seconds": 0.0, "agreement": None, "verdict": "kept"}


def test_files_are_whole_or_as_they_were(tmp_path, killed_before_it_is_in_place):
    items = held_out_items(5)[:2]
    before, after = ([kept.judge(item, said) for item in items] for said in ("red", "blue"))
    with TraceStore(tmp_path / "store") as store:
        store.append(trace(1))
        store.seal()
        (shard,) = store.shards()
        table = pq.read_table(shard)
        writers = {
            "predictions.jsonl": lambda path, new: kept.write_predictions(after if new else before, path),
            "text.md": lambda path, new: write_text(path, "new" if new else "old"),
            "about.json": lambda path, new: _replace(path, b"new" if new else b"old"),
            "results.json": lambda path, new: write_results(path, {}, {"text": "new" if new else "old"}),
            "shard.parquet": lambda path, new: store.rewrite(path, table if new else table.slice(0, 0)),
        }
        for name, write in writers.items():
            write(tmp_path / name, False)
        old = {name: (tmp_path / name).read_bytes() for name in writers}
        killed_before_it_is_in_place()
        for name, write in writers.items():
            with pytest.raises(Killed):
                write(tmp_path / name, True)
            assert (tmp_path / name).read_bytes() == old[name], name


def test_the_shard_is_on_disk_before_it_is_in_place_and_before_the_journal_goes(tmp_path, monkeypatch):
    done = []
    fsync, replace = os.fsync, os.replace

    def noted_fsync(file: int) -> None:
        done.append(f"on disk: {Path(os.readlink(f'/proc/self/fd/{file}')).suffix} {os.fstat(file).st_size > 0}")
        fsync(file)

    def noted_replace(source, target) -> None:
        done.append(f"in place: {Path(target).suffix}, {len(list((tmp_path / 'journal').glob('*.jsonl')))} journals")
        replace(source, target)

    with TraceStore(tmp_path) as store:
        store.append(trace(1))
        monkeypatch.setattr(traces.os, "fsync", noted_fsync)
        monkeypatch.setattr(traces.os, "replace", noted_replace)
        store.seal()
    assert done == ["on disk: .tmp True", "in place: .parquet, 2 journals"]


def test_a_journal_whose_shard_could_not_be_written_stays(tmp_path, monkeypatch):
    store = TraceStore(tmp_path)
    store.append(trace(1))
    store.append(trace(2))
    assert len(store._journal.read_bytes().splitlines()) == 2
    write = store._write

    def full_disk(*arguments) -> None:
        raise OSError("no space left")

    store._write = full_disk
    with pytest.raises(OSError, match="no space left"):
        store.seal()
    store._write = write
    store.close()
    with TraceStore(tmp_path) as again:
        assert again.trace_ids() == {1, 2}


def test_entries_are_written_after_the_features_they_name_are_on_disk(tmp_path, monkeypatch):
    FeatureStore(tmp_path, LAYOUT)
    writer = FeatureWriter(tmp_path, LAYOUT, flush_seconds=1e9)
    names = {writer._features.fileno(): "features", writer._index.fileno(): "index"}
    (file,) = tmp_path.glob("*.features")
    (index,) = tmp_path.glob("*.index")
    done, fsync = [], os.fsync

    def noted(number: int) -> None:
        done.append((names[number], file.stat().st_size, index.stat().st_size > 0))
        fsync(number)

    monkeypatch.setattr(os, "fsync", noted)
    for number in range(3):
        packed = LAYOUT.pack(torch.randn(2, 4, 8))
        writer.add(number.to_bytes(16, "little"), (4, 4), packed)
    writer.flush()
    size = 6 * LAYOUT.tile_bytes
    assert done == [("features", size, False), ("index", size, True)]
    writer.close()


def test_a_waiting_picture_is_put_on_disk_in_time(tmp_path):
    store = FeatureStore(tmp_path, LAYOUT)
    with FeatureWriter(tmp_path, LAYOUT, flush_seconds=0) as writer:
        writer.add((7).to_bytes(16, "little"), (4, 4), LAYOUT.pack(torch.randn(1, 4, 8)))
        store.refresh()
        assert store.find((7).to_bytes(16, "little")) is not None


@pytest.fixture
def scratch(tmp_path):
    """A finished stage's scratch folder, beside what another run left of an earlier one."""
    folder = tmp_path / "stage"
    made = folder / ".incomplete"
    (made / "adapter").mkdir(parents=True)
    for name in ("model.safetensors", "config.json", "a.json", "zzz.json", "adapter/adapter_config.json"):
        (made / name).write_text("new")
    (folder / "adapter").mkdir()
    for name in ("model.safetensors", "config.json", "before_after.md", "scores.json", "adapter/old.json"):
        (folder / name).write_text("old")
    return made


def test_config_json_is_the_last_to_be_moved(scratch, monkeypatch):
    moved, replace = [], os.replace
    monkeypatch.setattr(
        os, "replace", lambda source, target: moved.append(Path(target).name) or replace(source, target)
    )
    checkpoints._move_in_place(scratch, scratch.parent)
    assert moved[-1] == "config.json" and sorted(moved[:-1]) == ["a.json", "adapter", "model.safetensors", "zzz.json"]
    assert sorted(path.name for path in scratch.parent.iterdir()) == sorted(moved)  # what was measured before is gone
    assert [path.name for path in (scratch.parent / "adapter").iterdir()] == ["adapter_config.json"]


@pytest.mark.parametrize("after", range(5))
def test_a_half_moved_stage_has_no_config_json(scratch, monkeypatch, after):
    replace, moved = os.replace, []

    def killed_later(source, target) -> None:
        if len(moved) == after:
            raise Killed
        moved.append(target)
        replace(source, target)

    monkeypatch.setattr(os, "replace", killed_later)
    with pytest.raises(Killed):
        checkpoints._move_in_place(scratch, scratch.parent)
    assert not (scratch.parent / "config.json").exists()


# A trainer's checkpoints


def checkpoint(folder: Path, step: int, settings: dict) -> Path:
    made = folder / f"checkpoint-{step}"
    made.mkdir(parents=True)
    (made / "weights").write_text(f"weights of step {step}")
    (made / "optimizer").write_text("moments")
    resume.mark_complete(made, step, settings)
    return made


def test_the_marker_comes_last_and_lists_what_is_on_disk(tmp_path, monkeypatch):
    synced, fsync = [], os.fsync

    def noted(file: int) -> None:
        synced.append(Path(os.readlink(f"/proc/self/fd/{file}")).name)
        fsync(file)

    monkeypatch.setattr(os, "fsync", noted)
    made = checkpoint(tmp_path, 5, {"seed": 1})
    assert {"weights", "optimizer"} <= set(synced)
    assert json.loads((made / resume.MARKER).read_text())["files"] == {"weights": 17, "optimizer": 7}


@pytest.mark.parametrize("damage", ["weights", "optimizer"])
def test_a_checkpoint_with_one_short_file_is_not_whole(tmp_path, damage):
    made = checkpoint(tmp_path, 5, {})
    assert resume.is_complete(made)
    (made / damage).write_text("short")
    assert not resume.is_complete(made)
    (made / damage).unlink()
    assert not resume.is_complete(made)


def test_the_newest_whole_checkpoint_is_gone_on_from_and_others_go(tmp_path):
    for step in (9, 80, 100):
        checkpoint(tmp_path, step, {"seed": 1, "rate": 0.1})
    assert resume.checkpoint_to_resume(tmp_path, {"seed": 1, "rate": 0.1}).name == "checkpoint-100"
    (tmp_path / "checkpoint-100" / "weights").write_text("half")
    assert resume.checkpoint_to_resume(tmp_path, {"seed": 1, "rate": 0.1}).name == "checkpoint-80"
    resume.discard_incomplete(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-80", "checkpoint-9"]
    for other in ({"seed": 2, "rate": 0.1}, {"seed": 1}, {"seed": 1, "rate": 0.1, "more": 1}):
        with pytest.raises(ValueError, match="was made with"):
            resume.checkpoint_to_resume(tmp_path, other)


def test_a_checkpoint_is_marked_after_it_was_written(tmp_path, monkeypatch):
    done = []
    monkeypatch.setattr(trainer.SFTTrainer, "_save_checkpoint", lambda self, model, trial: done.append("written"))
    monkeypatch.setattr(trainer, "mark_complete", lambda folder, step, settings: done.append((folder.name, settings)))
    saving = SimpleNamespace(
        args=SimpleNamespace(output_dir=str(tmp_path), should_save=True),
        state=SimpleNamespace(global_step=3),
        accelerator=SimpleNamespace(wait_for_everyone=lambda: done.append("all are there")),
        run_settings={"seed": 1},
    )
    monkeypatch.setattr(
        trainer, "super", lambda: SimpleNamespace(_save_checkpoint=lambda *a: done.append("written")), raising=False
    )
    trainer.SiQVLTrainer._save_checkpoint(saving, None, None)
    assert done == ["written", "all are there", ("checkpoint-3", {"seed": 1})]


# Stage 0


def linear_losses(module: torch.nn.Linear):
    def losses_at(step: int) -> dict[str, torch.Tensor]:
        inputs = torch.randn(8, 3, generator=torch.Generator().manual_seed(step))
        return {
            "a": (module(inputs) - inputs.sum(1, keepdim=True)).float().pow(2).mean(),
            "b": module.weight.pow(2).sum(),
        }

    return losses_at


def stage_0(folder: Path, steps: int, **options) -> torch.nn.Linear:
    torch.manual_seed(0)
    module = torch.nn.Linear(3, 1)
    loop.run(module, linear_losses(module), folder, steps=steps, learning_rate=0.1, warmup=2, **options)
    return module


def test_an_interrupted_stage_0_ends_where_an_unbroken_one_does(tmp_path, monkeypatch):
    whole = stage_0(tmp_path / "whole", 12, save_every=4, log_every=4)
    stage_0(tmp_path / "parts", 12, save_every=100, log_every=4)
    (tmp_path / "parts" / "state.pt").unlink()
    replace, saved = os.replace, []

    def killed_at_the_second(source, target) -> None:
        if len(saved) == 1:
            raise Killed
        saved.append(target)
        replace(source, target)

    monkeypatch.setattr(os, "replace", killed_at_the_second)
    with pytest.raises(Killed):
        stage_0(tmp_path / "parts", 12, save_every=4, log_every=4)
    monkeypatch.setattr(os, "replace", replace)
    state = torch.load(tmp_path / "parts" / "state.pt", weights_only=True)
    assert state["step"] == 4
    state["seconds"] = 1000.0
    torch.save(state, tmp_path / "parts" / "state.pt")
    again = stage_0(tmp_path / "parts", 12, save_every=4, log_every=4)
    assert torch.equal(again.weight, whole.weight) and torch.equal(again.bias, whole.bias)
    lines = [json.loads(line) for line in (tmp_path / "parts" / "log.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] == 12 and lines[-1]["seconds"] >= 1000
    first = [json.loads(line) for line in (tmp_path / "whole" / "log.jsonl").read_text().splitlines()]
    assert [line["a"] for line in lines[-2:]] == [line["a"] for line in first[-2:]]


def test_stage_0_warms_up_and_cools_down_to_a_twentieth():
    rates = [loop.learning_rate_factor(step, 100, 10) for step in range(101)]
    assert rates[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert rates[10] == 1 and rates[55] == pytest.approx(0.525) and rates[100] == pytest.approx(0.05)


def test_stage_0_forgets_the_gradients_of_the_step_before(tmp_path):
    """Against AdamW's own steps on the same losses."""
    made = stage_0(tmp_path, 5, parameter_groups=None)
    torch.manual_seed(0)
    module = torch.nn.Linear(3, 1)
    losses_at = linear_losses(module)
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1, betas=(0.9, 0.98), weight_decay=0.01)
    for step in range(5):
        optimizer.param_groups[0]["lr"] = 0.1 * loop.learning_rate_factor(step, 5, 2)
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            losses = losses_at(step)
        (losses["a"] + losses["b"]).backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
    assert torch.allclose(made.weight, module.weight, atol=1e-6)


# A finished stage


def test_settings_name_what_was_run(tmp_path):
    history = [{"loss": 3.0, "step": 1}, {"loss": 1.5, "step": 2, "num_tokens": 500.0}]
    settings = json.loads((REPO_ROOT / "training_settings.json").read_text(encoding="utf-8"))
    checkpoints._write_records(tmp_path, settings, history)
    assert [json.loads(line) for line in (tmp_path / "training_log.jsonl").read_text().splitlines()] == history
    assert checkpoints._portable({"a": ["/some/where/here", "there", 1]}) == {"a": ["here", "there", 1]}


def test_a_saved_model_uses_its_cache_and_names_no_folder_of_this_machine(tmp_path):
    parts = SimpleNamespace(_name_or_path="/somewhere/tower"), SimpleNamespace(_name_or_path="/somewhere/decoder")
    saved = []
    config = SimpleNamespace(use_cache=False, vision_config=parts[0], text_config=parts[1])
    model = SimpleNamespace(config=config, save_pretrained=saved.append)
    checkpoints._save_model(model, SimpleNamespace(save_pretrained=saved.append), tmp_path)
    assert saved == [tmp_path] * 2 and config.use_cache is True
    assert [part._name_or_path for part in parts] == ["", ""]
