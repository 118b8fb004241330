"""What the logged metrics are called in front of people: titles, units, one-line meanings."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import isfinite, isinf, isnan


@dataclass(frozen=True, kw_only=True)
class Metric:
    """How one metric is shown."""

    title: str
    unit: str = ""
    note: str = ""
    """One sentence for a reader who meets the metric for the first time."""
    share: bool = False
    """A fraction of one, shown in percent."""
    from_zero: bool = False
    """The axis starts at zero."""


_KNOWN = {
    "reward/mean": Metric(title="Reward", note="Mean over the samples of the step, after weighting."),
    "reward/std": Metric(title="Spread of the reward", from_zero=True),
    "reward/error_frac": Metric(title="Failed reward calls", share=True, from_zero=True),
    "reward/timeout_count": Metric(title="Reward calls cut off by the timeout", unit="calls", from_zero=True),
    "reward/seconds": Metric(title="Time in reward calls", unit="s", from_zero=True),
    "episode/return_mean": Metric(title="Return", note="Undiscounted, of the episodes that ended in the step."),
    "episode/length_mean": Metric(title="Episode length", unit="steps", from_zero=True),
    "signal/group_frac": Metric(
        title="Groups with signal",
        share=True,
        from_zero=True,
        note="Groups whose members did not all score the same. The others teach nothing.",
    ),
    "signal/groups_skipped": Metric(title="Groups skipped", unit="groups", from_zero=True),
    "policy/entropy_nats": Metric(
        title="Entropy", unit="nats", from_zero=True, note="Falling to zero: no exploration left."
    ),
    "policy/kl": Metric(
        title="KL to the reference", unit="nats", note="How far the policy has moved from where it began."
    ),
    "policy/ratio_max": Metric(title="Largest probability ratio", note="New over old probability of one decision."),
    "policy/ratio_shift": Metric(
        title="Mean ratio minus 1", note="Of denoising steps, new over old probability per dimension; 0 has no lean."
    ),
    "policy/norm_ratio": Metric(
        title="Size of predictions",
        note="Norm of predictions over that of the generator as it came; growth hints at a hacked reward.",
    ),
    "policy/weight_distance": Metric(
        title="Movement of the weights", from_zero=True, note="Norm of the difference to the weights as they came."
    ),
    "reward/unknown_frac": Metric(
        title="Samples without a reward",
        share=True,
        from_zero=True,
        note="The reward failed or could not judge them; they are in no baseline.",
    ),
    "rollout/trajectory_mib": Metric(
        title="Memory of the recorded steps", unit="MiB", from_zero=True, note="Latents, means and embeddings."
    ),
    "policy/clip_low_frac": Metric(title="Clipped from below", share=True, from_zero=True),
    "policy/clip_high_frac": Metric(title="Clipped from above", share=True, from_zero=True),
    "optim/grad_norm": Metric(title="Gradient norm", from_zero=True, note="Before clipping."),
    "optim/learning_rate": Metric(title="Learning rate", from_zero=True),
    "optim/loss": Metric(title="Loss", note="Not a measure of progress: it is near zero by construction."),
    "rollout/completion_tokens_mean": Metric(title="Completion length", unit="tokens", from_zero=True),
    "rollout/truncated_frac": Metric(title="Completions cut at the limit", share=True, from_zero=True),
    "time/generate_s": Metric(title="generate", unit="s", from_zero=True),
    "time/collect_s": Metric(title="collect", unit="s", from_zero=True),
    "time/sample_s": Metric(title="sample", unit="s", from_zero=True),
    "time/simulate_s": Metric(title="simulate", unit="s", from_zero=True),
    "time/reward_s": Metric(title="reward", unit="s", from_zero=True),
    "time/train_s": Metric(title="train", unit="s", from_zero=True),
    "time/eval_s": Metric(title="evaluate", unit="s", from_zero=True),
    "time/step_s": Metric(title="Time per step", unit="s", from_zero=True),
    "advantage/rms": Metric(title="Advantage size", from_zero=True, note="Root mean square."),
    "advantage/group_signal_frac": Metric(title="Groups with non-zero advantage", share=True, from_zero=True),
    "advantage/groups_without_signal": Metric(title="Groups without signal", unit="groups", from_zero=True),
    "bnpo/a": Metric(title="Beta fit of the pass rates: a"),
    "bnpo/b": Metric(title="Beta fit of the pass rates: b"),
    "bnpo/alpha": Metric(title="Normalising Beta: alpha"),
    "bnpo/beta": Metric(title="Normalising Beta: beta"),
    "bnpo/weight_max": Metric(title="Largest group weight", from_zero=True),
    "bnpo/weight_capped_frac": Metric(title="Group weights at the cap", share=True, from_zero=True),
    "bnpo/fit_fallback": Metric(title="Beta fit fell back", from_zero=True),
    "reward/constant_group_frac": Metric(title="Groups with equal rewards", share=True, from_zero=True),
    "bnpo/adv_rms": Metric(title="Advantage size after weighting", from_zero=True),
    "policy/sampling_gap_nats": Metric(
        title="Gap to the sampler", unit="nats", from_zero=True, note="Sampling against training log-probabilities."
    ),
    "rollout/completion_tokens_max": Metric(title="Longest completion", unit="tokens", from_zero=True),
    "rollout/tokens_if_rewarded_mean": Metric(title="Length when rewarded", unit="tokens", from_zero=True),
    "rollout/tokens_if_unrewarded_mean": Metric(title="Length when not rewarded", unit="tokens", from_zero=True),
    "eval/reward_mean": Metric(title="Held-out reward"),
    "eval/best_baseline_mean": Metric(
        title="Held-out reward, best other phrasing",
        note="The untouched model, asked in the other words of `eval.baselines`.",
    ),
    "eval/return_mean": Metric(title="Held-out return"),
    "eval/return_min": Metric(title="Worst held-out return"),
    "eval/length_mean": Metric(title="Held-out episode length", unit="steps", from_zero=True),
    "episode/count": Metric(title="Episodes ended so far", unit="episodes", from_zero=True),
    "policy/improvement": Metric(
        title="Surrogate gain of the step", note="Of the step that was taken; 0 when none was."
    ),
    "policy/step_accepted": Metric(
        title="Natural-gradient steps accepted",
        share=True,
        from_zero=True,
        note="The others left the policy as it was.",
    ),
    "policy/backtracks_count": Metric(title="Line-search backtracks", unit="backtracks", from_zero=True),
    "policy/loss": Metric(title="Policy loss"),
    "policy/log_prob_nats": Metric(title="Log-likelihood of the data's actions", unit="nats"),
    "policy/weight_mean": Metric(title="Mean weight of the data's actions", from_zero=True),
    "policy/weight_zero_frac": Metric(title="Data with weight zero", share=True, from_zero=True),
    "policy/weight_capped_frac": Metric(title="Weights cut at their cap", share=True, from_zero=True),
    "policy/q_mean": Metric(title="Q of the policy's actions"),
    "policy/grad_norm": Metric(title="Gradient norm, policy", from_zero=True),
    "optim/policy_grad_norm": Metric(title="Gradient norm, policy", from_zero=True, note="Of the surrogate."),
    "optim/updates": Metric(title="Optimizer steps", from_zero=True),
    "value/error": Metric(
        title="Error of the critic",
        from_zero=True,
        note="What it minimises: squared error, or cross entropy over bins.",
    ),
    "value/explained_variance": Metric(
        title="Variance explained by the critic",
        note="1: it foresaw every return. 0: no better than a constant. Below 0: worse.",
    ),
    "value/return_mean": Metric(title="Targets of the critic", note="Mean over the decisions of the rollout."),
    "value/outside_frac": Metric(
        title="Targets outside the bins", share=True, from_zero=True, note="They are learned as the nearest end."
    ),
    "value/support_low": Metric(title="Lowest bin of the critic"),
    "value/support_high": Metric(title="Highest bin of the critic"),
    "value/loss": Metric(title="Value loss", from_zero=True),
    "value/online_error": Metric(
        title="Error on on-policy returns", from_zero=True, note="Squared, after the fit: how well the critic foresees."
    ),
    "value/offline_error": Metric(
        title="Error on recorded data", from_zero=True, note="Squared, after the fit, on bootstrapped targets."
    ),
    "policy/online_advantage_rms": Metric(title="Advantage size, on-policy", from_zero=True),
    "policy/offline_advantage_rms": Metric(
        title="Advantage size, recorded data", from_zero=True, note="0: nothing more is to be gained from the data."
    ),
    "policy/kl_max": Metric(title="Largest KL of an update", unit="nats", from_zero=True, note="Over the policies."),
    "policy/distance_squared": Metric(
        title="Distance to the recorded action", from_zero=True, note="Squared, of the policy's action."
    ),
    "optim/fits_skipped": Metric(
        title="Fits undone", from_zero=True, note="They ended in NaN or infinity and left the critic as it was."
    ),
    "episode/return_max": Metric(title="Best return", note="Of the iteration's episodes."),
    "value/mean": Metric(title="Value"),
    "value/grad_norm": Metric(title="Gradient norm, value", from_zero=True),
    "value/residual_mean": Metric(title="Mean Bellman residual"),
    "value/residual_max": Metric(title="Largest Bellman residual"),
    "q/loss": Metric(title="Q loss", from_zero=True),
    "q/target_mean": Metric(title="Targets of Q"),
    "q/outside_frac": Metric(title="Targets outside the bins", share=True, from_zero=True),
    "q/grad_norm": Metric(title="Gradient norm, Q", from_zero=True),
    "nap/norm_growth": Metric(title="Weight norms against their start", note="1 where projection holds them."),
    "nap/effective_learning_rate": Metric(
        title="Effective learning rate", from_zero=True, note="Learning rate over weight norm: how far a step turns."
    ),
    "nap/dormant_frac": Metric(title="Dormant units", share=True, from_zero=True),
    "policy/err_win": Metric(title="Denoising error of winners", note="It should not rise."),
    "policy/err_lose": Metric(title="Denoising error of losers"),
    "policy/err_win_ratio": Metric(title="Winners' error over the reference's"),
    "policy/err_lose_ratio": Metric(
        title="Losers' error over the reference's", note="Rising together with that of winners: samples are unlearned."
    ),
    "policy/margin": Metric(title="Margin of winners over losers", note="Beyond the reference's; positive is right."),
    "policy/implicit_accuracy": Metric(title="Pairs with a positive margin", share=True),
    "policy/floored_frac": Metric(title="Losers beyond the floor", share=True, from_zero=True),
    "data/round": Metric(title="Round"),
    "data/samples": Metric(title="Samples of the round", unit="samples", from_zero=True),
    "data/win_frac": Metric(title="Winners among the labelled", share=True, from_zero=True),
    "data/failed_frac": Metric(title="Samples without an outcome", share=True, from_zero=True),
    "data/near_threshold_frac": Metric(title="Samples too near to the threshold", share=True, from_zero=True),
    "data/prompts_with_pairs": Metric(title="Prompts with winners and losers", from_zero=True),
    "data/prompts_without_pairs": Metric(title="Prompts with one kind alone", from_zero=True),
    "data/conditions_mib": Metric(title="Memory of the recorded conditions", unit="MiB", from_zero=True),
}
_OF_AGENTS = {  # where the same name means something else, or needs other words
    "reward/mean": Metric(title="Outcome", note="Mean over the episodes of the wave, as compared within groups."),
    "policy/kl": Metric(
        title="KL of an update", unit="nats", from_zero=True, note="How far one iteration moved the policy."
    ),
    "policy/entropy_nats": Metric(
        title="Entropy", unit="nats", note="Falling: the policy explores less. Of a density, it may be negative."
    ),
    "signal/group_frac": Metric(
        title="Groups with signal",
        share=True,
        from_zero=True,
        note="Groups whose episodes did not all end alike. The others teach nothing.",
    ),
    "episode/return_mean": Metric(
        title="Return", note="Undiscounted, with exploration; mean of recent training episodes."
    ),
    "time/step_s": Metric(title="Time per iteration", unit="s", from_zero=True),
}
_OF_GENERATORS = {
    "reward/mean": Metric(title="Reward", note="Mean over the samples of the step, drawn with noise in their steps."),
    "optim/loss": Metric(title="Loss", note="Of DPO 0.693 at first: policy and reference are one."),
    "policy/kl": Metric(
        title="KL to the reference", unit="nats per dimension", from_zero=True, note="Mean over the denoising steps."
    ),
    "eval/reward_mean": Metric(title="Held-out reward", note="From the same noise each time, without noise in steps."),
}
_OF_DENOISING = {  # followed by the number of the step, from 0
    "clip_low_frac": Metric(title="Clipped from below", share=True, from_zero=True),
    "clip_high_frac": Metric(title="Clipped from above", share=True, from_zero=True),
    "ratio_shift": Metric(title="Mean ratio minus 1"),
}
_DENOISING = re.compile(r"denoising/(?P<what>[a-z_]+)_(?P<step>\d+)")
_SUFFIXES = (  # longest first; what a name's ending says about its unit
    ("_frac", Metric(title="", share=True, from_zero=True)),
    ("_nats", Metric(title="", unit="nats")),
    ("_count", Metric(title="", unit="count", from_zero=True)),
    ("_bytes", Metric(title="", unit="bytes", from_zero=True)),
    ("_tokens", Metric(title="", unit="tokens", from_zero=True)),
    ("_mean", Metric(title="")),
    ("_s", Metric(title="", unit="s", from_zero=True)),
)
_ORDER = ("reward", "episode", "return", "eval", "signal", "policy", "value", "optim", "rollout", "advantage", "bnpo")
_EVAL_SPREAD = ("_stderr", "_low", "_high")


def describe(name: str, *, agent: bool = False, generator: bool = False) -> Metric:
    """Look a metric up, or read its unit off the ending of its name (`group/name_unit`).

    Args:
        agent: The run is an agent's, where a few names mean something else.
        generator: The run is a diffusion generator's.
    """
    if agent and name in _OF_AGENTS:
        return _OF_AGENTS[name]
    if generator and name in _OF_GENERATORS:
        return _OF_GENERATORS[name]
    step = _DENOISING.fullmatch(name)
    if step is not None and step["what"] in _OF_DENOISING:
        metric = _OF_DENOISING[step["what"]]
        return replace(metric, title=f"{metric.title}, denoising step {int(step['step']) + 1}")
    if name in _KNOWN:
        return _KNOWN[name]
    stem = name.rpartition("/")[2]
    if stem.endswith("_per_s"):
        unit = stem.removesuffix("_per_s").replace("_", " ")
        return Metric(title="Throughput", unit=f"{unit}/s", from_zero=True)
    for suffix, metric in _SUFFIXES:
        if stem.endswith(suffix) and stem != suffix:
            return replace(metric, title=plain_name(stem.removesuffix(suffix)))
    return Metric(title=plain_name(stem))


def is_titled(name: str, *, agent: bool = False) -> bool:
    """Whether a title was written for this metric, rather than read off its name."""
    step = _DENOISING.fullmatch(name)
    of_a_step = step is not None and step["what"] in _OF_DENOISING
    return name in _KNOWN or (agent and name in _OF_AGENTS) or of_a_step or name.endswith("_per_s")


def is_spread(name: str) -> bool:
    """An evaluation's standard error or interval end: drawn around its mean, not by itself."""
    return name.startswith("eval/") and name.endswith(_EVAL_SPREAD)


def plain_name(stem: str) -> str:
    """`exact_match` -> `Exact match`."""
    words = stem.replace("_", " ").strip() or stem
    return words[:1].upper() + words[1:]


def group_order(name: str) -> tuple[int, str]:
    """Sort key: the groups people look at first come first, the rest by name."""
    group = name.partition("/")[0]
    return (_ORDER.index(group) if group in _ORDER else len(_ORDER), name)


def format_number(value: float, *, signed: bool = False) -> str:
    """Three significant figures or so, with a true minus sign."""
    if isnan(value):
        return "n/a"
    sign = "\u2212" if value < 0 else "+" if signed else ""
    size = abs(value)
    if isinf(size):
        return f"{sign}∞"
    if size != 0 and (size >= 1e6 or size < 1e-3):
        mantissa, _, exponent = f"{size:.1e}".partition("e")
        power = int(exponent)
        return f"{sign}{mantissa.removesuffix('.0')}e{power}".replace("e-", "e\u2212")
    digits = 0 if size >= 100 or float(size).is_integer() else 1 if size >= 10 else 2 if size >= 1 else 3
    return f"{sign}{size:,.{digits}f}"


def format_column(values: Sequence[float]) -> list[str]:
    """Numbers that stand under each other: the same digits after the point in all of them."""
    finite = [value for value in values if isfinite(value)]
    whole = all(value == int(value) for value in finite)
    size = max((abs(value) for value in finite), default=0.0)
    if size >= 1e6 or 0 < size < 0.01:
        return [format_number(value) for value in values]
    digits = 0 if whole else 2 if size < 100 else 1
    return [
        f"{value:,.{digits}f}".replace("-", "\u2212") if isfinite(value) else format_number(value) for value in values
    ]


def format_share(value: float, *, signed: bool = False) -> str:
    """A fraction of one, as percent without the sign: 0.123 -> `12.3`."""
    if isnan(value):
        return "n/a"
    sign = "\u2212" if value < 0 else "+" if signed else ""
    return f"{sign}{abs(100 * value):.1f}"


def format_metric(name: str, value: float) -> str:
    """The number with its unit."""
    metric = describe(name)
    if metric.share:
        return f"{format_share(value)} %"
    return f"{format_number(value)} {metric.unit}".strip()


def format_duration(seconds: float) -> str:
    """`95` -> `1 min 35 s`."""
    if isnan(seconds) or isinf(seconds) or seconds < 0:
        return "n/a"
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    hours, minutes, rest = whole // 3600, whole // 60 % 60, whole % 60
    if hours:
        return f"{hours:,} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
