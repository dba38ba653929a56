"""Steps per CPU second of each adapter whose library there is: `python -m tests.adapters_speed` (docs/adapters.md)."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxroute
from jaxroute import adapters
from jaxroute.errors import UserError

ROWS, STEPS = 64, 200


def report(name: str, run: Callable[[], Any], steps: int) -> None:
    """Prints the rate of the fastest of five runs, after one that compiles. CPU time is that of all threads."""
    run()
    seconds = []
    for _ in range(5):
        start = time.process_time()
        run()
        seconds.append(time.process_time() - start)
    print(f"{name:34} {steps / min(seconds):10,.0f} steps per CPU second")


def scanned(env: Any, params: Any) -> Callable[[], Any]:
    """All steps as one program."""

    def step(state: Any, index: jax.Array) -> tuple[Any, jax.Array]:
        keys = jax.random.split(jax.random.fold_in(jax.random.key(1), index), ROWS)
        values = jax.vmap(env.step, (0, 0, 0, None))(keys, state, jnp.full(ROWS, index % 3), params)
        return values[1], values[2]

    _, state = jax.vmap(env.reset, (0, None))(jax.random.split(jax.random.key(0), ROWS), params)
    program = jax.jit(lambda state: jax.lax.scan(step, state, jnp.arange(STEPS)))
    return lambda: jax.block_until_ready(program(state))


def stepped(step: Callable[[Any], Any], rows: int | None) -> Callable[[], Any]:
    """All steps one by one, from Python."""

    def run() -> None:
        for index in range(STEPS):
            step(index % 3 if rows is None else np.full(rows, index % 3))

    return run


def main() -> None:
    env, params = jaxroute.make("paper-3", obs="flat", metrics="off")
    report(f"without an adapter, {ROWS} in a scan", scanned(env, params), ROWS * STEPS)
    for name, make in {
        f"gymnax, {ROWS} in a scan": lambda: scanned(*adapters.to_gymnax(env, params)),
        "gymnasium, one": lambda: adapters.to_gymnasium(env, params),
        f"gymnasium, {ROWS}": lambda: adapters.to_gymnasium_vector(env, params, ROWS),
        f"Stable-Baselines3, {ROWS}": lambda: adapters.to_stable_baselines3(env, params, ROWS),
    }.items():
        try:
            made = make()
        except UserError as error:
            print(f"{name:34} {error}")
            continue
        if callable(made):
            report(name, made, ROWS * STEPS)
            continue
        made.reset()
        rows = None if name.endswith("one") else ROWS
        report(name, stepped(made.step, rows), STEPS * (rows or 1))


if __name__ == "__main__":
    main()
