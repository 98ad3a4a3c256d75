"""The backend of XLA devices, method by method."""

from __future__ import annotations

import pytest
import torch
import torch_xla  # pyright: ignore[reportMissingImports]
import torch_xla.debug.metrics as metrics  # pyright: ignore[reportMissingImports]
import torch_xla.runtime as runtime  # pyright: ignore[reportMissingImports]

from nfzoo.runtime.device import backend, usable_device


def compilations() -> int:
    data = metrics.metric_data("CompileTime")
    return 0 if data is None else data[0]


def test_the_device() -> None:
    assert usable_device("xla").type == "xla"
    assert torch.zeros(1, device=usable_device("xla")).device.type == "xla"


def test_one_program_for_all_that_is_saved(device: torch.device) -> None:
    leaf = torch.tensor([2.0, 3.0]).to(device).requires_grad_()
    torch_xla.sync()
    pending = {"a": leaf * 3, "b": leaf.exp() + 1, "c": torch.arange(3)}
    before = compilations()
    saved = backend(device).to_cpu(pending)
    assert compilations() - before == 1
    assert {name: t.device.type for name, t in saved.items()} == dict.fromkeys("abc", "cpu")
    assert not any(t.requires_grad for t in saved.values())
    assert saved["a"].tolist() == [6.0, 9.0]
    torch.testing.assert_close(saved["b"], torch.tensor([2.0, 3.0]).exp() + 1)


@pytest.mark.parametrize("value", [0.0, 1.0, 0.1, 3.0])
def test_a_number_of_any_value_is_the_same_program(value: float, device: torch.device) -> None:
    x = torch.arange(4.0).to(device)

    def run(value: float) -> float:
        lr = backend(device).scalar(value)
        assert isinstance(lr, torch.Tensor)
        assert lr.shape == ()
        torch_xla.sync()
        out = (x * lr * 0.1 * 3.0).sum()
        torch_xla.sync()
        return out.item()

    run(0.7)
    before = compilations()
    assert run(value) == pytest.approx(6 * value * 0.3)
    assert compilations() == before


def test_gradients_become_the_mean_of_the_processes(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    """One process, which is told that it is one of four: the sum over one is divided by four."""
    monkeypatch.setenv("XLA_ALWAYS_ALLREDUCE", "1")
    monkeypatch.setattr(runtime, "world_size", lambda: 4)
    gradients = [torch.tensor([4.0, 8.0]).to(device), torch.ones(2, 2).to(device)]
    backend(device).all_reduce_mean(gradients)
    assert "all-reduce(" in torch_xla._XLAC._get_xla_tensors_hlo(gradients)
    assert gradients[0].cpu().tolist() == [1.0, 2.0]
    assert gradients[1].cpu().tolist() == [[0.25, 0.25], [0.25, 0.25]]
    monkeypatch.undo()
    backend(device).all_reduce_mean(gradients)
    assert gradients[0].cpu().tolist() == [1.0, 2.0]


def test_the_step_ends_where_it_is_marked(device: torch.device) -> None:
    chosen = backend(device)
    x = torch.ones(3).to(device)
    chosen.synchronize()
    out = x * 5
    before = metrics.metric_data("ExecuteTime")[0]
    chosen.step_mark()
    chosen.synchronize()
    assert metrics.metric_data("ExecuteTime")[0] == before + 1
    assert out.cpu().tolist() == [5.0] * 3
