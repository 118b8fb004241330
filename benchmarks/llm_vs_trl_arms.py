"""What one process of `llm_vs_trl` does: train a few steps with TRL or with rlalign, or compare their gradients.

python benchmarks/llm_vs_trl_arms.py SPEC_JSON RESULT_FILE        (started by llm_vs_trl.py)
"""

import json
import random
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from rlalign.advantages.config import GroupRelative
from rlalign.buffers import Input, TrainBatch
from rlalign.functional.masked import spread
from rlalign.llm import PolicyGradientTrainer
from rlalign.llm.config import (
    CheckpointConfig,
    ClippedSurrogate,
    EvalConfig,
    LogConfig,
    OptimConfig,
    PolicyGradientConfig,
    RolloutConfig,
)
from rlalign.llm.data import encode_prompt

GROUPS, GROUP_SIZE = 2, 8
ROWS = GROUPS * GROUP_SIZE
LEARNING_RATE = 1e-6
CLIP = 0.2
PARITY_NOISE_NATS = 0.3


@dataclass(frozen=True, kw_only=True)
class Spec:
    """One process: which arm, on which checkpoint, at which lengths."""

    arm: str
    model: str
    prompt_tokens: int
    completion_tokens: int
    steps: int
    threads: int
    trl_micro_batch: int
    run_dir: str


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        spec = Spec(**json.loads(sys.argv[1]), run_dir=scratch)
        torch.set_num_threads(spec.threads)
        outcome = parity(spec) if spec.arm == "parity" else timed(spec)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    Path(sys.argv[2]).write_text(json.dumps(outcome | {"arm": spec.arm, "peak_rss_mib": peak}))


def timed(spec: Spec) -> dict[str, Any]:
    marks = run_trl(spec) if spec.arm.startswith("trl") else run_rlalign(spec)
    # The first step warms up allocators and caches; it ends at the first mark.
    pairs = zip(marks, marks[1:], strict=False)
    steps = [{"wall_s": after[0] - before[0], "cpu_s": after[1] - before[1]} for before, after in pairs]
    return {"steps": steps, "completion_tokens_per_step": ROWS * spec.completion_tokens}


def mark() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def load(spec: Spec) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    tokenizer = AutoTokenizer.from_pretrained(spec.model, padding_side="left")
    return AutoModelForCausalLM.from_pretrained(spec.model, dtype=torch.float32), tokenizer


def make_prompts(tokenizer: PreTrainedTokenizerBase, length: int, count: int = 16) -> list[str]:
    """Few-shot sums of exactly `length` tokens each, as text that the tokenizer maps back to that many."""
    source = random.Random(length)
    found: list[str] = []
    while len(found) < count:
        pairs = [(source.randrange(10, 90), source.randrange(10, 90)) for _ in range(length)]
        shots = "\n".join(f"{a} + {b} = {a + b}" for a, b in pairs).rsplit(" ", 1)[0]
        text = tokenizer.decode(tokenizer(shots)["input_ids"][-length:], skip_special_tokens=True)
        if len(tokenizer(text)["input_ids"]) == length:
            found.append(text)
    return found


def make_reward(spec: Spec) -> Callable[..., list[float]]:
    """A reward by row number: pass rates 3/8 and 5/8, or 0 and 5/8 where one group is to have no variance."""
    passes = (0, 5) if spec.arm.endswith("_half") else (3, 5)

    def reward_by_row(completions, completion_ids, **columns) -> list[float]:
        lengths = sorted({len(ids) for ids in completion_ids})
        if lengths != [spec.completion_tokens] or len(completions) != ROWS:
            raise ValueError(f"expected {ROWS} x {spec.completion_tokens} tokens, got {len(completions)} of {lengths}")
        return [float(row % GROUP_SIZE < passes[row // GROUP_SIZE]) for row in range(ROWS)]

    return reward_by_row


# ------------------------------------------------------------------------------------------------------------- TRL


def trl_trainer(spec: Spec, callbacks: Sequence[Any] = ()) -> Any:
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    model, tokenizer = load(spec)
    tuned: dict[str, Any] = {"bf16": spec.arm == "trl_bf16", "gradient_checkpointing": False}
    config = GRPOConfig(
        output_dir=spec.run_dir,
        use_cpu=True,
        per_device_train_batch_size=spec.trl_micro_batch,
        gradient_accumulation_steps=ROWS // spec.trl_micro_batch,
        num_generations=GROUP_SIZE,
        max_completion_length=spec.completion_tokens,
        generation_kwargs={"min_new_tokens": spec.completion_tokens},
        max_steps=spec.steps + 1,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        optim="adamw_torch_fused",
        report_to="none",
        logging_strategy="no",
        save_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        shuffle_dataset=False,
        **({} if spec.arm == "trl_defaults" else tuned),
    )
    return GRPOTrainer(
        model=model,
        reward_funcs=make_reward(spec),
        args=config,
        train_dataset=Dataset.from_dict({"prompt": make_prompts(tokenizer, spec.prompt_tokens)}),
        processing_class=tokenizer,
        callbacks=list(callbacks),
    )


def run_trl(spec: Spec) -> list[tuple[float, float]]:
    from transformers import TrainerCallback

    marks = []

    class Clock(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            marks.append(mark())

    trl_trainer(spec, [Clock()]).train()
    return marks


# --------------------------------------------------------------------------------------- one rollout, both gradients


def parity(spec: Spec) -> dict[str, Any]:
    """Let TRL sample and score one step, then compute loss and gradient on it with both code paths.

    Old log-probabilities are TRL's own plus noise, so that ratios leave 1, both clips are at work, and the loss depends
    on the log-probabilities: at ratio 1 the losses would agree even if the log-probabilities did not.
    """
    trainer = trl_trainer(spec)
    trainer.current_gradient_accumulation_steps = trainer.args.steps_per_generation
    trainer.model.train()
    prompts = [row["prompt"] for row in trainer.train_dataset.select(range(GROUPS)) for _ in range(GROUP_SIZE)]
    rollout = trainer._generate_and_score_completions([{"prompt": prompt} for prompt in prompts])
    with torch.no_grad():
        trl_log_prob = trl_log_probs(trainer, rollout)
        noise = torch.randn(trl_log_prob.shape, generator=torch.Generator().manual_seed(0))
    rollout["old_per_token_logps"] = trl_log_prob + PARITY_NOISE_NATS * noise
    trl_loss = 0.0
    for start in range(0, ROWS, spec.trl_micro_batch):
        rows = slice(start, start + spec.trl_micro_batch)
        loss = trainer._compute_loss(trainer.model, {k: v[rows] if v.ndim else v for k, v in rollout.items()})
        loss.backward()
        trl_loss += loss.item()
    trl_gradient = flat_gradient(trainer.model)
    del trainer

    ours = rlalign_trainer(spec, updates_per_rollout=2)  # off-policy: the given old log-probabilities are used
    batch = train_batch(rollout, pad_id=ours.tokenizer.pad_token_id)
    ours.policy.complete(batch)  # the self-check that chooses the packed path
    log_prob = ours.policy.score(batch, ours.policy.scorer)
    denominator, loss = ours.denominator(batch), 0.0
    for layout, share in ours.policy.shares(batch, whole_groups=False):
        part = share * ours.loss(batch, layout, denominator)
        part.backward()
        loss += part.item()
    gradient = flat_gradient(ours.policy.model)
    return {
        "trl_loss": trl_loss,
        "rlalign_loss": loss,
        "loss_difference": abs(loss - trl_loss),
        "relative_gradient_difference": ((gradient - trl_gradient).norm() / trl_gradient.norm()).item(),
        "largest_log_prob_difference_nats": (log_prob - trl_log_prob).abs().max().item(),
        "gradient_norm": trl_gradient.norm().item(),
        "packing": ours.policy.packing,
    }


def trl_log_probs(trainer: Any, rollout: dict[str, Tensor]) -> Tensor:
    ids = torch.cat([rollout["prompt_ids"], rollout["completion_ids"]], dim=1)
    attention = torch.cat([rollout["prompt_mask"], rollout["completion_mask"]], dim=1)
    kept = rollout["completion_ids"].shape[1]
    return trainer._get_per_token_logps_and_entropies(trainer.model, ids, attention, kept, batch_size=GROUP_SIZE)[0]


def flat_gradient(model: torch.nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for _, p in sorted(model.named_parameters()) if p.grad is not None])


def train_batch(theirs: dict[str, Tensor], *, pad_id: int) -> TrainBatch:
    """TRL's tokens, mask, old log-probabilities and advantages, as our trainer holds them."""
    mask = theirs["completion_mask"].bool()
    last = torch.arange(mask.shape[1]) == mask.sum(1, keepdim=True) - 1
    group = torch.arange(ROWS) // GROUP_SIZE
    lengths = theirs["prompt_mask"].sum(1)
    # One prompt per group; TRL pads prompts on the left, we on the right.
    prompts = [ids[-int(length) :] for ids, length in zip(theirs["prompt_ids"], lengths, strict=True)][::GROUP_SIZE]
    padded = torch.nn.utils.rnn.pad_sequence(prompts, batch_first=True, padding_value=pad_id)
    return TrainBatch(
        log_prob_old=theirs["old_per_token_logps"],
        rewards=torch.zeros(mask.shape),
        mask=mask,
        terminated=last,
        truncated=torch.zeros_like(last),
        group=group,
        prompt_id=group,
        scored=torch.ones(ROWS, dtype=torch.bool),
        advantages=spread(theirs["advantages"], mask),
        weights=torch.ones(mask.shape),
        inputs={
            "prompt_ids": Input(value=padded, axis="per_group", pad_value=pad_id),
            "prompt_length": Input(value=lengths[::GROUP_SIZE], axis="per_group"),
            "completion_ids": Input(value=theirs["completion_ids"], axis="per_decision"),
            "completion_length": Input(value=mask.sum(1), axis="per_rollout"),
        },
    )


# --------------------------------------------------------------------------------------------------------- rlalign


def rlalign_trainer(spec: Spec, *, updates_per_rollout: int = 1) -> PolicyGradientTrainer:
    model, tokenizer = load(spec)
    prompts = make_prompts(tokenizer, spec.prompt_tokens)
    assert {len(encode_prompt(prompt, tokenizer)) for prompt in prompts} == {spec.prompt_tokens}
    config = PolicyGradientConfig(
        total_steps=spec.steps + 1,
        rollout=RolloutConfig(
            prompts_per_step=GROUPS, group_size=GROUP_SIZE, max_completion_tokens=spec.completion_tokens
        ),
        advantage=GroupRelative(),
        objective=ClippedSurrogate(clip_low=CLIP, clip_high=CLIP),
        aggregation="token",
        optim=OptimConfig(learning_rate=LEARNING_RATE, warmup_steps=0, update_epochs=updates_per_rollout),
        eval=EvalConfig(before=False),
        checkpoint=CheckpointConfig(every=0),
        log=LogConfig(samples_every=0),
    )
    trainer = PolicyGradientTrainer(
        model,
        make_reward(spec),
        [{"prompt": prompt} for prompt in prompts],
        config,
        tokenizer=tokenizer,
        run_dir=Path(spec.run_dir) / "run",
    )
    trainer.policy.end_ids = ()  # no token ends a completion: every one runs to the limit
    return trainer


def run_rlalign(spec: Spec) -> list[tuple[float, float]]:
    return [mark() for _ in rlalign_trainer(spec).steps()]


if __name__ == "__main__":
    main()
