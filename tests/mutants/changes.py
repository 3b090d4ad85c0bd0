"""Mutants: a file with one small change each, made from its text alone."""

from __future__ import annotations

import ast
import hashlib
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]


class Mutant(NamedTuple):
    path: str  # from the checkout's root
    old: str  # the line as it is and as it becomes, without what is around it
    new: str
    number: int  # of the mutants of this file that read the same
    text: str  # of the whole file

    @property
    def name(self) -> str:
        again = f" ({self.number + 1})" if self.number else ""
        return f"{self.path}: {self.old} => {self.new}{again}"

    def rank(self, seed: int) -> str:
        """Samples are the lowest ranks: a change to one file draws no others from the rest."""
        return hashlib.sha256(f"{seed} {self.name}".encode()).hexdigest()


class Edit(NamedTuple):
    begin: int
    end: int
    new: str


def mutants(path: Path) -> list[Mutant]:
    """All of a file's, in the order of its lines."""
    text = path.read_text()
    edits = sorted({*(_python(text) if path.suffix == ".py" else _cpp(text))})
    seen: Counter[tuple[str, str]] = Counter()
    found = []
    for begin, end, new in edits:
        first, last = text.rfind("\n", 0, begin) + 1, text.find("\n", end)
        old_line, new_line = text[first:last].strip(), (text[first:begin] + new + text[end:last]).strip()
        old_line, new_line = (re.sub(r"\s+", " ", line) for line in (old_line, new_line))
        name = str(path.relative_to(ROOT))
        found.append(Mutant(name, old_line, new_line, seen[old_line, new_line], f"{text[:begin]}{new}{text[end:]}"))
        seen[old_line, new_line] += 1
    return found


def _constant(text: str) -> str:
    """Integers change by one, 0.0 becomes 1.0, the others change by a factor of 2."""
    if re.fullmatch(r"\d+[uU]?[lL]*", text):
        return str(int(text.rstrip("uUlL")) + 1)
    number = re.fullmatch(r"([\d.]+(?:e[+-]?\d+)?)([fF]?)", text)
    return f"{float(number[1]) * 2 or 1.0!r}{number[2]}" if number else f"(2 * {text})"


# ---- C++, by tokens. clang-format puts blanks around binary operators and none around a template's arguments.

_SKIPPED = re.compile(r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"|^[ \t]*#(?:\\\n|[^\n])*', re.M | re.S)
_OPERATORS = {
    " < ": " <= ",
    " <= ": " < ",
    " > ": " >= ",
    " >= ": " > ",
    " == ": " != ",
    " != ": " == ",
    " + ": " - ",
    " - ": " + ",
    " * ": " / ",
    " / ": " * ",
    " % ": " * ",
    " += ": " -= ",
    " -= ": " += ",
    " *= ": " /= ",
    " /= ": " *= ",
    " && ": " || ",
    " || ": " && ",
}
_OPERATOR = re.compile("|".join(re.escape(x) for x in sorted(_OPERATORS, key=len, reverse=True)))
_NUMBER = re.compile(r"(?<![\w.])(?:0x[\da-f.]+(?:p\d+)?[fuUlL]*|\d[\d.]*(?:e[+-]?\d+)?[fFuUlL]*)(?![\w.])")
_EXTREME = re.compile(r"(?<![\w:.])(?:min|max)(?=\(|<int64_t>\()")
_CONDITION = re.compile(r"(?<![\w])if \((?=[^\n]*\)[^\n]*[;{]$)", re.M)
# a line that is one statement: an assignment to something that is there, or a call
_STATEMENT = re.compile(r"^ +((?:[\w:.\[\]+* ]|->)+? [-+*/]?= [^\n;{}]*;|[\w:.]+\([^\n;{}]*\);|\+\+\w+;)$", re.M)
_DECLARED = re.compile(
    r"(?:const|constexpr|static|using|typedef|return|auto|int|int64_t|uint32_t|float|double|bool|T|V) "
)
_TEMPLATE = re.compile(r"template <[^\n]*>|operator\S+|static_assert[^\n]*|case [^\n]*:")


def _blank(text: str, pattern: re.Pattern[str]) -> str:
    return pattern.sub(lambda m: re.sub(r"[^\n]", "~", m[0]), text)


def _cpp(text: str) -> Iterator[Edit]:
    code = _blank(_blank(text, _SKIPPED), _TEMPLATE)
    for m in _OPERATOR.finditer(code):
        yield Edit(m.start(), m.end(), _OPERATORS[m[0]])
    for m in _NUMBER.finditer(code):
        yield Edit(m.start(), m.end(), _constant(m[0]))
    for m in _EXTREME.finditer(code):
        yield Edit(m.start(), m.end(), "max" if m[0] == "min" else "min")
    for m in _CONDITION.finditer(code):
        yield Edit(m.end(), m.end(), "false && ")
        yield Edit(m.end(), m.end(), "true || ")
    for m in _STATEMENT.finditer(code):
        if not _DECLARED.match(m[1]):
            yield Edit(m.start(1), m.end(1), ";")


# ---- Python, by its syntax tree

_COMPARISONS = {
    ast.Lt: "<=",
    ast.LtE: "<",
    ast.Gt: ">=",
    ast.GtE: ">",
    ast.Eq: "!=",
    ast.NotEq: "==",
    ast.Is: "is not",
    ast.IsNot: "is",
    ast.In: "not in",
    ast.NotIn: "in",
}
_ARITHMETIC = {ast.Add: "-", ast.Sub: "+", ast.Mult: "/", ast.Div: "*", ast.FloorDiv: "*", ast.Mod: "*", ast.Pow: "*"}
_IGNORED = (ast.JoinedStr, ast.AnnAssign, ast.Import, ast.ImportFrom)


class _Places:
    """Where a node's text is. The tree counts bytes."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.lines = text.splitlines(keepends=True)
        self.starts = [0]
        for line in self.lines:
            self.starts.append(self.starts[-1] + len(line))

    def at(self, line: int, column: int) -> int:
        return self.starts[line - 1] + len(self.lines[line - 1].encode()[:column].decode())

    def begin(self, node: ast.expr | ast.stmt) -> int:
        return self.at(node.lineno, node.col_offset)

    def end(self, node: ast.expr | ast.stmt) -> int:
        return self.at(node.end_lineno or 0, node.end_col_offset or 0)

    def between(self, left: ast.expr, right: ast.expr, new: str) -> Edit:
        """The operator of two operands, in place of the one there."""
        begin, end = self.end(left), self.begin(right)
        m = re.search(r"[^\s()#]+(?: (?:not|in)\b)?", self.text[begin:end])
        assert m is not None
        return Edit(begin + m.start(), begin + m.end(), new)


def _python(text: str) -> Iterator[Edit]:
    places = _Places(text)
    yield from _of_node(ast.parse(text), places)


def _of_node(node: ast.AST, at: _Places) -> Iterator[Edit]:
    if isinstance(node, ast.AnnAssign) and node.value is not None:
        yield from _of_node(node.value, at)  # and not its type
    if isinstance(node, _IGNORED):
        return
    if isinstance(node, ast.Compare):
        for left, op, right in zip([node.left, *node.comparators], node.ops, node.comparators, strict=False):
            yield at.between(left, right, _COMPARISONS[type(op)])
    elif isinstance(node, ast.BinOp) and type(node.op) in _ARITHMETIC:
        yield at.between(node.left, node.right, _ARITHMETIC[type(node.op)])
    elif isinstance(node, ast.BoolOp):
        for left, right in zip(node.values, node.values[1:], strict=False):
            yield at.between(left, right, "or" if isinstance(node.op, ast.And) else "and")
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.Not, ast.USub)):
        yield Edit(at.begin(node), at.begin(node) + (4 if isinstance(node.op, ast.Not) else 1), "")
    elif isinstance(node, ast.Constant) and isinstance(node.value, (int, float)):
        old = at.text[at.begin(node) : at.end(node)]
        yield Edit(
            at.begin(node), at.end(node), str(not node.value) if isinstance(node.value, bool) else _constant(old)
        )
    elif isinstance(node, (ast.If, ast.IfExp)):
        begin, end = at.begin(node.test), at.end(node.test)
        yield Edit(begin, end, f"not ({at.text[begin:end]})")
    elif isinstance(node, ast.AugAssign) or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)):
        yield Edit(at.begin(node), at.end(node), "pass")
    if isinstance(node, ast.Raise):
        return  # what a message says is for the tests of messages
    for child in _children(node):
        yield from _of_node(child, at)


def _children(node: ast.AST) -> Iterator[ast.AST]:
    """Not the annotations."""
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                yield child
