"""The parts of the stability and independence benchmarks: that they compare what they say they compare."""

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.claims import batch_norm_twin, independence, stability, stacked_runs
from benchmarks.claims.independence import Network
from benchmarks.claims.stability import CONFIG, Cell, Grid, Run
from benchmarks.claims.stacked_runs import Data, Setting
from nfzoo.analysis.signal_propagation import open_branches
from nfzoo.model import apply, init, specs
from nfzoo.optim.clipping import agc
from nfzoo.optim.sgd import CLIPPED, DECAYED, sgd, sgd_init, warmup_cosine
from nfzoo.step import cross_entropy
from nfzoo.types import Params
from tests.support.helpers import generator, relative

ROUNDING = 2e-5  # float32 sums in another order, through 26 layers and a few steps of training


def inputs(batch: int, seed: int = 1) -> Tensor:
    return torch.randn((batch, 1, 16, 16), generator=generator(seed))


def small(images: int = 24) -> Data:
    whole = stability.digits()
    (a, b), (c, d) = whole
    return Data((a[:images], b[:images]), (c[:16], d[:16]))


def twin_params() -> Params:
    return batch_norm_twin.init(CONFIG, generator=generator())


# ---------------------------------------------------------------- the twin


def test_the_twin_has_the_same_convolutions() -> None:
    nf = {name: shape for name, (shape, _) in specs(CONFIG).items()}
    twin = {name: tuple(p.shape) for name, p in twin_params().items()}
    kernels = {name for name, shape in nf.items() if len(shape) >= 2}
    assert {name: nf[name] for name in kernels} == {name: twin[name] for name in kernels}
    assert {name for name in twin if len(twin[name]) >= 2} == kernels
    counts = [sum(math.prod(s) for s in shapes.values()) for shapes in (nf, twin)]
    assert counts[1] == pytest.approx(counts[0], rel=0.02)


def test_the_twin_normalises_before_every_activation() -> None:
    params, x = twin_params(), inputs(64)
    _, used = batch_norm_twin.apply(CONFIG, params, x)
    assert len(used) == 2 * len(batch_norm_twin.norms(CONFIG)) == 2 * (3 * sum(CONFIG.depths) + 1)
    logits, same = batch_norm_twin.apply(CONFIG, params, x, used)  # evaluation with the batch's own statistics
    assert relative(logits, batch_norm_twin.apply(CONFIG, params, x)[0]) < ROUNDING
    assert all(torch.equal(same[k], used[k]) for k in used)


def test_running_statistics_converge_to_those_of_a_repeated_batch() -> None:
    params, x = twin_params(), inputs(16)
    used = batch_norm_twin.apply(CONFIG, params, x)[1]
    running = batch_norm_twin.init_statistics(CONFIG)
    assert running.keys() == used.keys()
    for _ in range(200):  # 0.9 ** 200 is 7e-10
        running = batch_norm_twin.update(running, used)
    assert all(torch.allclose(running[k], used[k], rtol=1e-4, atol=1e-5) for k in used)


def test_the_twin_mixes_examples_and_the_nf_network_does_not() -> None:
    x, other = inputs(8), inputs(8, seed=2)
    other[0] = x[0]
    nf = open_branches(CONFIG, init(CONFIG, generator=generator()))
    assert relative(apply(CONFIG, nf, other)[0], apply(CONFIG, nf, x)[0]) < ROUNDING
    twin = twin_params()
    assert (
        relative(batch_norm_twin.apply(CONFIG, twin, other)[0][0], batch_norm_twin.apply(CONFIG, twin, x)[0][0]) > 0.1
    )
    running = batch_norm_twin.apply(CONFIG, twin, x)[1]
    evaluated = [batch_norm_twin.apply(CONFIG, twin, batch, running)[0][0] for batch in (x, other)]
    assert relative(*evaluated) < ROUNDING  # the mixing is that of the training mode alone


# ---------------------------------------------------------------- training


def test_global_norm_bounds_the_norm_and_keeps_the_direction() -> None:
    grads = torch.tensor([[3.0, 0.0, 4.0], [0.3, 0.0, 0.4]])
    clipped = stacked_runs.clip_global(grads, torch.tensor([[1.0], [1.0]]))
    assert torch.allclose(clipped, torch.tensor([[0.6, 0.0, 0.8], [0.3, 0.0, 0.4]]))


def test_runs_trained_together_are_runs_trained_alone() -> None:
    data, batch, epochs = small(), 8, 1
    settings = [
        Setting(0.02, 0.04, seed=3, spare_skip_gains=True),
        Setting(0.1, 0.01, seed=4, skip_gain=0.3, eps=0.01),
        Setting(0.05, 0.02, seed=3, clip_head=True, warm_up=0.7),
    ]
    found = stacked_runs.train(CONFIG, "AGC", batch, settings, data=data, epochs=epochs)
    kinds = {name: kind for name, (_, kind) in specs(CONFIG).items()}
    steps = len(data.train[0]) * epochs // batch
    for row, setting in enumerate(settings):
        order = torch.randperm(len(data.train[0]), generator=generator(setting.seed + 1))
        params = init(CONFIG, generator=generator(setting.seed))
        params |= {name: p + setting.skip_gain for name, p in params.items() if kinds[name] == "skip_gain"}
        spared = {"skip_gain"} if setting.spare_skip_gains else set()
        spared |= set() if setting.clip_head else {"head"}
        state = sgd_init(params)
        for i in range(steps):
            part = order[i * batch : (i + 1) * batch]
            x, y = data.train[0][part], data.train[1][part]
            grads = torch.func.grad(lambda p, x=x, y=y: cross_entropy(apply(CONFIG, p, x), y))(params)
            clipped = agc(
                grads, params, clip=setting.limit, eps=setting.eps, where=lambda name, s=spared: kinds[name] not in s
            )
            params, state = sgd(
                params,
                clipped,
                state,
                lr=warmup_cosine(i, peak=setting.rate, warmup=max(1, round(steps * setting.warm_up)), total=steps),
                weight_decay=stacked_runs.WEIGHT_DECAY,
                decay=lambda name: kinds[name] in DECAYED,
            )
        for name, p in params.items():
            assert torch.allclose(found.params[name][row], p, rtol=1e-3, atol=1e-4), (setting, name)
    assert found.alive == [0, 1, 2]


def test_the_stacked_twin_is_the_twin() -> None:
    data, batch = small(), 12
    settings = [Setting(0.02, seed=1), Setting(0.1, seed=1)]
    found = stacked_runs.train(CONFIG, "none", batch, settings, data=data, epochs=1, twin=True)
    order = torch.randperm(len(data.train[0]), generator=generator(2))
    params = batch_norm_twin.init(CONFIG, generator=generator(1))
    running, state = batch_norm_twin.init_statistics(CONFIG), sgd_init(params)
    for i in range(2):
        part = order[i * batch : (i + 1) * batch]

        def loss(p: Params, part: Tensor = part) -> tuple[Tensor, Params]:
            logits, used = batch_norm_twin.apply(CONFIG, p, data.train[0][part])
            return cross_entropy(logits, data.train[1][part]), used

        grads, used = torch.func.grad(loss, has_aux=True)(params)
        rate = warmup_cosine(i, peak=0.1, warmup=1, total=2)
        decay = {name for name in params if name.endswith("weight")}
        params, state = sgd(
            params, grads, state, lr=rate, weight_decay=stacked_runs.WEIGHT_DECAY, decay=lambda n, d=decay: n in d
        )
        running = batch_norm_twin.update(running, used)
    for name, p in params.items():
        assert torch.allclose(found.params[name][1], p, rtol=1e-3, atol=1e-4), name
    for name, p in running.items():
        assert torch.allclose(found.running[name][1], p, rtol=1e-3, atol=1e-4), name
    ends = stacked_runs.evaluate(CONFIG, found, data=data, runs=2, steps=2, twin=True)
    logits = batch_norm_twin.apply(CONFIG, params, data.held_out[0], running)[0]
    assert ends[1].loss == pytest.approx(float(cross_entropy(logits, data.held_out[1])), rel=1e-3)
    assert ends[1].accuracy == pytest.approx(float((logits.argmax(1) == data.held_out[1]).float().mean()))


def test_agc_of_the_matrix_is_agc() -> None:
    kinds = {name: kind for name, (_, kind) in specs(CONFIG).items()}
    settings = [Setting(1.0, 0.04, spare_skip_gains=True), Setting(1.0, 0.16), Setting(1.0, 0.16, clip_head=True)]
    stack = stacked_runs.Stack(CONFIG, "AGC", settings, twin=False, device=torch.device("cpu"))
    grads = torch.randn(stack.matrix.shape, generator=generator(5)) * torch.tensor([[100.0], [1.0], [0.01]])
    clipped = stack.layout.unpack(stack.clipped(grads))
    separate, params = stack.layout.unpack(grads), stack.layout.unpack(stack.matrix)
    assert params.keys() == kinds.keys()
    for row, spared in enumerate(({"skip_gain", "head"}, {"head"}, set())):
        expected = agc(
            {name: g[row] for name, g in separate.items()},
            {name: p[row] for name, p in params.items()},
            clip=settings[row].limit,
            where=lambda name, spared=spared: kinds[name] not in spared,
        )
        for name, g in expected.items():
            assert torch.allclose(clipped[name][row], g, rtol=1e-5), (row, name)
        assert {"skip_gain", "head"} | CLIPPED == set(kinds.values())


def test_a_run_that_diverges_leaves_the_others_alone() -> None:
    data = small()
    mixed = stability.train("no clipping", 8, [(0.02, 0), (1e4, 0)], epochs=2, data=data)
    alone = stability.train("no clipping", 8, [(0.02, 0)], epochs=2, data=data)
    assert mixed[1].diverged_at is not None
    assert mixed[1].accuracy == 0
    assert mixed[0].diverged_at is None
    assert mixed[0].loss == pytest.approx(alone[0].loss, rel=1e-3)


# ---------------------------------------------------------------- the grid


def run(accuracy: float, *, rate: float = 1.0, seed: int = 0, diverged: int | None = None, method: str = "a") -> Run:
    return Run(method, 8, rate, seed, 1, accuracy, math.inf if diverged is not None else 0.5, diverged)


def test_usable_means_every_seed_near_the_best() -> None:
    best = run(0.98)
    found = stability.cells(
        [best, run(0.94, seed=1), run(0.98, rate=2.0), run(0.92, rate=2.0, seed=1), run(0.0, rate=4.0, diverged=3)]
    )
    assert found["a", 8, 1.0].accuracy == pytest.approx(0.96)
    assert found["a", 8, 1.0].usable
    assert not found["a", 8, 2.0].usable
    assert found["a", 8, 4.0] == Cell(None, 1, False)


def test_the_store_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple] = []

    def train(method, batch, pairs, *, epochs, data):  # type: ignore[no-untyped-def]
        calls.append((method, batch, tuple(pairs)))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return [
            Run(method, batch, r, seed, epochs, 0.5, math.inf if r > 1 else 1.0, 7 if r > 1 else None)
            for r, seed in pairs
        ]

    monkeypatch.setattr(stability, "train", train)
    grid = Grid(("no clipping", "AGC 0.04"), (8, 16), (1.0, 2.0), (0,), 2)
    store, data = tmp_path / "stability.jsonl", small()
    with pytest.raises(KeyboardInterrupt):
        stability.run_grid(grid, store, data=data)
    assert len(store.read_text().splitlines()) == 4
    json.loads(store.read_text().splitlines()[0], parse_constant=pytest.fail)  # no Infinity: it is no JSON
    runs = stability.run_grid(grid, store, data=data)
    assert [c[:2] for c in calls] == [
        ("no clipping", 16), ("AGC 0.04", 16), ("no clipping", 8), ("no clipping", 8), ("AGC 0.04", 8)
    ]  # fmt: skip
    assert len(runs) == len({r[:5] for r in runs}) == 8
    assert stability.run_grid(grid, store, data=data) == runs
    assert len(calls) == 5


def test_page_and_picture_say_what_the_runs_say(tmp_path: Path) -> None:
    grid = Grid(("no clipping", stability.TWIN), (8,), (0.25, 0.5, 1.0), (0,), 1)
    runs = [run(0.97, rate=0.25, method="no clipping"), run(0.95, rate=0.5, method="no clipping")]
    runs += [run(0.0, rate=1.0, diverged=2, method="no clipping")]
    runs += [run(a, rate=r, method=stability.TWIN) for a, r in ((0.5, 0.25), (0.98, 0.5), (0.96, 1.0))]
    text = stability.page(grid, runs, "the command")
    assert "| no clipping | 2 of 3 | 2 of 3 |" in text
    assert "| batch norm | 2 of 3 | 3 of 3 |" in text
    assert "| no clipping | 8 | 1/4 to 1/2 | 2 of 3 | 1/2 | 97.0% | 1/4 |" in text
    assert "best held-out accuracy of all: 98.0%" in text
    stability.draw(grid, stability.cells(runs), tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 5000


def test_the_reading_follows_from_the_counts() -> None:
    methods = ("no clipping", "global norm 1", "AGC 0.1", "AGC 0.2", "AGC 0.9, all", stability.TWIN)
    grid = Grid(methods, (8,), (0.25, 0.5, 1.0), (0,), 1)
    usable = dict(zip(methods, (0, 2, 1, 2, 3, 3), strict=True))
    runs = [
        run(0.9 if i < usable[method] else 0.5, rate=rate, method=method)
        for method in methods
        for i, rate in enumerate(grid.rates)
    ]
    assert stability.reading(grid, stability.cells(runs)) == (
        "The usable region of AGC 0.2 (2 cells) is larger than that of no clipping (0), as large as that of "
        "global norm 1 (2), smaller than that of batch norm (3)."
    )


# ---------------------------------------------------------------- independence


def test_independence_tells_the_networks_apart() -> None:
    nf, twin = open_branches(CONFIG, init(CONFIG, generator=generator())), twin_params()
    data = stability.digits()
    statistics = batch_norm_twin.apply(CONFIG, twin, data.train[0][:200])[1]
    rows = [
        independence.measure(name, net, 4, data, examples=1)
        for name, net in {
            "NF-ResNet": Network(nf, lambda p, x: apply(CONFIG, p, x), lambda p, x: apply(CONFIG, p, x)),
            "batch norm": Network(
                twin,
                lambda p, x: batch_norm_twin.apply(CONFIG, p, x)[0],
                lambda p, x: batch_norm_twin.apply(CONFIG, p, x, statistics)[0],
            ),
        }.items()
    ]
    assert max(rows[0][2:]) < ROUNDING
    assert rows[0].mode == 0
    assert min(rows[1][2:]) > 0.01


@pytest.mark.slow
def test_independence_after_training() -> None:
    data = stability.digits()
    for name, net in independence.networks(data, epochs=1).items():
        row = independence.measure(name, net, 8, data, examples=2)
        assert (max(row[2:]) < ROUNDING) == (name == "NF-ResNet")
        with torch.no_grad():
            accuracy = (net.evaluate(net.params, data.held_out[0]).argmax(1) == data.held_out[1]).float().mean()
        assert accuracy > 0.3  # chance is 0.1
