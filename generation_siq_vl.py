"""Generation with SiQ-VL: a bound on the length of the reasoning that leaves no answer out."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Optional, Union

import torch
from transformers import LogitsProcessor
from transformers.utils import logging

logger = logging.get_logger(__name__)

THINK, THOUGHT, ANSWER, ANSWERED = "<think>", "</think>", "<answer>", "</answer>"
ANSWER_ROOM = 16  # tokens that are kept free for the answer itself
_WINDOW = 32  # last tokens in which a tag is looked for: more than a tag of one token a letter has
_STEPS_KEPT = 8  # past steps from which rows may go on


@dataclass(frozen=True)
class _Written:
    """
    What a row has written so far, as far as the bound asks.

    Args:
        length (`int`): Tokens of its output.
        start (`int`, *optional*): Number of tokens up to and with `<think>`; 0 where the prompt ends with it; None where
            there is none before the answer.
        thought (`bool`): Whether `</think>` followed within the bound.
        answer_end (`int`, *optional*): Number of tokens up to and with the first `<answer>`.
        answer_rest (`str`): What the last of these tokens wrote after it.
        answered (`bool`): Whether `</answer>` followed.
    """

    length: int = 0
    start: Optional[int] = None
    thought: bool = False
    answer_end: Optional[int] = None
    answer_rest: str = ""
    answered: bool = False


class ThinkingBudgetLogitsProcessor(LogitsProcessor):
    r"""
    Ends the reasoning of `<think>...</think><answer>...</answer>` after so many tokens, and has the answer follow.

    Where a row has used up its budget inside `<think>`, it goes on with `</think><answer>`, and from there on its own.
    As long as its reasoning or its answer is open, a row does not end its turn; an answer that is still open where
    `max_length` is reached is closed in time. Rows that do not reason, or that end their reasoning in time, go on as
    they would have. What a row is in the middle of is read from its text, so the tags may be any number of tokens. At
    each step only what is new is read; beams may change places, and drafts may be taken back.

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
        self._may_end_a_tag: dict[int, bool] = {}  # by token: whether it writes a bracket
        self._steps: list[tuple[torch.Tensor, list[_Written]]] = []  # ids and what they say, the last step first

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
        self._steps = []
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
        forced: list[tuple[int, int]] = []  # row and token
        open_rows: list[int] = []
        on_host = input_ids.cpu()  # once for all that is looked at
        rows = self._read(on_host[:, max(0, self.prompt_length - _WINDOW) :])
        for row, written in enumerate(rows):
            token, is_open = self._next(written, on_host[row, self.prompt_length :])
            if token is not None:
                forced.append((row, token))
            elif is_open:
                open_rows.append(row)
        if not forced and not open_rows:
            return scores
        bounded = scores.clone()
        if open_rows and self.eos_token_ids:
            bounded[torch.tensor(open_rows)[:, None], torch.tensor(self.eos_token_ids)] = -float("inf")
        for row, token in forced:
            bounded[row] = -float("inf")
            bounded[row, token] = 0.0
        return bounded

    def _read(self, ids: torch.Tensor) -> list[_Written]:
        """
        Reads what rows have written since the last step that they go on from.

        Args:
            ids (`torch.LongTensor` of shape `(batch_size, n_tokens)`): The end of the prompt, and the output.
        """
        rows: list[Optional[_Written]] = [None] * len(ids)
        for earlier, known in self._steps:
            length = earlier.shape[1]
            if length >= ids.shape[1] or None not in rows:
                continue
            # Nearly always every row goes on from the one in its place.
            if len(earlier) == len(ids) and torch.equal(ids[:, :length], earlier):
                rows = [found or written for found, written in zip(rows, known, strict=True)]
                continue
            for row, found in enumerate(rows):
                if found is None:
                    same = (earlier == ids[row, :length]).all(dim=1).nonzero()
                    rows[row] = known[int(same[0])] if len(same) else None
        n_prompt = min(self.prompt_length, _WINDOW)
        read = []
        for row, found in enumerate(rows):
            if found is None:
                opened = self._text(ids[row, max(0, n_prompt - 16) : n_prompt].tolist()).rstrip().endswith(THINK)
                found = _Written(start=0 if opened else None)
            new = ids[row, n_prompt + found.length :].tolist()
            for token in new:
                found = self._after(found, token, ids[row, n_prompt:])
            read.append(found)
        self._steps = [(ids.clone(), read), *self._steps][:_STEPS_KEPT]
        return read

    def _after(self, written: _Written, token: int, output: torch.Tensor) -> _Written:
        """What a row has written with one more token of its output, of shape `(n_tokens,)`."""
        written = replace(written, length=written.length + 1)
        if token not in self._may_end_a_tag:
            self._may_end_a_tag[token] = ">" in self._text([token])
        if not self._may_end_a_tag[token]:
            return written
        length = written.length
        begin = max(0, length - _WINDOW)
        text = self._text(output[begin:length].tolist())
        if written.start is None and written.answer_end is None and THINK in text.partition(ANSWER)[0]:
            written = replace(written, start=length)
        elif written.start is not None and not written.thought and length <= self._limit(written.start):
            since = self._text(output[max(begin, written.start) : length].tolist())
            written = replace(written, thought=THOUGHT in since)
        if written.answer_end is None:
            _, found, rest = text.partition(ANSWER)
            if found:
                written = replace(written, answer_end=length, answer_rest=rest, answered=ANSWERED in rest)
        elif not written.answered and length <= self.last:  # from there on it is the bound that writes
            since = self._text(output[max(begin, written.answer_end) : length].tolist())
            if begin <= written.answer_end:
                since = written.answer_rest + since
            written = replace(written, answered=ANSWERED in since)
        return written

    def _limit(self, start: int) -> int:
        """The number of tokens at which a rationale that began after `start` has to end."""
        room = self.last - ANSWER_ROOM - self.longest_turn - start
        return start + max(0, min(self.max_thinking_tokens, room))

    def _next(self, written: _Written, output: torch.Tensor) -> tuple[Optional[int], bool]:
        """
        The token that has to follow, if any, and whether reasoning or answer are open, so that the turn goes on.

        Args:
            written (`_Written`): What the row has written.
            output (`torch.LongTensor` of shape `(n_tokens,)`): The same as token ids.
        """
        length = written.length
        if written.start is not None:
            limit = self._limit(written.start)
            if length < limit and not written.thought:
                return None, True
            if not written.thought and length < limit + self.longest_turn:
                begun = self._text(output[max(written.start, limit - _WINDOW) : limit].tolist())
                turn = self._ids(_missing(begun, THOUGHT) + ANSWER)
                if length < limit + len(turn):
                    return turn[length - limit], True
        if written.answer_end is None or written.answer_end > self.last or written.answered:
            return None, False
        if length < self.last:
            return None, True
        begun = self._text(output[max(0, self.last - _WINDOW) : self.last].tolist())
        end, place = self._ids(_missing(begun, ANSWERED)), length - self.last
        return (end[place] if place < len(end) else next(iter(self.eos_token_ids), None)), False

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    def _text(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def _missing(text: str, tag: str) -> str:
    """What is missing of a tag that a text may have begun to write at its end."""
    begun = next((cut for cut in range(len(tag) - 1, 0, -1) if text.endswith(tag[:cut])), 0)
    return tag[begun:]


__all__ = ["ThinkingBudgetLogitsProcessor"]
