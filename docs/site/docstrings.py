"""Griffe extension: what docstrings have of reStructuredText, as Markdown; shapes beside arguments.

Docstrings are written for ``help()`` and for readers of the source: roles such as ``:func:`name```,
``::`` before code, simple tables, one text for several arguments, and shapes as comments on the
arguments of a signature.
"""

from __future__ import annotations

import ast
import re
from typing import Any

from griffe import Attribute, Docstring, Extension, Function, NameResolutionError, Object

ROLE = re.compile(r":(?:mod|func|class|meth|attr|data|exc):`(~?)([\w.]+)`")
RULE = r"=+(?: +=+)+ *\n"
TABLE = re.compile(rf"^( *){RULE}(?:.+\n)+?\1{RULE}(?:(?:.+\n)+?\1{RULE})?", re.MULTILINE)
BRACKETS = re.compile(r"(`[^`]*`)|\]( ?)\[")  # "[SEP] [PAD]" is no link; code is left alone
# "q, k, v: text", with lines that are further in.
ARGUMENT = re.compile(r"^( *)(\w+(?:, \w+)*): (.*(?:\n\1 +.*)*)", re.MULTILINE)


class Docstrings(Extension):
    """Rewrites every docstring when its object has been loaded."""

    def on_instance(self, *, obj: Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = markdown(obj.docstring.value, obj)

    def on_function_instance(self, *, node: Any, func: Function, **kwargs: Any) -> None:
        if func.docstring is not None and isinstance(node, ast.FunctionDef):
            func.docstring.value = with_shapes(func.docstring.value, *shapes(node, func))

    def on_attribute_instance(self, *, node: Any, attr: Attribute, **kwargs: Any) -> None:
        """The comment on a field of a class is its docstring, if it has no other."""
        if attr.docstring is None and isinstance(node, ast.AnnAssign) and attr.parent.is_class:
            comment = _comment(node.lineno, attr)
            attr.docstring = Docstring(comment, parent=attr) if "[" in comment else None


def markdown(text: str, obj: Object) -> str:
    """The text of a docstring as Markdown; names are looked up where ``obj`` stands."""
    text = ROLE.sub(lambda match: _reference(match[2], bool(match[1]), obj), text)
    text = BRACKETS.sub(lambda match: match[1] or f"]{match[2]}\\[", text)
    text = TABLE.sub(lambda match: f"{match[1]}```text\n{match[0]}{match[1]}```\n", text + "\n")
    return text.rstrip().replace("::\n\n", ":\n\n")


def _reference(name: str, short: bool, obj: Object) -> str:
    """A link if the name is on the site, else the name as code."""
    try:
        target = obj.resolve(name)
    except NameResolutionError:
        target = name
    shown = name.rpartition(".")[2] if short else name
    return f'<autoref identifier="{target}" optional><code>{shown}</code></autoref>'


def shapes(node: ast.FunctionDef, func: Function) -> tuple[set[str], dict[str, str]]:
    """The arguments of a signature, and comments such as ``# [B, N]`` behind them."""
    found, names = {}, set()
    for argument in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs):
        names.add(argument.arg)
        comment = _comment(argument.lineno, func)
        if "[" in comment or "shape" in comment:
            found[argument.arg] = comment
    return names, found


def _comment(line: int, obj: Object) -> str:
    """What is said behind a line of the file in which ``obj`` is defined."""
    return obj.lines_collection[obj.filepath][line - 1].partition("  # ")[2]


def with_shapes(text: str, names: set[str], found: dict[str, str]) -> str:
    """The text with an entry of its own for each argument, which its shape begins."""

    def replaced(match: re.Match[str]) -> str:
        several = match[2].split(", ")
        if not names.issuperset(several):
            return match[0]
        shape = {name: f"`{found[name]}`: " if name in found else "" for name in several}
        return "\n".join(f"{match[1]}{name}: {shape[name]}{match[3]}" for name in several)

    return ARGUMENT.sub(replaced, text)
