"""Stand-ins for the CUDA libraries that torch's wheel for Linux is linked to: `python tests/xla/cuda_stubs.py`.

torch-xla needs torch 2.9.0, which the package index has only as a CUDA build: 4.8 GB of libraries that a host without
a GPU loads and never calls. This writes libraries of the same names and symbols beside torch, whose functions say
their name and abort. The CUDA runtime is not among them (`nvidia-cuda-runtime-cu12`, 3 MB): torch does call it, to
learn that there is no GPU. Needs cc and readelf. Never run it where torch shall use a GPU.
"""

import re
import subprocess
import sys
import sysconfig
import tempfile
from collections import defaultdict
from pathlib import Path

CUDA = re.compile(r"lib(cu|nv|nccl)\w*\.so\.\d+")
SYMBOL = re.compile(r"(cu|nv|nccl)\w+")
ELSEWHERE = {"libcudart.so.12", "libcuda.so.1"}  # the runtime's own wheel; the driver, which is only opened on demand


def readelf(option: str, library: Path) -> str:
    return subprocess.run(["readelf", "-W", option, library], check=True, capture_output=True, text=True).stdout


def wanted(libraries: list[Path]) -> dict[str, dict[str, set[str]]]:
    """Missing library -> version -> symbols; "" is the version of those that have none."""
    found: dict[str, dict[str, set[str]]] = {}
    loose: set[str] = set()
    versioned: dict[str, set[str]] = defaultdict(set)
    file_of: dict[str, str] = {}
    for library in libraries:
        needed = re.findall(r"NEEDED.*\[(.+)\]", readelf("-d", library))
        found |= {name: {} for name in needed if CUDA.fullmatch(name) and name not in ELSEWHERE}
        file = ""
        for line in readelf("-V", library).splitlines():
            if match := re.search(r"File: (\S+)", line):
                file = match[1]
            elif match := re.search(r"Name: (\S+)\s+Flags", line):
                file_of[match[1]] = file
        for line in readelf("--dyn-syms", library).splitlines():
            if match := re.search(r" UND (\w+)(?:@(\S+))?", line):
                symbol, version = match.groups()
                if version is not None:
                    versioned[version].add(symbol)
                elif SYMBOL.fullmatch(symbol):
                    loose.add(symbol)
    for version, symbols in versioned.items():
        if (file := file_of.get(version)) in found:
            found[file][version] = symbols
    if found:  # symbols without a version may come from any library
        found[min(found)][""] = loose
    return found


def build(library: Path, versions: dict[str, set[str]]) -> None:
    """One shared library with these functions, under these symbol versions."""
    lines = ["#include <stdio.h>", "#include <stdlib.h>"]
    for symbol in sorted(set().union(*versions.values())):
        lines.append(
            f'void {symbol}(void) {{ fputs("{symbol} is a stand-in, see cuda_stubs.py\\n", stderr); abort(); }}'
        )
    script = [  # what is not listed is exported without a version
        f"{version} {{ global: {' '.join(f'{symbol};' for symbol in sorted(symbols))} }};"
        for version, symbols in versions.items()
        if version
    ]
    with tempfile.TemporaryDirectory() as scratch:
        source, exports = Path(scratch) / "stub.c", Path(scratch) / "stub.map"
        source.write_text("\n".join(lines), encoding="utf-8")
        exports.write_text("\n".join(script), encoding="utf-8")
        command = ["cc", "-shared", "-fPIC", "-w", "-fno-builtin", f"-Wl,-soname,{library.name}", "-o", library, source]
        if script:
            command.append(f"-Wl,--version-script={exports}")
        subprocess.run(command, check=True)


def main() -> int:
    site = Path(sysconfig.get_path("purelib"))
    folder = site / "torch" / "lib"
    if not (folder / "libtorch_cuda.so").exists() or (site / "nvidia" / "cublas").exists():
        print(f"nothing to do: {site} holds no CUDA build of torch, or its libraries too")
        return 0
    stubs = wanted(sorted(folder.glob("libtorch*.so")) + sorted(folder.glob("libc10*.so")))
    for name, versions in sorted(stubs.items()):
        build(folder / name, versions)
        print(f"{name}: {sum(len(symbols) for symbols in versions.values())} functions")
    return 0


if __name__ == "__main__":
    sys.exit(main())
