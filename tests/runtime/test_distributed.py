"""Several processes train what one does: plain, accumulated, with SAM, sharded, and with the work resumed by others."""

import json
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch._C._distributed_c10d import HashStore

import nfzoo
from nfzoo.runtime.distributed import agree_on_prefix, elastic_launcher, group_options
from nfzoo.train import run as train
from tests.support.processes import together

# Five float32 steps with sums in another order; a parameter is of order one.
TOLERANCE = 1e-5
COMMON = ["--model", "nfnet-test", "--data", "digits", "--epochs", "1", "--batch_size", "284"]
COMMON += ["--drop_rate", "0.2", "--stochastic_depth", "0.2", "--optim.warmup_epochs", "0", "--optim.lr", "0.4"]
COMMON += ["--optim.ema_decay", "0.9", "--train-size", "16", "--test-size", "16"]
MIXED = ["--augment.layers", "2", "--augment.mixup", "0.2", "--augment.cutmix", "true", "--augment.flip", "0"]

# What two processes run -> what one process runs to the same end.
SAME = {
    "plain": ([], []),
    "accumulated": (["--accumulation", "2"], ["--accumulation", "2"]),
    # SAM ascends in each process by itself: two processes are two parts of one.
    "sam": (["--optim.sam_rho", "0.05"], ["--optim.sam_rho", "0.05", "--accumulation", "2"]),
    "mixed": ([*MIXED, "--activation_checkpointing", "true"], MIXED),
    "adamw": (["--optim.name", "adamw", "--optim.lr", "0.002"], ["--optim.name", "adamw", "--optim.lr", "0.002"]),
    "norm": (
        ["--optim.clip", "null", "--optim.clip_norm", "0.5"],
        ["--optim.clip", "null", "--optim.clip_norm", "0.5"],
    ),
    "sharded": (["--sharding", "fsdp2"], []),
    "sharded-accumulated": (["--sharding", "fsdp2", "--accumulation", "2"], []),
    "sharded-norm": (["--sharding", "fsdp2", "--optim.clip_norm", "0.5"], ["--optim.clip_norm", "0.5"]),
    "sharded-adamw": (
        ["--sharding", "fsdp2", "--optim.name", "adamw", "--optim.lr", "0.002"],
        ["--optim.name", "adamw", "--optim.lr", "0.002"],
    ),
}

FAST = "mixed"
"""With recomputation; its gradients are summed."""


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def furthest(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[key] - b[key]).abs().max()) for key in a)


def train_together(folder: Path, names: Iterable[str]) -> Path:
    """Let two processes train each of these cases, into a folder of its name."""
    folder.mkdir(exist_ok=True)
    together(folder, [[*COMMON, *SAME[name][0], "--output", str(folder / name)] for name in names])
    return folder


def test_two_processes_train_what_one_does(tmp_path: Path) -> None:
    two = train_together(tmp_path / "two", [FAST])
    assert_one_trains_the_same(two, tmp_path / "one", FAST)


@pytest.mark.slow
def test_two_processes_train_what_one_does_in_every_case(tmp_path: Path) -> None:
    two = train_together(tmp_path / "two", SAME)
    found = {name: weights(two / name) for name in ("plain", "sam", "mixed", "adamw", "norm")}
    for name in ("sam", "mixed", "adamw", "norm"):  # the cases differ
        assert furthest(found["plain"], found[name]) > 100 * TOLERANCE, name
    for name in SAME:
        assert_one_trains_the_same(two, tmp_path / "one" / name, name)


def assert_one_trains_the_same(two: Path, one: Path, name: str) -> None:
    assert train.main([*COMMON, *SAME[name][1], "--output", str(one)]) == 0
    start = nfzoo.create("nfnet-test", generator=torch.Generator().manual_seed(0)).state_dict()
    assert furthest(weights(one), start) > 500 * TOLERANCE
    assert furthest(weights(one), weights(two / name)) < TOLERANCE
    rows = [json.loads((folder / "metrics.jsonl").read_text()) for folder in (one, two / name)]
    for key in ("train_loss", "train_accuracy", "clipped", "loss", "accuracy", "ema_accuracy"):
        assert rows[0][key] == pytest.approx(rows[1][key], abs=1e-4), key
    assert nfzoo.from_pretrained(two / name).labels == tuple("0123456789")


def test_a_process_without_a_launcher_asks_nobody_for_its_parent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getppid", lambda: 0)  # as in a container, where no process has this number
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    assert elastic_launcher() is None
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "run-7")
    assert elastic_launcher() == "run-7"


def test_processes_agree_whatever_earlier_ones_left_in_the_store() -> None:
    store, found = HashStore(), []
    for world in (3, 1, 3, 2):  # as machines go and come back
        with ThreadPoolExecutor(world) as pool:
            prefixes = set(pool.map(lambda rank, world=world: agree_on_prefix(store, rank, world), range(world)))
        assert len(prefixes) == 1
        found += prefixes
        store.set("nfzoo/asked/1", f"a process that ended before it had an answer, {world}")
    assert len(set(found)) == 4


def test_a_prefix_is_for_the_store_of_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    for value, options in ((None, {}), ("False", {}), ("True", {"init_method": "nfzoo-own-prefix://"})):
        monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
        if value is not None:
            monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", value)
        assert group_options() == options
