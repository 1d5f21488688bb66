"""Step 3, seeing: a module or a mapping of tensors becomes facts, under names without the prefixes of wrappers."""

import contextlib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace

import torch
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from tiepolicy import _memory
from tiepolicy._facts import Kind, Specs, TensorFact
from tiepolicy.errors import ObservationError

# torch.compile, activation checkpointing and FSDP1 register the module they wrap under these names.
_WRAPPED = frozenset({"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"})
#: What names tensors: a module, or a mapping.
TensorSource = nn.Module | Mapping[str, torch.Tensor]

# The public name of what lazy modules hold before their first call.
_LAZY = (nn.UninitializedParameter, nn.UninitializedBuffer)


class Facts(Mapping[str, TensorFact]):
    """The facts of every named tensor of one model, each built when it is asked for.

    Holds the tensors, so the identities in the facts stay valid for as long as this object lives.

    Args:
        tensors: By name.
        kind: Of all that are no buffers.
        buffers: The names of the persistent buffers.
    """

    def __init__(
        self, tensors: Mapping[str, torch.Tensor], *, kind: Kind = "tensor", buffers: Collection[str] = ()
    ) -> None:
        self._tensors = tensors
        self._usual_kind: Kind = kind
        self._buffers = buffers
        self._known: dict[str, TensorFact] = {}
        self._known_by_object: dict[int, TensorFact] = {}
        self._names_by_object: dict[int, list[str]] | None = None

    def __getitem__(self, name: str) -> TensorFact:
        fact = self._known.get(name)
        if fact is None:
            tensor = self._tensors[name]
            kind = "buffer" if name in self._buffers else self._usual_kind
            same = self._known_by_object.get(id(tensor))
            fact = _fact(name, kind, tensor) if same is None else replace(same, name=name, kind=kind)
            self._known[name] = self._known_by_object[id(tensor)] = fact
        return fact

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor called `name`."""
        return self._tensors[name]

    def buffers(self) -> Collection[str]:
        """The names of the persistent buffers."""
        return self._buffers

    def is_buffer(self, name: str) -> bool:
        """Whether `name` is that of a persistent buffer."""
        return name in self._buffers

    def names_of(self, tensor: torch.Tensor) -> list[str]:
        """The names of one `tensor` object, sorted."""
        if self._names_by_object is None:
            self._names_by_object = {}
            for name, candidate in self._tensors.items():
                self._names_by_object.setdefault(id(candidate), []).append(name)
        return sorted(self._names_by_object.get(id(tensor), ()))

    def specs(self) -> Specs:
        """The global shape and dtype of every name, as they are now.

        Raises:
            ObservationError: If a tensor has no shape in whole numbers.
        """
        tensors = self._tensors.values()
        with self._naming_the_culprit():
            shapes: list[tuple[int, ...]] = [tensor.shape for tensor in tensors]
            if not _memory.are_plain(tensors):
                shapes = list(map(_shape, self._tensors, tensors))
            return Specs(list(self._tensors), shapes, [tensor.dtype for tensor in tensors])

    def sharing(self) -> list[tuple[str, ...]]:
        """The sets of two or more names that are one object or whose memory meets, sorted."""
        names = list(self._tensors)
        with self._naming_the_culprit():
            found = _memory.sharing(list(self._tensors.values()))
        return sorted(tuple(sorted(names[position] for position in positions)) for positions in found)

    @contextlib.contextmanager
    def _naming_the_culprit(self) -> Iterator[None]:
        """Where tensors asked together raise, ask each: the error then names the tensor."""
        try:
            yield
        except Exception:
            for name in self:
                self[name]
            raise


def observe(source: "TensorSource | Facts") -> Facts:
    """The facts of the parameters and persistent buffers of a module, or of the tensors of a mapping: the `source`.

    Reads no tensor data and synchronises no device. Facts stay what they are.

    Raises:
        ObservationError: If the source is neither, a name is no string, a value no tensor or not initialised, two
            different tensors get one name once the prefixes of wrappers are removed, or a module contains itself.
    """
    if not isinstance(source, nn.Module):
        if not isinstance(source, Mapping):
            raise ObservationError(
                f"a {type(source).__name__} has no names of tensors; plan a module, or a mapping of names to tensors"
            )
        return source if isinstance(source, Facts) else Facts(_checked(source))
    tensors: dict[str, torch.Tensor] = {}
    buffers: set[str] = set()
    for path, module in named_modules(source):
        start = f"{path}." if path else ""
        kept = buffers_of(module)
        buffers.update(start + attribute for attribute, _ in kept)
        for attribute, tensor in parameters_of(module) + kept:
            name = start + attribute
            if tensors.setdefault(name, tensor) is not tensor:
                raise ObservationError(
                    f"two different tensors are both named {name} once the prefixes of wrappers (torch.compile, DDP, "
                    "activation checkpointing) are removed; rename one of the modules",
                    names=[name],
                )
    return Facts(_checked(tensors), kind="parameter", buffers=buffers)


def named_modules(root: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every module below `root` under every path it is registered at, without the parts of paths that wrappers add.

    With `torch.compile`, DDP and the like in between, several modules have one path: the wrapper first.

    Raises:
        ObservationError: If `root` is no module, or a module contains itself.
    """
    check_module(root)
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


def check_module(model: object) -> None:
    """Refuse what is no module where one is needed.

    Raises:
        ObservationError: If it is none.
    """
    if not isinstance(model, nn.Module):
        raise ObservationError(f"a {type(model).__name__} is no module; hand over the model itself")


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


def _fact(name: str, kind: Kind, tensor: torch.Tensor) -> TensorFact:
    try:
        return _seen(name, kind, tensor)
    except ObservationError:
        raise
    except Exception as error:  # a tensor subclass answers with code of its own
        raise ObservationError(
            f"{name} is a {type(tensor).__name__} that does not say what it holds: {type(error).__name__}: {error}; "
            "plan the tensors that it is made of",
            names=[name],
        ) from error


def _shape(name: str, tensor: torch.Tensor) -> tuple[int, ...]:
    if not tensor.is_nested:
        shape = tuple(tensor.shape)
        if all(type(size) is int for size in shape):
            return shape
        problem, advice = f"has the symbolic shape {shape}", "plan the model where it is not traced"
    else:
        problem, advice = "is nested, so it has no shape", "plan its values and offsets, or pad it"
    raise ObservationError(f"{name} {problem}, and a plan needs every size as a whole number; {advice}", names=[name])


def _seen(name: str, kind: Kind, tensor: torch.Tensor) -> TensorFact:
    shape = _shape(name, tensor)
    local = _memory.local_tensor(tensor)
    inner, context = _memory.inner_tensors(local)
    strided = local.layout is torch.strided
    storage, address = _memory.whereabouts(local)
    return TensorFact(
        name=name,
        kind=kind,
        shape=shape,
        dtype=tensor.dtype,
        device=tensor.device,
        local_shape=tuple(local.shape),
        stride=tuple(local.stride()) if strided else (0,) * local.dim(),
        offset=int(local.storage_offset()) if strided else 0,
        storage=storage,
        address=address,
        object_id=id(tensor),
        placement=_memory.placement(tensor),
        inner=tuple(_seen(name, kind, part) for part in inner),
        context=context,
    )


def _checked(mapping: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
    # The types of a large mapping are few: looking at each of those is enough, unless one is wrong.
    wrong_names = any(not issubclass(cls, str) for cls in set(map(type, mapping)))
    types = set(map(type, mapping.values()))
    wrong_values = any(not issubclass(cls, torch.Tensor) or issubclass(cls, _LAZY) for cls in types)
    if wrong_names or wrong_values:
        for name, tensor in mapping.items():
            _check(name, tensor)
    return mapping


def _check(name: object, tensor: object) -> None:
    if not isinstance(name, str):
        raise ObservationError(f"the name {name!r} is a {type(name).__name__}; names of tensors are strings")
    if not isinstance(tensor, torch.Tensor):
        raise ObservationError(
            f"{name} is a {type(tensor).__name__}, not a tensor; plan the module, or only the tensors of its state",
            names=[name],
        )
    if isinstance(tensor, _LAZY):
        raise ObservationError(
            f"{name} has no shape yet: its module is lazy and was never called; run one batch through the model first",
            names=[name],
        )


def _children(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    # named_children() leaves out the second of two equal children, which has a name of its own.
    return iter([(leaf, child) for leaf, child in module._modules.items() if child is not None])  # noqa: SLF001


def _path(parent: nn.Module, path: str, leaf: str) -> str:
    if leaf in _WRAPPED or (leaf == "module" and isinstance(parent, DistributedDataParallel | DataParallel)):
        return path
    return f"{path}.{leaf}" if path else leaf
