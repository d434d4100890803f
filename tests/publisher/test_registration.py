"""A register that the broker refuses: for good or for now, the first one and later ones."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import pytest

from tests.publisher.peers import Channel, Exchange, Publisher, Stage
from wakecall.publisher import (
    BrokerUnreachable,
    ChannelLost,
    KeyRefused,
    NameTaken,
    PublishedModel,
    PublisherError,
    Registered,
    RegistrationRefused,
    run_publisher,
)

FOR_GOOD: list[tuple[int, str, type[PublisherError]]] = [
    (409, "llm_name_taken", NameTaken),
    (409, "llm_is_public", NameTaken),
    (409, "session_taken", NameTaken),
    (401, "invalid_api_key", KeyRefused),
    (403, "forbidden", KeyRefused),
    (400, "invalid_request", RegistrationRefused),
    (400, "too_many", RegistrationRefused),
]
FOR_NOW = [(408, "request_timeout"), (429, "queue_full"), (500, "internal_error"), (503, "store_unavailable")]


def refuse(status: int, code: str, param: str | None = None) -> Callable[[Exchange], Awaitable[None]]:
    async def handler(exchange: Exchange) -> None:
        await exchange.read()
        await exchange.refuse(status, code, "the reason", param)

    return handler


async def lose_the_session(stage: Stage, channel: Channel) -> None:
    """What a restarted broker without its store looks like."""
    stage.broker.registered = False
    channel.cut()


@pytest.mark.parametrize(("status", "code", "error"), FOR_GOOD)
async def test_a_refusal_for_good_ends_the_agent(
    stage: Stage, status: int, code: str, error: type[PublisherError]
) -> None:
    stage.broker.on["register"] = refuse(status, code)
    events: list[object] = []
    with pytest.raises(error, match="the reason"):
        await run_publisher(stage.config(broker_key="k3y"), on_event=events.append)
    assert not events


@pytest.mark.parametrize(("status", "code", "error"), FOR_GOOD)
async def test_a_refusal_for_good_ends_an_agent_that_was_registered_before(
    stage: Stage, status: int, code: str, error: type[PublisherError]
) -> None:
    """The broker came back without the session, and meanwhile somebody else has the name, say."""
    publisher, channel = await stage.publish(broker_key="k3y")
    stage.broker.on["register"] = refuse(status, code)
    await lose_the_session(stage, channel)
    await publisher.wait_ended()
    assert type(publisher.error) is error
    assert "the reason" in str(publisher.error)
    assert len(stage.broker.all("register")) == 2


@pytest.mark.parametrize(
    ("param", "name", "said"),
    [
        ("llms[1].name", "n", "refuses to register 'n': the reason"),
        ("llms[1].pool", "n", "refuses to register 'n' in the pool 'p': the reason"),
        ("llms[0].max_concurrency", "m", "refuses to register 'm' (max_concurrency): the reason"),
        ("llms", None, "refuses to register its models: the reason"),
        ("llms[7].name", None, "refuses to register its models: the reason"),
        (None, None, "refuses to register its models: the reason"),
    ],
)
async def test_the_model_at_fault_is_named(stage: Stage, param: str | None, name: str | None, said: str) -> None:
    """The broker says `llms[1].name`, which tells a person nothing."""
    stage.broker.on["register"] = refuse(409, "llm_name_taken", param)
    with pytest.raises(NameTaken) as refused:
        await run_publisher(stage.config(models=(PublishedModel("m"), PublishedModel("n", "n:7b")), pool="p"))
    assert refused.value.member == ("" if name is None or param is None else param.partition(".")[2])
    assert (refused.value.name, refused.value.code, refused.value.exit_code) == (name, "llm_name_taken", 1)
    assert said in str(refused.value)


async def test_what_was_given_of_a_row_is_sent_and_nothing_else(stage: Stage) -> None:
    """What is left out is the broker's to decide."""
    given = {"pool": "p", "queue_s": 1.5, "first_byte_s": 2.0, "idle_s": 3.0, "total_s": 4.0}
    await stage.publish(models=(PublishedModel("m"), PublishedModel("n")), **given)
    rows = (await stage.broker.wait_whole("register")).json["llms"]
    assert [row["name"] for row in rows] == ["m", "n"]
    assert all({name: row[name] for name in given} == given for row in rows)
    await stage.publish(session_id="other", models=(PublishedModel("m"),))
    (row,) = (await stage.broker.wait_whole("register", count=2)).json["llms"]
    assert not {*given, "group"} & row.keys()


async def test_a_name_that_was_lost_meanwhile_is_said_to_be_refused_again(stage: Stage) -> None:
    publisher, channel = await stage.publish()
    stage.broker.on["register"] = refuse(409, "llm_name_taken", "llms[0].name")
    await lose_the_session(stage, channel)
    await publisher.wait_ended()
    assert "refuses to register 'm' again: the reason" in str(publisher.error)


@pytest.mark.parametrize(("status", "code"), FOR_NOW)
async def test_a_refusal_for_now_is_tried_again(stage: Stage, status: int, code: str) -> None:
    stage.broker.on["register"] = refuse(status, code)
    publisher = Publisher()
    stage.nursery.start_soon(publisher.run, stage.config())
    await publisher.wait(BrokerUnreachable, 3)
    del stage.broker.on["register"]
    await stage.broker.next_channel()


async def reset(exchange: Exchange) -> None:
    exchange.reset()


@pytest.mark.parametrize(
    "handler",
    [
        *(pytest.param(refuse(status, code), id=code) for status, code in FOR_NOW),
        pytest.param(refuse(404, ""), id="a proxy without a backend"),
        pytest.param(refuse(403, ""), id="a proxy that refuses"),
        pytest.param(reset, id="reset"),
    ],
)
async def test_registering_again_is_tried_until_it_succeeds(
    stage: Stage, handler: Callable[[Exchange], Awaitable[None]]
) -> None:
    """With the pauses of the channel between, for as long as the broker has no final word of its own."""
    publisher, channel = await stage.publish()
    stage.broker.on["register"] = handler
    await lose_the_session(stage, channel)
    await stage.broker.wait("register", count=5)
    assert len(publisher.all(ChannelLost)) >= 3
    del stage.broker.on["register"]
    await stage.broker.next_channel()
    assert [event.again for event in publisher.all(Registered)] == [False, True]


async def test_what_no_broker_says_ends_a_first_register(stage: Stage) -> None:
    """The address is wrong more likely than a proxy's backend away: to try for ever would hide it."""
    stage.broker.on["register"] = refuse(404, "")
    with pytest.raises(RegistrationRefused):
        await run_publisher(stage.config())
