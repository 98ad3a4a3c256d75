"""ONNX Runtime and OpenVINO among the ways to run a model."""

from nfzoo.benchmark.contenders import chosen
from nfzoo.nn import create
from tests.benchmark.test_contenders import check
from tests.support.helpers import random_params


def test_onnx_and_openvino_compute_what_the_model_computes() -> None:
    model = create("nfnet-test", num_classes=5)
    model.load_state_dict(random_params(model.config))
    results = check(model, chosen(["onnx", "openvino"], None))
    assert [(r.format, r.precision) for r in results] == [
        ("eager", "float32"),
        ("onnx", "float32"),
        ("onnx", "int8"),
        ("openvino", "float32"),
        ("openvino", "bf16"),
        ("openvino", "int8"),
    ]
