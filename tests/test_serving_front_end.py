"""The front end against mock servers: what passes through, faults, limits, and that every request ends once."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import re
import shutil

import aiohttp
import pytest

pytest.importorskip("aiohttp", reason="needs the extra serve")
pytest.importorskip("prometheus_client", reason="needs the extra serve")

from jaxroute.serving.front_end import Limits  # noqa: E402
from tests.live_front_end import front_end, write_cluster  # noqa: E402
from tests.mock_servers import MockServer, mock_servers  # noqa: E402

CHAT = {"model": "jaxroute", "messages": [{"role": "user", "content": "Say five words."}], "max_tokens": 5}
TEXT = "w0 w1 w2 w3 w4 "


@pytest.fixture(autouse=True)
def no_exceptions(caplog):
    """No test may log an exception."""
    yield
    assert [record for record in caplog.get_records("call") if record.levelno >= logging.ERROR] == []


async def post(session: aiohttp.ClientSession, body, path="/v1/chat/completions", **options):
    """Status, headers and JSON of an answer that is no stream."""
    data = body if isinstance(body, bytes | io.BytesIO) else json.dumps(body)
    async with session.post(path, data=data, **options) as answer:
        return answer.status, answer.headers, json.loads(await answer.read())


async def stream(session: aiohttp.ClientSession, body, path="/v1/chat/completions", **options) -> list:
    """The events of a stream, the last of them [DONE] if there is one."""
    async with session.post(path, json={**body, "stream": True}, **options) as answer:
        assert answer.status == 200 and answer.content_type == "text/event-stream"
        data = (await answer.read()).decode()
    parts = [part.removeprefix("data: ") for part in data.split("\n\n") if part]
    return [part if part == "[DONE]" else json.loads(part) for part in parts]


async def all_up(one) -> None:
    """Waits until no expert is out."""
    async with asyncio.timeout(10):
        while not one.dispatcher.up.all():
            await asyncio.sleep(0.02)


def test_answers_are_the_servers(tmp_path):
    async def run():
        async with mock_servers(2) as servers, front_end(write_cluster(tmp_path / "c.yaml", servers)) as (one, session):
            status, headers, whole = await post(session, CHAT)
            assert status == 200 and headers["X-Jaxroute-Expert"] == "e0"
            assert whole["object"] == "chat.completion" and whole["model"] == "mock"
            message = {"role": "assistant", "content": TEXT}
            assert whole["choices"] == [{"index": 0, "message": message, "finish_reason": "length"}]
            assert whole["usage"] == {"prompt_tokens": 7, "completion_tokens": 5, "total_tokens": 12}

            events = await stream(session, CHAT)
            assert events[-1] == "[DONE]" and len(events) == 7
            assert not any("usage" in event for event in events[:-1])  # which the client did not ask for
            assert "".join(event["choices"][0]["delta"]["content"] for event in events[:-1]) == TEXT
            asked = {**CHAT, "stream_options": {"include_usage": True}}
            events = await stream(session, asked)
            assert [event["usage"] is None for event in events[:-1]] == [True] * 6 + [False]
            asked["stream_options"]["continuous_usage_stats"] = True
            events = await stream(session, asked)
            assert [event["usage"]["completion_tokens"] for event in events[:-1]] == [0, 1, 2, 3, 4, 5, 5]

            text = {"prompt": "Say five words.", "max_tokens": 5}
            status, _, whole = await post(session, text, "/v1/completions")
            assert whole["object"] == "text_completion" and whole["choices"][0]["text"] == TEXT
            events = await stream(session, text, "/v1/completions")
            assert "".join(event["choices"][0]["text"] for event in events[:-1]) == TEXT
            status, _, whole = await post(session, {**text, "best_of": 2}, "/v1/completions")
            assert whole["choices"][0]["text"] == "whole"  # which cannot be streamed
            assert one.dispatcher.ledger.open == 0 and one.open == 0

    asyncio.run(run())


def test_the_rest_of_a_request_passes_through(tmp_path):
    async def run():
        async with mock_servers(1) as servers, front_end(write_cluster(tmp_path / "c.yaml", servers)) as (_, session):
            image = [{"type": "text", "text": "What is it?"}, {"type": "image_url", "image_url": {"url": "data:,"}}]
            own = {
                "messages": [{"role": "user", "content": image}],
                "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}],
                "temperature": 0.25,
                "logit_bias": {"5": -1.5},
                "extra": {"deep": [1, None, "é😀", "\ud800"]},
            }
            await post(session, own, headers={"X-Request-Id": "mine", "Authorization": "Bearer secret"})
            body = servers[0].bodies[0]
            assert {key: body[key] for key in own} == own
            assert body["model"] == "mock" and body["stream"] is True
            assert servers[0].headers[0]["X-Request-Id"] == "mine"
            assert "Authorization" not in servers[0].headers[0]  # the client's key is not the server's

    asyncio.run(run())


def test_errors_have_openais_format(tmp_path):
    cases = [
        (b'{"model": "jaxroute", "messages"', 400, "not JSON"),
        (b"[1]", 400, "must be a JSON object"),
        (b"\xff\xfe", 400, "not JSON"),
        ({**CHAT, "model": "gpt-4"}, 404, "'gpt-4' does not exist"),
        ({"model": "jaxroute"}, 400, "messages must be a list"),
        ({**CHAT, "max_tokens": -3}, 400, "max_tokens must be"),
        ({**CHAT, "stream": "yes"}, 400, "stream must be"),
        ({**CHAT, "stream_options": 1}, 400, "stream_options must be"),
        ({**CHAT, "max_tokens": 200_000}, 400, "max_tokens is too large"),  # the server's own
    ]
    limits = [
        ("-5", "above 0"),
        ("nan", "above 0"),
        ("fast", "above 0"),
        ("ttft=500", "like 30"),
        ("ttft=1,tpot=-1", "above 0"),
    ]

    async def run():
        path = write_cluster(tmp_path / "c.yaml", [MockServer()])
        async with mock_servers(1) as servers:
            write_cluster(path, servers)
            async with front_end(path, limits=Limits(body_bytes=1 << 20)) as (one, session):
                for body, wanted, words in cases:
                    status, _, answer = await post(session, body)
                    assert status == wanted and words in answer["error"]["message"], answer
                for text, words in limits:
                    status, _, answer = await post(session, CHAT, headers={"X-Jaxroute-Limit": text})
                    assert status == 400 and words in answer["error"]["message"]
                for good in ("30", "ttft=500, tpot=25"):
                    assert (await post(session, CHAT, headers={"X-Jaxroute-Limit": good}))[0] == 200
                status, _, answer = await post(session, io.BytesIO(b"x" * (2 << 20)))
                assert status == 413 and "larger than 1 MB" in answer["error"]["message"]

                async def endless():
                    for _ in range(40):
                        yield b"x" * (1 << 16)

                async with session.post("/v1/chat/completions", data=endless()) as answer:
                    assert answer.status == 413
                async with session.get("/v1/chat/completions") as answer:
                    assert answer.status == 405 and "error" in await answer.json()
                async with session.get("/nowhere") as answer:
                    assert answer.status == 404 and "error" in await answer.json()
                async with session.get("/health", headers={"X-Long": "x" * 20_000}) as answer:
                    assert answer.status == 400
                assert one.dispatcher.ledger.open == 0 and one.open == 0

    asyncio.run(run())


def test_models_health_metrics_and_status(tmp_path):
    async def run():
        async with mock_servers(2) as servers, front_end(write_cluster(tmp_path / "c.yaml", servers)) as (_, session):
            await post(session, CHAT)
            async with session.get("/v1/models") as answer:
                assert [model["id"] for model in (await answer.json())["data"]] == ["jaxroute"]
            async with session.get("/health") as answer:
                assert answer.status == 200
            async with session.get("/metrics") as answer:
                text = await answer.text()
            assert 'jaxroute_ended_total{expert="e0",outcome="completed"} 1.0' in text
            assert (
                'jaxroute_completion_tokens_total{expert="e0"} 5.0' in text and 'jaxroute_up{expert="e1"} 1.0' in text
            )
            async with session.get("/status.json") as answer:
                seen = await answer.json()
            assert [expert["completed"] for expert in seen["experts"]] == [1, 0] and seen["bars"][-1]["met"] == 1
            async with session.get("/") as answer:
                assert answer.content_type == "text/html"

    asyncio.run(run())


def test_a_key_guards_the_api(tmp_path):
    async def run():
        async with mock_servers(1) as servers:
            path = write_cluster(tmp_path / "c.yaml", servers)
            async with front_end(path, api_key="secret") as (_, session):
                for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Bearer é"}):
                    status, _, answer = await post(session, CHAT, headers=headers)
                    assert status == 401 and answer["error"]["code"] == "invalid_api_key"
                    assert (await post(session, {}, "/route", headers=headers))[0] == 401
                assert (await post(session, CHAT, headers={"Authorization": "Bearer secret"}))[0] == 200
                async with session.get("/health") as answer:
                    assert answer.status == 200

    asyncio.run(run())


def test_dropped_and_never_dropped(tmp_path):
    async def run():
        async with mock_servers(2, gap=0.05) as servers:
            path = write_cluster(tmp_path / "c.yaml", servers)
            async with front_end(path, "shortest_queue+admission") as (one, session):
                status, headers, answer = await post(session, CHAT, headers={"X-Jaxroute-Limit": "0.1"})
                assert status == 429 and int(headers["Retry-After"]) >= 1
                assert answer["error"]["code"] == "dropped" and "the router dropped it" in answer["error"]["message"]
                assert one.dispatcher.statistics.reasons == {"the router dropped it": 1}
            async with front_end(path, "shortest_queue+admission", drop=False) as (_, session):
                assert (await post(session, CHAT, headers={"X-Jaxroute-Limit": "0.1"}))[0] == 200
            write_cluster(path, servers, slots=1)
            async with front_end(path) as (one, session):
                answers = await asyncio.gather(*(post(session, CHAT) for _ in range(4)))
                assert sorted(status for status, _, _ in answers) == [200, 200, 429, 429]
                assert one.dispatcher.statistics.reasons == {"all queues are full": 2}
                assert one.dispatcher.ledger.open == 0

    asyncio.run(run())


@pytest.mark.parametrize("fault", ["500", "reset early", "hang early"])
def test_a_request_fails_over_where_nothing_was_streamed(tmp_path, fault):
    async def run():
        async with mock_servers(2) as servers:
            path = write_cluster(tmp_path / "c.yaml", servers)
            limits = Limits(silent_seconds=0.4)
            async with front_end(path, limits=limits) as (one, session):
                servers[0].faults = {fault: 1.0}
                events = await stream(session, CHAT)
                assert events[-1] == "[DONE]" and len(events) == 7
                assert len(servers[1].bodies) == 1
                assert one.dispatcher.statistics.totals["e0"]["failed"] == 1
                # Both fail: one clear error, and no third try.
                servers[1].faults = {fault: 1.0}
                await all_up(one)
                status, _, answer = await post(session, CHAT)
                assert status == 502 and answer["error"]["code"] == "expert_failed"
                assert len(servers[0].bodies) + len(servers[1].bodies) == 4
                assert one.dispatcher.ledger.open == 0

    asyncio.run(run())


@pytest.mark.parametrize("fault", ["reset", "hang", "error event", "cut"])
def test_a_stream_that_breaks_ends_with_an_error(tmp_path, fault):
    async def run():
        async with mock_servers(2, gap=0.01) as servers:
            path = write_cluster(tmp_path / "c.yaml", servers)
            async with front_end(path, limits=Limits(silent_seconds=0.4)) as (one, session):
                servers[0].random.seed(1)  # which breaks the stream behind some tokens
                servers[0].faults = {fault: 1.0}
                events = await stream(session, CHAT)
                assert events[-1]["error"]["code"] == "expert_failed" and len(events) > 1
                assert not servers[1].bodies
                # A client without a stream has seen nothing, so its request is sent to the other expert.
                await all_up(one)
                status, headers, answer = await post(session, CHAT)
                assert status == 200 and headers["X-Jaxroute-Expert"] == "e1"
                assert one.dispatcher.ledger.open == 0

    asyncio.run(run())


def test_an_expert_that_is_killed_leaves_and_returns(tmp_path):
    async def run():
        async with mock_servers(2, gap=0.02) as servers:
            path = write_cluster(tmp_path / "c.yaml", servers)
            async with front_end(path) as (one, session):
                streams = [asyncio.create_task(stream(session, {**CHAT, "max_tokens": 20})) for _ in range(6)]
                await asyncio.sleep(0.15)
                await servers[0].stop()
                done = await asyncio.gather(*streams)
                broken = [events for events in done if events[-1] != "[DONE]"]
                assert len(broken) == 3 and all("error" in events[-1] for events in broken)
                assert one.dispatcher.up.tolist() == [False, True]
                for _ in range(3):
                    assert (await post(session, CHAT))[1]["X-Jaxroute-Expert"] == "e1"
                await servers[0].start()
                await all_up(one)
                assert (await post(session, CHAT))[1]["X-Jaxroute-Expert"] == "e0"
                await servers[0].stop()
                await servers[1].stop()
                codes = [(await post(session, CHAT))[2]["error"]["code"] for _ in range(2)]
                assert codes == ["expert_failed", "no_expert"]
                async with session.get("/health") as answer:
                    assert answer.status == 503
                assert one.dispatcher.ledger.open == 0

    asyncio.run(run())


def test_a_client_that_leaves_frees_its_slot_and_the_server(tmp_path):
    async def run():
        async with mock_servers(1, gap=0.02) as servers:
            path = write_cluster(tmp_path / "c.yaml", servers)
            async with front_end(path) as (one, session):
                for streamed in (True, False):
                    task = asyncio.create_task(post(session, {**CHAT, "max_tokens": 500, "stream": streamed}))
                    await asyncio.sleep(0.2)
                    assert one.dispatcher.ledger.open == 1
                    task.cancel()
                    async with asyncio.timeout(5):
                        while one.dispatcher.ledger.open or servers[0].open or one.open:
                            await asyncio.sleep(0.02)
                assert servers[0].aborted == 2
                assert one.dispatcher.statistics.totals["e0"]["cancelled"] == 2

    asyncio.run(run())


def test_slow_clients_are_cut_off(tmp_path):
    async def run():
        async with mock_servers(1) as servers:
            path = write_cluster(tmp_path / "c.yaml", servers)
            async with front_end(path, limits=Limits(client_seconds=0.5)) as (one, session):
                host, port = "127.0.0.1", session._base_url.port
                # One sends half of its headers, one half of its body, one reads nothing of a long answer.
                head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n"
                _, first = await asyncio.open_connection(host, port)
                first.write(head)
                reader, second = await asyncio.open_connection(host, port)
                second.write(head + b"Content-Length: 100\r\n\r\n{")
                body = json.dumps({"prompt": "p", "max_tokens": 1000, "stream": True, "word": "w" * 30_000}).encode()
                _, third = await asyncio.open_connection(host, port, limit=1)
                third.write(head + b"Content-Length: %d\r\n\r\n" % len(body) + body)
                assert (await reader.readline()).startswith(b"HTTP/1.1 408")
                async with asyncio.timeout(10):
                    while one.connections() or one.dispatcher.ledger.open:
                        await asyncio.sleep(0.05)
                assert servers[0].open == 0
                for writer in (first, second, third):
                    writer.close()

    asyncio.run(run())


def test_shutting_down_lets_open_requests_end(tmp_path):
    async def run():
        async with mock_servers(1, gap=0.05) as servers:
            path = write_cluster(tmp_path / "c.yaml", servers)
            async with front_end(path) as (one, session):
                task = asyncio.create_task(stream(session, {**CHAT, "max_tokens": 20}))
                await asyncio.sleep(0.2)
                kept = await session.get("/health")  # a connection that is open already
                one.stopping.set()
                await asyncio.sleep(0.1)
                assert one.draining
                with pytest.raises(aiohttp.ClientConnectionError):
                    async with aiohttp.ClientSession(session._base_url) as other:
                        await post(other, CHAT)
                kept.release()
                assert (await task)[-1] == "[DONE]"

    asyncio.run(run())


def test_more_requests_than_the_front_end_holds(tmp_path):
    async def run():
        async with mock_servers(1, gap=0.3) as servers:  # so slow that all have come before one is answered
            path = write_cluster(tmp_path / "c.yaml", servers)
            async with front_end(path, limits=Limits(open_requests=3)) as (one, session):
                answers = await asyncio.gather(*(post(session, CHAT) for _ in range(5)))
                assert sorted(status for status, _, _ in answers) == [200, 200, 200, 429, 429]
                assert one.open == 0

    asyncio.run(run())


def test_a_server_of_which_only_the_url_is_known_is_measured(tmp_path):
    async def run():
        async with mock_servers(1, gap=0.02) as servers:
            path = tmp_path / "c.yaml"
            path.write_text(f"experts: [{{url: '{servers[0].url}/v1/', max_num_seqs: 40}}]\nslots: 64\n")
            servers[0].faults = {"500": 1.0}
            async with front_end(path) as (one, session):
                assert (await post(session, CHAT))[0] == 503
                async with asyncio.timeout(60):
                    while not servers[0].bodies:
                        await asyncio.sleep(0.05)
                servers[0].faults = {}  # it is asked once more
                async with asyncio.timeout(60):
                    while not one.dispatcher.up[0]:
                        await asyncio.sleep(0.05)
                engines = one.dispatcher.decider.params.engines
                assert engines.usable_blocks.tolist() == [800] and engines.max_model_len.tolist() == [4096]
                assert engines.max_num_seqs.tolist() == [40]
                assert 0.018 < float(engines.latency.base[0]) < 0.03  # a loaded machine is slower
                assert one.dispatcher.ledger.shortest_iteration[0] == engines.latency.base[0]
                assert (await post(session, CHAT))[0] == 200 and servers[0].bodies[-1]["model"] == "mock"

    asyncio.run(run())


def test_the_way_to_a_server_and_back_is_learned(tmp_path):
    async def run():
        async with mock_servers(2, gap=0.02) as servers:
            async with front_end(write_cluster(tmp_path / "c.yaml", servers)) as (one, session):
                for _ in range(3):
                    await post(session, CHAT)
                first, second = one.dispatcher.ledger.delay
                assert 0.003 < first <= 0.015 and second == 0  # the profile has 15 ms for the first token, not 20

    asyncio.run(run())


CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here (Debian: apt-get install chromium)")
def test_the_status_page_in_a_browser(tmp_path):
    async def run():
        async with mock_servers(2) as servers, front_end(write_cluster(tmp_path / "c.yaml", servers)) as (one, session):
            for _ in range(3):
                await post(session, CHAT)
            one.dispatcher.up[1] = False
            options = ("--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}")
            options += ("--virtual-time-budget=1500", "--dump-dom", str(session._base_url))
            pipe = asyncio.subprocess.PIPE
            browser = await asyncio.create_subprocess_exec(str(CHROMIUM), *options, stdout=pipe, stderr=pipe)
            page = (await browser.communicate())[0].decode()
            rows = re.findall(r"<tr>(.*?)</tr>", page)
            cells = [re.findall(r"<td[^>]*>(.*?)</td>", row) for row in rows]
            found = {row[0]: row[1:] for row in cells if row}
            assert found["e0"][0] == "up" and found["e0"][5:7] == ["3", "3"] and found["e1"][0] == "down"
            assert "Of 3 requests that ended, 3 met their limit" in page and "<rect" in page

    asyncio.run(run())
