"""The output layer at supervised positions alone, on every device.

TRL's fused output layer leaves out the positions without a label where it has Triton, that is on GPUs; elsewhere it scores
all of them, image tokens and padding included.
"""

import functools
import types

import torch
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from siq_vl.data.collation import IGNORED

_TRITON_DEVICES = ("cuda", "xpu")  # there TRL does it itself


def score_supervised_only(model: PreTrainedModel) -> None:
    """Let a model that has TRL's fused output layer score no position whose next token has no label.

    The hidden states are gathered before the output layer, and what it returns is put back in its place: losses,
    gradients and the shapes of all outputs stay as they were.

    Args:
        model: a model whose forward TRL has patched (`add_fused_lm_head`), without PEFT around it.
    """
    scores = model.forward

    @functools.wraps(type(model).forward)  # `generate` looks at the signature
    def forward(self, *args, fused_lm_head=False, labels=None, shift_labels=None, **kwargs):
        whole = not fused_lm_head or labels is None or shift_labels is not None
        if whole or labels.device.type in _TRITON_DEVICES:
            return scores(*args, fused_lm_head=fused_lm_head, labels=labels, shift_labels=shift_labels, **kwargs)
        mask = labels[:, 1:] != IGNORED  # (batch_size, sequence_length - 1)

        def gather(module, inputs, outputs):
            outputs.last_hidden_state = outputs.last_hidden_state[:, :-1][mask].unsqueeze(0)
            return outputs

        handle = self.model.register_forward_hook(gather)
        try:
            outputs = scores(*args, fused_lm_head=True, shift_labels=labels[:, 1:][mask].unsqueeze(0), **kwargs)
        finally:
            handle.remove()
        return _in_place(outputs, mask)

    model.forward = types.MethodType(forward, model)


def _in_place(outputs: ModelOutput, mask: torch.Tensor) -> ModelOutput:
    """Return outputs of shape `(1, mask.sum())` as outputs of the mask's shape, zero where it is False."""
    for name, value in list(outputs.items()):
        if isinstance(value, torch.Tensor) and value.ndim == 2:
            outputs[name] = value.new_zeros(mask.shape).masked_scatter(mask, value)
    return outputs
