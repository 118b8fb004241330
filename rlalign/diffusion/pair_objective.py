"""The losses of DSO on the denoising errors of pairs, one number per pair."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from rlalign.diffusion.config_dso import DSOObjective
from rlalign.functional.preference import anchored_dro, floored_dro, flow_dpo, flow_dro

WITH_REFERENCE = ("dpo", "anchored_dro", "floored_dro")
"""Losses that compare with the generator as it came."""


@dataclass(frozen=True, eq=False, kw_only=True)
class PairErrors:
    """Denoising errors of some pairs."""

    win: Float[Tensor, " pairs"]
    lose: Float[Tensor, " pairs"] | None
    """None where they were not looked at."""
    win_ref: Float[Tensor, " pairs"] | None = None
    lose_ref: Float[Tensor, " pairs"] | None = None


def pair_objective(cfg: DSOObjective, errors: PairErrors) -> Float[Tensor, " pairs"]:
    """The loss of each pair; DRO and its safe variants add up that of the winner and that of the loser.

    Raises:
        ValueError: The loss needs errors that were not measured.
    """
    win, lose, win_ref, lose_ref = errors.win, errors.lose, errors.win_ref, errors.lose_ref
    if cfg.kind == "sft":
        return win
    if lose is None or (cfg.kind in WITH_REFERENCE and (win_ref is None or lose_ref is None)):
        raise ValueError(f"`objective.kind: {cfg.kind}` needs the errors of losers, and of both under the reference.")
    good, bad = torch.ones_like(win), -torch.ones_like(lose)
    if cfg.kind == "dro":
        return flow_dro(win, good) + flow_dro(lose, bad)
    assert win_ref is not None
    assert lose_ref is not None
    match cfg.kind:
        case "dpo":
            return flow_dpo(win, lose, win_ref, lose_ref, beta=cfg.beta)
        case "anchored_dro":
            return anchored_dro(win, win_ref, good, beta=cfg.beta) + anchored_dro(lose, lose_ref, bad, beta=cfg.beta)
    return floored_dro(win, win_ref, good, floor=cfg.floor) + floored_dro(lose, lose_ref, bad, floor=cfg.floor)
