"""Ray Serve's own handles in front of replicas that a router of jaxroute chooses."""

from __future__ import annotations

import asyncio
import gc
import time
from typing import Any

import pytest

serve = pytest.importorskip("ray.serve", reason="needs the extra ray-serve")
pytest.importorskip("prometheus_client", reason="needs the extra ray-serve")

import ray  # noqa: E402
from ray.serve.config import RequestRouterConfig  # noqa: E402
from ray.serve.exceptions import BackPressureError  # noqa: E402

from jaxroute.errors import UserError  # noqa: E402
from jaxroute.serving.ray_serve import RoutedReplicas, replicas_cluster, request_of  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # what Ray warns of is not ours
CLASS = "jaxroute.serving.ray_serve.RoutedReplicas"
EXPERT = {"latency": [0.015, 7.2e-5, 5e-5, 2.5e-5], "kv_blocks": 875, "max_num_seqs": 64}


def only_router() -> RoutedReplicas:
    """The router of this process; Ray keeps it out of sight."""
    (router,) = [one for one in gc.get_objects() if type(one) is RoutedReplicas]
    return router


class Words:
    """A replica that streams words, with a name of its own."""

    def __init__(self) -> None:
        self.name = ray.get_runtime_context().get_actor_id()

    async def __call__(self, request: dict[str, Any]):
        for number in range(request["max_tokens"]):
            await asyncio.sleep(0.05)
            if request.get("fails") and number == 2:
                raise ValueError("broken")
            yield {"name": self.name, "word": number}

    async def whole(self, request: dict[str, Any]):
        return {"name": self.name, "usage": {"prompt_tokens": 3, "completion_tokens": 5}}


@pytest.fixture(scope="module")
def handle():
    ray.init(num_cpus=4, include_dashboard=False, logging_level="ERROR")
    options = {"router": "shortest_queue", "expert": EXPERT, "most_replicas": 3, "slots": 2, "latency_limit": 10.0}
    config = RequestRouterConfig(request_router_class=CLASS, request_router_kwargs=options)
    deployment = serve.deployment(
        Words, num_replicas=2, max_ongoing_requests=8, request_router_config=config, ray_actor_options={"num_cpus": 0.5}
    )
    try:
        yield serve.run(deployment.bind())
    finally:
        serve.shutdown()
        ray.shutdown()


def wait_until(condition) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_replicas_are_chosen_and_their_streams_followed(handle):
    request = {"prompt": "Say five words.", "max_tokens": 10}
    streams = [handle.options(stream=True).remote(request) for _ in range(2)]
    first = [next(stream) for stream in streams]
    router = only_router()
    ledger = router.dispatcher.ledger
    assert ledger.count.tolist() == [1, 1, 0] and len({item["name"] for item in first}) == 2
    next(streams[0])
    wait_until(lambda: ledger.facts(router.dispatcher.clock()).generated[:, 0].max() == 2)
    for stream in streams:
        list(stream)
    wait_until(lambda: ledger.open == 0)
    totals = router.dispatcher.statistics.totals
    assert [totals[f"replica{n}"]["completed"] for n in range(3)] == [1, 1, 0]
    assert router.dispatcher.predictions._lengths[:2].tolist() == [196.2, 196.2]  # from 200 towards 10


def test_whole_answers_failures_and_cancellations_free_their_slots(handle):
    router = only_router()
    request = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 4}
    assert handle.whole.remote(request).result()["usage"]["completion_tokens"] == 5
    with pytest.raises(Exception, match="broken"):
        list(handle.options(stream=True).remote({**request, "fails": True}))
    stream = handle.options(stream=True).remote({**request, "max_tokens": 1000})
    next(stream)
    stream.cancel()
    wait_until(lambda: router.dispatcher.ledger.open == 0 and not router._open)
    counts = [router.dispatcher.statistics.totals[f"replica{n}"] for n in range(3)]
    assert {key: sum(count[key] for count in counts) for key in ("completed", "refused", "cancelled")} == {
        "completed": 3, "refused": 1, "cancelled": 1,
    }  # fmt: skip


def test_a_dropped_request_is_back_pressure(handle):
    router = only_router()
    request = {"prompt": "x", "max_tokens": 40}
    streams = [handle.options(stream=True).remote(request) for _ in range(4)]
    for stream in streams:
        next(stream)
    assert router.dispatcher.ledger.count.tolist() == [2, 2, 0]
    with pytest.raises(BackPressureError):
        list(handle.options(stream=True).remote(request))
    for stream in streams:
        stream.cancel()
    wait_until(lambda: router.dispatcher.ledger.open == 0 and not router._open)


def test_what_is_no_request_or_no_expert_is_one_clear_line():
    for wrong in ([], [5], [{"x": 1}]):
        with pytest.raises(UserError, match="must be an OpenAI request or a text"):
            request_of(wrong)
    with pytest.raises(UserError, match="messages must be a list"):
        request_of([{"messages": []}])
    assert request_of(["two words"]).text == "two words"
    with pytest.raises(UserError, match="request_router_kwargs: expert: kv_blocks is missing"):
        replicas_cluster({"latency": [0.01, 0, 0, 0]}, 2, 4, None)
