"""The two predictions that adaptive projected guidance needs, among what a denoiser answered in a step."""

from collections.abc import Sequence

from torch import Tensor

from rlalign.diffusion.combiner import Combiner


def two_branches(branches: Sequence[Tensor]) -> None:
    """Refuse a step whose predictions are not one with and one without the condition.

    Raises:
        ValueError: There are more, or fewer.
    """
    if not branches:
        raise ValueError("the scheduler takes a step without a new prediction; switch caches of the denoiser off.")
    if len(branches) == 1:
        raise ValueError(
            "the pipeline asks its denoiser once per sample: no classifier-free guidance runs that could be projected. "
            "Pass guidance_scale > 1. A distilled model takes its guidance_scale as an input instead: Flux guides with "
            "true_cfg_scale > 1 and a negative prompt."
        )
    if len(branches) > 2:
        raise ValueError(
            f"the pipeline combines {len(branches)} predictions per sample, as skip-layer or perturbed-attention "
            "guidance do; adaptive projected guidance knows two. Switch the other guidance off."
        )


def weighed(combiner: Combiner, branches: Sequence[Tensor]) -> tuple[Tensor, Tensor, float]:
    """Conditional and unconditional prediction, and the guidance scale: above 1, it tells which of the two is which.

    Raises:
        ValueError: The scale is not above 1.
    """
    scale = combiner.weights[0]
    first, second = combiner.sign * branches[combiner.base], combiner.sign * branches[combiner.others[0]]
    if 0 <= scale <= 1:
        raise ValueError(
            f"the guidance scale is {max(scale, 1 - scale):.3g}; adaptive projected guidance needs one > 1."
        )
    return (second, first, scale) if scale > 1 else (first, second, 1 - scale)
