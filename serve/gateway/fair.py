"""Fair use: what each key may have at once and in a minute, over all gateways; and what goes on.

A key's rates are those of its line, however many gateways there are. Each gateway lets in by what
it knows, and every second those that have let anything in tell the others. So a key has its rate
through one gateway or through all, and more than that for about a second at most.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from serve.gateway.keys import Key
from serve.gateway.refusals import Refusal, stopping
from serve.settings import GatewaySettings

logger = logging.getLogger("ray.serve")

TELL_S = 1.0
"""How often a gateway tells the others what it has let in."""

FORGET_S = 5.0
"""Until a gateway that has told nothing counts as idle."""

LOOK_S, QUIET_LOOKS = 0.05, 4
"""How often a gateway that is to stop looks for what is being answered, and how often in a row it
has to see nothing."""

News = dict[str, tuple[dict[str, float], int]]
"""By account: what was spent since the last news, by unit, and the requests that are being answered
now."""


class Rate:
    """A bucket that fills in a minute.

    One request may overdraw it, so that a large one is not refused forever: what is owed then is at
    most a minute's worth, as nothing above a full bucket is let in.
    """

    def __init__(self, per_minute: float) -> None:
        self.per_minute = per_minute
        self._left = per_minute
        self._at = time.monotonic()

    def take(self, cost: float) -> float:
        """0 if it may be computed, else the seconds to wait."""
        self._fill()
        if self._left <= 0:
            return (1 - self._left) * 60.0 / self.per_minute
        self._left -= cost
        return 0.0

    def spend(self, cost: float) -> None:
        """What was let in elsewhere; a negative cost gives it back."""
        self._fill()
        self._left = max(-self.per_minute, min(self.per_minute, self._left - cost))

    def _fill(self) -> None:
        now = time.monotonic()
        filled = self._left + (now - self._at) * self.per_minute / 60.0
        self._left, self._at = min(self.per_minute, filled), now


@dataclass
class Account:
    """What one key has of one gateway."""

    rates: dict[str, Rate] = field(default_factory=dict)
    """By unit: residues, tokens."""
    answering: int = 0
    untold: dict[str, float] = field(default_factory=dict)
    others: dict[str, tuple[int, float]] = field(default_factory=dict)
    """By gateway: the requests of this key it was answering, and when it said so."""

    @property
    def elsewhere(self) -> int:
        since = time.monotonic() - FORGET_S
        return sum(count for count, when in self.others.values() if when > since)


class FairUse:
    """Lets requests in, and knows which are being answered.

    Args:
        tell: sends news to the other gateways; None where there are none.
    """

    def __init__(
        self, settings: GatewaySettings, tell: Callable[[News], Awaitable[None]] | None = None
    ) -> None:
        self._settings = settings
        self._tell = tell
        self._telling: asyncio.Task[None] | None = None
        self._accounts: dict[str, Account] = {}
        self.is_stopping = False
        """Whether this gateway takes nothing new."""
        self._ongoing = 0

    def refuse_if_stopping(self) -> None:
        """Raises Refusal once this gateway takes nothing new."""
        if self.is_stopping:
            raise stopping()

    async def drain(self) -> None:
        """Take nothing new from now on; returns once all that was taken is answered."""
        self.is_stopping = True
        until = time.monotonic() + self._settings.timeout_s
        idle = 0
        while idle < QUIET_LOOKS and time.monotonic() < until:
            idle = 0 if self._ongoing else idle + 1
            await asyncio.sleep(LOOK_S)

    def admit(self, key: Key | None, model: str, costs: dict[str, int]) -> None:
        """Count a request against its key.

        Args:
            costs: by unit: residues, tokens.

        Raises:
            Refusal: the key may not ask that model, or for so much, or not now.
        """
        if key is None:
            return
        if key.models is not None and model not in key.models:
            raise Refusal(
                403,
                "permission",
                f"Key {key.name!r} is for {', '.join(sorted(key.models))}, but {model} was asked.",
                "model",
            )
        account = self._account(key)
        self._refuse_too_many(key, account)
        for unit, rate in account.rates.items():
            if costs[unit] > rate.per_minute:
                raise _too_dear(key, unit, costs[unit], rate)
        waits = {unit: rate.take(costs[unit]) for unit, rate in account.rates.items()}
        for unit in account.rates:
            account.untold[unit] = account.untold.get(unit, 0.0) + costs[unit] * (not waits[unit])
        if any(waits.values()):
            self._give_back(account, {unit: costs[unit] for unit in waits if not waits[unit]})
            raise _used_up(key, waits, account)
        self._start_telling()

    @contextmanager
    def answering(self, key: Key | None, costs: dict[str, int]) -> Iterator[None]:
        """While a request that was admitted is answered. What fails is given back."""
        account = self._account(key) if key else Account()
        self._ongoing += 1
        account.answering += 1
        try:
            yield
        except Exception:  # not of one that was called off: it was computed, or nearly so
            self._give_back(account, {unit: costs[unit] for unit in account.rates})
            raise
        finally:
            self._ongoing -= 1
            account.answering -= 1

    def hear(self, gateway: str, news: News) -> None:
        """What another gateway has let in."""
        for name, (spent, answering) in news.items():
            account = self._accounts.setdefault(name, Account())
            account.others[gateway] = answering, time.monotonic()
            for unit, cost in spent.items():
                if unit in account.rates:
                    account.rates[unit].spend(cost)

    def news(self) -> News:
        """What the others do not know yet; it counts as told then."""
        found: News = {}
        for name, account in self._accounts.items():
            spent, account.untold = account.untold, {}
            if any(spent.values()) or account.answering:
                found[name] = spent, account.answering
        return found

    def _account(self, key: Key) -> Account:
        """Of a name and its rates: two keys of a name have one, unless their rates differ."""
        name = f"{key.name} {key.residues_per_minute} {key.tokens_per_minute}"
        account = self._accounts.setdefault(name, Account())
        wanted = {
            "residues": key.residues_per_minute or self._settings.residues_per_minute,
            "tokens": key.tokens_per_minute or self._settings.tokens_per_minute,
        }
        for unit, per_minute in wanted.items():
            if per_minute is not None and unit not in account.rates:
                account.rates[unit] = Rate(per_minute)
        return account

    def _refuse_too_many(self, key: Key, account: Account) -> None:
        if key.at_once is not None and account.answering + account.elsewhere >= key.at_once:
            raise Refusal(
                429,
                "rate_limit",
                f"Key {key.name!r} may have {key.at_once:,} requests answered at once, and has as "
                "many; send the next one when one is answered.",
                retry_after_s=1.0,
            )

    @staticmethod
    def _give_back(account: Account, costs: dict[str, int]) -> None:
        for unit, cost in costs.items():
            account.rates[unit].spend(-cost)
            account.untold[unit] = account.untold.get(unit, 0.0) - cost

    def _start_telling(self) -> None:
        if self._tell and (self._telling is None or self._telling.done()):
            self._telling = asyncio.ensure_future(self._keep_telling(self._tell))

    async def _keep_telling(self, tell: Callable[[News], Awaitable[None]]) -> None:
        """Until there is nothing new."""
        while True:
            await asyncio.sleep(TELL_S)
            news = self.news()
            if not news:
                return
            try:
                await tell(news)
            except Exception as error:
                logger.warning("Gateways do not hear of each other (%s).", type(error).__name__)


def _too_dear(key: Key, unit: str, cost: int, rate: Rate) -> Refusal:
    return Refusal(
        422,
        "invalid_request",
        f"The request costs {cost:,} {unit}, but key {key.name!r} may have {rate.per_minute:,} "
        "a minute; send less at once.",
    )


def _used_up(key: Key, waits: dict[str, float], account: Account) -> Refusal:
    unit = max(waits, key=lambda unit: waits[unit])
    return Refusal(
        429,
        "rate_limit",
        f"Key {key.name!r} may have {account.rates[unit].per_minute:,} {unit} a minute, which are "
        "used up; wait as long as Retry-After says.",
        retry_after_s=waits[unit],
    )
