"""The timeline of an episode: what it collects equals the environment's own totals, and its files are what they say."""

from __future__ import annotations

import base64
import gzip
import json
import re
import shutil
import subprocess
from collections import defaultdict
from pathlib import Path

import jax
import numpy as np
import pytest
from matplotlib.colors import to_hex

from jaxroute import timelines
from jaxroute.commands import timeline
from jaxroute.config.build import build_experiment
from jaxroute.config.loader import config_text, load_config
from jaxroute.environment.environment import RoutingEnvironment
from jaxroute.environment.registry import SCENARIOS, make_params
from jaxroute.environment.state import EnvParams
from jaxroute.errors import UserError
from jaxroute.routers import make_router
from jaxroute.routers.choice import Router
from jaxroute.runs.checkpoint import save_checkpoint
from jaxroute.simulator.latency import iteration_time
from jaxroute.timelines import write
from jaxroute.timelines.collect import DROPPED, MET, MISSED, REJECTED, Episode, Pieces, collect
from jaxroute.timelines.layout import merged, of_expert, queues, rows, single
from jaxroute.timelines.perfetto import trace_text
from jaxroute.timelines.picture import FATE_COLOURS, timeline_picture
from jaxroute.timelines.write import FILES, write_timeline
from jaxroute.workload import FrozenRequests, PoissonArrivals, Workload

LENGTH, EXPERTS, LABELS = 150, ("alpaca-native", "chatglm-6b"), ("Round-Robin", "Drops <some>")
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


def overload(discipline: str) -> tuple[RoutingEnvironment, EnvParams, dict[str, Router]]:
    """Overloaded engines with little memory and few slots: requests are missed, preempted, dropped and rejected."""
    env = RoutingEnvironment(num_experts=2, slots=8, episode_length=LENGTH, penalty="off")
    workload = Workload.create(PoissonArrivals.create(6.0), FrozenRequests.create([0.7, 0.7]))
    params = make_params(
        EXPERTS, workload=workload, kv_cache_tokens=[400, 14_000], discipline=discipline, max_model_len=512
    )
    round_robin = make_router("round_robin", env)

    def drops_some(key, observation, state, params):
        return jax.numpy.where(state.step % 3 == 0, 2, round_robin(key, observation, state, params))

    return env, params, dict(zip(LABELS, (round_robin, drops_some), strict=True))


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> tuple[Path, list[Episode]]:
    out = tmp_path_factory.mktemp("timeline")
    return out, write_timeline(out, *overload("vllm_v1"), EXPERTS, seed=3, title="Overload")


@pytest.fixture(scope="module")
def trace(written) -> dict:
    return json.loads((written[0] / "trace.json").read_text())


def check_totals(episodes: list[Episode]) -> None:
    """Asserts that what is collected adds up to the environment's own metrics."""
    for episode in episodes:
        requests, pieces, metrics = episode.requests, episode.pieces, episode.metrics
        served = (requests.fate == MET) | (requests.fate == MISSED)
        share = (pieces.blocks + pieces.last_blocks) / 2 / episode.usable_blocks[pieces.expert]
        busy = pieces.end - pieces.start
        found = {
            "qos": (requests.score * (requests.fate == MET)).sum() / LENGTH,
            "latency_per_token": requests.latency_per_token[served].mean(),
            "latency_per_token_p95": np.quantile(requests.latency_per_token[served], 0.95),
            "ttft": (requests.first_token - requests.arrival)[served].mean(),
            "violation_rate": (requests.fate == MISSED).sum() / served.sum(),
            "drop_rate": (requests.fate == DROPPED).mean(),
            "rejection_rate": (requests.fate == REJECTED).mean(),
            "preemptions": requests.preemptions.sum(),
            "utilization": busy.sum() / 2 / episode.end,
            "expert_share": np.bincount(requests.expert[requests.expert >= 0], minlength=2) / LENGTH,
        }
        for name, value in found.items():
            np.testing.assert_allclose(value, metrics[name], rtol=5e-5, err_msg=name)
        # The environment counts the growth of a run of decodes as a straight line.
        np.testing.assert_allclose((busy * share).sum() / 2 / episode.end, metrics["kv_use"], rtol=0.02)
        assert pieces.preempted.sum() == requests.preemptions.sum()
        times = np.stack([requests.arrival, requests.admitted, requests.first_token, requests.finish])[:, served]
        waited, prefilled, decoded = np.diff(times, axis=0)
        assert min(waited.min(), decoded.min()) >= -1e-5 and prefilled.min() > 0
    assert episodes[0].metrics["preemptions"] > 0 and episodes[0].metrics["rejection_rate"] > 0
    assert episodes[1].metrics["drop_rate"] == pytest.approx(1 / 3)


def test_what_is_collected_adds_up_to_the_environments_own_metrics(written):
    check_totals(written[1])


def test_the_same_where_requests_linger_after_their_last_token():
    check_totals(collect(*overload("vllm_v0"), EXPERTS, jax.random.key(3)))


def test_iterations_follow_each_other_and_last_as_the_latency_model_says(written):
    engines = make_params(EXPERTS).engines
    for expert in range(2):
        pieces = of_expert(written[1][0].pieces, expert)
        each = single(pieces)
        assert len(each.start) == pieces.iterations.sum() > len(pieces.start)
        assert (each.start[1:] - each.end[:-1] > -1e-5).all()
        model = jax.tree.map(lambda leaf, expert=expert: leaf[expert], engines.latency)
        wanted = iteration_time(model, each.prefill_tokens, each.decodes, each.context)
        np.testing.assert_allclose(each.end - each.start, wanted, atol=1e-5)
        np.testing.assert_allclose(single(merged(pieces)).end.max(), each.end.max())
    assert (single(pieces).blocks <= written[1][0].usable_blocks[1]).all()


def test_merging_keeps_times_and_iterations(written):
    pieces = of_expert(written[1][0].pieces, 0)
    few = merged(pieces)
    assert len(few.start) < len(pieces.start) and few.iterations.sum() == pieces.iterations.sum()
    np.testing.assert_allclose((few.end - few.start).sum(), (pieces.end - pieces.start).sum(), rtol=1e-6)
    nothing = Pieces(*(field[:0] for field in pieces))
    assert len(merged(nothing).start) == len(single(nothing).start) == 0


def test_rows_do_not_overlap_and_queues_count_who_is_there(written):
    episode = written[1][0]
    requests = episode.requests
    for expert in range(2):
        row = rows(requests, expert)
        assert row.max() + 1 >= 8  # the slots, or more: an iteration under way has given its slots back
        for own in range(8):
            mine = np.flatnonzero(row == own)
            assert (requests.arrival[mine[1:]] >= requests.finish[mine[:-1]]).all()
    piece = np.arange(0, len(episode.pieces.start), 7)
    running, waiting = queues(episode, episode.pieces.start[piece] + 1e-7)
    at = (episode.pieces.expert[piece], np.arange(len(piece)))
    np.testing.assert_array_equal(running[at], episode.pieces.running[piece])
    np.testing.assert_array_equal(waiting[at], episode.pieces.waiting[piece])
    assert waiting.max() > 0 and queues(episode, np.array([-1.0, episode.end + 1]))[0].sum() == 0


def check_trace_format(trace: dict) -> dict[tuple[int, int], list[tuple[int, int]]]:
    """Asserts what the Trace Event Format asks of each kind of event; returns the slices of each thread."""
    assert trace["displayTimeUnit"] in ("ms", "ns")
    slices, flows = defaultdict(list), defaultdict(list)
    named = {(e["name"], e["pid"], e["tid"]) for e in trace["traceEvents"] if e["ph"] == "M"}
    for event in trace["traceEvents"]:
        kind = event["ph"]
        assert kind in "MXCstf" and isinstance(event["name"], str) and isinstance(event["pid"], int)
        if kind == "M":
            assert event["name"] in ("process_name", "process_sort_index", "thread_name", "thread_sort_index")
            continue
        assert isinstance(event["ts"], int) and event["ts"] >= 0  # microseconds
        if kind == "C":
            assert event["args"] and all(isinstance(value, int | float) for value in event["args"].values())
            continue
        assert ("thread_name", event["pid"], event["tid"]) in named and event["cat"]
        if kind == "X":
            assert isinstance(event["dur"], int) and event["dur"] >= 0
            slices[event["pid"], event["tid"]].append((event["ts"], event["ts"] + event["dur"]))
        else:
            flows[event["id"]].append(event)
    for own in slices.values():  # one after the other, so none is nested
        own.sort()
        assert all(before[1] <= after[0] for before, after in zip(own, own[1:], strict=False))
    for events in flows.values():
        assert len({(event["cat"], event["name"], event["pid"]) for event in events}) == 1
        assert [event["ph"] for event in events] == ["s", *"t" * (len(events) - 2), "f"]
        assert events[-1]["bp"] == "e"  # binds to the slice around it, as s and t do anyway
        assert [event["ts"] for event in events] == sorted(event["ts"] for event in events)
        for event in events:
            own = slices[event["pid"], event["tid"]]
            begins = np.searchsorted([begin for begin, _ in own], event["ts"], side="right") - 1
            assert own[begins][0] <= event["ts"] <= own[begins][1]
    return slices


def test_trace_keeps_to_the_format_and_holds_every_iteration_and_request(written, trace):
    slices = check_trace_format(trace)
    events = trace["traceEvents"]
    for process, episode in enumerate(written[1], start=1):
        own = [event for event in events if event["pid"] == process]
        iterations = [event for event in own if event["ph"] == "X" and event["cat"] == "iteration"]
        assert len(iterations) == episode.pieces.iterations.sum()
        assert {event["name"] for event in iterations} >= {"prefill", "decode", "mixed"}
        assert sum(e["args"]["prefill_tokens"] for e in iterations) == episode.pieces.prefill_tokens.sum()
        assert (
            sum(e["args"]["decodes"] for e in iterations) == (episode.pieces.decodes * episode.pieces.iterations).sum()
        )
        assert len(slices[process, 1000 * process]) == LENGTH
        flows = [event for event in own if event["ph"] in "stf"]
        fates = np.bincount(episode.requests.fate, minlength=4)
        assert len(flows) == 4 * (fates[MET] + fates[MISSED]) + 2 * fates[REJECTED]
        counters = {event["name"] for event in own if event["ph"] == "C"}
        assert counters == {f"{expert}: {what}" for expert in EXPERTS for what in ("requests", "KV use")}
    ends = {(e["tid"], e["ts"] + e["dur"]) for e in events if e["ph"] == "X" and e["cat"] == "iteration"}
    for event in events:
        if event["ph"] == "f" and event["tid"] % 2 == 0:  # the last token's iteration
            assert any((event["tid"], event["ts"] + 20 + off) in ends for off in range(-3, 4))


def test_trace_of_many_iterations_merges_decodes_and_says_so(written, trace, monkeypatch):
    monkeypatch.setattr(timelines.perfetto, "MOST_ITERATIONS", 10)
    few = json.loads(trace_text(written[1]))
    check_trace_format(few)
    assert len(few["traceEvents"]) < len(trace["traceEvents"])
    counts = [e["args"].get("iterations", 1) for e in few["traceEvents"] if e.get("cat") == "iteration"]
    assert max(counts) > 1 and sum(counts) == sum(e.get("cat") == "iteration" for e in trace["traceEvents"])
    assert "one slice" in few["otherData"]["iterations"] and "every" in trace["otherData"]["iterations"]

    monkeypatch.setattr(timelines.perfetto, "MOST_CHARACTERS", 10_000)
    coarse = json.loads(trace_text(written[1]))
    check_trace_format(coarse)
    counters = [sum(event["ph"] == "C" for event in one["traceEvents"]) for one in (coarse, few)]
    assert 0 < counters[0] < counters[1] / 2 and coarse["otherData"]["counters"] == "at most every 1.0 s"


def test_page_is_complete_in_itself(written, trace):
    page = (written[0] / "timeline.html").read_text()
    assert "default-src 'none'" in page and "{{" not in page
    assert not re.findall(r"""(?:src|href)\s*=\s*["'](?!data:)|url\(|@import|https?://""", page)
    packed = re.search(r"data:application/gzip;base64,([^\"]+)", page)
    assert packed and json.loads(gzip.decompress(base64.b64decode(packed[1]))) == trace
    picture = (written[0] / "timeline.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and base64.b64encode(picture).decode() in page
    assert "Overload: 150 requests under Round-Robin and Drops &lt;some&gt;" in page
    table = re.search(r"<table>.*?</table>", page, re.DOTALL)
    assert table and all(f"<td>{episode.metrics['qos']:.4f}</td>" in table[0] for episode in written[1])


def test_picture_shows_every_request_and_the_queue(written, tmp_path, figures):
    episodes = written[1]
    timeline_picture(tmp_path / "two.png", episodes)
    figure = figures["two.png"]
    assert len(figure.axes) == 2 * 4  # turned away, two experts and the queue, under each router
    times = np.linspace(0, max(episode.end for episode in episodes), 1500)
    for column, episode in enumerate(episodes):
        away, *lanes, queue = figure.axes[column::2]
        requests = episode.requests
        assert away.get_title(loc="left") == f"{episode.label}: QoS {float(episode.metrics['qos']):.3f}"
        for fate, ticks in zip((DROPPED, REJECTED), away.collections, strict=True):
            segments = np.array(ticks.get_segments()).reshape(-1, 2, 2)
            np.testing.assert_allclose(segments[:, 0, 0], requests.arrival[requests.fate == fate])
            if len(segments):
                assert to_hex(ticks.get_color()[0]) == FATE_COLOURS[fate]
        for expert, axes in enumerate(lanes):
            assert axes.texts[0].get_text() == EXPERTS[expert]
            parts = (requests.arrival, requests.first_token), (requests.first_token, requests.finish)
            wanted = [(begin, end, fate) for begin, end in parts for fate in (MET, MISSED)]
            for (begin, end, fate), bars in zip(wanted, axes.collections, strict=True):
                here = (requests.fate == fate) & (requests.expert == expert)
                edges = np.array([path.vertices for path in bars.get_paths()]).reshape(here.sum(), -1, 2)
                np.testing.assert_allclose(edges[:, :, 0].min(axis=1, initial=np.inf), begin[here])
                np.testing.assert_allclose(edges[:, :, 0].max(axis=1, initial=-np.inf), end[here])
                low, high = rows(requests, expert)[here] + 0.08, edges[:, :, 1].max(axis=1, initial=-np.inf)
                np.testing.assert_allclose(edges[:, :, 1].min(axis=1, initial=np.inf), low)
                np.testing.assert_allclose(high, low + 0.84)
                colour = bars.get_facecolor()[0]
                assert to_hex(colour) == FATE_COLOURS[fate] and (colour[3] == 1) == (end is requests.finish)
        counted = np.array(queues(episode, times)).sum(axis=1)
        running, waiting = (area.get_paths()[0].vertices[:, 1].max() for area in queue.collections)
        assert (running, waiting) == (counted[0].max(), counted.sum(axis=0).max())
        assert queue.get_xlabel() == "seconds"
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend == [
        *("QoS met", "QoS missed", "dropped by the router", "rejected by the expert"),
        *("paler: before the first token", "running", "waiting"),
    ]

    served = episodes[0].requests.fate < DROPPED
    quiet = episodes[0]._replace(requests=type(episodes[0].requests)(*(f[served] for f in episodes[0].requests)))
    timeline_picture(tmp_path / "one.png", [quiet])
    *lanes, _ = figures["one.png"].axes
    assert [axes.texts[0].get_text() for axes in lanes] == list(EXPERTS), "nobody was turned away"


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here (Debian: apt-get install chromium)")
def test_page_in_a_browser(written, tmp_path):
    """It draws all requests without an error, and its scrubber, zoom and address choose what is drawn."""
    script = """<script>
      addEventListener("error", event => { document.body.dataset.error = event.message; });
      addEventListener("securitypolicyviolation", event => { document.body.dataset.error = event.blockedURI; });
    </script>"""
    moves = """<script>
      const say = (name, value) => { document.body.dataset[name] = value; };
      const move = (id, value) => { byId(id).value = value; byId(id).dispatchEvent(new Event("input")); draw(); };
      say("all", document.body.dataset.bars);
      move("zoom", 0.5); say("zoomed", byId("window").textContent + "|" + document.body.dataset.bars);
      move("position", 1000); say("late", byId("window").textContent);
      byId("whole").click(); draw(); say("again", byId("window").textContent);
      const lane = PLACES.places.find(place => place.kind === "lane"), box = lanes.getBoundingClientRect();
      lanes.dispatchEvent(new PointerEvent("pointermove", { clientX: box.left + LEFT + 60,
        clientY: box.top + lane.top + lane.height - 3 }));
      say("tip", tip.textContent.replaceAll("\\n", "|"));
    </script>"""
    page = (written[0] / "timeline.html").read_text()
    page = page.replace("<body>", "<body>" + script).replace("</body>", moves + "</body>")
    (tmp_path / "page.html").write_text(page)
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    address = f"file://{tmp_path}/page.html"
    done = subprocess.run(
        [str(CHROMIUM), *options, "--dump-dom", address], capture_output=True, text=True, timeout=120, check=True
    )
    body = re.search(r"<body[^>]*>", done.stdout)
    assert body
    found = dict(re.findall(r'data-(\w+)="([^"]*)"', body[0]))
    assert "error" not in found, found
    end = max(episode.end for episode in written[1])
    served = sum(int((episode.requests.fate < DROPPED).sum()) for episode in written[1])
    assert int(found["all"]) == served
    begin, until = (float(number) for number in re.findall(r"([\d.]+) s", found["zoomed"])[:2])
    assert 0 < begin < until < end and 0 < int(found["zoomed"].split("|")[1]) < served
    assert float(re.findall(r"([\d.]+) s", found["late"])[1]) == pytest.approx(end, abs=0.02)
    assert found["again"].startswith("0.00 s")
    assert "request" in found["tip"] and "ms per token (limit 30 ms)" in found["tip"] and "engine: " in found["tip"]
    assert int(found["ready"]) < 3000


TINY = ("environment.episode_length=20", "environment.slots=8")


def test_command_runs_routers_and_a_run_on_its_configuration(written, tmp_path, capsys, monkeypatch):
    """All but the episodes, which are those of the other tests."""
    network = ["network.kind=flat", "network.mlp=[4]"]
    saved = load_config(None, [*TINY, *network, "workload.arrivals.rate=7", "evaluation.seed=5"])
    run, out, asked = tmp_path / "run", tmp_path / "new", []
    run.mkdir()
    (run / "config.yaml").write_text(config_text(saved))
    experiment = build_experiment(saved)
    shapes = jax.eval_shape(
        lambda: experiment.network.init(
            jax.random.key(0), experiment.env.reset(jax.random.key(0), experiment.params)[0]
        )
    )
    save_checkpoint(run, jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes))
    monkeypatch.setattr(write, "collect", lambda *arguments: asked.append(arguments) or written[1])
    assert timeline.main(["round_robin", str(run), "environment.slots=9", "--out", str(out)]) == 0
    env, params, routers, experts, key = asked[0]
    assert (env.episode_length, env.slots, params.workload.arrivals.rate) == (20, 9, 7)
    assert list(routers) == ["Round-Robin", "Trained"] and experts == SCENARIOS["paper-3"]
    assert key == jax.random.split(jax.random.key(5), 20)[0]  # the first episode of the run's evaluation
    assert sorted(file.name for file in out.iterdir()) == sorted(FILES)
    said = capsys.readouterr().out
    assert "Round-Robin: QoS 0." in said and "timeline.html (0." in said


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["round_robbin"], "unknown router 'round_robbin'; the nearest are round_robin"),
        (["runs/none"], "runs/none: has no config.yaml"),
        (["random", "round_robin", "llm_d"], "name one router, or two that differ, not 3"),
        (["random", "random"], "two that differ"),
        (["random", "environment.episode_length=0"], "environment.episode_length: expected a whole number of 1 or"),
        (["random", "environment.slot=3"], "unknown key environment.slot"),
        (["random", "--config", "none.yaml"], "none.yaml: cannot be read"),
        (["random", "--seed", "-1"], "evaluation.seed: expected a whole number"),
        (
            ["random", "environment.ttft_limit=1", "environment.tpot_limit=0.03"],
            "limits on the latency per token alone",
        ),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(tmp_path, capsys, arguments, says):
    out = tmp_path / "out"
    assert timeline.main([*arguments, "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and says in error, error
    assert not out.exists()


def test_out_must_be_a_new_folder(tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    assert timeline.main(["random", *TINY, "--out", str(tmp_path)]) == 2
    assert timeline.main(["random", *TINY, "--out", str(tmp_path / "file" / "under")]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and "is not empty" in lines[0] and "cannot be written" in lines[1]
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_run_folder_of_another_shape_is_refused(tmp_path):
    (tmp_path / "config.yaml").write_text("agent: {}\n")
    with pytest.raises(UserError, match="missing"):
        timeline.main.__wrapped__([str(tmp_path), "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
