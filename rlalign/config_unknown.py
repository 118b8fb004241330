"""Name the settings that a config does not have, and the ones that were probably meant."""

import dataclasses
import difflib
import typing
from collections.abc import Iterator, Sequence
from typing import Any

from rlalign.config_schema import child, default_of, dotted, hints_of, options, section, sections, tags_of
from rlalign.yaml_strict import Key

# What other libraries call these settings. Used for hints only, and only where the config has the name on the right.
_ELSEWHERE = {
    "lr": "learning_rate",
    "num_generations": "group_size",
    "num_iterations": "update_epochs",
    "per_device_train_batch_size": "prompts_per_step",
    "epsilon": "clip_low",
    "epsilon_high": "clip_high",
    "clip_range": "clip_low",
    "delta": "dual_clip",
    "beta": "kl.coef",
    "kl_coef": "kl.coef",
    "loss_type": "aggregation",
    "reward_funcs": "rewards",
    "train_dataset": "data.train",
    "model_name_or_path": "model.name",
    "max_steps": "total_steps",
    "max_prompt_length": "max_prompt_tokens",
    "max_completion_length": "max_completion_tokens",
    "max_new_tokens": "max_completion_tokens",
    "lam": "gae_lambda",
    "ent_coef": "entropy_coef",
    "vf_coef": "value_coef",
    "n_steps": "rollout_steps",
}


def unknown_keys(cls: type, data: dict[str, Any]) -> Iterator[tuple[Key, str]]:
    """Yield (path, sentence) for every key that no setting reads, at any depth."""
    for path, owner, value in _strangers(cls, data, dataclasses.MISSING, ()):
        yield path, _stranger_text(cls, path, owner, value)


def _strangers(annotation: Any, value: Any, default: Any, path: Key) -> Iterator[tuple[Key, type, Any]]:
    if isinstance(value, list):
        for index, item in enumerate(value):
            yield from _strangers(child(annotation, value, index), item, dataclasses.MISSING, (*path, index))
    if not isinstance(value, dict):
        return
    cls = section(annotation, value, default)
    for key, item in value.items():
        if cls is None:
            yield from _strangers(child(annotation, value, key), item, dataclasses.MISSING, (*path, key))
        elif key not in hints_of(cls):
            yield (*path, key), cls, value
        else:
            inherited = getattr(default, key) if isinstance(default, cls) else default_of(cls, key)
            yield from _strangers(hints_of(cls)[key], item, inherited, (*path, key))


def _stranger_text(root: type, path: Key, owner: type, value: dict[str, Any]) -> str:
    name, where = dotted(path), dotted(path[:-1])
    near = _nearest(root, path, owner)
    if name in near:
        settings = ", ".join(hints_of(owner))
        return f"`{name}` does not apply to type {tags_of(owner)[0]!r}; settings of that type: {settings}"
    if near:
        return f"`{name}` is not a setting; did you mean {' or '.join(f'`{other}`' for other in near)}?"
    return f"`{name}` is not a setting; {f'`{where}` has' if where else 'there are'}: {', '.join(hints_of(owner))}"


def _nearest(root: type, path: Key, owner: type) -> list[str]:
    """Full paths of the settings most like an unknown one: first beside it, then anywhere in the config."""
    word = str(path[-1]).lower().replace("-", "_")
    everywhere = list(dict.fromkeys(_setting_paths(root, ())))
    meant = _ELSEWHERE.get(word, word)
    near = [dots for dots in everywhere if f".{dots}".endswith(f".{meant}")]
    beside = difflib.get_close_matches(word, list(hints_of(owner)), n=2, cutoff=0.7)
    near += [dotted((*path[:-1], name)) for name in beside]
    if not near:
        last_words = {dots.rsplit(".", 1)[-1] for dots in everywhere}
        alike = difflib.get_close_matches(word, last_words, n=1, cutoff=0.75)
        near = [dots for dots in everywhere if alike and dots.rsplit(".", 1)[-1] == alike[0]]
    return list(dict.fromkeys(near))[:3]


def _setting_paths(annotation: Any, path: Key) -> Iterator[str]:
    for cls in sections(annotation) if len(path) < 6 else []:  # a class may nest itself
        for name, hint in hints_of(cls).items():
            yield dotted((*path, name))
            yield from _setting_paths(hint, (*path, name))
    for option in options(annotation):
        if typing.get_origin(option) in (tuple, list, Sequence) and typing.get_args(option):
            yield from _setting_paths(typing.get_args(option)[0], (*path, "N"))
