"""Features of rare and frequent categories in the plane."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

__all__ = ["plot_features"]

_COLOURS = {"r": "autumn", "f": "winter"}
_NAMES = {"r": "rare", "f": "frequent"}


def plot_features(
    models: Mapping[str, tuple[np.ndarray, np.ndarray]],
    names: Mapping[int, str],
    groups: Mapping[int, str],
    path: str | Path,
    *,
    title: str = "",
    seed: int = 0,
) -> dict[str, dict[str, float]]:
    """Draw a t-SNE of each model's features side by side, rare categories in warm colours and frequent ones in cold.

    Needs scikit-learn (``pip install lt_det[features]``).

    Args:
        models: by name, features (N, D) and their categories (N,), of the same boxes for all models.
        names: of the categories, written at the median of their points.
        groups: "r" or "f" of each category.
        path: of the picture.
        title: above it.
        seed: of t-SNE.

    Returns:
        For each model the mean silhouette (cosine distance, in [-1, 1]; before the projection to the plane) of
        the features of rare ("r") and frequent ("f") categories: how well each category stands apart.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from sklearn.manifold import TSNE
    from sklearn.metrics import silhouette_samples

    colours = {}
    for group, colormap in _COLOURS.items():
        mine = [c for c in names if groups[c] == group]
        for i, c in enumerate(mine):
            colours[c] = colormaps[colormap](0.1 + 0.7 * i / max(1, len(mine) - 1))
    figure = Figure(figsize=(5.2 * len(models), 5.4), layout="constrained")
    scores: dict[str, dict[str, float]] = {}
    for axes, (model, (features, labels)) in zip(figure.subplots(1, len(models), squeeze=False)[0], models.items()):
        silhouette = silhouette_samples(features, labels, metric="cosine")
        of_group = np.array([groups[c] for c in labels])
        scores[model] = {g: float(silhouette[of_group == g].mean()) for g in _COLOURS if (of_group == g).any()}
        perplexity = min(30, (len(features) - 1) / 3)
        points = TSNE(metric="cosine", init="pca" if features.shape[1] > 2 else "random", perplexity=perplexity,
                      random_state=seed).fit_transform(features.astype(np.float64))  # fmt: skip
        for c, name in names.items():
            mine = points[labels == c]
            marker = "o" if groups[c] == "f" else "^"
            axes.scatter(*mine.T, s=18, color=colours[c], marker=marker, linewidths=0, alpha=0.8)
            axes.annotate(name, np.median(mine, axis=0), fontsize=11, weight="bold", ha="center", va="center",
                          bbox={"boxstyle": "round,pad=0.1", "fc": "white", "ec": colours[c],
                                "alpha": 0.85})  # fmt: skip
        means = ", ".join(f"{_NAMES[g]} {value:+.2f}" for g, value in scores[model].items())
        axes.set_title(f"{model}\nsilhouette: {means}", fontsize=10)
        axes.set_xticks([])
        axes.set_yticks([])
    figure.suptitle(title)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    return scores
