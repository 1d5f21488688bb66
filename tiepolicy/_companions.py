"""Step 10, companions: tensors without which the rows of others cannot be told, and which no loader may do without."""

from collections.abc import Iterable
from typing import NamedTuple

from tiepolicy._observe import Facts


class Companion(NamedTuple):
    """A tensor that says what the rows of others are, such as the map from a draft's vocabulary to its target's.

    A model that has those others and not their companion would load them and mean something else by each row.
    """

    name: str
    #: The tensors that it belongs to, sorted.
    of: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.name} tells the rows of {' and '.join(self.of)}"


def companions_by_shape(facts: Facts) -> list[Companion]:
    """Persistent buffers of integers or truth values that have one entry for each row of parameters of their module.

    Args:
        facts: What was seen of a module; a mapping has no buffers.

    Returns:
        Each with the parameters of its module, or of a module below, that have as many rows.
    """
    # By the module that holds it and the number of its entries.
    maps: dict[tuple[str, int], list[str]] = {}
    for name in facts.buffers():
        tensor = facts.tensor(name)
        if tensor.dim() == 1 and not (tensor.dtype.is_floating_point or tensor.dtype.is_complex):
            maps.setdefault((name.rpartition(".")[0], tensor.shape[0]), []).append(name)
    if not maps:
        return []
    found: dict[str, list[str]] = {}
    for name in facts:
        tensor = facts.tensor(name)
        if tensor.dim() > 1 and not facts.is_buffer(name):
            for module in _modules_around(name):
                for companion in maps.get((module, tensor.shape[0]), ()):
                    found.setdefault(companion, []).append(name)
    return [Companion(name, tuple(sorted(of))) for name, of in found.items()]


def joined(companions: Iterable[Companion]) -> tuple[Companion, ...]:
    """Each companion once, with all that anybody says it belongs to, sorted by name."""
    found: dict[str, set[str]] = {}
    for companion in companions:
        found.setdefault(companion.name, set()).update(companion.of)
    return tuple(Companion(name, tuple(sorted(of))) for name, of in sorted(found.items()))


def _modules_around(name: str) -> Iterable[str]:
    """The paths of the modules that a tensor lies in, from the innermost to the whole model."""
    while name:
        name = name.rpartition(".")[0]
        yield name
