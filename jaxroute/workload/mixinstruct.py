"""Reads prompts with the recorded answers and scores of several models from a JSONL file in MixInstruct's format."""

import difflib
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxroute.errors import UserError
from jaxroute.workload.estimate import estimated_tokens
from jaxroute.workload.files import Place, json_object, member, names, number, read_lines, shown, tokens
from jaxroute.workload.frozen import predict_with_frozen_errors
from jaxroute.workload.reading import Tally, make_reading
from jaxroute.workload.table import RequestTable


def load_mixinstruct(
    path: str | Path,
    experts: Sequence[str],
    score: str = "bertscore",
    max_prompt_tokens: int | None = None,
    max_output_tokens: int | None = None,
) -> RequestTable:
    """Reads the answers of `experts` (names as in `candidates[].model`, in this order) from JSONL, one prompt per line.

    A line has `instruction`, `input` (optional) and `candidates`, each with `model`, `text` and `scores[score]` from 0
    to 1. Lengths are `prompt_tokens` and `candidates[].output_tokens`; if missing, they are estimated from the
    texts (`estimated_tokens`), rounded up, at least 1. Predictions are `candidates[].pred_output_tokens` and
    `.pred_score`; if missing, the true values with the errors of the frozen generator (`predict_with_frozen_errors`),
    drawn from a fixed seed. The flags of the table tell whether either was done, so that a command can report it.

    `max_prompt_tokens` and `max_output_tokens` limit the true and predicted lengths (in MixInstruct 256 and 256); None
    keeps them.
    """
    path, experts = Path(path), list(experts)
    if not experts:
        raise UserError(f"{path}: no experts chosen; name at least one of the models in its candidates")
    for key, cap in (("max_prompt_tokens", max_prompt_tokens), ("max_output_tokens", max_output_tokens)):
        if cap is not None and cap < 1:
            raise UserError(f"'{key}' must be at least 1, is {cap}; leave it out to keep the lengths as they are")
    prompts: list[int] = []
    rows: list[list[tuple[int, float, float, float]]] = []
    tally, estimated = Tally(), Counter[str]()
    for place, line in read_lines(path):
        record = json_object(place, line)
        prompt = _length(place, record, "prompt_tokens", ("instruction", "input"), estimated)
        candidates: dict[str, dict[str, Any]] = {}
        for candidate in member(place, record, "candidates", list):
            if not isinstance(candidate, dict):
                raise place.error("each of 'candidates' must be an object with 'model', 'text' and 'scores'")
            candidates[member(place, candidate, "model", str, " in a candidate")] = candidate
        for name in experts:
            if name not in candidates:
                raise place.error(f"no candidate of expert {shown(name)}; it has {names(_nearest(name, candidates))}")
        prompts.append(prompt)
        rows.append([_answer(place, name, candidates[name], score, estimated) for name in experts])
    if not rows:
        raise UserError(f"{path}: the file is empty; it needs one JSON object a line")

    columns = np.asarray(rows, np.float64)  # [T, N, 4]
    output, truth = np.minimum(columns[..., 0], max_output_tokens or math.inf).astype(np.int32), columns[..., 1]
    predicted_output, predicted_score = columns[..., 2], columns[..., 3]
    made_output, made_score = predict_with_frozen_errors(np.random.default_rng(0), output, truth)
    no_output, no_score = np.isnan(predicted_output), np.isnan(predicted_score)
    predicted_output = np.where(no_output, made_output, predicted_output)
    prompt = np.minimum(np.asarray(prompts), max_prompt_tokens or math.inf).astype(np.int32)
    made, tally.rows = bool(no_output.any() or no_score.any()), len(rows)
    if made:
        tally.changed.append("predictions that it lacks are the true values with the frozen generator's errors")
    if estimated["estimated"]:
        text = f"{estimated['estimated']:,} of {len(rows) * (1 + len(experts)):,} lengths estimated from the words"
        if estimated["unspaced"]:
            text += f" ({estimated['unspaced']:,} of texts without spaces, partly from characters)"
        tally.changed.append(text)
    cut = int((np.asarray(prompts) > prompt).sum() + (columns[..., 0] > output).sum())
    if cut:
        tally.changed.append(f"{cut:,} lengths cut to the maximum")
    return RequestTable(
        prompt_tokens=prompt,
        output_tokens=output,
        score=truth,
        predicted_output_tokens=np.minimum(predicted_output, max_output_tokens or math.inf).astype(np.int32),
        predicted_score=np.where(no_score, made_score, predicted_score),
        predictions_made=made,
        tokens_estimated=estimated["estimated"] > 0,
        reading=make_reading(path, "MixInstruct", tally, None, prompt, output),
    )


def _answer(
    place: Place, name: str, candidate: dict[str, Any], score: str, estimated: Counter[str]
) -> tuple[int, float, float, float]:
    """(output tokens, score, predicted output tokens, predicted score), NaN for a missing prediction."""
    inside = f" of candidate {shown(name)}"
    length = _length(place, candidate, "output_tokens", ("text",), estimated, inside)
    scores = member(place, candidate, "scores", dict, inside)
    if score not in scores:
        raise place.error(f"no score {shown(score)}{inside}; it has {names(_nearest(score, scores))}")
    predicted_output, predicted_score = math.nan, math.nan
    if "pred_output_tokens" in candidate:
        predicted_output = tokens(place, f"'pred_output_tokens'{inside}", candidate["pred_output_tokens"])
    if "pred_score" in candidate:
        predicted_score = number(place, f"'pred_score'{inside}", candidate["pred_score"])
    truth = number(place, f"'{score}'{inside}", scores[score], low=0.0, high=1.0)
    return length, truth, predicted_output, predicted_score


def _length(
    place: Place, record: dict[str, Any], key: str, texts: tuple[str, ...], tally: Counter[str], inside: str = ""
) -> int:
    """`record[key]`, or an estimate from the texts (all but the first may be absent), which is counted in `tally`."""
    if key in record:
        return tokens(place, f"'{key}'{inside}", record[key])
    present = (text for text in texts if text == texts[0] or text in record)
    counts = [estimated_tokens(member(place, record, text, str, inside)) for text in present]
    tally["estimated"] += 1
    tally["unspaced"] += any(unspaced for _, unspaced in counts)
    return max(1, math.ceil(sum(count for count, _ in counts)))


def _nearest(name: str, known: dict[str, Any]) -> list[str]:
    """The known names, most similar first."""
    return sorted(known, key=lambda other: -difflib.SequenceMatcher(None, name.lower(), other.lower()).ratio())
