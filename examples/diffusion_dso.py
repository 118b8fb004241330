"""Teach a generator of five-box objects to make ones that stand, from a MuJoCo simulation that is not differentiated.

python examples/diffusion_dso.py [STEPS]

The generator is trained first, on procedural objects: 15 seconds on one core, once, then it is kept under
`~/.cache/rlalign`. Another minute for 40 updates, simulating 2,000 objects included; needs `pip install mujoco`.
"""

import sys

from rlalign.diffusion import DSOTrainer
from rlalign.diffusion.config_pretrain import PretrainConfig
from rlalign.diffusion.pretrain import cached_generator
from rlalign_envs.assemblies import CLASSES
from rlalign_envs.stability import StabilitySimulator


def main() -> None:
    updates = int(sys.argv[1]) if len(sys.argv) > 1 else 40
    generator = cached_generator(PretrainConfig(data="rlalign_envs.assemblies:training_set", steps=600))

    trainer = DSOTrainer(
        generator,
        list(CLASSES),
        StabilitySimulator(),
        kind="dpo",
        beta=50,
        label="robust",  # stands upright and under four tilts of 3 degrees
        samples=50 * updates,  # drawn and judged once, before the first update
        total_updates=updates,
        pairs_per_step=48,
        learning_rate=1e-4,
        lora=False,  # 0.2 million weights: all of them are trained
        average=False,
        eval={"samples": 200, "watch": "rlalign_envs.assemblies:measure"},
    )
    before = trainer.evaluate()
    trainer.fit()
    after = trainer.evaluate()
    for name in ("robust", "stable", "distance_to_data"):
        print(f"{name}: {before[f'eval/{name}_mean']:.3f} -> {after[f'eval/{name}_mean']:.3f}")
    trainer.save_model("standing")  # a pipeline that plain diffusers runs


if __name__ == "__main__":
    main()
