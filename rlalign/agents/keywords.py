"""What callers of an agent may write short."""

from rlalign.config_keywords import Forms

FORMS = Forms(
    words={"value_head": "type", "advantage": "type", "env": "id"},
    switches=("normalize_and_project",),
    first=("env",),  # `num_envs` is that of training, not of evaluation
)
