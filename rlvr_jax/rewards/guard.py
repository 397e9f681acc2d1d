"""Lets scorers evaluate text as data alone: lists of constants, and formulas for sympy.

Some scorers of reasoning-gym call `eval`, or sympy's `parse_expr` (which calls it), on an answer. An audit hook of the
interpreter sees every text before it is compiled, and refuses what is more than data, so that no part of it runs:

* text that a module of reasoning-gym itself compiles may hold constants, lists, tuples, sets, dicts and arithmetic;
* text that sympy's parser compiles may also call functions of mathematics and name symbols.

So there is no attribute, no subscript, no other call, and no name that the scorer knows (`oracle_answer` would earn
marks in four tasks). A name that nobody knows fails by itself. The sandbox does not depend on any of this. It is what
keeps an answer from deciding its own verdict.

Only the standard library is imported: the grading worker loads this file by its path. sympy is there when it compiles.
"""

import ast
import builtins
import sys

_DATA = (
    *(ast.Module, ast.Expr, ast.Expression, ast.Constant, ast.List, ast.Tuple, ast.Set, ast.Dict, ast.Load),
    *(ast.UnaryOp, ast.unaryop, ast.BinOp, ast.operator, ast.Name),
)
_FORMULA = (*_DATA, ast.Call, ast.keyword, ast.Compare, ast.cmpop)
_SYMPY_PARSER = "sympy.parsing.sympy_parser"
_ITS_NAMESPACE = "from sympy import *"  # what sympy's parser runs by itself
_FUNCTIONS = {"sqrt", "cbrt", "root", "real_root", "abs"}  # functions of mathematics that are no sympy classes


class Refused(Exception):
    """Text that is more than data."""


class Guard:
    """The audit hook; it cannot be taken away again, and it looks only between `start` and `stop`.

    Attributes:
        refused: why the last text was refused, or None. Scorers swallow exceptions, so the caller has to look.
    """

    def __init__(self):
        self._on = False
        self.refused: str | None = None
        sys.addaudithook(self._hook)

    def start(self) -> None:
        """From now on text is checked."""
        self.refused, self._on = None, True

    def stop(self) -> None:
        """From now on it is not."""
        self._on = False

    def _hook(self, event, arguments):
        if event != "compile" or not self._on:
            return
        frame = sys._getframe(1)
        compiler = frame.f_globals.get("__name__", "")
        if compiler == _SYMPY_PARSER:
            allowed, harmless = _FORMULA, _of_mathematics
        elif compiler.partition(".")[0] == "reasoning_gym":
            known = {*frame.f_locals, *frame.f_globals, *dir(builtins)}
            allowed, harmless = _DATA, lambda name: name not in known
        else:
            return
        self._on = False  # reading the text compiles it too
        try:
            if (reason := _objection(arguments[0], allowed, harmless)) is not None:
                self.refused = reason
                raise Refused(reason)
        finally:
            self._on = True


def _objection(source, allowed, harmless) -> str | None:
    """What is more than data in a text or a syntax tree; None also for text that does not compile.

    Args:
        source: text, bytes, or a tree.
        allowed: the kinds of nodes that may be in it.
        harmless: says of a name whether it may.
    """
    if isinstance(source, ast.AST):
        return _first(source, allowed, harmless)
    if isinstance(source, bytes):
        try:
            source = source.decode()
        except UnicodeDecodeError:
            return "bytes that are no text"
    if "#" in source and "coding" in source:
        return "an encoding"  # bytes that name one would be read otherwise here
    if allowed is _FORMULA and source == _ITS_NAMESPACE:
        return None
    for mode, text in (("eval", source.lstrip(" \t")), ("exec", source)):
        try:
            tree = ast.parse(text, mode=mode)
        except (SyntaxError, ValueError):
            continue  # the compiler raises it again
        except (MemoryError, RecursionError):
            return "text nested too deeply"
        if (reason := _first(tree, allowed, harmless)) is not None:
            return reason
    return None


def _first(tree, allowed, harmless) -> str | None:
    for node in ast.walk(tree):
        if not isinstance(node, allowed):
            return type(node).__name__
        if isinstance(node, ast.Name) and not harmless(node.id):
            return f"the name {node.id}"
        if isinstance(node, ast.keyword) and not (node.arg and isinstance(node.value, ast.Constant)):
            return "a keyword"
    return None


def _of_mathematics(name: str) -> bool:
    """Whether a name is a symbol, or one of sympy's expressions and functions."""
    import sympy

    if name in _FUNCTIONS:
        return True
    if not hasattr(sympy, name):
        return not hasattr(builtins, name) and "__" not in name  # a symbol
    found = getattr(sympy, name)
    if isinstance(found, type):
        return issubclass(found, sympy.Expr)
    return isinstance(found, sympy.Basic)  # pi, E, I, oo
