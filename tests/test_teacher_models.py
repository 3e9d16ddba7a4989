"""What suits the named teachers: ids that load, sampling, prompts and system turns, the same here and behind a server."""

import asyncio
import json
import re
from pathlib import Path

import pytest
import tiny_teachers
import torch
from chat_server import Server, serving
from PIL import Image

from siq_vl.distill.card import write_card
from siq_vl.distill.options import parse_options
from siq_vl.distill.pipeline import Progress, Run
from siq_vl.distill.prompts import Prompts
from siq_vl.distill.questions import EncodedPicture, TraceQuestion, figure_questions
from siq_vl.distill.selection import Selection, record_rules, update_verdicts
from siq_vl.distill.store_page import write_page
from siq_vl.distill.teachers.base import TeacherRequest
from siq_vl.distill.teachers.local import PresencePenalty, TransformersTeacher
from siq_vl.distill.teachers.models import check_loadable, defaults_for, generate_arguments, request_fields
from siq_vl.distill.teachers.server import ServerSettings, ServerTeacher
from siq_vl.distill.traces import TraceStore, read_traces
from siq_vl.distill.verification import Verification
from siq_vl.distill.yields import store_yield, tables

THINKING = {"do_sample": True, "temperature": 1.0, "top_p": 0.95, "top_k": 20}
INSTRUCT = {"do_sample": True, "temperature": 0.7, "top_p": 0.8, "top_k": 20, "presence_penalty": 1.5}


def without(settings: dict, *names: str) -> dict:
    return {name: value for name, value in settings.items() if name not in names}


@pytest.mark.parametrize(
    ("model", "local", "served"),
    [
        (
            "Qwen/Qwen3-VL-2B-Thinking",
            {**THINKING, "max_new_tokens": 4096},  # as stores of earlier versions have it
            {**without(THINKING, "do_sample"), "max_tokens": 4096},
        ),
        (
            "models/qwen3-vl-8b-instruct-fp8",
            {**INSTRUCT, "max_new_tokens": 2048},
            {**without(INSTRUCT, "do_sample"), "max_tokens": 2048},
        ),
        (
            "OpenGVLab/InternVL3_5-2B-HF",
            {"do_sample": True, "temperature": 0.6, "top_p": 0.95, "top_k": 0, "max_new_tokens": 2048},
            {"temperature": 0.6, "top_p": 0.95, "max_tokens": 2048},
        ),
        (
            "tencent/HunyuanOCR",
            {"do_sample": False, "max_new_tokens": 4096},
            {"temperature": 0.0, "max_tokens": 4096},
        ),
        # A server may have settings of its own for a model that nobody here knows.
        ("someone/else", {"do_sample": False, "max_new_tokens": 1024}, {"max_tokens": 1024}),
    ],
)
def test_a_model_is_sampled_as_its_card_says_here_and_there(model, local, served):
    assert generate_arguments(model, {}) == local
    assert request_fields(model, {}) == served


def test_what_is_given_replaces_what_the_card_says():
    thinking = "Qwen/Qwen3-VL-2B-Thinking"
    greedy = {"do_sample": False, "max_new_tokens": 4096}
    assert generate_arguments(thinking, {"temperature": 0}) == greedy
    assert generate_arguments(thinking, {"do_sample": False}) == greedy
    assert request_fields(thinking, {"do_sample": False})["temperature"] == 0.0
    # A temperature alone was ignored for a model that is greedy by default.
    drawn = {"do_sample": True, "temperature": 0.6, "max_new_tokens": 9}
    assert generate_arguments("someone/else", {"temperature": 0.6, "max_tokens": 9}) == drawn
    assert request_fields("someone/else", {"max_new_tokens": 9, "min_p": 0.1}) == {"max_tokens": 9, "min_p": 0.1}
    assert request_fields("someone/else", {"max_tokens": 9}, 7) == {"max_tokens": 7}


@pytest.mark.parametrize(
    "model", ["OpenGVLab/InternVL3_5-2B", "OpenGVLab/InternVL3-8B", "OpenGVLab/InternVL2_5-1B-MPO"]
)
def test_an_internvl_of_remote_code_is_refused_with_the_id_that_loads(model):
    with pytest.raises(ValueError, match=f"pass --model {model}-HF, the same weights"):
        TransformersTeacher(model)
    check_loadable(f"{model}-HF")


def test_a_folder_of_remote_code_is_refused_too(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "internvl_chat", "auto_map": {}}))
    for trusted in (False, True):
        with pytest.raises(ValueError, match="which AutoModelForImageTextToText refuses"):
            TransformersTeacher(str(tmp_path), trust_remote_code=trusted)


def test_a_type_that_this_transformers_lacks_is_named_with_what_has_it(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "from_tomorrow"}))
    wanted = r"is of type from_tomorrow, which transformers \d.* does not have: "
    wanted += "install a newer" if tiny_teachers.V5 else "make an environment .* -r requirements-v5.txt"
    with pytest.raises(ValueError, match=wanted):
        TransformersTeacher(str(tmp_path))


@pytest.mark.skipif(tiny_teachers.V5, reason="transformers 5 has HunYuanVL")
def test_hunyuan_ocr_names_the_requirements_that_have_it(tmp_path):
    with pytest.raises(ValueError, match="tencent/HunyuanOCR is of type hunyuan_vl.* -r requirements-v5.txt"):
        TransformersTeacher("tencent/HunyuanOCR")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "hunyuan_vl"}))
    with pytest.raises(ValueError, match="is of type hunyuan_vl.* -r requirements-v5.txt"):
        TransformersTeacher(str(tmp_path))


def test_a_setting_that_generate_does_not_know_is_refused_before_anything_is_loaded():
    with pytest.raises(ValueError, match="sampling names 'frequency_penalty', which transformers' generate does not"):
        TransformersTeacher("nobody/nothing", sampling={"frequency_penalty": 1.0})


def test_a_penalty_for_presence_is_taken_once_and_not_for_the_prompt():
    written = torch.tensor([[3, 0, 1, 1], [3, 3, 2, 0]])
    scores = PresencePenalty(1.5, 2)(written, torch.ones(2, 4))
    assert scores.tolist() == [[1, -0.5, 1, 1], [-0.5, 1, -0.5, 1]]
    assert torch.equal(PresencePenalty(1.5, 4)(written, torch.ones(2, 4)), torch.ones(2, 4))


@pytest.fixture(scope="module")
def internvl(tmp_path_factory) -> Path:
    return tiny_teachers.internvl(tmp_path_factory.mktemp("model"))


def test_a_local_model_is_penalised_as_a_served_one(internvl, monkeypatch):
    question = next(figure_questions(1))
    asked = [TeacherRequest(question, question.pictures(), question.question)]

    def written(**sampling) -> list[int]:
        teacher = TransformersTeacher(str(internvl), sampling={"do_sample": False, **sampling}, max_new_tokens=24)
        rows: list[list[int]] = []
        monkeypatch.setattr(teacher, "_reply", lambda row, *_: rows.append(row.tolist()))
        teacher._generate(asked)
        assert teacher.settings() == {"do_sample": False, **sampling, "max_new_tokens": 24, "seed": 0}
        return rows[0]

    plain, penalised = written(), written(presence_penalty=1e4)
    assert len(set(plain)) < len(plain)
    assert len(set(penalised)) == len(penalised) > 3


def test_a_picture_in_crops_is_asked_in_a_batch(internvl):
    """InternVL's processor crops pictures to patches by default: as many as suit their shape."""
    teacher = TransformersTeacher(str(internvl), max_new_tokens=4)
    teacher._processor.image_processor.crop_to_patches = True
    requests = []
    for size in ((32, 32), (96, 32), (32, 64)):
        picture = EncodedPicture.encode(Image.effect_noise(size, 90).convert("RGB"))
        requests.append(TeacherRequest(TraceQuestion(str(size), "What?"), [picture], "What?"))
    replies = teacher._generate(requests)
    assert len({reply.prompt_tokens for reply in replies}) == 3
    assert [reply.text for reply in replies] == [teacher._generate([request])[0].text for request in requests]


@pytest.mark.skipif(not tiny_teachers.V5, reason="transformers 4 has no HunYuanVL")
def test_hunyuan_ocr_gets_its_empty_system_turn(tmp_path):
    teacher = TransformersTeacher(str(tiny_teachers.hunyuan_vl(tmp_path / "HunyuanOCR")), max_new_tokens=4)
    question = next(figure_questions(1))
    inputs = teacher._inputs([TeacherRequest(question, question.pictures(), "?")])
    text = teacher._processor.tokenizer.decode(inputs["input_ids"][0]).replace("\n", "")
    assert text.startswith("<|im_start|>system<|im_end|><|im_start|>user<pic_s>")
    assert teacher.settings()["system"] == ""
    assert teacher.prompts_family == "hunyuan_ocr"


@pytest.mark.parametrize("model", ["Qwen/Qwen3-VL-2B-Instruct", "tencent/HunyuanOCR", "adder"])
def test_a_server_is_asked_as_a_model_of_this_process_is(model, tmp_path):
    question = next(figure_questions(1))
    with serving() as (server, url):
        server.keep_bodies = True
        command = ["--teacher", "openai", "--model", model, "--base_url", url, "--questions", "q.jsonl"]
        options = parse_options("", command)
        (teacher,) = options.teachers()
        prompts = options.prompts(teacher)
        asyncio.run(ask_once(teacher, TeacherRequest(question, question.pictures(), prompts.render(question))))
    (body,) = server.seen
    defaults = defaults_for(model)
    assert prompts.versions == Prompts(defaults.prompts).versions
    *system, user = body.pop("messages")
    assert user["content"][-1]["text"] == Prompts(defaults.prompts).render(question)
    assert [turn["content"] for turn in system] == ([] if defaults.system is None else [defaults.system])
    assert body == {"model": model, "seed": 0, **request_fields(model, {})}
    assert teacher.settings().get("system") == defaults.system
    assert options.budget(teacher).max_new_tokens == defaults.max_new_tokens


async def ask_once(teacher, request):
    try:
        return await teacher.generate([request])
    finally:
        await teacher.close()


def test_a_budget_reserves_what_a_reply_may_take(internvl):
    command = ["--teacher", "transformers", "--model", str(internvl), "--questions", "q.jsonl"]
    for arguments, bound in (([], 1024), (["--max_new_tokens", "77"], 77), (["--sampling", '{"max_tokens": 5}'], 5)):
        options = parse_options("", [*command, *arguments])
        (teacher,) = options.teachers()
        assert options.budget(teacher).max_new_tokens == bound == teacher.settings()["max_new_tokens"]
    with pytest.raises(ValueError, match="--max_new_tokens is 7, and --sampling sets max_tokens too"):
        parse_options("", [*command, "--max_new_tokens", "7", "--sampling", '{"max_tokens": 5}'])


def adder(url: str, max_tokens: int) -> ServerTeacher:
    """A teacher whose server cuts what is longer than `max_tokens` words."""
    return ServerTeacher("adder", ServerSettings([url], backoff=0.001), sampling={"max_tokens": max_tokens, "seed": 0})


class Cutting(Server):
    """A server that cuts the sums of odd numbers, as long as they are asked for with fewer than 100 tokens."""

    async def respond(self, head, body, writer):
        asked = json.loads(body)
        number = int(re.search(r"How much is (\d+)", asked["messages"][0]["content"][-1]["text"]).group(1))
        if asked["max_tokens"] >= 100 or number % 2 == 0:
            return await super().respond(head, body, writer)
        self.counts["requests"] += 1
        text = "" if number == 1 else "<think>I was about to"
        choice = {"finish_reason": "length", "message": {"role": "assistant", "content": text}}
        self._send(writer, 200, {"choices": [choice], "usage": {"prompt_tokens": 10, "completion_tokens": 50}})
        return True


def test_replies_that_were_cut_are_told_with_the_flag_that_asks_for_them_alone(tmp_path):
    questions = [TraceQuestion(f"sum-{n}", f"How much is {n} + 2?", (str(n + 2),), "number") for n in range(6)]
    rules = Verification()

    def ask(max_tokens: int) -> Progress:
        with TraceStore(tmp_path) as store:
            record_rules(store, rules)
            progress = Run(adder(url, max_tokens), Prompts(), store, rules, progress=False).over(questions)
            update_verdicts(store, rules, Selection())
        return progress

    with serving(Cutting()) as (server, url):
        ask(50)
        found = store_yield(tmp_path).teachers["adder"]
        assert found.cut == {("sum-1", 0), ("sum-3", 0), ("sum-5", 0)} and found.bound == 50
        told = tables(store_yield(tmp_path))["Replies cut off at the bound on their length"]
        assert re.search(r"adder +\| 3 +\| 6 +\| 50.0 +\| 50 +\| --max_new_tokens 100 ", told), told
        for path in (write_page(tmp_path), write_card(tmp_path)):
            assert "--max_new_tokens 100" in path.read_text()
        assert ask(50).skipped == 6
        before = server.counts["requests"]
        progress = ask(100)
        assert (progress.made, progress.skipped, server.counts["requests"] - before) == (3, 3, 3)
        assert ask(100).made == ask(200).made == 0
        assert ask(40).made == 6  # replies that ended within 100 tokens need not end within 40
    assert not {sample for sample in store_yield(tmp_path).teachers["adder"].cut if sample[0] == "sum-0"}
    rows = read_traces(tmp_path).to_list()
    assert {row["sample_id"] for row in rows} == {question.id for question in questions}
