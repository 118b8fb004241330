"""Images and videos of a run, embedded while they are small, linked otherwise."""

import base64
import os
import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from rlalign.training.untrusted_text import one_line

_IMAGES = {
    ".png": "image/png",
    ".jpg": "image/jpeg",
    ".jpeg": "image/jpeg",
    ".gif": "image/gif",
    ".webp": "image/webp",
    ".svg": "image/svg+xml",
}
_VIDEOS = {".mp4": "video/mp4", ".webm": "video/webm"}
_MAX_EMBEDDED_BYTES = 5 * 10**6
_MAX_PAGE_BYTES = 60 * 10**6
_STEPPED = re.compile(r"(?P<series>.+?)[-_](?P<step>\d+)")


@dataclass(frozen=True, kw_only=True)
class Medium:
    """One file of media/. `kind` is image, video or link; `source` is a data URI or a relative address."""

    kind: str
    source: str
    caption: str


@dataclass(frozen=True, kw_only=True)
class MediaSeries:
    """Files that show the same thing at different steps: the ends side by side, the rest folded away."""

    title: str
    ends: list[Medium]
    between: list[Medium]


def read_media(run_dir: Path) -> list[MediaSeries]:
    """Group `media/NAME-STEP.EXT` by NAME and order by STEP. Links out of the run directory are left out."""
    root = run_dir.resolve()
    found: dict[str, list[tuple[int, Path]]] = {}
    for path in sorted((run_dir / "media").rglob("*")):
        if path.is_file() and path.resolve().is_relative_to(root):
            match = _STEPPED.fullmatch(path.stem)
            series, step = (match["series"], int(match["step"])) if match else (path.stem, -1)
            found.setdefault(f"{series}{path.suffix.lower()}", []).append((step, path))
    budget = _MAX_PAGE_BYTES
    groups = []
    for name, files in sorted(found.items()):
        media = []
        # The ends first: they are what the page is for, should the budget run out.
        order = sorted(files)
        for step, path in [order[0], *order[:0:-1]]:
            medium, used = _medium(path, run_dir, step, budget)
            budget -= used
            media.append(medium)
        ends, between = media[:2], media[:1:-1]
        groups.append(
            MediaSeries(title=one_line(Path(name).stem.replace("_", " "), limit=80), ends=ends, between=between)
        )
    return sorted(groups, key=lambda series: series.ends[0].kind == "link")  # stable: what shows comes first


def _medium(path: Path, run_dir: Path, step: int, budget: int) -> tuple[Medium, int]:
    suffix, size = path.suffix.lower(), path.stat().st_size
    caption = f"step {step:,}" if step >= 0 else one_line(path.name, limit=80)
    types = _IMAGES | _VIDEOS
    if suffix in types and size < _MAX_EMBEDDED_BYTES and 4 * size / 3 <= budget:
        content = base64.b64encode(path.read_bytes()).decode("ascii")
        kind = "image" if suffix in _IMAGES else "video"
        return Medium(kind=kind, source=f"data:{types[suffix]};base64,{content}", caption=caption), len(content)
    address = quote(os.fsencode(path.relative_to(run_dir).as_posix()))
    shown = f"{one_line(path.name, limit=80)} ({size / 1e6:.1f} MB)"
    return Medium(kind="link", source=f"./{address}", caption=shown), 0
