"""The dependency rule: who may import what, read from the source, and what must start without torch."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

FOUNDATION = ["functional", "statistics", "config"]
SHARED = ["buffers", "nn", "optim", "training", "advantages"]
DOMAINS = ["agents", "llm", "diffusion"]
MAY_IMPORT = {
    "functional": [],
    "statistics": [],
    "config": [],
    "buffers": FOUNDATION,
    "nn": FOUNDATION,
    "optim": FOUNDATION,
    "training": FOUNDATION,
    "advantages": ["functional", "statistics", "config", "buffers"],
    **dict.fromkeys(DOMAINS, FOUNDATION + SHARED),
    "cli": FOUNDATION + SHARED + DOMAINS,
    "__init__": [],
    "__main__": ["cli"],
}
# Modules beside the packages that belong to one of the units above.
UNIT_OF_MODULE = {"config_messages": "config", "config_schema": "config", "config_unknown": "config"}
UNIT_OF_MODULE |= {"config_papers": "config", "cli_errors": "cli"}
UNIT_OF_MODULE |= {"config_fields": "config", "config_keywords": "config", "yaml_strict": "config", "cli_text": "cli"}
FRAMEWORKS = {
    "accelerate": ["training", *DOMAINS],
    "gymnasium": ["agents"],
    "minari": ["agents"],
    "trl": ["llm"],
    "vllm": ["llm"],
    "datasets": ["llm"],
    "transformers": ["llm", "diffusion"],
    "peft": ["llm", "diffusion"],
    "diffusers": ["diffusion"],
    "rlalign_envs": [],
}
NO_TORCH = ["config", "cli"]
EQUATIONS_MAY_IMPORT = {"torch", "jaxtyping", *sys.stdlib_module_names}


def sources() -> list[Path]:
    return sorted((ROOT / "rlalign").rglob("*.py"))


def unit_of(dotted: str) -> str:
    """`rlalign.buffers.rollout` -> `buffers`; `rlalign` itself -> `__init__`."""
    name = dotted.split(".")[1] if "." in dotted else "__init__"
    return UNIT_OF_MODULE.get(name, name)


def dotted_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(tree: ast.AST, path: Path) -> Iterator[str]:
    """Every module that the source imports, at any depth, under `TYPE_CHECKING` or in a function."""
    package = dotted_name(path).split(".") if path.name == "__init__.py" else dotted_name(path).split(".")[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            # `from rlalign import training` names a unit in the alias, not in the module.
            yield from (f"rlalign.{alias.name}" for alias in node.names if module == "rlalign")
            if module != "rlalign":
                yield module


def violations(path: Path, source: str) -> Iterator[str]:
    here, unit = path.relative_to(ROOT), unit_of(dotted_name(path))
    if unit not in MAY_IMPORT:
        yield f"{here} belongs to no layer: give {unit!r} a place in {Path(__file__).name}"
        return
    allowed = MAY_IMPORT[unit]
    for name in imported(ast.parse(source), path):
        root = name.split(".")[0]
        # `rlalign` itself holds only the version and imports nothing, so everyone may read it.
        if root == "rlalign" and unit_of(name) not in (unit, *allowed, "__init__", "__version__"):
            yield f"{here} imports {name}: {unit} may import only {', '.join(allowed) or 'itself'}"
        if root in FRAMEWORKS and unit not in FRAMEWORKS[root]:
            only = ", ".join(FRAMEWORKS[root]) or "no module of rlalign"
            yield f"{here} imports {name}: only {only} may import {root}"
        if unit == "functional" and root not in EQUATIONS_MAY_IMPORT | {"rlalign"}:
            yield f"{here} imports {name}: functional may import only torch"


def test_every_module_imports_only_lower_layers():
    found = [line for path in sources() for line in violations(path, path.read_text(encoding="utf-8"))]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("file", "source", "message"),
    [
        (
            "buffers/x.py",
            "import rlalign.training",
            "rlalign/buffers/x.py imports rlalign.training: buffers may import only functional, statistics, config",
        ),
        (
            "llm/x.py",
            "def f():\n    from ..diffusion import sde",
            "rlalign/llm/x.py imports rlalign.diffusion: llm may import only functional, statistics, config, buffers, "
            "nn, optim, training, advantages",
        ),
        (
            "functional/x.py",
            "from rlalign import buffers",
            "rlalign/functional/x.py imports rlalign.buffers: functional may import only itself",
        ),
        ("functional/x.py", "import numpy", "rlalign/functional/x.py imports numpy: functional may import only torch"),
        (
            "optim/x.py",
            "from accelerate import Accelerator",
            "rlalign/optim/x.py imports accelerate: only training, agents, llm, diffusion may import accelerate",
        ),
        (
            "agents/x.py",
            "import rlalign_envs",
            "rlalign/agents/x.py imports rlalign_envs: only no module of rlalign may import rlalign_envs",
        ),
        ("helpers/x.py", "", "rlalign/helpers/x.py belongs to no layer: give 'helpers' a place in test_layers.py"),
    ],
)
def test_a_violation_is_found_and_named(file, source, message):
    assert list(violations(ROOT / "rlalign" / file, source)) == [message]


def test_allowed_imports_pass():
    source = (
        "import torch\nfrom rlalign.buffers import Rollout\nfrom .config import GAE\nfrom rlalign import functional"
    )
    assert not list(violations(ROOT / "rlalign/advantages/x.py", source))


def test_environments_import_no_rlalign():
    for path in sorted((ROOT / "envs").rglob("*.py")):
        names = {name.split(".")[0] for name in imported(ast.parse(path.read_text(encoding="utf-8")), path)}
        assert "rlalign" not in names, f"{path.relative_to(ROOT)} imports rlalign: protocols are structural"


def test_domains_define_no_buffer_and_no_equation_of_their_own():
    equations = {
        node.name
        for path in sorted((ROOT / "rlalign/functional").glob("*.py"))
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")
    }
    assert {"aggregate", "gae", "clipped_surrogate"} <= equations
    for path in sources():
        if unit_of(dotted_name(path)) not in DOMAINS:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                assert node.name not in equations, f"{path.relative_to(ROOT)} redefines functional's {node.name}"
            if isinstance(node, ast.ClassDef):
                bases = {base.id for base in node.bases if isinstance(base, ast.Name)}
                own = node.name.endswith("Buffer") or bases & {"Rollout", "TrainBatch"}
                assert not own, f"{path.relative_to(ROOT)} defines its own buffer {node.name}: use rlalign.buffers"


def torch_free_modules() -> list[str]:
    """Package `__init__`s, every `config.py` and `config_*.py`, and the modules that `rlalign --help` reads."""
    light = [p for p in sources() if p.stem in ("__init__", "config") or p.stem.startswith("config_")]
    light += [p for p in sources() if p not in light and unit_of(dotted_name(p)) in NO_TORCH]
    return [dotted_name(path) for path in light]


def test_help_and_configs_start_without_torch():
    modules = torch_free_modules()
    assert {"rlalign", "rlalign.config", "rlalign.cli", "rlalign.advantages.config", "rlalign.buffers"} <= set(modules)
    code = (
        "import importlib, sys\n"
        "for name in sys.argv[1:]:\n"
        "    importlib.import_module(name)\n"
        "    heavy = {'torch', 'transformers', 'trl', 'accelerate', 'numpy'} & set(sys.modules)\n"
        "    assert not heavy, f'{name} imports {sorted(heavy)}'\n"
    )
    done = subprocess.run([sys.executable, "-c", code, *modules], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
