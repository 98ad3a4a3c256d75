import ctypes
import os
import subprocess
import sys
from pathlib import Path

from nfzoo.runtime.cpu import keep_freed_memory
from tests.support.loops import each

# Frees a block twice as large as glibc's own limits may become, and prints how many pages of it are mapped anew when
# it is allocated again and written to.
_AGAIN = """
import ctypes, resource
from nfzoo.runtime.cpu import keep_freed_memory

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


def _run(folder: Path, code: str, **environment: str) -> list[str]:
    """Return the words that a program prints, without the limits of this process."""
    own = {name: value for name, value in os.environ.items() if not name.startswith(_PREFIXES)}
    own |= {"PYTHONPATH": str(Path(__file__).parents[2]), "ACCELERATE_USE_CPU": "true", **environment}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=folder, env=own, capture_output=True, text=True, check=True).stdout.split()


def test_memory_that_is_kept_is_not_mapped_anew(tmp_path):
    kept, faults = _run(tmp_path, _AGAIN)
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
def test_limits_of_the_user_stay(tmp_path, environment):
    kept, faults = _run(tmp_path, _AGAIN, **environment)
    assert kept == "False"
    assert int(faults) > 10_000 or "MALLOC_TOP_PAD_" in environment


@each("platform", ["darwin", "win32"])
def test_elsewhere_nothing_is_done(monkeypatch, platform):
    monkeypatch.setattr(sys, "platform", platform)
    assert keep_freed_memory() is False


def test_another_c_library_is_left_alone(monkeypatch):
    for name in [name for name in os.environ if name.startswith(_PREFIXES)]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(ctypes, "CDLL", lambda _: object())  # no gnu_get_libc_version, as in musl
    assert keep_freed_memory() is False


def test_other_tunables_do_not_matter(tmp_path):
    assert _run(tmp_path, _AGAIN, GLIBC_TUNABLES="glibc.malloc.hugetlb=1")[0] == "True"


@each(
    "call",
    [
        "from nfzoo.train.run import main; main(['--model', 'nfnet-test', '--data', 'digits', '--output', 'unused'])",
        "from nfzoo.tuner.run import main; main(['--model', 'nfnet-test', '--data', 'digits'])",
        "import nfzoo; nfzoo.fit(nfzoo.create('nfnet-test', num_classes=2), DATA, output='unused')",
        "from nfzoo.dp import main; main([])",
    ],
)
def test_whatever_trains_on_a_cpu_keeps_it(tmp_path, call):
    code = f"""
import os, torch
import nfzoo.runtime.cpu as cpu

def kept():
    print("kept", flush=True)
    os._exit(0)

cpu.keep_freed_memory = kept
DATA = [(torch.zeros(3, 32, 32, dtype=torch.uint8), i % 2) for i in range(40)]
print("begun", flush=True)
{call}
"""
    words = _run(tmp_path, code)
    assert "begun" in words
    assert words[-1] == "kept"
