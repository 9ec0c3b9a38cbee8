"""What a mutant is, and every mutant of a source text.

Owns the operators: comparisons, conditions, arithmetic, constants, returns, deleted statements,
swapped arguments. A mutant replaces one span of the text, so the rest of the file keeps its lines.
Does not know which tests run. Called by the command and by the unit tests of the operators.
"""

import ast
from collections.abc import Iterator
from dataclasses import dataclass

COMPARISONS = {
    ast.Lt: ("<=", ">="),
    ast.LtE: ("<", ">"),
    ast.Gt: (">=", "<="),
    ast.GtE: (">", "<"),
    ast.Eq: ("!=",),
    ast.NotEq: ("==",),
    ast.Is: ("is not",),
    ast.IsNot: ("is",),
    ast.In: ("not in",),
    ast.NotIn: ("in",),
}
ARITHMETIC = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.FloorDiv,
    ast.FloorDiv: ast.Mult,
    ast.Div: ast.Mult,
    ast.Mod: ast.FloorDiv,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
    ast.LShift: ast.RShift,
    ast.RShift: ast.LShift,
}
TWINS = {"min": "max", "max": "min", "all": "any", "any": "all", "append": "appendleft"}
TWINS |= {"popleft": "pop", "appendleft": "append"}
ORDER_FREE = {"min", "max", "contextlib.suppress"}
"""Functions whose result is the same in any order of their arguments: these are not swapped."""
LOGGERS = {"log", "_log", "logger", "LOG"}
"""A line of the log is for people: no test is asked to notice that it is gone."""


@dataclass(frozen=True)
class Mutant:
    """One change of one file: bytes `start` to `end` become `text`.

    `before` and `after` are the source lines the change touches, without indentation: with the path
    they name the mutant, and survive edits elsewhere in the file.
    """

    path: str
    line: int
    operator: str
    start: int
    end: int
    text: str
    before: str
    after: str

    def applied(self, source: str) -> str:
        """The source with this change."""
        data = source.encode()
        return (data[: self.start] + self.text.encode() + data[self.end :]).decode()

    @property
    def key(self) -> tuple[str, str, str]:
        """What names it in the list of equivalents."""
        return self.path, self.before, self.after


def mutants_of(path: str, source: str) -> list[Mutant]:
    """Every mutant of a file, in the order of the text, each once; a few may not compile."""
    tree = ast.parse(source)
    starts = _line_starts(source)
    data = source.encode()
    found: dict[tuple[int, int, str], Mutant] = {}
    for operator, node, text in _changes(tree):
        start = starts[node.lineno - 1] + node.col_offset
        end = starts[node.end_lineno - 1] + node.end_col_offset  # type: ignore[operator]
        if text == data[start:end].decode() or (start, end, text) in found:
            continue
        first = data.rfind(b"\n", 0, start) + 1
        last = data.find(b"\n", end) % (len(data) + 1)
        before = _one_line(data[first:last].decode())
        after = _one_line((data[first:start] + text.encode() + data[end:last]).decode())
        found[start, end, text] = Mutant(
            path, node.lineno, operator, start, end, text, before, after
        )
    return sorted(found.values(), key=lambda m: (m.start, m.end, m.operator, m.text))


def _line_starts(source: str) -> list[int]:
    starts = [0]
    for line in source.encode().splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    return starts


def _one_line(text: str) -> str:
    return " ".join(text.split())


def compiles(source: str) -> bool:
    """Whether Python takes it."""
    try:
        compile(source, "mutant", "exec")
    except (SyntaxError, ValueError):
        return False
    return True


Change = tuple[str, ast.expr | ast.stmt, str]
"""Operator, the node whose text is replaced, and the new text."""


def _changes(tree: ast.Module) -> Iterator[Change]:
    for node in _code(tree):
        if isinstance(node, ast.stmt):
            yield from _of_statement(node)
        elif isinstance(node, ast.expr):
            yield from _of_expression(node)


def _code(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes whose value matters while the program runs: no annotations,
    messages or decorators."""
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns", "decorator_list", "type_params"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if not isinstance(child, ast.AST) or _is_for_people(child):
                continue
            yield child
            yield from _code(child)


def _is_for_people(node: ast.AST) -> bool:
    """Log lines, texts put together for messages, imports for the type checker."""
    if isinstance(node, ast.JoinedStr | ast.Import | ast.ImportFrom):
        return True
    if isinstance(node, ast.If):
        return ast.unparse(node.test).endswith("TYPE_CHECKING")
    if isinstance(node, ast.Expr):
        node = node.value
        if isinstance(node, ast.Constant):  # a docstring
            return True
    return (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and ast.unparse(node.func.value) in LOGGERS
    )


def _of_statement(node: ast.stmt) -> Iterator[Change]:
    match node:
        case ast.If() | ast.While():
            yield "condition", node.test, f"not ({ast.unparse(node.test)})"
        case ast.Expr(value=ast.Call() | ast.Await(value=ast.Call())):
            yield "statement deleted", node, "pass"
        case ast.Assign(targets=[ast.Attribute() | ast.Subscript()]) | ast.Delete() | ast.Raise():
            yield "statement deleted", node, "pass"
        case ast.AugAssign():
            yield "statement deleted", node, "pass"
            if (other := ARITHMETIC.get(type(node.op))) is not None:
                changed = ast.AugAssign(node.target, other(), node.value)
                yield "arithmetic", node, ast.unparse(changed)
        case ast.Return(value=None):
            yield "return deleted", node, "pass"
        # None is as false as False, which becomes True as a constant.
        case ast.Return(value=value) if ast.unparse(value) not in ("None", "False"):
            yield "returns None", node, "return None"
        case ast.Continue():
            yield "continue and break", node, "break"
        case ast.Break():
            yield "continue and break", node, "continue"
        case ast.FunctionDef() | ast.AsyncFunctionDef():
            yield from _of_function(node)


def _of_function(node: ast.FunctionDef | ast.AsyncFunctionDef) -> Iterator[Change]:
    """A procedure that returns at once; what computes a value is mutated at its returns."""
    body = node.body[1:] if ast.get_docstring(node) is not None else node.body
    returns = [n.value for n in ast.walk(node) if isinstance(n, ast.Return)]
    yields = any(isinstance(n, ast.Yield | ast.YieldFrom) for n in ast.walk(node))
    if len(body) > 1 and not any(returns) and not yields:
        if not isinstance(body[0], ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield "returns at once", body[0], "return"


def _of_expression(node: ast.expr) -> Iterator[Change]:
    match node:
        case ast.Compare(ops=ops):
            for index, op in enumerate(ops):
                for text in COMPARISONS[type(op)]:
                    yield "comparison", node, _compared(node, index, text)
        case ast.BoolOp(op=op, values=values):
            other = ast.Or() if isinstance(op, ast.And) else ast.And()
            yield "and and or", node, f"({ast.unparse(ast.BoolOp(other, values))})"
            for index in range(len(values)):
                rest = values[:index] + values[index + 1 :]
                kept = ast.BoolOp(op, rest) if len(rest) > 1 else rest[0]
                yield "operand deleted", node, f"({ast.unparse(kept)})"
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            yield "not deleted", node, f"({ast.unparse(operand)})"
        case ast.UnaryOp(op=ast.USub(), operand=operand) if not _is_number(operand):
            yield "minus deleted", node, f"({ast.unparse(operand)})"
        case ast.BinOp(op=op) if type(op) in ARITHMETIC and not _is_text(node):
            changed = ast.BinOp(node.left, ARITHMETIC[type(op)](), node.right)
            yield "arithmetic", node, f"({ast.unparse(changed)})"
        case ast.IfExp():
            changed = ast.IfExp(ast.UnaryOp(ast.Not(), node.test), node.body, node.orelse)
            yield "condition", node, f"({ast.unparse(changed)})"
        case ast.Constant(value=bool() as value):
            yield "constant", node, str(not value)
        case ast.Constant(value=int() | float() as value):
            yield "constant", node, repr(value + 1)
            yield "constant", node, f"({value - 1!r})" if value < 1 else repr(value - 1)
        case ast.Call():
            yield from _of_call(node)
        case ast.ListComp() | ast.SetComp() | ast.GeneratorExp() | ast.DictComp():
            yield from _of_comprehension(node)


def _compared(node: ast.Compare, index: int, text: str) -> str:
    parts = [ast.unparse(_bracketed(node.left))]
    for i, (op, right) in enumerate(zip(node.ops, node.comparators, strict=True)):
        sign = text if i == index else _SIGNS[type(op)]
        parts += [sign, ast.unparse(_bracketed(right))]
    return f"({' '.join(parts)})"


_SIGNS = {
    ast.Lt: "<",
    ast.LtE: "<=",
    ast.Gt: ">",
    ast.GtE: ">=",
    ast.Eq: "==",
    ast.NotEq: "!=",
    ast.Is: "is",
    ast.IsNot: "is not",
    ast.In: "in",
    ast.NotIn: "not in",
}


def _bracketed(node: ast.expr) -> ast.expr:
    """As it is if it binds tighter than a comparison, else in brackets: a name for its own text."""
    loose = ast.BoolOp | ast.Compare | ast.IfExp | ast.Lambda | ast.NamedExpr
    if isinstance(node, loose) or (isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not)):
        return ast.Name(f"({ast.unparse(node)})", ast.Load())
    return node


def _is_number(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, int | float)


def _is_text(node: ast.BinOp) -> bool:
    return any(
        isinstance(side, ast.JoinedStr)
        or (isinstance(side, ast.Constant) and isinstance(side.value, str | bytes))
        for side in (node.left, node.right)
    )


def _of_call(node: ast.Call) -> Iterator[Change]:
    name = ast.unparse(node.func)
    # By a key, the first of equals counts.
    is_order_free = name in ORDER_FREE and not node.keywords
    arguments = [] if is_order_free else node.args
    for index in range(len(arguments) - 1):
        first, second = arguments[index : index + 2]
        if isinstance(first, ast.Starred) or isinstance(second, ast.Starred):
            continue
        if isinstance(first, ast.JoinedStr) or isinstance(second, ast.JoinedStr):
            continue
        swapped = [*arguments[:index], second, first, *arguments[index + 2 :]]
        text = ast.unparse(ast.Call(node.func, swapped, node.keywords))
        yield "arguments swapped", node, text
    match node.func:
        case ast.Name(id=name) | ast.Attribute(attr=name) if name in TWINS:
            start = ast.unparse(node.func).removesuffix(name)
            rest = ast.unparse(node).removeprefix(f"{start}{name}")
            yield "function swapped", node, f"{start}{TWINS[name]}{rest}"


def _of_comprehension(node: ast.expr) -> Iterator[Change]:
    """Each filter of a comprehension, left out."""
    for generator in node.generators:  # type: ignore[attr-defined]
        for index in range(len(generator.ifs)):
            kept = generator.ifs
            generator.ifs = kept[:index] + kept[index + 1 :]
            text = ast.unparse(node)
            generator.ifs = kept
            yield "filter deleted", node, text
