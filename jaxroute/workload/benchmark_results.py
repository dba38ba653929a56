"""Results of benchmark tools as records: vLLM's `bench serve` and its relatives, guidellm, aiperf.

They hold what the client measured. Requests that failed are left out; what contradicts itself is refused.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

from jaxroute.errors import UserError
from jaxroute.workload.content import Content
from jaxroute.workload.files import Place, member, names, number, shown, tokens
from jaxroute.workload.record import Record, Time

VLLM = ("input_lens", "output_lens", "ttfts", "itls", "mean_ttft_ms")
GUIDELLM = ("benchmarks",)
AIPERF = ("metrics",)
"""Keys by which each is recognised."""

_DETAILS = "save the details of each request (vLLM: --save-result --save-detailed, SGLang: --output-details)"


def choose_run(content: Content, runs: Sequence[Any], run: int | None, what: str) -> Any:
    """The one of several results in a file that `run`, from 1 on, names; the only one if there is one."""
    if run is None and len(runs) > 1:
        raise UserError(f"{content.path}: holds {len(runs)} results ({what}); choose one with run=1 to {len(runs)}")
    if not 1 <= (run or 1) <= len(runs):
        raise UserError(
            f"{content.path}: run is {run}, and the file holds {len(runs)} results; choose 1 to {len(runs)}"
        )
    if len(runs) > 1:
        content.tally.changed.append(f"result {run} of {len(runs)}")
    return runs[(run or 1) - 1]


def vllm_records(content: Content, run: int | None) -> Iterator[Record]:
    """Records of a result of vLLM's benchmark, or of SGLang's; appended results are objects one a line."""
    results = list(content.objects())
    rates = ", ".join(shown(result.get("request_rate")) for _, result in results[:8])
    head, result = choose_run(content, results, run, f"request rates {rates}")
    where = f"{content.path}" if len(results) == 1 else f"{content.path}, {head.unit} {head.line}"
    lists = {key: result.get(key) for key in ("input_lens", "output_lens", "ttfts", "itls")}
    for key, values in lists.items():
        if not isinstance(values, list):
            raise UserError(f"{where}: no list {key}; {_DETAILS}")
    count = len(lists["input_lens"] or [])
    lists["start_times"] = _start_times(where, result, count)
    lists["errors"] = result.get("errors") or [""] * count
    for key, values in lists.items():
        if not isinstance(values, list) or len(values) != count:
            has = len(values) if isinstance(values, list) else shown(values)
            raise UserError(f"{where}: {key} has {has} entries, input_lens {count}; the file is not whole")
    if result.get("start_times") is None:
        content.tally.changed.append("no start_times: all sent at once, as its request_rate says")
    content.tally.rows = count
    yield from _vllm_entries(content, count, lists)


def _start_times(where: str, result: dict[str, Any], count: int) -> Any:
    start = result.get("start_times")
    rate = result.get("request_rate")
    at_once = rate in ("inf", "Infinity") or (isinstance(rate, float) and rate == math.inf)
    if start is not None:
        return start
    if at_once and not result.get("max_concurrency"):
        return [0.0] * count
    raise UserError(
        f"{where}: no list start_times, which say when each request was sent; vLLM saves it since January 2026 "
        "(pull request 32667) with --save-detailed; without it, only a benchmark with request_rate inf and no "
        "max_concurrency can be used"
    )


def _vllm_entries(content: Content, count: int, lists: dict[str, Any]) -> Iterator[Record]:
    tally, more = content.tally, 0
    for index in range(count):
        place = Place(content.path, index, "entry")
        if lists["errors"][index]:
            tally.left_out["failed"] += 1
            continue
        output = tokens(place, "output_lens", lists["output_lens"][index], low=0)
        if output == 0:
            tally.left_out["without output tokens"] += 1
            continue
        prompt = tokens(place, "input_lens", lists["input_lens"][index])
        arrival = _seconds(place, "start_times", lists["start_times"][index])
        ttft = number(place, "ttfts", lists["ttfts"][index], 0.0)
        if not isinstance(lists["itls"][index], list):
            raise place.error(f"itls must be a list of seconds, is {shown(lists['itls'][index])}")
        gaps = [number(place, "itls", gap, 0.0) for gap in lists["itls"][index]]
        # A chat sends up to two chunks without a token, and a tokenizer may count the text's tokens a little lower.
        if len(gaps) > 1.1 * output + 1:
            raise place.error(
                f"output_lens is {output}, but itls has {len(gaps)} gaps: more tokens came than are counted; "
                "count them with the model's tokenizer"
            )
        more += len(gaps) >= output
        first = arrival[0], arrival[1] + ttft
        why = "with itls empty and output_lens above 1" if output > 1 and not gaps else None
        why = "with ttfts 0" if ttft == 0 else why
        last = first[0], first[1] + sum(gaps)
        yield Record(place, arrival, prompt, output, arrival, first, last, identity=index, untimed=why)
    if more:
        tally.changed.append(f"{more:,} with a gap or two more than tokens, as chats send")


def guidellm_records(content: Content, run: int | None) -> Iterator[Record]:
    """Records of a guidellm report (JSON), of one of its benchmarks; requests of versions 0.2 to 0.7."""
    (place, report), *more = content.objects()
    if more:
        raise more[0][0].error("is a second object, and a guidellm report is one; keep one report in a file")
    benchmarks = member(place, report, "benchmarks", list)
    if not benchmarks or not all(isinstance(item, dict) for item in benchmarks):
        raise place.error(f"'benchmarks' must list objects, is {shown(benchmarks)}; export the report again")
    benchmark = choose_run(content, benchmarks, run, "benchmarks of a sweep")
    groups = benchmark.get("requests")
    if not isinstance(groups, dict) or not isinstance(groups.get("successful"), list):
        raise place.error("no list of successful requests; export the report as JSON, with its requests")
    tally = content.tally
    tally.rows = len(groups["successful"])
    for group, reason in (("errored", "failed"), ("incomplete", "incomplete")):
        others = groups.get(group)
        if isinstance(others, list) and others:
            tally.left_out[reason] += len(others)
            tally.rows += len(others)
    for index, request in enumerate(groups["successful"]):
        where = Place(content.path, index, "successful request")
        if not isinstance(request, dict):
            raise where.error(f"must be an object, is {shown(request)}; export the report again")
        if _usage(request, "output_tokens", "output_metrics") == 0:
            tally.left_out["without output tokens"] += 1
            continue
        yield _guidellm_request(where, request)


def _guidellm_request(place: Place, request: dict[str, Any]) -> Record:
    info = request.get("info")
    timings = info.get("timings") if isinstance(info, dict) else None
    timings = timings if isinstance(timings, dict) else {}
    start = _first(place, request, timings, ("request_start", "resolve_start", "request_start_time", "start_time"))
    if start is None:
        raise place.error(f"no request_start or start_time; it has {names(request)}")
    prompt = _usage(request, "prompt_tokens", "input_metrics")
    output = _usage(request, "output_tokens", "output_metrics")
    record = Record(
        place,
        start,
        tokens(place, "prompt_tokens", prompt),
        tokens(place, "output_tokens", output),
        identity=request.get("request_id"),
    )
    first = _first(place, request, timings, ("first_token_iteration", "first_token_time"))
    last = _first(place, request, timings, ("last_token_iteration", "last_token_time"))
    if first is None or last is None:
        return record._replace(untimed="without first or last token time")
    return _in_order(record._replace(start=start, first=first, last=last))


def _first(place: Place, request: dict[str, Any], timings: dict[str, Any], keys: Sequence[str]) -> Time | None:
    for key in keys:
        for holder in (timings, request):
            if holder.get(key) is not None:
                return _seconds(place, key, holder[key])
    return None


def _usage(request: dict[str, Any], key: str, metrics: str) -> Any:
    inside = request.get(metrics)
    return (
        request.get(key) if request.get(key) is not None or not isinstance(inside, dict) else inside.get("total_tokens")
    )


def aiperf_records(content: Content, run: int | None) -> Iterator[Record]:
    """Records of aiperf's `profile_export.jsonl`, without warm-up, failed and cancelled requests."""
    tally = content.tally
    for place, record in content.objects():
        metadata, metrics = member(place, record, "metadata", dict), member(place, record, "metrics", dict)
        phase = metadata.get("benchmark_phase", metadata.get("credit_phase", "profiling"))
        if phase != "profiling":
            tally.left_out[f"of the phase {shown(phase)}"] += 1
            continue
        if record.get("error") or metadata.get("was_cancelled"):
            tally.left_out["failed or cancelled"] += 1
            continue
        yield _aiperf_request(place, metadata, metrics)


def _aiperf_request(place: Place, metadata: dict[str, Any], metrics: dict[str, Any]) -> Record:
    keys = ("request_start_ns", "timestamp_ns")
    key = next((key for key in keys if metadata.get(key) is not None), None)
    if key is None:
        raise place.error(f"no request_start_ns or timestamp_ns in 'metadata'; it has {names(metadata)}")
    value = metadata[key]
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 10**20:
        raise place.error(f"'{key}' must be a whole number of nanoseconds, is {shown(value)}; export it again")
    arrival = value // 10**9, value % 10**9 / 1e9
    prompt, output = (_plain_metric(place, metrics, f"{side}_sequence_length") for side in ("input", "output"))
    record = Record(
        place,
        arrival,
        tokens(place, "'input_sequence_length'", prompt),
        tokens(place, "'output_sequence_length'", output),
        identity=metadata.get("x_request_id"),
    )
    ttft = _duration(place, metrics, ("time_to_first_token", "ttft"))
    latency = _duration(place, metrics, ("request_latency",))
    if ttft is None or latency is None:
        return record._replace(untimed="without time_to_first_token or request_latency")
    first, last = (arrival[0], arrival[1] + ttft), (arrival[0], arrival[1] + latency)
    return _in_order(record._replace(start=arrival, first=first, last=last))


def _plain_metric(place: Place, metrics: dict[str, Any], key: str) -> Any:
    value = member(place, metrics, key, dict, " in 'metrics'").get("value")
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _duration(place: Place, metrics: dict[str, Any], keys: Sequence[str]) -> float | None:
    """Seconds of the first of the metrics that is there, by its unit."""
    key = next((key for key in keys if key in metrics), None)
    if key is None:
        return None
    metric = member(place, metrics, key, dict, " in 'metrics'")
    parts = {"s": 1, "sec": 1, "ms": 1e3, "us": 1e6, "ns": 1e9}.get(str(metric.get("unit")))
    if parts is None:
        raise place.error(f"'{key}' has the unit {shown(metric.get('unit'))}; it needs s, ms, us or ns")
    return number(place, f"'{key}'", metric.get("value"), 0.0) / parts


def _in_order(record: Record) -> Record:
    start, first, last = record.start, record.first, record.last
    assert start is not None and first is not None and last is not None
    since = [(time[0] - start[0]) + (time[1] - start[1]) for time in (first, last)]
    if since[0] < 0 or since[1] < since[0]:
        raise record.place.error(
            f"first token {since[0]:g} s and last token {since[1]:g} s after its start; they must follow each other"
        )
    return record


def _seconds(place: Place, label: str, value: Any) -> Time:
    seconds = number(place, label, value)
    if abs(seconds) > 1e11:
        raise place.error(f"{label} is {shown(value)} s, beyond the year 5138; its unit must be seconds")
    return 0, seconds
