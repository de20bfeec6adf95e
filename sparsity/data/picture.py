"""One image file as a tensor."""

from collections.abc import Callable

import numpy
from torch import Tensor

from sparsity.errors import DataError


def reader(size: list[int], channels: int) -> Callable[[str], Tensor]:
    """A function from a path to an image [channels, height, width], uint8."""

    def read(path: str) -> Tensor:
        from PIL import Image
        from torchvision.transforms.v2.functional import pil_to_tensor, resize

        try:
            with Image.open(path) as image:
                if image.mode.startswith("I"):  # 16 bits of grey, which convert would cut off at 255
                    image = Image.fromarray((numpy.asarray(image).astype("int64") >> 8).clip(0, 255).astype("uint8"))
                pixels = pil_to_tensor(image.convert("L" if channels == 1 else "RGB"))
        except Exception as error:  # readers of many formats, which raise whatever they trip over
            raise DataError(f"data.root: {path} is no image that can be read: mend or remove it") from error
        return pixels if list(pixels.shape[1:]) == size else resize(pixels, size, antialias=True)

    return read
