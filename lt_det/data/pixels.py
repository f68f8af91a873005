"""Training images with Detectron2's pixels, to the last bit, in less time than it takes."""

from __future__ import annotations

import functools

import numpy as np
import torch
from detectron2.data import detection_utils
from detectron2.data import transforms as T
from detectron2.utils.file_io import PathManager
from PIL import Image
from torchvision.io import decode_jpeg

__all__ = ["FastResize", "enlarge", "read_image"]

_JPEG = b"\xff\xd8"
_BITS = 22  # see _resize_kernels.py


def read_image(file_name: str, format: str) -> np.ndarray:
    """Detectron2's ``read_image``: a JPEG that is not to be turned is decoded by torchvision, all others as there.

    Returns:
        ``(H, W, C)`` uint8.

    Raises:
        As ``detectron2.data.detection_utils.read_image``.
    """
    if format in ("BGR", "RGB"):
        with PathManager.open(file_name, "rb") as file:
            data = file.read()
        if data.startswith(_JPEG) and b"Exif" not in data and b"Orientation" not in data:
            try:
                pixels = decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8))
            except RuntimeError:  # damaged: Pillow says how
                pixels = None
            if pixels is not None and len(pixels) == 3:
                image = pixels.permute(1, 2, 0).numpy()
                return image[:, :, ::-1] if format == "BGR" else image
    return detection_utils.read_image(file_name, format=format)


@functools.lru_cache(maxsize=4096)
def _neighbours(length: int, new_length: int) -> tuple[np.ndarray, np.ndarray]:
    """``(2, new_length)``: the two pixels that each new pixel lies between, and their weights times 2^22.

    The arithmetic, in this order, is that of ``precompute_coeffs`` in Pillow's Resample.c for a triangle filter.
    """
    if length == new_length:
        at = np.arange(length, dtype=np.int64)
        return np.stack([at, at]), np.stack([np.full(length, 1 << _BITS), np.zeros(length)]).astype(np.int32)
    center = (np.arange(new_length) + 0.5) * (length / new_length)
    first = np.maximum((center - 1.0 + 0.5).astype(np.int64), 0)
    at = first + np.arange(3)[:, None]
    end = np.minimum((center + 1.0 + 0.5).astype(np.int64), length)
    weight = np.where(at < end, np.maximum(0.0, 1.0 - np.abs(at - center + 0.5)), 0.0)
    start = (weight > 0).argmax(0)  # at most two of the three are not zero, and they are neighbours
    both = np.minimum(start + np.arange(2)[:, None], 2)
    at, weight = np.minimum(np.take_along_axis(at, both, 0), length - 1), np.take_along_axis(weight, both, 0)
    weight[1, start == 2] = 0.0
    return at, (0.5 + weight / weight.sum(0) * (1 << _BITS)).astype(np.int32)


def enlarge(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """What Pillow's bilinear ``resize`` gives for an image that becomes no smaller.

    Args:
        image: ``(H, W, 3)`` uint8.
        height, width: at least H and W.

    Returns:
        ``(height, width, 3)`` uint8, whose planes are contiguous: the model wants them first.
    """
    from ._resize_kernels import enlarge as compiled

    reverse = image.strides[2] < 0
    pixels = np.ascontiguousarray(image[:, :, ::-1] if reverse else image)
    out = np.empty((3, height, width), np.uint8)
    compiled(pixels, *_neighbours(pixels.shape[1], width), *_neighbours(pixels.shape[0], height), reverse, out)
    return out.transpose(1, 2, 0)


class _FastResizeTransform(T.ResizeTransform):
    """``ResizeTransform`` that enlarges by :func:`enlarge`."""

    def apply_image(self, img: np.ndarray, interp: int | None = None) -> np.ndarray:
        bilinear = (self.interp if interp is None else interp) == Image.Resampling.BILINEAR
        grows = self.new_h >= self.h and self.new_w >= self.w  # else Pillow's order of x and y is its version's
        if bilinear and grows and img.dtype == np.uint8 and img.ndim == 3 and img.shape[2] == 3 and img.size:
            return enlarge(img, self.new_h, self.new_w)
        resized = super().apply_image(img, interp)
        # Pillow's memory is read only, and masks become tensors without a copy, which torch warns of.
        return resized if resized.flags.writeable else resized.copy()


class FastResize(T.Augmentation):
    """An augmentation of Detectron2 that resizes, with the same random numbers and pixels, in a fifth of the time."""

    def __init__(self, resize: T.Augmentation):
        """
        Args:
            resize: ``ResizeShortestEdge``, or another whose transform is a ``ResizeTransform``.
        """
        super().__init__()
        self.resize = resize
        enlarge(np.zeros((1, 1, 3), np.uint8), 1, 1)  # loads the compiled code once, before workers are forked

    def get_transform(self, image: np.ndarray) -> T.Transform:
        transform = self.resize.get_transform(image)
        if type(transform) is T.ResizeTransform:
            t = transform
            return _FastResizeTransform(t.h, t.w, t.new_h, t.new_w, t.interp)
        return transform

    def __repr__(self) -> str:
        return repr(self.resize)

    __str__ = __repr__
