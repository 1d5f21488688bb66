"""Step 17, plugins: they are registered, asked, traced, and named where one of them fails.

The trace is on if the environment variable TIEPOLICY_TRACE is set (and is not 0) when a policy is made.
"""

import contextlib
import functools
import itertools
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from types import FrameType
from typing import Any, TypeVar, cast

import pluggy

from tiepolicy import _rules, hookspecs
from tiepolicy._claims import Claim, Verdict
from tiepolicy._conflict import Conflict, Missing
from tiepolicy._plan import TiePlan
from tiepolicy.errors import PluginError

_Value = TypeVar("_Value")


@dataclass(frozen=True, slots=True, kw_only=True)
class Plugin:
    """One plugin of a policy."""

    name: str
    module: str
    #: The hooks that it implements, sorted.
    hooks: tuple[str, ...]
    #: What was installed to get it.
    distribution: str
    #: Empty where the distribution runs from its sources, without being installed.
    version: str


class Plugins:
    """The plugins of one policy, the built-in rules among them, who are asked last.

    Args:
        plugins: Objects or modules that implement hooks.

    Raises:
        PluginError: If one would never answer.
    """

    def __init__(self, plugins: Iterable[object]) -> None:
        self.manager = pluggy.PluginManager(hookspecs.PROJECT)
        self.manager.add_hookspecs(hookspecs)
        self._is_traced = os.environ.get("TIEPOLICY_TRACE", "0") not in ("", "0")
        if self._is_traced:
            _trace(self.manager)
        self.manager.register(_rules, name="built-in rules")
        if not isinstance(plugins, Iterable):
            raise PluginError(f"plugins is a {type(plugins).__name__}; hand over a list of them")
        for plugin in plugins:
            self._register(plugin)

    def load_installed(self) -> None:
        """Add those that are published in the entry point group.

        Raises:
            PluginError: If one cannot be loaded.
        """
        try:
            self.manager.load_setuptools_entrypoints(hookspecs.PROJECT)
            self.manager.check_pending()
        except Exception as error:  # a plugin runs its own code when it is imported
            raise PluginError(
                f"the installed plugin {_broken(error)} cannot be loaded, {type(error).__name__}: {_in_line(error)}. "
                "Update or uninstall it"
            ) from error

    def described(self) -> list[Plugin]:
        """All of them, sorted by name, and where they come from."""
        origins = {id(plugin): distribution for plugin, distribution in self.manager.list_plugin_distinfo()}
        named = [(name, plugin) for name, plugin in self.manager.list_name_plugin() if plugin is not None]
        found = []
        for name, plugin in sorted(named, key=lambda item: item[0]):
            distribution = getattr(origins.get(id(plugin)), "project_name", "") or hookspecs.PROJECT
            found.append(
                Plugin(
                    name=name,
                    module=getattr(plugin, "__name__", None) or type(plugin).__module__,
                    hooks=tuple(sorted(caller.name for caller in self.manager.get_hookcallers(plugin) or ())),
                    distribution=distribution,
                    version=_version(distribution),
                )
            )
        return found

    def answer(self, hook_name: str) -> bool:
        """Whether anybody but the built-in rules implements a hook."""
        implementations = getattr(self.manager.hook, hook_name).get_hookimpls()
        return any(implementation.plugin is not _rules for implementation in implementations)

    def are_asked(self, hook_name: str) -> bool:
        """Whether a question goes through pluggy: a trace wants to see it even where only the built-in rules answer."""
        return self._is_traced or self.answer(hook_name)

    def ask(self, hook_name: str, **arguments: Any) -> Any:
        """The answer of a hook, whatever it is."""
        hook = getattr(self.manager.hook, hook_name)
        with _naming_culprit(hook):
            return hook(**arguments)

    def first(self, hook_name: str, expected: type[_Value], **arguments: Any) -> _Value:
        """The answer of a hook whose first answer counts; the built-in rules have one."""
        return self.checked(hook_name, self.ask(hook_name, **arguments), expected)

    def each(self, hook_name: str, expected: type[_Value], **arguments: Any) -> list[_Value]:
        """What all plugins answer to a hook, without the built-in rules."""
        hook = self.manager.subset_hook_caller(hook_name, remove_plugins=[_rules])
        found: list[object] = []
        with _naming_culprit(hook):
            for answer in hook(**arguments):
                # An answer that cannot be read through is refused like a thing in it. Generators raise while read.
                found += answer if isinstance(answer, Iterable) else [answer]
        return [self.checked(hook_name, answer, expected) for answer in found]

    def checked(self, hook_name: str, answer: object, expected: type[_Value]) -> _Value:
        """The answer, if it is of the type that is expected."""
        if not isinstance(answer, expected):
            raise PluginError(
                f"{self.culprit(hook_name)} answered {hook_name} with {answer!r}, a {type(answer).__name__}; expected "
                f"a {expected.__name__}"
            )
        return answer

    def culprit(self, hook_name: str) -> str:
        """Who gave a wrong answer to a hook: a plugin, or one of several."""
        implementations = getattr(self.manager.hook, hook_name).get_hookimpls()
        names = [each.plugin_name for each in implementations if each.plugin is not _rules]
        one = f"the plugin {names[0]}"
        return one if len(names) == 1 else f"one of the plugins {', '.join(names)} (TIEPOLICY_TRACE=1 shows which)"

    def _register(self, plugin: object) -> None:
        """Add a plugin that was handed over; one that would never answer is a mistake of whoever did."""
        name = self._free_name(plugin)
        if isinstance(plugin, type):
            raise PluginError(f"the plugin {name} is a class; hand over an object of it, {name}()")
        try:
            self.manager.register(plugin, name=name)
            self.manager.check_pending()
        except (pluggy.PluginValidationError, ValueError) as error:
            raise PluginError(f"the plugin {name} cannot be asked: {_in_line(error)}") from error
        if not self.manager.get_hookcallers(plugin):
            raise PluginError(f"the plugin {name} implements no hook; mark its functions with @tiepolicy.hookimpl")

    def _free_name(self, plugin: object) -> str:
        """What errors and traces call a plugin: pluggy's own name for an object is a number."""
        name = getattr(plugin, "__name__", None) or type(plugin).__name__
        names = itertools.chain([name], (f"{name}-{number}" for number in itertools.count(2)))
        return next(free for free in names if not self.manager.has_plugin(free))


def _in_line(error: Exception) -> str:
    return "; ".join(str(error).splitlines())


def _broken(error: Exception) -> str:
    """The entry point that an error of loading all of them is about."""
    place = ""
    for point in metadata.entry_points(group=hookspecs.PROJECT):
        place = f"{point.name} ({point.value})"
        try:
            plugin = point.load()
        except Exception:  # noqa: BLE001,RUF100 - the error at hand, once more
            break
        if isinstance(error, pluggy.PluginValidationError) and plugin is error.plugin:
            break
    return place


@contextlib.contextmanager
def _naming_culprit(hook: pluggy.HookCaller) -> Iterator[None]:
    """Turn what a plugin raises into an error that names it."""
    try:
        yield
    except Exception as error:
        frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
        for implementation in hook.get_hookimpls():
            if any(_runs(frame, implementation.function) for frame in frames):
                raised = f"raised {type(error).__name__}: {error}"
                raise PluginError(f"{hook.name} of the plugin {implementation.plugin_name} {raised}") from error
        raise


def _runs(frame: FrameType, function: object) -> bool:
    """Whether a frame is a call of a function, or of a method of its very object: two plugins may be of one class."""
    owner = getattr(function, "__self__", None)
    called = frame.f_code is getattr(function, "__code__", None)
    return called and (owner is None or any(value is owner for value in frame.f_locals.values()))


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return ""


def _trace(manager: pluggy.PluginManager) -> None:
    """Write every answer to every hook of a manager to stderr, with the plugin that gave it."""

    def before(hook_name: str, implementations: Sequence[pluggy.HookImpl], arguments: Mapping[str, object]) -> None:
        # A list that pluggy copies for each call, and calls next. Only an implementation knows who answered: what
        # pluggy's own tracing sees is the answer of all.
        cast("list[pluggy.HookImpl]", implementations)[:] = [
            implementation
            if implementation.wrapper or implementation.hookwrapper
            else _traced(implementation, hook_name, arguments)
            for implementation in implementations
        ]

    def after(*_: object) -> None:
        """What all answered together follows from the lines before."""

    manager.add_hookcall_monitoring(before, after)


def _traced(implementation: pluggy.HookImpl, hook_name: str, arguments: Mapping[str, object]) -> pluggy.HookImpl:
    function: Callable[..., Any] = implementation.function

    @functools.wraps(function)
    def traced(*values: object, **named: object) -> object:
        try:
            answer = function(*values, **named)
        except Exception as error:
            _say(hook_name, implementation, arguments, f"raised {type(error).__name__}: {error}")
            raise
        if isinstance(answer, Iterator):
            answer = list(answer)  # it can be read once
        for line in _lines(answer):
            _say(hook_name, implementation, arguments, line)
        return answer

    return pluggy.HookImpl(implementation.plugin, implementation.plugin_name, traced, implementation.opts)


def _say(hook_name: str, implementation: pluggy.HookImpl, arguments: Mapping[str, object], answer: str) -> None:
    about = "".join(
        f"{_shown(value)}: " for name, value in arguments.items() if name not in ("model", "facts", "claims")
    )
    sys.stderr.write(f"tiepolicy: {hook_name} of {implementation.plugin_name}: {about}{answer}\n")


def _lines(answer: object) -> list[str]:
    """One line for each thing that is answered."""
    if isinstance(answer, list | tuple):
        return [_shown(item) for item in answer] or ["nothing"]
    return ["nothing" if answer is None else _shown(answer)]


def _shown(value: object) -> str:
    match value:
        case Claim(names, source, detail):
            return f"{' and '.join(names)} ({source}{detail and ', '}{detail})"
        case Verdict(decision=decision, reason=reason, detail=detail):
            return f"{decision}, {reason}{detail and ', '}{detail}"
        case Conflict():
            return f"{' and '.join(value.names)} ({value.moment}, {value.difference})"
        case Missing(name=name):
            return f"{name} (missing)"
        case tuple():
            return " and ".join(map(str, value))
        case TiePlan():
            return str(value).partition("\n")[0]
        case _:
            return str(value)
