"""Generators of 2-D points learn where the reward is."""

import pytest

from tests.diffusion.small_runs import points_trainer, to_the_right

pytestmark = pytest.mark.learning

SETTINGS = {
    "total_steps": 15,
    "learning_rate": 1e-2,
    "average": False,
    "rollout": {"group_size": 16},
    "lora": {"r": 4, "alpha": 8.0},
    "eval": {"samples": 128},
    "checkpoint": {"every": 0},
}


def gain(folder, reward, *, seed, **more):
    """Held-out reward before and after."""
    trainer = points_trainer(folder / "run", reward, seed=seed, **SETTINGS, **more)
    before = trainer.evaluate()
    trainer.fit()
    return before, trainer.evaluate()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("guard", [True, False])
def test_points_move_to_the_right(tmp_path, guard, seed):
    before, after = gain(tmp_path, to_the_right, seed=seed, guard=guard)
    assert after["eval/reward_mean"] > before["eval/reward_mean"] + MARGIN
