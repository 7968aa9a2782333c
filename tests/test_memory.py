"""Memory that is kept: who allocates it again has it without a page fault."""

import subprocess
import sys

import pytest

SIZE = 48_000_000
CODE = f"""
import ctypes, resource, sys, threading
import jaxcomm

kept = jaxcomm.keep_memory() if "keep" in sys.argv else None
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.memset.argtypes = (ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t)
libc.free.argtypes = (ctypes.c_void_p,)

def use():
    for part in ({SIZE}, *[{SIZE} // 100] * 100):  # beyond and below what glibc maps by itself
        blocks = [libc.malloc(part) for _ in range({SIZE} // part)]
        for block in blocks:
            libc.memset(block, 1, part)
        for block in blocks:
            libc.free(block)

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    thread = threading.Thread(target=use)  # with a heap of its own, if glibc wants to
    thread.start()
    thread.join()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults()
print(kept, faults())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc")
def test_what_was_freed_comes_back_without_page_faults():
    run = lambda *words: subprocess.run(
        [sys.executable, "-c", CODE, *words],
        capture_output=True,
        text=True,
        timeout=200,
        check=True,
    ).stdout.split()
    kept, faults = run("keep")
    if kept == "False":
        pytest.skip("the C library is not glibc")
    given_back = int(run()[1])
    assert given_back > SIZE / 4096  # else there would be nothing to do
    assert int(faults) < 0.02 * given_back
