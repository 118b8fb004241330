"""Where in the user's own file a reward failed, read off a traceback."""

import os
import re
from pathlib import Path

_FRAME = re.compile(r'^\s*File "(.+)", line (\d+)', re.MULTILINE)
_PACKAGE = str(Path(__file__).parents[1]) + os.sep


def where_it_failed(traceback: str) -> str:
    """`my_reward.py:12`: the last line of the first file that is neither ours nor the interpreter's; else empty.

    Example:
        >>> where_it_failed('  File "/a/mine.py", line 3, in f\\n  File "/usr/lib/python3/re.py", line 9, in g')
        'mine.py:3'
    """
    frames = [
        (file, line)
        for file, line in _FRAME.findall(traceback)
        if not file.startswith((_PACKAGE, "<frozen")) and "/importlib/" not in file
    ]
    own = [f"{Path(file).name}:{line}" for file, line in frames if file == frames[0][0]]
    return own[-1] if own else ""
