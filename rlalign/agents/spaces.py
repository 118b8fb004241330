"""What Gymnasium's spaces mean to networks: observations become tensors, decisions become actions."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor

from rlalign.config import ConfigError
from rlalign.nn.policies import ActionDistribution, Bernoulli, Categorical, Gaussian, MultiCategorical

PLAIN = "observation"
"""Name of an observation that has no parts."""
MASK = "action_mask"
"""Part of a `Dict` observation, or entry of `info`, that tells which discrete actions are allowed."""

Observation = Any
"""As an environment gives it: an array, a number, or a dict of them."""


class ObservationParts:
    """Takes observations apart into named tensors, and says how each enters a network.

    `Box` of one dimension or none, `MultiBinary`: numbers; `Discrete`, `MultiDiscrete`: one-hot; `Box` of two
    dimensions: flattened; `uint8` pixels of three dimensions: an image; `Dict`: each of its parts.

    Raises:
        ConfigError: A space that has no such reading.
    """

    def __init__(self, space: spaces.Space):
        parts = dict(space.spaces) if isinstance(space, spaces.Dict) else {PLAIN: space}
        self.composed = isinstance(space, spaces.Dict)
        self.mask_space = parts.pop(MASK, None)
        self.spaces: dict[str, spaces.Space] = parts
        unknown = {name: part for name, part in parts.items() if not isinstance(part, _READABLE)}
        if unknown or not parts:
            name, part = next(iter(unknown.items()), ("", space))
            raise ConfigError(
                f"observation space {part} {f'(`{name}`) ' if name else ''}is not supported; wrap the environment with "
                "gymnasium.wrappers.FlattenObservation, or use Box, Discrete, MultiDiscrete, MultiBinary or Dict."
            )
        self.images = {name for name, part in parts.items() if is_image(part)}
        self.vector_size = sum(_width(part) for name, part in parts.items() if name not in self.images)

    def tensors(self, observation: Observation) -> dict[str, Tensor]:
        """Name -> tensor of a batch of observations, in the environment's dtype (doubles become floats)."""
        parts: Mapping[str, Any] = observation if self.composed else {PLAIN: observation}
        return {name: _tensor(parts[name]) for name in self.spaces}

    def allowed(self, observation: Observation, info: Mapping[str, Any]) -> Tensor | None:
        """Which actions are allowed, where the environment says so."""
        if self.mask_space is not None:
            return torch.from_numpy(np.asarray(observation[MASK])).bool()
        if MASK not in info:
            return None
        given = torch.from_numpy(np.stack(list(info[MASK]))).bool()
        # Gymnasium fills up with zeros where a copy's info has no mask, and says so beside it.
        named = torch.from_numpy(np.asarray(info.get(f"_{MASK}", np.ones(len(given), dtype=bool))))
        return given | ~named.reshape(-1, *[1] * (given.ndim - 1))

    def vector(self, parts: Mapping[str, Tensor]) -> Tensor:
        """Everything but images side by side as floats; `parts` may have any leading dimensions."""
        columns = [_flat(parts[name], space) for name, space in self.spaces.items() if name not in self.images]
        return columns[0] if len(columns) == 1 else torch.cat(columns, -1)


class ActionInterface:
    """Between a policy's decisions (tensors) and an environment's actions (arrays).

    Args:
        squash: The policy's tanh keeps decisions within (-1, 1), which stand for the space's bounds.
        scale: -1 and 1 stand for the bounds without a tanh too, where there are bounds: decisions of every dimension
            are then of one size, whatever unit the space has.

    Raises:
        ConfigError: A space that is not `Discrete`, `MultiDiscrete`, `MultiBinary` or a finite-dimensional `Box`.
    """

    def __init__(self, space: spaces.Space, *, squash: bool = False, scale: bool = False, log_std: float = 0.0):
        self.space = space
        self.scaled = squash or (scale and isinstance(space, spaces.Box) and space.is_bounded())
        self.distribution = _distribution(space, squash=squash, log_std=log_std)
        if squash and isinstance(space, spaces.Box) and not space.is_bounded():
            raise ConfigError("`network.squash` needs an action space with bounds on both sides; set it to false.")

    def to_env(self, decisions: Tensor) -> np.ndarray:
        """Actions in the space's dtype and shape; continuous ones clipped to its bounds (and scaled from [-1, 1])."""
        actions = decisions.numpy()
        space = self.space
        match space:
            case spaces.Discrete():
                return actions + space.start if space.start else actions
            case spaces.MultiDiscrete():
                return (actions + space.start.ravel()).reshape(-1, *space.shape).astype(space.dtype)
            case spaces.MultiBinary():
                return actions.reshape(-1, *space.shape).astype(space.dtype)
            case spaces.Box():
                shaped = actions.reshape(-1, *space.shape)
                if self.scaled:
                    shaped = space.low + (shaped + 1) * (space.high - space.low) / 2
                return np.clip(shaped, space.low, space.high).astype(space.dtype, copy=False)
        raise AssertionError(space)

    def from_env(self, actions: np.ndarray) -> Tensor:
        """Decisions that stand for recorded actions; the inverse of `to_env` where nothing was clipped."""
        space = self.space
        match space:
            case spaces.Discrete():
                return torch.from_numpy(np.asarray(actions, dtype=np.int64) - int(space.start)).reshape(-1)
            case spaces.MultiDiscrete():
                return torch.from_numpy(np.asarray(actions, dtype=np.int64) - space.start).flatten(1)
            case spaces.MultiBinary():
                return torch.from_numpy(np.asarray(actions, dtype=np.int64)).flatten(1)
            case spaces.Box():
                flat = np.asarray(actions, dtype=np.float32).reshape(len(actions), -1)
                if self.scaled:
                    low, high = space.low.ravel(), space.high.ravel()
                    flat = ((flat - low) / (high - low) * 2 - 1).astype(np.float32)
                return torch.from_numpy(flat)
        raise AssertionError(space)


def is_single(space: spaces.Space, observation: Observation) -> bool:
    """Whether this is one observation, not a batch of them."""
    if isinstance(space, spaces.Dict):
        name, part = next(iter(space.spaces.items()))
        return np.ndim(observation[name]) == len(part.shape or ())
    return np.ndim(observation) == len(space.shape or ())


def require_shape(space: spaces.Space, batch: Observation) -> None:
    """Hold a batch of observations to their space.

    Raises:
        ValueError: A part is missing, or not of the space's shape.
    """
    named = dict(space.spaces) if isinstance(space, spaces.Dict) else {PLAIN: space}
    parts = batch if isinstance(space, spaces.Dict) else {PLAIN: batch}
    for name, part in named.items():
        if name not in parts:
            raise ValueError(f"the observation has no part `{name}`; its space is {space}.")
        got, expected = np.shape(parts[name])[1:], part.shape or ()
        if got != expected:
            where = f" `{name}`" if isinstance(space, spaces.Dict) else ""
            raise ValueError(f"an observation{where} must have shape {list(expected)}, got {list(got)}.")


def batched(observation: Observation) -> Observation:
    """A batch of this one."""
    if isinstance(observation, Mapping):
        return {name: np.asarray(value)[None] for name, value in observation.items()}
    return np.asarray(observation)[None]


def is_image(space: spaces.Space) -> bool:
    return isinstance(space, spaces.Box) and len(space.shape) == 3 and space.dtype == np.uint8


def is_number(space: spaces.Space) -> bool:
    """A part with running statistics: real numbers, not pixels."""
    return isinstance(space, spaces.Box) and not is_image(space)


_READABLE = (spaces.Box, spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary)


def _tensor(values: Any) -> Tensor:
    array = np.asarray(values)
    # A copy in any case: an environment may write its next observation into the same memory.
    return torch.from_numpy(array.astype(np.float32) if array.dtype == np.float64 else array.copy())


def _width(space: spaces.Space) -> int:
    match space:
        case spaces.Discrete():
            return int(space.n)
        case spaces.MultiDiscrete():
            return int(space.nvec.sum())
    return int(np.prod(space.shape or (), dtype=int))


def _flat(values: Tensor, space: spaces.Space) -> Tensor:
    match space:
        case spaces.Discrete():
            return torch.nn.functional.one_hot(values.long() - int(space.start), int(space.n)).float()
        case spaces.MultiDiscrete():
            digits = (values.long() - torch.from_numpy(space.start)).flatten(values.ndim - len(space.shape))
            counted = zip(digits.unbind(-1), space.nvec.ravel(), strict=True)
            hot = [torch.nn.functional.one_hot(digit, int(count)) for digit, count in counted]
            return torch.cat(hot, -1).float()
    own = len(space.shape or ())
    match own:
        case 0:
            return values.float().unsqueeze(-1)
        case 1:
            return values.float()
    return values.float().flatten(values.ndim - own)


def _distribution(space: spaces.Space, *, squash: bool, log_std: float) -> ActionDistribution:
    match space:
        case spaces.Discrete():
            return Categorical(int(space.n))
        case spaces.MultiDiscrete():
            return MultiCategorical([int(count) for count in space.nvec.ravel()])
        case spaces.MultiBinary():
            return Bernoulli(int(np.prod(space.shape)))
        case spaces.Box() if np.issubdtype(space.dtype, np.floating):
            return Gaussian(int(np.prod(space.shape)), log_std=log_std, squash=squash)
    raise ConfigError(
        f"action space {space} is not supported; use Discrete, MultiDiscrete, MultiBinary or a float Box."
    )
