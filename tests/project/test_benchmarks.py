"""The benchmark's own arithmetic and pages; that each suite runs is seen with `--quick`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import contenders, everything, peer, report, run, timing
from benchmarks.report import Point, Table
from benchmarks.suites import against_timm, graph_boundary, grouped_conv, profiles
from benchmarks.systems import training_memory
from nfzoo import model
from nfzoo.models.weight_standardization import PLAIN_ROWS
from nfzoo.optim.agc_sgd import AGCSGD
from nfzoo.variants import VARIANTS
from tests.support.helpers import SMALL, generator, images, random_params, relative

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parents[2]


def test_contenders_take_turns():
    seen: list[str] = []
    calls = {"a": lambda: seen.append("a"), "b": lambda: seen.append("b")}
    times = timing.interleave(calls, CPU, rounds=4, warm=1)
    assert [len(v) for v in times.values()] == [4, 4]
    assert "".join(seen[4:]) == "abba" * 2  # after the warm-up; no contender is always the first


def test_ratios_are_of_one_round():
    assert timing.ratio([2.0, 20.0, 3.0], [1.0, 10.0, 1.0]) == 2.0
    assert timing.median([3.0, 1.0, 2.0]) == 2.0


@pytest.mark.parametrize(("capacity", "limit", "best"), [(0, 64, 0), (1, 64, 1), (37, 64, 32), (1000, 64, 64)])
def test_the_largest_batch(capacity, limit, best):
    tried = []

    def fits(batch: int) -> bool:
        tried.append(batch)
        return batch <= capacity

    assert timing.largest_power_of_two(fits, limit) == best
    assert max(tried) <= min(limit, 2 * max(best, 1))


def test_running_out_of_memory_is_an_answer_and_other_errors_are_not():
    def full() -> None:
        raise torch.OutOfMemoryError("full")

    assert not timing.runs_in_memory(full, CPU)
    assert timing.runs_in_memory(lambda: None, CPU)
    with pytest.raises(ZeroDivisionError):
        timing.runs_in_memory(lambda: 1 / 0, CPU)


def test_saved_bytes_counts_each_memory_once_and_no_weights():
    w, x = torch.ones(1000, requires_grad=True), torch.ones(1000)
    assert timing.saved_bytes(lambda: (w * x * x).sum(), [w]) == 4000
    assert timing.saved_bytes(lambda: (w * 2).sum(), [w]) == 0


def test_the_machine_is_measured():
    assert timing.matmul_rate(CPU, torch.float32, size=64) > 1e6
    assert timing.memory_rate(CPU, megabytes=1) > 1e6


def test_a_page(tmp_path):
    table = Table("Title", ["a", "much longer"], [["1", "2"]], "A note.")
    text = report.page("Page", "python benchmarks/run.py x", CPU, [table], ["Noticed."])
    assert "| a | much longer |\n| - | ----------- |\n| 1 | 2           |\n\nA note." in text
    assert torch.__version__ in text
    assert "Noticed." in text
    path = report.write(text, "x", CPU, tmp_path / "new")
    assert path.name.endswith("-cpu-x.md")
    assert path.read_text() == text


@pytest.mark.parametrize(("value", "text"), [(0.01234, "0.012"), (1.2345, "1.23"), (123.45, "123"), (98765.4, "98765")])
def test_numbers_have_three_digits(value, text):
    assert report.number(value) == text


def test_the_plot(tmp_path):
    points = [Point("nfzoo NFNet", "F0", 0.1, 83.6), Point("timm EfficientNet", "B0", 0.05, 77.3)]
    path = report.plot(points, tmp_path / "plot.png", xlabel="seconds")
    assert path is not None
    assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        ("sm90_xmma_fprop_implicit_gemm_bf16", "convolutions"),
        ("aten::mkldnn_convolution", "convolutions"),
        ("nvjet_hsh_128x256", "matrix products"),
        ("triton_per_fused_mul_sum_3", "Triton reductions"),
        ("triton_poi_fused_convolution_gelu_1", "Triton element-wise"),
        ("void cudnn::engines_precompiled::nchwToNhwcKernel<...>", "transposes"),
        ("_update_tiles", "update of all parameters"),
        ("aten::native_batch_norm", "standardisation and norms"),
        ("void at::native::multi_tensor_apply_kernel<...>", "update of all parameters"),
        ("aten::gelu", "element-wise"),
        ("Memcpy DtoD", "copies"),
        ("ncclKernel", "other"),
    ],
)
def test_kernels_by_class(kernel, kind):
    assert profiles.kind_of(kernel) == kind


def test_a_profile_adds_up():
    a = torch.randn(64, 64)
    rows = profiles.by_class(lambda: torch.nn.functional.gelu(a @ a), CPU)
    assert {"matrix products", "element-wise"} <= {row[0] for row in rows}
    assert sum(float(row[2].rstrip("%")) for row in rows) == pytest.approx(100, abs=0.5)


def test_every_model_of_the_plot_has_an_accuracy():
    assert set(contenders.ACCURACY) == {n for n in VARIANTS if n.startswith("nfnet-f") and n[7:] in "0123456"}
    assert len(contenders.EFFICIENTNETS) == 8
    assert peer.name_of("nfnet-f0") == "dm_nfnet_f0"


def test_the_peers_update_is_agcs_where_nothing_is_clipped(monkeypatch):
    """The two sides of the comparison do the same work."""
    monkeypatch.setattr(peer, "timm", lambda: None)
    monkeypatch.setitem(sys.modules, "timm.utils.agc", type(sys)("agc"))
    monkeypatch.setattr(sys.modules["timm.utils.agc"], "adaptive_clip_grad", None, raising=False)
    shapes, sides = [(4, 3), (4,)], []
    for _ in range(2):
        g = generator()
        sides.append([torch.nn.Parameter(torch.randn(s, generator=g)) for s in shapes])
        for p in sides[-1]:
            p.grad = torch.randn(p.shape, generator=g)
    theirs = peer.Update(sides[0], [], clip=None)
    ours = AGCSGD(
        [{"params": sides[1][:1], "weight_decay": 2e-5}, {"params": sides[1][1:]}],
        lr=1e-4,
        clip=None,
        ema_decay=0.99999,
    )
    theirs()
    ours.step()
    for p, q in zip(*sides, strict=True):
        torch.testing.assert_close(p, q)


def test_the_region_that_begins_after_the_sum_is_the_block():
    cfg = SMALL["nfnet"]
    params, x = random_params(cfg), images(cfg)
    activated = None
    for block in model.plan(cfg):
        if isinstance(block.fn, graph_boundary.FBlock):
            local = model.block_params(block, params)
            expected = model.run_block(block, params, x)
            first = block.fn.layers.act(x) if activated is None else activated
            x, activated = graph_boundary.beginning_after_the_sum(block.fn, local, x, first, torch.tensor(block.beta))
            assert relative(x, expected) < 1e-6
        else:
            x = model.run_block(block, params, x)


@pytest.mark.parametrize("training", [True, False])
def test_wherever_graphs_end_the_network_is_the_same(monkeypatch, training):
    monkeypatch.setattr(graph_boundary, "compile_alone", lambda fn: fn)
    monkeypatch.setattr(graph_boundary, "compiled_rows", lambda options: PLAIN_ROWS)
    cfg = SMALL["nfnet"]
    params, x = random_params(cfg), images(cfg)
    expected = model.apply(cfg, params, x)
    made = graph_boundary.networks(cfg, CPU, training=training)
    assert len(made) == 5
    for name, net in made.items():
        assert relative(net(params, x), expected) < 1e-6, name


def test_an_unusable_device_is_refused(capsys):
    assert run.main(["training", "--device", "cuda:99", "--no-write"]) == 2
    assert "cuda:99" in capsys.readouterr().err


@pytest.mark.parametrize("way", list(grouped_conv.ways()))
def test_every_way_to_a_grouped_convolution_is_that_convolution(way):
    conv, last = grouped_conv.ways()[way]
    g = generator()
    x, w = torch.randn(2, 12, 5, 6, generator=g), torch.randn(12, 4, 3, 3, generator=g)
    layout = torch.channels_last if last else torch.contiguous_format
    results = []
    for fn in (grouped_conv.by_torch, conv):
        a, b = (t.clone(memory_format=torch.contiguous_format).requires_grad_() for t in (x, w))
        y = fn(a.to(memory_format=layout), b.to(memory_format=layout), 3)
        results.append((y, *torch.autograd.grad(y.square().sum(), (a, b))))
    for ours, theirs in zip(results[1], results[0], strict=True):
        assert relative(ours.detach(), theirs.detach()) < 1e-5


def test_the_grouped_convolutions_are_those_of_the_plan():
    found = grouped_conv.layers("nfnet-f0", 192)
    assert [(x.channels, x.groups, x.size, x.number) for x in found] == [
        (128, 1, 48, 2),
        (256, 2, 24, 3),
        (768, 6, 12, 11),
        (768, 6, 6, 5),
    ]


def test_all_suites_have_a_job_and_what_is_left_of_the_time(monkeypatch, capsys):
    jobs = everything.jobs(["nfnet-f0", "nfnet-f1"])
    assert {job.suite for job in jobs} == set(against_timm.SUITES)
    assert len(set(jobs)) == len(jobs)
    started: list[list[str]] = []

    def run_one(command: list[str], *, timeout: float, check: bool) -> subprocess.CompletedProcess[bytes]:
        started.append(command[2:])
        if len(started) == 3:
            raise subprocess.TimeoutExpired(command, timeout)
        return subprocess.CompletedProcess(command, returncode=len(started) - 1)

    monkeypatch.setattr(subprocess, "run", run_one)
    status = run.main(["all", "--quick", "--models", "nfnet-f1", "--budget", "100", "--output", "x"])
    assert status == 1
    assert started[0] == ["training", "--models", "nfnet-f1", "--label", "nfnet-f1", "--quick", "--output", "x"]
    said = capsys.readouterr().err.splitlines()
    assert said[0].startswith("benchmarks/run.py: training nfnet-f1: done")
    assert "failed with status 1" in said[1]
    assert "no time left" in said[2]
    assert len(started) == len(said)  # the others had their turn
    started.clear()
    assert run.main(["all", "--budget", "0"]) == 1
    assert not started


@pytest.mark.slow
def test_it_runs_without_being_installed(tmp_path):
    """As a script from anywhere, with nothing but the sources beside it."""
    script = str(ROOT / "benchmarks" / "run.py")
    command = [
        sys.executable,
        "-I",
        script,
        "optimizer",
        "--quick",
        "--eager",
        "--rounds",
        "1",
        "--output",
        str(tmp_path),
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    assert "nfzoo eager" in next(tmp_path.glob("*-cpu-optimizer.md")).read_text()


@pytest.mark.parametrize(
    "suite",
    [
        *(pytest.param(suite, marks=pytest.mark.slow) for suite in ("inference", "training", "grouped")),
        *(pytest.param(suite, marks=pytest.mark.long) for suite in ("memory", "headline", "layout", "profile")),
    ],
)
def test_every_suite_runs(suite, tmp_path, capsys):
    options = ["--quick", "--eager", "--rounds", "1", "--device", "cpu", "--output", str(tmp_path)]
    models = [] if suite == "headline" else ["--models", "nfnet-f0"]
    assert run.main([suite, *options, *models]) == 0
    assert "| nf" in capsys.readouterr().out or suite == "profile"
    assert len(list(tmp_path.glob("*.md"))) == 1


def test_training_takes_the_layout_that_nfzoo_train_has():
    work = contenders.Work(CPU, torch.float32, channels_last=True)
    with pytest.raises(ValueError, match="chooses the memory format"):
        contenders.train_nfzoo("nfnet-test", work, batch=8, size=32, compiled=False)


@pytest.mark.slow
def test_memory_is_measured_beside_its_estimate(capsys: pytest.CaptureFixture[str]) -> None:
    assert training_memory.main(["--quick"]) == 0
    row = capsys.readouterr().out.splitlines()[-1]
    measured, estimated = (float(cell.replace(",", "")) for cell in row.split("|")[4:6])
    assert measured > estimated > 4  # a small network's estimate leaves out what every process needs
