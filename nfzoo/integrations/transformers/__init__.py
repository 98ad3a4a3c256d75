"""nfzoo's folders in transformers: importing this makes its Auto classes and `pipeline` load them.

    import nfzoo.integrations.transformers
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    model = AutoModelForImageClassification.from_pretrained("runs/digits")
    processor = AutoImageProcessor.from_pretrained("runs/digits")

The networks are `nfzoo.NFNet`'s blocks, and the pixels those of `NFNet.preprocess`.
"""

from __future__ import annotations

try:
    import transformers  # pyright: ignore[reportMissingImports]
except ModuleNotFoundError as error:
    if error.name != "transformers":
        raise
    raise ImportError("this needs transformers 5.4 or newer: pip install 'nfzoo[transformers]'") from None

if tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 4):
    raise ImportError(
        f"this needs transformers 5.4 or newer, and {transformers.__version__} is installed: "
        "pip install --upgrade 'nfzoo[transformers]'"
    )

from nfzoo.integrations.transformers.configuration import NFZooConfig
from nfzoo.integrations.transformers.image_processing import NFZooImageProcessor
from nfzoo.integrations.transformers.modeling import NFZooBackbone, NFZooForImageClassification
from nfzoo.integrations.transformers.registration import register

__all__ = ["NFZooBackbone", "NFZooConfig", "NFZooForImageClassification", "NFZooImageProcessor"]

register()
