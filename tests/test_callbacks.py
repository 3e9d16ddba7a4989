"""What is shown beside training: losses by source, answers to held-out rows, curves; none of it changes training."""

import json
from types import SimpleNamespace
from xml.etree import ElementTree

import pytest
import torch
from datasets import Dataset
from svg import number_of_points
from transformers.integrations import TensorBoardCallback, TrackioCallback, WandbCallback

from siq_vl.data.figures.dataset import sample
from siq_vl.data.figures.rows import row, training_rows
from siq_vl.plots import learning_curve_plot
from siq_vl.training.callbacks import Sample, samples_page, send_to_tracker
from siq_vl.training.checkpoints import loss_curves
from siq_vl.training.recipes import parse_recipe
from siq_vl.training.run import hold_out, make_trainer, mixture_for_stage, train_and_save
from siq_vl.training.starting_model import load_for_stage
from siq_vl.training.trainer import SourceCollator

SHORT = ("--max_steps", "4", "--effective_batch_size", "4", "--logging_steps", "1", "--dataloader_num_workers", "0")


def draw(batch: dict) -> dict[str, list]:
    made = [
        {**row(sample("train", index, seed=9), "answer"), "source": "even" if index % 2 == 0 else "odd"}
        for index in batch["index"]
    ]
    return {name: [each[name] for each in made] for name in made[0]}


def train(folder, *overrides: str):
    recipe = parse_recipe(("1",), [*SHORT, "--output_dir", str(folder), *overrides])
    model, processor = load_for_stage(recipe)
    rows = Dataset.from_dict({"index": range(16)}).with_transform(draw)
    trainer = make_trainer(recipe, model, processor, rows, list(training_rows("validation", 2, "answer")))
    train_and_save(trainer, processor, recipe)
    return [entry for entry in trainer.state.log_history if "loss" in entry], trainer


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shown")
    arguments = ("--sample_steps", "3", "--sample_count", "2", "--sample_tokens", "6", "--free_memory_steps", "1")
    return (*train(folder, *arguments), folder)


def test_showing_changes_nothing(shown, tmp_path):
    history, _ = train(tmp_path)
    assert [entry["loss"] for entry in history] == [entry["loss"] for entry in shown[0]]
    assert [entry["grad_norm"] for entry in history] == [entry["grad_norm"] for entry in shown[0]]


def test_each_source_has_its_loss(shown):
    history, trainer, _ = shown
    assert {"loss/even", "loss/odd"} <= set().union(*history)
    # On a batch of one source alone, its loss is the loss.
    batch = trainer.data_collator([trainer.train_dataset[index] for index in (0, 2, 4)])
    assert batch["source"] == ["even"] * 3
    trainer.model.train()
    with torch.no_grad():
        loss = trainer.compute_loss(trainer.model, trainer._prepare_inputs(batch))
    assert trainer._loss_by_source() == {"loss/even": pytest.approx(float(loss), rel=1e-5)}
    assert trainer._loss_by_source() == {}


def test_rows_without_a_source_are_collated_as_ever():
    collate = SourceCollator(lambda rows: {"columns": [sorted(row) for row in rows]})
    assert collate([{"a": 1}, {"a": 2, "source": "x"}]) == {"columns": [["a"], ["a"]]}
    assert collate([{"a": 2, "source": "x"}])["source"] == ["x"]


def test_answers_are_kept_at_intervals_and_at_the_end(shown):
    folder = shown[2]
    entries = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in entries] == [0, 3, 4]
    assert all(len(entry["answers"]) == 2 for entry in entries)
    page = (folder / "samples.html").read_text()
    assert page.count("<article>") == 2 and page.count("data:image/png;base64,") == 2
    assert page.count("<td>step ") == 6 and page.count("class=wanted") == 2
    assert "http" not in page


def test_the_curve_is_left_in_the_output_folder(shown):
    tree = ElementTree.fromstring((shown[2] / "learning_curve.svg").read_text())
    lines = [element for element in tree.iter() if element.get("id", "").startswith("curve")]
    assert len(lines) == 3
    assert max(number_of_points(line) for line in lines) == 4
    labels = " ".join(element.text or "" for element in tree.iter())
    assert "loss/even" in labels and "loss/odd" in labels


def test_a_curve_needs_a_point():
    assert loss_curves([{"step": 1, "eval_loss": 2.0}]) == {}
    with pytest.raises(ValueError, match="there is no loss to draw"):
        learning_curve_plot({}, "empty")
    single = learning_curve_plot({"loss <b>": [(5, 2.0)]}, "one & only")
    assert ElementTree.fromstring(single) is not None


@pytest.mark.parametrize("kind", ["figures", "stored"])
def test_rows_that_are_held_out_are_not_trained_on(kind, tmp_path, make_image):
    sources = "figures"
    if kind == "stored":
        (tmp_path / "pictures").mkdir()
        lines = []
        for index in range(12):
            make_image(index).save(tmp_path / "pictures" / f"{index}.png")
            turns = [("user", f"<image>\nWhat is {index}?"), ("assistant", f"number {index}")]
            messages = [{"role": role, "content": text} for role, text in turns]
            lines.append(json.dumps({"images": [f"pictures/{index}.png"], "messages": messages}))
        (tmp_path / "rows.jsonl").write_text("\n".join(lines))
        sources = str(tmp_path / "rows.jsonl")
    output = str(tmp_path / "out")
    arguments = ["--sources", sources, "--sample_steps", "2", "--sample_count", "3", "--output_dir", output]
    recipe = parse_recipe(("1",), [*SHORT, "--max_steps", "3", *arguments])
    _, processor = load_for_stage(recipe)
    rows, held_out = hold_out(recipe, mixture_for_stage(recipe, "caption", processor), "caption")
    asked = [Sample.from_row(each) for each in held_out]
    assert len(asked) == 3 and all(each.wanted and each.asked and each.images for each in asked)
    if kind == "stored":
        trained = [Sample.from_row(rows[index]).wanted for index in range(len(rows))]
        assert not {each.wanted for each in asked} & set(trained)
    assert hold_out(parse_recipe(("1",), [*SHORT]), SimpleNamespace(rows=rows), "caption") == (rows, [])


@pytest.fixture
def samples(make_image) -> list[Sample]:
    prompt = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What | is it?"}]}]
    return [Sample((make_image(0), make_image(1)), prompt, "a cat"), Sample((), prompt, "<nothing>")]


class Writer:
    def __init__(self):
        self.texts, self.images = {}, {}

    def add_text(self, name, text, step):
        self.texts[name, step] = text

    def add_image(self, name, array, step, dataformats):
        assert dataformats == "HWC"
        self.images[name, step] = array

    def flush(self):
        pass


def test_tensorboard_gets_pictures_and_a_table(samples):
    callback = TensorBoardCallback.__new__(TensorBoardCallback)
    callback.tb_writer = Writer()
    send_to_tracker(callback, samples, ["a dog", ""], 7)
    assert callback.tb_writer.images["samples/0", 7].shape == (32, 64, 3)
    table = callback.tb_writer.texts["samples", 7]
    assert "| 0 | What \\| is it? | a dog | a cat |" in table and "&lt;nothing&gt;" in table


@pytest.mark.parametrize("kind", [WandbCallback, TrackioCallback])
def test_wandb_and_trackio_get_a_table_of_pictures(samples, kind):
    logged = []

    class Table:
        def __init__(self, columns=None, dataframe=None):
            self.rows = [] if dataframe is None else dataframe.values.tolist()

        def add_data(self, *row):
            self.rows.append(list(row[1:]))

    tracker = SimpleNamespace(Table=Table, Image=lambda array: array.shape, log=logged.append)
    callback = kind.__new__(kind)
    callback._wandb = callback._trackio = tracker
    send_to_tracker(callback, samples, ["a dog", ""], 7)
    (entry,) = logged
    assert entry["train/global_step"] == 7
    assert entry["samples"].rows == [
        [(32, 64, 3), "What | is it?", "a dog", "a cat"],
        [None, "What | is it?", "", "<nothing>"],
    ]


def test_the_page_escapes_what_the_model_says(samples):
    page = samples_page(samples, [{"step": 1, "answers": ["<script>", "ok"]}])
    assert "<script>" not in page and "&lt;script&gt;" in page and "no picture" in page
