"""Step 21, pickles without trust: one becomes plain records, runs nothing, and costs no more than it is long."""

import io
import pickle
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NoReturn, Self

from tiepolicy.errors import UntrustedCheckpointError

#: The most arguments of a record; a path has one for each of its folders. Each use of a tuple as arguments copies it,
#: so that a longer one, used again and again, would cost the square of the file's length.
_MAX_ARGUMENTS = 256

# What a pickle is written with that tensors need: numbers, strings, tuples, lists, dicts, and records of them.
_OPCODES = (
    "PROTO FRAME STOP MARK POP POP_MARK DUP MEMOIZE PUT BINPUT LONG_BINPUT GET BINGET LONG_BINGET "
    "NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2 LONG LONG1 LONG4 UNICODE BINUNICODE SHORT_BINUNICODE BINUNICODE8 "
    "EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST LIST APPEND APPENDS EMPTY_DICT GLOBAL STACK_GLOBAL REDUCE NEWOBJ"
)


class Record:
    """Keeps what a pickle says about an object, and does nothing with it."""

    args: tuple[Any, ...]
    state: Any

    def __new__(cls, *args: Any) -> Self:
        """Take the arguments that the object would be made with."""
        record = super().__new__(cls)
        record.args, record.state = args, None
        return record


def record(name: str) -> type[Record]:
    """A kind of record, called `name`."""
    return type(name, (Record,), {})


def _refuse(_unpickler: object) -> NoReturn:
    raise UntrustedCheckpointError("it uses a part of pickle that no tensor needs")


class RecordUnpickler(pickle._Unpickler):  # noqa: SLF001 - the one in C has no table of opcodes to take from
    """Python's own, without most opcodes and without names of anything but records.

    The one in C takes a third of the time, but allocates whatever a file of few bytes asks it to: 64 GB for one PUT.

    Args:
        data: The pickle.
    """

    #: What each name that the pickle may use stands for.
    names: ClassVar[Mapping[tuple[str, str], Any]] = {}

    append: Callable[[Any], None]
    stack: list[Any]
    metastack: list[list[Any]]
    memo: dict[int, Any]
    read: Callable[[int], bytes]
    readline: Callable[[], bytes]
    proto: int
    pop_mark: Callable[[], list[Any]]

    def __init__(self, data: bytes) -> None:
        file = io.BytesIO(data)
        super().__init__(file)
        # Python's own reads through frames, which are of no use in memory and take most of its time.
        self.read, self.readline = file.read, file.readline

    def load(self) -> Any:
        """Run the opcodes; the value that the last one leaves.

        Raises:
            UntrustedCheckpointError: If it asks for more than records. A damaged pickle can raise anything else.
        """
        self.metastack, self.stack, self.proto = [], [], 0
        self.append = self.stack.append
        read, dispatch = self.read, self.dispatch
        while key := read(1):
            if key == pickle.STOP:
                return self.stack.pop()
            dispatch[key[0]](self)
        raise EOFError("it ends before its end")

    dispatch: ClassVar[dict[int, Callable[..., None]]] = dict.fromkeys(range(256), _refuse) | {
        getattr(pickle, name)[0]: pickle._Unpickler.dispatch[getattr(pickle, name)[0]]  # noqa: SLF001 - as above
        for name in _OPCODES.split()
    }

    def find_class(self, module: str, name: str) -> Any:
        """What a name stands for, or an error."""
        if (module, name) in self.names:
            return self.names[module, name]
        raise UntrustedCheckpointError(f"it asks for {module}.{name}, which no tensor needs")

    def skip_frame(self) -> None:
        """FRAME, which says how much could be read ahead."""
        self.read(8)

    def set_items(self) -> None:
        """SETITEMS, for keys whose hash takes no time: that of nested tuples can take forever."""
        items = self.pop_mark()
        self._set(items[::2], items[1::2])

    def set_item(self) -> None:
        """SETITEM, likewise."""
        value, key = self.stack.pop(), self.stack.pop()
        self._set([key], [value])

    def _set(self, keys: Sequence[Any], values: Sequence[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, dict) or not all(isinstance(key, str | Record) for key in keys):
            raise TypeError("an entry that has no string or record for a key")
        target.update(zip(keys, values, strict=True))

    def build(self) -> None:
        """BUILD, for records only.

        Raises:
            UntrustedCheckpointError: If it changes anything else.
        """
        state = self.stack.pop()
        if not isinstance(self.stack[-1], Record):
            raise UntrustedCheckpointError(f"it changes a {type(self.stack[-1]).__name__}")
        self.stack[-1].state = state

    def reduce(self) -> None:
        """REDUCE and NEWOBJ, which are one for what is left to call."""
        args, function = self.stack.pop(), self.stack.pop()
        if type(args) is not tuple or len(args) > _MAX_ARGUMENTS:
            raise TypeError("arguments that are no short tuple")
        self.append(function(*args))

    dispatch |= {
        pickle.FRAME[0]: skip_frame,
        pickle.SETITEMS[0]: set_items,
        pickle.SETITEM[0]: set_item,
        pickle.BUILD[0]: build,
        pickle.REDUCE[0]: reduce,
        pickle.NEWOBJ[0]: reduce,
    }
