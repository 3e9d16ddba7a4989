"""Stage 3: rows from a store of traces, weights of answers, curricula, early stopping, the report's configurations."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import TrainerCallback

from siq_vl.data.collation import ConversationCollator
from siq_vl.data.figures import rows as figures
from siq_vl.data.figures.dataset import STYLES, sample
from siq_vl.distill.pipeline import Run
from siq_vl.distill.prompts import Prompts
from siq_vl.distill.questions import figure_questions
from siq_vl.distill.selection import Selection, record_rules, update_verdicts
from siq_vl.distill.teachers.oracle import FiguresTeacher
from siq_vl.distill.trace_arguments import TraceArguments
from siq_vl.distill.traces import TraceStore, read_traces
from siq_vl.distill.training_rows import DIRECT, training_traces
from siq_vl.distill.verification import Verification
from siq_vl.modeling_siq_vl import SiQVLForConditionalGeneration
from siq_vl.planning.plan import plan
from siq_vl.processing_siq_vl import SiQVLProcessor
from siq_vl.training.checkpoints import run_settings
from siq_vl.training.recipes import RECIPES, parse_recipe, read_settings
from siq_vl.training.resume import checkpoint_to_resume, mark_complete
from siq_vl.training.run import held_out_traces, make_trainer, rows_needed, traces_for_stage, train_and_save
from siq_vl.training.starting_model import load_for_stage
from siq_vl.training.trainer import AnswerWeights

QUESTIONS = 60


def write_store(folder: Path, styles=STYLES, count: int = QUESTIONS, **options) -> Path:
    rules = Verification()
    with TraceStore(folder) as store:
        record_rules(store, rules)
        for style in styles:
            Run(FiguresTeacher(style, **options), Prompts(), store, rules, progress=False).over(
                figure_questions(count, seed=3)
            )
        update_verdicts(store, rules, Selection(duplicates="none"))
    return folder


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    """Sixty questions, each answered by the oracle in its three styles."""
    return write_store(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> Path:
    """A checkpoint to start stage 3 from: the tiny backbones, joined."""
    folder = tmp_path_factory.mktemp("start")
    for part in load_for_stage(parse_recipe(("1",), ["--output_dir", str(folder)])):
        part.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def reader(start) -> SiQVLProcessor:
    return SiQVLProcessor.from_pretrained(start, trust_remote_code=True)


def traces(store: Path, *, seed: int = 0, count=None, processor=None, max_length=None, drop_log=None, **options):
    config = TraceArguments(traces=str(store), **options)
    return training_traces(
        config, seed=seed, count=count, processor=processor, max_length=max_length, drop_log=drop_log
    )


def said(row) -> str:
    return row["messages"][-1]["content"][0]["text"]


def asked(row) -> str:
    return row["messages"][0]["content"][-1]["text"]


def thinks(row) -> bool:
    return row["chat_template_kwargs"]["enable_thinking"]


# Rows


def test_rows_are_those_of_the_drawn_figures(store, reader):
    """The store's rows, decoded and collated, equal the rows drawn from the same seed, for every style."""
    rows = traces(store, traces_per_question=0).rows
    assert len(rows) == QUESTIONS * len(STYLES)
    collate = ConversationCollator(reader)
    for place, style in enumerate(STYLES):
        made = [rows[place * QUESTIONS + index] for index in range(6)]
        drawn = [figures.row(sample("train", index, seed=3), "reason", style=style) for index in range(6)]
        assert [row["source"] for row in made] == [f"figures-{style}"] * 6
        for row, wanted in zip(made, drawn, strict=True):
            assert np.array_equal(np.asarray(row["images"][0]), np.asarray(wanted["images"][0]))
        batch, wanted = collate(made), collate(drawn)
        assert all(torch.equal(batch[name], wanted[name]) for name in wanted)


def test_one_trace_a_question_is_drawn_by_weight_and_seed(store):
    teachers = ["figures-structured=3", "figures-terse"]
    first, again, other = (traces(store, teachers=teachers, seed=seed).rows for seed in (0, 0, 1))
    rows = list(first)
    assert len({row["images"][0].tobytes() for row in rows}) == len(rows) == QUESTIONS
    counts = Counter(row["source"] for row in rows)
    assert set(counts) == {"figures-structured", "figures-terse"}
    assert 33 <= counts["figures-structured"] <= 56  # 45 expected, three standard deviations of 3.4 and more
    assert [said(row) for row in again] == [said(row) for row in rows] != [said(row) for row in other]


def test_long_rationales_are_left_out_by_the_students_tokens(store, reader, tmp_path):
    bound = 14
    kept = traces(store, processor=reader, traces_per_question=0, max_rationale_tokens=bound, drop_log=tmp_path / "log")
    lengths = [len(reader.tokenizer(row["rationale"])["input_ids"]) for row in read_traces(store)]
    short = sum(length <= bound for length in lengths)
    assert 0 < short == len(kept.rows) < len(lengths)
    counts = kept.report.to_dict()["sources"]
    assert sum(each["used"] for each in counts) == short
    dropped = [each["dropped"]["longer than max_rationale_tokens"] for each in counts if each["dropped"]]
    assert sum(dropped) == len(lengths) - short == len((tmp_path / "log").read_text().splitlines()) - 1
    assert "longer than max_rationale_tokens" in kept.report.table()


def test_no_row_is_longer_than_max_length(store, reader):
    collate = ConversationCollator(reader)
    every = [collate([row])["input_ids"].numel() for row in traces(store, traces_per_question=0).rows]
    bound = sorted(every)[len(every) // 2]
    some = traces(store, traces_per_question=0, processor=reader, max_length=bound).rows
    assert [collate([row])["input_ids"].numel() for row in some] == [length for length in every if length <= bound]


def test_a_curriculum_grows_and_direct_answers_lie_among_it(store, reader):
    rows = list(traces(store, processor=reader, curriculum="length", direct_share=0.3).rows)
    lengths = [len(reader.tokenizer(said(row).split("</think>")[0])["input_ids"]) for row in rows if thinks(row)]
    assert lengths == sorted(lengths) and lengths[0] < lengths[-1]
    places = [place for place, row in enumerate(rows) if not thinks(row)]
    assert places[0] < len(rows) / 3 and places[-1] > len(rows) * 2 / 3
    few = traces(store, processor=reader, curriculum="length", count=20).rows
    assert len(few) == 20 and len(said(few[19])) > 1.5 * len(said(few[0]))  # of all lengths, not the shortest


def test_direct_rows_supervise_the_answer_alone(store, reader):
    made = traces(store, direct_share=0.5)
    rows = [row for row in made.rows if not thinks(row)]
    assert 18 <= len(rows) <= 42
    assert {row["source"] for row in rows} == {DIRECT}
    assert made.report.sources[-1].name == DIRECT and made.report.sources[-1].used == len(rows)
    golds = {(row["question"], row["images"][0].tobytes()): row["golds"][0] for row in read_traces(store)}
    batch = ConversationCollator(reader)(rows)
    for row, labels in zip(rows, batch["labels"], strict=True):
        wanted = reader.tokenizer(f"<answer>{golds[asked(row), row['images'][0].tobytes()]}</answer><|im_end|>")[
            "input_ids"
        ]
        assert labels[labels != -100].tolist() == wanted


def test_a_blind_student_is_shown_nothing(store):
    rows = training_traces(TraceArguments(traces=str(store)), seed=0, count=3, blind=True).rows
    for row in rows:
        assert row["images"] == []
        assert [part["type"] for turn in row["messages"] for part in turn["content"]] == ["text", "text"]


def test_rejected_traces_are_counted_or_used(tmp_path):
    folder = write_store(tmp_path / "faulty", ("structured",), error_rate=0.7)
    stored = read_traces(folder, kept=False)
    kept = sum(verdict == "kept" for verdict in stored["verdict"])
    whole = sum(bool(row["rationale"].strip() and row["answer"].strip()) for row in stored)
    assert 0 < kept < whole < QUESTIONS
    verified, every = traces(folder), traces(folder, verified=False)
    assert (len(verified.rows), len(every.rows)) == (kept, whole)
    reasons = verified.report.to_dict()["sources"][0]["dropped"]
    assert sum(reasons.values()) == QUESTIONS - kept
    assert "rejected: answer" in reasons
    assert every.report.to_dict()["sources"][0]["dropped"] == {"no rationale or no answer": QUESTIONS - whole}


def test_a_question_is_trained_on_or_validated_with(store):
    parts = traces(store, traces_per_question=0, validation_share=0.3)
    trained, validated = ({row["images"][0].tobytes() for row in part} for part in (parts.rows, parts.validation))
    assert not trained & validated
    assert len(trained) + len(validated) == QUESTIONS
    assert 8 <= len(validated) <= 28
    assert traces(store).validation is None


def test_a_text_student_reads_captions(store, tmp_path):
    rows = traces(store, student="text", teachers=["figures-terse"]).rows
    for index in range(5):
        drawn = sample("train", index, seed=3)
        assert rows[index]["images"] == []
        assert rows[index]["messages"][0]["content"] == [
            {"type": "text", "text": f"{drawn.figure.caption}\n{drawn.question.text}"}
        ]


def test_other_pictures_need_captions(tmp_path):
    folder = write_store(tmp_path / "store", ("terse",), count=2)
    (shard,) = (folder / "data").glob("*.parquet")
    table = pq.read_table(shard)
    ids = pa.array(["a", "b"])
    pq.write_table(table.set_column(table.schema.get_field_index("sample_id"), "sample_id", ids), shard)
    with pytest.raises(ValueError, match=r"sample 'a' has neither caption nor OCR text: give them as columns .*jsonl"):
        traces(folder, student="text")
    lines = [{"sample_id": "a", "caption": "Two cats."}, {"sample_id": "b", "caption": "A shop.", "ocr": "OPEN"}]
    (folder / "captions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    questions = read_traces(folder)["question"]
    assert [asked(row) for row in traces(folder, student="text").rows] == [
        f"Two cats.\n{questions[0]}",
        f"A shop.\nText in the picture: OPEN\n{questions[1]}",
    ]
    (folder / "captions.jsonl").write_text('{"caption": "of nothing"}')
    with pytest.raises(ValueError, match=r"captions.jsonl, line 1 is not an object with a sample_id"):
        traces(folder, student="text")


def test_a_damaged_picture_gives_its_place_to_the_next_trace(tmp_path):
    folder = write_store(tmp_path / "store", ("terse",), count=4)
    (shard,) = (folder / "data").glob("*.parquet")
    table = pq.read_table(shard)
    images = table["images"].to_pylist()
    images[1][0]["bytes"] = images[1][0]["bytes"][:200]
    column = table.schema.get_field_index("images")
    pq.write_table(table.set_column(column, table.field(column), pa.array(images, table.field(column).type)), shard)
    made = traces(folder, drop_log=tmp_path / "log")
    rows = list(made.rows)
    assert said(rows[1]) == said(rows[2]) and len(rows) == 4
    assert made.report.to_dict()["sources"][0]["dropped"] == {"image that cannot be read": 1}


def test_what_cannot_be_trained_on_is_refused(store, tmp_path):
    with pytest.raises(
        ValueError, match=r"run `python generate_traces.py --teacher figures --count 300 --output .*nope"
    ):
        traces(tmp_path / "nope")
    with pytest.raises(ValueError, match=r"teachers names 'plato', and .* has traces of figures-structured, figures-"):
        traces(store, teachers=["plato"])
    with pytest.raises(ValueError, match=r"leaves 0 traces to train on.*loosen max_rationale_tokens"):
        traces(write_store(tmp_path / "bad", ("terse",), count=3, error_rate=1.0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"teachers": ["a=0"]}, "teacher 'a=0': write it as name or name=weight"),
        ({"teachers": ["a=x"]}, "teacher 'a=x'"),
        ({"teachers": ["a", "a=2"]}, "name each of them once"),
        ({"curriculum": "hard"}, "curriculum is 'hard'; it must be one of none, length"),
        ({"student": "blind"}, "student is 'blind'"),
        ({"traces_per_question": -1}, "traces_per_question is -1"),
        ({"direct_share": 2}, "direct_share is 2"),
        ({"validation_share": 1}, "validation_share is 1"),
        ({"answer_weight": 0}, "answer_weight is 0"),
    ],
)
def test_bad_settings_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        TraceArguments(**options)


# Training


def parse(start: Path, store: Path, folder: Path, *overrides: str):
    arguments = ["--model_name_or_path", str(start), "--traces", str(store), "--output_dir", str(folder)]
    arguments += ["--effective_batch_size", "4", "--max_steps", "4", "--logging_steps", "1", "--warmup_steps", "0"]
    return parse_recipe(("3",), [*arguments, "--lora_r", "4", *overrides])


def trainer_of(recipe):
    model, processor = load_for_stage(recipe)
    made = traces_for_stage(recipe, processor)
    held_out = held_out_traces(recipe, made)
    return make_trainer(recipe, model, processor, made.rows, held_out, made.validation), processor, made


def losses(trainer, name: str = "loss") -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def test_weights_lie_on_the_answer(store, reader):
    rows = [traces(store, direct_share=0.5).rows[index] for index in range(8)]
    assert len({thinks(row) for row in rows}) == 2
    collate = ConversationCollator(reader)
    plain, batch = collate(rows), AnswerWeights(collate, reader.tokenizer, 3.0)(rows)
    assert all(torch.equal(batch[name], plain[name]) for name in plain)
    for row, ids, labels, weights in zip(rows, batch["input_ids"], batch["labels"], batch["loss_weights"], strict=True):
        weighted = reader.tokenizer.decode(ids[weights == 3]).replace(" ", "")
        assert weighted == ("<answer>" + said(row).split("<answer>")[1]).replace(" ", "")
        assert (weights[labels == -100] == 1).all()
        assert set(weights.unique().tolist()) == {1.0, 3.0}


def test_a_weight_of_one_is_the_plain_loss_and_another_weighs_the_answer(start, store, tmp_path):
    trainer, processor, made = trainer_of(parse(start, store, tmp_path))
    rows = [made.rows[index] for index in range(4)]
    collate = ConversationCollator(processor)
    model = trainer.model.train()

    def loss(collator) -> torch.Tensor:
        with trainer.compute_loss_context_manager():
            return trainer.compute_loss(model, collator(rows))

    plain = loss(collate)
    assert torch.equal(loss(AnswerWeights(collate, processor.tokenizer, 1.0)), plain)
    batch = AnswerWeights(collate, processor.tokenizer, 5.0)(rows)
    weights = batch.pop("loss_weights")
    labels = batch.pop("labels")[:, 1:]
    with torch.no_grad(), trainer.compute_loss_context_manager():
        logits = model(**batch).logits[:, :-1].float()
    each = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
    wanted = (each * weights[:, 1:]).sum() / (labels != -100).sum()
    weighted = loss(AnswerWeights(collate, processor.tokenizer, 5.0))
    torch.testing.assert_close(weighted, wanted, atol=2e-3, rtol=1e-3)
    assert abs(weighted - plain) > 0.01
    weighted.backward()
    assert torch.equal(loss(collate), plain)  # nothing is kept for the next batch
    with torch.no_grad():
        in_evaluation = (
            trainer.compute_loss(model.eval(), AnswerWeights(collate, processor.tokenizer, 5.0)(rows)),
            trainer.compute_loss(model, collate(rows)),
        )
    assert torch.equal(*in_evaluation)


def test_loss_is_logged_by_teacher(start, store, tmp_path):
    recipe = parse(start, store, tmp_path, "--teachers", "figures-terse", "figures-text_first", "--direct_share", "0.4")
    trainer, processor, made = trainer_of(recipe)
    train_and_save(trainer, processor, recipe, made.report)
    logged = {name for entry in trainer.state.log_history for name in entry if name.startswith("loss/")}
    assert logged == {"loss/figures-terse", "loss/figures-text_first", f"loss/{DIRECT}"}
    settings = json.loads((tmp_path / "training_settings.json").read_text())
    assert settings["traces"]["teachers"] == ["figures-terse", "figures-text_first"]
    assert [each["name"] for each in settings["data_counts"]["sources"]] == [*settings["traces"]["teachers"], DIRECT]
    assert "| figures-terse |" in (tmp_path / "README.md").read_text()


class Interrupt(TrainerCallback):
    """Ends a run as a kill does, at the end of a step."""

    def __init__(self, step: int):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


def test_a_curriculum_is_trained_in_its_order_and_goes_on_where_it_was(start, store, tmp_path):
    saving = ["--curriculum", "length", "--save_strategy", "steps", "--save_steps", "2"]
    recipe = parse(start, store, tmp_path / "whole", *saving)
    assert rows_needed(recipe) == 16
    whole, processor, made = trainer_of(recipe)
    assert list(whole._get_train_sampler()) == list(range(len(made.rows)))
    lengths = [len(said(row)) for row in made.rows]
    assert len(lengths) == 16 and sum(lengths[:4]) < sum(lengths[-4:])
    whole.train()
    recipe = parse(start, store, tmp_path / "cut", *saving)
    cut, processor, _ = trainer_of(recipe)
    cut.add_callback(Interrupt(3))
    with pytest.raises(KeyboardInterrupt):
        cut.train()
    resumed, processor, _ = trainer_of(recipe)
    train_and_save(resumed, processor, recipe)
    assert losses(resumed) == losses(whole) and len(losses(whole)) == 4


def test_a_store_with_other_traces_is_another_run(start, tmp_path):
    folder = write_store(tmp_path / "store", ("terse",), count=4)
    settings = run_settings(parse(start, folder, tmp_path / "run"))
    (tmp_path / "run" / "checkpoint-2").mkdir(parents=True)
    mark_complete(tmp_path / "run" / "checkpoint-2", 2, settings)
    assert checkpoint_to_resume(tmp_path / "run", settings).name == "checkpoint-2"
    write_store(folder, ("terse",), count=5)
    with pytest.raises(ValueError, match="was made with the store's shards"):
        checkpoint_to_resume(tmp_path / "run", run_settings(parse(start, folder, tmp_path / "run")))


STOPPING = ("--validation_share", "0.3", "--early_stopping_patience", "2", "--load_best_model_at_end", "true")
STOPPING += ("--eval_strategy", "steps", "--eval_steps", "1", "--save_strategy", "steps", "--save_steps", "1")
STOPPING += ("--save_total_limit", "2", "--max_steps", "9")
SCRIPT = {1: 3.0, 2: 2.0, 3: 4.0, 4: 5.0, 5: 1.0}  # the best before patience ends is step 2


def with_scripted_losses(trainer):
    """Lets each evaluation find the loss that the script has for its step."""
    measure = trainer.evaluation_loop

    def scripted(*arguments, **options):
        found = measure(*arguments, **options)
        assert found.metrics["eval_loss"] > 0
        found.metrics["eval_loss"] = SCRIPT[trainer.state.global_step]
        return found

    trainer.evaluation_loop = scripted
    return trainer


def test_early_stopping_writes_the_best_checkpoints_weights(start, store, tmp_path):
    recipe = parse(start, store, tmp_path, *STOPPING)
    trainer, processor, made = trainer_of(recipe)
    train_and_save(with_scripted_losses(trainer), processor, recipe, made.report)
    assert trainer.state.global_step == 4
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]

    def merged(step: int) -> dict[str, torch.Tensor]:
        base = SiQVLForConditionalGeneration.from_pretrained(start)
        return PeftModel.from_pretrained(base, tmp_path / f"checkpoint-{step}").merge_and_unload().state_dict()

    written, best, last = load_file(tmp_path / "model.safetensors"), merged(2), merged(4)
    assert any(".projector." in name for name in written)
    for name, weight in written.items():
        torch.testing.assert_close(weight, best[name], atol=1e-6, rtol=1e-6, msg=name)
    trained = [name for name in written if not torch.equal(best[name], last[name])]
    assert any(".projector." in name for name in trained) and any(".language_model." in name for name in trained)
    settings = json.loads((tmp_path / "training_settings.json").read_text())
    assert settings["best"] == {"step": 2, "validation loss": 2.0}
    assert "| weights kept | step 2, validation loss 2 |" in (tmp_path / "README.md").read_text()


def test_early_stopping_keeps_counting_after_a_resume(start, store, tmp_path):
    """Killed after the first evaluation without improvement, it stops at the second."""
    recipe = parse(start, store, tmp_path, *STOPPING)
    cut = with_scripted_losses(trainer_of(recipe)[0])
    cut.add_callback(Interrupt(3))
    with pytest.raises(KeyboardInterrupt):
        cut.train()
    resumed, processor, _ = trainer_of(recipe)
    train_and_save(with_scripted_losses(resumed), processor, recipe)
    assert resumed.state.global_step == 4
    assert Path(resumed.state.best_model_checkpoint).name == "checkpoint-2"
    assert json.loads((tmp_path / "training_settings.json").read_text())["best"]["step"] == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--eval_strategy", "steps", "--eval_steps", "2"], "validation_share is 0, so that there is nothing"),
        (["--early_stopping_patience", "2", "--validation_share", "0.1"], "which takes eval_strategy"),
        (
            ["--variant", "plato"],
            "variant is 'plato'; stage 3 of recipe 'tiny' has hunyuanocr, internvl-chartqa, qwen3vl",
        ),
    ],
)
def test_settings_that_do_not_go_together_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        parse_recipe(("3",), arguments)


# The report's configurations


@pytest.mark.parametrize(
    ("config", "adapter", "training", "of_traces"),
    [
        ("internvl_chartqa", (16, 16, 0.05, True), (5e-5, "linear", 1000, 4), {"student": "multimodal"}),
        ("qwen3vl_cocoqa", (16, 32, 0.05, True), (2e-4, "linear", -1, 16), {"student": "text"}),
        ("hunyuanocr", (16, 16, 0.05, False), (5e-5, "linear", 1000, 16), {"student": "multimodal"}),
        ("", (16, 16, 0.05, False), (5e-5, "linear", 1000, 16), {"traces_per_question": 1}),
    ],
)
def test_the_reports_configurations(config, adapter, training, of_traces, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    chosen = ["--recipe", "siq-vl-0.5b", *(["--variant", config] if config else [])]
    recipe = parse_recipe(("3",), chosen)
    lora, run = recipe.model, recipe.training
    assert (lora.lora_r, lora.lora_alpha, lora.lora_dropout, lora.load_in_4bit) == adapter
    assert len(lora.lora_target_modules) == 7
    assert (run.learning_rate, run.lr_scheduler_type, run.max_steps, recipe.run.effective_batch_size) == training
    assert run.per_device_train_batch_size == 1
    assert {name: getattr(recipe.traces, name) for name in of_traces} == of_traces
    if recipe.traces.student == "text":
        assert (run.max_length, run.num_train_epochs, recipe.data.train_samples) == (1024, 7, 5000)
        assert recipe.traces.early_stopping_patience > 0 and run.load_best_model_at_end
    text = plan(recipe, "reason")
    assert "| **trainable** | 12,469,120 | 1.51% |" in text
    assert "cannot be read here: outputs/traces holds no traces" in text
    assert list(tmp_path.iterdir()) == []
    if config == "internvl_chartqa":
        small = plan(parse_recipe(("3",), [*chosen, "--lora_r", "8"]), "reason")
        assert "| **trainable** | 8,070,016 |" in small


def test_every_configuration_has_a_tiny_twin():
    names = {path.name for path in (RECIPES / "siq-vl-0.5b").glob("stage3-*.yaml")}
    assert len(names) == 3
    assert names <= {path.name for path in (RECIPES / "tiny").glob("stage3-*.yaml")}
    for name in names:
        paper, tiny = (read_settings(RECIPES / recipe / name) for recipe in ("siq-vl-0.5b", "tiny"))
        for field in ("lora_r", "lora_alpha", "lora_dropout", "lr_scheduler_type"):
            assert tiny[field] == paper[field], (name, field)
        for field, default in (("load_in_4bit", False), ("student", "multimodal"), ("num_train_epochs", None)):
            assert tiny.get(field, default) == paper.get(field, default), (name, field)


def test_a_plan_reads_the_store(start, store, tmp_path):
    text = plan(parse(start, store, tmp_path, "--direct_share", "0.5", "--dry_run"), "reason")
    assert f"| {DIRECT} |" in text and "| figures-structured |" in text
    assert "longest row has" in text
    assert list(tmp_path.iterdir()) == []
