"""Reinforcement learning of agents on Gymnasium tasks: online, offline, and from both."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlalign.agents.agent import Agent
    from rlalign.agents.hnpg import HNPG
    from rlalign.agents.offline import BC, IQL, ODICE, TD3BC
    from rlalign.agents.policy_gradient import PolicyGradientAgent
    from rlalign.agents.ppo import PPO
    from rlalign.agents.trpo import TRPO

_HOMES = {
    "Agent": "agent",
    "HNPG": "hnpg",
    **dict.fromkeys(("BC", "IQL", "ODICE", "TD3BC"), "offline"),
    "PPO": "ppo",
    "PolicyGradientAgent": "policy_gradient",
    "TRPO": "trpo",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
