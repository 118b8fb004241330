"""What an estimator asks of a rollout before it computes anything, with errors that name the config key to change."""

from jaxtyping import Float
from torch import Tensor

from rlalign.buffers.rollout import Rollout
from rlalign.functional.masked import CONSTANT_SPREAD

PROVIDED_BY = {
    "values": "only a policy with a critic records it",
    "next_values": "only a policy with a critic records it",
    "baseline_reward": "the language-model trainer collects it by itself; a rollout of your own must bring it",
}


def require_fields(rollout: Rollout, needs: frozenset[str], estimator: str) -> None:
    """Raise `ValueError` when an optional field that `estimator` works from is absent."""
    for name in sorted(needs):
        if rollout.__dict__[name] is None:
            raise ValueError(
                f"`advantage.type: {estimator}` needs `{name}`, which this rollout lacks: {PROVIDED_BY[name]}, "
                "or choose another `advantage.type`."
            )


def require_one_episode_per_row(rollout: Rollout) -> None:
    """Raise `ValueError` when an episode ends inside a row: the sum of its rewards is then no outcome."""
    boundary = rollout.terminated | rollout.truncated
    ended_before = boundary.cumsum(1) - boundary.long() > 0
    inside = ended_before & (rollout.mask | (rollout.rewards != 0) & rollout.scored[:, None])
    if bool(inside.any()):
        row = int(inside.any(1).nonzero()[0])
        step = int(boundary[row].nonzero()[0])
        raise ValueError(
            f"group estimators compare whole episodes, one per row, but row {row} goes on after its episode ended at "
            f"decision {step}. Collect one episode per row, or use `advantage.type: gae`."
        )


def require_rewards_on_decisions(rollout: Rollout) -> None:
    """Raise `ValueError` when a reward stands on a masked decision, where a per-decision return would lose it."""
    lost = ~rollout.mask & (rollout.rewards != 0) & rollout.mask.any(1, keepdim=True) & rollout.scored[:, None]
    if bool(lost.any()):
        row, step = (int(i) for i in lost.nonzero()[0])
        raise ValueError(
            f"row {row} has a reward on decision {step}, which is masked, so per-decision returns would lose it. "
            "Put it on the last real decision before, or use a group estimator, which counts whole outcomes."
        )


def constant(values: Float[Tensor, " count"]) -> bool:
    """Tell whether all values agree up to rounding, or there are fewer than two."""
    if values.numel() < 2:
        return True
    return bool(values.max() - values.min() <= CONSTANT_SPREAD * values.abs().max().clamp(min=1))
