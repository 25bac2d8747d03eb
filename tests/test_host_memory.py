"""Memory that is kept between steps; each case in a process of its own, as settings of the C library stay."""

import json
import platform
import subprocess
import sys

import pytest

# 2000 blocks of 20 kB to 2 MB, every other one freed: what compiling leaves.
PIECES = """
import ctypes, json, sys
from navit_jax import host_memory
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]

def resident():
    return 4096 * int(open("/proc/self/statm").read().split()[1])

def use(size):
    block = libc.malloc(size)
    ctypes.memset(block, 1, size)
    return block

if sys.argv[1] == "keep":
    host_memory.keep()
blocks = [use(20_000 + 4_000 * (i % 500)) for i in range(2000)]
before = resident()
for block in blocks[::2]:
    libc.free(block)
host_memory.release()
returned = before - resident()
workspaces = [use(100_000 + i) for i in range(200)]
steps = []
for _ in range(3):
    steps.append(use(300 << 20))
    libc.free(steps[-1])
inside = sum(blocks[0] <= x < max(blocks) for x in workspaces)
print(json.dumps(dict(returned=returned, inside=inside, steps=len(set(steps)))))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="settings of glibc")
@pytest.mark.parametrize("keep", ["keep", "do not"])
def test_pieces_that_compiling_left_go_back_and_are_set_aside_where_memory_is_kept(keep):
    done = subprocess.run([sys.executable, "-c", PIECES, keep], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert found["returned"] > 900 << 20, "of the 1 GB that was freed"
    assert found["inside"] == (0 if keep == "keep" else 200)
    assert found["steps"] == 1, "each step's temporaries lie where the last one's did"
