"""How the tiny language model's weights begin: with heads that look up, so that training need not find them first.

A look-up takes two attention layers that are of no use without each other, and from random weights this model had
not found them after 500 steps of nothing else. Attention that starts near what it will become learns it at once
(mimetic initialisation, Trockman & Kolter 2023, arXiv:2305.09828).
"""

import torch
from torch import nn
from transformers import Qwen2ForCausalLM

_SHARPNESS = 6.0  # of the attention to the previous token, in units of the biases
_MATCH = 2.0  # scale of the queries and keys that match equal tokens
_SLOW = 0.015  # rotary frequencies below it, in radians a token, hardly turn within a description


@torch.no_grad()
def begin_with_look_ups(model: Qwen2ForCausalLM) -> Qwen2ForCausalLM:
    """Set the heads of the first two layers so that the model begins able to look up, and return it.

    Layer 0, first group: every token attends to the one before it, through the biases and the fast rotary
    frequencies, and adds a projection of that token to its own state. Layer 1, first group: a token attends to those
    that were preceded by its like, and copies them (what follows `tea`?). Layer 1, second group: a token attends to
    its like, and copies what stood before that (what is followed by `7`?). Everything else stays random, with what
    it adds made small, and all of it is trained.
    """
    config = model.config
    width, head = config.hidden_size, config.hidden_size // config.num_attention_heads
    group = config.num_attention_heads // config.num_key_value_heads
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight *= 0.05
        layer.mlp.down_proj.weight *= 0.05
    rope = config.to_dict()  # transformers 5 keeps the base among the rope parameters
    base = rope.get("rope_theta") or rope["rope_parameters"]["rope_theta"]
    frequencies = base ** (-torch.arange(0, head, 2) / head)
    slow = (frequencies < _SLOW).float().repeat(2).unsqueeze(1)  # (head, 1), in the layout of rotate_half
    fast = (frequencies > 0.09).float().repeat(2)
    previous, look_up = (layer.self_attn for layer in model.model.layers[:2])
    first, second = slice(0, head), slice(head, 2 * head)
    read, write, copy, like = (nn.init.orthogonal_(torch.empty(head, width)) for _ in range(4))

    previous.k_proj.bias[first] = _SHARPNESS * fast * torch.cat([torch.ones(head // 2), torch.zeros(head // 2)])
    previous.k_proj.weight[first] = 0.0  # by position alone
    back = _SHARPNESS * fast * torch.cat([frequencies.cos(), -frequencies.sin()])
    previous.v_proj.weight[first] = read
    look_up.k_proj.weight[first], look_up.v_proj.weight[first] = _MATCH * write * slow, copy
    look_up.k_proj.weight[second], look_up.v_proj.weight[second] = _MATCH * like * slow, write
    for query in range(group):
        of_first = slice(query * head, (query + 1) * head)
        of_second = slice((group + query) * head, (group + query + 1) * head)
        previous.q_proj.weight[of_first], previous.q_proj.bias[of_first] = 0.0, back
        previous.o_proj.weight[:, of_first] = 0.15 / group * write.T
        look_up.q_proj.weight[of_first] = _MATCH * read * slow
        look_up.o_proj.weight[:, of_first] = 0.3 / group * copy.T
        look_up.q_proj.weight[of_second] = _MATCH * like * slow
        look_up.o_proj.weight[:, of_second] = 0.3 / group * read.T
    return model
