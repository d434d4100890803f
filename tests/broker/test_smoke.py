import trio
from wakecall import InferRequest, LLMSpec, Status
from wakecall.testing import FakePublisher, open_test_broker

CALL = InferRequest("/v1/chat/completions", b"{}")

async def test_whole_way(autojump_clock):
    async with open_test_broker() as broker, FakePublisher(broker, "laptop", [LLMSpec("qwen", status=Status.HIBERNATING)]) as publisher:
        got = []
        async def call():
            async with broker.infer("qwen", CALL) as reply:
                got.append(await reply.read())
        async with trio.open_nursery() as nursery:
            for _ in range(50):
                nursery.start_soon(call)
            wake = await publisher.next("wake")
            await trio.testing.wait_all_tasks_blocked()
            assert not publisher.events("infer")
            await publisher.answer(wake)
            for _ in range(50):
                await publisher.answer(await publisher.next("infer"), b"yes", b"!")
        assert got == [b"yes!"] * 50
        assert len(publisher.events("wake")) == 1

async def test_local(autojump_clock):
    async def handler(request):
        return b"echo " + request.body
    async def stream(request):
        for i in range(3):
            yield str(i).encode()
    async with open_test_broker() as broker, broker.publish("echo", handler), broker.publish("count", stream):
        async with broker.infer("echo", CALL) as reply:
            assert await reply.read() == b"echo {}"
        async with broker.infer("count", CALL) as reply:
            assert await reply.read() == b"012"
