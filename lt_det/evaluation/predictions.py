"""What a model found in one image, on the host."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

__all__ = ["ImagePredictions"]


@dataclass
class ImagePredictions:
    """Detections of one image, on the host.

    Attributes:
        image: rank of the image in the ground truth.
        category: (n,) int64 category ranks.
        score: (n,) float64. boxes: (n, 4) float64 x, y, width, height.
        mask_index: (m,) int64 detections whose masks are at hand, ascending; None without masks.
        bitmaps: (m, H, W) bool or uint8 of the image's size; None where ``roi_masks`` are given.
        roi_masks: (m, M, M) float32 probabilities, which belong into roi_boxes, (m, 4) float32 x0, y0, x1, y1.
    """

    image: int
    category: np.ndarray
    score: np.ndarray
    boxes: np.ndarray
    mask_index: np.ndarray | None = None
    bitmaps: np.ndarray | None = None
    roi_masks: np.ndarray | None = None
    roi_boxes: np.ndarray | None = None

    def encode(self, height: int, width: int, threshold: float = 0.5) -> tuple[np.ndarray, np.ndarray]:
        """Run lengths of the masks of ``mask_index``, flat, and offsets."""
        from . import _rle_kernels as kernels

        if self.roi_masks is not None:
            return kernels.paste_and_encode(self.roi_masks, self.roi_boxes, height, width, threshold)
        return kernels.encode_bitmaps(self.bitmaps)
