"""Functions cut out of modules so that they stand alone: with the imports and definitions they use, without docstrings.

The text stays that of the module, comments included; docstrings go, and annotations that need an import.
"""

import ast
import builtins
import re
import symtable
import sys
from collections.abc import Iterator
from typing import TypeGuard

Definition = ast.FunctionDef | ast.ClassDef | ast.Assign | ast.AnnAssign
_BUILTINS = frozenset(dir(builtins))
_BLANK_LINES = re.compile(rb".*\n(?:[ \t]*\n)*")


class SourceModule:
    """A module's source, and what its top level defines and imports."""

    def __init__(self, text: str) -> None:
        self._source = text.encode()
        self._lines = [0]  # the byte at which each line starts
        for line in self._source.splitlines(keepends=True):
            self._lines.append(self._lines[-1] + len(line))
        self.tree = ast.parse(text)
        self._definitions: dict[str, Definition] = {}
        self._imports: dict[str, str] = {}
        for node in self.tree.body:
            self._read(node)

    def _read(self, node: ast.stmt) -> None:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            self._definitions[node.name] = node
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            self._definitions |= {target.id: node for target in targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.Import | ast.ImportFrom):
            package = node.module if isinstance(node, ast.ImportFrom) and not node.level else None
            for alias in node.names:
                if (package or alias.name).split(".")[0] in sys.stdlib_module_names and package != "__future__":
                    alone = ast.Import([alias]) if isinstance(node, ast.Import) else ast.ImportFrom(package, [alias], 0)
                    self._imports[(alias.asname or alias.name).split(".")[0]] = ast.unparse(alone)

    def only_defines(self) -> bool:
        """Whether the top level only imports and defines, each name once: :meth:`stand_alone` then leaves nothing out."""
        names = []
        for node in self.tree.body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                names.append(node.name)
            elif isinstance(node, ast.Assign | ast.AnnAssign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                names += [target.id if isinstance(target, ast.Name) else "" for target in targets]
            elif (
                not isinstance(node, ast.Import | ast.ImportFrom) and ast.get_docstring(ast.Module([node], [])) is None
            ):
                return False
        return "" not in names and len(set(names)) == len(names)

    def functions(self) -> Iterator[ast.FunctionDef]:
        """Functions of the top level, the last of each name."""
        return (node for node in self._definitions.values() if isinstance(node, ast.FunctionDef))

    def function(self, name: str) -> ast.FunctionDef:
        """The function of that name, which must be there."""
        node = self._definitions[name]
        assert isinstance(node, ast.FunctionDef)
        return node

    def stand_alone(self, function: ast.FunctionDef) -> str | None:
        """Source that defines ``function`` with the standard library alone; None if it needs more than its module has."""
        taken: dict[str, ast.stmt] = {}
        imports: set[str] = set()
        waiting = [function.name]
        while waiting:
            name = waiting.pop()
            if name in taken:
                continue
            if name in self._definitions:
                taken[name] = self._definitions[name]
                waiting += sorted(_free_names(self._text(taken[name])))
            elif name in self._imports:
                imports.add(self._imports[name])
            else:
                return None
        nodes = sorted(set(taken.values()), key=lambda node: node.lineno)
        constants = [self._text(node) for node in nodes if not isinstance(node, ast.FunctionDef | ast.ClassDef)]
        definitions = [self._text(node) for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)]
        plain_first = sorted(imports, key=lambda line: (line.startswith("from"), line))
        head = "\n".join([*plain_first, *([""] if imports and constants else []), *constants])
        return "\n\n\n".join([*([head] if head else []), *definitions]) + "\n"

    def signature(self, function: ast.FunctionDef) -> str:
        """``name(first, second=2)`` as the source of :meth:`stand_alone` has it."""
        tree = ast.parse(self._text(function)).body[0]
        assert isinstance(tree, ast.FunctionDef)
        returns = f" -> {ast.unparse(tree.returns)}" if tree.returns else ""
        return f"{tree.name}({ast.unparse(tree.args)}){returns}"

    def _text(self, node: ast.stmt) -> str:
        """The source of a definition without docstrings and without annotations that need an import."""
        decorators = getattr(node, "decorator_list", [])
        start = self._offset(min([node.lineno, *(decorator.lineno for decorator in decorators)]), 0)
        text, end = b"", start
        for cut_start, cut_end in sorted([*self._docstrings(node), *self._annotations(node)]):
            text, end = text + self._source[end:cut_start], cut_end
        return (text + self._source[end : self._offset(node.end_lineno, node.end_col_offset)]).decode()

    def _docstrings(self, node: ast.stmt) -> Iterator[tuple[int, int]]:
        for inner in ast.walk(node):
            if not isinstance(inner, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) or len(inner.body) == 1:
                continue
            if ast.get_docstring(inner) is not None:
                first, last = inner.body[0].lineno, inner.body[0].end_lineno
                blank = _BLANK_LINES.match(self._source, self._offset(last, 0))
                assert blank is not None
                yield self._offset(first, 0), blank.end()

    def _annotations(self, node: ast.stmt) -> Iterator[tuple[int, int]]:
        for inner in ast.walk(node):
            if isinstance(inner, ast.FunctionDef | ast.AsyncFunctionDef) and _needs_import(inner.returns):
                start, end = self._span(inner.returns)
                arrow = self._source.rindex(b"->", 0, start)
                yield len(self._source[:arrow].rstrip(b" \t\r\n\\")), end  # it may stand on a continued line
            elif isinstance(inner, ast.arg) and _needs_import(inner.annotation):
                yield self._span(inner)[0] + len(inner.arg.encode()), self._span(inner.annotation)[1]
            elif isinstance(inner, ast.AnnAssign) and inner.value and _needs_import(inner.annotation):
                yield self._span(inner.target)[1], self._span(inner.annotation)[1]

    def _span(self, node: ast.expr | ast.arg) -> tuple[int, int]:
        return self._offset(node.lineno, node.col_offset), self._offset(node.end_lineno, node.end_col_offset)

    def _offset(self, line: int | None, column: int | None) -> int:
        assert line is not None
        assert column is not None
        return self._lines[line - 1] + column


def _needs_import(annotation: ast.expr | None) -> TypeGuard[ast.expr]:
    nodes = [] if annotation is None else list(ast.walk(annotation))
    quoted = any(isinstance(node, ast.Constant) and isinstance(node.value, str) for node in nodes)
    return quoted or not _BUILTINS.issuperset(node.id for node in nodes if isinstance(node, ast.Name))


def _free_names(source: str) -> set[str]:
    """Global names that code uses without defining them, other than builtins."""

    def used(table: symtable.SymbolTable) -> Iterator[str]:
        for symbol in table.get_symbols():
            if symbol.is_referenced() and (table.get_type() == "module" or symbol.is_global()):
                yield symbol.get_name()
        for child in table.get_children():
            yield from used(child)

    return set(used(symtable.symtable(source, "source", "exec"))) - _BUILTINS
