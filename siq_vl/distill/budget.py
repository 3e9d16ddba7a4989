"""A budget of tokens or money that is never overdrawn by more than the pictures' tokens are misjudged."""

import asyncio
from dataclasses import dataclass, field

from siq_vl.distill.teachers.base import Said


@dataclass
class Budget:
    """What may be spent in all.

    A request reserves what it can cost at most before it is sent, so that many in flight cannot overdraw together; when
    it is back, what it did cost is spent and the rest is free again. Where the teacher does not say what a reply did cost,
    all that was reserved is spent.

    Attributes:
        tokens: most tokens, read and written together; 0: no bound.
        money: most money, in the unit of the prices; 0: no bound.
        price_in: money a million tokens read.
        price_out: money a million tokens written.
        max_new_tokens: most tokens of one reply.
    """

    tokens: int = 0
    money: float = 0.0
    price_in: float = 0.0
    price_out: float = 0.0
    max_new_tokens: int = 1024
    spent_in: int = 0
    spent_out: int = 0
    _reserved: int = 0
    _replies: int = 0
    _read: int = 0
    _free: asyncio.Condition = field(default_factory=asyncio.Condition, repr=False)

    def __post_init__(self) -> None:
        if min(self.tokens, self.money, self.price_in, self.price_out) < 0:
            raise ValueError("a budget or price is negative: pass 0 for no bound")
        if self.money and not (self.price_in or self.price_out):
            raise ValueError("a budget of money needs prices: pass --price_in and --price_out, per million tokens")

    @property
    def spent_money(self) -> float:
        return self._money(self.spent_in, self.spent_out)

    def _money(self, read: int, written: int) -> float:
        return (read * self.price_in + written * self.price_out) / 1e6

    def _at_most(self, replies: int) -> tuple[int, int]:
        """Return the tokens that replies can read, by the mean so far, and write."""
        return replies * (self._read // self._replies if self._replies else 1024), replies * self.max_new_tokens

    def _fits(self, more: int) -> bool:
        """Return whether `more` requests fit beside those reserved, each as long as it may be."""
        read, written = self._at_most(more)
        read, written = self.spent_in + read, self.spent_out + written
        if self.tokens and read + written > self.tokens:
            return False
        return not self.money or self._money(read, written) <= self.money

    async def reserve(self, wanted: int = 1) -> int:
        """Wait until a request is affordable; return how many of those wanted are, 0 once none can be any more."""
        if not self.tokens and not self.money:
            return wanted
        async with self._free:
            while True:
                granted = next((count for count in range(wanted, 0, -1) if self._fits(self._reserved + count)), 0)
                if granted or not self._reserved:
                    self._reserved += granted
                    return granted
                await self._free.wait()

    async def settle(self, said: Said | None) -> None:
        """Spend what a reply cost; None gives a reservation back unused."""
        if said is not None:
            self.count(said.prompt_tokens, said.completion_tokens, text=bool(said.text))
        if self.tokens or self.money:
            async with self._free:
                self._reserved -= 1
                self._free.notify_all()

    def count(self, read: int, written: int, *, text: bool = False) -> None:
        """Spend the tokens of one reply; where it has `text`, it must have read and written some."""
        self.carry_over(read, written, int(read > 0), int(text and not read), int(text and not written))

    def carry_over(self, read: int, written: int, replies: int, unread: int = 0, unwritten: int = 0) -> None:
        """Take over what earlier runs with the same store have spent, as `TraceStore.spent` gives it."""
        self._replies, self._read = self._replies + replies, self._read + read
        (supposed_read, _), (_, supposed_written) = self._at_most(unread), self._at_most(unwritten)
        self.spent_in, self.spent_out = (
            self.spent_in + read + supposed_read,
            self.spent_out + written + supposed_written,
        )
