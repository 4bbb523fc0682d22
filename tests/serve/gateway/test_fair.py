"""What a key may have: by work, by time, at once; over several gateways."""

import asyncio
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace

import pytest
from in_one_process import Endpoint, Handle, Response, in_turn

from raptide.errors import ConfigError
from serve.calls import Ask, Done
from serve.gateway import fair
from serve.gateway.fair import FairUse, Rate
from serve.gateway.keys import Key, KeyRing, make_key, parse_keys
from serve.gateway.refusals import Refusal
from serve.settings import GatewaySettings, ModelSettings


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test moves."""
    now = SimpleNamespace(s=1000.0)
    monkeypatch.setattr(fair.time, "monotonic", lambda: now.s)
    return now


def key(**limits):
    return Key("lab", b"", **limits)


def costs(tokens, residues=1):
    return {"tokens": tokens, "residues": residues}


def refusal(use, *args):
    with pytest.raises(Refusal) as caught:
        use.admit(*args)
    return caught.value


def line_of(limits):
    made, line = make_key("lab")
    return made, f"{line} {limits}"


def test_a_line_may_limit_tokens_requests_days_and_models():
    _, line = line_of("600 tokens=5000 at_once=2 until=2027-06-30 models=base,tuned")
    (found,) = parse_keys(line, "keys")
    assert (found.residues_per_minute, found.tokens_per_minute, found.at_once) == (600, 5000, 2)
    assert str(found.until) == "2027-06-30"
    assert found.models == {"base", "tuned"}


@pytest.mark.parametrize(
    "limits",
    ["tokens=0", "tokens=many", "until=tomorrow", "models=a,,b", "tokens=1 tokens=2", "speed=9"],
)
def test_a_limit_that_is_none_is_named(limits):
    with pytest.raises(
        ConfigError, match=r"line 1: behind a key may stand tokens=N, .*="
    ) as caught:
        parse_keys(line_of(limits)[1], "keys")
    assert limits.split()[-1].split("=")[0] in str(caught.value)


def test_a_rate_bills_work_and_fills_in_a_minute(clock):
    use = FairUse(GatewaySettings())
    lab = key(tokens_per_minute=1000)
    for tokens in (600, 1000):
        use.admit(lab, "raptide", costs(tokens))
    told = refusal(use, lab, "raptide", costs(1))
    assert (told.status, told.kind) == (429, "rate_limit")
    assert told.retry_after_s == pytest.approx(36, abs=0.2), "600 are owed"
    clock.s += told.retry_after_s
    use.admit(lab, "raptide", costs(1))


def test_debt_is_bounded_by_a_minutes_worth(clock):
    """600 a minute, and a request of 240,000: it is refused, and says what it costs."""
    use = FairUse(GatewaySettings())
    lab = key(residues_per_minute=600)
    told = refusal(use, lab, "raptide", costs(1, residues=240_000))
    assert told.status == 422
    assert "costs 240,000 residues" in told.message
    assert "600 a minute" in told.message
    use.admit(lab, "raptide", costs(1, residues=599))
    use.admit(lab, "raptide", costs(1, residues=600))
    assert refusal(use, lab, "raptide", costs(1)).retry_after_s <= 60.2


def test_what_is_refused_or_fails_is_given_back(clock):
    use = FairUse(GatewaySettings())
    lab = key(tokens_per_minute=1000, residues_per_minute=100)
    use.admit(lab, "raptide", costs(10, residues=100))
    assert refusal(use, lab, "raptide", costs(900)).retry_after_s < 1, "of residues"
    other = key(tokens_per_minute=100)
    for _ in range(50):
        use.admit(other, "raptide", costs(100))
        with pytest.raises(ZeroDivisionError), use.answering(other, costs(100)):
            raise ZeroDivisionError
    use.admit(other, "raptide", costs(100))
    with pytest.raises(asyncio.CancelledError), use.answering(other, costs(100)):
        raise asyncio.CancelledError
    assert refusal(use, other, "raptide", costs(1)).status == 429, "who leaves has had it"


def test_requests_at_once_are_counted(clock):
    use = FairUse(GatewaySettings())
    lab = key(at_once=2)
    with use.answering(lab, costs(1)):
        use.admit(lab, "raptide", costs(1))
        with use.answering(lab, costs(1)):
            told = refusal(use, lab, "raptide", costs(1))
    assert (told.status, told.retry_after_s) == (429, 1.0)
    use.admit(lab, "raptide", costs(1))


def test_a_key_is_good_for_its_models_and_days(clock, tmp_path):
    told = refusal(FairUse(GatewaySettings()), key(models=frozenset(["a"])), "b", costs(1))
    assert (told.status, told.message) == (403, "Key 'lab' is for a, but b was asked.")
    today = datetime.now(UTC).date()
    for days, good in ((0, True), (1, True), (-1, False)):
        made, line = line_of(f"until={today + timedelta(days=days)}")
        (tmp_path / "keys").write_text(line)
        ring = KeyRing(tmp_path / "keys")
        if good:
            assert ring.check(f"Bearer {made}").name == "lab"
            continue
        with pytest.raises(Refusal, match="was good until") as caught:
            ring.check(f"Bearer {made}")
        assert caught.value.status == 401


@pytest.mark.parametrize("through", [1, 4])
def test_a_key_has_its_rate_through_one_gateway_or_four(clock, through):
    """Asks of 50 as often as they are let in, for ten minutes, at some of four gateways that hear
    of each other once a second."""
    uses = [FairUse(GatewaySettings(gateways=4)) for _ in range(4)]
    lab = key(tokens_per_minute=6000)
    had = 0
    for _ in range(600):
        for use in uses[:through]:
            try:
                while True:
                    use.admit(lab, "raptide", costs(50))
                    had += 50
            except Refusal:
                pass
        for index, use in enumerate(uses):
            news = use.news()
            for other in uses:
                if other is not use and news:
                    other.hear(str(index), news)
        clock.s += 1.0
    assert 60_000 <= had <= 1.5 * 60_000, "a bucket at each gateway is there from the start"


def test_requests_elsewhere_count_too(clock):
    here, there = (FairUse(GatewaySettings(gateways=2)) for _ in range(2))
    lab = key(at_once=1)
    here.admit(lab, "raptide", costs(1))
    with there.answering(lab, costs(1)):
        here.hear("there", there.news())
        assert refusal(here, lab, "raptide", costs(1)).status == 429
    clock.s += fair.FORGET_S + 1
    here.admit(lab, "raptide", costs(1))


def test_gateways_tell_while_there_is_something_to_tell(monkeypatch):
    monkeypatch.setattr(fair, "TELL_S", 0.01)
    told = []

    async def tell(news):
        told.append(news)

    async def main():
        use = FairUse(GatewaySettings(gateways=2), tell)
        use.admit(key(tokens_per_minute=1000), "raptide", costs(50))
        await asyncio.sleep(0.1)
        assert use._telling.done()

    asyncio.run(main())
    ((_, (spent, answering)),) = (*told[0].items(),)
    assert len(told) == 1
    assert (spent["tokens"], answering) == (50, 0)


def test_rates_hold_over_http(tmp_path, monkeypatch):
    """By what a request costs: a pass a residue for pseudo perplexities. What fails is free."""
    made, line = line_of("tokens=3000")
    (tmp_path / "keys").write_text(line)
    works = []

    def run(work):
        works.append(work)

        async def stream():
            if len(works) == 2:
                raise ZeroDivisionError
            yield Done([], "a" * 16, None, 0.0, 0.0)

        return Response(stream())

    handle = Handle([], in_turn())
    handle.run = SimpleNamespace(remote=run)
    shape = {"weights": "a" * 16, "width": 8, "layers": 1, "tokens": [""] * 33}
    handle.describe = SimpleNamespace(remote=lambda: asyncio.sleep(0, shape))

    async def main():
        endpoint = Endpoint(
            handle, ModelSettings(name="raptide", path=""), keys_file=str(tmp_path / "keys")
        )
        ask = {"sequences": "M" * 50}
        return [
            await endpoint.http("/v1/scores", body, Authorization=f"Bearer {made}")
            for body in ({"sequences": "M" * 60}, ask, ask, ask, ask)
        ]

    dear, *others = asyncio.run(main())
    assert dear.status_code == 422
    assert "costs 3,720 tokens" in dear.json()["error"]["message"]
    assert [answer.status_code for answer in others] == [200, 500, 200, 429]


def test_quadratic_work_costs_what_it_takes():
    embed, contacts = Ask("embed"), Ask("contacts")
    assert embed.tokens(1022) == 1024
    assert embed.tokens(16_382) > 6 * 16_384
    assert contacts.tokens(100) == 102
    assert contacts.tokens(1022) > 1.5 * embed.tokens(1022)


def test_a_bucket_gives_back_no_more_than_it_holds(clock):
    rate = Rate(100)
    rate.spend(-1000)
    assert [rate.take(100), rate.take(1) > 0] == [0, True]
