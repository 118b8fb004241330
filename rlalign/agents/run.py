"""Carry out a YAML run: what the `rlalign` command calls for agents."""

from pathlib import Path
from typing import Any

from rlalign import agents
from rlalign import config as config_files
from rlalign.agents.agent import Agent
from rlalign.agents.config import AgentConfig
from rlalign.agents.saved import Saved
from rlalign.config import ConfigError

CLASSES = {
    "ppo": "PPO",
    "trpo": "TRPO",
    "policy_gradient_agent": "PolicyGradientAgent",
    "hnpg": "HNPG",
    "odice": "ODICE",
    "bc": "BC",
    "iql": "IQL",
    "td3_bc": "TD3BC",
}
"""Method -> its class."""


def agent_class(method: str) -> type[Agent]:
    return getattr(agents, CLASSES[method])


def train(config: AgentConfig, *, run_dir: Path, config_text: str, resume: bool = False) -> None:
    """Train as the config says; with `resume`, go on from the newest checkpoint of `run_dir`."""
    from rlalign.training.run_directory import RunDirectory

    if resume and RunDirectory.open(run_dir, lock=False).status()["status"] == "done":
        print(f"{run_dir} is finished. To train longer, start a run with a larger total.")
        return
    _build(config, run_dir=run_dir, config_text=config_text).fit(resume=resume)


def evaluate(run_dir: Path, *, checkpoint: Path | None = None) -> dict[str, float]:
    """Play episodes with a run's policy.

    Args:
        checkpoint: One of the run's checkpoints; the newest intact one when None.
    """
    return restored(run_dir, checkpoint).evaluate()


def sample(run_dir: Path, prompt: str | None, *, count: int = 1) -> list[str]:
    """Play `count` episodes and say how each went.

    Raises:
        ConfigError: A prompt was given; an agent has none.
    """
    if prompt is not None:
        raise ConfigError("an agent plays episodes and takes no prompt: rlalign sample RUN --count 3")
    agent = restored(run_dir, None)
    if agent.evaluator.environments is None:
        raise ConfigError("there is no environment to play in: this run learned from data alone; set `env.id`.")
    returns, lengths = agent.evaluator.play(count)
    return [f"episode {k}: return {r:g} in {n} steps" for k, (r, n) in enumerate(zip(returns, lengths, strict=True))]


def check(config: AgentConfig) -> list[str]:
    """Look for contradictions without torch, and for what the environment says of itself where Gymnasium is installed.

    Raises:
        ConfigError: What training would stop at.
    """
    from rlalign.agents.consistency import check_consistency

    return check_consistency(config)


def restored(run_dir: Path, checkpoint: Path | None) -> Agent:
    """The agent of a run as its newest (or the named) checkpoint left it."""
    from rlalign.training.checkpoint import Checkpoints

    config = config_files.load(run_dir / "config.resolved.json")
    agent = _build(config, run_dir=run_dir, config_text="")
    state = Checkpoints(run_dir / "checkpoints").load(checkpoint).state
    agent.load_learned(state["model"])
    agent.step = state["trainer"]["step"]
    return agent


def load_agent(path: str | Path) -> Agent:
    """Bring back an agent of whatever method from what `save` wrote.

    Raises:
        ConfigError: There is none.
    """
    return agent_class(Saved.read(path).config.method).load(path)


def _build(config: Any, *, run_dir: Path, config_text: str) -> Agent:
    return agent_class(config.method).from_config(config, run_dir=run_dir, config_text=config_text)
