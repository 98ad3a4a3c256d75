import os
import subprocess
import sys

import pytest

from tests.support.loops import each

# Frees a block twice as large as glibc's own limits may become, and prints how many pages of it are mapped anew when
# it is allocated again and written to.
_AGAIN = """
import ctypes, resource
from nfzoo.runtime.malloc import keep_freed_memory

print(keep_freed_memory())
c, size = ctypes.CDLL(None), 64 << 20
c.malloc.restype, c.malloc.argtypes, c.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]

def use():
    block = c.malloc(size)
    ctypes.memset(block, 1, size)
    c.free(block)

use()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
use()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
_PREFIXES = ("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD")

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc is on Linux")


def _run(code: str, **environment: str) -> list[str]:
    own = {name: value for name, value in os.environ.items() if not name.startswith(_PREFIXES)}
    command = [sys.executable, "-c", code]
    return subprocess.run(
        command, env={**own, **environment}, capture_output=True, text=True, check=True
    ).stdout.split()


def test_memory_that_is_kept_is_not_mapped_anew():
    kept, faults = _run(_AGAIN)
    assert kept == "True"
    assert int(faults) < 64  # of 16,384 pages


@each(
    "environment",
    [
        {"MALLOC_MMAP_THRESHOLD_": "1000000"},
        {"MALLOC_TRIM_THRESHOLD_": "1000000"},
        {"MALLOC_TOP_PAD_": "1000000"},
        {"GLIBC_TUNABLES": "glibc.malloc.check=0:glibc.malloc.trim_threshold=1000000"},
    ],
)
def test_limits_of_the_user_stay(environment):
    kept, faults = _run(_AGAIN, **environment)
    assert kept == "False"
    assert int(faults) > 10_000 or "MALLOC_TOP_PAD_" in environment


def test_other_tunables_do_not_matter():
    assert _run(_AGAIN, GLIBC_TUNABLES="glibc.malloc.hugetlb=1")[0] == "True"


@each(("module", "output"), [("nfzoo.train.run", ["--output", "unused"]), ("nfzoo.tuner.run", [])])
def test_programs_that_train_keep_it_and_others_do_not(module, output):
    code = f"""
import sys
import nfzoo.runtime.malloc as malloc

def kept():
    print("kept")
    sys.exit()

malloc.keep_freed_memory = kept
from {module} import main
from nfzoo.cli.main import main as other
other(["info", "nfnet-test", "--quiet"])
print("asked")
main(["--model", "nfnet-test", "--data", "digits", *{output}])
"""
    assert _run(code)[-2:] == ["asked", "kept"]
