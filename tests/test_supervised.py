"""The output layer at supervised positions alone computes what TRL computes at all of them."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer
from trl.trainer import utils

from siq_vl.data.collation import ConversationCollator
from siq_vl.data.figures.rows import assistant_turn, user_turn
from siq_vl.training.recipes import parse_recipe
from siq_vl.training.trainer import SiQVLTrainer


def rows(make_image) -> list[dict]:
    texts = [("What?", "A cat."), ("What is it, and where?", "It is here, on the left."), ("And this?", "No.")]
    return [
        {"images": [make_image(seed)], "prompt": user_turn(question), "completion": assistant_turn(answer)}
        for seed, (question, answer) in enumerate(texts)
    ]


class Recorder:
    """TRL's chunked output layer, with the number of positions of each call."""

    def __init__(self):
        self.layer, self.positions = utils._ChunkedLogProbFunction, []

    def apply(self, hidden, *args):
        self.positions.append(hidden.shape[0])
        return self.layer.apply(hidden, *args)


def trained(trainer_class, make_model, processor, batch, tmp_path, peft, checkpointing):
    """Loss of a batch and the gradients that it leaves, by the trainer's own `compute_loss`."""
    settings = SFTConfig(
        str(tmp_path), bf16=False, use_cpu=True, report_to="none", max_length=None, remove_unused_columns=False,
        gradient_checkpointing=checkpointing, dataset_kwargs={"skip_prepare_dataset": True},
    )  # fmt: skip
    model = make_model().requires_grad_(False)
    model.model.projector.requires_grad_(True)
    adapter = LoraConfig(r=2, target_modules=r".*language_model.*q_proj", modules_to_save=["projector"])
    torch.manual_seed(0)
    trainer = trainer_class(
        model,
        args=settings,
        train_dataset=Dataset.from_dict({"index": [0]}),
        data_collator=lambda rows: rows,
        processing_class=processor,
        peft_config=adapter if peft else None,
    )
    trainer.model.train()
    seen = []

    def model_that_tells(**inputs):
        outputs = model(**inputs)
        seen.append(dict(outputs))
        return outputs

    # What TRL's own `compute_loss` gets to see of the model.
    compute_loss = SFTTrainer.compute_loss
    model = trainer.model
    with pytest.MonkeyPatch.context() as patched:

        def told(self, called, *args):
            nonlocal model
            model = called
            return compute_loss(self, model_that_tells, *args)

        patched.setattr(SFTTrainer, "compute_loss", told)
        loss = trainer.compute_loss(trainer.model, dict(batch))
    loss.backward()
    return loss, seen[0], {name: p.grad for name, p in trainer.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(("peft", "checkpointing"), [(False, False), (True, False), (True, True)])
def test_loss_and_gradients_are_those_of_trl(
    make_model, make_image, processor, tmp_path, monkeypatch, peft, checkpointing
):
    batch = ConversationCollator(processor)(rows(make_image))
    supervised = int((batch["labels"][:, 1:] != -100).sum())
    recorder = Recorder()
    monkeypatch.setattr(utils, "_ChunkedLogProbFunction", recorder)
    ours = trained(SiQVLTrainer, make_model, processor, batch, tmp_path, peft, checkpointing)
    theirs = trained(SFTTrainer, make_model, processor, batch, tmp_path, peft, checkpointing)
    assert recorder.positions == [supervised, batch["labels"][:, 1:].numel()]
    torch.testing.assert_close(ours[0], theirs[0])
    assert ours[2].keys() == theirs[2].keys() and any("projector" in name for name in ours[2])
    for name, gradient in theirs[2].items():
        torch.testing.assert_close(ours[2][name], gradient, rtol=1e-4, atol=1e-6)
    for name in ("log_probs", "entropy", "is_top1", "label_mask"):
        torch.testing.assert_close(ours[1][name], theirs[1][name])


def test_a_batch_without_labels_trains_nothing(make_model, make_image, processor, tmp_path):
    batch = ConversationCollator(processor)(rows(make_image))
    batch["labels"] = torch.full_like(batch["labels"], -100)
    loss, _, gradients = trained(SiQVLTrainer, make_model, processor, batch, tmp_path, False, False)
    assert loss == 0 and gradients and all((gradient == 0).all() for gradient in gradients.values())


def test_a_frozen_tower_keeps_nothing(make_model, make_image, processor, tmp_path):
    """Stage 1 differentiates through the language model; of the tower no tensor is kept, and nothing frozen has a gradient."""
    model = make_model().requires_grad_(False).train()
    model.model.projector.requires_grad_(True)
    inside, kept = [], []
    model.model.vision_tower.register_forward_pre_hook(lambda *_: inside.append(True))
    model.model.vision_tower.register_forward_hook(lambda *_: inside.clear())

    def keep(tensor):
        kept.append(bool(inside))
        return tensor

    batch = ConversationCollator(processor)(rows(make_image))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(**batch).loss
    assert kept and not any(kept)
    loss.backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == {
        f"model.projector.linear.{name}" for name in ("weight", "bias")
    }


def test_liger_is_refused(tmp_path):
    with pytest.raises(ValueError, match="use_liger_kernel is true, but Liger has no kernels for this model type"):
        parse_recipe(("1",), ["--use_liger_kernel", "true", "--output_dir", str(tmp_path)])
