"""Every number an agent logs has a title that a person wrote, and none is logged that means nothing for it."""

import pytest

from rlalign.agents import BC, IQL, ODICE, PPO, TD3BC, TRPO, PolicyGradientAgent
from rlalign.training.metric_names import is_titled
from tests.agents.hybrid_parts import chain_agent, lock_agent
from tests.agents.offline_data import random_batch
from tests.agents.small_agents import QUIET, small

BINS = {"value_head": "hl_gauss", "normalize_and_project": True}
TINY = {"network": {"hidden": [8]}, "eval": QUIET}


def offline(cls, path, *, actions=2, **config):
    return cls(dataset=random_batch(0, actions=actions), total_updates=20, run_dir=path, **TINY | config)


AGENTS = {
    "ppo": lambda path: small(PPO, run_dir=path, **BINS),
    "trpo": lambda path: small(TRPO, run_dir=path, **BINS),
    "group": lambda path: small(
        PolicyGradientAgent, num_envs=8, group_size=4, normalize_and_project=True, run_dir=path
    ),
    "bnpo": lambda path: small(
        PolicyGradientAgent,
        num_envs=8,
        group_size=4,
        advantage={"type": "beta_normalized", "reward_range": [0, 500]},
        run_dir=path,
    ),
    "hnpg": lambda path: chain_agent(path, **BINS),
    "hnpg_per_step": lambda path: lock_agent(path, **BINS),
    "odice": lambda path: offline(ODICE, path, twin=True),
    "bc": lambda path: offline(BC, path),
    "iql": lambda path: offline(IQL, path, value_head="hl_gauss"),
    "td3_bc": lambda path: offline(TD3BC, path, actions=None, network={"hidden": [8], "squash": True}),
}


@pytest.mark.parametrize("name", AGENTS)
def test_every_metric_has_a_title(tmp_path, name):
    agent = AGENTS[name](tmp_path / "run")
    found = next(iter(agent.steps()))
    if agent.environments is not None:
        found = found | {f"eval/{part}_mean": 0.0 for part in ("return", "length")}
    assert [metric for metric in found if not is_titled(metric, agent=True)] == []


def test_agents_without_groups_say_nothing_of_groups(tmp_path):
    agent = small(PPO, run_dir=tmp_path / "run")
    metrics = next(iter(agent.steps()))
    assert [name for name in metrics if "group" in name] == []
    assert metrics["advantage/rms"] > 0


def test_a_title_read_off_a_name_is_no_title():
    assert is_titled("policy/kl_max")
    assert not is_titled("policy/unheard_of_frac")
