"""Handwritten digits with a weak judge that can be fooled and a strong one that tells: over-optimisation in small.

The images are the 1,797 of 8 x 8 pixels that come with scikit-learn. A fixed split gives 1,200 to the generator and
holds out 597. The weak judge, a linear classifier trained on 150 images, is what a reward optimises; the strong one, a
support vector machine trained on the held-out images, and the distance between distributions show what that costs.
"""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

CLASSES = tuple("0123456789")
SIDE, PATCH = 8, 2
TOKENS, CHANNELS = (SIDE // PATCH) ** 2, PATCH**2
GENERATOR_IMAGES = 1200
PROXY_IMAGES = 150
COMPONENTS = 20
"""Of the principal component analysis in which the Frechet distance is taken."""
_SPLIT_SEED = 0


def training_set(count: int = GENERATOR_IMAGES, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Draw images without replacement from those that are not held out.

    Args:
        count: At most 1,200.
        seed: Of the order.

    Returns:
        Tokens, float32 [count, 16, 4]: 2 x 2 patches, pixels from -1 (paper) to 1 (ink); and labels, int64 [count].
    """
    images, labels = _split()[0]
    if not 1 <= count <= len(images):
        raise ValueError(f"`count`={count}, but there are {len(images)} images to train on; set `pretrain.count`.")
    rows = np.random.default_rng(seed).permutation(len(images))[:count]
    return patchify(images[rows]).astype(np.float32), labels[rows]


def patchify(images: np.ndarray) -> np.ndarray:
    """Cut images [B, 8, 8] into tokens [B, 16, 4]: patches row by row, pixels of a patch row by row."""
    rows = SIDE // PATCH
    cut = np.asarray(images).reshape(-1, rows, PATCH, rows, PATCH).transpose(0, 1, 3, 2, 4)
    return cut.reshape(-1, TOKENS, CHANNELS)


def unpatchify(tokens: np.ndarray) -> np.ndarray:
    """Put tokens [B, 16, 4] together to images [B, 8, 8]."""
    rows = SIDE // PATCH
    cut = np.asarray(tokens).reshape(-1, rows, rows, PATCH, PATCH).transpose(0, 1, 3, 2, 4)
    return cut.reshape(-1, SIDE, SIDE)


def pictures(samples: np.ndarray) -> np.ndarray:
    """Turn tokens into pictures of dark ink on white, uint8 [B, 8, 8]."""
    shade = np.nan_to_num((1 - np.clip(unpatchify(samples), -1, 1)) / 2, nan=1.0)
    return np.rint(255 * shade).astype(np.uint8)


class DigitJudge:
    """The weak judge as a proxy and the strong one as gold, as a simulator.

    It fits where samples alone are judged; to reward the digit that was asked for, use the function `margin`.
    Pixels are cut to [-1, 1] before they are judged, as an image file would cut them.
    """

    proxy, gold = "margin", "gold"

    def __init__(self) -> None:
        import sklearn

        self._weak, self._strong = _judges()
        self.settings: Mapping[str, Any] = {
            "task": "digits",
            "split_seed": _SPLIT_SEED,
            "proxy": f"logistic regression on {PROXY_IMAGES} images",
            "gold": "RBF support vector machine on the held-out images",
            "scikit_learn": sklearn.__version__,
        }

    def simulate(
        self, samples: np.ndarray, labels: np.ndarray | Sequence[int | str] | None = None
    ) -> dict[str, np.ndarray]:
        """Judge images.

        Args:
            samples: [B, 16, 4].
            labels: What each should show, indices or names; None takes what the weak judge sees.

        Returns:
            margin: Score of the label minus the best other one, by the weak judge: what a reward optimises.
            proxy_correct: 1 where the weak judge sees the label.
            gold: 1 where the strong judge sees the label. All [B], NaN for an image with a number that is not finite.
        """
        pixels = _flat(samples)
        known = np.isfinite(pixels).all(1)
        outcomes = {name: np.full(len(pixels), np.nan) for name in ("margin", "proxy_correct", "gold")}
        if known.any():
            scores = self._weak.decision_function(pixels[known])
            wanted = scores.argmax(1) if labels is None else _indices(labels, len(pixels))[known]
            rows = np.arange(len(scores))
            rest = scores.copy()
            rest[rows, wanted] = -np.inf
            outcomes["margin"][known] = scores[rows, wanted] - rest.max(1)
            outcomes["proxy_correct"][known] = scores.argmax(1) == wanted
            outcomes["gold"][known] = self._strong.predict(pixels[known]) == wanted
        return outcomes

    def close(self) -> None:
        """There is nothing to give back."""


def margin(samples: np.ndarray, prompts: Sequence[int | str], **columns: Any) -> list[float | None]:
    """Reward images by the weak judge's margin for the digit that `prompts` asks for; None where it is unknown."""
    found = DigitJudge().simulate(samples, prompts)["margin"]
    return [float(value) if np.isfinite(value) else None for value in found]


def measure(
    samples: np.ndarray,
    labels: np.ndarray | Sequence[int | str],
    *,
    reference: tuple[np.ndarray, np.ndarray] | None = None,
) -> dict[str, np.ndarray | float]:
    """Measure what a reward may destroy while it rises.

    Args:
        samples: [B, 16, 4].
        labels: What each should show, indices or names.
        reference: Samples and labels to compare with; None takes the held-out images.

    Returns:
        distance_to_data: [B]: root mean square over pixels to the nearest reference image of the class.
        diversity: The same distance between two samples of a class, averaged over its pairs, then over the classes.
        frechet_distance: Between Gaussians fitted to samples and reference, in 20 principal components of the
            reference. It grows as samples get fewer: compare equal numbers.
        gold_accuracy: Share of the images in which the strong judge sees the label.
    """
    pixels, wanted = _flat(samples), _indices(labels, len(samples))
    known, known_labels = _held_out() if reference is None else (_flat(reference[0]), np.asarray(reference[1]))
    fine = np.isfinite(pixels).all(1)
    distance, spread = np.full(len(pixels), np.nan), []
    for label in np.unique(wanted):
        rows = np.flatnonzero((wanted == label) & fine)
        distance[rows] = _distances(pixels[rows], known[known_labels == label]).min(1)
        if len(rows) > 1:
            spread.append(_distances(pixels[rows], pixels[rows]).sum() / (len(rows) * (len(rows) - 1)))
    strong = _judges()[1].predict(pixels[fine]) == wanted[fine] if fine.any() else np.array([np.nan])
    return {
        "distance_to_data": distance,
        "diversity": float(np.mean(spread)) if spread else float("nan"),
        "frechet_distance": frechet_distance(pixels[fine], known),
        "gold_accuracy": float(strong.mean()),
    }


def frechet_distance(samples: np.ndarray, reference: np.ndarray, components: int = COMPONENTS) -> float:
    """Return |m - m_r|^2 + tr(S + S_r - 2 (S S_r)^(1/2)) in the reference's first principal components.

    Args:
        samples: [B, D]; NaN is returned for fewer than 2.
        reference: [R, D].
        components: Of the projection; at most D.

    Reference:
        Heusel et al. 2017 (arXiv:1706.08500), eq. 6, on pixels instead of Inception features.
    """
    if len(samples) < 2:
        return float("nan")
    middle = reference.mean(0)
    basis = np.linalg.svd(reference - middle, full_matrices=False)[2][:components].T
    a, b = (samples - middle) @ basis, (reference - middle) @ basis
    cov_a, cov_b = np.cov(a.T), np.cov(b.T)
    values, vectors = np.linalg.eigh(cov_b)
    root = vectors * np.sqrt(np.maximum(values, 0)) @ vectors.T
    # tr (S S_r)^(1/2) through the symmetric S_r^(1/2) S S_r^(1/2), which has the same eigenvalues
    cross = np.sqrt(np.maximum(np.linalg.eigvalsh(root @ cov_a @ root), 0)).sum()
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(cov_a) + np.trace(cov_b) - 2 * cross)


def _flat(samples: np.ndarray) -> np.ndarray:
    samples = np.asarray(samples, dtype=np.float64)
    if samples.ndim != 3 or samples.shape[1:] != (TOKENS, CHANNELS):
        raise ValueError(f"expected samples [B, {TOKENS}, {CHANNELS}], got {samples.shape}.")
    return np.clip(unpatchify(samples), -1, 1).reshape(len(samples), -1)


def _indices(labels: np.ndarray | Sequence[int | str], count: int) -> np.ndarray:
    indices = np.asarray([int(label) for label in labels])
    if len(indices) != count or not ((indices >= 0) & (indices < len(CLASSES))).all():
        raise ValueError(f"expected {count} labels from 0 to 9, got {len(indices)}: {indices[:5]}...")
    return indices


def _distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    squared = (a**2).sum(1)[:, None] + (b**2).sum(1) - 2 * a @ b.T
    if a is b:
        np.fill_diagonal(squared, 0)
    return np.sqrt(np.maximum(squared, 0) / a.shape[1])


@lru_cache(maxsize=1)
def _split() -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """Images [n, 8, 8] and labels of the generator's share and of the held-out one."""
    from sklearn.datasets import load_digits

    pixels, target = (np.asarray(part) for part in load_digits(return_X_y=True))
    order = np.random.default_rng(_SPLIT_SEED).permutation(len(target))
    images, labels = pixels[order].reshape(-1, SIDE, SIDE) / 8 - 1, target[order].astype(np.int64)
    cut = GENERATOR_IMAGES
    return (images[:cut], labels[:cut]), (images[cut:], labels[cut:])


def _held_out() -> tuple[np.ndarray, np.ndarray]:
    images, labels = _split()[1]
    return images.reshape(len(images), -1), labels


@lru_cache(maxsize=1)
def _judges() -> tuple[Any, Any]:
    from sklearn.linear_model import LogisticRegression
    from sklearn.svm import SVC

    (images, labels), (held_out, held_out_labels) = _split()
    few = images[:PROXY_IMAGES].reshape(PROXY_IMAGES, -1)
    weak = LogisticRegression(max_iter=1000).fit(few, labels[:PROXY_IMAGES])
    strong = SVC().fit(held_out.reshape(len(held_out), -1), held_out_labels)
    return weak, strong
