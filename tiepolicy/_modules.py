"""Step 3, names: the modules of a tree and the tensors they hold, without the prefixes that wrappers add."""

from collections.abc import Iterator

import torch
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from tiepolicy.errors import ObservationError

# torch.compile, activation checkpointing and FSDP1 register the module they wrap under these names.
_WRAPPED = frozenset({"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"})


def named_modules(root: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every module under every path it is registered at, the path without the parts that wrappers add.

    With `torch.compile`, DDP and the like in between, several modules have one path: the wrapper first.

    Raises:
        ObservationError: If a module contains itself.
    """
    yield "", root
    above = {id(root)}
    stack = [(root, "", _children(root))]
    while stack:
        parent, path, children = stack[-1]
        for leaf, child in children:
            child_path = _path(parent, path, leaf)
            if id(child) in above:
                raise ObservationError(
                    f"the module at {child_path} ({type(child).__name__}) contains itself, so its tensors have "
                    "endlessly many names; keep the reference to the outer module out of the module tree, for example "
                    "in a tuple"
                )
            yield child_path, child
            above.add(id(child))
            stack.append((child, child_path, _children(child)))
            break
        else:
            stack.pop()
            above.discard(id(parent))


def parameters_of(module: nn.Module) -> list[tuple[str, torch.Tensor]]:
    """The parameters that a module holds itself, by attribute."""
    # named_parameters() builds several Python objects per name; this mapping is what it reads.
    return [(name, tensor) for name, tensor in module._parameters.items() if tensor is not None]  # noqa: SLF001


def buffers_of(module: nn.Module) -> list[tuple[str, torch.Tensor]]:
    """The persistent buffers that a module holds itself, by attribute."""
    # torch has no public way to ask which buffers are kept.
    scratch = module._non_persistent_buffers_set  # noqa: SLF001
    buffers = module._buffers.items()  # noqa: SLF001
    return [(name, tensor) for name, tensor in buffers if tensor is not None and name not in scratch]


def _children(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    # named_children() leaves out the second of two equal children, which has a name of its own.
    return iter([(leaf, child) for leaf, child in module._modules.items() if child is not None])  # noqa: SLF001


def _path(parent: nn.Module, path: str, leaf: str) -> str:
    if leaf in _WRAPPED or (leaf == "module" and isinstance(parent, DistributedDataParallel | DataParallel)):
        return path
    return f"{path}.{leaf}" if path else leaf
