#!/usr/bin/env bash
# Tests each adapter with the packages that it is for: one virtual environment, .venv-compat-SET, for each set named, with
# jaxroute, the extra of that name (pyproject.toml has the versions) and pytest. Runs the set's tests and the short form of
# its examples, and prints a line for each set at the end. Fails if one did.
#
#   tests/compat.sh gymnax-0 gymnax gymnasium sb3 rejax ray optuna mctx litellm ray-serve openai
#
# sb3 needs torch. On a machine without a GPU, TORCH may name a smaller build that pip can find: a version, such as
# TORCH=torch==2.13.0+cpu, or a wheel's path. It is installed first.
set -uo pipefail
cd "$(dirname "$0")/.."

run() { # SET TEST [EXAMPLE ...]
    local set=$1 test=$2 python=.venv-compat-$1/bin/python extra=$1 more=() example
    if [ "$set" = openai ]; then extra=serve more=("openai>=2"); fi # a client of the front end
    shift 2
    if [ ! -e ".venv-compat-$set/.ready" ] || [ pyproject.toml -nt ".venv-compat-$set/.ready" ]; then
        local pip=("$python" -m pip install --quiet --disable-pip-version-check)
        "${PYTHON:-python3}" -m venv ".venv-compat-$set" || return
        if [ "$set" = sb3 ]; then "${pip[@]}" "${TORCH:-torch}" || return; fi
        "${pip[@]}" --editable ".[$extra]" "pytest>=8.3" "${more[@]}" || return
        touch ".venv-compat-$set/.ready"
    fi
    if [ -n "$test" ]; then "$python" -m pytest -q "$test" || return; fi
    for example in "$@"; do
        echo "-- $example --short"
        "$python" "$example" --short || return
    done
}

summary=() status=0
for set in "$@"; do
    echo "== $set"
    case $set in
        gymnax-0 | gymnax) run "$set" tests/test_adapters_gymnax.py ;;
        gymnasium) run "$set" tests/test_adapters_gymnasium.py ;;
        sb3) run "$set" tests/test_adapters_stable_baselines3.py examples/sb3_dqn.py ;;
        rejax) run "$set" tests/test_adapters_rejax.py examples/rejax_ppo.py examples/rejax_sac.py ;;
        ray) run "$set" tests/test_sweep_ray.py ;;
        optuna) run "$set" "" examples/optuna_search.py ;;
        mctx) run "$set" "" examples/mctx_search.py ;;
        litellm) run "$set" tests/test_serving_litellm.py ;;
        ray-serve) run "$set" tests/test_serving_ray.py ;;
        openai) run "$set" tests/test_serving_clients.py ;;
        *) echo "no such set; there are gymnax-0, gymnax, gymnasium, sb3, rejax, ray, optuna, mctx, litellm, ray-serve, openai" >&2 && false ;;
    esac
    if [ $? = 0 ]; then word=ok; else word=FAILED status=1; fi
    versions=$(".venv-compat-$set/bin/python" -m pip freeze 2>/dev/null |
        grep -E '^(gymnasium|gymnax|jax|litellm|mctx|openai|optuna|ray|rejax|stable_baselines3|torch)==' | paste -sd ' ')
    summary+=("$word $set: ${versions:-nothing installed}")
done
printf '== %s\n' "${summary[@]}"
exit $status
