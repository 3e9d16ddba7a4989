"""Reasoning that is switched off, and reasoning that is bounded: an answer always follows."""

from random import Random

import pytest
import torch
from conftest import REPO_ROOT
from test_modeling import IMAGE
from transformers import GenerationConfig

from siq_vl.data.figures.dataset import sample
from siq_vl.data.figures.rows import user_turn
from siq_vl.evaluation.generation import complete, generate_texts, rendered
from siq_vl.generation_siq_vl import ThinkingBudgetLogitsProcessor
from siq_vl.loading import load_checkpoint
from siq_vl.parsing.answers import is_well_formed, parse

ROOM = 96  # tokens of a whole output: enough for every rationale of the shipped model's questions below


@pytest.fixture(scope="module")
def shipped():
    return load_checkpoint(str(REPO_ROOT))


@pytest.fixture(scope="module")
def asked():
    """Questions of every domain whose rationales differ in length, their pictures, and their free outputs' prompts."""
    drawn = [sample("test", index, hard=False) for index in range(6)]
    return [user_turn(each.question.text) for each in drawn], [[each.image] for each in drawn]


@pytest.fixture(scope="module")
def free(shipped, asked):
    outputs = generate_texts(*shipped, *asked, max_new_tokens=ROOM)
    assert all(map(is_well_formed, outputs))
    return outputs


def lengths(processor, outputs):
    return [len(processor.tokenizer.encode(parse(text).rationale, add_special_tokens=False)) for text in outputs]


@pytest.mark.parametrize("bound", [0, 1, 7, 20])
def test_a_rationale_ends_at_its_bound_and_an_answer_follows(shipped, asked, free, bound):
    outputs = generate_texts(*shipped, *asked, max_new_tokens=ROOM, max_thinking_tokens=bound)
    assert all(map(is_well_formed, outputs))
    for length, text, unbounded in zip(lengths(shipped[1], free), outputs, free, strict=True):
        if length <= bound:
            assert text == unbounded
        else:
            rationale = parse(text).rationale
            assert lengths(shipped[1], [text]) == [bound] and parse(unbounded).rationale.startswith(rationale)
            assert parse(text).answer


def test_a_large_bound_changes_nothing(shipped, asked, free):
    assert len(set(lengths(shipped[1], free))) > 2  # the rows of the batch end at different places
    assert generate_texts(*shipped, *asked, max_new_tokens=256, max_thinking_tokens=200) == free


def test_rows_that_shall_not_think_are_left_alone(shipped, asked):
    """In one batch with rows that think beyond the bound."""
    model, processor = shipped
    texts = [rendered(processor, prompt, {}) for prompt in asked[0]]
    direct = [rendered(processor, prompt, {"enable_thinking": False}) for prompt in asked[0]]
    alone = [made.text for made in complete(model, processor, direct, asked[1], max_new_tokens=ROOM)]
    both = complete(
        model, processor, texts + direct, [*asked[1], *asked[1]], max_new_tokens=ROOM, max_thinking_tokens=4
    )
    mixed = [made.text for made in both]
    assert mixed[len(texts) :] == alone
    assert not any("<think>" in text for text in alone) and all("</answer>" in text for text in alone)
    assert max(lengths(processor, mixed[: len(texts)])) == 4


def test_what_the_bound_ends_is_cut_off(shipped, asked):
    model, processor = shipped
    texts = [rendered(processor, prompt, {}) for prompt in asked[0]]
    inputs = processor(images=asked[1], text=texts, padding=True, padding_side="left", return_tensors="pt")
    tokens = model.generate(**inputs, max_new_tokens=ROOM, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    assert processor.tokenizer.pad_token_id != processor.tokenizer.eos_token_id
    needed = (tokens != processor.tokenizer.pad_token_id).sum(1).tolist()  # with the end of the turn
    assert len(set(needed)) > 2
    for bound in (min(needed) - 1, min(needed), max(needed) - 1, max(needed)):
        made = complete(model, processor, texts, asked[1], max_new_tokens=bound)
        assert [each.cut_off for each in made] == [length > bound for length in needed]


@pytest.mark.parametrize("mode", [{}, {"num_beams": 3}, {"do_sample": True}, {"cache_implementation": "static"}])
def test_generate_takes_the_bound(shipped, asked, mode):
    model, processor = shipped
    text = [rendered(processor, prompt, {}) for prompt in asked[0]]
    inputs = processor(images=asked[1], text=text, padding=True, padding_side="left", return_tensors="pt")
    length = inputs["input_ids"].shape[1]
    arguments = {"max_thinking_tokens": 6, "tokenizer": processor.tokenizer, "max_new_tokens": 48, "do_sample": False}
    output = model.generate(**inputs, **{**arguments, **mode})
    outputs = processor.batch_decode(output[:, length:], skip_special_tokens=True)
    assert all(map(is_well_formed, outputs)) and max(lengths(processor, outputs)) == 6
    if not mode:
        config = GenerationConfig(max_thinking_tokens=6, eos_token_id=processor.tokenizer.eos_token_id, pad_token_id=0)
        by_config = model.generate(**inputs, generation_config=config, tokenizer=processor, max_new_tokens=48)
        assert torch.equal(by_config, output)
        cached = model.generate(**inputs, **arguments, use_cache=False)
        assert torch.equal(cached, output)


MODES = [{}, {"do_sample": True, "num_return_sequences": 2}, {"num_beams": 2}]


@pytest.mark.parametrize("mode", MODES)
def test_tags_of_many_tokens_and_a_model_that_never_ends(make_model, make_image, processor, mode):
    """Random weights write no tag by themselves; here every letter of a tag is a token."""
    model, tokenizer = make_model(), processor.tokenizer
    text = [f"{IMAGE}What is it?<think>", "And <think></think> now?<think>\n", f"{IMAGE}{IMAGE}<think>"]
    images = [[make_image(0)], [], [make_image(1), make_image(2)]]
    inputs = processor(images=images, text=text, padding=True, padding_side="left", return_tensors="pt")
    new = 80
    arguments = {"max_new_tokens": new, "do_sample": False, "eos_token_id": tokenizer.eos_token_id, **mode}
    output = model.generate(**inputs, max_thinking_tokens=9, tokenizer=tokenizer, **arguments)
    for row in output[:, inputs["input_ids"].shape[1] :].tolist():
        turn = tokenizer.encode("</think><answer>", add_special_tokens=False)
        assert row[9 : 9 + len(turn)] == turn
        text = tokenizer.decode(row)
        assert text.count("</think>") == text.count("<answer>") == text.count("</answer>") == 1
        assert set(row[row.index(tokenizer.eos_token_id) :] if tokenizer.eos_token_id in row else []) <= {
            tokenizer.eos_token_id,
            tokenizer.pad_token_id,
        }
        assert tokenizer.eos_token_id not in row[: len(tokenizer.encode(text.partition("</answer>")[0]))]


class TestSteps:
    """What the processor asks for next, text by text."""

    @pytest.fixture
    def next_text(self, processor):
        tokenizer = processor.tokenizer

        def told(output: str, bound: int = 4, room: int = 90) -> str:
            """The text that is forced from here on, `""` where nothing is, `"open"` where only the end of turn is barred."""
            budget = ThinkingBudgetLogitsProcessor(tokenizer, bound).start(3, 3 + room, tokenizer.eos_token_id)
            ids, forced = [7, 7, 7, *tokenizer.encode(output)], []
            while True:
                scores = budget(torch.tensor([ids]), torch.zeros(1, len(tokenizer)))[0]
                barred = scores == -float("inf")
                if barred.sum() < len(tokenizer) - 1 or forced and forced[-1] == tokenizer.eos_token_id:
                    return tokenizer.decode(forced) if forced else "open" if barred[tokenizer.eos_token_id] else ""
                forced.append(int(scores.argmax()))
                ids.append(forced[-1])

        return told

    @pytest.mark.parametrize(
        ("output", "forced"),
        [
            ("", ""),
            ("plain text", ""),
            ("<think>", "open"),
            ("<think>abc", "open"),
            ("<think>abcd", "</think><answer>"),
            ("<think>ab</", "think><answer>"),  # it was about to end by itself
            ("<think>a </t", "</think><answer>"[3:]),
            ("<think></think>", "<answer>"),  # the bound was reached while it was ending by itself
            ("<think></think><answer>8</answer>", ""),
            ("<think>a</think><answer>", "open"),
            ("<think>a</think><answer>8</answer>", ""),
            ("<think>a</think><answer>8</answer> <answer>", ""),
            ("<answer>8", "open"),
            ("<answer><think>abcdef", "open"),  # no reasoning but an answer
        ],
    )
    def test_what_follows(self, next_text, output, forced):
        if output == "<think>a </t":
            assert next_text(output, bound=5) == forced
        else:
            assert next_text(output) == forced

    @pytest.mark.parametrize(
        ("left", "end", "forced"),
        [(0, "", "</answer>"), (1, "", "open"), (0, "</a", "nswer>"), (0, "</answer>", ""), (-2, "", None)],
    )
    def test_an_open_answer_is_closed_in_time(self, next_text, processor, left, end, forced):
        """`left` more tokens of the answer fit before it has to be closed."""

        def count(text: str) -> int:
            return len(processor.tokenizer.encode(text, add_special_tokens=False))

        longest = max(count("</answer>"[cut:]) for cut in range(9))
        wanted = 70 - longest - left - count("<answer>") - count(end)
        told = next_text("<answer>" + "x" * wanted + end, room=70)
        if forced is None:  # two of its tokens are there already
            assert "</answer>".endswith(told.removesuffix("<|im_end|>")) and len(told) > 3
        else:
            assert told.removesuffix("<|im_end|>") == forced


class TestReadingOnce:
    """A row is read token by token, and what was read is read again only where rows change places."""

    @pytest.fixture
    def budget(self, processor):
        def make():
            return ThinkingBudgetLogitsProcessor(processor.tokenizer, 12).start(3, 93, processor.tokenizer.eos_token_id)

        return make

    def test_a_step_reads_its_tokens_alone(self, budget, processor, monkeypatch):
        read = []
        decode = type(processor.tokenizer).decode
        monkeypatch.setattr(
            type(processor.tokenizer),
            "decode",
            lambda self, ids, **how: read.append(len(ids)) or decode(self, ids, **how),
        )
        ids = torch.tensor(
            [[7, 7, 7, *processor.tokenizer.encode("<think>" + "letters " * 10, add_special_tokens=False)]] * 4
        )
        known = budget()
        for length in range(3, ids.shape[1]):
            del read[:]
            known(ids[:, :length], torch.zeros(4, len(processor.tokenizer)))
            assert sum(read) <= 4 * 64  # a window or two a row, however long it is

    def test_rows_that_change_places_and_drafts_that_are_taken_back(self, budget, processor):
        """What is asked for is what a processor asks for that reads everything anew."""
        tokenizer, chance = processor.tokenizer, Random(0)
        texts = ("<think>", "</think>", "<answer>", "</answer>", "a", "é", "</", "ink>", "answer>", " ")
        forced = 0
        for _ in range(2):
            known, ids, earlier, waiting = budget(), torch.full((3, 3), 7), [], [[], [], []]
            while ids.shape[1] < 93:
                scores = known(ids, torch.zeros(3, len(tokenizer)))
                assert torch.equal(scores, budget()(ids, torch.zeros(3, len(tokenizer))))
                following = []
                for row, tokens in zip(scores, waiting, strict=True):
                    allowed = (row == 0).nonzero()[:, 0].tolist()
                    if len(allowed) == 1:
                        forced += 1
                        tokens[:] = allowed
                    elif not tokens:
                        tokens += tokenizer.encode(chance.choice(texts), add_special_tokens=False)
                    following.append(tokens.pop(0))
                earlier.append(ids)
                ids = torch.cat([ids, torch.tensor(following)[:, None]], dim=1)
                if chance.random() < 0.1:
                    ids = ids[[chance.randrange(3) for _ in range(3)]]
                if chance.random() < 0.05:
                    ids = earlier[-2:][0]
        assert forced > 10


@pytest.mark.parametrize("bound", [-1, 2.5])
def test_a_bound_is_a_count(processor, bound):
    with pytest.raises(ValueError, match="max_thinking_tokens is"):
        ThinkingBudgetLogitsProcessor(processor.tokenizer, bound)


def test_refuses_what_leaves_no_room(shipped, asked):
    model, processor = shipped
    inputs = processor(images=asked[1][0], text=rendered(processor, asked[0][0], {}), return_tensors="pt")
    with pytest.raises(ValueError, match="pass tokenizer=processor.tokenizer"):
        model.generate(**inputs, max_thinking_tokens=4)
    with pytest.raises(ValueError, match="raise max_new_tokens, best to 44"):
        model.generate(**inputs, max_thinking_tokens=4 + 10, tokenizer=processor.tokenizer, max_new_tokens=12)
    (made,) = complete(
        model,
        processor,
        [rendered(processor, asked[0][0], {})],
        [asked[1][0]],
        max_new_tokens=33,
        max_thinking_tokens=99,  # there is room for three
    )
    text = made.text
    assert is_well_formed(text) and lengths(processor, [text]) == [3]
