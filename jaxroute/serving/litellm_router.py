"""LiteLLM's Router under a router of jaxroute: the extra `litellm`.

LiteLLM asks a custom routing strategy for the deployment of every attempt. How far an answer is, and that it has ended,
no hook of it says for every end, so `RoutedRouter.acompletion` takes the place of `Router.acompletion` and follows the
stream.
"""

from collections.abc import AsyncIterator
from typing import Any
from uuid import uuid4

import litellm
from litellm.types.router import CustomRoutingStrategyBase

from jaxroute.errors import UserError
from jaxroute.serving.cluster import Cluster, require_known_experts
from jaxroute.serving.dispatch import Dispatcher
from jaxroute.serving.forwarded import Forwarded
from jaxroute.serving.openai import Refused, completion_of, parse_limit

KEY = "jaxroute"
"""The key of a request's number in its metadata."""


def model_list(cluster: Cluster) -> list[dict[str, Any]]:
    """The deployments of a cluster for `litellm.Router`. The ids are the names of the experts."""
    return [
        {
            "model_name": cluster.model,
            "litellm_params": {
                "model": f"hosted_vllm/{expert.model}",
                "api_base": f"{expert.url}/v1",
                "api_key": expert.api_key or "none",
            },
            "model_info": {"id": expert.name},
        }
        for expert in cluster.experts
    ]


class RoutedStream:
    """The chunks of a streamed answer, of which the dispatcher learns."""

    def __init__(self, chunks: Any, forwarded: Forwarded):
        self._chunks, self._forwarded = chunks, forwarded

    def __aiter__(self) -> AsyncIterator[Any]:
        return self

    async def __anext__(self) -> Any:
        try:
            chunk = await anext(self._chunks)
        except StopAsyncIteration:
            self._forwarded.end("completed")
            raise
        except Exception:
            self._forwarded.end("failed")
            raise
        except BaseException:
            self._forwarded.end("cancelled")
            raise
        usage = getattr(chunk, "usage", None)
        if usage is not None:
            self._forwarded.progress(usage.completion_tokens, usage.prompt_tokens)
        elif any(choice.delta.content or choice.delta.tool_calls for choice in chunk.choices):
            self._forwarded.next_token()
        return chunk

    async def aclose(self) -> None:
        """Ends the request before its answer has ended."""
        self._forwarded.end("cancelled")
        close = getattr(self._chunks, "aclose", None)
        if close is not None:
            await close()

    def __del__(self) -> None:
        self._forwarded.end("cancelled")


class RoutedRouter:
    """A `litellm.Router` whose deployments are chosen by a dispatcher (`build.make_dispatcher`)."""

    def __init__(self, router: litellm.Router, dispatcher: Dispatcher):
        """The ids of the router's deployments must be the experts' names. Raises `UserError`."""
        require_known_experts(dispatcher.cluster)
        deployments = {one["model_info"]["id"]: one for one in router.registry().all()}
        missing = [expert.name for expert in dispatcher.cluster.experts if expert.name not in deployments]
        if missing:
            raise UserError(f"the Router has no deployment with model_info id {missing[0]!r}, an expert of the cluster")
        self._router, self._dispatcher = router, dispatcher
        self._open: dict[str, Forwarded] = {}
        self._deployments = [deployments[expert.name] for expert in dispatcher.cluster.experts]
        router.register_plugin(_Strategy(self))

    async def acompletion(
        self, model: str, messages: list[Any], *, stream: bool = False, latency_limit: str | None = None, **options: Any
    ) -> Any:
        """As `Router.acompletion`. `latency_limit` is like the header X-Jaxroute-Limit.

        A dropped request raises `litellm.RateLimitError`. Every request is sent as a stream.
        """
        body = {"messages": messages, "max_tokens": options.get("max_tokens", options.get("max_completion_tokens"))}
        try:
            forwarded = Forwarded(self._dispatcher, completion_of("chat", body, parse_limit(latency_limit)))
            forwarded.choose()
        except Refused as refused:
            raise _error(refused, model) from None
        number = uuid4().hex
        self._open[number] = forwarded
        metadata = {**(options.pop("metadata", None) or {}), KEY: number}
        usage = {**(options.pop("stream_options", None) or {}), "include_usage": True}
        try:
            chunks = await self._router.acompletion(
                model, messages, stream=True, stream_options=usage, metadata=metadata, **options
            )
        except Exception as error:
            forwarded.end("refused" if getattr(error, "status_code", 500) < 500 else "failed")
            raise
        except BaseException:
            forwarded.end("cancelled")
            raise
        finally:
            del self._open[number]
        answer = RoutedStream(chunks, forwarded)
        if stream:
            return answer
        return litellm.stream_chunk_builder([chunk async for chunk in answer], messages=messages)

    def deployment(self, model: str, request: dict[str, Any] | None) -> Any:
        """The deployment for an attempt of a request that came by `acompletion`."""
        number = ((request or {}).get("metadata") or {}).get(KEY)
        if number not in self._open:
            raise UserError("the request did not come by RoutedRouter.acompletion")
        forwarded = self._open[number]
        return self._deployments[forwarded.attempt()]


class _Strategy(CustomRoutingStrategyBase):
    """What LiteLLM asks."""

    def __init__(self, routed: RoutedRouter):
        self._routed = routed

    async def async_get_available_deployment(
        self, model: str, messages: Any = None, input: Any = None, specific_deployment: Any = False,
        request_kwargs: Any = None,
    ) -> Any:  # fmt: skip
        return self._routed.deployment(model, request_kwargs)

    def get_available_deployment(
        self, model: str, messages: Any = None, input: Any = None, specific_deployment: Any = False,
        request_kwargs: Any = None,
    ) -> Any:  # fmt: skip
        return self._routed.deployment(model, request_kwargs)


def _error(refused: Refused, model: str) -> Exception:
    """A dropped request as LiteLLM's error."""
    kinds = {429: litellm.RateLimitError, 503: litellm.ServiceUnavailableError}
    kind = kinds.get(refused.status, litellm.BadRequestError)
    return kind(refused.message, model=model, llm_provider="jaxroute")
