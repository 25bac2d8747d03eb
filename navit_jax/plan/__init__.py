"""Plan before you pay: compile a config's training step for a machine that is not here and say what it will take.

    python train.py --config configs/navit_l16.py --plan v5e:16x16

Importing this starts no JAX backend; `plan` has to come before anything that does.
"""

from ml_collections import ConfigDict

from navit_jax.plan.planner import Plan, plan
from navit_jax.plan.report import report

__all__ = ["Plan", "main", "plan", "report"]


def main(config: ConfigDict, target: str) -> None:
    """What `train.py --plan TARGET` does: compile and print."""
    print(f"\n{report(plan(config, target))}", flush=True)
