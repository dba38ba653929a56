"""Ray Serve's RequestRouter under a router of jaxroute: the extra `ray-serve`.

The replicas of one deployment are the experts. Ray asks for a replica before it sends a request and says when one has
ended; how far an answer is shows in the stream that the caller reads, which is therefore followed here.
"""

import asyncio
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ray.serve.exceptions import BackPressureError
from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from jaxroute.environment.scenarios import ENGINE_KEYS, expert_engine, mapping
from jaxroute.errors import UserError
from jaxroute.serving.build import make_dispatcher
from jaxroute.serving.call import Outcome
from jaxroute.serving.cluster import EXPERT_KEYS, MEAN_SCORE, SLOTS, Cluster, Expert, as_seen
from jaxroute.serving.dispatch import Dispatcher
from jaxroute.serving.forwarded import Forwarded
from jaxroute.serving.openai import Completion, Refused, completion_of
from jaxroute.simulator.engine_config import stack_engines

LOGGER = logging.getLogger("jaxroute.serving")

READ_SECONDS = 1.0
"""The time in which a caller should have read an answer that has ended."""

WHERE = Path("request_router_kwargs")
"""What errors name, in the place of a cluster's file."""


def replicas_cluster(expert: Mapping[str, Any], most_replicas: int, slots: int, latency_limit: float | None) -> Cluster:
    """A cluster of equal experts; `expert` has keys of a cluster's file. Raises `UserError`."""
    own = mapping(WHERE, dict(expert), "expert", [*EXPERT_KEYS, *ENGINE_KEYS])
    engine = as_seen(expert_engine(WHERE, "expert", own))
    score = float(own.get("mean_score", MEAN_SCORE))
    experts = tuple(Expert(f"replica{number}", "", "ray", score) for number in range(most_replicas))
    engines = stack_engines([engine] * most_replicas, str(WHERE))
    return Cluster(experts, engines, "ray", slots, latency_limit, None)


class RoutedReplicas(RequestRouter):
    """Chooses replicas by a router; name it in `RequestRouterConfig(request_router_class=...)`.

    A request is the first argument of the call: an OpenAI request as a dict or a pydantic model, or a text. Every
    handle and proxy has a ledger of its own, so all traffic of a deployment should come through one.
    """

    def initialize_state(
        self,
        router: str,
        expert: Mapping[str, Any],
        most_replicas: int = 8,
        slots: int = SLOTS,
        latency_limit: float | None = None,
        never_drop: bool = False,
    ) -> None:
        """Ray passes `request_router_kwargs`.

        `router` is a name or the folder of a run, `expert` says what a replica is, by keys of a cluster's file
        (`profile`, or `latency` and `kv_blocks`). At most `most_replicas` are used. Raises `UserError`.
        """
        cluster = replicas_cluster(expert, most_replicas, slots, latency_limit)
        self.dispatcher: Dispatcher = make_dispatcher(router, cluster, never_drop=never_drop)
        self._numbers: dict[ReplicaID, int] = {}  # replica -> number of its expert
        self._open: dict[str, _Routed] = {}  # by Ray's internal id of the request

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """The chosen replica, alone. A dropped request gets a `BackPressureError`, 429."""
        if pending_request is None or not candidate_replicas:
            return [candidate_replicas]
        pending_request.routing_context.should_backoff = True
        replicas = self._number(candidate_replicas)
        self.dispatcher.up[:] = [number in replicas for number in range(len(self.dispatcher.up))]
        identity = pending_request.metadata.internal_request_id
        try:
            routed = self._open.get(identity)
            if routed is None:
                routed = _Routed(Forwarded(self.dispatcher, request_of(pending_request.args)))
                pending_request.future.add_done_callback(lambda future: self._decided(identity, future.cancelled()))
            self._open[identity] = routed
            # A replica that has no room for it now is asked for again, or another one.
            routed.forwarded.end("cancelled")
            return [[replicas[routed.forwarded.choose()]]]
        except Refused as refused:
            self._open.pop(identity, None)
            after = refused.headers.get("Retry-After")
            error = BackPressureError(
                self.dispatcher.ledger.open, self.dispatcher.ledger.slots, 429, None if after is None else float(after)
            )
            if not pending_request.future.done():
                pending_request.future.set_exception(error)
            return [candidate_replicas[:1]]  # Ray looks at the future only when it has a candidate

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any) -> None:
        """Follows the answer."""
        identity = pending_request.metadata.internal_request_id
        if identity in self._open:
            self._open[identity].follow(result, self._event_loop, lambda outcome: self._end(identity, outcome))

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        """Frees the slot of a request that the replica has not taken; others are followed."""
        routed = self._open.get(internal_request_id)
        if routed is not None and not routed.followed and routed.forwarded.expert == self._numbers.get(replica_id):
            routed.forwarded.end("cancelled")

    def _end(self, identity: str, outcome: Outcome) -> None:
        routed = self._open.pop(identity, None)
        if routed is not None:
            routed.forwarded.end(outcome)

    def _decided(self, identity: str, cancelled: bool) -> None:
        if cancelled:
            self._end(identity, "cancelled")

    def _number(self, candidates: list[RunningReplica]) -> dict[int, RunningReplica]:
        """The candidates by the numbers of their experts; a new one gets that of one that has gone."""
        present = {replica.replica_id: replica for replica in candidates}
        count = self.dispatcher.ledger.count
        self._numbers = {one: n for one, n in self._numbers.items() if one in present or count[n]}
        free = [number for number in range(len(count)) if number not in self._numbers.values()]
        for replica_id in present:
            if replica_id not in self._numbers and free:
                self._numbers[replica_id] = free.pop(0)
        if len(present) > len(count):
            LOGGER.warning("of %d replicas, %d are used; raise most_replicas", len(present), len(count))
        return {self._numbers[one]: replica for one, replica in present.items() if one in self._numbers}


class _Routed:
    """A request at a replica."""

    def __init__(self, forwarded: Forwarded):
        self.forwarded, self.followed = forwarded, False

    def follow(self, result: Any, loop: asyncio.AbstractEventLoop, end: Callable[[Outcome], None]) -> None:
        """Notes what the caller reads of a result of Ray, from any thread, and calls `end` in the loop at its end."""
        self.followed = True

        def noted(item: Any) -> Any:
            loop.call_soon_threadsafe(self._item, item)
            return item

        def ended(outcome: Outcome) -> None:
            loop.call_soon_threadsafe(end, outcome)

        def done(_: Any) -> None:  # of a stream, Ray does not say whether it failed, and the caller may be behind
            loop.call_soon_threadsafe(loop.call_later, READ_SECONDS, end, "completed")

        read, read_next, whole, whole_async = result.__anext__, result.__next__, result.get, result.get_async

        async def read_async() -> Any:
            try:
                return noted(await read())
            except BaseException as error:
                ended(_outcome(error))
                raise

        def read_sync() -> Any:
            try:
                return noted(read_next())
            except BaseException as error:
                ended(_outcome(error))
                raise

        def get(timeout_s: float | None = None) -> Any:
            return noted(whole(timeout_s))

        async def get_async() -> Any:
            return noted(await whole_async())

        def cancel() -> None:
            ended("cancelled")
            stop()

        stop, result.cancel = result.cancel, cancel
        # A handle reads a result by these four.
        result.__anext__, result.__next__, result.get, result.get_async = read_async, read_sync, get, get_async
        result.add_done_callback(done)

    def _item(self, item: Any) -> None:
        usage = item.get("usage") if isinstance(item, Mapping) else getattr(item, "usage", None)
        field = usage.get if isinstance(usage, Mapping) else lambda key: getattr(usage, key, None)
        tokens = field("completion_tokens") if usage else None
        if tokens is None:
            self.forwarded.next_token()
        else:
            self.forwarded.progress(tokens, field("prompt_tokens"))


def _outcome(error: BaseException) -> Outcome:
    """How a request ended whose reader got this."""
    if isinstance(error, StopIteration | StopAsyncIteration):
        return "completed"
    return "refused" if isinstance(error, Exception) else "cancelled"


def request_of(arguments: list[Any]) -> Completion:
    """What a router sees of a request from the arguments of a call. Raises `UserError` for one without a text."""
    first = arguments[0] if arguments else None
    if hasattr(first, "model_dump"):
        first = first.model_dump(exclude_unset=True)
    if isinstance(first, str):
        first = {"prompt": first}
    if not isinstance(first, dict) or not {"messages", "prompt"} & set(first):
        raise UserError("the first argument of a call must be an OpenAI request or a text; give it with the handle")
    try:
        return completion_of("chat" if "messages" in first else "text", first, None)
    except Refused as refused:
        raise UserError(refused.message) from None
