"""The runner: equal answers for any batch size, interruptions and faults survived, several processes, any model."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from conftest import REPO_ROOT, TEXT, SiglipImageProcessor, build_tokenizer
from transformers import (
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    SiglipVisionConfig,
)

from siq_vl.data.mixture_config import SourceConfig
from siq_vl.data.sources import Source
from siq_vl.evaluation import predictions as kept
from siq_vl.evaluation import runner
from siq_vl.evaluation.generation import Completion, fitting_new_tokens
from siq_vl.evaluation.held_out import held_out_items
from siq_vl.evaluation.items import items_of
from siq_vl.evaluation.runner import RunSettings, fault_report, fingerprint, load_any, run, same_questions
from siq_vl.evaluation.statistics import mcnemar, paired_bootstrap

SHORT = RunSettings(batch_size=4, max_new_tokens=6)


@pytest.fixture(scope="module")
def items():
    return held_out_items(10)


@pytest.fixture
def source(tmp_path, make_image):
    """A source of eight rows: a damaged picture, a missing one, no gold, a broken row, and sound ones with odd questions."""
    folder = tmp_path / "rows"
    folder.mkdir()
    make_image(0).save(folder / "good.png")
    (folder / "damaged.png").write_bytes((folder / "good.png").read_bytes()[:80])
    row = {"image": "good.png", "question": "What is it?", "answer": "noise"}
    rows = [
        row,
        {**row, "image": "damaged.png"},
        {**row, "image": "absent.png"},
        {**row, "answer": ""},
        None,
    ]
    rows += [{**row, "question": "RAISE"}, {**row, "question": "EMPTY"}, {**row, "question": "And now?"}]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return Source(SourceConfig(path=str(folder / "rows.jsonl"), split="test"))


@pytest.mark.parametrize("batch_size", [3, 16])
def test_batch_size_changes_no_answer(items, make_model, processor, tmp_path, batch_size):
    model = make_model()
    alone = run(model, processor, items, tmp_path / "1.jsonl", replace(SHORT, batch_size=1))
    together = run(model, processor, items, tmp_path / "n.jsonl", replace(SHORT, batch_size=batch_size))
    assert [made.output for made in alone] == [made.output for made in together]
    assert len({made.output for made in alone}) > 1
    assert [made.id for made in alone] == [item.id for item in items]


def test_an_interrupted_run_goes_on(items, make_model, processor, tmp_path, monkeypatch):
    model, path = make_model(), tmp_path / "model.jsonl"
    whole = run(model, processor, items, tmp_path / "whole.jsonl", SHORT)
    asked, real = [], runner.complete

    def complete(model, processor, texts, images, **options):
        asked.append(len(texts))
        if len(asked) == 3:
            raise KeyboardInterrupt
        return real(model, processor, texts, images, **options)

    monkeypatch.setattr(runner, "complete", complete)
    with pytest.raises(KeyboardInterrupt):
        run(model, processor, items, path, SHORT)
    assert len(path.read_text().splitlines()) == 8
    with open(path, "a") as file:  # killed in the middle of a line
        file.write('{"id": "test/0/sce')
    assert run(model, processor, items, path, SHORT) == whole
    assert sum(asked[3:]) == len(items) - 8
    asked.clear()
    assert run(model, processor, items, path, replace(SHORT, batch_size=1)) == whole
    assert not asked


def test_the_bound_fits_what_a_checkpoint_was_trained_on(tmp_path):
    assert fitting_new_tokens(str(tmp_path)) == 1024  # another model, or an older one
    for max_length, bound in ((77, 77), (None, 1024)):
        settings = {"stage": "3", "training": {"max_length": max_length}}
        (tmp_path / "training_settings.json").write_text(json.dumps(settings))
        assert fitting_new_tokens(str(tmp_path)) == bound


def test_another_run_begins_anew(items, make_model, processor, tmp_path):
    path = tmp_path / "model.jsonl"
    first = run(make_model(0), processor, items, path, SHORT, identity={"checkpoint": "a"})
    second = run(make_model(1), processor, items, path, SHORT, identity={"checkpoint": "b"})
    assert [made.output for made in first] != [made.output for made in second]
    longer = run(make_model(1), processor, items, path, replace(SHORT, max_new_tokens=9), identity={"checkpoint": "b"})
    assert [made.output for made in longer] != [made.output for made in second]


def test_a_reworded_question_is_asked_again(items, make_model, processor, tmp_path):
    model, path = make_model(), tmp_path / "model.jsonl"
    run(model, processor, items, path, SHORT)
    text = "Something else?"
    reworded = replace(
        items[0],
        question=text,
        messages=[{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}],
    )
    answered = run(model, processor, [reworded, *items[1:]], path, SHORT)
    assert answered[0].question == text
    assert answered[0] == run(model, processor, [reworded], tmp_path / "other.jsonl", SHORT)[0]


def test_fingerprint_follows_the_weights(checkpoint, make_model):
    before = fingerprint(str(checkpoint))
    assert before == fingerprint(str(checkpoint))
    make_model(1).save_pretrained(checkpoint)
    assert fingerprint(str(checkpoint)) != before


def test_faults_are_counted_and_named_and_the_run_goes_on(source, make_model, processor, tmp_path, monkeypatch):
    real = runner.complete

    def complete(model, processor, texts, images, **options):
        if any("RAISE" in text for text in texts):
            raise RuntimeError("out of memory")
        return [
            Completion("", cut_off=False) if "EMPTY" in text else made
            for text, made in zip(texts, real(model, processor, texts, images, **options), strict=True)
        ]

    monkeypatch.setattr(runner, "complete", complete)
    items = items_of(source)
    made = run(make_model(), processor, items, tmp_path / "model.jsonl", replace(SHORT, batch_size=16))
    kinds = ["", kept.IMAGE, kept.IMAGE, kept.NO_GOLD, kept.ROW, kept.MODEL, kept.EMPTY, ""]
    assert [prediction.fault for prediction in made] == kinds
    assert [prediction.scored for prediction in made] == [kind not in kept.NOT_SCORED for kind in kinds]
    assert all(made[place].output for place in (0, 3, 7))
    assert not any(prediction.correct for prediction in made)
    report = fault_report({"model": made})
    assert "model: unreadable image: 2 of 8, left out of the scores: rows.jsonl/1 (" in report
    assert "model: missing gold: 1 of 8, left out of the scores: rows.jsonl/3 (" in report
    assert "model: model error: 1 of 8, counted as wrong: rows.jsonl/5 (RuntimeError: out of memory)" in report
    assert "model: empty output: 1 of 8, counted as wrong: rows.jsonl/6 (" in report
    monkeypatch.setattr(runner, "complete", real)  # what failed in the model is asked again, and only that
    again = run(make_model(), processor, items, tmp_path / "model.jsonl", SHORT)
    assert again[5].fault == "" and again[5].output
    assert again[6] == made[6]


def test_a_model_that_always_fails_is_an_error(items, make_model, processor, tmp_path, monkeypatch):
    def complete(*arguments, **options):
        raise RuntimeError("broken")

    monkeypatch.setattr(runner, "complete", complete)
    with pytest.raises(ValueError, match="failed at every question; the first time: RuntimeError: broken"):
        run(make_model(), processor, items, tmp_path / "model.jsonl", SHORT)
    with pytest.raises(ValueError, match="make them distinct"):
        run(make_model(), processor, [items[0], items[0]], tmp_path / "model.jsonl", SHORT)


def test_sources_bring_all_gold_answers_and_their_own_metric(tmp_path, make_image):
    make_image(0).save(tmp_path / "1.jpg")
    ten = ["tea"] * 3 + ["cup of tea"] * 7
    text = {"data": [{"question_id": 1, "image_id": "1", "question": "What?", "answers": ten}]}
    (tmp_path / "text.json").write_text(json.dumps(text))
    [item] = items_of(Source(SourceConfig(path=str(tmp_path / "text.json"), split="test")))
    assert (item.golds, item.metric) == (tuple(ten), "vqa")
    assert kept.judge(item, "tea").score == pytest.approx(0.9)
    science = {
        "7": {"question": "Which?", "choices": ["iron", "wood"], "answer": 1, "image": "", "hint": "", "split": "test"}
    }
    (tmp_path / "science.json").write_text(json.dumps(science))
    [item] = items_of(Source(SourceConfig(path=str(tmp_path / "science.json"), split="test")))
    assert (item.golds, item.metric, item.choices, item.images) == (("B",), "choice", ("iron", "wood"), [])
    assert kept.judge(item, "The answer is (B).").correct and not kept.judge(item, "A").correct
    turns = [("human", "One?"), ("gpt", "1"), ("human", "Two?"), ("gpt", "2")]
    row = {"image": "1.jpg", "conversations": [{"from": role, "value": said} for role, said in turns]}
    (tmp_path / "llava.json").write_text(json.dumps([row]))
    first, second = items_of(Source(SourceConfig(path=str(tmp_path / "llava.json"))))
    assert [(item.question, item.answer, len(item.messages)) for item in (first, second)] == [
        ("One?", "1", 1),
        ("Two?", "2", 3),
    ]
    assert (first.id, second.id) == ("llava.json/0/0", "llava.json/0/1")


def test_blind_runs_see_no_picture(items, make_model, processor, tmp_path, monkeypatch):
    model, calls = make_model(), []
    features = type(model.model).get_image_features
    monkeypatch.setattr(type(model.model), "get_image_features", lambda *a, **k: calls.append(1) or features(*a, **k))
    run(model, processor, items, tmp_path / "blind.jsonl", replace(SHORT, blind=True))
    assert not calls
    run(model, processor, items, tmp_path / "seeing.jsonl", SHORT)
    assert calls


def test_any_image_text_to_text_model_runs(tmp_path, items):
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=build_tokenizer().backend_tokenizer,
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        padding_side="right",
        model_input_names=["input_ids", "attention_mask"],
    )
    torch.manual_seed(0)
    vision = SiglipVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config={"model_type": "qwen2", **TEXT, "vocab_size": len(tokenizer)},
        image_token_index=tokenizer.convert_tokens_to_ids("<|image_pad|>"),
        vision_feature_select_strategy="full",
    )
    model = LlavaForConditionalGeneration(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.3)
    template = (REPO_ROOT / "chat_template.jinja").read_text(encoding="utf-8")
    processor = LlavaProcessor(
        SiglipImageProcessor(size={"height": 32, "width": 32}),
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="full",
        chat_template=template,
        image_token="<|image_pad|>",
    )
    model.save_pretrained(tmp_path / "llava")
    processor.save_pretrained(tmp_path / "llava")
    model, processor = load_any(str(tmp_path / "llava"))
    assert isinstance(model, LlavaForConditionalGeneration)
    alone = run(model, processor, items, tmp_path / "1.jsonl", replace(SHORT, batch_size=1))
    together = run(model, processor, items, tmp_path / "5.jsonl", replace(SHORT, batch_size=5))
    assert alone == together
    assert not any(made.fault == kept.MODEL for made in alone)
    assert len({made.output for made in alone}) > 1


def test_load_any_says_what_is_wrong(tmp_path, checkpoint):
    with pytest.raises(ValueError, match="holds no checkpoint"):
        load_any(str(tmp_path))
    with pytest.raises(ValueError, match="does not exist"):
        load_any(str(tmp_path / "nothing"))
    model, _ = load_any(str(checkpoint))
    assert type(model).__module__ == "siq_vl.modeling_siq_vl"


def test_two_processes_answer_what_one_does(checkpoint, items, make_model, processor, tmp_path):
    single = run(make_model(), processor, items, tmp_path / "single.jsonl", SHORT)
    program = tmp_path / "program.py"
    program.write_text(
        "import sys; from pathlib import Path\n"
        "from siq_vl.evaluation.held_out import held_out_items\n"
        "from siq_vl.evaluation.runner import RunSettings, load_any, process_state, run\n"
        "assert process_state().num_processes == 2\n"
        "made = run(*load_any(sys.argv[1]), held_out_items(10), Path(sys.argv[2]), RunSettings(4, 6))\n"
        "assert len(made) == 14\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    environment = {"PYTHONPATH": str(REPO_ROOT), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"}
    environment = {**os.environ, **environment}
    done = subprocess.run(
        [*command, str(program), str(checkpoint), str(tmp_path / "double.jsonl")],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert kept.read_predictions(tmp_path / "double.jsonl") == single
    assert not list(tmp_path.glob("double.rank*"))


def test_mcnemar_and_bootstrap():
    before, after = [True] * 6 + [False] * 14, [False] + [True] * 10 + [False] * 9
    # One question lost and five won: p = 2 * (C(6, 0) + C(6, 1)) / 2^6.
    assert mcnemar(before, after) == (1, 5, 14 / 64)
    assert mcnemar(before, before) == (0, 0, 1.0)
    mean, low, high = paired_bootstrap(before, after)
    assert mean == pytest.approx(0.2)
    # The percentile interval is close to the normal one of the mean of 20 differences.
    deviation = ((0.8 * 5 / 20 * 0.8 + 0.04 * 14 / 20 + 1.44 / 20) / 20) ** 0.5
    assert low == pytest.approx(mean - 1.96 * deviation, abs=0.06)
    assert high == pytest.approx(mean + 1.96 * deviation, abs=0.06)
    assert paired_bootstrap(before, before) == (0, 0, 0)
    with pytest.raises(ValueError, match="got 1 and 2 scores"):
        paired_bootstrap([1], [1, 0])
    with pytest.raises(ValueError, match="got 1 and 2 outcomes"):
        mcnemar([True], [True, False])


def test_comparisons_are_made_on_shared_scored_questions(items):
    first = [kept.judge(item, item.answer) for item in items]
    second = [kept.judge(items[0], "", kept.IMAGE, "damaged"), *reversed([kept.judge(item, "x") for item in items[1:]])]
    a, b = same_questions(first, second)
    assert [made.id for made in a] == [made.id for made in b] == [item.id for item in items[1:]]
    with pytest.raises(ValueError, match="share 0 scored questions"):
        same_questions(first, [])
