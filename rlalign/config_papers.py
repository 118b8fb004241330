"""Published methods by the names of their papers, and what sets them up here."""

import re

_GROUP = "`method: policy_gradient` with `advantage.type: group_relative`"
_PAPERS = {
    "BNPO": ("`method: bnpo`", "bnpo_arithmetic"),
    "GRPO": (_GROUP, "grpo_arithmetic"),
    "Dr. GRPO": (f"{_GROUP}, `advantage.scale: false` and `aggregation: constant`", "dr_grpo_arithmetic"),
    "DAPO": (f"{_GROUP}, `objective.clip_high: 0.28` and `aggregation: token`", "dapo_arithmetic"),
    "GSPO": (f"{_GROUP} and `objective.type: gspo`", "gspo_arithmetic"),
    "SAPO": ("`method: policy_gradient` with `objective.type: sapo`", "sapo_smoke"),
    "RLOO": ("`method: policy_gradient` with `advantage.type: leave_one_out`", "rloo_arithmetic"),
    "MaxRL": ("`method: policy_gradient` with `advantage.type: max_likelihood`", "maxrl_arithmetic"),
    "OPO": ("`method: policy_gradient` with `advantage.type: length_weighted`", "opo_arithmetic"),
    "ReMax": ("`method: policy_gradient` with `advantage.type: greedy_baseline`", "remax_arithmetic"),
    "REINFORCE++": (
        "`method: policy_gradient` with `advantage.type: reinforce_plus_plus`",
        "reinforce_plus_plus_arithmetic",
    ),
    "ScaleRL": (
        "`method: policy_gradient` with `advantage.type: batch_scaled` and `objective.type: cispo`",
        "scalerl_arithmetic",
    ),
    "CISPO": ("`method: policy_gradient` with `objective.type: cispo`", "scalerl_arithmetic"),
    "REINFORCE": ("`method: policy_gradient` with `objective.type: reinforce`", "rloo_arithmetic"),
    "TD3+BC": ("`method: td3_bc`", "td3_bc_pendulum"),
    "O-DICE": ("`method: odice`", "odice_pendulum"),
    "GRPO-Guard": (
        "`method: flow_grpo` with `objective.ratio_norm: true` and `objective.reweight: true`",
        "flow_grpo_stability",
    ),
    "DanceGRPO": ("`method: flow_grpo` with `rollout.sde.kind: dance_sde`", "dance_grpo_stability"),
    "DRO": ("`method: dso` with `objective.kind: dro`", "dro_stability"),
    "Diffusion-DPO": ("`method: dso` with `objective.kind: dpo`", "dso_stability"),
}


def by_paper(name: str) -> str | None:
    """How to have the method that a paper calls `name`, however it is spelled; None for names of no paper here.

    Example:
        >>> by_paper("dr-grpo").partition(";")[2]
        ' preset `dr_grpo_arithmetic`'
    """
    word = _spelled(name)
    for paper, (settings, preset) in _PAPERS.items():
        if word in (_spelled(paper), _spelled(paper).replace("+", "plus")):
            return f"{paper} is {settings}; preset `{preset}`"
    return None


def _spelled(name: str) -> str:
    return re.sub(r"[^a-z0-9+]", "", name.lower())
