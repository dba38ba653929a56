"""Stores a trained predictor in a folder: arrays in `model.npz`, all else in `model.json`, which is written last."""

import hashlib
import io
import json
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from jaxroute.errors import UserError
from jaxroute.files import whole_file, write_text
from jaxroute.predictor.features import FeatureMap
from jaxroute.predictor.model import BucketClassifier, Buckets, Predictor

FORMAT = "jaxroute predictor 2"


@dataclass(frozen=True)
class StoredPredictor:
    """A predictor and the arguments of its training."""

    predictor: Predictor
    experts: list[str]
    score: str  # name of the score in the data
    seed: int
    holdout: float
    encoder: str | None  # --encoder


def save_predictor(folder: Path, stored: StoredPredictor) -> None:
    """Writes model.npz and model.json, which holds the checksum of the former."""
    predictor = stored.predictor
    maps = {name: vars(getattr(predictor, name)) for name in ("features", "score", "log_tokens")}
    arrays: Any = flatten_dict({**vars(predictor), **maps}, sep="/")
    with whole_file(folder / "model.npz") as temporary, temporary.open("wb") as file:
        np.savez(file, allow_pickle=False, **arrays)
    digest = hashlib.sha256((folder / "model.npz").read_bytes()).hexdigest()
    about = {"format": FORMAT, **vars(stored), "sha256": digest}
    del about["predictor"]
    write_text(folder / "model.json", json.dumps(about, indent=2) + "\n")


def load_predictor(folder: Path) -> StoredPredictor:
    """Reads a predictor. It reads only arrays and JSON, and executes no code from them.

    Raises:
        UserError: there is no model, it is damaged, or it is of another version.
    """
    try:
        about = json.loads((folder / "model.json").read_text(encoding="utf-8"))
        data = (folder / "model.npz").read_bytes()
    except OSError as error:
        name = Path(error.filename or folder).name
        raise UserError(
            f"{folder}: {name}: {error.strerror}; give a folder that jaxroute predict train has finished"
        ) from None
    except ValueError:  # JSON and UTF-8
        raise UserError(f"{folder / 'model.json'}: not JSON; copy the folder again or train anew") from None
    if not isinstance(about, dict) or about.pop("format", None) != FORMAT:
        raise UserError(f"{folder / 'model.json'}: not a predictor of this version; train anew")
    if about.pop("sha256", None) != hashlib.sha256(data).hexdigest():
        raise UserError(f"{folder / 'model.npz'}: cut short or altered; copy the folder again or train anew")
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as file:
            parts: dict[str, Any] = unflatten_dict(dict(file), sep="/")
        for name, kind in {"features": FeatureMap, "score": Buckets, "log_tokens": Buckets}.items():
            parts[name] = kind(**parts[name])
        stored = StoredPredictor(Predictor(**parts), **about)
        _check(stored)
    except (AttributeError, KeyError, TypeError, ValueError, zipfile.BadZipFile):
        raise UserError(f"{folder}: model.json and model.npz do not fit together; train anew") from None
    return stored


def _check(stored: StoredPredictor) -> None:
    """Raises `ValueError` if the shapes of the network do not fit the experts and the features."""
    predictor = stored.predictor
    inputs = predictor.features.components.shape[1] + len(predictor.features.surface_mean)
    network = BucketClassifier(len(stored.experts))
    wanted = jax.eval_shape(network.init, jax.random.key(0), jax.ShapeDtypeStruct((1, inputs), np.float32))
    shapes = jax.tree.map(lambda leaf: leaf.shape, wanted)
    if jax.tree.map(lambda leaf: leaf.shape[2:], predictor.params) != shapes:
        raise ValueError("another network")
