"""What a chat template does with messages, read from its syntax tree.

Owns that analysis: whether a template iterates over the parts of a content, whether it also takes
plain text, and whether it knows the developer role. Does not run templates.

Values are followed by name, not by scope or order: `messages`, one message, a content. That is
enough to distinguish a loop over parts from a loop over messages, also through `set`, `with`,
namespaces and macros.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

from jinja2 import nodes

MAX_ROUNDS = 16
"""Bound on propagating values from name to name: a macro that calls a macro, and so on."""
PART_FILTERS = ("map", "selectattr", "rejectattr", "groupby")


@dataclass(frozen=True, slots=True)
class TemplateShape:
    """What one template expects of a message."""

    walks_parts: bool
    """It iterates over the parts of a content: a list stays a list."""
    takes_text: bool
    """It tests whether a content is a string: a string may stay a string."""
    knows_developer: bool
    """It names the role; otherwise it would drop such a message or print it wrongly."""


class _Kind(Enum):
    MESSAGES = 1
    MESSAGE = 2
    CONTENT = 3


_Kinds = frozenset[_Kind]
_NONE: _Kinds = frozenset()
_MESSAGES, _MESSAGE, _CONTENT = (frozenset({kind}) for kind in _Kind)


def read_shape(tree: nodes.Template) -> TemplateShape:
    """Read a parsed template."""
    reader = _Reader(tree)
    texts = [node.value for node in tree.find_all(nodes.Const)]
    return TemplateShape(
        walks_parts=any(reader.walks(node) for node in tree.find_all(nodes.Node)),
        takes_text=any(
            test.name == "string" and _Kind.CONTENT in reader.kinds(test.node)
            for test in tree.find_all(nodes.Test)
        ),
        knows_developer="developer" in texts,
    )


class _Reader:
    """Which names hold messages, a message or a content."""

    def __init__(self, tree: nodes.Template) -> None:
        """Follow the names until nothing new is found."""
        self._names: defaultdict[str, _Kinds] = defaultdict(frozenset, messages=_MESSAGES)
        self._macros = {macro.name: macro for macro in tree.find_all(nodes.Macro)}
        statements = list(
            tree.find_all((nodes.Assign, nodes.For, nodes.With, nodes.Call))  # what names values
        )
        # Until nothing changes: a name may be bound before what it is bound to is known.
        for _ in range(MAX_ROUNDS):
            before = dict(self._names)
            for statement in statements:
                for target, kinds in self._named(statement):
                    if kinds:
                        self._names[target] |= kinds
            if before == self._names:
                return

    def walks(self, node: nodes.Node) -> bool:
        """Return True if a node looks into the parts of a content."""
        match node:
            case nodes.For(iter=source):
                return _Kind.CONTENT in self.kinds(source)
            case nodes.Filter(name=name, node=source) if name in PART_FILTERS:
                return source is not None and _Kind.CONTENT in self.kinds(source)
            # `content[0].text` reads a part; a slice may as well be of a text.
            case nodes.Getattr(node=nodes.Getitem(node=source, arg=arg)):
                return not isinstance(arg, nodes.Slice) and _Kind.CONTENT in self.kinds(source)
            case nodes.Getitem(
                node=nodes.Getitem(node=source, arg=arg), arg=nodes.Const(value=str())
            ):
                return not isinstance(arg, nodes.Slice) and _Kind.CONTENT in self.kinds(source)
        return False

    def kinds(self, node: nodes.Node | None) -> _Kinds:
        """Return what an expression may be."""
        match node:
            case nodes.Name(name=name):
                return self._names.get(name, _NONE)
            case nodes.Getattr(node=source, attr=name):
                return self._member(source, name)
            case nodes.Getitem(node=source, arg=nodes.Const(value=str() as name)):
                return self._member(source, name)
            case nodes.Getitem(node=source, arg=nodes.Slice()):
                return self.kinds(source)
            case nodes.Getitem(node=source) | nodes.Filter(node=source, name="first" | "last"):
                return _element(self.kinds(source))
            case nodes.Filter(node=source):
                return self.kinds(source)
            case nodes.Call(
                node=nodes.Getattr(node=source, attr="get"),
                args=[nodes.Const(value=str() as name), *_],
            ):
                return self._member(source, name)
            case nodes.CondExpr(expr1=left, expr2=right) | nodes.Or(left=left, right=right):
                return self.kinds(left) | self.kinds(right)
            case nodes.Add(left=left, right=right):  # lists of messages; texts become other texts
                return (self.kinds(left) | self.kinds(right)) & _MESSAGES
        return _NONE

    def _member(self, source: nodes.Node, name: str) -> _Kinds:
        if name == "content" and _Kind.MESSAGE in self.kinds(source):
            return _CONTENT
        if isinstance(source, nodes.Name):  # a namespace
            return self._names.get(f"{source.name}.{name}", _NONE)
        return _NONE

    def _named(self, statement: nodes.Node) -> Iterator[tuple[str, _Kinds]]:
        """Yield the names that a statement assigns, with what they may be."""
        match statement:
            case nodes.Assign(
                target=nodes.Name(name=name),
                node=nodes.Call(node=nodes.Name(name="namespace"), kwargs=attributes),
            ):
                for attribute in attributes:
                    yield f"{name}.{attribute.key}", self.kinds(attribute.value)
            case nodes.Assign(target=target, node=value):
                yield from self._bound(target, self.kinds(value))
            case nodes.For(target=target, iter=source):
                yield from self._bound(target, _element(self.kinds(source)))
            case nodes.With(targets=targets, values=values):
                for target, value in zip(targets, values, strict=False):
                    yield from self._bound(target, self.kinds(value))
            case nodes.Call(node=nodes.Name(name=name)) if name in self._macros:
                parameters = self._macros[name].args
                for parameter, argument in zip(parameters, statement.args, strict=False):
                    yield parameter.name, self.kinds(argument)
                for keyword in statement.kwargs:
                    yield keyword.key, self.kinds(keyword.value)

    def _bound(self, target: nodes.Node, kinds: _Kinds) -> Iterator[tuple[str, _Kinds]]:
        match target:
            case nodes.Name(name=name):
                yield name, kinds
            case nodes.NSRef(name=name, attr=attribute):
                yield f"{name}.{attribute}", kinds


def _element(kinds: _Kinds) -> _Kinds:
    return _MESSAGE if _Kind.MESSAGES in kinds else _NONE
