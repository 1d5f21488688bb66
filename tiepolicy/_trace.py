"""Step 18, tracing: what each plugin is asked and answers, one line each, for authors of plugins.

On if the environment variable TIEPOLICY_TRACE is set (and is not 0) when a policy is made; otherwise nothing of this
module runs.
"""

import functools
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import pluggy

from tiepolicy._claims import Claim, Verdict
from tiepolicy._conflict import Conflict, Missing
from tiepolicy._plan import TiePlan

VARIABLE = "TIEPOLICY_TRACE"


def is_wanted() -> bool:
    """Whether the environment asks for a trace."""
    return os.environ.get(VARIABLE, "0") not in ("", "0")


def trace(manager: pluggy.PluginManager) -> None:
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
