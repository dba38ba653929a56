"""`check_env(env, params)`: checks that an environment or a variant of one satisfies docs/environment.md."""

import copy
import pickle
import re
from collections.abc import Callable
from functools import partial
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from jaxroute.environment.state import EnvParams, EnvState
from jaxroute.workload import Request, Workload

ROWS = 3  # environments stepped together
_RELATIVE, _ABSOLUTE = 1e-3, 1e-4  # differences that the order of float32 operations may cause
_CHEAP = {"xla_backend_optimization_level": 0}  # halves the time to compile


class ContractError(AssertionError):
    """A violation of the contract, in one line: "check: problem"."""


def _fail(check: str, problem: str) -> NoReturn:
    raise ContractError(f"{check}: {problem}")


def check_env(env: Any, params: Any, steps: int | None = None, seed: int = 0) -> None:
    """Runs `env` (a `RoutingEnvironment`, a subclass, or any wrapper with six or five values) and raises
    `ContractError` for the first violation of the contract.

    It checks the interface; pickling and copying; shapes and dtypes against the spaces; that tracing has no side
    effects; NaN and ranges; the action mask; ends of episodes, final observations, automatic reset; determinism; that
    `jax.vmap` does not change results; that `observe` agrees with `step`; and that no observation depends on a true
    output length or score. It makes `steps` random decisions in `ROWS` environments, by default for more than two
    episodes.
    """
    _check_interface(env, params)
    copies = _copies(env)
    shapes = _check_shapes(env, params)
    text = _program_text(env, params, shapes)
    _check_purity(env, params, shapes, text)
    for name, twin in copies.items():
        if _program_text(twin, params, shapes) != text:
            _fail("copies", f"the environment that {name} gives does not compute the same")
    length = getattr(env, "episode_length", None)
    count = steps or (1000 if length is None else 2 * length + min(length // 2, 100))
    keys = jax.random.split(jax.random.key(seed), ROWS)
    probed = _probed(params)

    def decide(before: Any, params: Any, first: int, last: int) -> Any:
        return _decide(env, count, keys, before, params, jnp.int32(first), jnp.int32(last))

    observation, state, _, seen = decide(_reset(env, keys, probed[0]), probed[0], 0, count)
    seen = jax.device_get(seen)
    _check_values(seen)
    _check_ends(seen, length)
    _check_step(env, decide, keys, (observation, state), probed, count)
    if hasattr(env, "observe"):
        _check_observe(env, params, observation, state)
    _check_purity(env, params, shapes, text)


def _check_interface(env: Any, params: Any) -> None:
    for name in ("reset", "step", "num_actions", "action_space", "observation_space"):
        if not hasattr(env, name):
            _fail("interface", f"there is no {name}")
    if env.action_space(params).n != env.num_actions:
        _fail(
            "interface", f"the action space has {env.action_space(params).n} actions, num_actions is {env.num_actions}"
        )


def _copies(env: Any) -> dict[str, Any]:
    """Copies of `env`, by the way they were made."""
    try:
        hash(env)
    except TypeError as error:
        _fail("copies", f"not hashable, so it cannot be a static argument of jax.jit ({error})")
    try:
        pickled = pickle.loads(pickle.dumps(env))
    except Exception as error:
        _fail("copies", f"cannot be pickled ({_line(error)}); define its class in a module")
    try:
        return {"pickle": pickled, "deepcopy": copy.deepcopy(env)}
    except Exception as error:
        _fail("copies", f"cannot be deep-copied ({_line(error)})")


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"


def _six(values: tuple[Any, ...]) -> tuple[Any, ...]:
    """The six values of a step that returned six or five values."""
    if len(values) == 6:
        return values
    observation, state, reward, _, info = values
    return observation, state, reward, info["terminated"], info["truncated"], info


def _kinds(tree: Any) -> dict[str, str]:
    """Path -> shape and dtype of each leaf."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): f"{leaf.dtype}{list(leaf.shape)}" for path, leaf in leaves}


def _same_kinds(check: str, what: str, got: Any, other: str, wanted: Any) -> None:
    got, wanted = _kinds(got), _kinds(wanted)
    for path in got.keys() | wanted.keys():
        if got.get(path) != wanted.get(path):
            _fail(check, f"{what}{path} is {got.get(path, 'absent')}, {other} {wanted.get(path, 'absent')}")


def _check_shapes(env: Any, params: Any) -> tuple[Any, Any, Any]:
    """The checks that only need tracing; returns the shapes of a key, a state and an action."""
    key, action = jax.eval_shape(lambda: (jax.random.key(0), jnp.int32(0)))
    try:
        made = jax.eval_shape(env.reset, key, params)
    except Exception as error:
        _fail("trace", f"reset(key, params) cannot be traced, as jax.jit needs ({_line(error)})")
    if not isinstance(made, tuple) or len(made) != 2:
        _fail("interface", "reset must return (observation, state)")
    first, state = made
    try:
        values = jax.eval_shape(env.step, key, state, action, params)
    except Exception as error:
        _fail("trace", f"step(key, state, action, params) cannot be traced, as jax.jit needs ({_line(error)})")
    if not isinstance(values, tuple) or len(values) not in (5, 6) or not isinstance(values[-1], dict):
        _fail(
            "interface",
            "step must return (observation, state, reward, terminated, truncated, info), or (observation, state, "
            "reward, done, info), info a dict",
        )
    needed = ("final_observation", *(("terminated", "truncated", "discount") if len(values) == 5 else ()))
    for name in needed:
        if name not in values[-1]:
            _fail("interface", f'info["{name}"] is missing')
    observation, after, reward, terminated, truncated, info = _six(values)
    space = jax.eval_shape(env.observation_space(params).sample, key)
    _same_kinds("shapes", "reset's observation", first, "in the observation space", space)
    _same_kinds("shapes", "step's observation", observation, "from reset", first)
    _same_kinds("shapes", "the final observation", info["final_observation"], "from reset", first)
    _same_kinds("shapes", "step's state", after, "from reset", state)
    floating = jnp.zeros((), float).dtype
    flags = {"terminated": terminated, "truncated": truncated, **({"done": values[3]} if len(values) == 5 else {})}
    for name, leaf, dtype in [("reward", reward, floating), *((name, flag, bool) for name, flag in flags.items())]:
        _same_kinds("shapes", name, leaf, "must be", jax.ShapeDtypeStruct((), dtype))
    mask = getattr(first, "action_mask", None)
    if mask is not None:
        _same_kinds("shapes", "the action mask", mask, "must be", jax.ShapeDtypeStruct((env.num_actions,), bool))
    try:
        jax.eval_shape(jax.vmap(env.step, (0, 0, 0, None)), *_batched((key, state, action)), params)
    except Exception as error:
        _fail("vmap", f"step cannot be traced under jax.vmap ({_line(error)})")
    return key, state, action


def _batched(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((ROWS, *leaf.shape), leaf.dtype), tree)


def _program_text(env: Any, params: Any, shapes: tuple[Any, Any, Any]) -> tuple[Any, ...]:
    """A new trace of reset and step: the programs as text, and the constants in them."""
    key, state, action = shapes
    programs = (
        jax.make_jaxpr(lambda key, params: env.reset(key, params))(key, params),
        jax.make_jaxpr(lambda *inputs: env.step(*inputs))(key, state, action, params),
    )
    text = [re.sub(r"0x[0-9a-f]+", "", str(program)) for program in programs]
    return (*text, [np.asarray(value).tolist() for program in programs for value in program.consts])


def _check_purity(env: Any, params: Any, shapes: tuple[Any, Any, Any], text: tuple[Any, ...]) -> None:
    if _program_text(env, params, shapes) != text:
        _fail(
            "purity",
            "traced again, reset or step computes something else: it keeps something outside of its state, or draws "
            "random numbers of the host",
        )


class _Probe(struct.PyTreeNode):
    """A workload that changes true lengths and scores if `shift` is above 0, but no predictions."""

    inner: Workload
    shift: jax.Array  # int32 [], tokens

    def __getattr__(self, name: str) -> Any:
        if name == "inner" or (name.startswith("__") and name.endswith("__")):
            raise AttributeError(name)
        return getattr(self.inner, name)

    def _probe(self, sampled: tuple[Any, Any, Request]) -> tuple[Any, Any, Request]:
        state, gap, request = sampled
        return state, gap, _other_truth(request, self.shift)

    def sample(self, key: jax.Array, state: Any) -> tuple[Any, Any, Request]:
        return self._probe(self.inner.sample(key, state))

    def next(self, uniforms: jax.Array, state: Any) -> tuple[Any, Any, Request]:
        return self._probe(self.inner.next(uniforms, state))


def _other_truth(request: Request, shift: jax.Array | int) -> Request:
    score = jnp.where(shift > 0, 1 - request.score, request.score)
    return request.replace(output_tokens=request.output_tokens + shift, score=score)  # type: ignore[attr-defined]


def _probed(params: Any) -> tuple[Any, Any]:
    """Parameters with an inactive and with an active probe; None if the workload is not a `Workload`."""
    workload: Any = params.workload if isinstance(params, EnvParams) else None
    if not isinstance(workload, Workload):
        return params, None
    first, second = (_Probe(workload, jnp.int32(shift)) for shift in (0, 1))
    return params.replace(workload=first), params.replace(workload=second)  # type: ignore[arg-type]


def _inner(state: Any) -> EnvState | None:
    """The state of the routing environment within a wrapper's state."""
    is_own = lambda node: isinstance(node, EnvState)  # noqa: E731
    return next((node for node in jax.tree.leaves(state, is_leaf=is_own) if is_own(node)), None)


def _same(one: Any, other: Any) -> jax.Array:
    """bool []: whether all leaves are equal up to rounding."""
    close = lambda a, b: jnp.allclose(a.astype(float), b.astype(float), _RELATIVE, _ABSOLUTE)  # noqa: E731
    return jnp.all(jnp.stack(jax.tree.leaves(jax.tree.map(close, one, other))))


def _finite(tree: Any) -> jax.Array:
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]))


@partial(jax.jit, static_argnums=0, compiler_options=_CHEAP)
def _reset(env: Any, keys: jax.Array, params: Any) -> tuple[Any, Any]:
    return jax.vmap(env.reset, (0, None))(keys, params)


@partial(jax.jit, static_argnums=(0, 1), compiler_options=_CHEAP)
def _decide(env: Any, steps: int, keys: jax.Array, before: Any, params: Any, first: jax.Array, last: jax.Array) -> Any:
    """Makes random decisions first..last - 1 from `before`, observations and states [B, ...]. Returns those after the
    decisions, the last rewards, and the results of the checks in the first `steps` decisions, bool [steps, B]. One
    program serves any number of decisions.
    """
    space = env.observation_space(params)

    def one(key: jax.Array, state: Any, index: jax.Array) -> tuple[Any, Any, jax.Array, dict[str, jax.Array]]:
        action, key_step = _choice(env, key, index)
        values = env.step(key_step, state, action, params)
        observation, state, reward, terminated, truncated, info = _six(values)
        final = info["final_observation"]
        own = _inner(state)
        seen = {
            "finite observation": _finite(observation) & _finite(final),
            "in space": space.contains(observation) & space.contains(final),
            "finite reward": jnp.isfinite(reward),
            "any action": jnp.any(getattr(observation, "action_mask", True)),
            "terminated": terminated,
            "truncated": truncated,
            "same observation": _same(observation, final),
            "idle": jnp.bool_(True) if own is None else jnp.all(own.engines.num_requests == 0) & (own.step == 0),
        }
        if len(values) == 5:
            seen["done agrees"] = values[3] == (terminated | truncated)
            seen["discount agrees"] = info["discount"] == 1 - terminated
        return observation, state, reward, seen

    def decide(index: jax.Array, carry: Any) -> Any:
        *after, seen = jax.vmap(one, (0, 0, None))(keys, carry[1], index)
        return *after, jax.tree.map(lambda old, new: old.at[index].set(new), carry[3], seen)

    kinds = jax.eval_shape(jax.vmap(one, (0, 0, None)), keys, before[1], first)[2:]
    reward = jnp.zeros(kinds[0].shape, kinds[0].dtype)
    seen = {name: jnp.zeros((steps, *leaf.shape), bool) for name, leaf in kinds[1].items()}
    return jax.lax.fori_loop(first, last, decide, (*before, reward, seen))


def _choice(env: Any, key: jax.Array, index: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A random action, and the key of its step."""
    key_action, key_step = jax.random.split(jax.random.fold_in(key, index))
    return jax.random.randint(key_action, (), 0, env.num_actions), key_step


def _check_values(seen: dict[str, np.ndarray]) -> None:
    problems = {
        "finite observation": ("observation", "has a NaN or an infinity"),
        "in space": ("observation", "is outside of the observation space"),
        "finite reward": ("reward", "is a NaN or an infinity"),
        "any action": ("action mask", "allows no action"),
        "done agrees": ("end", 'done is not info["terminated"] or info["truncated"]'),
        "discount agrees": ("end", 'info["discount"] is not 0 where terminated and 1 elsewhere'),
    }
    for name, (check, problem) in problems.items():
        if name in seen and not seen[name].all():
            _fail(check, f"{problem}, first after decision {np.argmin(seen[name].all(axis=1)) + 1}")


def _check_ends(seen: dict[str, np.ndarray], length: int | None) -> None:
    terminated, truncated, same = seen["terminated"], seen["truncated"], seen["same observation"]
    done = terminated | truncated
    if (terminated & truncated).any():
        _fail("end", "a step is both terminated and truncated")
    if not same[~done].all():
        _fail("final observation", "differs from the observation where no episode ends")
    if length is not None:
        taken = np.zeros(done.shape[1], int)
        for ends, by_termination in zip(done, terminated, strict=True):
            taken += 1
            at_limit = taken == length
            if (at_limit & by_termination).any():
                _fail("end", f"terminated at the time limit of {length} decisions, which is a truncation")
            if (at_limit & ~ends).any():
                _fail("end", f"an episode has no end after {length} decisions, its episode_length")
            taken[ends] = 0
    if done.any() and same[done].all():
        _fail("reset", "the observation after an episode's end is still that episode's: there is no auto-reset")
    if not seen["idle"][done].all():
        _fail("reset", "the state after an episode's end is not a fresh episode's")


def _check_step(env: Any, decide: Callable[..., Any], keys: jax.Array, before: Any, probed: Any, index: int) -> None:
    """One more decision in each row: repeated, with other true values of the next request, and in one row alone."""
    params, shifted = probed
    values = decide(before, params, index, index + 1)
    if not _bits_equal(values, decide(before, params, index, index + 1)):
        _fail("determinism", "the same key, state, action and parameters gave two results")
    if shifted is not None:
        others = decide(before, shifted, index, index + 1)
        for name, place in (("observation", 0), ("reward", 2)):
            if not _bits_equal(values[place], others[place]):
                _fail("leak", f"the {name} depends on the next request's true output length or score")
    row = lambda tree: jax.tree.map(lambda leaf: leaf[0], tree)  # noqa: E731
    alone = jax.jit(lambda *inputs: env.step(*inputs), compiler_options=_CHEAP)
    action, key = _choice(env, keys[0], jnp.int32(index))
    own = alone(key, row(before[1]), action, params)
    for name, place in (("observation", 0), ("reward", 2)):
        if not _same(own[place], row(values[place])):
            _fail("vmap", f"the {name} of a step under jax.vmap is not that of the step alone")


def _bits_equal(one: Any, other: Any) -> bool:
    leaves = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return all(np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in leaves)


def _check_observe(env: Any, params: Any, observation: Any, state: Any) -> None:
    observe = jax.jit(lambda state, params: jax.vmap(env.observe, (0, None))(state, params), compiler_options=_CHEAP)
    try:
        observed = observe(state, params)
    except Exception as error:
        _fail("observe", f"observe(state, params) fails on step's state ({_line(error)}); define it along with step")
    if jax.tree.structure(observed) != jax.tree.structure(observation) or not _same(observed, observation):
        _fail("observe", "observe(state, params) is not the observation that came with the state")

    def with_other_truth(node: Any) -> Any:
        if not isinstance(node, EnvState):
            return node
        engines = node.engines.replace(target_tokens=node.engines.target_tokens + 7)
        queued = node.queued.replace(score=1 - node.queued.score)
        return node.replace(engines=engines, queued=queued, request=_other_truth(node.request, 7))

    changed = jax.tree.map(with_other_truth, state, is_leaf=lambda node: isinstance(node, EnvState))
    if not _bits_equal(observed, observe(changed, params)):
        _fail("leak", "the observation depends on true output lengths or scores of requests that are there")
