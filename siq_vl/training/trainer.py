"""TRL's SFT trainer with the loss of each data source, and checkpoints that are known to be whole."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from peft import PeftModel
from safetensors import SafetensorError
from torch.utils.data import DataLoader, Sampler, SequentialSampler
from transformers import PreTrainedTokenizerBase
from trl import SFTTrainer

from siq_vl.data.collation import IGNORED
from siq_vl.data.packing import (
    SDPA_BY_SAMPLE,
    LengthGroupedSampler,
    PackedRows,
    PackingCollator,
    attend_by_sample,
    check_attention,
)
from siq_vl.training.loss import TRITON_DEVICES, TokenLosses, sums_by_sample
from siq_vl.training.resume import last_complete_checkpoint, mark_complete
from siq_vl.training.sharding import is_sharded


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
        pack_tokens: most tokens of a packed training row; 0 pads. See `siq_vl.data.packing`.
        lengths: tokens of each training row, to batch rows of like length.
        stored_features: the rows have stored features in place of pictures.
        kwargs: as for `SFTTrainer`.
    """

    def __init__(
        self,
        *args,
        run_settings: dict[str, Any] | None = None,
        in_order: bool = False,
        pack_tokens: int = 0,
        lengths: Sequence[int] | None = None,
        stored_features: bool = False,
        **kwargs,
    ):
        self.in_order = in_order
        super().__init__(*args, **kwargs)
        self.scored_by_trl = TRITON_DEVICES
        self.pack_tokens, self.lengths, self.stored_features = pack_tokens, lengths, stored_features
        if pack_tokens:
            self._check_packing()
        self.run_settings = run_settings or {}
        self.data_collator: Any = SourceCollator(self.data_collator)
        # TRL turns what trains on an NF4 base to bfloat16, which rounds small steps away.
        for parameter in self.model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
        self._source_sums: dict[str, torch.Tensor] = defaultdict(lambda: torch.zeros(2, dtype=torch.float64))

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Return TRL's loss, of weighted tokens in training, and add up what each source has lost."""
        sources, weights = inputs.pop("source", None), inputs.pop("loss_weights", None)
        base = self.model
        if isinstance(base, PeftModel):
            base = base.get_base_model()
        if not self.model.training:
            weights = None
        if self.stored_features and is_sharded(self) and "vision_features" not in inputs:
            # Where weights are sharded, a batch without pictures runs the tower on a blank one, since other processes
            # may run it; with stored features none does.
            hidden = base.config.vision_config.hidden_size
            inputs["vision_features"] = torch.zeros(0, 1, 1, hidden, device=inputs["input_ids"].device)
        token_losses = TokenLosses(model, base, weights, self.scored_by_trl)
        positions = inputs.get("position_ids")
        loss = super().compute_loss(token_losses, inputs, return_outputs, num_items_in_batch)
        if sources is not None and self.model.training:
            losses = sums_by_sample(token_losses.losses, positions)
            tokens = sums_by_sample(token_losses.mask, positions)
            for name, lost, count in zip(sources, losses, tokens, strict=True):
                self._source_sums[name] += torch.stack((lost, count))
        return loss

    def _check_packing(self) -> None:
        check_attention(self.model.language_model.config._attn_implementation)
        if self.is_deepspeed_enabled:
            raise ValueError("batching is packed, but DeepSpeed counts forward passes itself: use DDP, FSDP or padded")
        if self.args.label_smoothing_factor:
            raise ValueError("label_smoothing_factor averages over a row, which packing changes: use batching: padded")

    def get_train_dataloader(self) -> DataLoader:
        padded = self.data_collator
        if self.pack_tokens:
            attention = SDPA_BY_SAMPLE if self._by_sample else self.model.language_model.config._attn_implementation
            placeholder = self.model.config.image_token_id
            self.data_collator = PackingCollator(padded, self.pack_tokens, placeholder, attention)
        try:
            return super().get_train_dataloader()
        finally:
            self.data_collator = padded  # evaluation pads

    def _get_train_sampler(self, train_dataset=None) -> Sampler | None:
        if self.in_order:
            return SequentialSampler(self.train_dataset if train_dataset is None else train_dataset)
        if self.lengths is None:
            return super()._get_train_sampler(train_dataset)
        processes, accumulated = self.args.world_size, self.args.gradient_accumulation_steps
        return LengthGroupedSampler(self.lengths, self._train_batch_size * processes * accumulated, self.args.seed)

    def training_step(self, model, inputs, num_items_in_batch=None):
        """Take a batch as TRL does, or the packed rows of one, row by row; return its loss."""
        if not isinstance(inputs, PackedRows):
            return super().training_step(model, inputs, num_items_in_batch)
        rows = self._as_many_everywhere(inputs.rows)
        losses: list[torch.Tensor] = []
        with attend_by_sample(self.model.language_model.config) if self._by_sample else nullcontext():
            for row in rows:
                with nullcontext() if len(losses) == len(rows) - 1 else self.accelerator.no_sync(model):
                    losses.append(super().training_step(model, row, num_items_in_batch))
        return torch.stack(losses).sum()

    @property
    def _by_sample(self) -> bool:
        """Whether packed rows attend sample by sample; compiled, each new row would be compiled anew."""
        return self.model.language_model.config._attn_implementation == "sdpa" and not self.args.torch_compile

    def _as_many_everywhere(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return as many rows as the process that has most: one is repeated with nothing to learn from it.

        The processes meet in each forward pass.
        """
        if self.accelerator.num_processes == 1:
            return rows
        most = int(self.accelerator.gather(torch.tensor([len(rows)], device=self.accelerator.device)).max())
        shortest = min(rows, key=lambda row: row["input_ids"].numel())
        repeated = {name: value for name, value in shortest.items() if name != "source"}
        repeated["labels"] = torch.full_like(repeated["labels"], IGNORED)
        return [*(dict(repeated) for _ in range(most - len(rows))), *rows]

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
