"""The loss of each token: where the output layer is applied, and what a token counts.

TRL's trainer calls the model with `fused_lm_head=True` and sums up `log_probs` of the output. `TokenLosses` is what it
calls in the model's place.
"""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from siq_vl.data.collation import IGNORED

# Where TRL has Triton, its output layer leaves out positions without a label by itself. Elsewhere it scores all of them,
# image tokens and padding included.
TRITON_DEVICES = ("cuda", "xpu")


class TokenLosses:
    """A model as TRL's `compute_loss` calls it, with the output layer at supervised positions alone, on every device.

    Losses, gradients and the shapes of all outputs are those of TRL. After the call, `losses` and `mask` are the losses
    of the tokens before they are weighted, float32 without gradient, and whether a token has a label; both of shape
    `(batch_size, sequence_length - 1)`.

    Args:
        model: the model as the trainer runs it, inside DDP or PEFT or neither.
        base: the model alone, whose forward TRL has patched (`add_fused_lm_head`).
        weights: of each token in the loss, of shape `(batch_size, sequence_length)`; None for 1 each.
        scored_by_trl: types of devices where TRL leaves out what has no label.
    """

    def __init__(
        self,
        model: nn.Module,
        base: PreTrainedModel,
        weights: torch.Tensor | None = None,
        scored_by_trl: tuple[str, ...] = TRITON_DEVICES,
    ):
        self.model, self.base, self.weights = model, base, weights
        self.scored_by_trl = scored_by_trl
        self.losses: torch.Tensor | None = None
        self.mask: torch.Tensor | None = None

    def __call__(
        self, *, fused_lm_head: bool = False, labels: torch.Tensor | None = None, **inputs: Any
    ) -> ModelOutput:
        """Run the model; with `fused_lm_head`, return the log-probabilities of the labels in place of logits."""
        if labels is None or not fused_lm_head:
            if labels is not None:
                inputs["labels"] = labels
            return self.model(fused_lm_head=fused_lm_head, **inputs)
        if labels.device.type in self.scored_by_trl:
            outputs = self.model(fused_lm_head=True, labels=labels, **inputs)
        else:
            outputs = self._at_labels(labels, inputs)
        self.losses, self.mask = -outputs.log_probs.detach(), outputs.label_mask.detach()
        if self.weights is not None:
            outputs["log_probs"] = outputs.log_probs * self.weights[:, 1:]
        return outputs

    def _at_labels(self, labels: torch.Tensor, inputs: dict[str, Any]) -> ModelOutput:
        """Let the output layer see the hidden states whose next token has a label, and put what it says in its place."""
        mask = labels[:, 1:] != IGNORED  # (batch_size, sequence_length - 1)

        def gather(module, arguments, outputs):
            # As one row of (1, n_supervised, hidden_size): TRL asks for a batch.
            outputs.last_hidden_state = outputs.last_hidden_state[:, :-1][mask].unsqueeze(0)
            return outputs

        # The decoder is looked up in each call, since FSDP and PEFT replace it.
        handle = self.base.model.register_forward_hook(gather)
        try:
            # Labels that are shifted already are not shifted by TRL.
            outputs = self.model(fused_lm_head=True, shift_labels=labels[:, 1:][mask].unsqueeze(0), **inputs)
        finally:
            handle.remove()
        for name, value in list(outputs.items()):
            if isinstance(value, torch.Tensor) and value.ndim == 2:
                outputs[name] = value.new_zeros(mask.shape).masked_scatter(mask, value)
        return outputs


def sums_by_sample(parts: torch.Tensor, positions: torch.Tensor | None) -> torch.Tensor:
    """Return the sum of each sample's entries, float64 of shape `(n_samples,)`, on the CPU.

    Args:
        parts: of shape `(batch_size, sequence_length - 1)`, one sample a row, or several in a packed one.
        positions: of shape `(1, sequence_length)`, restarting with each sample, where they are packed.
    """
    if positions is None:
        return parts.sum(dim=1, dtype=torch.float64).cpu()
    # An entry belongs to the token that it predicts, which is the next one.
    sample = (positions[0] == 0).cumsum(0)[1:] - 1
    sums = torch.zeros(int((positions == 0).sum()), dtype=torch.float64)
    return sums.index_add(0, sample.cpu(), parts[0].double().cpu())
