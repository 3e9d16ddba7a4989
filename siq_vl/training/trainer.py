"""TRL's SFT trainer with the loss of each data source, and checkpoints that are known to be whole."""

from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from safetensors import SafetensorError
from torch import nn
from torch.utils.data import SequentialSampler
from transformers import PreTrainedTokenizerBase
from trl import SFTTrainer

from siq_vl.training.resume import last_complete_checkpoint, mark_complete


class SourceCollator:
    """Any collator, with the rows' optional column `source` kept as a list of names.

    Args:
        collate: the collator that makes the tensors; it drops columns that it does not know.
    """

    def __init__(self, collate: Callable[[list[dict]], dict[str, Any]]):
        self.collate = collate

    def __call__(self, rows: list[dict]) -> dict[str, Any]:
        batch = self.collate([{name: value for name, value in row.items() if name != "source"} for row in rows])
        if all(row.get("source") for row in rows):
            batch["source"] = [row["source"] for row in rows]
        return batch


class AnswerWeights:
    """A collator that also returns `loss_weights`, float32 of shape `(batch_size, sequence_length)`.

    The tokens of a supervised `<answer>...</answer>`, tags included, have the given weight, all others 1.

    Args:
        collate: the collator that makes `input_ids` and `labels`.
        tokenizer: turns tokens into text.
        weight: of the answer's tokens.
    """

    def __init__(
        self, collate: Callable[[list[dict]], dict[str, Any]], tokenizer: PreTrainedTokenizerBase, weight: float
    ):
        self.collate, self.tokenizer, self.weight = collate, tokenizer, weight

    def __call__(self, rows: list[dict]) -> dict[str, Any]:
        batch = self.collate(rows)
        weights = torch.ones(batch["labels"].shape)
        for row, labels in zip(weights, batch["labels"], strict=True):
            row[self._answer(labels)] = self.weight
        return {**batch, "loss_weights": weights}

    def _answer(self, labels: torch.Tensor) -> list[int]:
        """Return the positions of the last answer among the supervised tokens."""
        positions = (labels >= 0).nonzero()[:, 0].tolist()
        pieces = self.tokenizer.batch_decode(labels[positions].unsqueeze(1), clean_up_tokenization_spaces=False)
        text = "".join(pieces)
        begin = text.rfind("<answer>")
        end = text.find("</answer>", begin)
        if begin < 0 or end < 0:
            return []
        found, place = [], 0
        for position, piece in zip(positions, pieces, strict=True):
            if place < end + len("</answer>") and place + len(piece) > begin:
                found.append(position)
            place += len(piece)
        return found


class SiQVLTrainer(SFTTrainer):
    """`SFTTrainer` that logs `loss/<source>` for rows that name their source, and marks checkpoints as complete.

    In training, a batch's `loss_weights` multiply the loss of each token; the mean is still taken over their number, and
    losses by source and in evaluation are plain.

    Args:
        run_settings: what must be the same for a run to go on from a checkpoint; kept in each.
        in_order: train on the rows in their order instead of shuffling them.
        kwargs: as for `SFTTrainer`.
    """

    def __init__(self, *args, run_settings: dict[str, Any] | None = None, in_order: bool = False, **kwargs):
        self.in_order = in_order
        super().__init__(*args, **kwargs)
        self.run_settings = run_settings or {}
        self.data_collator = SourceCollator(self.data_collator)
        # TRL turns what trains on an NF4 base to bfloat16, which rounds small steps away.
        for parameter in self.model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
        self._source_sums: dict[str, torch.Tensor] = defaultdict(lambda: torch.zeros(2, dtype=torch.float64))
        self._losses: tuple[torch.Tensor, torch.Tensor] | None = None
        self._weights: torch.Tensor | None = None
        self.model.register_forward_hook(self._keep_losses)

    def _get_train_sampler(self, train_dataset=None):
        if self.in_order:
            return SequentialSampler(self.train_dataset if train_dataset is None else train_dataset)
        return super()._get_train_sampler(train_dataset)

    def _keep_losses(self, module: nn.Module, inputs: tuple, outputs: Any) -> None:
        """Keep the per-token losses and their mask, `(batch_size, sequence_length - 1)`, of the fused output layer."""
        if module.training and "log_probs" in outputs and outputs.log_probs is not None:
            self._losses = -outputs.log_probs.detach(), outputs.label_mask.detach()
            if self._weights is not None:
                outputs["log_probs"] = outputs.log_probs * self._weights[:, 1:]

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        sources = inputs.pop("source", None)
        self._weights = inputs.pop("loss_weights", None)
        loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if sources is not None and self._losses is not None:
            losses, mask = (part.sum(dim=1, dtype=torch.float64).cpu() for part in self._losses)
            for name, summed, count in zip(sources, losses, mask, strict=True):
                self._source_sums[name] += torch.stack((summed, count))
        self._losses = self._weights = None
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs.update(self._loss_by_source())
        super().log(logs, start_time)

    def _loss_by_source(self) -> dict[str, float]:
        """Return the mean loss a supervised token, by source, since the last call, over all processes."""
        sums: dict[str, torch.Tensor] = defaultdict(lambda: torch.zeros(2, dtype=torch.float64))
        for part in gather_object([dict(self._source_sums)]):
            for name, pair in part.items():
                sums[name] += pair
        self._source_sums.clear()
        return {f"loss/{name}": (pair[0] / pair[1].clamp(min=1)).item() for name, pair in sorted(sums.items())}

    def _save_checkpoint(self, model, trial):
        folder = Path(self.args.output_dir)
        step = self.state.global_step
        try:
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                mark_complete(folder / f"checkpoint-{step}", step, self.run_settings)
        except (OSError, RuntimeError, SafetensorError) as error:
            last = last_complete_checkpoint(folder)
            raise OSError(
                f"the checkpoint of step {step} could not be written ({error}); the last complete one is "
                f"{last or 'none'}: free some disk space and run the same command again"
            ) from error
