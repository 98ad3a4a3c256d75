import os
import subprocess
import sys
from pathlib import Path

from nfzoo.runtime.cpu import SPINS, VARIABLES
from tests.support.loops import each

# Prints what OpenMP would read, at the moment when torch is first imported, and ends the program there.
_WATCH = f"""
import os, sys

class Watch:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            print(*(os.environ.get(name) for name in {VARIABLES!r}), flush=True)
            os._exit(0)

sys.meta_path.insert(0, Watch())
"""
_NOTHING = "None None None"


def _at_torch(folder: Path, *arguments: str, **environment: str) -> str:
    """Return the values of `VARIABLES` in a program of Python as it imports torch."""
    (folder / "sitecustomize.py").write_text(_WATCH)
    inherited = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    path = os.pathsep.join([str(folder), str(Path(__file__).parents[2])])
    command = [sys.executable, *arguments]
    done = subprocess.run(
        command, env={**inherited, "PYTHONPATH": path, **environment}, capture_output=True, text=True, timeout=60
    )
    return done.stdout.strip() or done.stderr


_OURS = f"None {SPINS} None"


@each(
    ("arguments", "expected"),
    [
        (["-m", "nfzoo", "info", "nfnet-test"], _OURS),
        (["-c", "from nfzoo.cli.main import main; main(['info', 'nfnet-test'])"], _OURS),
        (["-m", "nfzoo.train", "--help"], _OURS),
        (["-u", "-mnfzoo.tuner", "-m", "other"], _OURS),
        (["-c", "import nfzoo, torch"], _NOTHING),
        (["-m", "other", "-m", "nfzoo.train"], _NOTHING),
        (["-m", "nfzoo_like"], _NOTHING),
    ],
)
def test_threads_of_our_programs_spin_briefly_and_those_of_others_as_they_did(tmp_path, arguments, expected):
    for package in ("other", "nfzoo_like"):
        (tmp_path / package).mkdir(exist_ok=True)
        (tmp_path / package / "__init__.py").write_text("import nfzoo, torch")
    assert _at_torch(tmp_path, *arguments) == expected


@each("name", VARIABLES)
def test_what_the_user_has_set_stays(tmp_path, name):
    expected = " ".join("7" if other == name else "None" for other in VARIABLES)
    assert _at_torch(tmp_path, "-m", "nfzoo", "info", "nfnet-test", **{name: "7"}) == expected
