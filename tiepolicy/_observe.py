"""Step 2, seeing: a module or a mapping of tensors becomes facts.

This is the only reader of torch storages, of DTensors, and of the prefixes that wrappers put before names.
"""

from collections.abc import Iterator, Mapping

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DataParallel, DistributedDataParallel

from tiepolicy._facts import Kind, TensorFact, TensorSpec
from tiepolicy.errors import ObservationError

# torch.compile, activation checkpointing and FSDP1 register the module they wrap under these names.
_WRAPPED = frozenset({"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"})


class Facts(Mapping[str, TensorFact]):
    """The facts of every named tensor of one model, each built when it is asked for.

    Holds the tensors, so the identities in the facts stay valid for as long as this object lives.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor], kinds: Mapping[str, Kind]) -> None:
        self._tensors = tensors
        self._kinds = kinds

    def __getitem__(self, name: str) -> TensorFact:
        tensor = self._tensors[name]
        local = local_tensor(tensor)
        return TensorFact(
            name=name,
            kind=self._kinds.get(name, "tensor"),
            shape=tuple(tensor.shape),
            dtype=tensor.dtype,
            device=tensor.device,
            local_shape=tuple(local.shape),
            stride=tuple(local.stride()) if local.layout is torch.strided else (),
            offset=int(local.storage_offset()) if local.layout is torch.strided else 0,
            storage=_storage_identity(local),
            object_id=id(tensor),
            placement=_placement(tensor),
        )

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def names_of(self, tensor: torch.Tensor) -> list[str]:
        """The names of one tensor object, sorted."""
        return sorted(name for name, candidate in self._tensors.items() if candidate is tensor)

    def specs(self) -> dict[str, TensorSpec]:
        """Global shape and dtype of every name, in the order of the names."""
        return {name: TensorSpec(tuple(self._tensors[name].shape), self._tensors[name].dtype) for name in sorted(self)}

    def sharing(self) -> list[tuple[str, ...]]:
        """The sets of two or more names that are one object or lie in one storage, sorted; linear in the names."""
        names_by_memory: dict[int, list[str]] = {}
        for name, tensor in self._tensors.items():
            storage = _storage_identity(local_tensor(tensor))
            # Objects and storages are both addresses of living objects, so the two cannot collide.
            names_by_memory.setdefault(id(tensor) if storage is None else storage, []).append(name)
        return sorted(tuple(sorted(names)) for names in names_by_memory.values() if len(names) > 1)


def observe(source: nn.Module | Mapping[str, torch.Tensor]) -> Facts:
    """Collect the facts of a module's parameters and persistent buffers, or of a mapping's tensors.

    Reads no tensor data and synchronises no device.

    Raises:
        ObservationError: If a name is no string, a value no tensor, or two different tensors get one name once the
            prefixes of wrappers are removed.
    """
    if not isinstance(source, nn.Module):
        return Facts(_checked(source), {})
    tensors: dict[str, torch.Tensor] = {}
    kinds: dict[str, Kind] = {}
    for prefix, module in named_modules(source):
        for kind, name, tensor in _own_tensors(module):
            full_name = f"{prefix}.{name}" if prefix else name
            if tensors.setdefault(full_name, tensor) is not tensor:
                raise ObservationError(
                    f"two different tensors are both named {full_name} once the prefixes of wrappers (torch.compile, "
                    "DDP, activation checkpointing) are removed; rename one of the modules",
                    names=[full_name],
                )
            kinds[full_name] = kind
    return Facts(tensors, kinds)


def local_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """The memory this process holds of a tensor: the local shard of a DTensor, the tensor itself otherwise."""
    if isinstance(tensor, DTensor):
        with torch.no_grad():
            local: torch.Tensor = tensor.to_local()
        return local
    return tensor


def named_modules(root: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every module under every path it is registered at, the path without the parts that wrappers add.

    With `torch.compile`, DDP and the like in between, several modules have one path: the wrapper first.
    """
    paths: dict[str, str] = {}
    wraps: dict[str, bool] = {}
    for path, module in root.named_modules(remove_duplicate=False):
        parent, _, leaf = path.rpartition(".")
        if not path:
            paths[path] = ""
        elif leaf in _WRAPPED or (leaf == "module" and wraps[parent]):
            paths[path] = paths[parent]
        else:
            paths[path] = f"{paths[parent]}.{leaf}" if paths[parent] else leaf
        wraps[path] = isinstance(module, DistributedDataParallel | DataParallel)
        yield paths[path], module


def _checked(mapping: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
    for name, tensor in mapping.items():
        if not isinstance(name, str):
            raise ObservationError(f"the name {name!r} is a {type(name).__name__}; names of tensors are strings")
        if not isinstance(tensor, torch.Tensor):
            raise ObservationError(
                f"{name} is a {type(tensor).__name__}, not a tensor; plan the module, or only the tensors of its state",
                names=[name],
            )
    return mapping


def _own_tensors(module: nn.Module) -> Iterator[tuple[Kind, str, torch.Tensor]]:
    for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
        yield "parameter", name, parameter
    for name, buffer in module.named_buffers(recurse=False, remove_duplicate=False):
        if name not in module._non_persistent_buffers_set:  # noqa: SLF001 - torch has no public way to ask
            yield "buffer", name, buffer


def _storage_identity(local: torch.Tensor) -> int | None:
    """The address of the storage object, which unlike a data pointer also identifies meta and fake storages."""
    if local.layout is not torch.strided or local.numel() == 0:
        return None
    storage = local.untyped_storage()
    return int(storage._cdata)  # noqa: SLF001 - torch has no public identity of a storage


def _placement(tensor: torch.Tensor) -> str:
    if not isinstance(tensor, DTensor):
        return ""
    return f"{tensor.device_mesh.device_type}{tuple(tensor.device_mesh.shape)} {tuple(tensor.placements)}"
