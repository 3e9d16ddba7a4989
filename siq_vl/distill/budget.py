"""A budget of tokens or money that is never overdrawn by more than the pictures' tokens are misjudged."""

import asyncio
from dataclasses import dataclass, field

from siq_vl.distill.schema import TokensSpent
from siq_vl.distill.teachers.base import TeacherReply

_FIRST_READ = 1024  # tokens that a request is supposed to read while no reply has said how many it read


@dataclass(frozen=True)
class BudgetLimits:
    """What a teacher may take in all, over every run with one store."""

    _argument_group_name = "budget, over all runs with this teacher"

    max_tokens: int = field(default=0, metadata={"help": "read and written together; 0: no bound"})
    max_cost: float = field(default=0.0, metadata={"help": "in the prices' unit; 0: no bound"})
    price_in: float = field(default=0.0, metadata={"help": "a million tokens read"})
    price_out: float = field(default=0.0, metadata={"help": "a million tokens written"})

    def __post_init__(self) -> None:
        for name in ("max_tokens", "max_cost", "price_in", "price_out"):
            if getattr(self, name) < 0:
                raise ValueError(
                    f"{name} is {getattr(self, name)}: a budget or price cannot be negative, 0 is no bound"
                )
        if self.max_cost and not (self.price_in or self.price_out):
            raise ValueError("a budget of money needs prices: pass --price_in and --price_out, per million tokens")


class Budget:
    """What is left of the limits.

    A request reserves what it can cost at most before it is sent, so that many in flight cannot overdraw together; when
    it is back, what it did cost is spent and the rest is free again. Where the teacher does not say what a reply did cost,
    all that was reserved is spent.

    Args:
        limits: what may be spent in all; by default there is no bound.
        max_new_tokens: most tokens of one reply.

    Attributes:
        spent_in: tokens read so far.
        spent_out: tokens written so far.
    """

    def __init__(self, limits: BudgetLimits | None = None, *, max_new_tokens: int = 1024):
        self.limits = limits or BudgetLimits()
        self.max_new_tokens = max_new_tokens
        self.spent_in = 0
        self.spent_out = 0
        self._reserved = 0  # requests under way
        # Replies that say what they read, and what these read: a request that has not said yet reads their mean.
        self._replies = 0
        self._read = 0
        self._released = asyncio.Condition()

    @property
    def spent_money(self) -> float:
        return self._money(self.spent_in, self.spent_out)

    @property
    def _bounded(self) -> bool:
        return bool(self.limits.max_tokens or self.limits.max_cost)

    def _money(self, read: int, written: int) -> float:
        return (read * self.limits.price_in + written * self.limits.price_out) / 1e6

    def _mean_read(self) -> int:
        if not self._replies:
            return _FIRST_READ
        return self._read // self._replies

    def _fits(self, requests: int) -> bool:
        """Return whether so many requests are affordable, each as long as it may be."""
        read = self.spent_in + requests * self._mean_read()
        written = self.spent_out + requests * self.max_new_tokens
        if self.limits.max_tokens and read + written > self.limits.max_tokens:
            return False
        return not self.limits.max_cost or self._money(read, written) <= self.limits.max_cost

    async def reserve(self, wanted: int = 1) -> int:
        """Wait until a request is affordable; return how many of those wanted are, 0 once none can be any more."""
        if not self._bounded:
            return wanted
        async with self._released:
            while True:
                granted = wanted
                while granted and not self._fits(self._reserved + granted):
                    granted -= 1
                # With nothing under way nothing will be released, so waiting would not help.
                if granted or not self._reserved:
                    self._reserved += granted
                    return granted
                await self._released.wait()

    async def spend(self, reply: TeacherReply) -> None:
        """Spend what a reply did cost, and release its reservation."""
        self.count(reply.prompt_tokens, reply.completion_tokens, text=bool(reply.text))
        await self.release()

    async def release(self) -> None:
        """Give the reservation of one request back."""
        if not self._bounded:
            return
        async with self._released:
            self._reserved -= 1
            self._released.notify_all()

    def count(self, read: int, written: int, *, text: bool = False) -> None:
        """Spend the tokens of one reply; where it has `text`, it must have read and written some."""
        spent = TokensSpent()
        spent.add(read, written, text=text)
        self.carry_over(spent)

    def carry_over(self, spent: TokensSpent) -> None:
        """Take over what was spent, by one reply or, as `TraceStore.spent` gives it, by earlier runs."""
        self._replies += spent.replies
        self._read += spent.read
        # A reply that does not say what it took is supposed to have taken all that was reserved for it.
        self.spent_in += spent.read + spent.unread * self._mean_read()
        self.spent_out += spent.written + spent.unwritten * self.max_new_tokens
