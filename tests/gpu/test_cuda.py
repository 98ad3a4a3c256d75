"""What the CPU computes, a GPU computes: models, updates, compiled blocks, the training loop, mixed precision."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import nfzoo
from nfzoo import AGCSGD, NFNet, param_groups
from nfzoo.errors import TrainingError
from nfzoo.model import apply, sample_noise
from nfzoo.models import cublas, functional
from nfzoo.runtime.cuda_graph import CudaGraph
from nfzoo.step import StepConfig, init_state, train_step
from nfzoo.train.config import TrainConfig
from nfzoo.train.run import prepared
from nfzoo.transforms.mixing import Augment, augment_batch, draw
from tests.support.helpers import (
    SMALL,
    generator,
    images,
    random_params,
    reference_array,
    reference_input,
    reference_params,
)
from tests.support.helpers import relative as relative_on_cpu

DEVICE = torch.device("cuda")
EXACT = 1e-5  # float32, sums in another order, through a few dozen layers
COMPILED = 1e-4
BFLOAT16 = 3e-2


def relative(a: Tensor, b: Tensor) -> float:
    return relative_on_cpu(a.detach().float().cpu(), b.detach().float().cpu())


@pytest.fixture(autouse=True)
def _float32() -> Iterator[None]:
    """Float32 means float32: no TF32 in convolutions."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before
    torch.compiler.reset()


def shell(name: str = "nfnet", **changes: Any) -> NFNet:
    made = NFNet(SMALL[name].replace(**changes))
    made.load_state_dict(random_params(made.config))
    return made


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("last", [False, True], ids=["nchw", "channels last"])
def test_models(name, last):
    here, x = shell(name).eval(), images(SMALL[name], 2, 45, 37)
    there: Any = shell(name).eval().to(DEVICE)
    y = x.to(DEVICE)
    if last:
        there, y = there.to(memory_format=torch.channels_last), y.to(memory_format=torch.channels_last)
    with torch.no_grad():
        assert relative(there(y), here(x)) < EXACT
        assert relative(there.for_inference()(y), here(x)) < EXACT
        low = there.for_inference().to(torch.bfloat16)
        assert relative(low(y.bfloat16()), here(x)) < BFLOAT16


def test_deepminds_logits():
    cfg = nfzoo.variant("nfnet-f0").config
    params = {k: v.to(DEVICE) for k, v in reference_params("nfnet_F0").items()}
    golden = reference_array("nfnet_F0_64x64_1000")["logits"]
    with torch.no_grad():
        logits = apply(cfg, params, reference_input(64, 64).to(DEVICE))
    assert relative(logits, torch.as_tensor(golden)) < EXACT


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("last", [False, True], ids=["nchw", "channels last"])
def test_training_steps(compiled, last):
    cfg = SMALL["nfnet"].replace(drop_rate=0.2, stochastic_depth=0.2)
    models: list[Any] = [shell(drop_rate=0.2, stochastic_depth=0.2) for _ in range(2)]
    models[1].to(DEVICE)
    if last:
        models[1].to(memory_format=torch.channels_last)
    if compiled:
        models[1].compile_blocks()
    optimizers = [
        AGCSGD(param_groups(m, clip=0.1), lr=0.1, ema_decay=0.99, compiled=compiled and i == 1)
        for i, m in enumerate(models)
    ]
    for step in range(3):
        noise = sample_noise(cfg, 4, generator=generator(step))
        for m, optimizer in zip(models, optimizers, strict=True):
            device = next(m.parameters()).device
            optimizer.zero_grad()
            masks = {k: v.to(device) for k, v in noise.items()}
            m(images(cfg, 4, seed=step).to(device), masks).square().mean().backward()
            optimizer.step()
        fractions = [float(o.clipped_fraction) for o in optimizers if o.clipped_fraction is not None]
        assert abs(fractions[0] - fractions[1]) < 0.02
    averages = [o.averages(dict(m.named_parameters())) for m, o in zip(models, optimizers, strict=True)]
    for (name, p), q in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        assert relative(q, p) < COMPILED, name
        assert relative(averages[1][name], averages[0][name]) < COMPILED, name


def test_the_pure_step_and_its_gradients():
    cfg = SMALL["nfnet"]
    results = []
    for device in ("cpu", DEVICE):
        params = {k: v.to(device) for k, v in random_params(cfg).items()}
        config = StepConfig(clip=0.1)
        batch = (images(cfg, 4).to(device), torch.arange(4, device=device))
        state, _ = train_step(cfg, init_state(params, config), batch, {}, lr=0.1, config=config)
        results.append(state.params)
    for name, value in results[0].items():
        assert relative(results[1][name], value) < COMPILED, name


@pytest.mark.parametrize("name", ["nfnet", "nf-resnet", "nf-regnet"])
def test_compiled_inference_and_a_cuda_graph(name):
    model: Any = shell(name).eval().to(DEVICE)
    x = images(SMALL[name]).to(DEVICE)
    with torch.no_grad():
        expected = model(x)
        lean = model.for_inference().compile_blocks()
        for _ in range(3):
            assert relative(lean(x), expected) < COMPILED
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            lean(x)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = lean(x)
        x.copy_(images(SMALL[name], seed=7))
        graph.replay()
        torch.cuda.synchronize()
        assert relative(out, model(x)) < COMPILED


def test_an_update_in_a_cuda_graph():
    """Captured where gradients lie elsewhere than before, and replayed after a step outside."""
    models: list[Any] = [shell().to(DEVICE) for _ in range(2)]
    rate = torch.tensor(0.1, device=DEVICE)
    optimizers = [AGCSGD(param_groups(m, clip=0.1), lr=rate, compiled=i > 0) for i, m in enumerate(models)]
    x = images(SMALL["nfnet"], 4).to(DEVICE)

    def step(i: int) -> None:
        models[i].zero_grad(set_to_none=True)
        models[i](x, {}).square().mean().backward()
        optimizers[i].step()

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            step(1)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(1)
    graph.replay()
    for p in models[1].parameters():
        assert p.grad is not None
        p.grad = p.grad.clone()
    optimizers[1].step()  # the gradient of the replay once more, from other places
    junk = [torch.tensor([1.0]).pin_memory() for _ in range(100)]
    graph.replay()
    for _ in range(2):
        step(0)
    step(0)
    optimizers[0].step()
    step(0)
    assert junk
    for (name, p), q in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        assert relative(q, p) < COMPILED, name


def test_no_step_waits_for_the_device():
    """Forward, backward and update are handed to the device without looking at what comes out."""
    model = shell().to(DEVICE)
    optimizer = AGCSGD(param_groups(model), lr=0.1, ema_decay=0.99)
    x, labels = images(SMALL["nfnet"], 4).to(DEVICE), torch.arange(4, device=DEVICE)

    def step() -> None:
        with torch.autocast("cuda", dtype=torch.bfloat16):
            logits = model(x, {})
        torch.nn.functional.cross_entropy(logits.float(), labels).backward()
        optimizer.step()

    for _ in range(2):
        step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_augmentation_is_the_cpus():
    augment = Augment(layers=4, magnitude=10, mixup=0.2, cutmix=True)
    pixels = torch.randint(0, 256, (8, 3, 32, 32), generator=generator(), dtype=torch.uint8)
    labels = torch.arange(8) % 5
    preprocessing = NFNet(SMALL["nfnet"]).preprocessing
    draws = draw(augment, seed=0, epoch=1, indices=labels.numpy(), offset=0, size=32)
    results = [
        augment_batch(pixels.to(d), labels.to(d), draws, augment, num_classes=5, preprocessing=preprocessing)
        for d in (torch.device("cpu"), DEVICE)
    ]
    for ours, theirs in zip(results[1], results[0], strict=True):
        assert relative(ours, theirs) < 1e-3


@pytest.mark.parametrize(
    "options", list(itertools.product(["no", "bf16", "fp16"], [[], ["--compile", "true"]])), ids=str
)
def test_the_main_job(options, tmp_path: Path, monkeypatch):
    from nfzoo.train import run as train

    precision, more = options
    monkeypatch.chdir(tmp_path)
    arguments = ["--model", "nfnet-test", "--data", "digits", "--output", "run", "--epochs", "6"]
    assert train.main([*arguments, "--mixed_precision", precision, *more]) == 0
    model = nfzoo.from_pretrained("run")
    assert model.provenance is not None
    assert model.provenance["accuracy"] > 0.9


def trainer_of(folder: Path, **options: Any) -> Any:
    config = TrainConfig(
        model="nfnet-test", data="digits", output=str(folder / "run"), batch_size=64, workers=0, **options
    )
    return prepared(config)


def take_steps(trainer: Any, count: int) -> None:
    trainer.learner.model.train()
    for batch, _ in zip(trainer.pipeline.batches(0, 0), range(count), strict=False):
        trainer.train_step([batch])
    trainer.check_steps()


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_steps_in_a_cuda_graph_are_steps(compiled, tmp_path: Path):
    """Of the whole step: dropout masks, warm-up of the learning rate, averages and sums go on from replay to replay."""
    results = []
    for graph in (True, False):
        options = {"compile": compiled, "cuda_graph": graph, "mixed_precision": "no", "drop_rate": 0.2}
        with trainer_of(tmp_path / str(graph), **options) as trainer:
            take_steps(trainer, 10)
            assert isinstance(trainer._compute, CudaGraph) == graph
            assert not graph or trainer._compute.captured
            tensors = {**trainer.learner.live, **{f"average of {k}": v for k, v in trainer.learner.averages.items()}}
            results.append(({k: v.detach().cpu() for k, v in tensors.items()}, trainer.metrics.sums().tolist()))
    for name, value in results[1][0].items():
        assert relative(results[0][0][name], value) < 1e-3, name
    assert results[0][1] == pytest.approx(results[1][1], rel=1e-3)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_teacher_answers_within_the_graph(compiled, tmp_path: Path):
    """Its images are resized and normalised anew there, and the host waits for none of it."""
    teacher = nfzoo.create("nfnet-test", labels=tuple("0123456789"))
    teacher.load_state_dict(random_params(teacher.config))
    teacher.preprocessing = nfzoo.Preprocessing(train_size=24, test_size=24, mean=(0.5,) * 3, std=(0.25,) * 3)
    results = []
    for graph in (True, False):
        options = {"compile": compiled, "cuda_graph": graph, "mixed_precision": "no"}
        folder = teacher.save_pretrained(tmp_path / f"teacher{graph}")
        with trainer_of(tmp_path / str(graph), teacher=str(folder), **options) as trainer:
            take_steps(trainer, 8)
            batch = next(trainer.pipeline.batches(0, 0))
            torch.cuda.set_sync_debug_mode("error")
            try:
                trainer.train_step([batch])
            finally:
                torch.cuda.set_sync_debug_mode("default")
            trainer.check_steps()
            assert not graph or trainer._compute.captured
            results.append({k: v.detach().cpu() for k, v in trainer.learner.live.items()})
    for name, value in results[1].items():
        assert relative(results[0][name], value) < 1e-3, name


def test_each_size_is_captured_anew(tmp_path: Path):
    results = []
    for graph in (True, False):
        options = {"cuda_graph": graph, "mixed_precision": "no", "epochs": 2, "progressive_sizes": (16,)}
        with trainer_of(tmp_path / str(graph), **options) as trainer:
            trainer.fit()
            assert not graph or trainer._compute.captured
            results.append({k: v.detach().cpu() for k, v in trainer.learner.live.items()})
            assert [row["train_size"] for row in trainer.rows] == [16, 32]
    for name, value in results[1].items():
        assert relative(results[0][name], value) < 1e-2, name  # 44 steps


@pytest.mark.parametrize("graph", [False, True], ids=["kernels", "graph"])
def test_the_host_does_not_wait_in_a_training_step(graph, tmp_path: Path):
    options = {
        "cuda_graph": graph,
        "mixed_precision": "bf16",
        "drop_rate": 0.2,
        "augment": Augment(layers=2, mixup=0.2),
    }
    with trainer_of(tmp_path, **options) as trainer:
        take_steps(trainer, 6)
        batch = next(trainer.pipeline.batches(0, 0))
        torch.cuda.set_sync_debug_mode("error")
        try:
            trainer.train_step([batch])
        finally:
            torch.cuda.set_sync_debug_mode("default")
        trainer.check_steps()


@pytest.mark.parametrize("graph", [False, True], ids=["kernels", "graph"])
def test_a_gradient_that_is_not_finite_stops_training_and_changes_nothing(graph, tmp_path: Path):
    with trainer_of(tmp_path, cuda_graph=graph, mixed_precision="no") as trainer:
        take_steps(trainer, 6)
        with torch.no_grad():
            trainer.learner.live["stages.1.0.conv2.gain"].fill_(1e30)
            trainer.learner.live["stages.1.0.skip_gain"].fill_(1e30)
        before = {k: v.detach().clone() for k, v in trainer.learner.live.items()}
        with pytest.raises(TrainingError, match=r"the output of 'stages.1.0' is not finite, at step 7"):
            take_steps(trainer, 3)
        for name, value in trainer.learner.live.items():
            assert torch.equal(value, before[name]), name


def test_a_compiled_step_transposes_nothing(tmp_path: Path):
    """cuDNN computes channels last, and transposes what is given to it otherwise."""
    # Large enough for the last maps to have more than one pixel, as those of one pixel have any layout.
    options = {"compile": True, "mixed_precision": "bf16", "cuda_graph": False, "train_size": 64}
    with trainer_of(tmp_path, **options) as trainer:
        take_steps(trainer, 4)
        batch = next(trainer.pipeline.batches(0, 0))
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
            trainer.train_step([batch])
            torch.cuda.synchronize()
    names = {event.key for event in profiler.key_averages() if event.self_device_time_total > 0}
    assert len(names) > 10
    transposing = [n for n in names if re.search(r"nchwToNhwc|nhwcToNchw|tensorTransform|transpose", n, re.IGNORECASE)]
    assert not transposing


@pytest.mark.parametrize("activation", [None, "relu", "gelu_tanh", "gelu"])
def test_a_linear_layer_with_its_activation_in_one_kernel(activation):
    g = generator()
    x = torch.randn(2, 64, 5, 3, generator=g).to(memory_format=torch.channels_last)
    weight, bias = torch.randn(32, 64, 1, 1, generator=g) / 8, torch.randn(32, generator=g)
    wanted = torch.conv2d(x, weight, bias)
    if activation is not None:
        wanted = functional.activate(wanted, activation)
    on_gpu = [t.half().to(DEVICE) for t in (x, weight, bias)]
    with torch.no_grad():
        assert cublas.supports(on_gpu[0], *on_gpu[1:])
        made = cublas.conv1x1(on_gpu[0], on_gpu[1], on_gpu[2], activation)
    assert relative(made, wanted) < 2e-3
    assert made.is_contiguous(memory_format=torch.channels_last)
