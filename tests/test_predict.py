"""Predictors from text: features, buckets, training on a relation that can be learned, the command, bad input."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

from jaxroute.commands import predict
from jaxroute.errors import UserError
from jaxroute.predictor.features import FeatureMap, hashed_ngrams, sentence_encoder, surface
from jaxroute.predictor.model import BUCKETS, Buckets, Prediction, holdout_split, prompt_keys
from jaxroute.predictor.report import _spearman, predictions_picture
from jaxroute.predictor.store import load_predictor
from jaxroute.workload import load_mixinstruct

REAL = Path(__file__).resolve().parents[1].parent / "shared" / "data" / "alpacaeval_mix_train.jsonl"
EXPERTS = ["short-model", "long-model"]
NOUNS = "river stone window garden engine letter market winter bridge candle forest planet teacher island".split()


def records(count: int = 240) -> list[dict[str, Any]]:
    """Stories are long, facts short; the first model is better at facts. Nouns and noise tell nothing."""
    rng = np.random.default_rng(0)
    lines = []
    for index in range(count):
        story = index % 2
        about = " and a ".join(rng.choice(NOUNS, 3, replace=False))
        ask = "Write a long story about a" if story else "Who made the first"
        candidates = [
            {
                "model": model,
                "text": "",
                "output_tokens": int(np.exp(rng.normal((3.0, 5.5)[story] + 0.3 * place, 0.3))) + 1,
                "scores": {"bertscore": float(np.clip(rng.normal(0.8 if place == story else 0.5, 0.05), 0, 1))},
            }
            for place, model in enumerate(EXPERTS)
        ]
        lines.append(
            {"id": index, "instruction": f"{ask} {about}", "input": "é" * (index % 3), "candidates": candidates}
        )
    return lines


def written(path: Path, lines: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    return path


def failure(capsys: pytest.CaptureFixture[str], *arguments: Any) -> str:
    capsys.readouterr()
    assert predict.main([str(argument) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    return error


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("predict")
    data = written(folder / "data.jsonl", records())
    out = folder / "model"
    assert predict.main(["train", str(data), "--experts", ",".join(EXPERTS), "--out", str(out), "--seed", "3"]) == 0
    return data, out


def test_hashed_features_are_the_same_in_every_process():
    texts = ["Name 3 seas, please?", "写一个故事", "", "\ud800 lone"]
    program = (
        "from jaxroute.predictor.features import hashed_ngrams, surface\n"
        f"texts = {ascii(texts)}\n"
        "print(float(hashed_ngrams(texts).sum()), sorted(hashed_ngrams(texts).indices), float(surface(texts).sum()))"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "1"}
    other = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    ngrams = hashed_ngrams(texts)
    assert other.stdout == f"{float(ngrams.sum())} {sorted(ngrams.indices)} {float(surface(texts).sum())}\n"
    assert int(prompt_keys(["Name three seas."])[0]) == 2875613026204725081


def test_features_have_the_scale_they_promise():
    texts = [record["instruction"] for record in records(60)]
    features = FeatureMap.fit(texts)
    numbers = features(texts)
    components = numbers[:, : features.components.shape[1]]
    assert numbers.dtype == np.float32 and np.isfinite(numbers).all()
    assert np.square(components).mean() == pytest.approx(0.25, rel=1e-3)
    assert np.isfinite(features(["", "?", "unknown words only"])).all()


def test_buckets_on_values_that_can_be_checked_by_hand():
    values = np.arange(101, dtype=float)[:, None]
    buckets = Buckets.fit(values)
    np.testing.assert_allclose(buckets.bounds[0], np.arange(0, 101, 10))
    assert buckets.labels(np.array([[-5.0], [0], [9.9], [10], [100], [500]]))[:, 0].tolist() == [0, 0, 0, 1, 9, 9]
    uniform = np.full((1, 1, BUCKETS), 1 / BUCKETS)
    one = np.eye(BUCKETS)[3][None, None]
    assert buckets.median(uniform)[0, 0] == pytest.approx(50) and buckets.median(one)[0, 0] == pytest.approx(35)
    assert buckets.expectation(one)[0, 0] == pytest.approx(34.5)
    constant = Buckets.fit(np.full((50, 1), 0.7))
    assert constant.median(one)[0, 0] == pytest.approx(0.7) and constant.expectation(uniform)[0, 0] == pytest.approx(
        0.7
    )


def test_rank_correlation_of_a_textbook_sample():
    # Ranks 1 2 3 4 5 against 2 1 4 3 5: 1 - 6 * 4 / (5 * 24).
    assert _spearman(np.arange(5.0), np.array([2.0, 1, 4, 3, 9])) == pytest.approx(0.8)
    assert _spearman(np.arange(5.0), np.ones(5)) is None


def test_split_follows_the_text_alone():
    texts = [f"prompt {index}" for index in range(4000)]
    held_out = holdout_split(texts, 0.2, 0)
    assert held_out.mean() == pytest.approx(0.2, abs=0.02)
    np.testing.assert_array_equal(holdout_split(texts[::-1], 0.2, 0), held_out[::-1])
    # Another seed is another split, not a shifted one: both hold out a fifth of each other's fifth.
    assert (held_out & holdout_split(texts, 0.2, 1)).mean() == pytest.approx(0.04, abs=0.01)


def test_what_can_be_learned_is_learned(trained: tuple[Path, Path]):
    metrics = json.loads((trained[1] / "metrics.json").read_text())
    for target, share in (("score", 0.5), ("log_tokens", 0.5), ("tokens", 0.6)):
        assert metrics[target]["mae"][-1] < share * metrics[target]["mae_of_mean"][-1]
        assert len(metrics[target]["mae"]) == len(EXPERTS) + 1
        assert metrics[target]["rank_correlation"][-1] > 0.6
    assert metrics["score"]["bucket_accuracy"][-1] > 1.5 * metrics["score"]["bucket_accuracy_of_constant"][-1]
    assert metrics["best_expert"]["share_named"] > 0.95 > 0.7 > metrics["best_expert"]["share_of_best_on_average"]
    assert (trained[1] / "predictions.png").stat().st_size > 0
    assert metrics["prompts"]["training"] + metrics["prompts"]["held_out"] == 240


def test_picture_shows_truth_against_prediction_for_each_expert(tmp_path: Path, figures: dict[str, Figure]):
    rng = np.random.default_rng(0)
    score, tokens = rng.random((50, 2)), rng.integers(1, 500, (50, 2))
    predicted, probability = rng.random((50, 2)), np.zeros((50, 2, BUCKETS))
    prediction = Prediction(predicted, np.log(tokens + 7), probability, probability)
    predictions_picture(tmp_path / "p.png", EXPERTS, prediction, score, tokens)
    figure = figures["p.png"]
    assert [axes.get_title(loc="left") for axes in figure.axes] == EXPERTS * 2
    assert [axes.get_xscale() for axes in figure.axes] == [axes.get_yscale() for axes in figure.axes]
    assert [axes.get_xscale() for axes in figure.axes] == ["linear", "linear", "log", "log"]
    labels = [(axes.get_xlabel(), axes.get_ylabel()) for axes in figure.axes]
    assert labels == [
        ("predicted score", "true score"),
        ("predicted score", ""),
        ("predicted output tokens", "true output tokens"),
        ("predicted output tokens", ""),
    ]
    pairs = [(predicted, score)] * 2 + [(tokens + 7, tokens)] * 2
    for index, (axes, (x, y)) in enumerate(zip(figure.axes, pairs, strict=True)):
        x, y = x[:, index % 2], y[:, index % 2]
        np.testing.assert_allclose(axes.collections[0].get_offsets(), np.stack([x, y], axis=1))
        medians, diagonal = axes.lines
        order = np.argsort(x, kind="stable").reshape(5, 10)
        np.testing.assert_allclose(
            medians.get_xydata(), np.stack([np.median(v[order], axis=1) for v in (x, y)], axis=1)
        )
        np.testing.assert_allclose(diagonal.get_xydata(), [[x.min()] * 2, [x.max()] * 2])
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend == ["50 held-out prompts", "median, 5 equal shares", "true = predicted"]


def test_apply_writes_what_the_environment_reads(trained: tuple[Path, Path], capsys: pytest.CaptureFixture[str]):
    data, model = trained
    out = data.with_name("out.jsonl")
    before = load_mixinstruct(data, EXPERTS)
    assert predict.main(["apply", str(model), str(data), "--out", str(out)]) == 0
    after = load_mixinstruct(out, EXPERTS)
    assert before.predictions_made and not after.predictions_made
    np.testing.assert_array_equal(after.score, before.score)
    assert np.abs(np.log(after.predicted_output_tokens / after.output_tokens)).mean() < 0.4
    lines = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    for line in lines:
        for candidate in line["candidates"]:
            del candidate["pred_score"], candidate["pred_output_tokens"]
    assert lines == records()
    # A training prompt is predicted by a network that was not fitted to it.
    assert "predicted by a network not fitted to it" in " ".join(capsys.readouterr().out.split())


def test_split_of_apply_is_that_of_training_in_any_order(trained: tuple[Path, Path]):
    data, model = trained
    lines = records()[::-1]
    shuffled = written(data.with_name("shuffled.jsonl"), lines)
    prompts: dict[str, list[int]] = {}
    for split in ("train", "holdout"):
        out = data.with_name(f"{split}.jsonl")
        assert predict.main(["apply", str(model), str(shuffled), "--out", str(out), "--split", split]) == 0
        prompts[split] = [json.loads(line)["id"] for line in out.read_text(encoding="utf-8").splitlines()]
    texts = [predict.prompt_text(None, line) for line in lines]  # type: ignore
    held_out = holdout_split(texts, 0.2, 3)
    assert prompts["holdout"] == [line["id"] for line, held in zip(lines, held_out, strict=True) if held]
    assert sorted(prompts["train"] + prompts["holdout"]) == list(range(240))


def test_predictions_that_a_file_has_are_kept(trained: tuple[Path, Path], capsys: pytest.CaptureFixture[str]):
    data, model = trained
    lines = records(3)
    lines[0]["candidates"][0]["pred_score"] = 0.123
    lines[1]["note"] = "\ud800"  # no UTF-8 can hold it unescaped
    given = data.with_name("given.jsonl")
    given.write_text("".join(json.dumps(line) + "\n" for line in lines))
    out = data.with_name("kept.jsonl")
    assert predict.main(["apply", str(model), str(given), "--out", str(out)]) == 0
    assert "note: " in (printed := capsys.readouterr().out) and "1 predictions that the file already had" in printed
    kept = [json.loads(line) for line in out.read_text().splitlines()]
    assert kept[0]["candidates"][0]["pred_score"] == 0.123 and "pred_output_tokens" in kept[0]["candidates"][0]
    assert kept[1]["note"] == "\ud800"


def test_bad_input_of_train(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    data, out = written(tmp_path / "data.jsonl", records(30)), tmp_path / "out"

    def train(path: Path = data, experts: str = "long-model", *more: Any) -> str:
        return failure(capsys, "train", path, "--experts", experts, "--out", out, *more)

    assert "no such file" in train(tmp_path / "absent.jsonl")
    assert "no candidate of expert 'longmodel'; it has 'long-model'" in train(data, "longmodel")
    assert "no score 'bertscores' of candidate 'long-model'" in train(data, "long-model", "--score", "bertscores")
    assert "named twice" in train(data, "long-model,long-model")
    assert "--holdout 1.5: must lie between 0 and 1" in train(data, "long-model", "--holdout", 1.5)
    assert "different prompts to train on" in train()
    (tmp_path / "cut.jsonl").write_bytes(data.read_bytes()[:-30])
    assert "line 30: not JSON" in train(tmp_path / "cut.jsonl")
    assert not out.exists()
    out.mkdir()
    (out / "file").touch()
    many = written(tmp_path / "many.jsonl", records(100))
    assert "is not empty" in train(many)


def test_bad_input_of_apply(trained: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    data, model = trained
    out = tmp_path / "out.jsonl"
    assert "model.json: No such file" in failure(capsys, "apply", tmp_path, data, "--out", out)
    assert "cannot be written" in failure(capsys, "apply", model, data, "--out", tmp_path / "no" / "out.jsonl")
    assert "is DATA itself" in failure(capsys, "apply", model, data, "--out", data)
    others = records(3)
    others[0]["candidates"] = others[1]["candidates"] = others[2]["candidates"] = others[0]["candidates"][:1]
    other = written(tmp_path / "other.jsonl", others)
    assert "no candidate of expert long-model" in failure(capsys, "apply", model, other, "--out", out)
    new = written(tmp_path / "new.jsonl", [{**records(1)[0], "instruction": "never seen"}])
    assert "has no prompt" in failure(capsys, "apply", model, new, "--out", out, "--split", "train")
    (tmp_path / "empty.jsonl").touch()
    assert "file is empty" in failure(capsys, "apply", model, tmp_path / "empty.jsonl", "--out", out)
    assert not out.exists()


def test_without_scikit_learn_it_says_what_to_install(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    data = written(tmp_path / "data.jsonl", records(100))
    monkeypatch.setitem(sys.modules, "sklearn.feature_extraction.text", None)
    error = failure(capsys, "train", data, "--experts", ",".join(EXPERTS), "--out", tmp_path / "out")
    assert "needs scikit-learn, which is not installed; run pip install 'jaxroute[predict]'" in error


def test_cut_and_foreign_models(trained: tuple[Path, Path], tmp_path: Path):
    about, arrays = ((trained[1] / name).read_bytes() for name in ("model.json", "model.npz"))

    def stored(json_file: bytes, npz: bytes) -> Path:
        (tmp_path / "model.json").write_bytes(json_file)
        (tmp_path / "model.npz").write_bytes(npz)
        return tmp_path

    assert load_predictor(stored(about, arrays)).experts == EXPERTS
    for json_file, npz, message in [
        (about, arrays[:-100], "cut short or altered"),
        (about, b"", "cut short or altered"),
        (about[:-9], arrays, "not JSON"),
        (b"[]", arrays, "not a predictor of this version"),
        (about.replace(b'"score": "bertscore",', b""), arrays, "do not fit together"),
        (about.replace(b'"long-model"', b'"long-model", "another"'), arrays, "do not fit together"),
    ]:
        with pytest.raises(UserError, match=message):
            load_predictor(stored(json_file, npz))


def test_encoder_is_loaded_from_where_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(UserError, match=r"sentence-transformers, which is not installed; install jaxroute\[text\]"):
        sentence_encoder("some/model")

    class SentenceTransformer:
        def __init__(self, name: str, local_files_only: bool):
            assert local_files_only
            if not Path(name).is_dir():
                raise OSError(f"cannot find {name}\nand a page of advice")

        def encode(self, texts: list[str], show_progress_bar: bool) -> np.ndarray:
            return surface(texts)[:, :8]

    fake = types.ModuleType("sentence_transformers")
    fake.SentenceTransformer = SentenceTransformer  # type: ignore
    monkeypatch.setitem(sys.modules, "sentence_transformers", fake)
    with pytest.raises(UserError, match=r"no sentence-transformers model there \(cannot find some/model\); give its"):
        sentence_encoder("some/model")
    package = tmp_path / "a_model_in_a_package"
    (package / "inside").mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "inside" / "modules.json").write_text("[]")
    monkeypatch.syspath_prepend(tmp_path)
    texts = [record["instruction"] for record in records(30)]
    for name in (str(tmp_path), package.name):
        encoder = sentence_encoder(name)
        features = FeatureMap.fit(texts, encoder)
        assert len(features.components) == 8  # the width of what the fake encodes
        assert np.isfinite(features(texts, encoder)).all()


def test_real_answers_are_predicted_better_than_by_the_mean(tmp_path: Path):
    if not REAL.is_file():
        pytest.skip(f"{REAL} is not here: the data sets lie beside the project, not in it")
    out = tmp_path / "model"
    command = [sys.executable, "-m", "jaxroute.predict", "train", str(REAL), "--out", str(out)]
    # The C library fills new memory with a pattern, which shows results that depend on unset memory.
    environment = {**os.environ, "MALLOC_PERTURB_": "128"}
    subprocess.run([*command, "--experts", "alpaca-7b,chatglm2-6b,vicuna-7b"], env=environment, check=True)
    metrics = json.loads((out / "metrics.json").read_text())
    for target in ("score", "log_tokens"):
        for mae, of_mean in zip(metrics[target]["mae"], metrics[target]["mae_of_mean"], strict=True):
            assert mae < of_mean
        assert metrics[target]["mae"][-1] < metrics[target]["mae_of_median"][-1]
