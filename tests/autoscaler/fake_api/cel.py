"""The part of CEL that validation rules are mostly made of, evaluated by translation to Python's syntax tree.

    comparisons, + - * / %, && || !, a ? b : c, has(self.field), size(x), x.matches('…'), x.startsWith('…'),
    x in [..], self, oldSelf, literals, and over lists all, exists, exists_one, filter and map

Whatever else a rule says is refused when its CRD is registered: no rule is ever taken for true because it was not
understood.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from typing import Any

from tests.autoscaler.fake_api.errors import Json

TOKEN = re.compile(r"""'[^']*'|"[^"]*"|&&|\|\||!=|==|<=|>=|!|\?|:|\btrue\b|\bfalse\b|\bnull\b|[^\s]|\s+""")
WORDS = {"&&": " and ", "||": " or ", "!": " not ", "true": "True", "false": "False", "null": "None"}
BINARY: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: lambda a, b: a + b,
    ast.Sub: lambda a, b: a - b,
    ast.Mult: lambda a, b: a * b,
    ast.Div: lambda a, b: a // b if isinstance(a, int) and isinstance(b, int) else a / b,
    ast.Mod: lambda a, b: a % b,
}
COMPARE: dict[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Eq: lambda a, b: a == b,
    ast.NotEq: lambda a, b: a != b,
    ast.Lt: lambda a, b: a < b,
    ast.LtE: lambda a, b: a <= b,
    ast.Gt: lambda a, b: a > b,
    ast.GtE: lambda a, b: a >= b,
    ast.In: lambda a, b: a in b,
}
METHODS: dict[str, Callable[[Any, Any], bool]] = {
    "matches": lambda text, pattern: re.search(pattern, text) is not None,
    "startsWith": lambda text, part: text.startswith(part),
    "endsWith": lambda text, part: text.endswith(part),
    "contains": lambda text, part: part in text,
}
MACROS: dict[str, Callable[[list[Any], Callable[[Any], Any]], Any]] = {
    "all": lambda items, test: all(test(each) for each in items),
    "exists": lambda items, test: any(test(each) for each in items),
    "exists_one": lambda items, test: sum(bool(test(each)) for each in items) == 1,
    "filter": lambda items, test: [each for each in items if test(each)],
    "map": lambda items, make: [make(each) for each in items],
}


PLAIN = (ast.Constant, ast.Name, ast.List, ast.Attribute, ast.Subscript, ast.BoolOp, ast.UnaryOp, ast.IfExp)


class UnsupportedRule(ValueError):
    pass


class Rule:
    """Raises UnsupportedRule for one that this evaluator does not know."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.is_transition = "oldSelf" in re.findall(r"\w+", text)
        try:
            self._tree = ast.parse(_python(text), mode="eval").body
        except SyntaxError as error:
            raise UnsupportedRule(f"rule {text!r} is beyond the CEL that is known here: {error}") from None
        self._known(self._tree)

    def holds(self, value: Any, old: Any = None) -> bool:
        """Raises KeyError for a field that is not there, as CEL does: has() asks for it first."""
        return bool(_evaluate(self._tree, {"self": value, "oldSelf": old}))

    def _known(self, tree: ast.expr) -> None:
        names = {"self", "oldSelf", "has", "size"}
        for node in ast.walk(tree):
            match node:
                case (
                    ast.Call(func=ast.Name(id="has"), args=[ast.Attribute()])
                    | ast.Call(func=ast.Name(id="size"), args=[_])
                ):
                    pass
                case ast.Call(func=ast.Attribute(attr=name), args=[_]) if name in METHODS:
                    pass
                case ast.Call(func=ast.Attribute(attr=name), args=[ast.Name(id=each), _]) if name in MACROS:
                    names.add(each)
                case ast.Compare(ops=[operation]) if type(operation) in COMPARE:
                    pass
                case ast.BinOp(op=operation) if type(operation) in BINARY:
                    pass
                case ast.Call() | ast.Compare() | ast.BinOp():
                    raise self._unsupported(node)
                case ast.expr() if not isinstance(node, PLAIN):
                    raise self._unsupported(node)
        for node in ast.walk(tree):
            if isinstance(node, ast.Name) and node.id not in names:
                raise self._unsupported(node)

    def _unsupported(self, node: ast.AST) -> UnsupportedRule:
        return UnsupportedRule(f"rule {self.text!r}: {ast.unparse(node)!r} is beyond the CEL that is known here")


def _python(text: str) -> str:
    tokens = TOKEN.findall(text)
    text = "".join(WORDS.get(token, token) for token in tokens).strip()
    if "?" not in tokens:
        return text
    # One conditional, at the outermost level: a ? b : c
    [condition, rest] = text.split("?", 1)
    yes, colon, no = rest.rpartition(":")
    if not colon or "?" in rest:
        raise UnsupportedRule(f"rule {text!r}: one conditional that nothing stands around is known here")
    return f"({yes}) if ({condition}) else ({no})"


def _evaluate(node: ast.AST, names: Json) -> Any:
    match node:
        case ast.Constant(value=value):
            return value
        case ast.Name(id=name):
            return names[name]
        case ast.List(elts=elements):
            return [_evaluate(each, names) for each in elements]
        case ast.Attribute(value=base, attr=field):
            return _evaluate(base, names)[field]
        case ast.Subscript(value=base, slice=key):
            return _evaluate(base, names)[_evaluate(key, names)]
        case ast.BoolOp(op=operator, values=values):
            return (all if isinstance(operator, ast.And) else any)(_evaluate(each, names) for each in values)
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            return not _evaluate(operand, names)
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_evaluate(operand, names)
        case ast.BinOp(left=left, op=operation, right=right):
            return BINARY[type(operation)](_evaluate(left, names), _evaluate(right, names))
        case ast.Compare(left=left, ops=[operation], comparators=[right]):
            return COMPARE[type(operation)](_evaluate(left, names), _evaluate(right, names))
        case ast.IfExp(test=test, body=yes, orelse=no):
            return _evaluate(yes if _evaluate(test, names) else no, names)
        case ast.Call(func=ast.Name(id="has"), args=[ast.Attribute(value=base, attr=field)]):
            return field in _evaluate(base, names)
        case ast.Call(func=ast.Name(id="size"), args=[argument]):
            return len(_evaluate(argument, names))
        case ast.Call(func=ast.Attribute(value=base, attr=name), args=[argument]) if name in METHODS:
            return METHODS[name](_evaluate(base, names), _evaluate(argument, names))
        case ast.Call(func=ast.Attribute(value=base, attr=name), args=[ast.Name(id=each), body]):
            return MACROS[name](_evaluate(base, names), lambda item: _evaluate(body, names | {each: item}))
    raise AssertionError(f"{ast.dump(node)} was let through")
