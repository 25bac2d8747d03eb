"""A program for eight virtual devices: trains the same run on several meshes, and keeps its compiled steps.

python tests/eight_devices.py FOLDER CONFIG_JSON MESH...; a MESH is "data,fsdp,tensor". FOLDER/MESH is the run,
FOLDER/MESH.hlo the optimized program of its step. The caller's environment makes the devices.
"""

import json
import sys
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict

import train
from navit_jax import console


def main(folder: Path, config: ConfigDict, meshes: list[str]) -> None:
    compile_step = console.compile_step
    for mesh in meshes:

        def keep(*args, mesh=mesh):
            compiled = compile_step(*args)
            (folder / f"{mesh}.hlo").write_text(compiled.as_text())
            return compiled

        console.compile_step = keep
        config.mesh = dict(zip(("data", "fsdp", "tensor"), map(int, mesh.split(","))))
        flags.FLAGS.workdir = str(folder / mesh)
        train.run_config(config)


if __name__ == "__main__":
    flags.FLAGS(sys.argv[:1] + ["--config", "configs/quickstart.py"])
    config = ConfigDict(json.loads(sys.argv[2]))
    main(Path(sys.argv[1]), config, sys.argv[3:])
