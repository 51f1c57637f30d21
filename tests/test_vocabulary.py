import pytest

from mlx_compress.errors import InputError
from mlx_compress.vocabulary import real_tokens

TOKENS = {"a": 0, "b": 1, "c": 2}


def test_padding_of_the_wider_model_is_cut_off():
    assert real_tokens(TOKENS, TOKENS, widths=(8, 4)) == 3


def test_of_equal_widths_every_logit_is_compared():
    assert real_tokens(TOKENS, TOKENS, widths=(8, 8)) == 8


def test_the_first_token_that_differs_is_named():
    with pytest.raises(InputError, match="token 1 is 'b' to the teacher and 'x' to the student"):
        real_tokens(TOKENS, {"a": 0, "x": 1, "y": 2}, widths=(3, 3))


def test_a_token_that_one_lacks_is_named():
    with pytest.raises(InputError, match="token 2 is 'c' to the teacher and None"):
        real_tokens(TOKENS, {"a": 0, "b": 1}, widths=(3, 3))


def test_a_token_without_a_logit_is_refused():
    with pytest.raises(InputError, match="3 tokens and a model only 2 logits"):
        real_tokens(TOKENS, TOKENS, widths=(3, 2))
