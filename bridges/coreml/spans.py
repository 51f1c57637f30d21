"""The named sizes of a package: fixed, in a range, or to choose from."""

from collections.abc import Iterable, Mapping

from ...errors import InputError
from ...sizes import Size
from .quiet import ct, get_new_symbol

Span = int | tuple[int, int] | list[int]


class Spans:
    """`fixed` sizes by name, and MIL's `symbols` for the others."""

    def __init__(self, spans: Mapping[str, Span]):
        self.spans = dict(spans)
        for name, span in spans.items():
            _check(name, span)
        self.fixed = {name: n for name, n in spans.items() if isinstance(n, int)}
        self.symbols = {n: get_new_symbol() for n in sorted(spans.keys() - self.fixed.keys())}
        lists = {name: span for name, span in spans.items() if isinstance(span, list)}
        self.choices = [
            dict(zip(lists, row, strict=False)) for row in zip(*lists.values(), strict=False)
        ]
        if lists and (lists.keys() != self.symbols.keys() or len({*map(len, lists.values())}) > 1):
            raise InputError("sizes to choose from: give every open size as a list, of one length.")

    def tensor_types(self, features: Iterable) -> list:
        """What coremltools is told about each input."""
        return [ct.TensorType(name=f.name, shape=self._shape(f), dtype=f.numpy) for f in features]

    def _shape(self, feature):
        shape = feature.shape
        if not any(isinstance(n, Size) for n in shape):
            return shape
        names = [name_of(n, feature.name) if isinstance(n, Size) else None for n in shape]
        if self.choices:
            rows = [
                tuple(sizes.get(name, n) for name, n in zip(names, shape, strict=True))
                for sizes in self.choices
            ]
            return ct.EnumeratedShapes(shapes=rows, default=rows[0])
        return tuple(
            n if name is None else self._range(name) for name, n in zip(names, shape, strict=True)
        )

    def _range(self, name: str):
        low, high = self.spans[name]
        return ct.RangeDim(lower_bound=low, upper_bound=high, default=low)


def name_of(form: Size, feature: str) -> str:
    """The name of an open size that stands alone; `InputError` for a sum or a product."""
    names, coefficient = form.items[0]
    if len(form.items) > 1 or len(names) != 1 or coefficient != 1:
        raise InputError(
            f"input {feature}: its size {form} cannot be left open; fix the sizes in it."
        )
    return names[0]


def _check(name: str, span: Span) -> None:
    numbers = [span] if isinstance(span, int) else list(span)
    least = 0 if isinstance(span, int) else 1
    if not numbers or any(not isinstance(n, int) or n < least for n in numbers):
        raise InputError(
            f"size {name}: {span!r}; give a number, a range (low, high) or a list, from {least} on."
        )
    if isinstance(span, tuple) and (len(span) != 2 or span[0] > span[1]):
        raise InputError(f"size {name}: {span!r} is no range (low, high).")
