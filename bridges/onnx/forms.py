"""Arithmetic on sizes that may be open: numbers stay numbers."""

from ...sizes import Size


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
