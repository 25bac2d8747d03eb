"""Real processes for tests, on free ports of this machine."""

import os
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).parents[1]
PROGRAM = """
import sys, time
import numpy as np
from input_pipeline.errors import UserError
{imports}
address, count, index = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
{body}
print("left", flush=True)
"""


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Processes:
    """`count` processes of a program on one coordinator; all are killed at the end."""

    def __init__(self, count, body, imports=""):
        program = PROGRAM.format(imports=imports, body=textwrap.dedent(body))
        address = f"127.0.0.1:{free_port()}"
        env = dict(os.environ, JAX_PLATFORMS="cpu", PYTHONPATH=str(ROOT), TF_CPP_MIN_LOG_LEVEL="2")
        self.all = [
            subprocess.Popen(
                [sys.executable, "-c", program, address, str(count), str(index)],
                env=env,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for index in range(count)
        ]

    def __enter__(self):
        return self

    def __exit__(self, *args):
        for process in self.all:
            process.kill()
            process.communicate()

    def wait_ready(self):
        for process in self.all:
            while (line := process.stdout.readline()) != "ready\n":
                assert line, process.stderr.read()

    def end(self, index, timeout=40):
        """Exit status, stdout, stderr."""
        out, error = self.all[index].communicate(timeout=timeout)
        return self.all[index].returncode, out, error


def last_line(error):
    return error.strip().splitlines()[-1]
