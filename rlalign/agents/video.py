"""Film one episode for the report, where the environment can be drawn without a screen."""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from rlalign.agents.envs import make_environments
from rlalign.agents.evaluate import EPISODE_STEP
from rlalign.training.seeding import generator

if TYPE_CHECKING:
    from rlalign.agents.agent import Agent

LONGEST_S = 20.0
"""Of the film; longer episodes are cut."""
WIDEST = 480
"""Pixels."""


def film(agent: "Agent", folder: Path) -> list[str]:
    """Write `folder/episode-STEP.gif` of one evaluation episode; return a note when there is nothing to film."""
    assert agent.environments is not None
    if "rgb_array" not in (agent.environments.vector.metadata.get("render_modes") or ()):
        return ["No film of an episode: `rgb_array` is not among the environment's render modes."]
    if sys.platform == "linux" and not {"DISPLAY", "WAYLAND_DISPLAY"} & set(os.environ):
        os.environ.setdefault("SDL_VIDEODRIVER", "dummy")  # pygame complains about the screen that is not there
    try:
        import imageio.v3 as iio

        frames, fps = _frames(agent)
    except ImportError as error:
        return [f'No film of an episode: {error.name} is not installed. Run: pip install "rlalign[agents]"']
    except Exception as error:  # drawing needs drivers and screens that training does not: never lose a run to it
        hint = " Without a screen, MuJoCo draws with MUJOCO_GL=egl or osmesa." if "OpenGL" in str(error) else ""
        return [f"No film of an episode: {type(error).__name__}: {error}{hint}"]
    if not frames:
        return ["No film of an episode: the environment draws nothing with render_mode='rgb_array'."]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"episode-{agent.step:09d}.gif"
    iio.imwrite(path, np.stack(frames), duration=1000 / fps, loop=0)
    return [f"Film of an episode: {path}"]


def _frames(agent: "Agent") -> tuple[list[np.ndarray], float]:
    envs = make_environments(agent.play_config, seed=agent.config.seed, num_envs=1, render=True, role="film")
    random = None if agent.config.eval.deterministic else generator(agent.config.seed, "film")
    try:
        fps = min(float(envs.vector.metadata.get("render_fps") or 30), 30.0)
        observation, frames = envs.reset(seeds=[agent.evaluator.seed % 2**30]), []
        while len(frames) < LONGEST_S * fps:
            drawn = envs.vector.render()
            if not drawn or drawn[0] is None:
                break
            frames.append(_small(np.asarray(drawn[0])))
            info = {**envs.info, EPISODE_STEP: np.array([len(frames) - 1])}
            step = envs.step(agent.decide(observation, info, random=random)[0])
            if (step.terminated | step.truncated).any():
                break
            observation = step.observation
    finally:
        envs.close()
    return frames, fps


def _small(frame: np.ndarray) -> np.ndarray:
    every = max(1, -(-frame.shape[1] // WIDEST))
    return frame[::every, ::every]
