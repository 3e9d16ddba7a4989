"""Stage 0: how the tiny language model begins, and what it is taught."""

from collections import Counter
from random import Random

import pytest
import torch

from siq_vl.data.figures.lexicon import WORDS
from siq_vl.pretraining.text import TextBatches, conversation, encode, language_model, look_up_drill, turn
from siq_vl.processing_siq_vl import _load_backbone_tokenizer
from tests.conftest import REPO_ROOT


@pytest.fixture(scope="module")
def backbone_tokenizer():
    return _load_backbone_tokenizer(str(REPO_ROOT / "backbones" / "qwen2.5-tiny"))


def test_look_ups_are_there_before_training(backbone_tokenizer):
    torch.manual_seed(0)
    model = language_model(backbone_tokenizer).eval()
    model.set_attn_implementation("eager")
    group = model.config.num_attention_heads // model.config.num_key_value_heads
    rng, found, asked = Random(0), Counter(), 60
    for _ in range(asked):
        words = rng.sample(WORDS, 8)
        pairs = ", ".join(map(" ".join, zip(words[::2], words[1::2], strict=True)))
        ids = backbone_tokenizer(f"pairs: {pairs}. {rng.choice(words)}", return_tensors="pt")["input_ids"]
        with torch.no_grad():
            attentions = model(ids, output_attentions=True).attentions
        previous, look_up = attentions[0][0], attentions[1][0, :, -1]
        listed = (ids[0, :-1] == ids[0, -1]).nonzero()[0, 0]
        found["previous"] += previous[:group].diagonal(offset=-1, dim1=1, dim2=2).mean().item()
        found["followed"] += (look_up[0].argmax() == listed + 1).item()
        found["like"] += (look_up[group, :-1].argmax() == listed).item()
    # By chance each would be below 0.2: there are 18 tokens.
    assert {name: count / asked > 0.4 for name, count in found.items()} == dict.fromkeys(found, True)


def test_look_up_drills_supervise_what_is_found():
    for index in range(50):
        pieces = look_up_drill("train", index, seed=0)
        (listed, _), *rest = pieces
        pairs = dict(pair.split() for pair in listed.removeprefix("pairs: ").removesuffix(".").split(", "))
        followed = {value: key for key, value in pairs.items()}
        for (known, asked), (found, learnt) in zip(rest[::2], rest[1::2], strict=True):
            assert (asked, learnt) == (False, True)
            assert {**pairs, **followed}[known] == found.removesuffix(".")


def test_labels_cover_the_response_alone(backbone_tokenizer):
    user, response = conversation("train", 3, seed=0)
    ids, labels = encode(backbone_tokenizer, turn(user, response))
    learnt = [label for label in labels if label != -100]
    assert backbone_tokenizer.decode(learnt, skip_special_tokens=False) == f"{response}<|im_end|>"
    assert labels[-len(learnt) :] == ids[-len(learnt) :] == learnt


def test_batches_depend_on_the_step_alone(backbone_tokenizer):
    batch_at, again = (TextBatches(backbone_tokenizer, 4, seed=1, look_up_steps=2) for _ in range(2))
    first = [batch_at(step) for step in range(8)]
    for step in (5, 0, 7):
        assert torch.equal(again(step)["input_ids"], first[step]["input_ids"])
