"""What exports to other engines share: chat templates in the Jinja that all of them know, and what is asked of a model."""

import re
from collections.abc import Iterable

from transformers import PretrainedConfig, PreTrainedTokenizerFast

_GUARD = re.compile(r"(\{%-? macro plain\(text\) -?%\}).*?(\{%-? endmacro -?%\})", re.DOTALL)

_SPACED = """\
{%- macro plain(text) -%}
    {%- set shown = GUARDED | replace('\\n', '\\n ') | replace('__>', '__> ') -%}
    {{- shown[:-1] if shown.endswith('__> ') else shown -}}
{%- endmacro -%}
{%- for message in messages -%}
    {{- '<|im_start|> ' + plain(message['role']) + '\\n ' -}}
    {%- if message['content'] is string -%}
        {{- plain(message['content']) -}}
    {%- else -%}
        {%- set joined = namespace(text='') -%}
        {%- for part in message['content'] -%}
            {%- set joined.text = joined.text + part['text'] -%}
        {%- endfor -%}
        {{- plain(joined.text) -}}
    {%- endif -%}
    {{- '<|im_end|>' -}}
    {%- if not loop.last or add_generation_prompt -%}
        {{- ' \\n ' -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|> assistant\\n ' -}}
    {%- if enable_thinking is defined and enable_thinking is false -%}
        {{- '<think></think>' -}}
    {%- endif -%}
{%- endif -%}
"""


def portable_template(template: str, special_tokens: Iterable[str]) -> str:
    """Return a chat template whose guard against forged tokens is made of `replace` alone.

    SiQ-VL's own asks Python whether what lies between `<|` and `|>` is a name. Here each special token by itself is
    written with a space after its `<`, so that other texts in such brackets stay as they are.

    Args:
        template: a chat template; one without SiQ-VL's macro `plain` is returned as it is.
        special_tokens: the tokens that a message may not hold.
    """
    guarded = _guarded(special_tokens)
    return _GUARD.sub(lambda match: f"{match[1]}\n    {{{{- {guarded} -}}}}\n{match[2]}", template)


def spaced_template(special_tokens: Iterable[str]) -> str:
    """Return SiQ-VL's chat template with the spaces that its own tokenizer would put into the text, for one that does not.

    That tokenizer puts a space after each line break and before each piece of text between special tokens. Pictures are
    markers such as `<__media__>` in the text here.
    """
    return _SPACED.replace("GUARDED", _guarded(special_tokens))


def _guarded(special_tokens: Iterable[str]) -> str:
    """The expression that writes `text` without these tokens."""
    guarded = "text"
    # Longer names first: a shorter one may be the beginning of a longer.
    for token in sorted(set(special_tokens), key=lambda token: (-len(token), token)):
        if token.startswith("<"):
            guarded += f" | replace({token!r}, {'< ' + token[1:]!r})"
    return guarded


def special_token_texts(tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """Return the special tokens of a tokenizer: those that end turns and stand for images, not `<think>` and the like."""
    return [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]


def sliding_window(text_config: PretrainedConfig) -> int | None:
    """Return how far back the layers of a language model attend that do not attend to all tokens; None where all do."""
    fields = text_config.to_dict()
    window = fields.get("sliding_window")
    if "layer_types" in fields and fields["layer_types"] is not None:
        return window if "sliding_attention" in fields["layer_types"] else None
    return window if fields.get("use_sliding_window", True) else None
