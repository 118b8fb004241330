"""Teach a Stable Diffusion 3 to draw brighter pictures, and load what it learned in plain diffusers.

python examples/diffusion_flow_grpo.py [STEPS]

The pipeline has random weights and takes embeddings, so that this runs offline in a minute. With a real one, write
`StableDiffusion3Pipeline.from_pretrained(...)` and give prompts as texts; everything else stays.
"""

import sys

import numpy as np
import torch

from rlalign.diffusion import FlowGRPOTrainer, tiny_call, tiny_pipeline


def brightness(samples, prompts):
    """Any function of the samples: a number for each, None where it cannot judge."""
    return [float(np.asarray(image).mean() / 255) for image in samples]


def main() -> None:
    steps = int(sys.argv[1]) if len(sys.argv) > 1 else 20
    pipeline = tiny_pipeline("sd3")
    call = tiny_call("sd3", 4)
    prompts = [{name: call[name][k] for name in call if "embeds" in name} for k in range(4)]

    trainer = FlowGRPOTrainer(
        pipeline,
        prompts,
        brightness,
        guard=True,
        total_steps=steps,
        group_size=8,
        prompts_per_step=4,
        learning_rate=3e-3,
        call={"guidance_scale": 4.0, "height": 8, "width": 8},
        eval={"samples": 32, "num_inference_steps": 10},
    )
    trainer.fit()
    trainer.save_lora("brighter-lora")

    plain = tiny_pipeline("sd3")
    before = plain(**call, generator=torch.Generator().manual_seed(0)).images
    plain.load_lora_weights("brighter-lora")
    after = plain(**call, generator=torch.Generator().manual_seed(0)).images
    print(
        f"brightness in plain diffusers: {np.mean(brightness(before, [])):.3f} -> {np.mean(brightness(after, [])):.3f}"
    )


if __name__ == "__main__":
    main()
