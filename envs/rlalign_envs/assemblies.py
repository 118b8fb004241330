"""Objects of five welded boxes, in five classes, about half of which stand: data for a generator to be aligned.

An object is [5, 6]: per box the centre x, y, z and the log of its half sizes, z up, the ground at z = 0. The order of
the boxes is fixed within a class (a table is its top, then its four legs). What makes objects fall is where their
weight is, seen from where they touch the ground: legs off the middle, a long arm, a leaning stack.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np

CLASSES = ("table", "chair", "lamp", "crane", "tower")
BOXES = 5
HELD_OUT_SEED = 2**31 - 1
"""Of the objects that `measure` compares with; train on any other seed."""
HELD_OUT_COUNT = 2500

_CONTACT = 0.05
"""Boxes that end within this share of the object's height above its lowest point count as touching the ground."""
_GAP = 0.02
"""Boxes closer than this count as connected: generated faces never meet exactly."""


def training_set(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw objects of all classes in equal shares and random order.

    Args:
        count: How many.
        seed: The same seed gives the same objects.

    Returns:
        Objects, float32 [count, 5, 6], and labels, int64 [count]: indices into `CLASSES`.

    Example:
        >>> objects, labels = training_set(10, seed=0)
        >>> objects.shape, np.bincount(labels).tolist()
        ((10, 5, 6), [2, 2, 2, 2, 2])
    """
    if count < 1:
        raise ValueError(f"`count` must be >= 1, got {count}.")
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(count) % len(CLASSES))
    objects = np.empty((count, BOXES, 6))
    for label, name in enumerate(CLASSES):
        rows = labels == label
        objects[rows] = _MAKERS[name](rng, int(rows.sum()))
    return objects.astype(np.float32), labels.astype(np.int64)


def measure(
    objects: np.ndarray,
    labels: np.ndarray | Sequence[int | str],
    *,
    reference: tuple[np.ndarray, np.ndarray] | None = None,
) -> dict[str, np.ndarray | float]:
    """Measure what a reward may destroy while it rises: likeness to the data, variety, honest shapes.

    Args:
        objects: [B, 5, 6]. An object with a number that is not finite gets NaN everywhere.
        labels: Their classes, [B]: indices or names.
        reference: Objects and labels to compare with; None draws held-out ones of the same procedure.

    Returns:
        distance_to_data: [B]: distance to the nearest reference object of the class, each of the six coordinates
            divided by its deviation over all boxes of the reference, boxes in their order. Lower is nearer.
        diversity: One number: distance between two objects of a class, averaged over its pairs, then over the classes.
        base_area_ratio: [B]: area of the smallest rectangle around everything that touches the ground, divided by its
            mean over the reference objects of the class. Well above 1: stability is bought with base plates.
        volume: [B]: sum of the boxes' volumes; where boxes overlap both count.
        components: [B]: connected pieces, 1 in the data.
    """
    objects, labels = _checked(objects, labels)
    known, known_labels = _checked(*(_held_out() if reference is None else reference))
    missing = sorted(set(labels.tolist()) - set(known_labels.tolist()))
    if missing:
        raise ValueError(f"`reference` holds no object of class {missing}; it needs some of every class measured.")
    fine = np.isfinite(objects).all((1, 2))
    spread_of_data = known.std((0, 1))
    scale = np.where(spread_of_data > 1e-6, spread_of_data, 1.0)  # what never varies counts in its own unit
    distance, base = np.full((2, len(objects)), np.nan)
    spread = []
    for label in np.unique(labels):
        rows, data = np.flatnonzero((labels == label) & fine), known[known_labels == label]
        base[rows] = base_area(objects[rows]) / base_area(data).mean()
        flat, flat_data = (objects[rows] / scale).reshape(len(rows), -1), (data / scale).reshape(len(data), -1)
        distance[rows] = _distances(flat, flat_data).min(1)
        if len(rows) > 1:
            spread.append(_distances(flat, flat).sum() / (len(rows) * (len(rows) - 1)))
    return {
        "distance_to_data": distance,
        "diversity": float(np.mean(spread)) if spread else float("nan"),
        "base_area_ratio": base,
        "volume": volume(objects),
        "components": components(objects),
    }


def base_area(objects: np.ndarray) -> np.ndarray:
    """Return the area of the smallest axis-aligned rectangle around all boxes that touch the ground, [B]."""
    low, high = _corners(objects)
    ground = low[..., 2].min(1)
    tall = high[..., 2].max(1) - ground
    touching = low[..., 2] <= (ground + _CONTACT * tall)[:, None]
    left = np.where(touching[..., None], low[..., :2], np.inf).min(1)
    right = np.where(touching[..., None], high[..., :2], -np.inf).max(1)
    return (right - left).prod(-1)


def volume(objects: np.ndarray) -> np.ndarray:
    """Return the sum of the boxes' volumes, [B]; NaN for an object that is not finite."""
    objects = _blank(objects)
    return (8 * np.exp(objects[..., 3:].sum(-1))).sum(1)


def components(objects: np.ndarray) -> np.ndarray:
    """Count the connected pieces of each object, [B]; NaN for an object that is not finite."""
    low, high = _corners(_blank(objects))
    gap = np.maximum(low[:, :, None] - high[:, None], low[:, None] - high[:, :, None]).max(-1)
    reach = gap <= _GAP
    for _ in range(BOXES.bit_length()):  # squaring doubles the length of the paths that are found
        reach = reach @ reach
    first = ~(reach & np.tri(BOXES, k=-1, dtype=bool)).any(-1)  # a box that no earlier box is connected with
    count = first.sum(1).astype(float)
    return np.where(np.isfinite(low).all((1, 2)), count, np.nan)


def _checked(objects: np.ndarray, labels: np.ndarray | Sequence[int | str]) -> tuple[np.ndarray, np.ndarray]:
    objects = np.asarray(objects, dtype=np.float64)
    unknown = [label for label in labels if label not in CLASSES and label not in range(len(CLASSES))]
    if unknown:
        raise ValueError(f"`labels` holds {unknown[0]!r}; the classes are {', '.join(CLASSES)}, or 0 to 4.")
    indices = np.array([CLASSES.index(label) if isinstance(label, str) else int(label) for label in labels], dtype=int)
    if objects.ndim != 3 or objects.shape[1:] != (BOXES, 6) or len(indices) != len(objects):
        raise ValueError(
            f"expected objects [B, {BOXES}, 6] and a label for each, got {objects.shape} and {len(indices)} labels; "
            "pass the pipeline's `np` output, not its latents."
        )
    return objects, indices


def _blank(objects: np.ndarray) -> np.ndarray:
    """NaN for the whole object where one number is not finite."""
    return np.where(np.isfinite(objects).all((1, 2), keepdims=True), objects, np.nan)


@lru_cache(maxsize=1)
def _held_out() -> tuple[np.ndarray, np.ndarray]:
    return training_set(HELD_OUT_COUNT, HELD_OUT_SEED)


def _corners(objects: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    half = np.exp(objects[..., 3:])
    return objects[..., :3] - half, objects[..., :3] + half


def _distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    squared = (a**2).sum(1)[:, None] + (b**2).sum(1) - 2 * a @ b.T
    if a is b:
        np.fill_diagonal(squared, 0)
    return np.sqrt(np.maximum(squared, 0))


def _assemble(*boxes: tuple[np.ndarray | float, ...]) -> np.ndarray:
    """Six numbers per box, centre and half sizes, each [n] or a constant -> [n, 5, 6]."""
    numbers = np.stack(np.broadcast_arrays(*(number for box in boxes for number in box)), -1)
    objects = numbers.reshape(-1, BOXES, 6)
    objects[..., 3:] = np.log(objects[..., 3:])
    return objects


def _table(rng: np.random.Generator, n: int) -> np.ndarray:
    """A top on four legs that stand close together, off the middle of the top."""
    width, depth, thick = rng.uniform(0.35, 0.6, n), rng.uniform(0.3, 0.5, n), rng.uniform(0.03, 0.06, n)
    leg, tall = rng.uniform(0.03, 0.05, n), rng.uniform(0.25, 0.5, n)
    apart_x, apart_y = rng.uniform(0.1, 0.57, n) * width, rng.uniform(0.1, 0.57, n) * depth
    x = rng.uniform(-1, 1, n) * (width - apart_x - leg)
    y = rng.uniform(-1, 1, n) * (depth - apart_y - leg)
    legs = [(x + i * apart_x, y + j * apart_y, tall, leg, leg, tall) for i in (-1, 1) for j in (-1, 1)]
    return _assemble((0.0, 0.0, 2 * tall + thick, width, depth, thick), *legs)


def _chair(rng: np.random.Generator, n: int) -> np.ndarray:
    """A seat on two short runners, with a back and a headrest behind them."""
    width, depth, thick = rng.uniform(0.22, 0.32, n), rng.uniform(0.2, 0.3, n), rng.uniform(0.025, 0.045, n)
    tall, leg, run = rng.uniform(0.18, 0.28, n), rng.uniform(0.02, 0.04, n), rng.uniform(0.06, 0.26, n)
    back, back_thick = rng.uniform(0.2, 0.4, n), rng.uniform(0.02, 0.045, n)
    head, head_thick = rng.uniform(0.05, 0.1, n), rng.uniform(0.03, 0.06, n)
    y = rng.uniform(-0.3, 1.4, n) * (0.3 - run)
    x = rng.uniform(0.4, 1, n) * (width - leg)
    seat, rear = 2 * tall + thick, back_thick - depth
    top = seat + thick + 2 * back
    return _assemble(
        (0.0, 0.0, seat, width, depth, thick),
        (0.0, rear, seat + thick + back, width, back_thick, back),
        (-x, y, tall, leg, run, tall),
        (x, y, tall, leg, run, tall),
        (0.0, rear, top + head, rng.uniform(0.5, 1, n) * width, head_thick, head),
    )


def _lamp(rng: np.random.Generator, n: int) -> np.ndarray:
    """A shade on an arm, a small weight at the other end, a pole on a plate."""
    plate_x, plate_y, plate = rng.uniform(0.09, 0.26, n), rng.uniform(0.09, 0.26, n), rng.uniform(0.02, 0.05, n)
    pole, tall = rng.uniform(0.015, 0.03, n), rng.uniform(0.4, 0.7, n)
    reach, arm = rng.uniform(0.25, 0.75, n), rng.uniform(0.012, 0.025, n)
    shade, shade_tall = rng.uniform(0.08, 0.14, n), rng.uniform(0.06, 0.12, n)
    weight = rng.uniform(0.03, 0.09, n)
    top = 2 * plate + 2 * tall
    back = 0.1 + 0.25 * reach
    return _assemble(
        (0.0, 0.0, plate, plate_x, plate_y, plate),
        (0.0, 0.0, 2 * plate + tall, pole, pole, tall),
        ((reach - back) / 2, 0.0, top + arm, (reach + back) / 2, arm, arm),
        (reach, 0.0, top - shade_tall, shade, shade, shade_tall),
        (-back, 0.0, top - weight, weight, weight, weight),
    )


def _crane(rng: np.random.Generator, n: int) -> np.ndarray:
    """A jib on a mast with a counterweight behind and a load in front."""
    foot_x, foot_y, foot = rng.uniform(0.06, 0.24, n), rng.uniform(0.06, 0.24, n), rng.uniform(0.03, 0.06, n)
    mast, tall = rng.uniform(0.03, 0.06, n), rng.uniform(0.35, 0.65, n)
    front, rear, jib = rng.uniform(0.35, 0.75, n), rng.uniform(0.2, 0.4, n), rng.uniform(0.02, 0.04, n)
    counter, load = rng.uniform(0.05, 0.11, n), rng.uniform(0.08, 0.16, n)
    top = 2 * foot + 2 * tall
    return _assemble(
        (0.0, 0.0, foot, foot_x, foot_y, foot),
        (0.0, 0.0, 2 * foot + tall, mast, mast, tall),
        ((front - rear) / 2, 0.0, top + jib, (front + rear) / 2, jib, jib),
        (-rear + counter, 0.0, top + 2 * jib + counter, counter, counter, counter),
        (front - load, 0.0, top - load, load, load, load),
    )


def _tower(rng: np.random.Generator, n: int) -> np.ndarray:
    """Five blocks, each set off from the one below."""
    wide = rng.uniform(0.1, 0.2, (n, BOXES, 2))
    tall = rng.uniform(0.08, 0.16, (n, BOXES))
    shift = rng.uniform(-1, 1, (n, BOXES - 1, 2)) * rng.uniform(0.35, 0.98, (n, 1, 1)) * (wide[:, 1:] + wide[:, :-1])
    middle = np.concatenate([np.zeros((n, 1, 2)), np.cumsum(shift, 1)], 1)
    height = np.cumsum(2 * tall, 1) - tall
    return np.concatenate([middle, height[..., None], np.log(wide), np.log(tall)[..., None]], -1)


_MAKERS: dict[str, Callable[[np.random.Generator, int], np.ndarray]] = {
    "table": _table,
    "chair": _chair,
    "lamp": _lamp,
    "crane": _crane,
    "tower": _tower,
}
