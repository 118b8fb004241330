"""An accelerator for machines without one: tensors in a memory of their own, which do not meet those of the CPU.

It computes on the CPU and keeps to CUDA's rules: an operation on tensors of both memories fails, but for copies,
numbers, and CPU indices into a tensor there. `test_offload` runs this file in a process of its own, since the device
stays for as long as the process does: argv is a folder and names of `SCENARIOS`, and each prints a line with what it
found.
"""

import json
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from rlalign.diffusion.dso import DSOTrainer
from rlalign.training import session
from tests.diffusion.half_plane import CLASSES, RightHalf, untrained
from tests.diffusion.small_runs import merged, points_pipeline, points_trainer

NAME = "pretend"
MAY_MEET = ("aten::_to_copy", "aten::copy_", "aten::index_put_", "aten::index_put")


class There(Tensor):
    """A tensor in the device's memory."""

    @staticmethod
    def __new__(cls, held: Tensor) -> "There":
        layout = {"strides": held.stride(), "storage_offset": held.storage_offset(), "dtype": held.dtype}
        return Tensor._make_wrapper_subclass(cls, held.shape, device=torch.device(NAME, 0), **layout)

    def __init__(self, held: Tensor):
        self.held = held

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return carried_out(function, args, kwargs or {})

    # What torch does not pass on to subclasses.
    def __getitem__(self, index: Any) -> Tensor:
        return super().__getitem__(torch.tensor(index) if isinstance(index, list) else index)

    def tolist(self) -> Any:
        return self.held.tolist()

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    def untyped_storage(self) -> Any:
        return self.held.untyped_storage()


class Device(TorchDispatchMode):
    """Context in which the device can be asked for new tensors."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return carried_out(function, args, kwargs or {})


def carried_out(function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    name = function._schema.name
    tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    there = any(isinstance(tensor, There) for tensor in tensors)
    indices_alone = name == "aten::index" and isinstance(args[0], There)
    strangers = [tensor for tensor in tensors if not isinstance(tensor, There) and tensor.ndim]
    if there and strangers and name not in MAY_MEET and not indices_alone:
        raise RuntimeError(f"{name}: expected all tensors to be on the same device.")
    asked = kwargs.get("device")
    if asked is not None:
        there = torch.device(asked).type == NAME
        kwargs = kwargs | {"device": torch.device("cpu")}
    args, kwargs = pytree.tree_map(lambda leaf: leaf.held if isinstance(leaf, There) else leaf, given := (args, kwargs))
    result = function(*args, **kwargs)
    if function._schema.is_mutable and isinstance(given[0][0], Tensor):
        return given[0][0]
    return pytree.tree_map(lambda leaf: There(leaf) if there and isinstance(leaf, Tensor) else leaf, result)


def set_up() -> None:
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

    _setup_privateuseone_for_python_backend(NAME)
    torch.__future__.set_swap_module_params_on_conversion(True)  # parameters stay the same objects, as CUDA's do
    for make in ("tensor", "as_tensor"):
        setattr(torch, make, made_here_then_moved(getattr(torch, make)))


def made_here_then_moved(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def made(*args: Any, device: Any = None, **kwargs: Any) -> Tensor:
        return make(*args, **kwargs) if device is None else make(*args, **kwargs).to(device)

    return made


# ---------------------------------------------------------------- scenarios


def placed(pipeline: Any, where: str) -> Any:
    if where == "moved":
        pipeline.enable_model_cpu_offload(device=f"{NAME}:0")
        return pipeline
    return pipeline.to("cpu" if where == "cpu" else f"{NAME}:0")


def flow_grpo(folder: Path, where: str, *, stop: int = 0, **settings: Any) -> Any:
    """Three steps; after `stop` of them the run is killed, and resumed by another trainer."""
    settings = merged({"total_steps": 3, "average": {"every": 1}, "objective": {"kl_coef": 0.1}}, settings)
    trainer = points_trainer(folder, pipeline=placed(points_pipeline(), where), **settings)
    if not stop:
        return trainer.fit()
    steps: Iterator[Any] = trainer.steps()
    for _ in range(stop + 1):
        next(steps)
    steps.close()  # type: ignore[attr-defined]
    return points_trainer(folder, pipeline=placed(points_pipeline(), where), **settings).fit(resume=True)


def dso(folder: Path, where: str, **settings: Any) -> Any:
    small = {"samples": 24, "rounds": 2, "num_inference_steps": 3}
    evaluation = {"samples": 8, "num_inference_steps": 3, "pictures": 0}
    settings = {"total_updates": 4, "data": small, "pairs_per_step": 6, "eval": evaluation, **settings}
    return DSOTrainer(placed(untrained(), where), CLASSES, RightHalf(), run_dir=folder, **settings).fit()


SCENARIOS: dict[str, tuple[Callable[..., Any], str, dict[str, Any]]] = {
    "guard": (flow_grpo, "there", {"guard": True}),
    "guard_moved": (flow_grpo, "moved", {"guard": True}),
    "all_weights": (flow_grpo, "there", {"lora": None}),
    "all_weights_moved": (flow_grpo, "moved", {"lora": None}),
    "offloaded": (flow_grpo, "there", {"rollout": {"offload": True}, "guard": True}),
    "window_offloaded": (flow_grpo, "there", {"rollout": {"window": 2, "offload": True}}),
    "resumed": (flow_grpo, "there", {"stop": 1}),
    "resumed_moved": (flow_grpo, "moved", {"stop": 1}),
    "dso": (dso, "there", {"lora": None}),
    "dso_moved": (dso, "moved", {"lora": {"r": 2, "alpha": 4.0}}),
}
"""What trains, where its networks are (`moved`: in and out by `enable_model_cpu_offload`), and with what."""


def difference(name: str, folder: Path) -> float:
    """Between the weights that the device trains and those that the CPU does; the largest."""
    train, where, settings = SCENARIOS[name]
    here, there = (train(folder / f"{name}-{place}", place, **settings).tuned.parameters for place in ("cpu", where))
    return max(float((here[key] - there[key].cpu()).detach().abs().max()) for key in here)


def main() -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    session.write_report = lambda path: path
    set_up()
    folder = Path(sys.argv[1])
    for name in sys.argv[2:]:
        with Device():
            try:
                found: Any = difference(name, folder)
            except (RuntimeError, ValueError) as error:
                found = str(error).splitlines()[0]
        print("\n" + json.dumps({"scenario": name, "found": found}), flush=True)


if __name__ == "__main__":
    main()
