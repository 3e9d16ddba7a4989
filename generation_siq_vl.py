"""Generation with SiQ-VL: a bound on the length of the reasoning that leaves no answer out."""

from typing import Optional, Union

import torch
from transformers import LogitsProcessor
from transformers.utils import logging

logger = logging.get_logger(__name__)

THINK, THOUGHT, ANSWER, ANSWERED = "<think>", "</think>", "<answer>", "</answer>"
ANSWER_ROOM = 16  # tokens that are kept free for the answer itself


class ThinkingBudgetLogitsProcessor(LogitsProcessor):
    r"""
    Ends the reasoning of `<think>...</think><answer>...</answer>` after so many tokens, and has the answer follow.

    Where a row has used up its budget inside `<think>`, it goes on with `</think><answer>`, and from there on its own.
    As long as its reasoning or its answer is open, a row does not end its turn; an answer that is still open where
    `max_length` is reached is closed in time. Rows that do not reason, or that end their reasoning in time, go on as
    they would have. What a row is in the middle of is read from its text, so the tags may be any number of tokens, and
    it is read anew at every step, so beams and sampled copies may change places.

    `model.generate(..., max_thinking_tokens=64, tokenizer=processor.tokenizer)` makes one. For other models:

    ```python
    >>> budget = ThinkingBudgetLogitsProcessor(tokenizer, 64)
    >>> budget.start(prompt_length, prompt_length + 128, model.generation_config.eos_token_id)
    >>> model.generate(**inputs, max_new_tokens=128, logits_processor=[budget])
    ```

    Args:
        tokenizer (`PreTrainedTokenizerBase`): The model's tokenizer.
        max_thinking_tokens (`int`): Most tokens between `<think>` and `</think>`; fewer where `max_length` leaves no room
            for an answer after so many.

    Raises:
        ValueError: if the bound is no integer of at least 0.
    """

    def __init__(self, tokenizer, max_thinking_tokens: int):
        if not isinstance(max_thinking_tokens, int) or max_thinking_tokens < 0:
            raise ValueError(
                f"max_thinking_tokens is {max_thinking_tokens!r}, but must be an integer of at least 0: pass the most "
                "tokens that a rationale may have."
            )
        self.tokenizer = tokenizer
        self.max_thinking_tokens = max_thinking_tokens
        self.longest_turn = max(len(self._ids(THOUGHT[cut:] + ANSWER)) for cut in range(len(THOUGHT)))
        self.longest_end = max(len(self._ids(ANSWERED[cut:])) for cut in range(len(ANSWERED)))
        self.prompt_length = self.last = 0
        self.eos_token_ids: list[int] = []

    def start(
        self, prompt_length: int, max_length: int, eos_token_id: Optional[Union[int, list[int]]] = None
    ) -> "ThinkingBudgetLogitsProcessor":
        """
        Says what is about to be generated; `generate` of SiQ-VL does it itself.

        Args:
            prompt_length (`int`): Tokens of the prompt, padding included.
            max_length (`int`): Tokens of prompt and output together, at most.
            eos_token_id (`int` or `list[int]`, *optional*): What ends a turn.

        Returns:
            [`ThinkingBudgetLogitsProcessor`]: this one.

        Raises:
            ValueError: if `max_length` leaves no room for the tags and an answer.
        """
        self.prompt_length = prompt_length
        self.eos_token_ids = [eos_token_id] if isinstance(eos_token_id, int) else list(eos_token_id or [])
        room = max_length - prompt_length
        self.last = room - self.longest_end  # from here on an open answer is closed
        opening = len(self._ids(THINK))
        needed = opening + self.longest_turn + ANSWER_ROOM + self.longest_end
        if room < needed:
            raise ValueError(
                f"max_new_tokens is {room}, but the tags and an answer need {needed}: raise max_new_tokens, best to "
                f"{needed + self.max_thinking_tokens} for max_thinking_tokens={self.max_thinking_tokens}."
            )
        if room < needed + self.max_thinking_tokens:
            logger.warning_once(
                f"max_new_tokens is {room}, so a rationale has {room - needed} tokens at most, not "
                f"max_thinking_tokens={self.max_thinking_tokens}: raise it to {needed + self.max_thinking_tokens}."
            )
        return self

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.Tensor:
        """
        Forces or forbids what the rows' budgets ask for.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`): Prompt and output so far.
            scores (`torch.FloatTensor` of shape `(batch_size, vocab_size)`): Scores of the next token.

        Returns:
            `torch.FloatTensor` of shape `(batch_size, vocab_size)`.
        """
        bounded = scores.clone()
        for row, ids in enumerate(input_ids.tolist()):
            prompt, output = ids[: self.prompt_length], ids[self.prompt_length :]
            forced, is_open = self._next(output, self._text(prompt[-16:]).rstrip().endswith(THINK))
            if forced is not None:
                bounded[row] = -float("inf")
                bounded[row, forced] = 0.0
            elif is_open:
                bounded[row, self.eos_token_ids] = -float("inf")
        return bounded

    def _next(self, output: list[int], opened: bool) -> tuple[Optional[int], bool]:
        """The token that has to follow, if any, and whether reasoning or answer are open, so that the turn goes on."""
        start = 0 if opened else self._rationale_start(output)
        if start is not None:
            limit = start + max(0, min(self.max_thinking_tokens, self.last - ANSWER_ROOM - self.longest_turn - start))
            rationale = self._text(output[start:limit])
            if len(output) < limit and THOUGHT not in rationale:
                return None, True
            turn = [] if THOUGHT in rationale else self._ids(_missing(rationale, THOUGHT) + ANSWER)
            if turn and len(output) < limit + len(turn):
                return turn[len(output) - limit], True
        text = self._text(output[: self.last])
        if not _is_open(text, ANSWER, ANSWERED):
            return None, False
        if len(output) < self.last:
            return None, True
        end, place = self._ids(_missing(text, ANSWERED)), len(output) - self.last
        return (end[place] if place < len(end) else next(iter(self.eos_token_ids), None)), False

    def _rationale_start(self, output: list[int]) -> Optional[int]:
        """Number of tokens up to and with `<think>`, None where there is none before the answer."""
        text = self._text(output)
        if THINK not in text.partition(ANSWER)[0]:
            return None
        return next(count for count in range(1, len(output) + 1) if THINK in self._text(output[:count]))

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    def _text(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def _is_open(text: str, opening: str, closing: str) -> bool:
    _, found, rest = text.partition(opening)
    return bool(found) and closing not in rest


def _missing(text: str, tag: str) -> str:
    """What is missing of a tag that a text may have begun to write at its end."""
    begun = next((cut for cut in range(len(tag) - 1, 0, -1) if text.endswith(tag[:cut])), 0)
    return tag[begun:]


__all__ = ["ThinkingBudgetLogitsProcessor"]
