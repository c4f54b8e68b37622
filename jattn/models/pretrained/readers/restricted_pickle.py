"""A pickle is a program for a machine with a stack; this machine knows only what makes dictionaries of tensors.

It is not Python's own unpickler with names taken away, because that one can also be crashed or hung: by an entry of the
memo that asks for gigabytes, by keys of dictionaries that nest until hashing them never ends. Here, keys are texts or
integers, the memo is a dictionary, the number of steps is bounded, and a global is a name without an object behind it.

Source: the opcodes as documented in Python's `pickletools`.
"""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Callable, Mapping
from typing import Any

from jattn.models.pretrained.readers.common import Source, shown

_MOST_STEPS = 500_000
_LONGEST_NAME = 200


@dataclasses.dataclass(frozen=True)
class Global:
    """A name of a module, never looked up."""

    module: str
    name: str


Handler = Callable[[tuple], Any]


def run(
    source: Source,
    allowed: Mapping[tuple[str, str], Handler | None],
    persistent: Callable[[Any], Any] | None = None,
) -> Any:
    """Run the pickle that begins where the source stands; afterwards the source stands behind it.

    Args:
        source: the file.
        allowed: the globals that may be named, as (module, name), each with what a call of it does with the tuple of
            its arguments; None for those that may be named but not called.
        persistent: what an identifier of something outside of the pickle stands for; None if there must be none.

    Returns:
        What the pickle makes: numbers, texts, tuples, lists, dictionaries, and whatever the handlers return.

    Raises:
        UnreadableFile: the pickle is broken, too long, or wants anything else.

    Example:
        >>> import pickle
        >>> run(Source("x.pkl", "a pickle", pickle.dumps({"a": [1, 2.0]}, protocol=2)), {})
        {'a': [1, 2.0]}
        >>> run(Source("x.pkl", "a pickle", pickle.dumps(print, protocol=4)), {})
        Traceback (most recent call last):
        ...
        jattn...UnreadableFile: x.pkl cannot be read as a pickle: it names 'builtins.print', which is refused
    """
    machine = _Machine(source, allowed, persistent)
    for _ in range(_MOST_STEPS):
        opcode = source.take(1)
        if opcode == b".":
            return machine.result()
        step = _STEPS.get(opcode)
        if step is None:
            raise source.error(f"the pickle's opcode {opcode!r} before byte {source.position} is refused")
        step(machine)
    raise source.error(f"its pickle has more than {_MOST_STEPS} steps")


class _Machine:
    def __init__(self, source: Source, allowed: Mapping, persistent: Callable[[Any], Any] | None):
        self.source = source
        self.allowed = allowed
        self.persistent = persistent
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def pop(self) -> Any:
        if len(self.stack) <= (self.marks[-1] if self.marks else 0):
            raise self.source.error(f"its pickle takes from an empty stack before byte {self.source.position}")
        return self.stack.pop()

    def pop_to_mark(self) -> list[Any]:
        if not self.marks:
            raise self.source.error(f"its pickle has no mark to go back to before byte {self.source.position}")
        mark = self.marks.pop()
        values = self.stack[mark:]
        del self.stack[mark:]
        return values

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def pop_tuple(self, count: int) -> tuple:
        return tuple([self.pop() for _ in range(count)][::-1])

    def top(self, kind: type) -> Any:
        self.push(value := self.pop())
        if type(value) is not kind:
            raise self.source.error(f"its pickle has {shown(type(value).__name__)} where a {kind.__name__} belongs")
        return value

    def result(self) -> Any:
        if self.marks or len(self.stack) != 1:
            raise self.source.error(f"its pickle ends at byte {self.source.position} with {len(self.stack)} values")
        return self.stack[0]

    def line(self) -> str:
        start = self.source.position
        end = self.source.data.find(b"\n", start, start + _LONGEST_NAME)
        if end < 0:
            raise self.source.error(f"the name at byte {start} does not end")
        text = self.source.text(end - start)
        self.source.position += 1
        return text

    def remember(self, index: int) -> None:
        self.push(value := self.pop())
        self.memo[index] = value

    def recall(self, index: int) -> None:
        if index not in self.memo:
            raise self.source.error(f"its pickle recalls the value {index}, which it has not stored")
        self.push(self.memo[index])

    def name(self, module: Any, name: Any) -> None:
        if type(module) is not str or type(name) is not str:
            raise self.source.error("it names something with what is no text")
        if (module, name) not in self.allowed:
            raise self.source.error(f"it names {shown(f'{module}.{name}')}, which is refused")
        self.push(Global(module, name))

    def name_from_stack(self) -> None:
        module, name = self.pop_tuple(2)
        self.name(module, name)

    def call(self) -> None:
        function, arguments = self.pop_tuple(2)
        handler = self.allowed[function.module, function.name] if type(function) is Global else None
        if handler is None or type(arguments) is not tuple:
            called = f"{function.module}.{function.name}" if type(function) is Global else f"{shown(function)}"
            raise self.source.error(f"its pickle calls {called}, which is refused")
        self.push(handler(arguments))

    def identify(self) -> None:
        identifier = self.pop()
        if self.persistent is None:
            raise self.source.error("its pickle refers to something outside of it")
        self.push(self.persistent(identifier))

    def extend(self, values: list[Any]) -> None:
        self.top(list).extend(values)

    def update(self, values: list[Any]) -> None:
        target = self.top(dict)
        if len(values) % 2:
            raise self.source.error(f"its pickle has a key without a value before byte {self.source.position}")
        for key, value in zip(values[::2], values[1::2], strict=True):
            if type(key) not in (str, int):
                raise self.source.error(f"its pickle has a {shown(type(key).__name__)} as a key")
            target[key] = value

    def set_state(self) -> None:
        """torch hangs attributes on the dictionary of weights, such as versions of layers; they are dropped."""
        if type(self.pop()) is not dict:
            raise self.source.error("its pickle sets a state that is no dictionary")
        self.top(dict)

    def protocol(self) -> None:
        """The protocol's version, which the opcodes tell anyway."""
        self.source.skip(1)

    def frame(self) -> None:
        """A frame says how many bytes can be read at once; they are all here."""
        self.source.number("Q")


_STEPS: dict[bytes, Callable[[_Machine], None]] = {
    b"\x80": _Machine.protocol,
    b"\x95": _Machine.frame,
    b"(": lambda m: m.marks.append(len(m.stack)),
    b"N": lambda m: m.push(None),
    b"\x88": lambda m: m.push(True),
    b"\x89": lambda m: m.push(False),
    b"K": lambda m: m.push(m.source.number("B")),
    b"M": lambda m: m.push(m.source.number("H")),
    b"J": lambda m: m.push(m.source.number("i")),
    b"\x8a": lambda m: m.push(int.from_bytes(m.source.take(m.source.number("B")), "little", signed=True)),
    b"G": lambda m: m.push(struct.unpack(">d", m.source.take(8))[0]),
    b"X": lambda m: m.push(m.source.text(m.source.number("I"))),
    b"\x8c": lambda m: m.push(m.source.text(m.source.number("B"))),
    b")": lambda m: m.push(()),
    b"\x85": lambda m: m.push(m.pop_tuple(1)),
    b"\x86": lambda m: m.push(m.pop_tuple(2)),
    b"\x87": lambda m: m.push(m.pop_tuple(3)),
    b"t": lambda m: m.push(tuple(m.pop_to_mark())),
    b"]": lambda m: m.push([]),
    b"a": lambda m: m.extend([m.pop()]),
    b"e": lambda m: m.extend(m.pop_to_mark()),
    b"}": lambda m: m.push({}),
    b"s": lambda m: m.update(list(m.pop_tuple(2))),
    b"u": lambda m: m.update(m.pop_to_mark()),
    b"q": lambda m: m.remember(m.source.number("B")),
    b"r": lambda m: m.remember(m.source.number("I")),
    b"\x94": lambda m: m.remember(len(m.memo)),
    b"h": lambda m: m.recall(m.source.number("B")),
    b"j": lambda m: m.recall(m.source.number("I")),
    b"c": lambda m: m.name(m.line(), m.line()),
    b"\x93": _Machine.name_from_stack,
    b"R": _Machine.call,
    b"Q": _Machine.identify,
    b"b": _Machine.set_state,
}
