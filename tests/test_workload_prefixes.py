"""Requests that share prefixes: what each prompt contains, and the numbers that the parameters stand for."""

from __future__ import annotations

import math

import numpy as np
import pytest

from jaxroute.errors import UserError
from jaxroute.workload import ConversationRequests, DocumentRequests, PoissonArrivals, Request, Tokens, Workload
from tests.test_workload import MEANS, stream

COUNT, POOL, TURNS, QUESTIONS = 20_000, 16, 5.0, 8.0
SYSTEM, WEIGHTS, POPULARITY = [30, 0, 200], [3.0, 1.0, 1.0], [4.0, 2.0, 1.0, 1.0]
MESSAGE, ANSWER, DOCUMENT = (20, 0.6), (30, 0.5), (500, 0.4)


def conversations(**options) -> ConversationRequests:
    own = {"turns": TURNS, "most_tokens": 100_000, "pool": POOL, **options}
    return ConversationRequests.create(
        SYSTEM, WEIGHTS, message=Tokens.create(*MESSAGE), answer=Tokens.create(*ANSWER), score_mean=MEANS, **own
    )


def documents(popularity=POPULARITY, questions=QUESTIONS) -> DocumentRequests:
    tokens = [Tokens.create(*own) for own in (DOCUMENT, MESSAGE, ANSWER)]
    return DocumentRequests.create(popularity, questions, *tokens, score_mean=MEANS)


@pytest.fixture(scope="module")
def talk() -> Request:
    return stream(Workload.create(PoissonArrivals.create(1.0), conversations()), 0, COUNT)[1]


@pytest.fixture(scope="module")
def asked() -> Request:
    return stream(Workload.create(PoissonArrivals.create(1.0), documents()), 0, COUNT)[1]


def turns_of(request: Request) -> dict[int, list[int]]:
    """The arrivals of each conversation, in order."""
    found: dict[int, list[int]] = {}
    for arrival, owner in enumerate(request.prefix.owner[:, 1].tolist()):
        found.setdefault(owner, []).append(arrival)
    return found


def test_each_turn_contains_all_before_it_and_comes_after_half_of_the_pool(talk):
    prompt, output, tenant = talk.prompt_tokens, talk.output_tokens[:, 0], talk.prefix.owner[:, 0]
    assert (talk.output_tokens == output[:, None]).all(), "later prompts contain the answer, whoever gives it"
    np.testing.assert_array_equal(talk.prefix.end[:, 0], np.asarray(SYSTEM)[tenant])
    assert (talk.prefix.end[:, 1] == 2**30).all()
    messages = []
    for turns in turns_of(talk).values():
        messages.append(prompt[turns[0]] - SYSTEM[tenant[turns[0]]])
        for before, turn in zip(turns, turns[1:], strict=False):
            assert turn - before > POOL // 2 and tenant[turn] == tenant[before]
            messages.append(prompt[turn] - prompt[before] - output[before])
    assert min(messages) >= 1
    assert np.median(messages) == pytest.approx(MESSAGE[0], rel=0.05)
    assert np.log(output).std() == pytest.approx(ANSWER[1], rel=0.05)


def test_numbers_of_turns_are_geometric_and_tenants_have_their_shares(talk):
    lasting = {owner: turns for owner, turns in turns_of(talk).items() if turns[-1] < COUNT - 40 * POOL}
    counts = np.array([len(turns) for turns in lasting.values()])
    assert counts.mean() == pytest.approx(TURNS, rel=0.05)
    assert counts.std() == pytest.approx(math.sqrt(TURNS * (TURNS - 1)), rel=0.1)
    first = talk.prefix.owner[[turns[0] for turns in lasting.values()], 0]
    np.testing.assert_allclose(np.bincount(first) / len(first), np.divide(WEIGHTS, 5), atol=0.03)


def test_prompts_have_a_limit():
    limited = stream(Workload.create(PoissonArrivals.create(1.0), conversations(most_tokens=250)), 0, 2000)[1]
    assert limited.prompt_tokens.max() <= 250 and len(turns_of(limited)) > 2000 / TURNS


def test_questions_share_their_document_and_nothing_else(asked):
    document, own = asked.prefix.owner.T
    tokens = dict(zip(document.tolist(), asked.prefix.end[:, 0].tolist(), strict=True))
    assert [tokens[owner] for owner in document.tolist()] == asked.prefix.end[:, 0].tolist()
    assert (asked.prompt_tokens > asked.prefix.end[:, 0]).all()
    assert len(set(own.tolist())) == COUNT and not set(own.tolist()) & set(document.tolist())
    assert np.median(list(tokens.values())) == pytest.approx(DOCUMENT[0], rel=0.05)
    counts = np.unique(document, return_counts=True)[1]
    assert counts.mean() == pytest.approx(QUESTIONS, rel=0.06)
    # The most popular place of the pool has half of the questions, so a document is often asked about twice in a row.
    again = (document[1:] == document[:-1]).mean()
    assert again == pytest.approx((1 - 1 / QUESTIONS) * np.square(np.divide(POPULARITY, 8)).sum(), abs=0.02)


def test_predictions_are_those_of_the_frozen_generator(talk):
    ratio = np.log(talk.predicted_output_tokens[:, 0] / talk.output_tokens[:, 0])
    assert ratio.std() == pytest.approx(0.15, rel=0.1)
    assert talk.predicted_score.std(0) == pytest.approx(0.06, rel=0.05)
    np.testing.assert_allclose(talk.score, np.clip(talk.predicted_score, 0, 1), rtol=1e-6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: conversations(pool=1), "the pool must have a whole number of entries of at least 2, not 1"),
        (lambda: conversations(turns=0.5), "turns must be a number of at least 1, not 0.5"),
        (lambda: conversations(most_tokens=200), "system prompts must be shorter than most_tokens, 200"),
        (lambda: documents([1.0]), "the pool must have"),
        (lambda: documents([1.0, -1.0]), "popularity must be 2 numbers of 0 or more"),
        (lambda: documents(questions=math.nan), "questions must be a number of at least 1, not nan"),
        (lambda: Tokens.create(0.5, 1), "tokens need a median of at least 1"),
    ],
)
def test_what_cannot_be_is_one_line(make, message):
    with pytest.raises(UserError, match=message):
        make()
