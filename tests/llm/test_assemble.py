"""What the trainer's parts are built with."""

from typing import Any

import torch

from rlalign.llm import assemble
from tests.llm.tiny_runs import make_trainer


def test_every_setting_of_the_guard_reaches_it(tiny_model, tiny_tokenizer, tmp_path, monkeypatch):
    settings = {
        "isolation": "none",
        "timeout_s": 7.0,
        "row_timeout_s": 0.5,
        "start_timeout_s": 11.0,
        "memory_limit_gb": 3.0,
        "on_error": "penalty",
        "penalty": -2.0,
        "error_budget": 0.25,
    }
    given: list[dict[str, Any]] = []

    class Recorded(assemble.RewardGuard):
        def __init__(self, functions: Any, **options: Any):
            given.append(options)
            super().__init__(functions, **options)

    monkeypatch.setattr(assemble, "RewardGuard", Recorded)
    trainer = make_trainer(tiny_model, tiny_tokenizer, tmp_path / "run", guard=settings)
    assert set(settings) == set(vars(trainer.config.guard))
    (options,) = given
    assert options == settings | {"errors_dir": tmp_path / "run" / "errors"}


def test_every_setting_of_the_optimizer_reaches_it(tiny_model, tiny_tokenizer, tmp_path):
    settings = {"learning_rate": 0.03, "betas": (0.7, 0.95), "eps": 1e-5, "weight_decay": 0.25}
    optimizer = make_trainer(tiny_model, tiny_tokenizer, tmp_path / "run", optim=settings).optimizer
    assert isinstance(optimizer, torch.optim.AdamW)
    # Matrices decay, the scales of norms do not.
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.25, 0.0]
    for group in optimizer.param_groups:
        assert {name: group[name] for name in ("lr", "betas", "eps")} == {"lr": 0.03, "betas": (0.7, 0.95), "eps": 1e-5}
