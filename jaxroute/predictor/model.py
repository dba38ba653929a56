"""The predictor: bucket classifiers for score and log output length, trained in JAX and averaged over folds.

As in arXiv 2508.00234, there is a softmax over buckets for every expert. A small network on features of the text
(`features`) replaces the paper's DistilBERT. There are few data, and given the prompt the score is mostly noise, so
regularisation matters most: strong dropout, weight decay, labels spread over neighbouring buckets, and early stopping
for each target on a fold of the training prompts. One network per fold is trained, all at once (`jax.vmap`), and their
distributions are averaged.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxroute.predictor.features import Encoder, FeatureMap

BUCKETS = 10


@dataclass(frozen=True)
class Buckets:
    """Bounds per expert that divide the training values into `BUCKETS` equal shares (fewer if values repeat)."""

    bounds: np.ndarray  # float32 [N, BUCKETS + 1], ascending from the minimum to the maximum
    means: np.ndarray  # float32 [N, BUCKETS], means of the training values; a bound for an empty bucket

    @classmethod
    def fit(cls, values: np.ndarray) -> Buckets:
        """Computes the buckets from training values [P, N]."""
        bounds = np.quantile(values, np.linspace(0, 1, BUCKETS + 1), axis=0).T.astype(np.float32)
        buckets = cls(bounds, bounds[:, :-1].copy())
        labels = buckets.labels(values)
        for expert, bucket in np.ndindex(buckets.means.shape):
            inside = values[labels[:, expert] == bucket, expert]
            if len(inside):
                buckets.means[expert, bucket] = inside.mean()
        return buckets

    def labels(self, values: np.ndarray) -> np.ndarray:
        """int32 [P, N], the bucket of each value [P, N]."""
        inner = self.bounds[:, 1:-1]
        values = values.astype(np.float32)
        return np.stack([np.searchsorted(b, v, "right") for b, v in zip(inner, values.T, strict=True)], 1).astype(
            np.int32
        )

    def expectation(self, probability: np.ndarray) -> np.ndarray:
        """The means [P, N] of the distributions [P, N, BUCKETS]."""
        return (probability * self.means).sum(axis=-1)

    def median(self, probability: np.ndarray) -> np.ndarray:
        """The medians [P, N] of the distributions [P, N, BUCKETS], which minimise the absolute error."""
        below = np.cumsum(probability, axis=-1) - probability
        bucket = (below <= 0.5).sum(axis=-1, keepdims=True) - 1
        mass = np.take_along_axis(probability, bucket, -1)
        share = np.clip((0.5 - np.take_along_axis(below, bucket, -1)) / np.maximum(mass, 1e-9), 0, 1)
        bounds = np.broadcast_to(self.bounds, (len(probability), *self.bounds.shape))
        low, high = (np.take_along_axis(bounds, bucket + end, -1) for end in (0, 1))
        return (low + share * (high - low))[..., 0]


FOLDS = 5
ROUNDS = 50  # maximum; the held-out fold is evaluated after each round
STEPS_PER_ROUND = 4  # minimum; more if the prompts do not fit into this many batches
BATCH = 256  # maximum number of prompts
LEARNING_RATE = 3e-3
WEIGHT_DECAY = 0.1
LABEL_SPREAD = 1.0  # standard deviation, in buckets, of the normal that spreads a label


class BucketClassifier(nn.Module):
    """Features [..., D] -> log probabilities [..., N, BUCKETS]."""

    num_experts: int
    hidden: int = 32

    @nn.compact
    def __call__(self, features: jax.Array, training: bool = False) -> jax.Array:
        """With `training`, drops features and hidden units by the "dropout" key."""
        features = nn.Dropout(0.3, deterministic=not training)(features)
        hidden = nn.relu(nn.Dense(self.hidden)(features))
        hidden = nn.Dropout(0.5, deterministic=not training)(hidden)
        # With zeros, all buckets are equally likely before the first step, as in the training data.
        logits = nn.Dense(self.num_experts * BUCKETS, kernel_init=nn.initializers.zeros)(hidden)
        return nn.log_softmax(logits.reshape(*logits.shape[:-1], self.num_experts, BUCKETS))


class Prediction(NamedTuple):
    """Predictions for P prompts and N experts."""

    score: np.ndarray  # float [P, N]
    log_tokens: np.ndarray  # float [P, N], natural logarithm of the output tokens
    score_probability: np.ndarray  # float [P, N, BUCKETS]
    log_tokens_probability: np.ndarray  # float [P, N, BUCKETS]

    @property
    def output_tokens(self) -> np.ndarray:
        """int [P, N], at least 1."""
        return np.maximum(np.rint(np.exp(self.log_tokens)), 1).astype(int)


@dataclass(frozen=True)
class Predictor:
    """A trained predictor, which consists of arrays."""

    features: FeatureMap
    score: Buckets
    log_tokens: Buckets
    params: Any  # parameters of `BucketClassifier`; leaves [2, FOLDS, ...], for score and log length
    trained_on: np.ndarray  # uint64 [P], ascending: `prompt_keys` of the training prompts

    def __call__(self, texts: Sequence[str], encoder: Encoder | None = None) -> Prediction:
        """Predicts a prompt with the mean of all networks, and a training prompt with the one not fitted to it."""
        keys = prompt_keys(texts)
        place = np.minimum(np.searchsorted(self.trained_on, keys), len(self.trained_on) - 1)
        share = np.full((len(texts), FOLDS), 1 / FOLDS)
        seen = self.trained_on[place] == keys
        share[seen] = np.eye(FOLDS)[place[seen] % FOLDS]
        network = BucketClassifier(len(self.score.bounds))
        log_probability = _apply_all(network, self.params, self.features(texts, encoder))
        probability = np.einsum("pm,tmpnb->tpnb", share, np.exp(np.asarray(log_probability, np.float64)))
        return Prediction(self.score.median(probability[0]), self.log_tokens.median(probability[1]), *probability)


def prompt_keys(texts: Sequence[str], seed: int | None = None) -> np.ndarray:
    """uint64 [P]: a hash of each prompt and of `seed`, if given, which is the same on every machine."""
    salt = b"" if seed is None else f"{seed}\n".encode()
    digests = (hashlib.blake2b(salt + text.encode("utf-8", "surrogatepass"), digest_size=8) for text in texts)
    return np.array([int.from_bytes(digest.digest(), "little") for digest in digests], np.uint64)


def holdout_split(texts: Sequence[str], share: float, seed: int) -> np.ndarray:
    """bool [P]: whether a prompt is held out. It depends only on the text, so equal prompts are in the same part."""
    return prompt_keys(texts, seed) / 2.0**64 < share


def fit(
    texts: Sequence[str], score: np.ndarray, output_tokens: np.ndarray, seed: int = 0, encoder: Encoder | None = None
) -> Predictor:
    """Trains on P prompts: score float [P, N], output tokens int [P, N]. Hundreds of prompts take seconds on a core."""
    features = FeatureMap.fit(texts, encoder)
    targets = score, np.log(output_tokens)
    buckets = [Buckets.fit(target) for target in targets]
    labels = np.stack([bucket.labels(target) for bucket, target in zip(buckets, targets, strict=True)])
    trained_on, place = np.unique(prompt_keys(texts), return_inverse=True)
    fitted = np.arange(FOLDS)[:, None] != place % FOLDS  # [FOLDS, P]
    network = BucketClassifier(score.shape[1])
    keys = jax.random.split(jax.random.key(seed), (2, FOLDS))
    inputs: Any = (network, keys, *map(jnp.array, (features(texts, encoder), labels, fitted)))
    params = jax.device_get(_train_all(*inputs))
    return Predictor(features, buckets[0], buckets[1], params, trained_on)


@partial(jax.jit, static_argnums=0)
def _apply_all(network: BucketClassifier, params: Any, features: jax.Array) -> jax.Array:
    """Log probabilities [2, FOLDS, P, N, BUCKETS]."""
    return jax.vmap(jax.vmap(network.apply, (0, None)), (0, None))(params, features)  # type: ignore


@partial(jax.jit, static_argnums=0)
def _train_all(
    network: BucketClassifier, keys: jax.Array, features: jax.Array, labels: jax.Array, fitted: jax.Array
) -> Any:
    """`_train` for both targets and all folds: keys [2, FOLDS], labels [2, P, N], fitted [FOLDS, P]."""
    over_folds = jax.vmap(partial(_train, network), (0, None, None, 0))
    return jax.vmap(over_folds, (0, None, 0, None))(keys, features, labels, fitted)


def _train(network: BucketClassifier, key: jax.Array, features: jax.Array, labels: jax.Array, fitted: jax.Array) -> Any:
    """Parameters of the round with the best result on the prompts not `fitted` (bool [P]); labels int32 [P, N]."""
    count = len(features)
    distance = jnp.arange(BUCKETS)[:, None] - jnp.arange(BUCKETS)
    spread = jax.nn.softmax(-0.5 * (distance / LABEL_SPREAD) ** 2)
    optimizer = optax.adamw(LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    steps = max(STEPS_PER_ROUND, math.ceil(count / BATCH))

    def loss(params: Any, key: jax.Array, rows: jax.Array) -> jax.Array:
        log_probability: Any = network.apply(params, features[rows], training=True, rngs={"dropout": key})
        entropy = -(spread[labels[rows]] * log_probability).sum(axis=-1).mean(axis=-1)
        return jnp.average(entropy, weights=fitted[rows])

    def step(carry: Any, key: jax.Array) -> tuple[Any, None]:
        params, state = carry
        draw, dropout = jax.random.split(key)
        rows = jax.random.randint(draw, (min(count, BATCH),), 0, count)
        updates, state = optimizer.update(jax.grad(loss)(params, dropout, rows), state, params)
        return (optax.apply_updates(params, updates), state), None

    def ranked_score(params: Any) -> jax.Array:
        """Ranked probability score on held-out prompts. Unlike the likelihood, it uses the distance of buckets."""
        cumulated = jnp.cumsum(jnp.exp(network.apply(params, features)), axis=-1)  # type: ignore
        truth = labels[..., None] <= jnp.arange(BUCKETS)
        return jnp.square(cumulated - truth).sum(axis=-1).mean(axis=-1) @ ~fitted

    def train_round(carry: Any, key: jax.Array) -> tuple[Any, None]:
        learner, best, best_score = carry
        learner, _ = jax.lax.scan(step, learner, jax.random.split(key, steps))
        score = ranked_score(learner[0])
        best = jax.tree.map(lambda new, old: jnp.where(score < best_score, new, old), learner[0], best)
        return (learner, best, jnp.minimum(score, best_score)), None

    first, rest = jax.random.split(key)
    params = network.init(first, features[:1])
    # The untrained network is not a candidate: here XLA for CPUs (jaxlib 0.10.2) computes its score from unset memory,
    # and a NaN would be kept over all later scores. Seen with MALLOC_PERTURB_=128.
    start = (params, optimizer.init(params)), params, jnp.inf
    (_, best, _), _ = jax.lax.scan(train_round, start, jax.random.split(rest, ROUNDS))
    return best
