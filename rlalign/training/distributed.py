"""Bring what every process collected to every process, so that statistics are those of the whole step."""

import atexit
import json
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from accelerate import Accelerator
from torch import Tensor

MAX_DIMENSIONS = 8


@runtime_checkable
class Gatherable(Protocol):
    """Anything that is a flat dict of tensors and can be joined; `rlalign.buffers.Rollout` is."""

    def state_dict(self) -> Mapping[str, Tensor]: ...

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor]) -> Any: ...

    @classmethod
    def concatenate(cls, parts: Sequence[Any]) -> Any: ...


AnyGatherable = TypeVar("AnyGatherable", bound=Gatherable)


def leave_at_exit(accelerator: Accelerator) -> None:
    """Have the process leave its group before Python's end, where the group's own threads would abort it."""
    if accelerator.num_processes > 1:
        atexit.register(accelerator.end_training)


def gather_rollout(rollout: AnyGatherable, accelerator: Accelerator) -> AnyGatherable:
    """Join the rollouts of all processes, in process order, on every process.

    Groups stay whole because a process collects whole groups. With one process the rollout itself comes back.

    Raises:
        ValueError: The processes hold different fields, for example because only one of them has a reference model.
    """
    if accelerator.num_processes == 1:
        return rollout
    state = rollout.state_dict()
    gathered = {name: gather_ragged(state[name], accelerator) for name in sorted(state)}
    kind = type(rollout)
    return kind.concatenate(
        [
            kind.from_state_dict({name: parts[rank] for name, parts in gathered.items()})
            for rank in range(accelerator.num_processes)
        ]
    )


def gather_ragged(value: Tensor, accelerator: Accelerator) -> list[Tensor]:
    """Every process's tensor, by process; shapes may differ, dtypes may not."""
    device = value.device
    shape = torch.full((1, MAX_DIMENSIONS), -1, dtype=torch.long)
    shape[0, : value.ndim] = torch.tensor(value.shape, dtype=torch.long)
    shapes = [row[row >= 0].tolist() for row in _gather(shape, accelerator).cpu()]
    sizes = [int(torch.tensor(shape, dtype=torch.long).prod()) for shape in shapes]
    flat = torch.zeros(1, max(1, *sizes), dtype=value.dtype, device=accelerator.device)
    flat[0, : value.numel()] = value.reshape(-1).to(accelerator.device)
    rows = _gather(flat.view(torch.uint8) if value.dtype == torch.bool else flat, accelerator).to(device)
    rows = rows.view(torch.bool) if value.dtype == torch.bool else rows
    return [row[:size].view(shape) for row, size, shape in zip(rows, sizes, shapes, strict=True)]


def gather_json(value: Any, accelerator: Accelerator) -> list[Any]:
    """Every process's value, by process; anything that JSON can hold."""
    if accelerator.num_processes == 1:
        return [value]
    text = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    return [json.loads(part.cpu().numpy().tobytes()) for part in gather_ragged(text, accelerator)]


def own_share(values: Sequence[Any], accelerator: Accelerator) -> Any:
    """This process's entry of what `gather_json` gave; with another number of processes, one that another had."""
    return values[accelerator.process_index % len(values)]


def sum_over_processes(values: Mapping[str, float], accelerator: Accelerator) -> dict[str, float]:
    """Add up each process's numbers, name by name."""
    if accelerator.num_processes == 1:
        return dict(values)
    names = sorted(values)
    # MPS has no float64; a job of several processes never runs there.
    total = torch.tensor([values[name] for name in names], dtype=torch.float64, device=accelerator.device)
    summed: Any = accelerator.reduce(total, reduction="sum")
    return dict(zip(names, summed.tolist(), strict=True))


def _gather(value: Tensor, accelerator: Accelerator) -> Tensor:
    gathered: Any = accelerator.gather(value.to(accelerator.device))
    return gathered
