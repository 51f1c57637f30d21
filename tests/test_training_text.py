import json

import numpy as np
import pytest

from mlx_compress.errors import InputError
from mlx_compress.options import DistillOptions
from mlx_compress.training_text import read_training


class Letters:
    """A token a byte; a chat template that opens each turn with < or >."""

    eos_token_id = 0

    def encode(self, text, add_special_tokens=True, verbose=True):
        return list(text.encode())

    def apply_chat_template(
        self, messages, tools=None, add_generation_prompt=False, return_dict=True
    ):
        turns = {"user": "<", "assistant": ">"}
        text = "".join(turns[m["role"]] + m["content"] for m in messages)
        return list((text + ">" * add_generation_prompt).encode())


def options(**changed):
    plain = {"iters": 4, "batch_size": 2, "max_seq_length": 5, "val_samples": 3}
    return DistillOptions(**plain | changed)


def read(folder, **changed):
    notes = []
    return *read_training(folder, Letters(), options(**changed), notes), notes


def rows(text):
    return {bytes(row.tolist()) for row in text.tokens}


def test_a_validation_split_that_measuring_does_not_use_is_held_out(tmp_path):
    for name, letter in (("train", "a"), ("valid", "b"), ("test", "c")):
        (tmp_path / f"{name}.txt").write_text(letter * 200)
    train, held, _ = read(tmp_path)
    assert rows(train) == {b"aaaaa"} and len(train.tokens) == 8
    assert rows(held) == {b"bbbbb"} and len(held.tokens) == 3


def test_where_measuring_reads_the_validation_split_some_of_the_training_text_is_held_out(tmp_path):
    letters = "".join(map(chr, range(33, 120)))
    (tmp_path / "train.txt").write_text(letters)
    (tmp_path / "valid.txt").write_text("z" * 200)
    train, held, _ = read(tmp_path)
    assert len(train.tokens) == 8 and len(held.tokens) == 3
    seen = set(train.tokens.flat)
    assert not seen & set(held.tokens.flat) and len(seen) == 40


def test_of_little_text_half_at_most_is_held_out(tmp_path):
    (tmp_path / "train.txt").write_text("a" * 20)
    (tmp_path / "test.txt").write_text("z" * 200)
    train, held, _ = read(tmp_path)
    assert (len(train.tokens), len(held.tokens)) == (2, 2)


def test_one_window_is_too_little(tmp_path):
    (tmp_path / "train.txt").write_text("a" * 9)
    (tmp_path / "test.txt").write_text("z" * 200)
    with pytest.raises(InputError, match="1 window of 5 tokens is too little to train on one part"):
        read(tmp_path)


@pytest.mark.parametrize("chat", [True, False])
def test_prompts_are_masked_and_answers_are_not(chat, tmp_path):
    record = {"prompt": "abc", "completion": "XY"}
    if chat:
        turns = (("user", "abc"), ("assistant", "XY"))
        record = {"messages": [{"role": role, "content": text} for role, text in turns]}
    for name in ("train", "valid", "test"):
        (tmp_path / f"{name}.jsonl").write_text((json.dumps(record) + "\n") * 30)
    train, held, _ = read(tmp_path, mask_prompt=True)
    for text in (train, held):
        answers = np.isin(text.tokens, list(b"XY"))
        assert answers.any() and (text.mask == answers).all()


def test_running_text_has_no_prompts_to_mask(tmp_path):
    (tmp_path / "train.txt").write_text("a" * 200)
    (tmp_path / "test.txt").write_text("a" * 200)
    with pytest.raises(InputError, match="--mask-prompt needs records of prompt and completion"):
        read(tmp_path, mask_prompt=True)


def test_a_record_that_is_nothing_but_an_answer_is_named(tmp_path, monkeypatch):
    record = {"messages": [{"role": "assistant", "content": "XY"}]}
    for name in ("train", "valid", "test"):
        (tmp_path / f"{name}.jsonl").write_text((json.dumps(record) + "\n") * 30)

    def template(self, messages, **options):
        if not messages:
            raise ValueError("an empty conversation")
        return list(b"XY")

    monkeypatch.setattr(Letters, "apply_chat_template", template)
    with pytest.raises(InputError, match="without its answer does not pass the chat template"):
        read(tmp_path, mask_prompt=True)
