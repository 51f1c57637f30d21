"""Sizes that may be open: arithmetic on them, and int64 tensors of them.

A shape may hold `Size`s; the file then computes it from the shapes of the inputs.
"""

from collections.abc import Sequence
from math import lcm

import numpy as np

from ...sizes import Size
from .builder import INT64, Handle, cast, constant, current, emit


def ints(entries: Sequence) -> Handle:
    """An int64 vector of numbers and sizes."""
    entries = tuple(entries)
    if not any(isinstance(n, Size) for n in entries):
        return constant(np.array(entries, np.int64))
    if len(entries) == 1:
        return _size(entries[0])

    def make() -> Handle:
        parts, run = [], []
        for n in entries:
            if isinstance(n, Size):
                parts += [constant(np.array(run, np.int64))] if run else []
                parts, run = [*parts, _size(n)], []
            else:
                run.append(int(n))
        parts += [constant(np.array(run, np.int64))] if run else []
        return emit("Concat", *parts, shape=(len(entries),), axis=0)

    return current().remember(("ints", entries), make)


def number(entry, dtype: int = INT64) -> Handle:
    """A scalar of a number or a size."""
    if not isinstance(entry, Size):
        return constant(np.array(entry), dtype)
    whole = current().remember(
        ("scalar", entry), lambda: emit("Squeeze", _size(entry), constant(np.array([0])), shape=())
    )
    return cast(whole, dtype)


def _size(form: Size) -> Handle:
    """An int64 vector of one entry: a sum of products of the inputs' sizes."""

    def make() -> Handle:
        common = lcm(*(c.denominator for c in form.terms.values()))
        total = None
        for names, coefficient in form.terms.items():
            factors = [_named(name) for name in names]
            if not names or coefficient * common != 1:
                factors.append(constant(np.array([int(coefficient * common)], np.int64)))
            term = _fold("Mul", factors)
            total = term if total is None else emit("Add", total, term, shape=(1,))
        if common == 1:
            return total
        return emit("Div", total, constant(np.array([common], np.int64)), shape=(1,))

    return current().remember(("size", form), make)


def _fold(op: str, parts: list[Handle]) -> Handle:
    total = parts[0]
    for part in parts[1:]:
        total = emit(op, total, part, shape=(1,))
    return total


def _named(name: str) -> Handle:
    def make() -> Handle:
        for handle in current().inputs.values():
            for axis, form in enumerate(handle.shape):
                if isinstance(form, Size) and form.terms == {(name,): 1}:
                    return emit("Shape", handle, shape=(1,), dtype=INT64, start=axis, end=axis + 1)
        raise AssertionError(f"no input has an axis {name}")

    return current().remember(("named", name), make)


def plus(left, right):
    """The sum of two numbers or sizes."""
    terms = _terms(left)
    for names, coefficient in _terms(right).items():
        terms[names] = terms.get(names, 0) + coefficient
    return _form(terms)


def times(*factors):
    """The product of numbers and sizes."""
    total: dict = {(): 1}
    for factor in factors:
        product: dict = {}
        for names, c in total.items():
            for more, d in _terms(factor).items():
                key = tuple(sorted((*names, *more)))
                product[key] = product.get(key, 0) + c * d
        total = product
    return _form(total)


def _terms(entry) -> dict:
    return dict(entry.terms) if isinstance(entry, Size) else {(): entry}


def _form(terms: dict):
    terms = {names: c for names, c in terms.items() if c}
    if set(terms) <= {()}:
        return int(terms.get((), 0))
    return Size(tuple(sorted(terms.items())))
