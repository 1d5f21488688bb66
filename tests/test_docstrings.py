"""Whoever calls a public name is told what it takes, what it gives back, and which of our errors it raises."""

import ast
import dataclasses
import importlib
import inspect
import re
import sys
import textwrap
from pathlib import Path

import docstring_parser
from docstring_parser import DocstringStyle

from eagle3.errors import Eagle3Error
from tiepolicy import hookspecs
from tiepolicy.errors import TiePolicyError

DOCS = Path(__file__).parents[1] / "docs"
DIRECTIVE = re.compile(r"^```\{generated\} api (\S+)(.*)$", re.MULTILINE)
OURS = {"eagle3", "tiepolicy", "tiepolicy_dcp", "tiepolicy_fsdp2", "tiepolicy_hf"}
#: A summary that begins so says what is returned: "The names of one tensor, sorted."
NAMES_A_VALUE = re.compile(r"(The|A|An|All|Each|Every|Any|What|Which|Whether|How|Where|Who|Returns) ")


def published():
    """Everything in the site's reference, in which `test_site` misses no public name, by dotted name."""
    sys.path.insert(0, str(DOCS))
    try:
        from sitegen.api import exported
    finally:
        sys.path.remove(str(DOCS))
    found = {f"hookspecs.{name}": value for name, value in vars(hookspecs).items() if name.startswith("tiepolicy_")}
    for page in sorted((DOCS / "api").glob("*.md")):
        for module, words in DIRECTIVE.findall(page.read_text()):
            namespace = importlib.import_module(module)
            found |= {f"{module}.{name}": getattr(namespace, name) for name in words.split() or exported(module)}
    return found


def parts(path, value):
    """A public function, or a public class and what can be called of it, by dotted name."""
    if not inspect.isclass(value):
        return {path: value} if inspect.isroutine(value) else {}
    members = {name: inspect.unwrap(getattr(member, "__func__", member)) for name, member in vars(value).items()}
    # What a base class of another library asks for is described there.
    asked = {name for base in value.__mro__[1:] if base.__module__.split(".")[0] not in OURS for name in vars(base)}
    public = {
        name: member
        for name, member in members.items()
        if inspect.isfunction(member) and member.__name__ == name and name[0] != "_" and name not in asked
    }
    return {path: value} | {f"{path}.{name}": member for name, member in public.items()}


def made_with(value):
    """The parameters of a call, without those that Python writes for a class of data."""
    function = value
    if inspect.isclass(value):
        function = vars(value).get("__init__")
        if function is None or dataclasses.is_dataclass(value) or function.__module__ != value.__module__:
            return set()
    return {name for name in inspect.signature(function).parameters if name not in ("self", "cls")}


def raised(function):
    """Our errors that the body of a function raises."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except OSError:  # Hypothesis writes the function of a composite strategy
        return set()
    calls = [node.exc for node in ast.walk(tree) if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call)]
    found = [function.__globals__.get(call.func.id) for call in calls if isinstance(call.func, ast.Name)]
    return {cls for cls in found if inspect.isclass(cls) and issubclass(cls, TiePolicyError | Eagle3Error)}


def gaps(path, value):
    """What a docstring leaves unsaid, or says of what is not there."""
    text = inspect.cleandoc(value.__doc__ or "")
    if not text:
        return [f"{path} has no docstring"]
    doc = docstring_parser.parse(text, DocstringStyle.GOOGLE)
    taken, told = made_with(value), {param.arg_name.lstrip("*") for param in doc.params}
    shown = set(re.findall(r"`(\w+)`", text))
    found = [f"{path} does not say what {name} is" for name in sorted(taken - told - shown)]
    if inspect.isclass(value):
        return found
    found += [f"{path} takes no {name}" for name in sorted(told - taken - {"cls"})]
    returns = inspect.signature(value).return_annotation not in (None, "None", inspect.Signature.empty)
    if returns and doc.returns is None and not NAMES_A_VALUE.match(text):
        found.append(f"{path} does not say what it returns")
    named = {error.type_name for error in doc.raises}
    unsaid = [cls.__name__ for cls in raised(value) if named.isdisjoint(base.__name__ for base in cls.__mro__)]
    return found + [f"{path} does not say that it raises {name}" for name in sorted(unsaid)]


def test_docstrings_of_public_names_are_complete():
    public = {path: part for name, value in published().items() for path, part in parts(name, value).items()}
    assert [] == [gap for path, part in public.items() for gap in gaps(path, part)]


def test_what_a_docstring_leaves_unsaid_is_found():
    def weigh(tensor, *, unit):
        """Weigh it."""
        if unit is None:
            raise TiePolicyError(tensor)
        return unit

    weigh.__annotations__["return"] = str
    assert [
        "weigh does not say what tensor is",
        "weigh does not say what unit is",
        "weigh does not say what it returns",
        "weigh does not say that it raises TiePolicyError",
    ] == gaps("weigh", weigh)
