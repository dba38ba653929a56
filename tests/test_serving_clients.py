"""Clients that people use, unchanged, against the front end: OpenAI's Python client and curl."""

from __future__ import annotations

import asyncio
import json
import shutil

import pytest

pytest.importorskip("aiohttp", reason="needs the extra serve")
pytest.importorskip("prometheus_client", reason="needs the extra serve")

from tests.live_front_end import front_end, write_cluster  # noqa: E402
from tests.mock_servers import mock_servers  # noqa: E402

MESSAGES = [{"role": "user", "content": "Say five words."}]
TEXT = "w0 w1 w2 w3 w4 "
CURL = shutil.which("curl")


def test_openais_client_streamed_not_streamed_and_async(tmp_path):
    openai = pytest.importorskip("openai", reason="make compat SETS=openai has it")

    def sync(address: str) -> None:
        with openai.OpenAI(base_url=f"{address}/v1", api_key="mine", max_retries=0) as client:
            assert [model.id for model in client.models.list()] == ["jaxroute"]
            whole = client.chat.completions.create(model="jaxroute", messages=MESSAGES, max_tokens=5)
            assert whole.choices[0].message.content == TEXT and whole.usage.completion_tokens == 5
            raw = client.chat.completions.with_raw_response.create(model="jaxroute", messages=MESSAGES, max_tokens=5)
            assert raw.headers["X-Jaxroute-Expert"] in ("e0", "e1") and raw.parse().choices[0].finish_reason == "length"
            options = {"include_usage": True}
            stream = client.chat.completions.create(
                model="jaxroute", messages=MESSAGES, max_tokens=5, stream=True, stream_options=options
            )
            chunks = list(stream)
            assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == TEXT
            assert chunks[-1].usage.completion_tokens == 5 and chunks[0].usage is None
            text = client.completions.create(model="jaxroute", prompt="Say five words.", max_tokens=5)
            assert text.choices[0].text == TEXT
            with pytest.raises(openai.NotFoundError, match="does not exist"):
                client.chat.completions.create(model="gpt-4", messages=MESSAGES)
            with pytest.raises(openai.BadRequestError, match="too large"):
                client.chat.completions.create(model="jaxroute", messages=MESSAGES, max_tokens=200_000)
        with openai.OpenAI(base_url=f"{address}/v1", api_key="other", max_retries=0) as client:
            with pytest.raises(openai.AuthenticationError):
                client.models.list()

    async def run():
        async with (
            mock_servers(2) as servers,
            front_end(write_cluster(tmp_path / "c.yaml", servers), api_key="mine") as (
                one,
                session,
            ),
        ):
            address = str(session._base_url)
            await asyncio.to_thread(sync, address)
            async with openai.AsyncOpenAI(base_url=f"{address}/v1", api_key="mine", max_retries=0) as client:
                create = client.chat.completions.create
                streams = [create(model="jaxroute", messages=MESSAGES, max_tokens=5, stream=True) for _ in range(4)]
                for stream in await asyncio.gather(*streams):
                    assert "".join([chunk.choices[0].delta.content or "" async for chunk in stream]) == TEXT
                for server in servers:
                    server.faults = {"500": 1.0}
                with pytest.raises(openai.InternalServerError, match="failed: it answered 500"):
                    await create(model="jaxroute", messages=MESSAGES)
            assert one.dispatcher.ledger.open == 0

    asyncio.run(run())


@pytest.mark.skipif(CURL is None, reason="no curl here")
def test_curl(tmp_path):
    async def curl(*arguments: str) -> str:
        pipe = asyncio.subprocess.PIPE
        done = await asyncio.create_subprocess_exec(str(CURL), "-s", *arguments, stdout=pipe)
        return (await done.communicate())[0].decode()

    async def run():
        async with mock_servers(1) as servers, front_end(write_cluster(tmp_path / "c.yaml", servers)) as (_, session):
            address = str(session._base_url)
            body = {"model": "jaxroute", "messages": MESSAGES, "max_tokens": 5}
            options = ("-H", "Content-Type: application/json", "-d")
            whole = await curl(f"{address}/v1/chat/completions", *options, json.dumps(body))
            assert json.loads(whole)["choices"][0]["message"]["content"] == TEXT
            lines = await curl("-N", f"{address}/v1/chat/completions", *options, json.dumps({**body, "stream": True}))
            assert lines.startswith("data: {") and lines.endswith("data: [DONE]\n\n")
            status = await curl("-o", str(tmp_path / "e"), "-w", "%{http_code}", f"{address}/v1/completions", "-d", "{")
            assert status == "400" and "not JSON" in (tmp_path / "e").read_text()

    asyncio.run(run())
