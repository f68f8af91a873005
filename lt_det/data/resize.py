"""Resizing training images faster than PIL does, where that is worth a difference of one grey level."""

from __future__ import annotations

import numpy as np
import torch
from detectron2.data import transforms as T
from PIL import Image

__all__ = ["RESIZERS", "FastResizeShortestEdge"]

# What INPUT.RESIZE_WITH may be.
RESIZERS = ("pil", "torch", "cv2")


class _FastResizeTransform(T.ResizeTransform):
    """``ResizeTransform`` whose bilinear resizing of uint8 images is another library's."""

    def __init__(self, transform: T.ResizeTransform, library: str):
        super().__init__(transform.h, transform.w, transform.new_h, transform.new_w, transform.interp)
        self._library = library

    def apply_image(self, img: np.ndarray, interp: int | None = None) -> np.ndarray:
        interp = self.interp if interp is None else interp
        if img.dtype != np.uint8 or img.ndim != 3 or interp != Image.Resampling.BILINEAR:
            return super().apply_image(img, interp)
        if self._library == "cv2":
            if self.new_h < self.h or self.new_w < self.w:  # OpenCV does not smooth where it shrinks
                return super().apply_image(img, interp)
            import cv2

            resized = cv2.resize(np.ascontiguousarray(img), (self.new_w, self.new_h), interpolation=cv2.INTER_LINEAR)
            return resized.reshape(self.new_h, self.new_w, img.shape[2])
        pixels = torch.from_numpy(np.array(img, order="C")).permute(2, 0, 1)[None]
        resized = torch.nn.functional.interpolate(pixels, (self.new_h, self.new_w), mode="bilinear", antialias=True)
        return resized[0].permute(1, 2, 0).numpy()


class FastResizeShortestEdge(T.Augmentation):
    """Detectron2's ``ResizeShortestEdge`` with the pixels computed by torch or OpenCV.

    "torch" gives PIL's pixels but for one grey level in 1 of 3,000 values (the same filter, other rounding) in half of
    its time; "cv2", where the image is enlarged, within one grey level in a quarter of it, and is PIL where it shrinks.
    Measured on 64 photographs of LVIS at Base-LVIS.yaml's sizes (``tools/benchmarks/bench_mapper.py``).
    """

    def __init__(self, resize: T.ResizeShortestEdge, library: str):
        """
        Args:
            resize: what decides the size; it draws the same random numbers.
            library: "torch" or "cv2".

        Raises:
            ValueError: another library.
        """
        super().__init__()
        if library not in RESIZERS[1:]:
            raise ValueError(f"INPUT.RESIZE_WITH must be one of {', '.join(RESIZERS)}, got {library!r}.")
        self.resize, self.library = resize, library

    def get_transform(self, image: np.ndarray) -> T.Transform:
        transform = self.resize.get_transform(image)
        if isinstance(transform, T.ResizeTransform) and transform.interp == Image.Resampling.BILINEAR:
            return _FastResizeTransform(transform, self.library)
        return transform

    def __repr__(self) -> str:
        return f"{self.resize!r} by {self.library}"

    __str__ = __repr__
