"""rlalign: reinforcement learning and alignment, from one command, one script or one YAML.

Nothing heavy is imported here. Trainers live in `rlalign.llm`, equations in `rlalign.functional`.
"""

__version__ = "0.1.0"

__all__ = ["__version__"]
