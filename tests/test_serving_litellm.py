"""LiteLLM's own Router in front of mock servers, with deployments chosen by a router of jaxroute."""

from __future__ import annotations

import asyncio
import contextlib
import os
from typing import Any

import pytest

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # no request to the network at its import
litellm = pytest.importorskip("litellm", reason="needs the extra litellm")

from jaxroute.errors import UserError  # noqa: E402
from jaxroute.serving.build import make_dispatcher  # noqa: E402
from jaxroute.serving.litellm_router import RoutedRouter, model_list  # noqa: E402
from tests.live_front_end import write_cluster  # noqa: E402
from tests.mock_servers import MockServer, mock_servers  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # what LiteLLM warns of is not ours
MESSAGES = [{"role": "user", "content": "Say five words."}]
TEXT = "w0 w1 w2 w3 w4 "


@contextlib.asynccontextmanager
async def routed(folder, gap=0.0, slots=64, **options) -> Any:
    async with mock_servers(2, gap) as servers:
        dispatcher = make_dispatcher("shortest_queue", write_cluster(folder / "c.yaml", servers, slots))
        router = litellm.Router(model_list=model_list(dispatcher.cluster), **{"num_retries": 0, **options})
        yield RoutedRouter(router, dispatcher), dispatcher, servers
        assert dispatcher.ledger.open == 0


def test_streamed_and_whole_answers(tmp_path):
    async def run():
        async with routed(tmp_path, gap=0.02) as (router, dispatcher, servers):
            whole = await router.acompletion("jaxroute", MESSAGES, max_tokens=5)
            assert whole.choices[0].message.content == TEXT and whole.usage.completion_tokens == 5
            assert servers[0].bodies[0]["model"] == "mock" and "metadata" not in servers[0].bodies[0]
            stream = await router.acompletion("jaxroute", MESSAGES, max_tokens=5, stream=True)
            text, tokens = "", []
            async for chunk in stream:
                text += chunk.choices[0].delta.content or "" if chunk.choices else ""
                tokens.append(dispatcher.ledger.facts(dispatcher.clock()).generated[0, 0])
            assert text == TEXT and tokens[:4] == [0, 1, 2, 3]
            answers = await asyncio.gather(*(router.acompletion("jaxroute", MESSAGES, max_tokens=5) for _ in range(8)))
            assert len(answers) == 8 and len(servers[1].bodies) == 4  # the shorter queue
            totals = dispatcher.statistics.totals
            assert totals["e0"]["completed"] + totals["e1"]["completed"] == 10

    asyncio.run(run())


def test_drops_and_abandoned_streams(tmp_path):
    async def run():
        async with routed(tmp_path, gap=0.02, slots=1, num_retries=2) as (router, dispatcher, _):
            streams = [await router.acompletion("jaxroute", MESSAGES, stream=True) for _ in range(2)]
            with pytest.raises(litellm.RateLimitError, match="all queues are full"):
                await router.acompletion("jaxroute", MESSAGES)
            await anext(streams[0])
            await streams[0].aclose()
            del streams[1]
            assert dispatcher.ledger.open == 0
            with pytest.raises(litellm.BadRequestError, match="above 0"):
                await router.acompletion("jaxroute", MESSAGES, latency_limit="-1")
            task = asyncio.create_task(router.acompletion("jaxroute", MESSAGES, max_tokens=50))
            await asyncio.sleep(0.3)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    asyncio.run(run())


def test_a_server_that_fails_is_left_for_another(tmp_path):
    async def run():
        async with routed(tmp_path, num_retries=1) as (router, dispatcher, servers):
            servers[0].faults = {"500": 1.0}
            whole = await router.acompletion("jaxroute", MESSAGES, max_tokens=5)
            assert whole.choices[0].message.content == TEXT
            assert dispatcher.up.tolist() == [False, True] and len(servers[1].bodies) == 1
            servers[1].faults = {"error event": 1.0}
            with pytest.raises(Exception, match=r"."):
                async for _ in await router.acompletion("jaxroute", MESSAGES, max_tokens=5, stream=True):
                    pass
            assert dispatcher.statistics.totals["e1"]["failed"] == 1
            with pytest.raises(litellm.ServiceUnavailableError, match="No expert is up"):
                await router.acompletion("jaxroute", MESSAGES)
            with pytest.raises(Exception, match="did not come by RoutedRouter"):
                await router._router.acompletion("jaxroute", MESSAGES)

    asyncio.run(run())


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [("", "", "no deployment with model_info id 'e1'"), ("model: mock, ", "", "expert e0: give its model")],
)
def test_a_router_that_does_not_fit_the_cluster(tmp_path, old, new, words):
    path = write_cluster(tmp_path / "c.yaml", [MockServer(), MockServer()])
    path.write_text(path.read_text().replace(old, new))
    dispatcher = make_dispatcher("shortest_queue", path)
    with pytest.raises(UserError, match=words):
        RoutedRouter(litellm.Router(model_list=model_list(dispatcher.cluster)[:1]), dispatcher)
