"""Checkpoints that several processes write together: whole, absent, or of the processes that are there to read them."""

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_tensor

from nfzoo.checkpoint import run_state, shards
from nfzoo.checkpoint.run_state import latest_state, save_state
from nfzoo.errors import CheckpointError
from tests.support.forks import FORK

Body = Callable[[Path, int, Any], object]
FULL = {
    "even": torch.arange(24.0).reshape(6, 4),
    "odd": torch.arange(15.0).reshape(5, 3),
    "one": torch.tensor([7.0]),  # of which the second process has nothing
    "half": torch.arange(8, dtype=torch.bfloat16),
}
STEP = torch.tensor(5.0)  # of which each process has all


def content(group: Any, factor: float = 1.0) -> dict[str, dict[str, torch.Tensor]]:
    mesh = DeviceMesh.from_group(group, "cpu")
    held: dict[str, torch.Tensor] = {name: distribute_tensor(t * factor, mesh, [Shard(0)]) for name, t in FULL.items()}
    return {"model": held, "optimizer": {"even::step": STEP}}


def in_group(folder: Path, body: Body, world: int = 2) -> None:
    """Call `body(folder, rank, group)` in several processes, all of which must come to its end."""
    meeting = folder / f"meeting-{body.__name__}"
    started = [FORK.Process(target=_member, args=(meeting, rank, world, body, folder)) for rank in range(world)]
    for process in started:
        process.start()
    try:
        for process in started:
            process.join(60)
        assert [process.exitcode for process in started] == [0] * world
    finally:
        for process in started:
            process.kill()
    meeting.unlink(missing_ok=True)


def _member(meeting: Path, rank: int, world: int, body: Body, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world)
    body(folder, rank, dist.new_group(backend="gloo"))
    dist.destroy_process_group()


def save(folder: Path, rank: int, group: Any) -> None:
    save_state(folder, 3, content(group), {"rank": rank}, group=group)


def test_every_process_writes_its_part_and_one_reads_all(tmp_path: Path) -> None:
    in_group(tmp_path, save)
    saved = latest_state(tmp_path)
    assert saved is not None
    assert (saved.step, saved.facts["rank"]) == (3, 0)
    assert len(saved.facts["files"]) == 2
    found = saved.tensors("model")
    assert found.keys() == FULL.keys()
    for name, tensor in FULL.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name
    assert torch.equal(saved.tensors("optimizer")["even::step"], STEP)
    sizes = []
    for name in saved.facts["files"]:
        with safe_open(saved.folder / name, framework="pt") as file:
            sizes.append(len(file.get_tensor("model/even")))
    assert sizes == [3, 3]  # neither holds what the other does


def test_three_processes_write_and_a_step_that_is_there_stays(tmp_path: Path) -> None:
    def twice(folder: Path, rank: int, group: Any) -> None:
        save_state(folder, 3, content(group), {}, group=group)
        save_state(folder, 3, content(group, factor=2.0), {}, group=group)
        save_state(folder, 4, content(group, factor=3.0), {}, group=group, keep=1)

    in_group(tmp_path, twice, world=3)
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000004"]
    saved = latest_state(tmp_path)
    assert saved is not None
    assert torch.equal(saved.tensors("model")["odd"], 3.0 * FULL["odd"])


def test_one_process_that_cannot_write_is_an_error_of_all_and_leaves_nothing(tmp_path: Path) -> None:
    def fail(folder: Path, rank: int, group: Any) -> None:
        if rank == 1:
            FileSystemWriter._write_data = _full  # type: ignore[method-assign]
        with pytest.raises(OSError, match=r"process 1 could not write its part: .*No space left"):
            save_state(folder, 4, content(group), {}, group=group)

    in_group(tmp_path, save)
    in_group(tmp_path, fail)
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000003"]


def _full(*_: object) -> None:
    raise OSError(28, "No space left on device")


def test_the_first_process_that_fails_early_keeps_no_other_waiting(tmp_path: Path) -> None:
    def fail(folder: Path, rank: int, group: Any) -> None:
        if rank == 0:
            run_state.replaced_folder = _full  # type: ignore[assignment]
            with pytest.raises(OSError, match="No space left"):
                save(folder, rank, group)
        else:
            save(folder, rank, group)

    in_group(tmp_path, fail)
    assert list(tmp_path.iterdir()) == []


def test_folders_that_are_not_shared_are_noticed(tmp_path: Path) -> None:
    def elsewhere(folder: Path, rank: int, group: Any) -> None:
        if rank == 0:
            with pytest.raises(OSError, match="a folder that all processes share"):
                save(folder, rank, group)
        else:
            broadcast = dist.broadcast_object_list

            def on_its_own_disk(named: list[str | None], **how: object) -> None:
                broadcast(named, **how)  # type: ignore[arg-type]
                named[0] = str(folder / "own")

            shards.dist = SimpleNamespace(broadcast_object_list=on_its_own_disk)  # type: ignore[assignment]
            save(folder, rank, group)

    in_group(tmp_path, elsewhere)
    assert latest_state(tmp_path) is None


def test_a_damaged_or_missing_part_is_passed_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def two(folder: Path, rank: int, group: Any) -> None:
        save_state(folder, 3, content(group), {}, group=group)
        save_state(folder, 4, content(group), {}, group=group)

    in_group(tmp_path, two)
    part = tmp_path / "step_00000004" / "shard-00002-model-00001-of-00001.safetensors"
    whole = part.read_bytes()
    part.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with caplog.at_level(logging.WARNING, logger="nfzoo"):
        saved = latest_state(tmp_path)
    assert saved is not None
    assert saved.step == 3
    assert f"{part.name} is damaged" in caplog.text
    part.write_bytes(whole[:50])
    with pytest.raises(CheckpointError, match="is damaged"):
        run_state.Saved(part.parent, {"files": {part.name: 50}}).tensors("model")


def test_files_that_the_checkpoint_does_not_list_are_not_read(tmp_path: Path) -> None:
    def others(folder: Path, rank: int, group: Any) -> None:
        save_state(folder / "other", 3, content(group, factor=2.0), {}, group=group)

    in_group(tmp_path, save)
    in_group(tmp_path, others)
    folder, name = tmp_path / "step_00000003", "shard-0000{}-model-00001-of-00001.safetensors"
    alone = save_state(tmp_path / "alone", 3, {"model": {"even": FULL["even"]}}, {})
    for number, of in ((3, 1), (4, 2)):  # as a run of more processes leaves them, copied over
        for place in (folder, alone):
            shutil.copy(tmp_path / "other" / "step_00000003" / name.format(of), place / name.format(number))
    found = run_state.open_state(folder).tensors("model")
    assert {key: torch.equal(tensor, FULL[key]) for key, tensor in found.items()} == dict.fromkeys(FULL, True)
    assert torch.equal(run_state.open_state(alone).tensors("model")["even"], FULL["even"])


def test_parts_that_do_not_make_a_whole(tmp_path: Path) -> None:
    in_group(tmp_path, save)
    first, second = sorted((tmp_path / "step_00000003").glob("shard-*"))
    with pytest.raises(CheckpointError, match=r"is damaged \(its files hold 12 of 24 numbers of model/even\)"):
        shards.load_full([second], "model/")
    with pytest.raises(CheckpointError, match=r"is damaged \(its files hold 24 of 12 numbers of model/even\)"):
        shards.load_full([first, first], "model/")
    endless = {"DCP_SHARDING_INFO": '{"model/a": {"saved_offsets": [1000000000000]}}'}
    save_file({"model/a": torch.ones(1)}, tmp_path / "endless", endless)
    plain = tmp_path / "plain"
    save_file({"model/a": torch.ones(1)}, plain)
    for path, reason in ((tmp_path / "endless", "1 of 1000000000001 numbers"), (plain, "DCP_SHARDING_INFO")):
        with pytest.raises(CheckpointError, match=reason):
            shards.load_full([path], "model/")
