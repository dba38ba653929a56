"""The GPU's kernel, interpreted, equals `advance`; and it lowers for CUDA, also on a machine without a GPU."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxroute.environment.registry import make_params
from jaxroute.simulator import cluster as simulator_cluster
from jaxroute.simulator import recorded
from jaxroute.simulator.advance import EngineWork, advance
from jaxroute.simulator.advance_kernel import CHANGED, advance_engines, advance_in_kernel
from jaxroute.simulator.disciplines import DISCIPLINES
from jaxroute.simulator.engine import LARGE, EngineParams, EngineState, empty_engine
from jaxroute.simulator.profiles import EXPERTS
from jaxroute.simulator.slots import append
from tests.reference.cases import MAX_REQUESTS, random_case
from tests.replaying import Batch
from tests.test_schedules import MOST_REQUESTS, SCHEDULES


def interpreted(
    state: EngineState,
    work: EngineWork,
    until: jax.Array,
    params: EngineParams,
    most_iterations: Any = LARGE,
    stall_iterations: Any = LARGE,
) -> tuple[EngineState, EngineWork]:
    bounds = (params, jnp.int32(most_iterations), jnp.int32(stall_iterations))
    return advance_in_kernel(state, work, until, *bounds, interpret=True)


def looped(*inputs: Any) -> tuple[EngineState, EngineWork]:
    return advance(*inputs)[:2]


def assert_equal(actual: Any, desired: Any, relative: float) -> None:
    """Integers and masks exactly; XLA may round a sum of products differently in two programs."""
    inexact = jnp.issubdtype(actual.dtype, jnp.floating)
    np.testing.assert_allclose(actual, desired, rtol=relative if inexact else 0, atol=0)


def random_specs(count: int, engine: str = "V1") -> list[dict[str, Any]]:
    rng = np.random.default_rng(7)
    return [random_case(rng, engine=engine) for _ in range(count)]


@pytest.mark.parametrize(
    ("specs", "slots", "x64"),
    [
        (random_specs(100), MAX_REQUESTS, True),
        (SCHEDULES, MOST_REQUESTS, False),
        (random_specs(100, "V0"), MAX_REQUESTS, True),
    ],
    ids=["random-float64", "vLLM-float32", "random-V0-float64"],
)
def test_replays_are_equal(monkeypatch, specs, slots, x64):
    """Random engines and vLLM's schedules: preemption, chunks, stalls, limits on iterations, ties in time."""
    with jax.enable_x64(x64):
        batch = Batch(specs, slots)
        outcomes = []
        for run in (looped, interpreted):
            monkeypatch.setattr(simulator_cluster, "advance_engines", run)
            outcomes.append(jax.jit(jax.vmap(recorded.replay_by_jumps))(batch.recording, batch.engine))
        wanted, got = outcomes
        jax.tree.map(lambda *both: assert_equal(*both, relative=1e-12 if x64 else 1e-6), got, wanted)
    assert np.any(wanted.preemptions > 0) and np.any(wanted.stalled) and np.any(wanted.drained)


def cluster(
    experts: int, environments: int, slots: int, discipline: str = "vllm_v1"
) -> tuple[EngineState, EngineWork, jax.Array, EngineParams]:
    """Idle engines [S, N, B], no work, instants to advance to, [B], and options [N, 1]."""
    params = make_params(tuple(EXPERTS)[:experts], discipline=discipline)
    options = jax.tree.map(lambda leaf: leaf[:, None], params.engines)
    shape = (experts, environments)
    return empty_engine(slots, shape), EngineWork.none(shape), jnp.linspace(0.0, 4.0, environments), options


def test_a_batch_of_clusters_and_vmaps_of_it():
    """Engines with from none to all slots in use, some busy beyond the instant; slots out of use are left alone."""
    slots, shape = 5, (3, 8)
    state, work, until, params = cluster(*shape, slots)
    rng = np.random.default_rng(0)
    for _ in range(slots):
        joins, at = jnp.asarray(rng.random(shape) < 0.7), jnp.asarray(rng.choice([0.0, 2.0], shape), jnp.float32)
        prompt, output = (jnp.asarray(rng.integers(1, 300, shape), jnp.int32) for _ in range(2))
        state = append(state, joins, prompt, output, at)
    wanted, wanted_work = jax.jit(looped)(state, work, until, params)
    assert np.any(wanted_work.iterations == 0) and np.any(wanted.finish_time < jnp.inf)

    over_environments = jax.vmap(interpreted, (-1, -1, 0, None), -1)
    over_both = jax.vmap(jax.vmap(interpreted, (-1, -1, None, 0), -1), (-1, -1, 0, None), -1)
    in_use = np.arange(slots)[:, None, None] < state.num_requests
    for run, options in (
        (interpreted, params),
        (over_environments, jax.tree.map(lambda leaf: leaf[:, 0], params)),
        (over_both, jax.tree.map(lambda leaf: leaf[:, 0], params)),
    ):
        got, got_work = jax.jit(run)(state, work, until, options)
        jax.tree.map(lambda *both: assert_equal(*both, relative=1e-6), got_work, wanted_work)
        assert state.cache is None and state.flight is None, "the kernel hands over to the loop"
        for name in EngineState.__dataclass_fields__.keys() - {"cache", "flight"}:
            before, after, expected = (np.asarray(getattr(queues, name)) for queues in (state, got, wanted))
            here = in_use if after.ndim == 3 else ...
            assert_equal(after[here], expected[here], relative=1e-6)
            if after.ndim == 3:
                np.testing.assert_array_equal(after[~in_use], before[~in_use])
            assert name in CHANGED or np.array_equal(before, after)


def an_h100() -> Any:
    """Newer versions of JAX ask, when they lower a kernel, which GPU it is for."""
    sharding = jax.sharding
    if not hasattr(sharding, "AbstractDevice"):
        return nullcontext()
    device = sharding.AbstractDevice(device_kind="NVIDIA H100", num_cores=None, platform="gpu")
    return sharding.use_abstract_mesh(sharding.AbstractMesh((), (), abstract_device=device))


@pytest.mark.parametrize("discipline", DISCIPLINES)
@pytest.mark.parametrize("x64", [False, True], ids=["float32", "float64"])
def test_lowers_for_cuda_as_one_kernel(x64, discipline):
    with jax.enable_x64(x64), an_h100():
        program = jax.jit(advance_engines).trace(*cluster(6, 1024, 48, discipline))
        cuda = program.lower(lowering_platforms=("cuda",)).as_text()
        cpu = program.lower(lowering_platforms=("cpu",)).as_text()
    assert cuda.count("stablehlo.custom_call @__gpu$xla.gpu.triton") == 1
    assert "stablehlo.while" not in cuda
    assert "custom_call" not in cpu and "stablehlo.while" in cpu


@pytest.mark.parametrize("option", ["enable_prefix_caching", "async_scheduling"])
def test_hands_over_to_the_loop_with_the_options_of_today(option):
    _, work, until, params = cluster(2, 4, 8)
    params = params.replace(**{option: True})
    state = empty_engine(8, (2, 4), params)
    with an_h100():
        cuda = jax.jit(advance_engines).trace(state, work, until, params).lower(lowering_platforms=("cuda",)).as_text()
    assert "gpu.triton" not in cuda and "stablehlo.while" in cuda
