"""Wrong messages made of right ones: fields get values that code forgets, bytes are flipped, cut, doubled and spliced.

Two levels, because each finds what the other cannot: what is changed in its structure gets past the parser, and what is
changed in its bytes does not. Everything follows from the seed of what draws.
"""

from __future__ import annotations

import json
import random
from typing import Any

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

INTEGERS = (0, 1, -1, 2, 7, 63, 64, 65, 255, 4096, 65536, 2**31 - 1, 2**31, -(2**31), 2**32, 2**53, 2**63 - 1, 2**63)
NUMBERS = (0.0, -0.0, 0.5, 1.0, -1.0, 1e-40, 1e38, 1e308, -1e308, float("inf"), float("-inf"), float("nan"))
TEXTS = (
    "",
    " ",
    "\0",
    "\n",
    "x" * 5000,
    " " * 5000,
    "é" * 300,
    "\u202e\ufeff\u0301",
    "🚆" * 100,
    "{{ 7 * 7 }}{% for x in range(10**9) %}{% endfor %}",
    "</s>[INST]",
    "../../etc/passwd",
    "null",
    "{",
    '{"type": "object"}',
    "(a+)+$",
    "start: start start | 'a'",
    "NaN",
    "-1",
    "1e999",
    "model",
)
VARINTS = (b"\xff" * 10, b"\x80" * 11, b"\xff\xff\xff\xff\x0f", b"\x00", b"\x08\x96\x01", b"\x0b\x0c")


class Mutator:
    """See the module."""

    def __init__(self, draw: random.Random) -> None:
        self._random = draw

    def wire(self, seed: Message) -> bytes:
        """A mutant of a message, on the wire."""
        mutant = type(seed)()
        mutant.CopyFrom(seed)
        for _ in range(self._random.choice((0, 1, 1, 2, 4))):
            self._change(mutant)
        data = mutant.SerializeToString()
        return self.data(data) if self._random.random() < 0.5 else data

    def body(self, seed: Any) -> bytes:
        """A mutant of a JSON value, as a body."""
        mutant = json.loads(json.dumps(seed))
        for _ in range(self._random.choice((0, 1, 1, 2, 4))):
            mutant = self._replace(mutant)
        text = json.dumps(mutant, ensure_ascii=self._random.random() < 0.5).encode("utf-8", "surrogatepass")
        return self.data(text) if self._random.random() < 0.4 else text

    def data(self, data: bytes) -> bytes:
        """Bytes with some of them changed."""
        draw, mutant = self._random, bytearray(data)
        for _ in range(draw.choice((1, 1, 2, 5))):
            at = draw.randrange(len(mutant) + 1)
            to = min(len(mutant), at + draw.randrange(1, 9))
            match draw.randrange(6):
                case 0 if mutant:
                    mutant[min(at, len(mutant) - 1)] ^= 1 << draw.randrange(8)
                case 1:
                    del mutant[at:to]
                case 2:
                    mutant[at:at] = draw.randbytes(draw.randrange(1, 9))
                case 3:
                    mutant[at:at] = draw.choice(VARINTS)
                case 4:
                    mutant[at:at] = mutant[at:to] * draw.randrange(1, 30)
                case _:
                    del mutant[at:]
        return bytes(mutant)

    def name(self) -> str:
        """Text that a header may carry."""
        return "".join(each for each in self._random.choice(TEXTS)[:200] if " " < each <= "~")

    # -- protobuf ----------------------------------------------------------------------------------------------

    def _change(self, message: Message) -> None:
        """One field of it, or of a message within it."""
        fields = message.DESCRIPTOR.fields
        if not fields:
            return
        field = self._random.choice(fields)
        if self._is_map(field):
            self._change_map(message, field)
        elif field.is_repeated:
            values = getattr(message, field.name)
            if values and self._random.random() < 0.3:
                del values[self._random.randrange(len(values)) :]
            elif field.message_type is not None:
                self._change(self._random.choice(values) if values and self._random.random() < 0.7 else values.add())
            else:
                values.extend([self._value(field)] * self._random.choice((1, 1, 2, 2000)))
        elif field.message_type is not None:
            inner = getattr(message, field.name)
            inner.SetInParent()
            self._change(inner)
        else:
            setattr(message, field.name, self._value(field))

    def _change_map(self, message: Message, field: FieldDescriptor) -> None:
        key, value = (field.message_type.fields_by_name[name] for name in ("key", "value"))
        entries, name = getattr(message, field.name), self._value(key)
        if self._random.random() < 0.5 and entries:
            name = self._random.choice(list(entries))
        if value.message_type is not None:
            self._change(entries[name])
        else:
            entries[name] = self._value(value)

    @staticmethod
    def _is_map(field: FieldDescriptor) -> bool:
        return field.message_type is not None and bool(field.message_type.GetOptions().map_entry)

    def _value(self, field: FieldDescriptor) -> Any:
        draw = self._random
        match field.cpp_type:
            case FieldDescriptor.CPPTYPE_STRING:
                text = draw.choice(TEXTS)
                return text.encode() if field.type == FieldDescriptor.TYPE_BYTES else text
            case FieldDescriptor.CPPTYPE_BOOL:
                return draw.random() < 0.5
            case FieldDescriptor.CPPTYPE_FLOAT | FieldDescriptor.CPPTYPE_DOUBLE:
                return draw.choice(NUMBERS)
            case FieldDescriptor.CPPTYPE_ENUM:
                return draw.choice((0, 1, 2, 3, 77))
        bits, signed = {
            FieldDescriptor.CPPTYPE_INT32: (32, True),
            FieldDescriptor.CPPTYPE_INT64: (64, True),
            FieldDescriptor.CPPTYPE_UINT32: (32, False),
            FieldDescriptor.CPPTYPE_UINT64: (64, False),
        }[field.cpp_type]
        low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
        return draw.choice([value for value in INTEGERS if low <= value <= high])

    # -- JSON --------------------------------------------------------------------------------------------------

    def _replace(self, value: Any) -> Any:
        """The value with one change somewhere in it."""
        draw = self._random
        if isinstance(value, dict) and value and draw.random() < 0.85:
            key = draw.choice(list(value))
            match draw.randrange(8):
                case 0:
                    return {name: each for name, each in value.items() if name != key}
                case 1:
                    return value | {draw.choice(TEXTS): self._any()}
                case _:
                    return value | {key: self._replace(value[key])}
        if isinstance(value, list) and value and draw.random() < 0.85:
            at = draw.randrange(len(value))
            return value[:at] + [self._replace(value[at])] * draw.choice((0, 1, 1, 1, 100)) + value[at + 1 :]
        return self._any()

    def _any(self) -> Any:
        draw = self._random
        match draw.randrange(8):
            case 0:
                return draw.choice(TEXTS)
            case 1 | 2:
                return draw.choice(INTEGERS)
            case 3:
                return draw.choice(NUMBERS)
            case 4:
                return draw.choice((None, True, False, [], {}, [[]], {"": None}, "\ud800", 10**40))
            case 5:
                return [self._any() for _ in range(draw.randrange(3))]
            case 6:
                return {draw.choice(TEXTS): self._any() for _ in range(draw.randrange(3))}
        return draw.choice(TEXTS)


def empty(descriptor: Descriptor) -> Message:
    """A message of this type with nothing in it."""
    made: Message = GetMessageClass(descriptor)()
    return made
