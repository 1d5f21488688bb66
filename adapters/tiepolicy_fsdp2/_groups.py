"""Step 2, grouping: which modules are sharded together, so that no tie crosses the border of a group."""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter

from torch import nn

import tiepolicy
from tiepolicy.errors import ShardingError
from tiepolicy_fsdp2._kept import places

#: What to gather on its own: a module, every module of a class, or the module at a path.
Block = nn.Module | type[nn.Module] | str

# The group that is left for whatever is in no block.
_ROOT = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardGroup:
    """Modules whose parameters FSDP2 gathers and frees together."""

    #: Where the modules are, without the prefixes of wrappers, sorted; "" is the model itself.
    paths: tuple[str, ...]
    modules: tuple[nn.Module, ...]


def shard_groups(
    model: nn.Module,
    *,
    blocks: Iterable[Block | Sequence[Block]] = (),
    ignored_params: Collection[nn.Parameter] = (),
) -> tuple[ShardGroup, ...]:
    """Decide which modules to shard together: the blocks that were asked for, moved where a tie would cross them.

    The modules that hold one tied parameter come into one group. If one of their groups contains all of them, and
    only borders of their own keep the others out, that is the one; otherwise they leave the blocks they lie in and
    become a group of their own, with what was grouped with them. Parameters of a group are there while a module of it
    runs, so a tied module must be called; to read its weight from outside gives a shard.

    Changes nothing, needs no process group.

    Example:
        >>> model = nn.ModuleDict({"embed": nn.Embedding(6, 2), "head": nn.Linear(2, 6, bias=False)})
        >>> model["head"].weight = model["embed"].weight
        >>> [group.paths for group in shard_groups(model, blocks=["embed", "head"])]
        [('embed', 'head'), ('',)]

    Args:
        model: The module to shard.
        blocks: What to gather on its own, inner before outer or not; a sequence among them is one group.
        ignored_params: Parameters that will not be sharded.

    Returns:
        The groups in the order in which they must be sharded; the last one is the model's own.

    Raises:
        ShardingError: If a block is not in the model, or blocks contain each other in a circle.
    """
    layout = _Layout(model, _resolve(model, blocks))
    for holders in _clusters(model, layout, {id(parameter) for parameter in ignored_params}):
        layout.bring_together(holders)
    return tuple(layout.ordered())


def _resolve(model: nn.Module, blocks: Iterable[Block | Sequence[Block]]) -> list[list[nn.Module]]:
    """The groups that were asked for, each module in one of them, in the order of the model."""
    if isinstance(blocks, str) or not isinstance(blocks, Iterable):
        raise ShardingError(f"blocks is {blocks!r}, which is no list of blocks: hand over a list of them")
    at: dict[str, nn.Module] = {}
    paths: dict[int, str] = {}
    for path, module in tiepolicy.named_modules(model):
        at.setdefault(path, module)  # the outermost wrapper, whose forward contains the others'
        paths[id(module)] = path
    taken = {id(model)}
    units: list[list[nn.Module]] = []
    for block in blocks:
        parts = block if isinstance(block, Sequence) and not isinstance(block, str) else [block]
        found = [module for part in parts for module in _matches(model, part, at, paths)]
        fresh = [module for module in dict.fromkeys(found) if id(module) not in taken]
        taken |= {id(module) for module in fresh}
        units += [fresh] if parts is block else [[module] for module in fresh]
    position = {module: index for index, module in enumerate(paths)}
    return sorted((unit for unit in units if unit), key=lambda unit: min(position[id(module)] for module in unit))


def _matches(model: nn.Module, block: Block, at: dict[str, nn.Module], paths: dict[int, str]) -> list[nn.Module]:
    if isinstance(block, str):
        if block in at:
            return [at[block]]
        raise ShardingError(f"the block {block!r} is no module of {type(model).__name__}; its modules are {sorted(at)}")
    if isinstance(block, nn.Module):
        if id(block) in paths:
            return [block]
        raise ShardingError(f"a block, a {type(block).__name__}, is no part of the {type(model).__name__} to shard")
    if not isinstance(block, type):
        raise ShardingError(f"the block {block!r} is no module, class or path")
    found = [at[paths[id(module)]] for module in model.modules() if isinstance(module, block)]
    if not found:
        raise ShardingError(f"{type(model).__name__} has no module of the class {block.__name__} among its blocks")
    return found


def _clusters(model: nn.Module, layout: "_Layout", ignored: set[int]) -> list[list[nn.Module]]:
    """The modules that hold one parameter, or a chain of parameters between them, or lie in one that does."""
    held: dict[int, list[nn.Module]] = {}
    for place in places(model):
        if id(place.parameter) not in ignored:
            held.setdefault(id(place.parameter), []).append(place.module)
    shared = [modules for modules in held.values() if len(modules) > 1]
    clusters = {id(module): [module] for modules in shared for module in modules}
    for modules in shared:
        around = [module for chain in layout.chains_of(modules) for module in chain if id(module) in clusters]
        for module in around:  # each holder, and the holders that contain it
            small, large = sorted((clusters[id(modules[0])], clusters[id(module)]), key=len)
            if small is not large:
                large += small
                clusters |= dict.fromkeys(map(id, small), large)
    return list({id(cluster): cluster for cluster in clusters.values()}.values())


class _Layout:
    """The modules of a model divided into units: each module belongs to the nearest unit above it."""

    def __init__(self, model: nn.Module, units: list[list[nn.Module]]) -> None:
        self.units = [[model], *units]
        self._unit = {id(module): i for i, unit in enumerate(self.units) for module in unit}
        self.chains: dict[int, list[tuple[nn.Module, ...]]] = {}
        self._walk((model,))
        self.paths: dict[int, str] = {}
        for path, module in tiepolicy.named_modules(model):
            self.paths.setdefault(id(module), path)

    def _walk(self, chain: tuple[nn.Module, ...]) -> None:
        self.chains.setdefault(id(chain[-1]), []).append(chain)
        for child in chain[-1].children():
            self._walk((*chain, child))

    def chains_of(self, modules: list[nn.Module]) -> list[tuple[nn.Module, ...]]:
        """Every way from the model down to some modules."""
        return [chain for module in modules for chain in self.chains[id(module)]]

    def _owner(self, chain: tuple[nn.Module, ...]) -> int:
        """The unit that the last module of a chain belongs to."""
        for module in reversed(chain):
            if id(module) in self._unit:
                return self._unit[id(module)]
        raise AssertionError("every chain starts with the model, which is a unit")

    def _drop(self, module: nn.Module) -> None:
        """Take away a border: the module joins the unit above it."""
        unit = self._unit.pop(id(module), None)
        if unit is not None:
            self.units[unit] = [member for member in self.units[unit] if member is not module]

    def bring_together(self, holders: list[nn.Module]) -> None:
        """Change the units so that some modules belong to one."""
        chains = self.chains_of(holders)
        owners = {self._owner(chain) for chain in chains}
        if len(owners) == 1:
            return
        for target in sorted(owners):
            loose = [chain[-1] for chain in chains if self._owner(chain) != target]
            if all(self._only_border_keeps(module, target) for module in loose):
                for module in loose:
                    self._drop(module)
                return
        self._set_apart(holders, chains)

    def _only_border_keeps(self, module: nn.Module, target: int) -> bool:
        """Whether a module would belong to a unit if it were not (part of) a unit itself."""
        above = [chain[:-1] for chain in self.chains[id(module)]]
        return id(module) in self._unit and all(chain and self._owner(chain) == target for chain in above)

    def _set_apart(self, holders: list[nn.Module], chains: list[tuple[nn.Module, ...]]) -> None:
        """Make some modules a unit of their own, wherever they lie."""
        members = [m for m in holders if any(len(_first(chain, holders)) == len(chain) for chain in self.chains[id(m)])]
        for chain in chains:
            for module in chain[len(_first(chain, members)) :]:
                self._drop(module)
        if any(member is self.units[_ROOT][0] for member in members):
            return  # the model itself holds one: FSDP2 takes it alone, and it holds all others
        together = list(members)
        for unit in {self._unit[id(member)] for member in members if id(member) in self._unit}:
            together += self.units[unit]
            self.units[unit] = []
        self._unit |= {id(module): len(self.units) for module in together}
        self.units.append(list(dict.fromkeys(together)))

    def ordered(self) -> list[ShardGroup]:
        """The units, a unit after all that lie within one of its modules."""
        within: dict[int, set[int]] = {i: set() for i, unit in enumerate(self.units) if unit}
        for i in within:
            for chain in self.chains_of(self.units[i]):
                for module in chain[:-1]:
                    within[self._unit.get(id(module), i)].add(i)
        for i, inner in within.items():
            inner.discard(i)
        try:
            order = list(TopologicalSorter({i: sorted(inner) for i, inner in within.items()}).static_order())
        except CycleError as error:
            circle = [self._describe(self.units[i]) for i in dict.fromkeys(error.args[1])]
            raise ShardingError(
                f"the groups {' and '.join(map(str, circle))} each hold a module that contains one of another, so "
                "none can be sharded first; name smaller blocks"
            ) from error
        return [
            ShardGroup(paths=self._describe(self.units[i]), modules=tuple(self.units[i])) for i in order if i != _ROOT
        ] + [ShardGroup(paths=("",), modules=tuple(self.units[_ROOT]))]

    def _describe(self, unit: list[nn.Module]) -> tuple[str, ...]:
        return tuple(sorted(self.paths[id(module)] for module in unit))


def _first(chain: tuple[nn.Module, ...], among: list[nn.Module]) -> tuple[nn.Module, ...]:
    """A chain as far as the first of some modules in it."""
    for index, module in enumerate(chain):
        if any(module is other for other in among):
            return chain[: index + 1]
    return chain
