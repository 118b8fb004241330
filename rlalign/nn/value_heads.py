"""What a critic's last layer means: a number, or a distribution over bins whose mean is the value."""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from rlalign.functional import bins, value
from rlalign.nn.config import C51, MSE, HLGauss, TwoHot

FLOOR = 1e-6
"""Smallest probability of a bin in an untrained head, so that no logit is out of reach of the optimizer."""
SLACK = 0.1
"""How far an automatic support moves past the targets it lacked, as a share of their range; so it moves rarely."""
NEW_BIN_DROP = 5.0
"""How much less likely a bin beyond the old support starts than the old outer bin, in nats."""


class ValueHead(nn.Module):
    """Read a network's outputs as values, and score them against targets.

    It has no weights: the network's last layer must put out `out_features` numbers. The support of a distribution is
    part of the state dict, so that it stays with the network whose outputs it explains; a target network has a head of
    its own.

    An automatic support begins empty, and every value is then 0. `fit_support` widens it; nothing else does.

    Args:
        cfg: Which head; see `rlalign.nn.config`.
    """

    low: Tensor
    high: Tensor

    def __init__(self, cfg: MSE | TwoHot | HLGauss | C51):
        super().__init__()
        self.cfg = cfg
        self.out_features = 1 if isinstance(cfg, MSE) else cfg.num_bins
        self.automatic = not isinstance(cfg, MSE) and cfg.low is None
        self._edges: bins.Edges = cfg.edges if isinstance(cfg, HLGauss) else "centers"
        if not isinstance(cfg, MSE):
            self.register_buffer("low", torch.tensor(float(cfg.low or 0)))
            self.register_buffer("high", torch.tensor(float(cfg.high or 0)))

    def probs(self, outputs: Float[Tensor, "*rows outputs"]) -> Float[Tensor, "*rows outputs"]:
        """The distribution over bins.

        Raises:
            ValueError: The head is `mse`.
        """
        self._distribution()
        return outputs.softmax(-1)

    def values(self, outputs: Float[Tensor, "*rows outputs"]) -> Float[Tensor, "*rows"]:
        """Decode: the number itself, or the mean of the distribution."""
        if isinstance(self.cfg, MSE):
            return outputs.squeeze(-1)
        return bins.categorical_mean(outputs.softmax(-1), low=self.low, high=self.high, edges=self._edges)

    def encode(self, targets: Float[Tensor, "*rows"]) -> Float[Tensor, "*rows outputs"]:
        """Return the distribution that stands for each scalar target.

        Raises:
            ValueError: The head is `mse`, or `c51`, or an automatic support that has seen no targets.
        """
        cfg = self._distribution()
        if isinstance(cfg, C51):
            raise ValueError(
                "the c51 head learns the distribution of the return and needs that of the next state as its target; "
                "a scalar target would collapse it. Set `value_head.type` to `hl_gauss` or `two_hot`."
            )
        self._require_support()
        return self._encode(targets)

    def objective(
        self,
        outputs: Float[Tensor, "*rows outputs"],
        targets: Float[Tensor, "*rows"],
        *,
        values_old: Float[Tensor, "*rows"] | None = None,
        clip: float | int | None = None,
    ) -> Float[Tensor, "*rows"]:
        """Score outputs against scalar targets: squared error, or cross-entropy to the encoded target.

        No gradient reaches the targets.

        Args:
            outputs: What the network put out.
            targets: Returns, in the unit of the rewards.
            values_old: Decoded values at collection; needed with `clip`.
            clip: Hold values within this of the old ones (`mse` only).

        Raises:
            ValueError: The head is `c51`; or `clip` is set for a distribution or without `values_old`; or an automatic
                support has seen no targets.
        """
        if clip is not None and not isinstance(self.cfg, MSE):
            raise ValueError(
                f"value clipping bounds a number, and a {self.cfg.type} head learns a distribution. "
                "Set `value_clip` to null, or `value_head.type` to `mse`."
            )
        if not isinstance(self.cfg, MSE):
            return value.cross_entropy(outputs, self.encode(targets.detach()))
        if clip is None:
            return value.squared_error(self.values(outputs), targets.detach())
        if values_old is None:
            raise ValueError("value clipping needs `values_old`, the values at collection; pass them or drop `clip`.")
        return value.clipped_value(self.values(outputs), values_old.detach(), targets.detach(), clip=clip)

    @torch.no_grad()
    def projected(
        self,
        next_outputs: Float[Tensor, "*rows outputs"],
        rewards: Float[Tensor, "*rows"],
        discounts: Float[Tensor, "*rows"],
    ) -> Float[Tensor, "*rows outputs"]:
        """Return C51's target: the next state's distribution, moved by r + γ z and projected back. Without gradient.

        Args:
            next_outputs: Outputs at the next state; from a head with the same support.
            rewards: r.
            discounts: γ (1 - terminated).

        Raises:
            ValueError: The head is not `c51`, or an automatic support has seen no targets.
        """
        if not isinstance(self.cfg, C51):
            raise ValueError(f"a {self.cfg.type} head has scalar targets: use `objective`, or the c51 head.")
        self._require_support()
        return bins.categorical_projection(next_outputs.softmax(-1), rewards, discounts, low=self.low, high=self.high)

    def distribution_objective(
        self, outputs: Float[Tensor, "*rows outputs"], target_probs: Float[Tensor, "*rows outputs"]
    ) -> Float[Tensor, "*rows"]:
        """Cross-entropy to a target distribution, from `projected` or `encode`."""
        self._distribution()
        return value.cross_entropy(outputs, target_probs.detach())

    @torch.no_grad()
    def fit_support(self, targets: Float[Tensor, "*rows"], *, layer: nn.Linear | None = None) -> bool:
        """Widen an automatic support until it holds these targets with a margin; call it before they are used.

        The margin is 3 σ of HL-Gauss (one bin for the others), since values nearer to an end decode towards the middle.
        A support never shrinks, and it always holds 0.

        Args:
            targets: Returns about to be learned. Gather them over ranks first, so that all ranks agree.
            layer: The layer that made the outputs. Its rows are moved to the new bins, so that values stay what they
                were, to about a bin; at the first support it is set to decode 0. Without it every value learned so far
                changes with the support.

        Returns:
            Whether the support moved. Never for a fixed one.

        Raises:
            ValueError: A target is not finite, or the layer has another number of outputs.
        """
        if not self.automatic or targets.numel() == 0:
            return False
        if layer is not None and layer.out_features != self.out_features:
            raise ValueError(f"`layer` must put out {self.out_features} numbers, got {layer.out_features}.")
        lowest, highest = (float(end) for end in targets.aminmax())
        if not (math.isfinite(lowest) and math.isfinite(highest)):
            raise ValueError(
                f"a support cannot hold targets from {lowest} to {highest}: drop what is not finite first."
            )
        ends = self._widened(lowest, highest)
        if ends is None:
            return False
        old = self._centers()
        empty = bool(self.low == self.high)
        self.low.fill_(ends[0])
        self.high.fill_(ends[1])
        if layer is not None and empty and layer.bias is not None:
            layer.bias.copy_(self.init_bias())
        elif layer is not None and not empty:
            _move_rows(layer, old, self._centers())
        return True

    def init_bias(self) -> Float[Tensor, " outputs"]:
        """Return a bias of the last layer with which an untrained network decodes to 0 (or the end nearest to it).

        For a distribution: the log-probabilities that stand for 0, kept above a floor. Equal logits would decode to the
        middle of the support instead.
        """
        if isinstance(self.cfg, MSE):
            return torch.zeros(1)
        if self.automatic and bool(self.low == self.high):
            return torch.zeros(self.out_features).to(self.low)
        return (self._encode(torch.zeros_like(self.low)) + FLOOR).log()

    def outside_share(self, targets: Float[Tensor, "*rows"]) -> Float[Tensor, ""]:
        """Return the share of targets beyond the support; 0 for `mse`, which has none."""
        if isinstance(self.cfg, MSE):
            return targets.new_zeros(())
        return bins.outside_share(targets, low=self.low, high=self.high)

    def metrics(self, targets: Float[Tensor, "*rows"]) -> dict[str, float]:
        """Describe the support for the log; empty for `mse`."""
        if isinstance(self.cfg, MSE):
            return {}
        return {
            "value/outside_frac": float(self.outside_share(targets)),
            "value/support_low": float(self.low),
            "value/support_high": float(self.high),
        }

    def _distribution(self) -> TwoHot | HLGauss | C51:
        if isinstance(self.cfg, MSE):
            raise ValueError("the mse head has no distribution; set `value_head.type` to hl_gauss, two_hot or c51.")
        return self.cfg

    def _require_support(self) -> None:
        if torch.compiler.is_compiling():  # a graph cannot look at a number; whoever compiles has fitted the support
            return
        if self.automatic and bool(self.low == self.high):
            raise ValueError(
                "this automatic support has seen no targets: call `fit_support(targets)` before they are used, "
                "or set `value_head.low` and `value_head.high`."
            )

    def _encode(self, targets: Tensor) -> Tensor:
        low, high, count = self.low, self.high, self.out_features
        if not isinstance(self.cfg, HLGauss):
            return bins.two_hot_targets(targets, low=low, high=high, num_bins=count)
        return bins.hl_gauss_targets(
            targets, low=low, high=high, num_bins=count, sigma_ratio=self.cfg.sigma_ratio, edges=self.cfg.edges
        )

    def _centers(self) -> Tensor:
        outputs = torch.zeros(self.out_features).to(self.low)
        return bins.bin_centers(outputs, low=self.low, high=self.high, edges=self._edges)

    def _widened(self, lowest: float, highest: float) -> tuple[float, float] | None:
        """Return the ends that hold these targets, or None where the present ones do."""
        low, high = float(self.low), float(self.high)
        margin_bins = 3 * self.cfg.sigma_ratio if isinstance(self.cfg, HLGauss) else 1.0
        margin = min(margin_bins / (self.out_features - 1), 0.25)  # as a share of the whole support
        inner_low, inner_high = low + margin * (high - low), high - margin * (high - low)
        rounding = 1e-3 * (high - low)
        below, above = lowest < inner_low - rounding, highest > inner_high + rounding
        if low < high and not (below or above):
            return None
        start, end = min(lowest, inner_low), max(highest, inner_high)
        slack = max(SLACK * (end - start), 1e-6)
        start -= slack if below or low == high else 0.0
        end += slack if above or low == high else 0.0
        reach = margin * (end - start) / (1 - 2 * margin)
        return start - reach, end + reach


def _move_rows(layer: nn.Linear, old: Tensor, new: Tensor) -> None:
    """Interpolate a layer's rows, which belong to bins at `old` centers, at `new` ones; lower those far outside."""
    weights = bins.two_hot_targets(new, low=old[0], high=old[-1], num_bins=len(old)).to(layer.weight)
    layer.weight.copy_(weights @ layer.weight)
    if layer.bias is None:
        return
    half = (old[1] - old[0]) / 2
    outside = (new < old[0] - half) | (new > old[-1] + half)
    layer.bias.copy_(weights @ layer.bias - NEW_BIN_DROP * outside.to(weights))
