"""The publisher's API key at the broker: how it is sent, and what it means that it is refused."""

from __future__ import annotations

import base64

import pytest
import trio

from tests.publisher.peers import Stage
from tests.publisher.scripted import Exchange
from tests.publisher.test_registration import refuse
from wakecall.publisher import ChannelLost, InvalidConfig, KeyRefused, PublishedModel, run_publisher

KEY = "wakecall_publisher_k3y"


async def test_beside_a_proxys_password_the_key_arrives_too(stage: Stage) -> None:
    """A user name in the broker's address takes `Authorization`; the key then goes as `x-api-key`, everywhere."""
    address = stage.broker.url.replace("://", "://user:pass%40word@")
    _, channel = await stage.publish(broker_url=address, broker_key=KEY)
    await channel.infer("t1")
    await (await stage.engine.next()).respond(200, b"{}")
    await stage.broker.wait_whole("result", "t1")
    basic = "Basic " + base64.b64encode(b"user:pass@word").decode()
    sent = {(kind, one.headers["authorization"], one.headers["x-api-key"]) for kind, one in stage.broker.seen}
    assert sent == {(kind, basic, KEY) for kind in ("register", "frames", "result")}


@pytest.mark.parametrize("key", ["", "two words", "line\nfeed", "kéy", "k\x00y"])
async def test_what_no_header_can_carry_is_refused_without_being_said(stage: Stage, key: str) -> None:
    with pytest.raises(InvalidConfig) as refused:
        stage.config(broker_key=key)
    assert str(refused.value) == "an API key is of printable ASCII, without spaces"


@pytest.mark.parametrize(
    ("status", "code", "key", "said"),
    [
        (401, "invalid_api_key", None, "the broker wants an API key, and this publisher has none"),
        (401, "invalid_api_key", KEY, "the broker refuses this publisher's API key: the reason"),
        (403, "forbidden", KEY, "the broker refuses this publisher's API key: the reason"),
        (403, "forbidden", None, "the broker refuses this publisher: the reason"),
        (401, "", KEY, "what stands before the broker refuses this publisher: the reason"),
    ],
)
async def test_a_refusal_says_whose_it_is(stage: Stage, status: int, code: str, key: str | None, said: str) -> None:
    """Of a key, of there being none, of something else, or not even the broker's. Never which key it was."""
    stage.broker.on["register"] = refuse(status, code)
    with pytest.raises(KeyRefused) as refused:
        await run_publisher(stage.config(broker_key=key))
    assert (str(refused.value), refused.value.code, refused.value.name) == (said, code, None)
    assert refused.value.exit_code == 78


async def test_a_name_that_the_key_does_not_open_is_said(stage: Stage) -> None:
    """It is the key that would have to be another, or the name."""
    stage.broker.on["register"] = refuse(403, "forbidden", "llms[1].name")
    models = (PublishedModel("m"), PublishedModel("n"))
    with pytest.raises(KeyRefused) as refused:
        await run_publisher(stage.config(models=models, broker_key=KEY))
    assert str(refused.value) == "the broker refuses to register 'n': the reason"
    assert refused.value.name == "n"


@pytest.mark.parametrize("status", [401, 403])
async def test_a_heartbeat_that_is_refused_ends_it(stage: Stage, status: int) -> None:
    """The channel of a publisher without a key stays open when its broker gets the first one: nobody else says it."""
    stage.broker.heartbeat_interval_s = 0.02
    stage.broker.on["heartbeat"] = refuse(status, "invalid_api_key" if status == 401 else "forbidden")
    publisher, _ = await stage.publish()
    await publisher.wait_ended()
    assert type(publisher.error) is KeyRefused
    assert len(stage.broker.all("heartbeat")) == 1


async def test_a_proxys_refusal_of_a_heartbeat_does_not_end_it(stage: Stage) -> None:
    """A 401 without a code is not the broker's."""
    stage.broker.heartbeat_interval_s = 0.02
    stage.broker.on["heartbeat"] = refuse(401, "")
    publisher, _ = await stage.publish()
    await stage.broker.wait("heartbeat", count=3)
    assert not publisher.ended.is_set()
    assert not publisher.all(ChannelLost)


async def test_an_answer_that_is_refused_for_its_key_is_asked_about_at_once(stage: Stage) -> None:
    """Not with the next heartbeat in half a minute: until then every call would be generated for nothing."""
    stage.broker.heartbeat_interval_s = 3600
    for kind in ("result", "failure", "heartbeat"):
        stage.broker.on[kind] = refuse(401, "invalid_api_key")
    publisher, channel = await stage.publish()
    await channel.infer("t1")
    await (await stage.engine.next()).respond(200, b"{}")
    await publisher.wait_ended()
    assert type(publisher.error) is KeyRefused


async def test_a_stop_is_not_lost_in_a_refusal(stage: Stage) -> None:
    """The key went while it drained: it ends, whichever of the two is told."""
    asked = trio.Event()

    async def refuse_goodbye(exchange: Exchange) -> None:
        await refuse(401, "invalid_api_key")(exchange)
        asked.set()

    publisher, _ = await stage.publish()
    stage.broker.on["register"] = refuse_goodbye
    publisher.stop.set()
    await asked.wait()
    await publisher.wait_ended()
    assert publisher.error is None
