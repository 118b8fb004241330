"""Adaptive projected guidance on an unmodified diffusers pipeline: strong guidance without burnt colours.

python examples/diffusion_apg.py [STEPS]        (of denoising, at least 2)

The pipeline has random weights, so that this runs offline in seconds; with a trained one the effect can be seen.
"""

import sys

import numpy as np
import torch

from rlalign.diffusion import adaptive_projected_guidance, tiny_pipeline


def saturation(images) -> float:
    """Mean distance between the largest and the smallest colour channel, from 0 to 1."""
    pixels = np.stack([np.asarray(image, dtype=np.float64) / 255 for image in images])
    return float((pixels.max(-1) - pixels.min(-1)).mean())


def main() -> None:
    pipeline, steps = tiny_pipeline("sd15"), max(2, int(sys.argv[1])) if len(sys.argv) > 1 else 10
    call = {"prompt": ["a red cube", "a green cat"], "num_inference_steps": steps, "height": 8, "width": 8}
    for scale in (4.0, 15.0):
        plain = pipeline(**call, guidance_scale=scale, generator=torch.Generator().manual_seed(0)).images
        with adaptive_projected_guidance(pipeline, eta=0.0, norm_threshold=15.0, momentum=-0.5):
            projected = pipeline(**call, guidance_scale=scale, generator=torch.Generator().manual_seed(0)).images
        print(f"guidance {scale:4.1f}: saturation {saturation(plain):.3f} plain, {saturation(projected):.3f} projected")


if __name__ == "__main__":
    main()
