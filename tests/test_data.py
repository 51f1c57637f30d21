import json
import tempfile
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mlx_compress import data
from mlx_compress.data import load_windows, read_split, target_bytes, token_windows, tokenize
from mlx_compress.errors import InputError

BOOKS = Path(__file__).parents[2] / "shared" / "data" / "lm-books5m"
needs_books = pytest.mark.skipif(not BOOKS.is_dir(), reason=f"{BOOKS} is not here")


class ByteTokenizer:
    """A token a byte (id = byte + 2), 0 ends a document, 1 begins a text."""

    eos_token_id = 0
    calls = 0

    def encode(self, text, add_special_tokens=True, verbose=True):
        self.calls += 1
        return [1] * add_special_tokens + [byte + 2 for byte in text.encode()]

    def decode(self, ids, skip_special_tokens=False, clean_up_tokenization_spaces=True):
        assert skip_special_tokens and not clean_up_tokenization_spaces
        return bytes(i - 2 for i in ids if i > 1).decode(errors="replace")

    def apply_chat_template(self, messages, tools=None, return_dict=True):
        assert not return_dict
        if messages[0]["role"] != "user":
            raise RuntimeError("Roles must begin with user,\nnot " + "system " * 30)
        text = "".join(f"<{m['role']}>{m['content']}" for m in messages)
        return self.encode(text + ("".join(tools or [])), add_special_tokens=False)


@pytest.fixture
def tokenizer():
    return ByteTokenizer()


@pytest.fixture(scope="module")
def books_tokenizer():
    transformers = pytest.importorskip("transformers")
    return transformers.PreTrainedTokenizerFast.from_pretrained(str(BOOKS))


@contextmanager
def small_pieces(size=8):
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        patch.setattr(data, "PIECE_BYTES", size)
        yield Path(folder)


def write(path, content):
    if isinstance(content, list):
        content = "".join(json.dumps(record) + "\n" for record in content)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1)
words = st.lists(st.sampled_from(["a", "é", " ", "\n", "猫", "😀", "word"]), min_size=1).map(
    "".join
)


@settings(deadline=None)
@given(texts | words)
@example("😀" * 30)
def test_the_pieces_of_a_text_are_the_text(text):
    with small_pieces() as folder:
        write(folder / "train.txt", text)
        write(folder / "test.txt", "other")
        if not text.strip():
            with pytest.raises(InputError, match="empty"):
                read_split(folder, "calibration")
        else:
            whole = text.removeprefix("\ufeff")
            assert "".join(read_split(folder, "calibration").records) == whole


@settings(deadline=None)
@given(texts | words)
def test_the_halves_of_one_file_are_disjoint_and_are_the_file(text):
    with small_pieces() as folder:
        path = write(folder / "all.txt", text)
        try:
            halves = [read_split(path, split).records for split in data.SPLITS]
        except InputError as error:
            assert "divide" in str(error)
        else:
            assert "".join(map("".join, halves)) == text.removeprefix("\ufeff")


@settings(deadline=None)
@given(st.integers(2, 40))
def test_the_records_of_one_jsonl_are_divided_without_overlap(count):
    with small_pieces() as folder:
        path = write(folder / "all.jsonl", [{"text": str(i)} for i in range(count)])
        first, second = (read_split(path, split).records for split in data.SPLITS)
        assert [int(r["text"]) for r in first + second] == list(range(count))
        assert len(first) - len(second) in (0, 1)


@pytest.mark.parametrize(
    ("names", "calibration", "evaluation"),
    [
        ("train.txt valid.txt test.txt", "train.txt", "test.txt"),
        ("train.jsonl valid.jsonl", "train.jsonl", "valid.jsonl"),
        ("valid.txt test.txt", "valid.txt", "test.txt"),
        ("train.txt train.jsonl test.txt", "train.jsonl", "test.txt"),
        ("valid.txt", "valid.txt", "valid.txt"),
        ("train.txt", "train.txt", "train.txt"),
    ],
)
def test_each_split_reads_its_file(tmp_path, names, calibration, evaluation):
    for name in names.split():
        records = [{"text": f"{name} {i}"} for i in range(4)]
        write(tmp_path / name, records if "jsonl" in name else f"{name} one two three")
    first, second = (read_split(tmp_path, split) for split in data.SPLITS)
    assert (first.path.name, second.path.name) == (calibration, evaluation)
    assert not set(map(str, first.records)) & set(map(str, second.records))


def test_what_was_not_asked_for_is_said(tmp_path):
    write(tmp_path / "valid.txt", "one two three four")
    notice = f"{tmp_path}: only valid.txt is here; calibration reads its first half"
    assert read_split(tmp_path, "calibration").notice.startswith(notice)
    write(tmp_path / "test.txt", "one two three four")
    notice = f"{tmp_path}: no train split, so calibration reads valid.txt."
    assert read_split(tmp_path, "calibration").notice == notice
    assert read_split(tmp_path, "evaluation").notice == ""


def test_a_large_file_is_read_in_part_and_said(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "READ_BYTES", 2**20)
    write(tmp_path / "train.txt", "word " * 2**19)
    write(tmp_path / "valid.jsonl", [{"text": "x" * 2**18}] * 9)
    text, records = (read_split(tmp_path, split) for split in data.SPLITS)
    assert abs(len("".join(text.records)) - 2**20) < data.PIECE_BYTES
    assert text.notice == f"{tmp_path / 'train.txt'}: of 2 MiB only 1 MiB are read."
    assert len(records.records) == 4 and "only 1 MiB" in records.notice


@settings(deadline=None)
@given(st.integers(2, 9), st.integers(1, 30), st.integers(0, 100), st.none() | st.integers(0, 9))
def test_windows_are_disjoint_runs_of_the_text(length, count, size, seed):
    stream = np.arange(size, dtype=np.int32)
    arrays = np.array_split(stream, 3)
    if size < length:
        with pytest.raises(InputError, match=f"{size} tokens are less than one sequence"):
            token_windows(arrays, length=length, count=count, seed=seed)
        return
    windows = token_windows(arrays, length=length, count=count, seed=seed)
    assert windows.dtype == np.int32
    assert windows.shape == (min(count, size // length), length)
    assert (np.diff(windows, axis=1) == 1).all()
    assert len(np.unique(windows)) == windows.size
    assert windows.max() < size
    if seed is None:
        assert windows.ravel().tolist() == list(range(windows.size))


def test_random_windows_come_from_the_seed():
    arrays = [np.arange(1000)]
    first, same, other = (
        token_windows(arrays, length=10, count=20, seed=seed) for seed in (1, 1, 2)
    )
    assert (first == same).all() and (first != other).any()


def test_documents_end_with_eos_and_pieces_of_one_text_do_not(tokenizer):
    documents = tokenize([{"text": "a"}, {"text": "b"}], tokenizer)
    assert [ids.tolist() for ids in documents] == [[1, 99, 0], [1, 100, 0]]
    pieces = tokenize(["a", "b"], tokenizer)
    assert [ids.tolist() for ids in pieces] == [[1, 99], [100]]


def test_chat_records_go_through_the_template_with_their_tools(tokenizer):
    records = [
        {"messages": [{"role": "user", "content": "q"}], "tools": ["T"], "id": 7},
        {"prompt": "p", "completion": "c", "text": "ignored"},
    ]
    arrays = tokenize(records, tokenizer)
    texts = [bytes((ids - 2).tolist()).decode() for ids in arrays]
    assert texts == ["<user>qT", "<user>p<assistant>c"]


def test_a_big_text_is_not_tokenised_whole(tmp_path, tokenizer):
    write(tmp_path / "train.txt", "word " * 2**18)
    write(tmp_path / "test.txt", "word " * 2**18)
    for split in data.SPLITS:
        tokenizer.calls = 0
        windows = load_windows(tmp_path, split, tokenizer, length=64, count=16)
        assert windows.tokens.shape == (16, 64) and tokenizer.calls == 1


def test_calibration_windows_come_from_all_over_the_text(tmp_path, tokenizer):
    write(tmp_path / "train.txt", "".join(f"{i:06d} " for i in range(100_000)))
    write(tmp_path / "test.txt", "x")
    windows = load_windows(tmp_path, "calibration", tokenizer, length=128, count=128)
    places = [int(bytes((row - 2).tolist())[7:].split()[1]) for row in windows.tokens]
    assert min(places) < 25_000 and max(places) > 75_000


def test_evaluation_windows_come_in_order_and_count_their_bytes(tmp_path, tokenizer):
    write(tmp_path / "train.txt", "x")
    path = write(tmp_path / "test.txt", "abcdefghij")
    windows = load_windows(tmp_path, "evaluation", tokenizer, length=4, count=9)
    assert windows.tokens.tolist() == [[1, 99, 100, 101], [102, 103, 104, 105]]
    assert windows.target_bytes.tolist() == [3, 3]
    assert windows.notice == f"{path}: evaluation has 2 of the 9 windows asked for."


@settings(deadline=None)
@given(words)
def test_target_bytes_are_off_by_at_most_two(text):
    tokenizer = ByteTokenizer()
    ids = np.array([[*tokenizer.encode(text), 0]])
    for start in range(ids.shape[1] - 1):
        exact = (ids[0, start + 1 :] > 1).sum()
        assert abs(target_bytes(ids[:, start:], tokenizer)[0] - exact) <= 2


def test_target_bytes_keep_the_space_that_sentencepiece_strips():
    class Stripping(ByteTokenizer):
        def decode(self, ids, **options):
            return super().decode(ids, **options).removeprefix(" ")

    ids = np.array([[ord(c) + 2 for c in "a b"], [ord(c) + 2 for c in " ab"]])
    assert target_bytes(ids, Stripping()).tolist() == [2, 2]


@needs_books
def test_pieces_of_the_books_give_the_tokens_of_the_whole(books_tokenizer):
    records = read_split(BOOKS, "evaluation").records
    assert len(records) > 20
    ids = np.concatenate(tokenize(records, books_tokenizer))
    whole = books_tokenizer.encode("".join(records), verbose=False)
    assert (ids == whole).all()


@needs_books
def test_target_bytes_of_the_books_are_those_of_the_vocabulary(books_tokenizer):
    windows = load_windows(BOOKS, "evaluation", books_tokenizer, length=64, count=50)
    # A byte-level vocabulary spells each byte as one character.
    sizes = [[len(t) for t in books_tokenizer.convert_ids_to_tokens(row)] for row in windows.tokens]
    assert np.abs(np.sum(sizes, 1) - np.array(sizes)[:, 0] - windows.target_bytes).max() <= 2
    assert windows.notice == ""


LINES = [
    (b"\x93NUMPY\x01\x00", r"train.txt: byte 0x93 at offset 0 is not UTF-8 text.*iconv"),
    (b"plain \0 text", r"train.txt: byte 0x00 at offset 6 is not UTF-8 text"),
    ("naïve".encode("utf-16"), r"byte 0xff at offset 0 is not UTF-8"),
    (b"", r"train.txt: the file is empty \(0 bytes"),
    (b" \n\n", r"train.txt: the file is empty \(3 bytes"),
]
RECORDS = [
    (b'{"text": "a"}\n{"text": ', r"train.jsonl:2: not JSON \(Expecting value.*one JSON object"),
    (b'{"text": "\\ud800"}', r"train.jsonl:1: not JSON \(.*surrogates"),
    (b"[" * 100_000, r"train.jsonl:1: not JSON"),
    (b'\n{"txt": "a", "id": 1}', r"""train.jsonl:2: \['txt', 'id'\] is no known record.*"text","""),
    (b"3", r"train.jsonl:1: int is no known record"),
    (b'["text"]', r"train.jsonl:1: list is no known record"),
    (b'{"text": 5}', r"train.jsonl:1: 'text' is a int; it must be a str"),
    (b'{"messages": "hi"}', r"train.jsonl:1: 'messages' is a str; it must be a list"),
    (b'{"text": "a"}\n\xff', r"train.jsonl: byte 0xff at offset 14 is not UTF-8"),
    (b"\n", r"train.jsonl: the file is empty \(1 bytes"),
]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [("train.txt", *line) for line in LINES] + [("train.jsonl", *line) for line in RECORDS],
)
def test_a_bad_file_is_named_with_place_and_remedy(tmp_path, name, content, message):
    write(tmp_path / name, content)
    write(tmp_path / "test.txt", "x")
    with pytest.raises(InputError, match=message) as caught:
        read_split(tmp_path, "calibration")
    assert "\n" not in str(caught.value) and caught.value.exit_code == 2


def test_missing_data_is_named(tmp_path):
    with pytest.raises(InputError, match=r"none: no such file or folder; --data takes"):
        read_split(tmp_path / "none", "calibration")
    with pytest.raises(InputError, match=r"looked for test.jsonl, test.txt, train.jsonl, .*valid"):
        read_split(tmp_path, "evaluation")
    with pytest.raises(InputError, match=r"a.csv: .csv is not read; give a .txt or .jsonl"):
        read_split(write(tmp_path / "a.csv", "1,2"), "evaluation")
    with pytest.raises(InputError, match="one.jsonl: too little text to divide.*train.txt"):
        read_split(write(tmp_path / "one.jsonl", [{"text": "a"}]), "evaluation")


def test_an_unreadable_file_is_named(tmp_path, monkeypatch):
    def refuse(self, *args, **kwargs):
        raise PermissionError(13, "Permission denied")

    write(tmp_path / "train.txt", "x")
    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(InputError, match=r"train.txt: cannot be read \(Permission denied\)"):
        read_split(tmp_path, "calibration")


def test_a_text_shorter_than_one_sequence_says_how_long_it_is(tmp_path, tokenizer):
    write(tmp_path / "train.txt", "abc")
    write(tmp_path / "test.txt", "abc")
    message = r"train.txt: 4 tokens are less than one sequence of 512; .* --max-seq-length to 4"
    with pytest.raises(InputError, match=message):
        load_windows(tmp_path, "calibration", tokenizer, length=512, count=8)
    with pytest.raises(InputError, match="--max-seq-length 1 and 8 windows"):
        load_windows(tmp_path, "calibration", tokenizer, length=1, count=8)


def test_a_chat_template_that_refuses_is_named(tmp_path, tokenizer):
    records = [{"messages": [{"role": "system", "content": "a"}]}] * 2
    path = write(tmp_path / "test.jsonl", records)
    message = r"test.jsonl: record 1 does not pass the chat template \(Roles .* not .* \.\.\.\)"
    with pytest.raises(InputError, match=message) as caught:
        load_windows(path, "evaluation", tokenizer, length=4, count=1)
    assert "\n" not in str(caught.value)
