"""Features of a prompt's text for a predictor, which are the same on every machine and in every run of Python."""

from __future__ import annotations

import importlib
import importlib.util
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from jaxroute.errors import UserError

HASH_COLUMNS = 4096  # columns of each kind of n-grams
COMPONENTS = 64  # of the n-grams or the encoder's vectors; with some hundred prompts, more do not help
TASK_WORDS = (
    "answer article best brainstorm calculate classify code compare convert correct create describe design detailed "
    "difference edit email essay example examples explain extract find fix following format function generate give "
    "help how ideas identify input is letter list lyrics make name number one output paragraph plan poem provide "
    "python question recipe review rewrite sentence short single song step steps story suggest summarize summary "
    "table text tips title topic translate two ways what when where which who why word write"
).split()
"""Words that indicate the kind of answer."""

_WORDS = re.compile(r"[^\W_]+(?:['’][^\W_]+)?")
_TOKENS = _WORDS.pattern + r"|[^\w\s]"

Encoder = Callable[[Sequence[str]], np.ndarray]
"""Texts [P] -> float32 [P, E]."""


def surface(texts: Sequence[str]) -> np.ndarray:
    """float32 [P, F]: lengths, lines, punctuation, kinds of characters, and occurrence of the `TASK_WORDS`."""
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
        float("\n\n" in text),  # an instruction with an input
        float(text[:1].islower()),
        digits / size,
        sum(character.isupper() for character in text) / size,
        sum(not character.isascii() for character in text) / size,
        sum(character in "{}()[]<>=;_/\\|#*" for character in text) / size,
        sum(map(len, words)) / max(len(words), 1),
        len(present) / max(len(words), 1),
        *(float(word in present) for word in TASK_WORDS),
    ]


def hashed_ngrams(texts: Sequence[str]) -> Any:
    """Sparse float32 [P, 2 * HASH_COLUMNS], log(1 + count): words and pairs, runs of 3 to 5 characters within words.

    scikit-learn hashes an n-gram to the same column on every machine. Raises `UserError` without scikit-learn.
    """
    vectorizer = partial(
        _sklearn("feature_extraction.text").HashingVectorizer,
        n_features=HASH_COLUMNS,
        alternate_sign=False,
        norm=None,
        dtype=np.float32,
    )
    words = vectorizer(token_pattern=_TOKENS, ngram_range=(1, 2))
    characters = vectorizer(analyzer="char_wb", ngram_range=(3, 5))
    encoded = [text.encode("utf-8", "replace") for text in texts]
    return _sklearn("pipeline").make_union(words, characters).transform(encoded).log1p()


def _sklearn(module: str) -> Any:
    try:
        return importlib.import_module(f"sklearn.{module}")
    except ImportError:
        raise UserError(
            "jaxroute predict needs scikit-learn, which is not installed; run pip install 'jaxroute[predict]'"
        ) from None


def sentence_encoder(name: str) -> Encoder:
    """The sentence-transformers model at the folder `name`, in the installed package, or in the local cache.

    Nothing is downloaded. Raises `UserError` if the package or the model is missing.
    """
    try:
        sentence_transformers = importlib.import_module("sentence_transformers")
    except ImportError:
        raise UserError(
            f"--encoder {name}: needs the package sentence-transformers, which is not installed; install jaxroute[text]"
        ) from None
    try:
        model = sentence_transformers.SentenceTransformer(_model_folder(name), local_files_only=True)
    except Exception as error:  # the library raises various exceptions for a folder without a model
        reason = str(error).strip().partition("\n")[0]
        raise UserError(
            f"--encoder {name}: no sentence-transformers model there ({reason}); give its folder, an installed package "
            "that holds one, or a name in the local cache"
        ) from None

    def encode(texts: Sequence[str]) -> np.ndarray:
        return np.asarray(model.encode(list(texts), show_progress_bar=False), np.float32)

    return encode


def _model_folder(name: str) -> str:
    """`name`, or the folder of the model in an installed package of that name."""
    spec = importlib.util.find_spec(name) if name.isidentifier() and not Path(name).exists() else None
    for location in (spec and spec.submodule_search_locations) or ():
        for file in sorted(Path(location).rglob("modules.json")):
            return str(file.parent)
    return name


@dataclass(frozen=True)
class FeatureMap:
    """Maps text to features; it is fitted only on the text of the training prompts. Arrays are float32.

    The n-grams of a prompt weighted by TF-IDF, or the encoder's vector, are scaled to length 1 and projected.
    """

    surface_mean: np.ndarray  # [F]
    surface_std: np.ndarray  # [F]
    document_frequencies: np.ndarray  # [D], inverse document frequencies of the n-grams; [0] with an encoder
    components: np.ndarray  # [D, K], right singular vectors, scaled so that the components' mean square is 1/4

    @classmethod
    def fit(cls, texts: Sequence[str], encoder: Encoder | None = None) -> FeatureMap:
        """Fits to P texts, not all equal. D is that of `hashed_ngrams` or the encoder. Raises as `hashed_ngrams`."""
        plain = surface(texts)
        frequencies = np.empty(0) if encoder else _tfidf().fit(hashed_ngrams(texts)).idf_
        vectors = _unit_vectors(texts, encoder, frequencies)
        svd = _sklearn("decomposition").TruncatedSVD(min(COMPONENTS, vectors.shape[1]), random_state=0).fit(vectors)
        values = svd.singular_values_[svd.singular_values_ > 1e-5 * svd.singular_values_[0]]
        right = svd.components_[: len(values)].T * 0.5 * np.sqrt(len(texts) / np.mean(values**2))
        arrays = plain.mean(0), plain.std(0) + 1e-6, frequencies, right
        return cls(*(array.astype(np.float32) for array in arrays))

    def __call__(self, texts: Sequence[str], encoder: Encoder | None = None) -> np.ndarray:
        """float32 [P, K + F]. `encoder` is the encoder of the fit. Raises as `hashed_ngrams`."""
        vectors = _unit_vectors(texts, encoder, self.document_frequencies)
        plain = np.clip((surface(texts) - self.surface_mean) / self.surface_std, -4, 4)
        return np.concatenate([vectors @ self.components, 0.5 * plain], axis=1).astype(np.float32)


def _tfidf() -> Any:
    return _sklearn("feature_extraction.text").TfidfTransformer()


def _unit_vectors(texts: Sequence[str], encoder: Encoder | None, frequencies: np.ndarray) -> Any:
    """[P, D] with rows of length 1 (or 0): sparse for n-grams, dense for vectors of an encoder."""
    if encoder:
        return _sklearn("preprocessing").normalize(encoder(texts))
    tfidf = _tfidf()
    tfidf.idf_ = frequencies
    return tfidf.transform(hashed_ngrams(texts))
