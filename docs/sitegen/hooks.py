"""The hooks, from their specifications."""

import inspect

from tiepolicy import hookspecs


def hooks() -> str:
    """Each hook with who is heard, its arguments and its answers."""
    parts = []
    for name, function in vars(hookspecs).items():
        options = getattr(function, f"{hookspecs.PROJECT}_spec", None)
        if options is not None:
            heard = "The first answer that is not None." if options["firstresult"] else "All answers."
            arguments = ", ".join(inspect.signature(function).parameters)
            parts.append(
                f"## {name}\n\n*Asked with:* `{arguments}`. *What counts:* {heard}\n\n"
                f"```{{eval-rst}}\n.. autofunction:: tiepolicy.hookspecs.{name}\n```\n"
            )
    return "\n".join(parts)
