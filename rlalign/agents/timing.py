"""Where an agent's seconds go: by phase, for each iteration and for all of them since the last record."""

from rlalign.training.stopwatch import Stopwatch


class IterationTimer:
    """Times iterations; a record accounts for the iterations that were not recorded too.

    Args:
        unit: What the agent's clock counts, `env_steps` or `updates`.
    """

    def __init__(self, unit: str):
        self.unit, self.phases = unit, Stopwatch()
        self.seconds: dict[str, float] = {}
        self.counted = 0

    def lap(self, counted: int) -> dict[str, float]:
        """Metrics of the iteration that ends now, which moved the clock by `counted`."""
        seconds = self.phases.lap()
        self.counted += counted
        self.seconds = {name: self.seconds.get(name, 0.0) + spent for name, spent in seconds.items()}
        return self._told(seconds, counted)

    def record(self) -> dict[str, float]:
        """Metrics of all iterations since the last call."""
        told = self._told(self.seconds, self.counted)
        self.seconds, self.counted = {}, 0
        return told

    def _told(self, seconds: dict[str, float], counted: int) -> dict[str, float]:
        return seconds | {f"throughput/{self.unit}_per_s": counted / max(seconds["time/step_s"], 1e-9)}
