"""Index expressions as text that Python and Triton both read."""

from __future__ import annotations

import sympy
from sympy.printing.str import StrPrinter
from torch.utils._sympy.functions import FloorDiv, Mod


class _Printer(StrPrinter):
    """Index expressions, large steps first."""

    printmethod = "_as_index"  # not the methods by which torch's functions print themselves

    def _print_FloorDiv(self, expr: FloorDiv) -> str:
        return f"{self._operand(expr.args[0])} // {self._operand(expr.args[1])}"

    def _print_Mod(self, expr: Mod) -> str:
        return f"{self._operand(expr.args[0])} % {self._operand(expr.args[1])}"

    _print_PythonMod = _print_Mod

    def _print_Mul(self, expr: sympy.Mul) -> str:
        number, rest = expr.as_coeff_Mul()
        texts = [self._operand(one) for one in sympy.Mul.make_args(rest)]
        texts += [] if number == 1 else [str(number)]
        return " * ".join(texts) if number != -1 else f"-{' * '.join(texts[:-1])}"

    def _print_Add(self, expr: sympy.Add, order: object = None) -> str:
        terms = sorted(expr.args, key=lambda term: (-abs(term.as_coeff_Mul()[0]), str(term)))
        first = next((term for term in terms if term.as_coeff_Mul()[0] > 0), terms[0])
        text: str = self._print(first)
        for term in terms:
            if term is not first:
                negative = term.as_coeff_Mul()[0] < 0
                text += f" - {self._print(-term)}" if negative else f" + {self._print(term)}"
        return text

    def _print_Max(self, expr: sympy.Max) -> str:
        return self._nested("max", expr.args)

    def _print_Min(self, expr: sympy.Min) -> str:
        return self._nested("min", expr.args)

    def _nested(self, function: str, args: tuple[sympy.Expr, ...]) -> str:
        """Of two arguments each, which is what Triton has."""
        *others, last = sorted(args, key=str)
        text: str = self._print(last)
        for one in others:
            text = f"{function}({self._print(one)}, {text})"
        return text

    def _operand(self, expr: sympy.Expr) -> str:
        text = self._print(expr)
        simple = expr.is_Symbol or (expr.is_Integer and expr >= 0) or isinstance(expr, (sympy.Max, sympy.Min))
        return str(text) if simple else f"({text})"


def print_index(expr: sympy.Expr) -> str:
    """An index expression as Triton text."""
    text: str = _Printer().doprint(expr)
    return text
