"""Decisions per second of the simulator alone: a request joins the shortest queue, all engines run to the next arrival,
and finished requests are removed.

It is the environment's step without penalty and metrics, with requests that were drawn beforehand. Observations are not
read, so XLA leaves them out.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from benchmarks import decisions
from benchmarks.baselines import draw
from benchmarks.decisions import Scan, Setting
from jaxroute.environment.environment import RoutingEnvironment
from jaxroute.environment.state import EnvParams
from jaxroute.errors import command
from jaxroute.workload.arrivals import WorkloadState
from jaxroute.workload.request import Request

DRAWN = 2**14


class DrawnWorkload(flax.struct.PyTreeNode):
    """A workload for the environment that repeats R arrivals and ignores keys."""

    rows: jax.Array  # float32 [R, 2 + 4N]: gap (s), then the fields of the request in their order

    @classmethod
    def of(cls, params: EnvParams) -> DrawnWorkload:
        gap, request = draw(params, 0, DRAWN)
        columns = [leaf.reshape(DRAWN, -1) for leaf in (gap, *jax.tree.leaves(request))]
        return cls(jnp.concatenate(columns, axis=1, dtype=jnp.float32))

    @property
    def num_experts(self) -> int:
        return (self.rows.shape[1] - 2) // 4

    def reset(self, key: jax.Array) -> WorkloadState:
        del key
        return WorkloadState(jnp.int32(0), jnp.float32(0))

    def draw(self, key: jax.Array) -> jax.Array:
        del key
        return jnp.float32(0)

    def next(self, uniforms: jax.Array, state: WorkloadState) -> tuple[WorkloadState, jax.Array, Request]:
        del uniforms
        row = self.rows[state.cursor]
        output, score, predicted_output, predicted_score = row[2:].reshape(4, self.num_experts)
        request = Request(
            prompt_tokens=row[1].astype(jnp.int32),
            output_tokens=output.astype(jnp.int32),
            score=score,
            predicted_output_tokens=predicted_output.astype(jnp.int32),
            predicted_score=predicted_score,
        )
        return WorkloadState((state.cursor + 1) % DRAWN, state.phase), row[0], request

    def sample(self, key: jax.Array, state: WorkloadState) -> tuple[WorkloadState, jax.Array, Request]:
        return self.next(self.draw(key), state)


def rollout(setting: Setting, params: EnvParams) -> Scan:
    num_envs = setting.num_envs
    env = RoutingEnvironment(
        num_experts=setting.experts,
        slots=setting.slots,
        episode_length=setting.episode_length,
        penalty="off",
        metrics="off",
    )
    params = params.replace(workload=DrawnWorkload.of(params))
    keys = jax.random.split(jax.random.key(0), num_envs)
    _, state = jax.jit(jax.vmap(env.reset, (0, None)))(keys, params)
    # Each environment starts elsewhere in the list; the stride is odd, so all positions are used.
    cursor = (jnp.arange(num_envs, dtype=jnp.int32) * 5077) % DRAWN
    state = state.replace(workload=state.workload.replace(cursor=cursor))

    def run(state: Any, key: jax.Array, params: EnvParams) -> tuple[Any, tuple[jax.Array]]:
        keys = jax.random.split(key, num_envs)

        def step(state: Any, _: None) -> tuple[Any, jax.Array]:
            action = jnp.argmin(env.queue_lengths(state), axis=-1)
            _unread, state, *_others, info = jax.vmap(env.step, (0, 0, 0, None))(keys, state, action, params)
            return state, info["qos"].mean()

        state, qos = jax.lax.scan(step, state, length=setting.steps_per_call)
        return state, (qos.mean(),)

    return Scan(run, state, (params,), state)


@command
def main(argv: Sequence[str] | None = None) -> int:
    return decisions.main("advance", __doc__, rollout, argv)


if __name__ == "__main__":
    sys.exit(main())
