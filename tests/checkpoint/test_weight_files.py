"""Safetensors files that other libraries accept, the same for equal tensors."""

import json

import torch
from safetensors import safe_open

from nfzoo.checkpoint.weight_files import save_tensors


def test_equal_tensors_are_equal_files_of_the_format_that_other_libraries_ask_for(tmp_path):
    tensors = {"b": torch.arange(6.0).reshape(2, 3).T, "a": torch.ones(1, dtype=torch.bfloat16)}
    text = json.dumps({"ü": '\x01\x7f"\\/ \n\u2028😀'}, ensure_ascii=False)
    files = set()
    for i in range(16):
        save_tensors(tmp_path / f"{i}.safetensors", tensors, {"nfzoo": text, "z": "", "a\tb": "\x1f"})
        files.add((tmp_path / f"{i}.safetensors").read_bytes())
    assert len(files) == 1
    with safe_open(tmp_path / "0.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt", "nfzoo": text, "z": "", "a\tb": "\x1f"}
        for key, value in tensors.items():
            assert torch.equal(file.get_tensor(key), value)
