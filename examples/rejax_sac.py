"""rejax's SAC, unchanged, on `paper-3`, compared with Round-Robin on the same held-out episodes.

    pip install 'jaxroute[rejax]'
    python examples/rejax_sac.py            # QoS .682 after 262,144 steps, Round-Robin .593
    python examples/rejax_sac.py --short    # under a minute, most of it compilation; learns nothing

`rejax_ppo.py` has the code that both examples share. rejax draws each batch from the whole replay buffer without
replacement, which takes longer with a larger buffer, so this buffer is small. With `normalize_observations` and a
learning rate of 1e-3, the agent ended by dropping every request; observations are of order 1 without normalisation. It
took 105 s of CPU time on a busy two-core CPU (rejax 0.1.3, JAX 0.10.2, seed 0). Its picture is
docs/pictures/rejax_sac.png.
"""

from __future__ import annotations

import rejax
from rejax_ppo import run

OWN = {"target_entropy_ratio": 0.2}
LONG = {"num_envs": 16, "total_timesteps": 262_144, "eval_freq": 32_768, "fill_buffer": 4096, "buffer_size": 32_768}
SHORT = {
    "num_envs": 8,
    "total_timesteps": 256,
    "eval_freq": 128,
    "fill_buffer": 64,
    "buffer_size": 128,
    "batch_size": 32,
}


if __name__ == "__main__":
    run("SAC of rejax", rejax.SAC, __doc__, OWN | LONG, OWN | SHORT)
