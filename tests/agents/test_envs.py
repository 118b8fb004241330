"""Copies stepped together: three restart modes look alike, and every place can be come back to."""

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from rlalign.agents.config import EnvConfig, PPOConfig
from rlalign.agents.envs import Environments, make_environments
from rlalign.agents.surroundings import play_config
from rlalign.config import ConfigError
from tests.agents.tiny_environments import ANY, MODES, AnySpaces, scripted


def environments(mode, **kwargs):
    return Environments(scripted(mode, **kwargs), name="Scripted", seed=0)


def played(envs, steps):
    """Per copy what its real decisions brought: (observation, true next observation, reward, flags)."""
    found = [[] for _ in range(envs.num_envs)]
    before = envs.reset()
    for _ in range(steps):
        step = envs.step(np.zeros(envs.num_envs, dtype=np.int64))
        for copy in np.flatnonzero(step.real):
            facts = (step.rewards, step.terminated, step.truncated)
            row = [before[copy].tolist(), step.next_observation[copy].tolist(), *(fact[copy].item() for fact in facts)]
            found[copy].append(row)
        before = step.observation
    return found


def test_the_first_episodes_of_a_copy_by_hand():
    # Two of the seven steps only restart.
    # Copy 0 plays episodes of 3, 2, ... steps; the first terminates, the second is truncated.
    rows = played(environments(AutoresetMode.NEXT_STEP), 7)[0]
    assert rows == [
        [[0, 0, 0], [0, 0, 1], 1.0, False, False],
        [[0, 0, 1], [0, 0, 2], 2.0, False, False],
        [[0, 0, 2], [0, 0, 3], 3.0, True, False],
        [[0, 1, 0], [0, 1, 1], 11.0, False, False],
        [[0, 1, 1], [0, 1, 2], 12.0, False, True],
    ]


def test_all_modes_show_the_same_decisions():
    by_mode = [played(environments(mode), 40) for mode in MODES]
    for copy in range(3):
        shortest = min(len(rows[copy]) for rows in by_mode)
        assert shortest > 25
        first, *others = (rows[copy][:shortest] for rows in by_mode)
        assert all(other == first for other in others)


@pytest.mark.parametrize("mode", MODES)
def test_only_next_step_makes_steps_that_are_no_decisions(mode):
    rows = played(environments(mode), 40)
    total = sum(len(copy) for copy in rows)
    ends = sum(sum(terminated or truncated for *_, terminated, truncated in copy) for copy in rows)
    assert ends > 30
    if mode is AutoresetMode.NEXT_STEP:
        assert 120 - ends <= total < 120
    else:
        assert total == 120


def test_dict_observations_keep_their_final_parts():
    def make():
        return AnySpaces(observation="dict", episode_steps=2)

    seen = {}
    for mode in MODES:
        envs = Environments(SyncVectorEnv([make, make], autoreset_mode=mode), name="Any", seed=3)
        envs.reset()
        steps = [envs.step(np.zeros(2, dtype=np.int64)) for _ in range(2)]
        assert (steps[1].terminated | steps[1].truncated).all()
        seen[mode] = steps[1].next_observation
    for name in ("position", "inventory", "camera"):
        for mode in MODES:
            np.testing.assert_array_equal(seen[mode][name], seen[AutoresetMode.NEXT_STEP][name])
            assert seen[mode][name].dtype != object


def test_masks_in_the_info_of_a_partial_restart_are_joined_with_those_of_the_others():
    class Mine(AnySpaces):
        def __init__(self, steps):
            super().__init__(mask="info", episode_steps=steps)

    vector = SyncVectorEnv([lambda: Mine(2), lambda: Mine(50)], autoreset_mode=AutoresetMode.DISABLED)
    envs = Environments(vector, name="Any", seed=3)
    envs.reset()
    for _ in range(6):
        allowed = envs.info["action_mask"]
        assert allowed.sum(1).tolist() == [2, 2]
        envs.step(allowed.argmax(1))
    assert [env.allowed.tolist() for env in vector.envs] == envs.info["action_mask"].astype(int).tolist()


# ---------------------------------------------------------------- coming back


@pytest.mark.parametrize("at", [0, 1, 6, 7, 8, 13])
@pytest.mark.parametrize("observation", ["box", "dict"])
def test_own_copies_come_back_to_where_they_were(at, observation):
    # Episodes have 7 steps: 7 stops right before a restart, 8 right after it.
    cfg = EnvConfig(id=ANY, num_envs=3, kwargs={"observation": observation, "action": "discrete"})

    def step(envs, t):
        return envs.step(np.array([t % 3, (t + 1) % 3, 0]))

    whole = make_environments(cfg, seed=5)
    whole.reset()
    for t in range(at):
        step(whole, t)
    state = whole.state_dict()
    later = [step(whole, t) for t in range(at, at + 9)]

    again = make_environments(cfg, seed=5)
    again.load_state_dict(state)
    assert_same(later, [step(again, t) for t in range(at, at + 9)])
    assert again.steps == whole.steps


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("at", [0, 3, 11])
def test_foreign_copies_come_back_too(mode, at):
    def make():
        env = gym.make_vec("rlalign_envs:CombinationLock-v0", 3, horizon=3, autoreset_mode=mode)
        return Environments(env, name="Lock", seed=9)

    def actions(t):
        return np.random.default_rng(t).random((3, 10), dtype=np.float32)

    whole, again = make(), make()
    whole.reset()
    for t in range(at):
        whole.step(actions(t))
    state = whole.state_dict()
    later = [whole.step(actions(t)) for t in range(at, at + 8)]
    again.load_state_dict(state)
    assert_same(later, [again.step(actions(t)) for t in range(at, at + 8)])


def assert_same(steps, others):
    for step, other in zip(steps, others, strict=True):
        for name in ("rewards", "terminated", "truncated", "real"):
            np.testing.assert_array_equal(vars(step)[name], vars(other)[name])
        for name in ("observation", "next_observation"):
            np.testing.assert_equal(vars(step)[name], vars(other)[name])


def test_environments_that_never_began_have_nothing_to_come_back_to():
    envs = environments(AutoresetMode.SAME_STEP)
    assert envs.state_dict() == {"started": False}
    envs.load_state_dict({"started": False})
    assert envs.observation is None


# ---------------------------------------------------------------- making


def test_copies_and_roles_see_different_episodes_and_the_same_seed_the_same():
    cfg = EnvConfig(id=ANY, num_envs=3)

    def first(seed, role="train"):
        return make_environments(cfg, seed=seed, role=role).reset()

    assert len(np.unique(first(0), axis=0)) == 3
    np.testing.assert_array_equal(first(0), first(0))
    assert not np.isin(first(0), first(1)).any()
    assert not np.isin(first(0), first(0, role="evaluation")).any()


def test_given_seeds_decide_the_start_and_only_that_episode():
    envs = make_environments(EnvConfig(id=ANY, num_envs=3), seed=0)
    one = envs.reset(seeds=[7, 7, 8]).copy()
    np.testing.assert_array_equal(one[0], one[1])
    assert (one[1] != one[2]).any()
    later = envs.reset()
    assert len(np.unique(later, axis=0)) == 3


@pytest.mark.parametrize("vectorization", ["sync", "native"])
def test_episodes_are_cut_where_the_config_says(vectorization):
    cfg = EnvConfig(id="CartPole-v1", num_envs=2, max_episode_steps=3, vectorization=vectorization)
    envs = make_environments(cfg, seed=0)
    envs.reset()
    cut = [envs.step(np.zeros(2, dtype=np.int64)).truncated.tolist() for _ in range(4)]
    assert cut == [[False, False], [False, False], [True, True], [False, False]]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"id": ""}, "`env.id` is empty"),
        ({"id": "CartPoll-v1"}, "`env.id`=CartPoll-v1: .*CartPole"),
        ({"id": "no_such_module:X-v0"}, "no_such_module"),
        ({"id": "CartPole-v1", "kwargs": {"gravity_": 3}}, "gravity_"),
        ({"id": ANY, "vectorization": "native"}, "vector entry point"),
    ],
)
def test_what_cannot_be_made_is_a_config_error(settings, message):
    with pytest.raises(ConfigError, match=message):
        make_environments(EnvConfig(**settings), seed=0)


def test_envpool_copies_restart_at_the_next_step_and_are_cut_where_the_config_says():
    pytest.importorskip("envpool")
    cfg = EnvConfig(id="CartPole-v1", vectorization="envpool", num_envs=2, max_episode_steps=3)
    envs = make_environments(cfg, seed=0)
    envs.reset()
    steps = [envs.step(np.array([turn % 2] * 2)) for turn in range(5)]
    assert [step.truncated.all() for step in steps] == [False, False, True, False, False]
    assert [step.real.all() for step in steps] == [True, True, True, False, True]
    assert [step.rewards.tolist() for step in steps] == [[1.0, 1.0]] * 3 + [[0.0, 0.0], [1.0, 1.0]]


def test_envpool_copies_can_be_seeded_again_and_come_back():
    pytest.importorskip("envpool")
    cfg = EnvConfig(id="CartPole-v1", vectorization="envpool", num_envs=2)
    envs, again = make_environments(cfg, seed=0), make_environments(cfg, seed=0)
    one, other, same = (envs.reset(seeds=seed).copy() for seed in (5, 6, 5))
    assert np.array_equal(one, same)
    assert not np.array_equal(one, other)
    envs.reset()
    for turn in range(30):
        envs.step(np.array([turn % 2, 1]))
    again.load_state_dict(envs.state_dict())
    for turn in range(20):
        here, there = envs.step(np.array([turn % 2, 0])), again.step(np.array([turn % 2, 0]))
        assert np.array_equal(here.observation, there.observation)
        assert here.real.tolist() == there.real.tolist()


def test_an_id_that_envpool_does_not_have_is_a_config_error():
    pytest.importorskip("envpool")
    with pytest.raises(ConfigError, match="CartPoll-v1 is not supported"):
        make_environments(EnvConfig(id="CartPoll-v1", vectorization="envpool"), seed=0)


def test_a_namespace_nobody_registered_says_how_to_name_its_module():
    with pytest.raises(ConfigError, match="`module:Id-v0`"):
        make_environments(EnvConfig(id="NoSuchGames/Pong-v5"), seed=0)


ATARI = EnvConfig(id="ale_py:ALE/Pong-v5", vectorization="native", num_envs=2, kwargs={"stack_num": 3})


def test_atari_copies():
    pytest.importorskip("ale_py")
    envs = make_environments(ATARI, seed=0)
    first = envs.reset(seeds=[3, 4]).copy()
    assert (first.dtype, first.shape) == (np.uint8, (2, 3, 84, 84))
    assert envs.step(np.zeros(2, dtype=np.int64)).real.all()
    assert np.array_equal(envs.reset(seeds=[3, 4]), first)


def test_atari_is_evaluated_as_it_is_learned_but_for_its_own_score():
    pytest.importorskip("ale_py")
    config = PPOConfig(env=ATARI)
    cfg = play_config(config, make_environments(ATARI, seed=0))
    assert (cfg.vectorization, cfg.kwargs) == (
        "native",
        {"stack_num": 3, "reward_clipping": False, "episodic_life": False},
    )
    assert make_environments(cfg, seed=0, num_envs=1).observation_space.shape == (3, 84, 84)


def test_a_vector_form_that_shows_the_same_is_evaluated_copy_by_copy():
    config = PPOConfig(env=EnvConfig(id="CartPole-v1", vectorization="native", num_envs=2))
    cfg = play_config(config, make_environments(config.env, seed=0))
    assert (cfg.vectorization, cfg.id, cfg.kwargs) == ("sync", "CartPole-v1", {})
