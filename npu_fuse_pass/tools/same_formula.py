"""Whether two lines of mathematics are the same but for the order of sums and products."""

from __future__ import annotations

import ast


def ordered(text: str) -> str:
    """A form in which terms and factors have one order; the text itself where it cannot be read."""
    code = text.replace("·", "*").replace("^", "**").replace("'", "_new")
    try:
        return _ordered(ast.parse(code, mode="eval").body)
    except SyntaxError:
        return text


def _ordered(node: ast.expr) -> str:
    if isinstance(node, ast.BinOp) and isinstance(node.op, (ast.Add, ast.Sub)):
        return f"({' '.join(sorted(_parts(node, (ast.Add, ast.Sub), '+', '-')))})"
    if isinstance(node, ast.BinOp) and isinstance(node.op, (ast.Mult, ast.Div)):
        return f"({' '.join(sorted(_parts(node, (ast.Mult, ast.Div), '*', '/')))})"
    if isinstance(node, ast.Call):
        return f"{ast.unparse(node.func)}({', '.join(map(_ordered, node.args))})"
    if isinstance(node, ast.UnaryOp):
        return f"{type(node.op).__name__}({_ordered(node.operand)})"
    if isinstance(node, ast.BinOp):
        return f"{type(node.op).__name__}({_ordered(node.left)}, {_ordered(node.right)})"
    return ast.unparse(node)


def _parts(node: ast.expr, ops: tuple[type[ast.operator], ...], plain: str, inverse: str) -> list[str]:
    """Terms of a sum, or factors of a product, each with its sign; those in brackets on the right are one part."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, ops):
        mark = inverse if isinstance(node.op, ops[1]) else plain
        return [*_parts(node.left, ops, plain, inverse), f"{mark}{_ordered(node.right)}"]
    return [f"{plain}{_ordered(node)}"]
