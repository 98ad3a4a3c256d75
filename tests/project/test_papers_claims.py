"""The parts of the tests of the papers' claims: that each compares what it says it compares."""

import gzip
import json
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.claims import independence, mode_gap, per_example_clipping, small_claims, together
from benchmarks.claims.photographs import described, photographs, spread
from benchmarks.claims.stability import CONFIG, WEIGHT_DECAY, Data, digits
from benchmarks.claims.together import KINDS, Store, clip_by, nf, no_clip, twin
from nfzoo.analysis.signal_propagation import open_branches
from nfzoo.errors import DataError
from nfzoo.model import apply, init
from nfzoo.optim.sgd import DECAYED, sgd, sgd_init, warmup_cosine
from nfzoo.step import cross_entropy
from tests.support.helpers import generator, relative

ROUNDING = 2e-5  # float32 sums in another order, through 26 layers


def small(images: int = 16) -> Data:
    (a, b), (c, d) = digits()
    return Data((a[:images], b[:images]), (c[:16], d[:16]))


def opened() -> dict[str, torch.Tensor]:
    return open_branches(CONFIG, init(CONFIG, generator=generator()))


def flat(params: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([p.flatten() for p in params.values()])


def write_idx(folder: Path, pixels: np.ndarray, labels: np.ndarray) -> Path:
    folder.mkdir(parents=True)
    for part in ("train", "t10k"):
        for kind, array in (("images-idx3", pixels), ("labels-idx1", labels)):
            header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
            (folder / f"{part}-{kind}-ubyte.gz").write_bytes(gzip.compress(header + array.tobytes()))
    return folder


# ---------------------------------------------------------------- data


def test_photographs_are_standardised_and_always_the_same(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (12, 28, 28), np.uint8)
    folder = write_idx(tmp_path / "fashion-mnist", pixels, np.arange(12, dtype=np.uint8) % 10)
    data = photographs(str(folder), train=8, held_out=5)
    (x, y), (held, labels) = data
    assert x.shape == (8, 1, 28, 28)
    assert held.shape == (5, 1, 28, 28)
    assert float(x.mean()) == pytest.approx(0, abs=1e-5)
    assert float(x.std()) == pytest.approx(1, abs=1e-5)
    for image, label in zip(x, y, strict=True):  # each is the photograph of its label
        own = [p for p, wanted in zip(pixels, np.arange(12) % 10, strict=True) if wanted == label]
        assert any(np.corrcoef(image.flatten(), p.flatten())[0, 1] > 0.999 for p in own)
    assert labels.shape == (5,)
    again = photographs(str(folder), train=8, held_out=5)
    assert torch.equal(again.train[0], x)
    assert described(data, str(folder)) == "fashion-mnist, 8 images of 28 x 28 pixels, 5 held out"
    with pytest.raises(DataError, match="has 12 of the 13 images"):
        photographs(str(folder), train=13, held_out=5)


def test_images_of_several_sizes_are_refused(tmp_path: Path) -> None:
    from PIL import Image

    for part in ("train", "val"):
        for name, size in (("a", 8), ("b", 9)):
            (tmp_path / part / name).mkdir(parents=True)
            Image.new("L", (size, 8)).save(tmp_path / part / name / "1.png")
    with pytest.raises(DataError, match="such as 8 x 8 and 9 x 8; resize"):
        photographs(str(tmp_path), train=2, held_out=2)


def test_the_spread_is_that_of_a_sample() -> None:
    mean, std = spread([1.0, 2.0, 6.0])
    assert (mean, std) == (3.0, pytest.approx(7**0.5))
    assert spread([5.0]) == (5.0, 0.0)


# ---------------------------------------------------------------- training


def test_networks_trained_together_are_networks_trained_alone() -> None:
    data, seeds, rates, batch = small(), (3, 5), (0.02, 0.1), 8
    found = together.fit(nf(clip_by(0.04)), data, seeds=seeds, rates=rates, batch=batch, epochs=1)
    assert found.runs == [(3, 0.02), (3, 0.1), (5, 0.02), (5, 0.1)]
    for row, (seed, peak) in enumerate(found.runs):
        params = init(CONFIG, generator=generator(seed))
        state = sgd_init(params)
        order = torch.randperm(16, generator=generator(seed + 1))
        for i in range(2):
            x, y = (t[order[i * batch : (i + 1) * batch]] for t in data.train)
            grads = torch.func.grad(lambda p, x=x, y=y: cross_entropy(apply(CONFIG, p, x), y))(params)
            params, state = sgd(
                params,
                clip_by(0.04)(grads, params),
                state,
                lr=warmup_cosine(i, peak=peak, warmup=1, total=2),
                weight_decay=WEIGHT_DECAY,
                decay=lambda name: KINDS[name] in DECAYED,
            )
        for name, p in params.items():
            assert torch.allclose(found.one(row)[0][name], p, rtol=1e-3, atol=1e-4), (seed, name)


def test_what_is_stored_is_not_computed_again(tmp_path: Path) -> None:
    store, calls = Store(tmp_path / "a.jsonl"), []

    def compute() -> list[dict[str, float]]:
        calls.append(1)
        return [{"x": 1.0}, {"x": 2.0}]

    rows = store.get({"test": "a"}, compute)
    assert rows == [{"test": "a", "x": 1.0}, {"test": "a", "x": 2.0}]
    assert Store(tmp_path / "a.jsonl").get({"test": "a"}, compute) == rows
    assert len(calls) == 1
    store.get({"test": "b"}, compute)
    assert len([json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]) == 4


def test_the_best_rate_is_that_of_the_mean() -> None:
    accuracies = {0.1: (0.9, 0.1), 0.2: (0.6, 0.6)}
    rows = [{"rate": rate, "accuracy": a} for rate, values in accuracies.items() for a in values]
    assert together.best_rate(rows) == (0.2, rows[2:])


# ---------------------------------------------------------------- clipping each example


def test_clipping_each_example_is_a_loop_over_examples() -> None:
    params, (x, y) = opened(), small(4).train
    clip = clip_by(0.01)
    grads = per_example_clipping.each_gradient(params, x, y)
    grad = torch.func.grad(lambda p, x, y: cross_entropy(apply(CONFIG, p, x), y))
    alone = [grad(params, x[i : i + 1], y[i : i + 1]) for i in range(4)]
    found = per_example_clipping.mean_of_clipped(grads, params, clip)
    unclipped = per_example_clipping.mean_of_clipped(grads, params, no_clip)
    whole = grad(params, x, y)
    loop = {name: torch.stack([clip(g, params)[name] for g in alone]).mean(0) for name in params}
    assert relative(flat(found), flat(loop)) < ROUNDING
    assert relative(flat(unclipped), flat(whole)) < ROUNDING
    assert relative(flat(found), flat(unclipped)) > 0.1


def test_examples_are_independent_up_to_where_they_are_clipped() -> None:
    found = per_example_clipping.dependence(opened(), 0.01, 4, digits(), examples=2)
    assert found["mates, each"] == pytest.approx(0, abs=1e-5)
    assert found["halves, each"] == pytest.approx(0, abs=1e-5)
    assert found["mates, mean"] > 0.01
    assert found["halves, mean"] > 0.01
    assert 0 < found["alignment"] < 0.9999


def test_the_clipping_page_says_what_the_rows_say(tmp_path: Path) -> None:
    plan = per_example_clipping.Plan(batches=(8,), thresholds=(0.01,), rates=(0.1, 0.4), seeds=(0, 1))
    rows = [
        {
            "test": "training",
            "way": way,
            "threshold": t,
            "batch": 8,
            "seed": seed,
            "rate": rate,
            "accuracy": a + seed / 10,
        }
        | {"clipped": 0.25}
        for way, t, level in (("none", 0.0, 0.2), ("mean", 0.01, 0.5), ("each", 0.01, 0.6))
        for seed in (0, 1)
        for rate, a in ((0.1, level), (0.4, level - 0.1))
    ]
    distances = {"mates, mean": 0.5, "mates, each": 0.0, "halves, mean": 0.25, "halves, each": 1e-8, "alignment": 0.9}
    rows += [{"test": "dependence", "threshold": 0.01, "batch": 8, "seed": seed, **distances} for seed in (0, 1)]
    text = per_example_clipping.page(plan, rows, small(), "digits", "the command")
    assert "| 8 | 0.01 | the mean gradient | 0.1 | 55.0 ± 7.1 | 25.0 ± 0.0 | 4 of 4 |" in text
    assert "| 8 | 0.01 | 0.50 ± 0.00 | 0 | 0.25 ± 0.00 | 1.0e-08 | 0.90 ± 0.00 |" in text
    per_example_clipping.draw(plan, rows, tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 5000


# ---------------------------------------------------------------- training mode and evaluation mode


def test_only_noise_and_statistics_make_a_gap(tmp_path: Path) -> None:
    data = small()
    found = {}
    for name, way in mode_gap.WAYS.items():
        if way.config is None:
            kind = twin()
            params, running = kind.start(generator())
        else:
            params, running = opened(), {}
        found[name] = mode_gap.gaps(way._replace(batch=8), params, running, data)
    gaps = {name: abs(row["held out gap loss"]) for name, row in found.items()}
    assert gaps.pop("NF, neither") == 0
    assert min(gaps.values()) > 1e-4, gaps
    rows = [{"way": name, "seed": 0, **row} for name, row in found.items()]
    text = mode_gap.page(mode_gap.Plan(), rows, data, "digits", "the command")
    assert "| NF, neither | 0 | 0 | 0 |" in text
    mode_gap.draw(rows, list(mode_gap.WAYS), tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 5000


# ---------------------------------------------------------------- the other sentences


def test_statistics_at_the_start() -> None:
    plan = small_claims.Plan(depths=(1, 2, 1, 1), widths=(64, 64, 64, 64), side=48)
    found = small_claims.streams(plan, digits(), 0, 0.2)
    assert found["noise, lowest"] <= found["noise, mean"] <= found["noise, highest"]
    assert 0.5 < found["noise, mean"] < 1.2
    towers = small_claims.towers(digits(), 0, channels=32)
    assert towers["plain, squared mean"] > 30 * towers["standardised, squared mean"]
    assert towers["plain, cosine"] > towers["standardised, cosine"] + 0.3
    gammas = small_claims.gammas(0, channels=64)
    assert all(abs(variance - 1) < 0.1 for variance in gammas.values())


def test_choices_spare_what_they_say() -> None:
    clipped = {
        name: {key for key in KINDS if spare is not None and not spare(key)}
        for name, spare in small_claims.CHOICES.items()
    }
    usual = clipped["all but classifier"]
    assert {KINDS[key] for key in KINDS.keys() - usual} == {"head", "skip_gain"}
    assert clipped["classifier too"] - usual == {"head.weight"}
    assert {key.split(".")[0] for key in usual - clipped["not the first convolution"]} == {"stem"}
    for stage in range(4):
        gone = usual - clipped[f"not stage {stage + 1}"]
        assert gone
        assert all(key.startswith(f"stages.{stage}.") for key in gone)
    assert not clipped["nothing"]


def test_layer_wise_clipping_scales_whole_tensors_to_a_threshold() -> None:
    params = {name: p.double() for name, p in opened().items()}
    grads = {name: torch.full_like(p, 0.1) for name, p in params.items()}
    grads["stem.conv.weight"] = 1e-9 * params["stem.conv.weight"]  # far below its threshold
    found = small_claims.clip_layers(0.04)(grads, params)
    for name, g in grads.items():
        free = KINDS[name] in ("head", "skip_gain") or name == "stem.conv.weight"
        limit = 0.04 * max(params[name].norm().item(), 1e-3)
        expected = g if free else g * (limit / g.norm())
        torch.testing.assert_close(found[name], expected, msg=name)


def test_lars_gives_each_kernel_a_gradient_of_its_own_norm() -> None:
    params = opened()
    grads = {name: 0.1 * torch.randn(p.shape, generator=generator()) for name, p in params.items()}
    for name, g in small_claims.lars(grads, params).items():
        scaled = KINDS[name] in ("weight", "head")
        expected = grads[name] * (params[name].norm() / grads[name].norm()) if scaled else grads[name]
        torch.testing.assert_close(g, expected, msg=name)


def test_sam_takes_its_gradient_where_the_ascent_leads() -> None:
    params, (x, y) = opened(), small(6).train
    grad = torch.func.grad(lambda p, x, y: cross_entropy(apply(CONFIG, p, x), y))
    for ascent, rows in (("same images", slice(2)), ("other images", slice(4, None))):
        up = grad(params, x[rows], y[rows])
        norm = torch.cat([g.flatten() for g in up.values()]).norm()
        at = {name: p + 0.05 * up[name] / norm for name, p in params.items()}
        expected = clip_by(0.04)(grad(at, x[:4], y[:4]), params)
        found, _ = small_claims.with_sam(4, 2, ascent).step(params, {}, x, y, {})
        assert relative(flat(found), flat(expected)) < 1e-4, ascent


def test_crops_are_parts_of_their_photographs() -> None:
    data = small(4)
    found = small_claims.crops(data, copies=2)
    assert found.train[0].shape == (8, 1, small_claims.CROP, small_claims.CROP)
    assert found.train[1].tolist() == data.train[1].tolist() * 2
    assert torch.equal(found.held_out[0], data.held_out[0])


def test_times_are_those_of_three_steps() -> None:
    plan = small_claims.Plan(depths=(1, 1, 1, 1), widths=(32, 32, 32, 32), rounds=2)
    found = small_claims.step_times(plan, 2, side=32)
    assert found["NF"] > 0
    assert set(found) == {"NF", "NF, AGC", "batch norm", "batch norm / NF", "batch norm / NF, AGC"}


@pytest.mark.slow
def test_all_sentences_make_a_page(tmp_path: Path) -> None:
    plan = small_claims.Plan(seeds=(0, 1), depths=(1, 1, 1, 1), widths=(32, 32, 32, 32), side=32, rounds=2)
    data = small(128)
    rows = small_claims.run(plan, Store(tmp_path / "a.jsonl"), data)
    text = small_claims.page(plan, rows, data, "digits", "the command")
    assert "## Layers that AGC clips" in text
    small_claims.draw(rows, tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 5000


# ---------------------------------------------------------------- independence


def test_the_page_of_independence_shows_all_seeds(tmp_path: Path) -> None:
    rows = [
        independence.Row(name, batch, *[v + seed * v for v in values])
        for name, values in (("NF-ResNet", (0.0, 0.0, 1e-7, 0.0)), ("batch norm", (0.5, 1.0, 2.0, 0.25)))
        for batch in independence.BATCHES
        for seed in (0, 1)
    ]
    extra = [
        {"test": "processes", "network": name, "seed": seed, "one": 0.5, "accumulated": 0.0}
        for name in independence.KINDS
        for seed in (0, 1)
    ] + [
        {"test": "training", "network": name, "batch": b, "seed": s, "rate": r, "accuracy": r * (s + 1)}
        for name in independence.KINDS
        for b in independence.SMALL_BATCHES
        for s in (0, 1)
        for r in (0.1, 0.4)
    ]
    text = independence.page(rows, "the command", small(), "digits", extra)
    assert "2 seed(s)" in text
    assert "| NF-ResNet | 2 | 0 | 0 | 1.5e-07 ± 7e-08 | 0 |" in text
    assert "| batch norm | 5.0e-01 ± 0e+00 | 0 |" in text
    assert "| batch norm | 2 | 0.4 | 60.0 ± 28.3 | 4 of 4 |" in text
    independence.draw(rows, tmp_path / "a.png", extra)
    assert (tmp_path / "a.png").stat().st_size > 5000


@pytest.mark.slow
def test_two_processes_are_one_that_accumulates() -> None:
    for name in independence.KINDS:
        found = independence.processes(name, 0, digits())
        assert found["accumulated"] == 0
        assert (found["one"] < 1e-3) == (name == "NF-ResNet")
