"""Packed rows: the losses and gradients of padded ones, no sample sees another, and a step takes the same samples."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset, IterableDataset
from safetensors.torch import load_file

from siq_vl.data import packing
from siq_vl.data.collation import ConversationCollator
from siq_vl.data.conversations import message
from siq_vl.data.packing import PackingCollator, check_attention, fill, first_fit_decreasing, padding_share
from siq_vl.planning.plan import plan
from siq_vl.training.recipes import Recipe, parse_recipe
from siq_vl.training.run import make_trainer

pytestmark = pytest.mark.usefixtures("own_precision")
REPO_ROOT = Path(__file__).resolve().parent.parent
TEXTS = ["a", "no", "two red squares on the left", "blue", "a long caption " * 6, "7", "it is not shown here", "yes"]
IMAGES = [1, 0, 2, 1, 1, 0, 0, 2]


@pytest.fixture
def samples(make_image) -> list[dict]:
    """Eight samples of three sources: with one picture, without, with two; very short ones and a long one."""
    return [
        {
            "images": [make_image(10 * index + each) for each in range(count)],
            "messages": [message("user", f"What {index}?", count), message("assistant", text)],
            "source": ("text", "one", "two")[count],
        }
        for index, (text, count) in enumerate(zip(TEXTS, IMAGES, strict=True))
    ]


def recipe_for(stage: str, folder: Path, *overrides: str) -> Recipe:
    arguments = ["--stage", stage, "--output_dir", str(folder), "--max_steps", "2", "--effective_batch_size", "8"]
    arguments += ["--per_device_train_batch_size", "4", "--logging_steps", "1", "--bf16", "false", "--optim", "sgd"]
    arguments += ["--lr_scheduler_type", "constant", "--warmup_steps", "0", "--learning_rate", "0.1"]
    return parse_recipe((stage,), [*arguments, "--dataloader_num_workers", "0", "--lora_r", "4", *overrides])


def trained(recipe: Recipe, model, processor, rows) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """Train; return the logged losses and gradient norms, and the weights that trained."""
    trainer = make_trainer(recipe, model, processor, rows)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    kept = {f"{n} {e['step']}": v for e in logs for n, v in e.items() if n.startswith("loss") or n == "grad_norm"}
    return kept, {n: p.detach() for n, p in trainer.model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("stage", ["1", "2"])
def test_packed_training_equals_padded(stage, attention, samples, make_model, processor, tmp_path):
    rows = Dataset.from_dict({"index": range(16)})
    rows = rows.with_transform(lambda batch: collected([samples[index % 8] for index in batch["index"]]))
    ways = {
        "padded": (),
        "packed": ("--batching", "packed", "--pack_tokens", "150"),  # several rows
        "whole": ("--batching", "packed", "--pack_tokens", "100000"),  # one row
        "pairs": ("--batching", "packed", "--pack_tokens", "150", "--pack_buffer", "2"),  # accumulated
    }
    results = {}
    for name, overrides in ways.items():
        model = make_model()
        model.set_attn_implementation(attention)
        results[name] = trained(recipe_for(stage, tmp_path / name, *overrides), model, processor, rows)
    logs, weights = results.pop("padded")
    assert {"loss 1", "loss/text 1", "loss/one 1", "loss/two 1", "grad_norm 2"} <= set(logs)
    assert logs["grad_norm 1"] > 0.1  # a step is large beside the tolerance of the weights
    for packed_logs, packed_weights in results.values():
        assert packed_logs.keys() == logs.keys()
        for name, value in logs.items():
            assert packed_logs[name] == pytest.approx(value, rel=2e-5, abs=2e-4 if name[:5] == "loss " else 0), name
        for name, weight in weights.items():
            torch.testing.assert_close(packed_weights[name], weight, rtol=1e-5, atol=2e-6)


def collected(rows: list[dict]) -> dict[str, list]:
    return {name: [row[name] for row in rows] for name in rows[0]}


def packed_rows(processor, samples, budget, **options):
    collate = PackingCollator(ConversationCollator(processor), budget, processor.image_token_id, **options)
    return collate([{name: value for name, value in row.items() if name != "source"} for row in samples])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_gradients_of_a_packed_row_are_those_of_its_samples(attention, samples, make_model, processor):
    model = make_model()
    model.set_attn_implementation(attention)
    collate = ConversationCollator(processor)

    def gradients(batches) -> tuple[float, dict[str, torch.Tensor]]:
        model.zero_grad()
        loss = sum(model(**batch, num_items_in_batch=100).loss for batch in batches)
        loss.backward()
        return loss.item(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    alone, expected = gradients([collate([row]) for row in samples])
    (row,) = packed_rows(processor, samples, 100_000)
    loss, found = gradients([row])
    assert loss == pytest.approx(alone, rel=1e-5)
    assert found.keys() == expected.keys()
    largest = max(value.abs().max() for value in expected.values())
    for name, value in expected.items():
        assert (found[name] - value).abs().max() < 1e-6 * largest, name


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_no_sample_sees_another(attention, samples, make_model, make_image, processor):
    model = make_model()
    model.set_attn_implementation(attention)
    (row,) = packed_rows(processor, samples, 100_000)
    bounds = [*(row["position_ids"][0] == 0).nonzero().flatten().tolist(), row["input_ids"].shape[1]]
    with torch.no_grad():
        before = model(**row).logits
        for changed in (0, 2, 3):  # pictures and text of one sample
            others = [dict(each) for each in samples]
            others[changed]["images"] = [make_image(90 + each) for each in range(IMAGES[changed])]
            (other,) = packed_rows(processor, others, 100_000)
            other["input_ids"][0, bounds[changed] + 1] = 40
            after = model(**other).logits
            for index in range(len(samples)):
                piece = slice(bounds[index], bounds[index + 1])
                difference = (after[:, piece] - before[:, piece]).abs().max()
                assert (difference > 1e-3) if index == changed else (difference == 0)


def test_rows_hold_whole_samples_with_their_images_in_order(samples, processor):
    plain = ConversationCollator(processor)
    long = max(plain([row])["input_ids"].numel() for row in samples)
    packed = packed_rows(processor, samples, long - 1, attention="flash_attention_2")
    assert len(packed) > 2
    assert packed["input_ids"].numel() == sum(plain([row])["input_ids"].numel() for row in samples)
    found = {}
    for row in packed:
        assert "attention_mask" not in row and row["use_cache"] is False
        starts = row["cu_seq_lens_q"].tolist()
        assert len(starts) == 2 or starts[-1] < long
        assert row["max_length_q"] == max(b - a for a, b in zip(starts, starts[1:], strict=False))
        taken = 0
        for start, end in zip(starts, starts[1:], strict=False):
            ids = row["input_ids"][:, start:end]
            assert row["position_ids"][0, start:end].tolist() == list(range(end - start))
            assert row["labels"][0, start] == -100
            count = int((ids == processor.image_token_id).sum()) // processor.image_seq_length
            images = row["pixel_values"][taken : taken + count] if count else None
            found[tuple(ids[0].tolist())] = row["labels"][:, start:end], images
            taken += count
        assert taken == (len(row["pixel_values"]) if "pixel_values" in row else 0)
    for sample in samples:
        alone = plain([sample])
        labels, images = found[tuple(alone["input_ids"][0].tolist())]
        assert torch.equal(labels, alone["labels"])
        if sample["images"]:
            assert torch.equal(images, alone["pixel_values"])


def test_features_and_further_tensors_of_tokens_are_packed_too(samples, processor):
    plain = ConversationCollator(processor)

    def with_features(rows):
        batch = plain(rows)
        pixels = batch.pop("pixel_values", None)
        if pixels is not None:
            batch["vision_features"] = pixels.flatten(1)[:, None, :8]
        return {**batch, "loss_weights": batch["input_ids"].float() / 7, "names": [row["source"] for row in rows]}

    (row,) = PackingCollator(with_features, 100_000, processor.image_token_id)(samples)
    assert torch.equal(row["loss_weights"], row["input_ids"].float() / 7)
    assert torch.equal(row["vision_features"], with_features(samples)["vision_features"])
    assert row["names"] == [sample["source"] for sample in samples]
    with pytest.raises(ValueError, match="scores cannot be packed"):
        PackingCollator(lambda rows: {**plain(rows), "scores": torch.ones(3)}, 100, processor.image_token_id)(samples)


def test_first_fit_decreasing():
    assert first_fit_decreasing([3, 9, 4, 4, 1, 12], 10) == [[5], [1, 4], [2, 3], [0]]
    lengths = torch.randint(1, 400, (500,), generator=torch.Generator().manual_seed(0)).tolist()
    rows = first_fit_decreasing(lengths, 512)
    assert sorted(index for row in rows for index in row) == list(range(500))
    assert all(sum(lengths[index] for index in row) <= 512 for row in rows)
    assert len(rows) <= 11 / 9 * -(-sum(lengths) // 512) + 1
    assert padding_share([2, 2, 4, 1], 2) == pytest.approx(1 - 9 / 12)
    assert fill([3, 5, 8, 2], 10, 4) == pytest.approx(18 / 20)


def test_a_stream_is_packed_by_the_loader_workers(samples, make_model, processor, tmp_path):
    rows = IterableDataset.from_generator(lambda: iter(samples * 2))
    losses = {}
    for batching in ("padded", "packed"):
        overrides = ["--batching", batching, "--pack_tokens", "150", "--dataloader_num_workers", "1"]
        losses[batching], _ = trained(recipe_for("1", tmp_path / batching, *overrides), make_model(), processor, rows)
    assert losses["packed"] == pytest.approx(losses["padded"], rel=3e-5)


def test_a_resumed_run_reads_what_it_would_have_read(samples, make_model, processor, tmp_path):
    rows = Dataset.from_dict({"index": range(16)})
    rows = rows.with_transform(lambda batch: collected([samples[index % 8] for index in batch["index"]]))
    overrides = ("--batching", "packed", "--pack_tokens", "150", "--max_steps", "6", "--save_strategy", "steps")
    recipe = recipe_for("1", tmp_path, *overrides, "--save_steps", "3", "--save_total_limit", "3")
    recipe.training.remove_unused_columns = False
    trainer = make_trainer(recipe, make_model(), processor, rows)
    trainer.train()
    resumed = make_trainer(recipe, make_model(), processor, rows)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    whole, part = ([e["loss"] for e in each.state.log_history if "loss" in e] for each in (trainer, resumed))
    assert len(set(whole)) == 6
    assert part == whole


def test_what_cannot_be_packed_is_refused(tmp_path, samples, make_model, processor):
    with pytest.raises(ValueError, match="batching is 'dense'; it must be one of padded"):
        recipe_for("1", tmp_path, "--batching", "dense")
    with pytest.raises(ValueError, match="pack_tokens is 0"):
        recipe_for("1", tmp_path, "--pack_tokens", "0")
    for name in ("packing", "padding_free"):
        with pytest.raises(ValueError, match=f"{name} is true, .*use batching: packed"):
            recipe_for("1", tmp_path, f"--{name}", "true")
    with pytest.raises(ValueError, match="'paged', which is not known"):
        check_attention("paged")
    recipe = recipe_for("1", tmp_path, "--batching", "packed", "--label_smoothing_factor", "0.1")
    with pytest.raises(ValueError, match="label_smoothing_factor"):
        make_trainer(recipe, make_model(), processor, Dataset.from_list([{"images": []}]))
    long = packed_rows(processor, samples, 1)
    assert len(long) == len(samples)  # longer than the budget: alone, not cut
    with pytest.raises(ValueError, match="more than max_length=5"):
        PackingCollator(ConversationCollator(processor, 5), 100, processor.image_token_id)(samples)


def test_a_step_takes_as_many_samples_however_they_are_packed(tmp_path):
    for overrides, expected in ((["--pack_buffer", "32"], (8, 1)), (["--pack_buffer", "5"], (4, 2)), ([], (8, 1))):
        training = recipe_for("1", tmp_path, "--batching", "packed", *overrides).training
        assert (training.per_device_train_batch_size, training.gradient_accumulation_steps) == expected


def test_the_plan_says_how_full_rows_are(tmp_path):
    text = plan(recipe_for("2", tmp_path, "--batching", "packed", "--pack_tokens", "256"), "answer")
    assert "% full" in text and "padding" in text


PROGRAM = """
import sys
root, folder, batching = sys.argv[1:]
sys.path.insert(0, root)
import torch
torch.set_num_threads(1)
from datasets import Dataset
from siq_vl.data.figures.dataset import sample
from siq_vl.data.figures.rows import row
from siq_vl.training.starting_model import load_for_stage
from siq_vl.training.recipes import parse_recipe
from siq_vl.training.run import make_trainer, train_and_save

def draw(batch):
    # Of each four samples, two are long captions, one of them with a picture, and two are short answers without.
    made = [row(sample("train", i, seed=9), ("caption", "answer")[i % 4 > 1], blind=i % 4 > 0) for i in batch["index"]]
    made = [{**each, "source": ("long", "short")[i % 4 > 1]} for i, each in zip(batch["index"], made)]
    return {name: [each[name] for each in made] for name in made[0]}

recipe = parse_recipe(("1",), ["--stage", "1", "--output_dir", folder, "--max_steps", "4", "--effective_batch_size", "8",
    "--per_device_train_batch_size", "2", "--logging_steps", "1", "--warmup_steps", "0", "--learning_rate", "1e-2",
    "--bf16", "false", "--dataloader_num_workers", "0", "--batching", batching, "--pack_tokens", "60", "--optim", "sgd",
    "--pack_buffer", "2"])
model, processor = load_for_stage(recipe)
rows = Dataset.from_dict({"index": range(16)}).with_transform(draw)
trainer = make_trainer(recipe, model, processor, rows)
if batching == "packed":
    original = trainer._as_many_everywhere
    trainer._as_many_everywhere = lambda rows: [print("rows", len(rows), file=sys.stderr), original(rows)][1]
train_and_save(trainer, processor, recipe)
"""


def test_two_processes_pack_unlike_numbers_of_rows_and_learn_what_one_learns(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    kept = {name: value for name, value in os.environ.items() if name != "ACCELERATE_MIXED_PRECISION"}
    environment = {**kept, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    two = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    logs, weights, rows = {}, {}, []
    for batching, launcher in (("padded", [sys.executable]), ("packed", two)):
        folder = tmp_path / batching
        command = [*launcher, str(program), str(REPO_ROOT), str(folder), batching]
        ran = subprocess.run(command, env=environment, cwd=REPO_ROOT, capture_output=True, text=True)
        assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr[-6000:]
        rows += [line for line in ran.stderr.splitlines() if line.startswith("rows ")]
        lines = map(json.loads, (folder / "training_log.jsonl").read_text().splitlines())
        logs[batching] = [line for line in lines if "loss" in line]
        weights[batching] = load_file(folder / "model.safetensors")
    assert {"rows 1", "rows 2"} <= set(rows)  # of two samples, so the processes differ
    for one, other in zip(logs["padded"], logs["packed"], strict=True):
        for name in ("loss", "loss/long", "loss/short", "grad_norm"):
            assert other[name] == pytest.approx(one[name], rel=1e-4, abs=1e-4)
    for name, weight in weights["padded"].items():
        torch.testing.assert_close(weights["packed"][name], weight, rtol=1e-5, atol=1e-5)


def test_batches_of_like_length_are_padded_less_and_the_same_after_a_resume(samples, make_model, processor, tmp_path):
    rows = Dataset.from_dict({"index": range(64)})
    rows = rows.with_transform(lambda batch: collected([samples[index % 8] for index in batch["index"]]))
    overrides = ["--batching", "length_grouped", "--effective_batch_size", "4", "--max_steps", "20"]
    trainer = make_trainer(recipe_for("1", tmp_path, *overrides), make_model(), processor, rows)
    collate = ConversationCollator(processor)
    assert trainer.lengths == [collate([rows[index]])["input_ids"].numel() for index in range(64)]
    loader = trainer.get_train_dataloader()
    epochs = {}
    for epoch in (0, 1, 0):
        loader.set_epoch(epoch)
        batches = [batch["attention_mask"] for batch in loader]
        padding = 1 - sum(mask.sum() for mask in batches) / sum(mask.numel() for mask in batches)
        assert padding < 0.5 * padding_share(trainer.lengths, 4)
        order = [mask.sum(dim=1).tolist() for mask in batches]
        assert sorted(sum(order, [])) == sorted(trainer.lengths)
        assert epochs.setdefault(epoch, order) == order
    assert epochs[0] != epochs[1]
    with pytest.raises(ValueError, match="a stream's lengths are not known"):
        stream = IterableDataset.from_generator(lambda: iter(samples))
        make_trainer(recipe_for("1", tmp_path, *overrides), make_model(), processor, stream)


def test_sdpa_attends_sample_by_sample(samples, make_model, processor, monkeypatch):
    model, widths, sdpa = make_model(), [], packing.sdpa_attention_forward

    def spy(module, query, *arguments, **options):
        widths.append(query.shape[2])
        return sdpa(module, query, *arguments, **options)

    monkeypatch.setattr(packing, "sdpa_attention_forward", spy)
    (row,) = packed_rows(processor, samples, 100_000, attention=packing.SDPA_BY_SAMPLE)
    config = model.language_model.config
    with torch.no_grad():
        whole = model(**row).logits
        assert not widths
        with packing.attend_by_sample(config):
            apart = model(**row).logits
    assert widths == row["sample_lengths"] * config.num_hidden_layers
    assert config._attn_implementation == "sdpa"
    torch.testing.assert_close(apart, whole, rtol=1e-5, atol=1e-5)
