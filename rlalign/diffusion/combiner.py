"""How a pipeline makes one prediction of a step's denoiser outputs: read off the numbers, and checked against them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

_ROUNDINGS = 8
"""How many units of rounding the recombined prediction may differ by, root mean square."""


@dataclass(frozen=True)
class Combiner:
    """An affine combination of a step's outputs: classifier-free guidance in the order in which a pipeline adds it up.

    prediction = ± (b_base + Σ_i w_i (b_i - b_base))
    """

    base: int = 0
    others: tuple[int, ...] = ()
    weights: tuple[float, ...] = ()
    sign: int = 1

    def __call__(self, branches: Sequence[Float[Tensor, "batch *dims"]]) -> Float[Tensor, "batch *dims"]:
        """Combine the outputs, in their own dtype as the pipeline does."""
        base = branches[self.base]
        combined = base
        for index, weight in zip(self.others, self.weights, strict=True):
            combined = combined + weight * (branches[index] - base)
        return combined if self.sign > 0 else -combined


@runtime_checkable
class Guide(Protocol):
    """Makes predictions of a layout's outputs in another way than the pipeline."""

    def __call__(
        self, combiner: Combiner, branches: Sequence[Tensor], x: Tensor, rows: Tensor, steps: Tensor
    ) -> Tensor: ...


class NotCombined(ValueError):
    """The outputs of a step do not add up to the prediction that the scheduler got."""


def infer_combiner(
    branches: Sequence[Float[Tensor, "batch *dims"]],
    prediction: Float[Tensor, "batch *dims"],
    *,
    candidates: Sequence[float],
    known: Combiner | None = None,
) -> Combiner | None:
    """Find the combination of a step's outputs that its prediction is.

    Args:
        branches: The denoiser's outputs of the step, split where one call held several.
        prediction: What the pipeline gave to the scheduler.
        candidates: The numbers among the pipeline's arguments: a weight close to one of them is that number.
        known: The combiner of another step, preferred where it fits.

    Returns:
        The combiner, or None where the branches are equal, so that every weight would fit.

    Raises:
        NotCombined: No affine combination gives the prediction.
    """
    if len(branches) > 1 and _all_equal(branches):
        return None
    tried = [known] if known is not None and len(known.others) + 1 == len(branches) else []
    if tried and _error(tried[0](branches), prediction) == 0:
        return tried[0]
    tried += _proposals(branches, prediction, candidates)
    error, best = min(((_error(one(branches), prediction), one) for one in tried), key=lambda pair: pair[0])
    if error > _ROUNDINGS * torch.finfo(prediction.dtype).eps:
        raise NotCombined(
            f"the {len(branches)} outputs of the denoiser do not add up to the prediction that the scheduler got "
            f"(relative error {error:.1e}), so the pipeline does more than classifier-free guidance with it, such as "
            "`guidance_rescale` or a renormalisation. Switch that off, or replay by the pipeline's own code "
            "(`rollout.by_pipeline: true`; of a sampler, `by_pipeline=True`)."
        )
    return best


def _proposals(branches: Sequence[Tensor], prediction: Tensor, candidates: Sequence[float]) -> list[Combiner]:
    match len(branches):
        case 1:
            return [Combiner(), Combiner(sign=-1)]
        case 2:
            pairs = [(base, other, sign) for base, other in ((0, 1), (1, 0)) for sign in (1, -1)]
            return [one for pair in pairs for one in _two(branches, prediction, candidates, *pair)]
        case _:
            return [_several(branches, prediction, sign) for sign in (1, -1)]


def _two(
    branches: Sequence[Tensor], prediction: Tensor, candidates: Sequence[float], base: int, other: int, sign: int
) -> list[Combiner]:
    """The least-squares weight, and before it the candidate next to it: only the true number rounds as it did."""
    weight = _least_squares([branches[other] - branches[base]], sign * prediction - branches[base])[0]
    near = min(candidates, key=lambda value: abs(value - weight), default=weight)
    close = abs(near - weight) <= 0.05 * max(1.0, abs(weight))
    return [Combiner(base, (other,), (value,), sign) for value in ([near, weight] if close else [weight])]


def _several(branches: Sequence[Tensor], prediction: Tensor, sign: int) -> Combiner:
    base, *rest = branches
    weights = _least_squares([branch - base for branch in rest], sign * prediction - base)
    return Combiner(0, tuple(range(1, len(branches))), tuple(weights), sign)


def _least_squares(columns: Sequence[Tensor], target: Tensor) -> list[float]:
    matrix = torch.stack([column.flatten().double() for column in columns])
    gram, right = matrix @ matrix.T, matrix @ target.flatten().double()
    return (torch.linalg.pinv(gram, hermitian=True) @ right).tolist()


def _all_equal(branches: Sequence[Tensor]) -> bool:
    return all(_error(branch, branches[0]) <= torch.finfo(branch.dtype).eps for branch in branches[1:])


def _error(value: Tensor, target: Tensor) -> float:
    """Root mean square of the difference, relative to the target's."""
    norm = torch.linalg.vector_norm
    scale = norm(target.double())
    return float(norm(value.double() - target.double()) / scale.clamp(min=torch.finfo(torch.float32).tiny))
