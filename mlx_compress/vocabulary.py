"""Whether a teacher and a student speak the same tokens."""

from collections.abc import Mapping

from .errors import InputError


def real_tokens(teacher: Mapping[str, int], student: Mapping[str, int], *, widths) -> int:
    """The number of logits to compare, those of real tokens where one model pads its vocabulary.

    `teacher` and `student` map each token to its id; `widths` are those of their logits, teacher
    first. Of equal widths all are compared. Raises `InputError` naming the first id, in order,
    that the two tokenizers read differently, and for a token that a model has no logit for.
    """
    ids = [{i: token for token, i in each.items()} for each in (teacher, student)]
    for i in sorted(ids[0].keys() | ids[1].keys()):
        theirs, own = (each.get(i) for each in ids)
        if theirs != own:
            raise InputError(
                f"token {i} is {theirs!r} to the teacher and {own!r} to the student; "
                "distil from a teacher that has the student's tokenizer."
            )
    count, least = max(ids[0], default=-1) + 1, min(widths)
    if count > least:
        raise InputError(
            f"the tokenizer has {count} tokens and a model only {least} logits; "
            "use the tokenizer that the model was trained with."
        )
    return least if widths[0] == widths[1] else count
