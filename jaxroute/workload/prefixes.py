"""Requests that share prefixes: conversations, and questions about documents.

Each class has `num_experts`, `draws`, `reset(key) -> pool` and `next(uniforms [draws], pool) -> (pool, Request)`, which
`Workload` calls. The pool, of P entries (static), is what is going on: new entries take the place of those that end.

The output length of a request is the same at every expert, since later prompts contain the answer. Its prediction has
the error of the frozen generator (`frozen.py`): the length times exp(-.15 z). The score at each expert is its mean plus
N(0, .06), one number for all, and the prediction is the same, but not clipped.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from jaxroute.errors import UserError
from jaxroute.workload.frozen import LOG_OUTPUT_ERROR_STD, SCORE_SHARED_STD
from jaxroute.workload.request import Prefix, Request
from jaxroute.workload.requests import WithMeanScores, drawn_of, mean_scores

PIECES = 2
"""K: what several requests begin with, and what is a request's or a conversation's own."""

_ENDLESS = 2**30  # tokens, more than any request has
_FIRST = 2**16  # the owner number of the first piece that is no tenant


class Tokens(struct.PyTreeNode):
    """A log-normal number of tokens, rounded, at least 1; every field is a traced float []."""

    median: jax.Array
    spread: jax.Array  # standard deviation of the logarithm

    @classmethod
    def create(cls, median: float, spread: float) -> Tokens:
        """From the median, at least 1, and the spread, at least 0. Raises `UserError`."""
        if not (1 <= median < 2**20 and 0 <= spread < 3):
            raise UserError(f"tokens need a median of at least 1 and a spread from 0 to 3, not {median} and {spread}")
        return cls(jnp.asarray(median, float), jnp.asarray(spread, float))

    def at(self, normal: jax.Array) -> jax.Array:
        """int32 [...], from standard normals."""
        return jnp.maximum(jnp.round(self.median * jnp.exp(self.spread * normal)), 1).astype(jnp.int32)


class _Answered(WithMeanScores):
    """What both kinds share: the fields `answer` and `score_mean`, and what follows from them."""

    answer: Tokens

    @property
    def draws(self) -> int:
        """Three uniforms that choose, and one for each normal: the new part of the prompt, the answer (two), score."""
        return 7

    def _request(self, prompt: jax.Array, normals: jax.Array, prefix: Prefix) -> Request:
        """A request whose prompt has this number of tokens, from normals [3]."""
        answer = self.answer.at((normals[0] + normals[1]) / math.sqrt(2))
        predicted = jnp.maximum(answer * jnp.exp(-LOG_OUTPUT_ERROR_STD * normals[1]), 1).astype(jnp.int32)
        score = self.score_mean + SCORE_SHARED_STD * normals[2]
        everywhere = (self.num_experts,)
        return Request(
            prompt_tokens=prompt,
            output_tokens=jnp.broadcast_to(answer, everywhere),
            score=jnp.clip(score, 0.0, 1.0),
            predicted_output_tokens=jnp.broadcast_to(predicted, everywhere),
            predicted_score=score,
            prefix=prefix,
        )


def _normals(uniforms: jax.Array) -> jax.Array:
    return math.sqrt(2) * jax.lax.erf_inv(2 * uniforms - 1)


def _after(owner: jax.Array, by: jax.Array | int) -> jax.Array:
    """The number of a new owner, which is bounded: no earlier owner of the same number is in use any more."""
    owner = owner + by
    return jnp.where(owner < _ENDLESS, owner, owner - (_ENDLESS - _FIRST))


def _check_pool(pool: Any, questions: float, name: str) -> None:
    if isinstance(pool, bool) or not isinstance(pool, int) or not 2 <= pool < _FIRST:
        raise UserError(f"the pool must have a whole number of entries of at least 2, not {pool!r}")
    if not 1 <= questions < math.inf:
        raise UserError(f"{name} must be a number of at least 1, not {questions}")


def _shares(weights: Sequence[float] | np.ndarray, count: int, name: str) -> jax.Array:
    values = np.asarray(weights, np.float64)
    if values.shape != (count,) or not (np.isfinite(values).all() and (values >= 0).all() and values.any()):
        raise UserError(f"{name} must be {count} numbers of 0 or more, not all 0, not {values.tolist()}")
    return jnp.asarray(values / values.sum(), float)


def _drawn(shares: jax.Array, uniform: jax.Array) -> jax.Array:
    """int32 []: the position that a uniform draws, in proportion to `shares`."""
    return jnp.minimum(jnp.sum(jnp.cumsum(shares) <= uniform), shares.shape[0] - 1).astype(jnp.int32)


class Conversations(struct.PyTreeNode):
    """Conversations that go on, the longest idle one first; every field int32 [P], but the last []."""

    owner: jax.Array  # the number of what the conversation says
    tenant: jax.Array
    tokens: jax.Array  # of all turns and of the system prompt; 0: it has not begun
    next_owner: jax.Array


class ConversationRequests(_Answered, struct.PyTreeNode):
    """Turns of conversations. Each prompt is all that was said before, answers included, and a new message; the first
    one is the tenant's system prompt and a message.

    Any conversation of the longer idle half of the pool continues, so that P / 2 other requests come between two turns,
    at least. It ends after a turn with a probability of 1 / `turns`, and where the next prompt would exceed
    `most_tokens`; the conversation that begins in its place draws its tenant. An episode begins with P new ones. A turn
    that is dropped is answered elsewhere: later prompts contain it.
    """

    system_tokens: jax.Array  # int32 [T], system prompt of each tenant, traced
    tenant_shares: jax.Array  # float [T], of the conversations, traced
    turns: jax.Array  # float [], mean number of turns, traced
    most_tokens: jax.Array  # int32 [], of a prompt, traced
    message: Tokens
    answer: Tokens
    score_mean: jax.Array  # float [N], each expert's mean score, 0 to 1, traced
    pool: int = struct.field(pytree_node=False)  # P, static

    @classmethod
    def create(
        cls,
        system_tokens: Sequence[int],
        tenant_weights: Sequence[float],
        turns: float,
        message: Tokens,
        answer: Tokens,
        score_mean: Sequence[float],
        most_tokens: int = 6000,
        pool: int = 64,
    ) -> ConversationRequests:
        """From the values of the fields; the weights are relative shares. Raises `UserError`."""
        _check_pool(pool, turns, "turns")
        system = np.asarray(system_tokens)
        if system.ndim != 1 or not len(system) or system.dtype.kind != "i" or not (0 <= system.min() <= system.max()):
            raise UserError(f"system_tokens must be a whole number from 0 for each tenant, not {system_tokens}")
        if len(system) > _FIRST or system.max() >= most_tokens:
            raise UserError(f"system prompts must be shorter than most_tokens, {most_tokens}, and at most {_FIRST}")
        return cls(
            system_tokens=jnp.asarray(system, jnp.int32),
            tenant_shares=_shares(tenant_weights, len(system), "tenant_weights"),
            turns=jnp.asarray(turns, float),
            most_tokens=jnp.asarray(most_tokens, jnp.int32),
            message=message,
            answer=answer,
            score_mean=mean_scores(score_mean),
            pool=pool,
        )

    def reset(self, key: jax.Array) -> Conversations:
        """P conversations that have not begun."""
        del key
        numbers = _FIRST + jnp.arange(self.pool, dtype=jnp.int32)
        none = jnp.zeros(self.pool, jnp.int32)
        return Conversations(numbers, none, none, jnp.int32(_FIRST + self.pool))

    def next(self, uniforms: jax.Array, pool: Conversations) -> tuple[Conversations, Request]:
        """The pool after a turn, and the turn, from `uniforms` [draws]."""
        normals = _normals(uniforms[3:])
        place = jnp.arange(self.pool)
        chosen = drawn_of(self.pool // 2, uniforms[0])
        tokens, message = pool.tokens[chosen], self.message.at(normals[0])
        begins = (tokens == 0) | (tokens + message > self.most_tokens)
        owner = jnp.where(begins, pool.next_owner, pool.owner[chosen])
        tenant = jnp.where(begins, _drawn(self.tenant_shares, uniforms[1]), pool.tenant[chosen])
        system = self.system_tokens[tenant]
        message = jnp.minimum(message, self.most_tokens - system)
        prompt = jnp.where(begins, system, tokens) + message
        request = self._request(
            prompt, normals[1:], Prefix(jnp.stack([tenant, owner]), jnp.stack([system, jnp.int32(_ENDLESS)]))
        )
        ends = uniforms[2] * self.turns < 1
        said = jnp.where(ends, 0, prompt + request.output_tokens[0])

        def to_end(old: jax.Array, new: jax.Array) -> jax.Array:
            moved = jnp.where(place >= chosen, jnp.roll(old, -1), old)
            return jnp.where(place == self.pool - 1, new, moved)

        following = Conversations(
            owner=to_end(pool.owner, owner),
            tenant=to_end(pool.tenant, tenant),
            tokens=to_end(pool.tokens, said),
            next_owner=_after(pool.next_owner, begins),
        )
        return following, request


class Documents(struct.PyTreeNode):
    """Documents that are asked about; every field int32 [P], but the last []."""

    owner: jax.Array  # the number of its content
    tokens: jax.Array
    next_owner: jax.Array


class DocumentRequests(_Answered, struct.PyTreeNode):
    """Questions about documents. Each prompt is a document, drawn by `popularity`, and a question.

    After a question, a new document takes the place of its own with a probability of 1 / `questions`.
    """

    popularity: jax.Array  # float [P], share of the questions of each place of the pool, traced
    questions: jax.Array  # float [], mean number of questions about a document, traced
    document: Tokens
    message: Tokens  # a question
    answer: Tokens
    score_mean: jax.Array  # float [N], each expert's mean score, 0 to 1, traced

    @classmethod
    def create(
        cls,
        popularity: Sequence[float] | np.ndarray,
        questions: float,
        document: Tokens,
        message: Tokens,
        answer: Tokens,
        score_mean: Sequence[float],
    ) -> DocumentRequests:
        """From the values of the fields; `popularity` are relative shares. Raises `UserError`."""
        _check_pool(len(popularity), questions, "questions")
        return cls(
            popularity=_shares(popularity, len(popularity), "popularity"),
            questions=jnp.asarray(questions, float),
            document=document,
            message=message,
            answer=answer,
            score_mean=mean_scores(score_mean),
        )

    def reset(self, key: jax.Array) -> Documents:
        """P new documents."""
        pool = self.popularity.shape[0]
        numbers = _FIRST + jnp.arange(pool, dtype=jnp.int32)
        return Documents(numbers, self.document.at(jax.random.normal(key, (pool,))), jnp.int32(_FIRST + pool))

    def next(self, uniforms: jax.Array, pool: Documents) -> tuple[Documents, Request]:
        """The pool after a question, and the question, from `uniforms` [draws]."""
        chosen = _drawn(self.popularity, uniforms[0])
        normals = _normals(uniforms[3:])
        owner, tokens = pool.owner[chosen], pool.tokens[chosen]
        own = jnp.stack([owner, pool.next_owner]), jnp.stack([tokens, jnp.int32(_ENDLESS)])
        request = self._request(tokens + self.message.at(normals[0]), normals[1:], Prefix(*own))
        here = (jnp.arange(pool.owner.shape[0]) == chosen) & (uniforms[2] * self.questions < 1)
        following = Documents(
            owner=jnp.where(here, _after(pool.next_owner, 1), pool.owner),
            tokens=jnp.where(here, self.document.at(_normals(uniforms[1])), pool.tokens),
            next_owner=_after(pool.next_owner, 2),
        )
        return following, request


PrefixRequests = ConversationRequests | DocumentRequests
