"""`jaxroute predict train|apply`: predicts each expert's score and output length from a prompt's text.

DATA is a JSONL file in the format of MixInstruct (`workload.mixinstruct`). `train` holds out prompts by a hash of their
text, and reports its errors on them. `apply` writes the predictions into a copy of a JSONL file, for the environment.
"""

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxroute.commands.reading import print_readings
from jaxroute.console import print_notes, report_console
from jaxroute.errors import UserError, command
from jaxroute.files import write_text
from jaxroute.predictor.features import sentence_encoder
from jaxroute.predictor.model import Prediction, fit, holdout_split, prompt_keys
from jaxroute.predictor.report import best_expert_line, held_out_metrics, metrics_table, predictions_picture
from jaxroute.predictor.store import StoredPredictor, load_predictor, save_predictor
from jaxroute.runs.run_folder import prepare_run_folder
from jaxroute.workload import load_mixinstruct
from jaxroute.workload.files import Place, json_object, member, read_lines
from jaxroute.workload.reading import collect_readings

FEWEST_TRAINING, FEWEST_HELD_OUT = 40, 5  # different prompts


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Trains a predictor, or applies one to prompts. Returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="jaxroute predict",
        description="Predict the score and the output length of each expert's answer from the prompt's text.",
    )
    commands = parser.add_subparsers(required=True, metavar="train|apply")
    train_parser = commands.add_parser("train", help="train on recorded answers and report errors on held-out prompts")
    train_parser.add_argument("data", type=Path, metavar="DATA.jsonl", help="prompts with answers, as in MixInstruct")
    train_parser.add_argument("--experts", required=True, metavar="A,B,C", help="models in DATA's candidates")
    train_parser.add_argument("--score", default="bertscore", metavar="NAME", help="score (default: %(default)s)")
    train_parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="new folder for the model")
    train_parser.add_argument("--holdout", type=float, default=0.2, help="share held out (default: %(default)s)")
    train_parser.add_argument("--seed", type=int, default=0, help="seed of the split and the training (default: 0)")
    train_parser.add_argument(
        "--encoder", metavar="NAME", help="sentence-transformers model instead of n-grams: a folder or a package"
    )
    train_parser.set_defaults(run=train)
    apply_parser = commands.add_parser("apply", help="write pred_score and pred_output_tokens into a JSONL")
    apply_parser.add_argument("model", type=Path, metavar="MODEL", help="folder that train wrote")
    apply_parser.add_argument("data", type=Path, metavar="DATA.jsonl", help="prompts with candidates")
    apply_parser.add_argument("--out", type=Path, required=True, metavar="OUT.jsonl", help="file to write")
    apply_parser.add_argument(
        "--split",
        choices=("all", "train", "holdout"),
        default="all",
        help="prompts to write: all, the training prompts of the model, or the others (default: all)",
    )
    apply_parser.set_defaults(run=apply)
    arguments = parser.parse_args(argv)
    return arguments.run(arguments)


def train(arguments: argparse.Namespace) -> int:
    """Trains, prints the held-out metrics, and writes the model, metrics.json and predictions.png to a new folder."""
    data: Path = arguments.data
    experts = [expert.strip() for expert in arguments.experts.split(",") if expert.strip()]
    twice = {expert for expert in experts if experts.count(expert) > 1}
    if twice:
        raise UserError(f"--experts: {', '.join(sorted(twice))} named twice; name each once")
    if not 0 < arguments.holdout < 1:
        raise UserError(f"--holdout {arguments.holdout}: must lie between 0 and 1, for example 0.2")
    with collect_readings() as readings:
        table = load_mixinstruct(data, experts, arguments.score)
    texts = [prompt_text(place, json_object(place, line)) for place, line in read_lines(data)]
    held_out = holdout_split(texts, arguments.holdout, arguments.seed)
    sizes = [len(np.unique(prompt_keys(_where(texts, part)))) for part in (~held_out, held_out)]
    if sizes[0] < FEWEST_TRAINING or sizes[1] < FEWEST_HELD_OUT:
        raise UserError(
            f"{data}: {sizes[0]} different prompts to train on and {sizes[1]} held out; at least {FEWEST_TRAINING} "
            f"and {FEWEST_HELD_OUT} are needed; give more prompts or another --holdout"
        )
    encoder = sentence_encoder(arguments.encoder) if arguments.encoder else None
    prepare_run_folder(arguments.out)

    console = report_console()
    print_readings(readings)
    known, truth = ((table.score[rows], table.output_tokens[rows]) for rows in (~held_out, held_out))
    predictor = fit(_where(texts, ~held_out), *known, arguments.seed, encoder)
    prediction = predictor(_where(texts, held_out), encoder)
    metrics = held_out_metrics(predictor, prediction, truth, known)

    out: Path = arguments.out
    prompts = {"training": int((~held_out).sum()), "held_out": int(held_out.sum())}
    about = {
        "data": str(data),
        "read": readings[0].facts(),
        "experts": experts,
        "score": arguments.score,
        "seed": arguments.seed,
        "prompts": prompts,
    }
    try:
        write_text(out / "metrics.json", json.dumps(about | metrics, indent=2) + "\n")
        predictions_picture(out / "predictions.png", experts, prediction, *truth)
        stored = StoredPredictor(
            predictor, experts, arguments.score, arguments.seed, arguments.holdout, arguments.encoder
        )
        save_predictor(out, stored)
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written ({error.strerror})") from None
    console.print(metrics_table(metrics, experts, prompts["held_out"]))
    best = int(known[0].mean(axis=0).argmax())
    console.print(best_expert_line(metrics, experts, best), highlight=False, markup=False)
    console.print(f"trained on {prompts['training']} prompts; model, metrics and picture in {out}", highlight=False)
    return 0


def apply(arguments: argparse.Namespace) -> int:
    """Writes the lines of DATA with the predictions that their candidates lack."""
    stored = load_predictor(arguments.model)
    data, out = arguments.data, arguments.out
    if out.is_dir() or not out.parent.is_dir() or not os.access(out.parent, os.W_OK):
        raise UserError(f"--out {out}: cannot be written; name a file in a folder that exists and is writable")
    if out.exists() and data.exists() and out.samefile(data):
        raise UserError(f"--out {out}: is DATA itself; name another file")
    lines = [(place, line, json_object(place, line)) for place, line in read_lines(data)]
    if not lines:
        raise UserError(f"{data}: the file is empty; it needs one JSON object a line")
    candidates = [_candidates(place, record, stored.experts) for place, _, record in lines]
    found = {name for row in candidates for name in row}
    missing = [name for name in stored.experts if name not in found]
    if missing:
        raise UserError(f"{data}: no candidate of expert {', '.join(missing)}; train on the models in this file")
    texts = [prompt_text(place, record) for place, _, record in lines]
    seen = np.isin(prompt_keys(texts), stored.predictor.trained_on)
    wanted = {"all": np.full(len(lines), True), "train": seen, "holdout": ~seen}[arguments.split]
    if not wanted.any():
        what = "was trained on" if arguments.split == "train" else "was not trained on"
        raise UserError(f"{data}: has no prompt that the model {what}; leave out --split {arguments.split}")
    encoder = sentence_encoder(stored.encoder) if stored.encoder else None
    prediction = stored.predictor(_where(texts, wanted), encoder)

    written, kept = [], 0
    for row, index in enumerate(np.flatnonzero(wanted)):
        _, line, record = lines[index]
        for name, candidate in candidates[index].items():
            kept += _complete(candidate, prediction, row, stored.experts.index(name))
        # Unchanged: escaped characters may have no UTF-8 encoding.
        written.append(json.dumps(record, ensure_ascii="\\u" in line) + "\n")
    try:
        write_text(out, "".join(written))
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written ({error.strerror})") from None
    notes = []
    if kept:
        notes.append(f"{data}: {kept} predictions that the file already had are kept")
    if seen[wanted].any():
        notes.append(f"{seen[wanted].sum()} are training prompts; each is predicted by a network not fitted to it")
    console = report_console()
    print_notes(console, notes)
    console.print(f"{len(written)} of {len(lines)} prompts -> {out}", highlight=False, markup=False)
    return 0


def prompt_text(place: Place, record: dict[str, Any]) -> str:
    """The text that a predictor reads: the instruction, and the input if there is one."""
    instruction = member(place, record, "instruction", str)
    inputs = member(place, record, "input", str) if "input" in record else ""
    return f"{instruction}\n\n{inputs}" if inputs.strip() else instruction


def _candidates(place: Place, record: dict[str, Any], experts: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The candidates of the line that are in `experts`, by name."""
    found = {}
    for candidate in member(place, record, "candidates", list):
        if not isinstance(candidate, dict):
            raise place.error("each of 'candidates' must be an object with 'model', 'text' and 'scores'")
        name = member(place, candidate, "model", str, " in a candidate")
        if name in experts:
            found[name] = candidate
    return found


def _complete(candidate: dict[str, Any], prediction: Prediction, row: int, expert: int) -> int:
    """Adds the predictions that `candidate` lacks; returns the number that it already had."""
    predicted = {
        "pred_score": round(float(prediction.score[row, expert]), 6),
        "pred_output_tokens": int(prediction.output_tokens[row, expert]),
    }
    had = len(predicted.keys() & candidate.keys())
    candidate.update({key: value for key, value in predicted.items() if key not in candidate})
    return had


def _where(texts: Sequence[str], chosen: np.ndarray) -> list[str]:
    return [text for text, wanted in zip(texts, chosen, strict=True) if wanted]
