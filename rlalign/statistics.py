"""Running mean, variance and range of a stream of values, exact under any split into batches or ranks."""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor


class RunningMoments:
    """Count, mean, variance and range of everything seen so far, per element of `shape`.

        n = n_a + n_b,   mean = mean_a + δ n_b / n,   M2 = M2_a + M2_b + δ² n_a n_b / n,   δ = mean_b - mean_a

    Kept in double precision. Two objects that saw two halves of a stream merge into the one that saw it all, so ranks
    and resumed runs agree with a single uninterrupted process.

    Args:
        shape: Shape of one observation; () for scalars.
        device: Where the statistics live.

    Example:
        >>> moments = RunningMoments()
        >>> moments.update(torch.tensor([1.0, 3.0]))
        >>> moments.update(torch.tensor([5.0]))
        >>> float(moments.mean), float(moments.variance())
        (3.0, 4.0)

    Reference:
        Chan, Golub & LeVeque 1983, "Algorithms for computing the sample variance", eq. 2.1.
    """

    def __init__(self, shape: Sequence[int] = (), *, device: torch.device | str = "cpu") -> None:
        self.shape = tuple(shape)
        self.count = torch.zeros((), dtype=torch.int64, device=device)
        """Observations seen."""
        self.mean: Float[Tensor, "..."] = torch.zeros(self.shape, dtype=torch.float64, device=device)
        self.squares: Float[Tensor, "..."] = torch.zeros_like(self.mean)
        """M2, the sum of squared deviations from the mean."""
        self.lowest: Float[Tensor, "..."] = torch.full_like(self.mean, torch.inf)
        self.highest: Float[Tensor, "..."] = torch.full_like(self.mean, -torch.inf)

    def update(self, values: Float[Tensor, "..."], mask: Bool[Tensor, "..."] | None = None) -> None:
        """Take in observations: any leading dimensions, then `shape`.

        Args:
            values: Observations; anything may stand where masked.
            mask: True at observations that count, shaped like the leading dimensions.

        Raises:
            ValueError: The shape does not fit, or an observation that counts is not finite.
        """
        leading = values.ndim - len(self.shape)
        if leading < 0 or tuple(values.shape[leading:]) != self.shape:
            raise ValueError(f"observations must end in shape {list(self.shape)}, got {list(values.shape)}.")
        if mask is not None and mask.shape != values.shape[:leading]:
            raise ValueError(f"the mask must be {list(values.shape[:leading])}, got {list(mask.shape)}.")
        rows = values.detach().reshape(-1, *self.shape) if mask is None else values.detach()[mask]
        if not bool(rows.isfinite().all()):
            raise ValueError("statistics of non-finite observations would be lost for good; mask or fix them first.")
        if rows.shape[0]:
            self.merge(self._of(rows.to(self.mean)))

    def merge(self, other: "RunningMoments") -> None:
        """Take in everything another object has seen.

        Raises:
            ValueError: The other one is of another shape.
        """
        if other.shape != self.shape:
            raise ValueError(f"statistics of shape {list(self.shape)} cannot take in shape {list(other.shape)}.")
        if int(other.count) == 0:
            return
        count = self.count + other.count
        share = other.count.double() / count  # dividing the integers would round to float32
        difference = other.mean - self.mean
        self.squares = self.squares + other.squares + difference**2 * (self.count * share)
        self.mean = self.mean + difference * share
        self.lowest = torch.minimum(self.lowest, other.lowest)
        self.highest = torch.maximum(self.highest, other.highest)
        self.count = count

    def variance(self, *, unbiased: bool = True) -> Float[Tensor, "..."]:
        """Return the variance; 0 with fewer than two observations."""
        return self.squares / (self.count - int(unbiased)).clamp(min=1)

    def std(self, *, unbiased: bool = True) -> Float[Tensor, "..."]:
        """Return the standard deviation; 0 with fewer than two observations."""
        return self.variance(unbiased=unbiased).sqrt()

    def normalize(self, values: Float[Tensor, "*dims"], *, eps: float = 1e-8) -> Float[Tensor, "*dims"]:
        """Return (values - mean) / sqrt(variance + eps) in the dtype of `values`; unchanged before two observations."""
        if int(self.count) < 2:
            return values
        scaled = (values - self.mean) * torch.rsqrt(self.variance(unbiased=False) + eps)
        return scaled.to(values.dtype)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the statistics as tensors; `load_state_dict` restores them bit for bit."""
        return {name: getattr(self, name).clone() for name in _STATE}

    def load_state_dict(self, state: Mapping[str, Shaped[Tensor, "..."]]) -> None:
        """Take over what `state_dict` returned.

        Raises:
            ValueError: An entry is missing, unknown, or of another shape.
        """
        if set(state) != set(_STATE):
            raise ValueError(f"running moments consist of {sorted(_STATE)}, got {sorted(state)}.")
        if tuple(state["mean"].shape) != self.shape:
            raise ValueError(f"these statistics are of shape {list(self.shape)}, got {list(state['mean'].shape)}.")
        for name in _STATE:
            setattr(self, name, state[name].to(getattr(self, name)))

    def _of(self, rows: Float[Tensor, "rows *shape"]) -> "RunningMoments":
        batch = RunningMoments(self.shape, device=self.mean.device)
        batch.count = torch.full_like(self.count, rows.shape[0])
        batch.mean = rows.mean(0)
        batch.squares = ((rows - batch.mean) ** 2).sum(0)
        batch.lowest, batch.highest = rows.amin(0), rows.amax(0)
        return batch


_STATE = ("count", "mean", "squares", "lowest", "highest")
