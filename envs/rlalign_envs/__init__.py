"""Small tasks with known answers, for tests, examples and first runs. They import nothing of rlalign.

The Gymnasium environments are made as `gymnasium.make("rlalign_envs:Chain-v0")`.
"""

try:
    from gymnasium.envs.registration import register as _register
except ImportError:
    # The text tasks (`arithmetic`) need no gymnasium, and people who train language models may not have it.
    pass
else:
    _register("Chain-v0", entry_point="rlalign_envs.chain:Chain", max_episode_steps=50)
    _register(
        "Forever-v0",
        entry_point="rlalign_envs.chain:Forever",
        vector_entry_point="rlalign_envs.chain:ForeverVectorEnv",
        max_episode_steps=20,
    )
    _register(
        "CombinationLock-v0",
        entry_point="rlalign_envs.comblock:CombinationLock",
        vector_entry_point="rlalign_envs.comblock:CombinationLockVectorEnv",
    )
    _register("FourRoom-v0", entry_point="rlalign_envs.four_room:FourRoom", max_episode_steps=50)
