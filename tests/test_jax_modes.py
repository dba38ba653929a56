"""JAX as its users use it: the table "Modes and transformations of JAX" in docs/environment.md."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

import jaxroute
from jaxroute.environment.metrics import summarize
from jaxroute.routers import ROUTERS
from tests.compiling import compile_fast
from tests.rollouts import CHEAP_COMPILE


def small(**options):
    return jaxroute.make("paper-3", slots=3, queue_nodes=1, episode_length=3, **options)


def shapes(env, params):
    """The shapes of (key, state, action, params)."""
    key, action = jax.eval_shape(lambda: (jax.random.key(0), jnp.int32(0)))
    return key, jax.eval_shape(env.reset, key, params)[1], action, params


def batch(tree):
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((2, *leaf.shape), leaf.dtype), tree)


@pytest.mark.parametrize(
    ("name", "options"),
    [("paper-3", {}), ("failure-3", {"discipline": "vllm_v0"}), ("bursts-3", {"penalty": "exact", "obs": "flat"})],
)
def test_strict_promotion_of_ranks_and_dtypes(name, options):
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        env, params = jaxroute.make(name, slots=3, episode_length=3, **options)
        inputs = shapes(env, params)
        jax.eval_shape(env.step, *inputs)
        # Here the batching rule runs after the step was traced.
        step = jax.vmap(jax.jit(env.step), (0, 0, 0, None))
        state = jax.eval_shape(step, *map(batch, inputs[:3]), params)[1]
        jax.eval_shape(jax.vmap(env.observe, (0, None)), state, params)
        jax.eval_shape(lambda totals: summarize(totals, env.metrics), inputs[1].totals)
        for router in ROUTERS if name == "paper-3" else ():
            jax.eval_shape(jaxroute.make_router(router, env), inputs[0], None, inputs[1], params)


def test_no_two_results_share_a_buffer():
    for name in ("paper-3", "failure-3", "bursts-3"):
        env, params = jaxroute.make(name, slots=3, episode_length=3, obs="flat", penalty="off")
        own, given = (jax.tree.leaves(tree) for tree in (env.reset(jax.random.key(0), params), params))
        buffers = Counter(leaf.unsafe_buffer_pointer() for leaf in own if leaf.size)
        assert buffers.total() == len(buffers)
        assert not buffers.keys() & {leaf.unsafe_buffer_pointer() for leaf in given}


def test_results_can_be_donated():
    env, params = small()
    compiled = {"compiler_options": CHEAP_COMPILE}

    def step(key, observation, state):
        return env.step(key, state, observation.action_mask.argmax(), params)

    step, key = jax.jit(step, donate_argnums=(1, 2), **compiled), jax.random.key(0)
    for reset in (env.reset, jax.jit(env.reset, **compiled)):
        observation, state = reset(key, params)
        infos = []
        for _ in range(4):
            observation, state, *_, info = step(key, observation, state)
            infos.append(info)
        assert [float(info["episode"].arrived) for info in infos] == [1, 2, 3, 1]
        jax.device_get((state, params))


def test_export():
    env, params = small(obs="flat")
    key, state, action, _ = shapes(env, params)
    reset, step = (
        export.export(jax.jit(call))(*inputs)
        for call, inputs in ((env.reset, (key, params)), (env.step, (key, state, action, params)))
    )
    keys = jax.random.split(jax.random.key(0))
    state = reset.call(keys[0], params)[1]
    wanted = jax.jit(env.step, compiler_options=CHEAP_COMPILE)(keys[1], state, 1, params)
    np.testing.assert_allclose(step.call(keys[1], state, jnp.int32(1), params)[0], wanted[0], rtol=1e-5, atol=1e-6)
    constraint = export.DisabledSafetyCheck.custom_call("LayoutConstraint")
    many = jax.jit(jax.vmap(env.step, (0, 0, 0, None)))
    export.export(many, disabled_checks=[constraint])(*map(batch, (key, shapes(env, params)[1], action)), params)


def test_debug_nans_and_other_kinds_of_keys():
    env, params = small()
    reset, step = (jax.jit(call, compiler_options=CHEAP_COMPILE) for call in (env.reset, env.step))
    key = jax.random.PRNGKey(0)
    with jax.debug_nans(True):
        _, state = reset(key, params)
        for _ in range(3):
            _, state, reward, *_ = step(key, state, jnp.int32(0), params)
    assert np.isfinite(reward)
    for kind in ("rbg", "unsafe_rbg"):
        assert jax.eval_shape(env.step, jax.random.key(0, impl=kind), state, 0, params)[2].shape == ()


SHARDED = """
import jax, jax.numpy as jnp, numpy as np, jaxroute
from jax.sharding import AxisType, NamedSharding, PartitionSpec

env, params = jaxroute.make("paper-3", slots=3, queue_nodes=1, episode_length=2, obs="flat", penalty="off")
reset, step = jax.jit(jax.vmap(env.reset, (0, None))), jax.jit(jax.vmap(env.step, (0, 0, 0, None)))


def run(put):
    keys = put(jax.random.split(jax.random.key(0), 4))
    state = put(reset(keys, params)[1])
    for action in range(3):
        observation, state, reward, *_ = step(keys, state, put(jnp.full(4, action)), params)
    return observation, reward


wanted = run(lambda tree: tree)
for kind in (AxisType.Auto, AxisType.Explicit):
    sharding = NamedSharding(jax.make_mesh((2,), ("d",), axis_types=(kind,)), PartitionSpec("d"))
    for one, other in zip(run(lambda tree: jax.device_put(tree, sharding)), wanted):
        assert one.sharding.spec[0] == "d" and len(one.sharding.device_set) == 2, (kind, one.sharding)
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
"""


def test_automatic_and_explicit_sharding():
    environment = compile_fast()
    environment["XLA_FLAGS"] = f"{environment.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=2"
    ran = subprocess.run([sys.executable, "-c", SHARDED], env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
