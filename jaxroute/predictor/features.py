"""From a prompt's text to the numbers a predictor reads, the same on every machine and in every run of Python."""

from __future__ import annotations

import importlib
import importlib.util
import re
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.linalg import eigh
from scipy.sparse import csr_array

from jaxroute.errors import UserError

HASH_COLUMNS = 4096
COMPONENTS = 64  # of the n-grams or of the encoder's vectors; with some hundred prompts more do not measure better
TASK_WORDS = (
    "answer article best brainstorm calculate classify code compare convert correct create describe design detailed "
    "difference edit email essay example examples explain extract find fix following format function generate give "
    "help how ideas identify input is letter list lyrics make name number one output paragraph plan poem provide "
    "python question recipe review rewrite sentence short single song step steps story suggest summarize summary "
    "table text tips title topic translate two ways what when where which who why word write"
).split()
"""Words that tell what kind of answer is asked for."""

_WORDS = re.compile(r"[^\W_]+(?:['’][^\W_]+)?")
_TOKENS = re.compile(_WORDS.pattern + r"|[^\w\s]")

Encoder = Callable[[Sequence[str]], np.ndarray]
"""Texts [P] -> float32 [P, E]."""


def surface(texts: Sequence[str]) -> np.ndarray:
    """float32 [P, F]: lengths, lines, punctuation, kinds of characters, and which of `TASK_WORDS` there are."""
    return np.array([_surface(text) for text in texts], np.float32)


def _surface(text: str) -> list[float]:
    words = _WORDS.findall(text.lower())
    lines = [line.split() for line in text.splitlines() if line.strip()] or [[]]
    digits = sum(character.isdigit() for character in text)
    size = max(len(text), 1)
    counts = [len(words), len(text), len(lines), len(lines[0]), len(lines[-1]), digits, *map(text.count, '?",:')]
    present = set(words)
    return [
        *np.log1p(counts),
        *(float(text.rstrip().endswith(mark)) for mark in "?.:"),
        float("\n\n" in text),  # an instruction and something that it is about
        float(text[:1].islower()),
        digits / size,
        sum(character.isupper() for character in text) / size,
        sum(not character.isascii() for character in text) / size,
        sum(character in "{}()[]<>=;_/\\|#*" for character in text) / size,
        sum(map(len, words)) / max(len(words), 1),
        len(present) / max(len(words), 1),
        *(float(word in present) for word in TASK_WORDS),
    ]


def hashed_ngrams(texts: Sequence[str]) -> csr_array:
    """float32 [P, HASH_COLUMNS], log(1 + count): words, pairs, the first one to three, runs of 3 to 5 characters.

    The column is the CRC-32 of the n-gram's UTF-8 form; Python's own `hash` differs from run to run.
    """
    columns: list[int] = []
    counts: list[int] = []
    starts = [0]
    for text in texts:
        found = Counter(zlib.crc32(gram.encode("utf-8", "surrogatepass")) % HASH_COLUMNS for gram in _ngrams(text))
        columns += found.keys()
        counts += found.values()
        starts.append(len(columns))
    return csr_array((np.log1p(np.array(counts, np.float32)), columns, starts), (len(texts), HASH_COLUMNS))


def _ngrams(text: str) -> list[str]:
    tokens = _TOKENS.findall(text.lower())
    line = f" {' '.join(tokens)} "
    return [
        *tokens,
        *map(" ".join, zip(tokens, tokens[1:], strict=False)),
        *("^" + " ".join(tokens[:size]) for size in (1, 2, 3)),
        *("#" + line[start : start + size] for size in (3, 4, 5) for start in range(len(line) - size + 1)),
    ]


def sentence_encoder(name: str) -> Encoder:
    """The sentence-transformers model at the folder `name`, in the installed package, or in the local cache.

    Nothing is downloaded. Raises `UserError` where the package or the model is missing.
    """
    try:
        sentence_transformers = importlib.import_module("sentence_transformers")
    except ImportError:
        raise UserError(
            f"--encoder {name}: needs the package sentence-transformers, which is not installed; install jaxroute[text]"
        ) from None
    try:
        model = sentence_transformers.SentenceTransformer(_model_folder(name), local_files_only=True)
    except Exception as error:  # whatever the library raises for a folder that holds no model
        reason = str(error).strip().partition("\n")[0]
        raise UserError(
            f"--encoder {name}: no sentence-transformers model there ({reason}); give its folder, an installed package "
            "that holds one, or a name in the local cache"
        ) from None

    def encode(texts: Sequence[str]) -> np.ndarray:
        return np.asarray(model.encode(list(texts), show_progress_bar=False), np.float32)

    return encode


def _model_folder(name: str) -> str:
    """`name` itself, or the folder of a model that an installed package of that name carries."""
    spec = importlib.util.find_spec(name) if name.isidentifier() and not Path(name).exists() else None
    for location in (spec and spec.submodule_search_locations) or ():
        for file in sorted(Path(location).rglob("modules.json")):
            return str(file.parent)
    return name


@dataclass(frozen=True)
class FeatureMap:
    """What turns text into features, fitted on the training prompts' text alone. Arrays are float32."""

    surface_mean: np.ndarray  # [F]
    surface_std: np.ndarray  # [F]
    weights: np.ndarray  # [D], of the columns before the projection: inverse document frequencies, or ones
    components: np.ndarray  # [D, K], right singular vectors, scaled so that the components' mean square is 1/4

    @classmethod
    def fit(cls, texts: Sequence[str], encoder: Encoder | None = None) -> FeatureMap:
        """From P texts, not all alike. D is `HASH_COLUMNS`, or the encoder's."""
        plain = surface(texts)
        vectors: Any = csr_array(encoder(texts)) if encoder else hashed_ngrams(texts)
        columns = np.ones(vectors.shape[-1], np.float32)
        if not encoder:
            present = np.bincount(vectors.indices, minlength=len(columns))  # texts that have the column
            columns = np.log((1 + len(texts)) / (1 + present)).astype(np.float32)
        values, right = _right_singular_vectors(_unit_rows(vectors, columns), COMPONENTS)
        scale = 0.5 * np.sqrt(len(texts) / np.mean(values**2))
        return cls(plain.mean(0), plain.std(0) + 1e-6, columns, (scale * right).astype(np.float32))

    def __call__(self, texts: Sequence[str], encoder: Encoder | None = None) -> np.ndarray:
        """float32 [P, K + F]. `encoder` is the one that the map was fitted with."""
        vectors = _unit_rows(csr_array(encoder(texts)) if encoder else hashed_ngrams(texts), self.weights)
        plain = np.clip((surface(texts) - self.surface_mean) / self.surface_std, -4, 4)
        return np.concatenate([vectors @ self.components, 0.5 * plain], axis=1).astype(np.float32)


def _unit_rows(vectors: csr_array, weights: np.ndarray) -> csr_array:
    """Rows times `weights`, of length 1 (or 0)."""
    weighted = vectors * weights[None]
    lengths = np.sqrt((weighted * weighted).sum(axis=1))
    return csr_array(weighted * (1 / np.maximum(lengths, 1e-9))[:, None])


def _right_singular_vectors(matrix: Any, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Singular values [K], the largest at most `count`, and vectors [D, K] of a `csr_array` [P, D], of rank 1 or more.

    By the eigenvalues of the smaller Gram matrix, which are exact whatever the rank; an iterative solver fails there.
    """
    wide = matrix.shape[0] <= matrix.shape[1]
    gram = (matrix @ matrix.T if wide else matrix.T @ matrix).toarray().astype(np.float64)
    squares, vectors = eigh(gram, subset_by_index=(max(len(gram) - count, 0), len(gram) - 1))
    known = squares > 1e-9 * squares[-1]
    values, vectors = np.sqrt(squares[known]), vectors[:, known]
    return values, matrix.T @ vectors / values if wide else vectors
