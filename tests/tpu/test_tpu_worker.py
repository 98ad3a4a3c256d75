"""What is compiled for a TPU is the real training step, and the compiler answers: run by `make test-tpu`."""

from __future__ import annotations

import dataclasses
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from nfzoo import model
from nfzoo.export.tpu_check import compile_in_process
from nfzoo.export.tpu_worker import CHIPS, ENVIRONMENT, Dtype, Request, compile_for_tpu, jax_forward, jax_step, traced
from nfzoo.step import StepConfig, init_state, train_step
from nfzoo.variants import variant
from tests.support.helpers import FAMILIES, SMALL, generator, images, random_params, relative

os.environ.update(ENVIRONMENT)  # before any test imports jax

FLOAT32 = 1e-5  # sums in another order, through ten layers and back
BFLOAT16 = 0.03  # eight bits a product, rounded in other places by the two frameworks
LABELS = torch.tensor([0, 4])
MINUTES = 8.0


def small(**changes) -> Request:
    row = variant("nfnet-test")
    request = Request(config=row.config, chip="v5e", shape=(1, 1), batch=8, size=32, train=True, dtype="bfloat16")
    return dataclasses.replace(request, **changes)


def to_jax(tree):
    import jax  # pyright: ignore[reportMissingImports]
    import jax.numpy as jnp  # pyright: ignore[reportMissingImports]

    return jax.tree.map(lambda t: jnp.asarray(t.numpy()), tree)


def to_torch(tree):
    import jax  # pyright: ignore[reportMissingImports]
    import numpy as np

    return jax.tree.map(lambda a: torch.from_numpy(np.array(a.astype("float32"))), tree)


def run(function, *args):
    """A function of jax on the CPU, compiled without optimisation, which takes half the time."""
    import jax  # pyright: ignore[reportMissingImports]

    with jax.default_matmul_precision("highest"):
        compiled = jax.jit(function).lower(*to_jax(args)).compile({"xla_backend_optimization_level": 0})
        return to_torch(compiled(*to_jax(args)))


GRADIENTS = StepConfig(clip=None, weight_decay=0.0)  # the momentum after the first step is then the gradient itself


@pytest.mark.parametrize(
    ("name", "config"), [("nfnet", StepConfig()), *((name, GRADIENTS) for name in (*FAMILIES, "nfnet-timm-eca"))]
)
def test_the_step_of_jax_is_the_step_of_torch(name, config):
    cfg = SMALL[name].replace(stochastic_depth=0.5, drop_rate=0.3)
    state, x = init_state(random_params(cfg), config), images(cfg)
    noise = model.sample_noise(cfg, 2, generator=generator())
    lr = torch.tensor(0.125)
    wanted, metrics = train_step(cfg, state, (x, LABELS), noise, lr, config=config)
    found, seen = run(jax_step(cfg, "float32", config=config), state, x, LABELS.int(), noise, lr)
    assert wanted.ema is not None
    assert relative(seen.loss, metrics.loss) < FLOAT32
    assert relative(seen.logits, metrics.logits) < FLOAT32
    assert found.step == 1
    for key in wanted.params:
        assert relative(found.sgd.momentum[key], wanted.sgd.momentum[key]) < FLOAT32, key
        assert relative(found.params[key], wanted.params[key]) < FLOAT32, key
        assert relative(found.ema[key], wanted.ema[key]) < FLOAT32, key


@pytest.mark.parametrize("stride", [32, 8])
@pytest.mark.parametrize("name", FAMILIES)
def test_the_forward_pass_of_jax_is_that_of_torch(name, stride):
    cfg = SMALL[name].replace(output_stride=stride)
    params, x = random_params(cfg), images(cfg)
    tolerances: dict[Dtype, float] = {"float32": FLOAT32, "bfloat16": BFLOAT16}
    for dtype, tolerance in tolerances.items():
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            wanted = model.apply(cfg, params, x)
        assert relative(run(jax_forward(cfg, dtype), params, x), wanted.float()) < tolerance


@pytest.mark.parametrize("name", SMALL)
def test_convolutions_are_in_the_precision_asked_for(name):
    for dtype, other in (("bfloat16", "f32"), ("float32", "bf16")):
        text = traced(small(config=SMALL[name], batch=2, dtype=dtype)).lower(lowering_platforms=("tpu",)).as_text()
        convolutions = re.findall(r"stablehlo\.convolution.*\((tensor<.*>), (tensor<.*>)\)", text)
        assert len(convolutions) > 20
        assert not [pair for pair in convolutions if f"x{other}>" in "".join(pair)]
        arguments = text[text.index("@main(") : text.index("->")]
        assert "bf16" not in arguments  # parameters and optimizer are float32


def test_a_training_step_compiles_for_a_tpu():
    check = compile_in_process(small(), timeout=MINUTES)
    assert check["outcome"] == "compiles", check
    parameters = model.parameter_count(small().config)
    assert check["arguments"] > 12 * parameters  # float32 parameters, momentum, average
    assert check["arguments"] < check["peak"] < CHIPS["v5e"].hbm
    # Forward, and backward to weights and activations; the compiled program counts padding and element-wise work too.
    macs = model.mac_count(small().config, 32)
    assert 8 * 3 * 2 * macs * 0.9 < check["flops"] < 8 * 3 * 2 * macs * 3
    assert check["collectives"] == {}
    assert check["seconds"].keys() == {"trace", "compile"}
    assert {"torch", "jax", "jaxlib", "libtpu", "torchax"} == check["versions"].keys()


def test_a_batch_that_cannot_fit_is_too_big():
    check = compile_in_process(small(batch=1 << 19, size=64), timeout=MINUTES)
    assert check["outcome"] == "too big", check
    assert check["available"] == CHIPS["v5e"].hbm
    assert check["needed"] > CHIPS["v5e"].hbm


@pytest.mark.parametrize("chip", CHIPS)
def test_chips_have_the_memory_of_the_table(chip):
    """One device a chip, and so much memory that the compiler says how much there is."""
    shape = (1,) * CHIPS[chip].sides
    fields = compile_for_tpu(small(chip=chip, shape=shape, batch=1 << 25, train=False))
    assert fields["outcome"] == "too big", fields
    assert fields["available"] == CHIPS[chip].hbm


@pytest.mark.parametrize("topology", ["v5e:2x2", "v4:2x2x1"])
def test_the_batch_is_divided_and_gradients_are_summed(topology):
    chip, _, shape = topology.partition(":")
    request = small(chip=chip, shape=tuple(map(int, shape.split("x"))))
    fields = compile_for_tpu(request)
    assert fields["outcome"] == "compiles", fields
    reduced = fields["collectives"]["all-reduce"]
    # Every gradient once, in bfloat16 at least; nothing of the size of an activation.
    assert 2 * model.parameter_count(request.config) < reduced["bytes"] < 5 * model.parameter_count(request.config)
    alone = compile_for_tpu(dataclasses.replace(request, train=False))
    assert alone["collectives"] == {}


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


# A shell's background jobs ignore Ctrl-C, and tests may run in one.
COMMAND = """
import signal, sys
from nfzoo.export.tpu_check import main
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGKILL])
def test_no_compiler_outlives_the_command(end):
    arguments = ["nfnet-f0", "--topology", "v5e:1x1", "--batch", "8", "--train"]
    command = [sys.executable, "-c", COMMAND, *arguments]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.endswith("compiling\n"):
                break
        time.sleep(20)  # into the compiler, which is busy for much longer
        (worker,) = children(process.pid)
        process.send_signal(end)
        said = process.stderr.read()
        assert process.wait(timeout=60) == (130 if end == signal.SIGINT else -end), said
    for _ in range(600):
        if not alive(worker):
            return
        time.sleep(0.1)
    pytest.fail("the compiler still runs a minute after the command has ended")
