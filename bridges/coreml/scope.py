"""What the rules of one MIL program share: its float type, its target, and its open sizes.

An open size is known when the model runs, from the shape of an input. Forms of sizes become small
int32 computations, each made once.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

from ...sizes import Size
from .quiet import mb

IOS18 = 9  # the number of the opset that brought attention, states and 4-bit weights
_ACTIVE: ContextVar["Scope"] = ContextVar("the program being built")


@dataclass
class Scope:
    """`floats` is "fp16" or "fp32"; `target` the opset's number; `sizes` are [1] int32 vars."""

    floats: str
    target: int
    sizes: Mapping[str, object] = field(default_factory=dict)
    states: Mapping[str, object] = field(default_factory=dict)
    shapes: dict[str, tuple] = field(default_factory=dict)  # by the name of a var
    made: dict = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


@contextmanager
def building(scope: Scope) -> Iterator[Scope]:
    token = _ACTIVE.set(scope)
    try:
        yield scope
    finally:
        _ACTIVE.reset(token)


def scope() -> Scope:
    return _ACTIVE.get()


def once(key, make: Callable[[], object]):
    """What `make` builds, built only the first time that the program asks for `key`."""
    made = scope().made
    if key not in made:
        made[key] = make()
    return made[key]


def shape_of(var) -> tuple:
    """The shape of a var in sizes that may be open; of what a rule makes by itself, MIL's own."""
    return scope().shapes.get(var.name, var.shape)


def times(form: int | Size, factor: int) -> int | Size:
    if not isinstance(form, Size):
        return form * factor
    return Size(tuple((names, c * factor) for names, c in form.items))


def number(form: int | Size):
    """A size as a [1] int32 var; an int stays a list of one."""
    return once(form, lambda: _compute(form)) if isinstance(form, Size) else [int(form)]


def vector(forms: Sequence[int | Size]):
    """Sizes as a list of ints, or as a 1-D int32 var where one of them is open."""
    if not any(isinstance(form, Size) for form in forms):
        return [int(form) for form in forms]
    if len(forms) == 1:
        return number(forms[0])
    return once(tuple(forms), lambda: mb.concat(values=[*map(number, forms)], axis=0))


def scalar(form: int | Size):
    """A size as a rank-0 int32 var, or an int."""
    if not isinstance(form, Size):
        return int(form)
    return once(("scalar", form), lambda: mb.squeeze(x=number(form), axes=[0]))


def _compute(form: Size):
    common = 1
    for _, coefficient in form.items:
        common *= coefficient.denominator
    total = None
    for names, coefficient in form.items:
        term = _product(names, int(coefficient * common))
        total = term if total is None else mb.add(x=total, y=term)
    return total if common == 1 else mb.floor_div(x=total, y=[common])


def _product(names: tuple[str, ...], factor: int):
    product = None
    for name in names:
        size = scope().sizes[name]
        product = size if product is None else mb.mul(x=product, y=size)
    if product is None:
        return [factor]
    return product if factor == 1 else mb.mul(x=product, y=[factor])
