"""`python -m rlalign`: the same commands as the `rlalign` script (what `accelerate launch -m rlalign` starts)."""

from rlalign.cli import main

if __name__ == "__main__":
    main()
