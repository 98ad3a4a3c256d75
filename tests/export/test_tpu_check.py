"""The command around the TPU compiler, with stand-ins for the compiler; the real one runs in `tests/tpu`."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch

from nfzoo import model
from nfzoo.errors import ConfigError
from nfzoo.export import tpu_check
from nfzoo.export.tpu_check import (
    Check,
    best,
    check_installed,
    compile_in_process,
    largest_batch,
    main,
    next_batch,
    report,
)
from nfzoo.export.tpu_worker import CHIPS, ENVIRONMENT, Autocast, Request, collectives, too_big
from nfzoo.variants import VARIANTS, variant
from tests.support.helpers import SMALL, images, random_params
from tests.support.loops import each

REQUEST = Request(
    config=variant("nfnet-test").config, chip="v5e", shape=(1, 1), batch=8, size=32, train=True, dtype="bfloat16"
)
COMPILED = {
    "outcome": "compiles",
    "seconds": {"trace": 3.4, "compile": 69.6},
    "versions": {"jax": "0.10.2"},
    "peak": 3 << 30,
    "arguments": 1 << 30,
    "temporaries": 2 << 30,
    "code": 1 << 20,
    "flops": 1.97e12,
    "collectives": {},
    "hbm": CHIPS["v5e"].hbm,
    "shortest_step": 0.01,
}


def fake(body: str) -> tuple[str, ...]:
    """Return the command of a worker of a few lines, which have `request` and `answer`."""
    head = """
        import json, os, signal, subprocess, sys, time
        request = json.loads(sys.stdin.read())
        def answer(outcome, **fields): print(json.dumps({"outcome": outcome, **fields}), flush=True)
    """
    return (sys.executable, "-c", textwrap.dedent(head) + textwrap.dedent(body))


@pytest.fixture
def worker(monkeypatch):
    """Return a function that puts a stand-in in place of the compiler."""
    monkeypatch.setattr(tpu_check, "REQUIRED", ())

    def put(body: str) -> None:
        monkeypatch.setattr(tpu_check, "WORKER", fake(body))

    return put


def check_of(batch: int, outcome: str, **fields: object) -> Check:
    return {**dataclasses.replace(REQUEST, batch=batch).describe(), "outcome": outcome, **fields}


def ends(pid: int) -> bool:
    """Wait until a process has ended; a dead one that nobody has waited for has."""
    for _ in range(200):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except FileNotFoundError:
            return True
        if state == "Z":
            return True
        time.sleep(0.05)
    return False


# ---------------------------------------------------------------- the environment


def test_libtpu_never_asks_the_network():
    assert ENVIRONMENT["TPU_SKIP_MDS_QUERY"] == "1"


def test_the_worker_gets_the_environment_whatever_this_process_has(worker, monkeypatch):
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "0")
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    worker("answer('refused', reason=json.dumps(dict(os.environ)))")
    check = compile_in_process(REQUEST)
    assert json.loads(check["reason"]).items() >= ENVIRONMENT.items()


def with_module_jax(folder: Path, code: str) -> dict[str, str]:
    """Return an environment in which `import jax` runs this code."""
    (folder / "jax.py").write_text(code)
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), *filter(None, sys.path)])}


def test_the_environment_is_set_before_jax_is_imported(tmp_path):
    """Even in a worker that somebody else started: a jax that tells what it finds when it is imported."""
    code = (
        f"import os\nprint('told')\nraise SystemExit(str([os.environ.get(name) for name in {list(ENVIRONMENT)!r}]))\n"
    )
    env = {k: v for k, v in with_module_jax(tmp_path, code).items() if k not in ENVIRONMENT}
    command = [sys.executable, "-m", "nfzoo.export.tpu_worker", str(os.getpid())]
    process = subprocess.run(command, env=env, input=REQUEST.to_json(), capture_output=True, text=True)
    assert process.stderr.splitlines()[-2:] == ["told", str(list(ENVIRONMENT.values()))]
    assert process.stdout == ""  # which is for the answer alone


def test_a_worker_whose_parent_has_ended_ends(tmp_path):
    env = with_module_jax(tmp_path, "raise SystemExit('imported')\n")
    command = [sys.executable, "-m", "nfzoo.export.tpu_worker", "1"]
    process = subprocess.run(command, env=env, input=REQUEST.to_json(), capture_output=True, text=True)
    assert (process.returncode, process.stdout, process.stderr) == (1, "", "")


@pytest.mark.parametrize(
    "end",
    [
        pytest.param(signal.SIGINT, marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, marks=pytest.mark.slow),
        signal.SIGKILL,
    ],
)
def test_no_worker_outlives_the_command(tmp_path, end):
    """The worker itself, with a jax that is busy."""
    busy = f"import os, time\nopen({str(tmp_path / 'pid')!r}, 'w').write(f'{{os.getpid()}}\\n')\ntime.sleep(600)\n"
    code = """
import signal, sys
from nfzoo.export import tpu_check
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background jobs ignore
tpu_check.REQUIRED = ()
sys.exit(tpu_check.main(["nfnet-test", "--topology", "v5e:1x1", "--batch", "8"]))
"""
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, env=with_module_jax(tmp_path, busy), stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        assert process.stderr.readline() == "nfnet-test, forward, batch 8, v5e:1x1: compiling\n"
        for _ in range(1200):
            if (tmp_path / "pid").exists() and (tmp_path / "pid").read_text().endswith("\n"):
                break
            time.sleep(0.05)
        process.send_signal(end)
        assert process.wait(timeout=60) == (130 if end == signal.SIGINT else -end)
        assert process.stderr.read() == ""
    assert ends(int((tmp_path / "pid").read_text()))


def test_neither_module_imports_jax():
    code = "import nfzoo.export.tpu_check, sys; print([m for m in ('jax', 'torchax', 'libtpu') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"


# ---------------------------------------------------------------- the process


def test_the_worker_s_answer_becomes_a_check(worker):
    worker(f"answer(**{COMPILED!r}); os.abort()")
    assert compile_in_process(REQUEST) == {**REQUEST.describe(), **COMPILED}


def test_the_worker_is_asked_what_was_asked(worker):
    worker("answer('refused', reason=json.dumps(request))")
    request = dataclasses.replace(REQUEST, config=SMALL["nf-resnet-timm-eca"], shape=(2, 4), batch=16, train=False)
    assert Request.from_json(compile_in_process(request)["reason"]) == request
    assert (request.chips, request.topology) == (8, "v5e:2x4")


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("sys.exit('first\\nlast')", "the compiler's process ended with status 1: last"),
        ("sys.exit(3)", "the compiler's process ended with status 3"),
        ("print('{\"outcome', end='', flush=True); os.abort()", "the compiler crashed (SIGABRT)"),
        (
            "os.kill(os.getpid(), signal.SIGKILL)",
            "the compiler was killed, as when the memory of this machine gives out",
        ),
    ],
)
def test_a_worker_that_dies_is_one_clear_line(worker, body, reason):
    worker(body)
    check = compile_in_process(REQUEST)
    assert (check["outcome"], check["reason"]) == ("crashed", reason)


def test_a_worker_that_does_not_even_read_is_no_traceback(monkeypatch):
    monkeypatch.setattr(tpu_check, "WORKER", (sys.executable, "-c", "import os; os.close(0); raise SystemExit(7)"))
    assert compile_in_process(REQUEST)["reason"] == "the compiler's process ended with status 7"


def test_a_timeout_ends_the_worker_and_what_it_started(worker, tmp_path):
    worker(
        f"""
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        with open({str(tmp_path / "pids")!r}, "w") as file:
            file.write(f"{{os.getpid()}} {{child.pid}}")
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(600)
        """
    )
    check = compile_in_process(REQUEST, timeout=0.05)
    assert check["outcome"] == "timed out"
    assert check["reason"] == "not done after 0.05 minutes; allow more with --timeout"
    assert all(ends(int(pid)) for pid in (tmp_path / "pids").read_text().split())


def test_the_log_holds_what_the_compiler_prints(worker, tmp_path):
    log = tmp_path / "log"
    log.write_text("before\n")
    worker("sys.exit('said so')")
    assert compile_in_process(REQUEST, log=log)["reason"].endswith(": said so")
    worker("sys.exit(3)")
    assert compile_in_process(REQUEST, log=log)["reason"].endswith("status 3")
    assert log.read_text() == "before\nsaid so\n"


# ---------------------------------------------------------------- the largest batch


def machine(capacity: int, made: list[int], broken_at: int | None = None):
    def check(batch: int) -> Check:
        made.append(batch)
        outcome = "crashed" if batch == broken_at else "compiles" if batch <= capacity else "too big"
        return check_of(batch, outcome)

    return check


@each("start", [4, 8, 12, 512])
@each("capacity", [0, 3, 4, 7, 100, 511, 512, 1000])
def test_the_search_brackets_what_fits(capacity, start):
    made: list[int] = []
    found = best(largest_batch(machine(capacity, made), start, chips=4))
    assert len(made) == len(set(made)) <= 12
    assert all(batch % 4 == 0 for batch in made)
    if capacity < 4:
        assert found is None
    else:
        assert found is not None
        assert found["batch"] <= capacity
        # The next that was tried, at most about twice as large, does not fit.
        assert min(b for b in made if b > capacity) <= 2 * found["batch"] + 4


@each("start", [4, 8, 64])
@each("capacity", [4, 7, 100, 127, 128, 1000])
@each("multiple", [4, 8, 12])
def test_a_multiple_makes_it_exact(capacity, start, multiple):
    made: list[int] = []
    found = best(largest_batch(machine(capacity, made), start, multiple=multiple, chips=4))
    assert found is not None
    assert found["batch"] >= capacity // multiple * multiple
    assert found["batch"] <= capacity
    assert len(made) == len(set(made))


def test_a_search_ends_where_nothing_is_learned():
    made: list[int] = []
    checks = largest_batch(machine(100, made, broken_at=32), 8)
    assert made == [8, 16, 32]
    assert [c["outcome"] for c in checks] == ["compiles", "compiles", "crashed"]


@each("start", [4, 12, 3 << 18])
@each("multiple", [None, 4])
def test_the_next_batch_follows_from_those_tried(start, multiple):
    assert next_batch({}, start, multiple=multiple, chips=4) == start
    assert next_batch({4: False}, start, multiple=multiple, chips=4) is None
    assert next_batch({12: False}, start, multiple=multiple, chips=4) == 4
    assert next_batch({4: True}, start, multiple=multiple, chips=4) == 8
    assert next_batch({4: True, 16: False}, start, multiple=multiple, chips=4) == (multiple and 8)
    assert next_batch({4: True, 8: True, 12: False}, start, multiple=multiple, chips=4) is None
    assert next_batch({3 << 18: True}, start, multiple=multiple, chips=4) == (multiple and 7 << 17)


def test_a_search_without_end_ends():
    made: list[int] = []
    largest_batch(machine(1 << 40, made), 1 << 18, multiple=8)
    assert made[-1] <= 1 << 20


# ---------------------------------------------------------------- reading the compiler


def test_collectives_are_counted_in_the_compiled_program():
    hlo = """
  %all-reduce.74 = (s32[]{:T(128)}, s32[]{:T(128)}) all-reduce(%a, %b), channel_id=1, to_apply=%region
  %get-tuple-element.914 = s32[] get-tuple-element(%all-reduce.74), index=1, metadata={op_name="x/all-reduce(y"}
  ROOT %all-reduce.76 = (bf16[2,16]{1,0:T(2,128)(2,1)}, /*index=1*/f32[4]{0}) all-reduce(%c, %d), channel_id=2
  %ag = (f32[2,8]{1,0}, f32[8,8]{1,0}) all-gather-start(%e), dimensions={0}
  %agd = f32[8,8]{1,0} all-gather-done(%ag)
  %ars = f32[16]{0} all-reduce-start(%f), to_apply=%region
  %ard = f32[16]{0} all-reduce-done(%ars)
"""
    assert collectives(hlo) == {
        "all-reduce": {"count": 3, "bytes": 8 + 2 * 32 + 4 * 4 + 64},
        "all-gather": {"count": 1, "bytes": 256},
    }
    assert collectives("%add = f32[] add(%a, %b)") == {}


@pytest.mark.parametrize(
    ("message", "sizes"),
    [
        (
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (17.42G) "
            "exceeds available HBM (15.75G).",
            (int(17.42 * 2**30), int(15.75 * 2**30)),
        ),
        (
            "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 900.5M "
            "of 15.75G hbm. Exceeded hbm capacity by 1.00G.",
            (int(900.5 * 2**20), int(15.75 * 2**30)),
        ),
        ("RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem.", None),
        ("INTERNAL: (17.42G) exceeds available HBM (15.75G)", None),
    ],
)
def test_only_hbm_is_too_big(message, sizes):
    assert too_big(message) == sizes


def test_the_mode_is_torch_s_autocast():
    """The same bits, since both cast the inputs of the same functions."""
    for name in ("nfnet", "nf-resnet", "nf-regnet", "nfnet-timm-eca"):
        cfg = SMALL[name]
        params, x = random_params(cfg), images(cfg)
        with torch.autocast("cpu", torch.bfloat16):
            wanted = model.apply(cfg, params, x)
        with Autocast(torch.bfloat16):
            found = model.apply(cfg, params, x)
        assert found.dtype == torch.bfloat16
        assert torch.equal(found, wanted), name
        with Autocast(torch.float32):
            assert torch.equal(model.apply(cfg, params, x), model.apply(cfg, params, x))


# ---------------------------------------------------------------- the report


def test_the_report_of_a_step():
    request = dataclasses.replace(REQUEST, shape=(2, 2))
    reduced = {"all-reduce": {"count": 2, "bytes": 1_500_000}}
    check = {**request.describe(), **COMPILED, "collectives": reduced}
    assert report(check, name="nfnet-test", parameters=240_000).splitlines() == [
        "model:       nfnet-test, 0.2 M parameters",
        "step:        training step, 8 images of 32 x 32 pixels",
        "numbers:     bfloat16 activations, float32 parameters",
        "topology:    v5e:2x2, 4 chips with 15.75 GiB for programs",
        "result:      compiles",
        "peak memory: 3.00 GiB a chip, 19% (estimate)",
        "             1.00 GiB arguments, up to 2.00 GiB temporaries",
        "FLOPs:       1.97 T a chip and step",
        "step time:   at least 10 ms at the published 197 TFLOP/s",
        "             of bfloat16, which is at most 800 images/s (estimate)",
        "collectives: 2 all-reduces of 1.5 MB",
        "compilation: 3 s to trace, 70 s to compile",
        "versions:    jax 0.10.2",
    ]


def test_the_report_of_what_does_not_fit():
    check = check_of(8, "too big", reason="…", needed=18 << 30, available=CHIPS["v5e"].hbm)
    small = check_of(4, "compiles", peak=1 << 20)
    lines = report(check, name="m", parameters=1, tried=[check, small]).splitlines()
    assert lines[4] == "result:      too big: needs at least 18.00 GiB a chip, which has 15.75 GiB"
    assert lines[-3:] == [
        "largest:     4 images (estimate)",
        "             8: too big: needs at least 18.00 GiB a chip, which has 15.75 GiB",
        "             4: compiles, 1.0 MiB",
    ]
    assert report(check, name="m", parameters=1, tried=[check]).splitlines()[5] == "largest:     none fits"


# ---------------------------------------------------------------- the command


GOOD = ["nfnet-test", "--topology", "v5e:1x1", "--batch", "8"]


def test_the_command_writes_both_reports(worker, tmp_path, capsys):
    worker(f"answer(**{COMPILED!r})")
    path = tmp_path / "found.json"
    assert main([*GOOD, "--train", "--json", str(path)]) == 0
    printed = capsys.readouterr()
    assert "peak memory: 3.00 GiB a chip, 19% (estimate)" in printed.out
    found = json.loads(path.read_text())
    assert found.items() >= {"model": "nfnet-test", "estimate": True, "step": "train", "topology": "v5e:1x1"}.items()
    assert found.items() >= {"outcome": "compiles", "peak": 3 << 30, "size": 32, "collectives": {}}.items()
    assert main([*GOOD, "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["step"] == "forward"


def test_the_size_is_the_model_s_own(worker, capsys):
    worker("answer('refused', reason=str(request['size']))")
    for more, size in ((["--train"], 192), ([], 256), (["--size", "64"], 64)):
        assert main(["nfnet-f0", *GOOD[1:], *more, "--json", "-"]) == 1
        assert json.loads(capsys.readouterr().out)["reason"] == str(size)


def test_the_search_by_command(worker, capsys):
    worker(
        f"""
        if request["batch"] <= 100: answer(**{COMPILED!r})
        else: answer("too big", reason="…", needed=2 << 30, available=1 << 30)
        """
    )
    assert main([*GOOD, "--largest", "--multiple", "32", "--json", "-"]) == 0
    printed = capsys.readouterr()
    found = json.loads(printed.out)
    assert found["largest"] == found["batch"] == 96
    assert [c["batch"] for c in found["tried"]] == [8, 16, 32, 64, 128, 96]
    assert (
        "nfnet-test, forward, batch 128, v5e:1x1: too big: needs at least 2.00 GiB a chip, which has 1.00 GiB"
        in printed.err
    )


@pytest.mark.parametrize(
    "body", ["answer('too big', reason='…', needed=2, available=1)", "answer('refused', reason='UNIMPLEMENTED')", ""]
)
def test_what_does_not_compile_is_status_1(worker, capsys, body):
    worker(body)
    assert main(GOOD) == 1
    assert "result: " in capsys.readouterr().out
    assert main([*GOOD, "--largest"]) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nfnet-f9", *GOOD[1:]], "did you mean"),
        ([*GOOD[:1], "--batch", "8"], "--topology"),
        ([*GOOD[:3]], "--batch"),
        ([*GOOD, "--topology", "v3:2x2"], "no chip is called 'v3'; known: v4, v5e, v5p, v6e"),
        ([*GOOD, "--topology", "v5e"], "'v5e' does not give 2 sides, as in v5e:2x2"),
        ([*GOOD, "--topology", "v4:2x2"], "'v4:2x2' does not give 3 sides, as in v4:2x2x1"),
        ([*GOOD, "--topology", "v5e:2x2x1"], "does not give 2 sides"),
        ([*GOOD, "--topology", "v5e:3x3"], "a side is 1 or even"),
        ([*GOOD, "--topology", "v5e:0x2"], "a side is 1 or even"),
        ([*GOOD, "--batch", "0"], "'0' is not a whole number"),
        ([*GOOD, "--batch", "1e3"], "'1e3' is not a whole number"),
        ([*GOOD, "--size", "-3"], "--size"),
        ([*GOOD, "--dtype", "int8"], "int8"),
        ([*GOOD, "--timeout", "0"], "'0' is not a number of minutes"),
        ([*GOOD, "--timeout", "nan"], "'nan' is not a number of minutes"),
        ([*GOOD, "--topology", "v5e:2x2", "--batch", "6"], "--batch 6 cannot be divided among 4 chips"),
        ([*GOOD, "--multiple", "8"], "--multiple goes with --largest"),
        (
            [*GOOD, "--topology", "v5e:2x2", "--largest", "--multiple", "6"],
            "--multiple 6 cannot be divided among 4 chips",
        ),
        ([*GOOD, "--json", "/nowhere/x.json"], "'/nowhere/x.json' cannot be written"),
        ([*GOOD, "--log", "."], "'.' cannot be written"),
    ],
)
def test_bad_input_is_one_line(worker, capsys, arguments, message):
    worker("raise SystemExit('the compiler was started')")
    assert main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    (line,) = printed.err.splitlines()
    assert line.startswith("nfzoo tpu-check: error: ")
    assert message in line


def test_the_remedy_for_a_missing_extra(monkeypatch, capsys):
    monkeypatch.setattr(tpu_check, "REQUIRED", ("json", "nfzoo_has_no_such_package"))
    assert main(GOOD) == 2
    assert capsys.readouterr().err == (
        "nfzoo tpu-check: error: this needs nfzoo_has_no_such_package: pip install 'nfzoo[tpu-aot]'\n"
    )
    with pytest.raises(ConfigError, match="tpu-aot"):
        check_installed()


def test_every_model_can_be_asked_for():
    for row in VARIANTS.values():
        request = dataclasses.replace(REQUEST, config=row.config)
        assert Request.from_json(request.to_json()) == request
