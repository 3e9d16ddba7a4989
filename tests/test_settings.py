"""What a run's settings add up to: samples a step, losses by source, what is held out, what a finished stage says of itself."""

from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset, IterableDataset
from svg import points_in

from siq_vl.loading import load_checkpoint
from siq_vl.plots import COLOURS, learning_curve_plot
from siq_vl.training import checkpoints, run
from siq_vl.training.loss import sums_by_sample
from siq_vl.training.recipes import parse_recipe
from siq_vl.training.settings import arrange_batches, keep_effective_batch
from siq_vl.training.starting_model import load_for_stage
from siq_vl.training.stored_features import times_read
from siq_vl.training.trainer import SiQVLTrainer


@pytest.fixture(scope="module")
def recipe():
    options = ["--stage", "1", "--max_steps", "10", "--seed", "7", "--output_dir", "somewhere"]
    return parse_recipe(("1",), [*options, "--hub_token", "hf_secret"])


def counted(batch: int, accumulation: int, processes: int, **more) -> SimpleNamespace:
    training = {"train_batch_size": batch, "per_device_train_batch_size": batch, "world_size": processes}
    return SimpleNamespace(**training, gradient_accumulation_steps=accumulation, **more)


def test_samples_a_step_are_those_of_all_devices_and_passes():
    training = counted(2, 3, 4, max_steps=5, num_train_epochs=2)
    many = SimpleNamespace(training=training, data=SimpleNamespace(train_samples=0), traces=None)
    assert checkpoints.samples_a_step(many) == 24
    assert run.rows_needed(many) == 120
    assert times_read(many, rows=60, distinct=40) == 3
    training.max_steps = -1
    assert times_read(many, rows=60, distinct=40) == 3
    many.data.train_samples = 50
    assert run.rows_needed(many) == 50


@pytest.mark.parametrize(("batch", "processes", "wanted"), [(4, 2, 32), (8, 1, 24), (2, 4, 8), (16, 2, 8)])
def test_the_effective_batch_is_batch_times_accumulation_times_processes(batch, processes, wanted):
    training = counted(batch, 1, processes)
    keep_effective_batch(training, wanted)
    assert training.per_device_train_batch_size <= batch
    assert training.per_device_train_batch_size * training.gradient_accumulation_steps * processes == wanted


@pytest.mark.parametrize(("batch", "accumulation", "buffer"), [(4, 6, 32), (4, 6, 7), (8, 3, 9), (1, 5, 3)])
def test_a_packed_step_takes_as_many_samples(batch, accumulation, buffer):
    training = counted(batch, accumulation, 1, packing=False, padding_free=False)
    arrange_batches(training, SimpleNamespace(batching="packed", pack_buffer=buffer))
    assert training.per_device_train_batch_size * training.gradient_accumulation_steps == batch * accumulation
    assert training.per_device_train_batch_size <= max(buffer, 1)


@pytest.mark.parametrize("name", ["packing", "padding_free"])
@pytest.mark.parametrize("batching", ["padded", "packed"])
def test_packing_of_text_alone_is_refused(name, batching):
    training = counted(4, 6, 1, **{"packing": False, "padding_free": False, name: True})
    with pytest.raises(ValueError, match=f"{name} is true, but TRL packs text alone"):
        arrange_batches(training, SimpleNamespace(batching=batching, pack_buffer=8))


def test_a_run_goes_on_with_the_same_settings_alone(recipe):
    settings = checkpoints.run_settings(recipe)
    decide = "max_steps learning_rate seed data_seed max_length lr_scheduler_type warmup_steps optim weight_decay bf16"
    for name in decide.split():
        assert f"training.{name}" in settings
    assert settings["training.seed"] == 7 and settings["stage"] == "1"
    assert settings["samples a step"] == checkpoints.samples_a_step(recipe)
    assert {"model.vision_tower", "adapter.lora_r", "data.sources"} <= settings.keys()


def test_a_finished_stage_says_how_fast_it_was_and_what_came_of_it(recipe):
    history = [{"loss": 3.0, "step": 1}, {"loss": 1.5, "step": 10, "num_tokens": 500.0}, {"eval_loss": 9.0}]
    state = SimpleNamespace(log_history=history, global_step=10, best_model_checkpoint=None)
    model = SimpleNamespace(config=SimpleNamespace(text_config=SimpleNamespace(model_type="qwen2")))
    done = SimpleNamespace(state=state, args=SimpleNamespace(load_best_model_at_end=False), model=model)
    made = checkpoints._settings(done, recipe, 5.0, None, None, None)
    samples = checkpoints.samples_a_step(recipe)
    assert made["final_loss"] == 1.5 and made["steps"] == 10 and made["effective_batch_size"] == samples
    assert made["speed"]["samples_per_second"] == round(10 * samples / 5, 3)
    assert made["speed"]["tokens_per_second"] == 100.0
    resumed = checkpoints._settings(done, recipe, 5.0, 4, None, None)["speed"]
    assert resumed["samples_per_second"] == round(4 * samples / 5, 3) and "tokens_per_second" not in resumed
    assert "hf_secret" not in str(made) and not {"hub_token", "push_to_hub_token"} & made["training"].keys()
    assert recipe.hub.token == "hf_secret" and recipe.training.hub_token is None


def test_sums_are_of_each_sample_padded_or_packed():
    losses = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 0.0]])
    assert sums_by_sample(losses, None).tolist() == [6, 9]
    # Two samples of three and two tokens: the entry before a restart belongs to what is predicted, the next sample.
    packed, positions = torch.tensor([[1.0, 2.0, 0.0, 5.0]]), torch.tensor([[0, 1, 2, 0, 1]])
    assert sums_by_sample(packed, positions).tolist() == [3, 5]
    assert sums_by_sample(torch.tensor([[1.0, 2.0, 9.0, 5.0]]), positions).tolist() == [3, 14]


def test_the_loss_of_a_source_is_the_mean_over_its_tokens_since_the_last_time():
    sums = {"a": torch.tensor([6.0, 3.0]), "b": torch.tensor([5.0, 1.0]), "c": torch.tensor([0.0, 0.0])}
    training = SimpleNamespace(_source_sums=dict(sums))
    assert SiQVLTrainer._loss_by_source(training) == {"loss/a": 2.0, "loss/b": 5.0, "loss/c": 0.0}
    assert SiQVLTrainer._loss_by_source(training) == {}


def test_what_is_held_out_is_not_trained_on():
    rows = Dataset.from_dict({"number": list(range(10))})
    asked = SimpleNamespace(
        run=SimpleNamespace(sample_count=3, sample_steps=1),
        data=SimpleNamespace(sources=[SimpleNamespace(path="mine.jsonl")], blind=False),
    )
    train, held_out = run.hold_out(asked, SimpleNamespace(rows=rows), "answer")
    assert [row["number"] for row in held_out] == [0, 1, 2] and train["number"] == list(range(3, 10))
    stream = IterableDataset.from_generator(lambda: ({"number": number} for number in range(10)))
    train, held_out = run.hold_out(asked, SimpleNamespace(rows=stream), "answer")
    assert [row["number"] for row in held_out] == [0, 1, 2]
    assert [row["number"] for row in train] == list(range(3, 10))
    few = SimpleNamespace(rows=rows.select(range(4)))
    train, held_out = run.hold_out(asked, few, "answer")
    assert (len(held_out), len(train)) == (2, 2)


def test_curves_fall_where_losses_do():
    history = [{"loss": 2.0, "loss/a": 3.0, "step": 1, "grad_norm": 9.0}, {"loss": 1.0, "loss/a": 0.5, "step": 5}]
    curves = checkpoints.loss_curves([*history, {"eval_loss": 1.0, "step": 5}])
    assert curves == {"loss": [(1, 2.0), (5, 1.0)], "loss/a": [(1, 3.0), (5, 0.5)]}
    drawn = learning_curve_plot(curves, "title")
    whole, of_a = points_in(drawn, COLOURS[0]), points_in(drawn, COLOURS[1])
    assert whole[1][1] > whole[0][1] and of_a[0][1] < whole[0][1]  # down is up in an SVG
    assert whole[0][0] == of_a[0][0] < whole[1][0]
    assert ">loss 1.000<" in drawn and ">loss/a 0.500<" in drawn


def test_the_fresh_projector_is_that_of_the_seed():
    def projector(seed: int) -> torch.Tensor:
        options = ["--stage", "1", "--seed", str(seed), "--output_dir", "somewhere"]
        return load_for_stage(parse_recipe(("1",), options))[0].model.projector.linear.weight

    torch.manual_seed(5)
    first = projector(7)
    torch.manual_seed(6)
    assert torch.equal(first, projector(7)) and not torch.equal(first, projector(8))


def test_what_is_loaded_for_answers_is_in_evaluation_mode(checkpoint):
    model, _ = load_checkpoint(str(checkpoint))
    assert not model.training
