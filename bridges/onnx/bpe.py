"""Read a tokenizer.json of byte-level BPE without any package: for `generate.py`.

    tokenizer = ByteLevelBPE.open("tokenizer.json")
    tokenizer.decode(tokenizer.encode("Hello"))

Covers the models of GPT-2, Llama 3, Qwen and their like: a BPE over bytes, cut into words by one or
more regular expressions. `open` raises `ValueError` for another kind.
"""

import json
import re
import sys
import unicodedata
from functools import cache, lru_cache
from pathlib import Path

GPT2_WORDS = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
SPACES = "\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"


class ByteLevelBPE:
    def __init__(self, document: dict):
        model = document["model"]
        if model.get("type") != "BPE" or not _has_byte_level(document):
            raise ValueError(
                "its tokenizer is no byte-level BPE; install the package tokenizers to use it."
            )
        self.vocabulary: dict[str, int] = model["vocab"]
        pairs = (m.split(" ") if isinstance(m, str) else m for m in model["merges"])
        self.ranks = {tuple(pair): k for k, pair in enumerate(pairs)}
        self.whole_words = bool(model.get("ignore_merges"))
        self.forms = [step["type"] for step in _nested(document.get("normalizer"))]
        self.cuts = [re.compile(_translated(p)) for p in _patterns(document["pre_tokenizer"])]
        self.prefix_space = any(
            n.get("add_prefix_space") for n in _nested(document["pre_tokenizer"])
        )
        added = document.get("added_tokens") or []
        self.added = {token["content"]: token["id"] for token in added}
        self.special = {token["id"] for token in added if token.get("special")}
        longest = sorted(self.added, key=len, reverse=True)
        self.added_pattern = re.compile("|".join(map(re.escape, longest))) if longest else None
        self.before, self.after = _around(document.get("post_processor"))
        self.texts = {k: text for text, k in (self.vocabulary | self.added).items()}
        self.to_text = _byte_letters()
        self.to_byte = {letter: byte for byte, letter in self.to_text.items()}
        self.merged = lru_cache(maxsize=2**16)(self._merged)

    @classmethod
    def open(cls, path) -> "ByteLevelBPE":
        return cls(json.loads(Path(path).read_text(encoding="utf-8")))

    def encode(self, text: str) -> list[int]:
        ids, at = list(self.before), 0
        for match in self.added_pattern.finditer(text) if self.added_pattern else ():
            ids += self._plain(text[at : match.start()])
            ids.append(self.added[match[0]])
            at = match.end()
        return ids + self._plain(text[at:]) + self.after

    def decode(self, ids) -> str:
        """The text without special tokens; bytes that are no UTF-8 show as U+FFFD."""
        out = bytearray()
        for k in map(int, ids):
            text = self.texts.get(k, "")
            if text in self.added:
                out += b"" if k in self.special else text.encode()
            else:
                out += bytes(self.to_byte[letter] for letter in text)
        return out.decode("utf-8", errors="replace")

    def _plain(self, text: str) -> list[int]:
        if not text:
            return []
        for form in self.forms:
            text = unicodedata.normalize(form, text)
        if self.prefix_space and not text.startswith(" "):
            text = " " + text
        pieces = [text]
        for cut in self.cuts:
            pieces = [part for piece in pieces for part in _isolated(cut, piece)]
        words = ("".join(self.to_text[b] for b in piece.encode()) for piece in pieces)
        return [k for word in words for k in self.merged(word)]

    def _merged(self, word: str) -> tuple[int, ...]:
        """Join the pair that was learned first, again and again."""
        if self.whole_words and word in self.vocabulary:
            return (self.vocabulary[word],)
        parts = list(word)
        while len(parts) > 1:
            pairs = zip(parts, parts[1:], strict=False)
            best, where = min((self.ranks.get(p, sys.maxsize), k) for k, p in enumerate(pairs))
            if best == sys.maxsize:
                break
            parts[where : where + 2] = [parts[where] + parts[where + 1]]
        return tuple(self.vocabulary[part] for part in parts if part in self.vocabulary)


FORMS = ("NFC", "NFD", "NFKC", "NFKD")


def _nested(entry: dict | None) -> list[dict]:
    """A step of the pipeline, or the steps of a sequence of them."""
    if not entry:
        return []
    for key in ("pretokenizers", "normalizers", "processors"):
        if key in entry:
            return [step for inner in entry[key] for step in _nested(inner)]
    return [entry]


def _has_byte_level(document: dict) -> bool:
    kinds = {step["type"] for step in _nested(document.get("pre_tokenizer"))}
    normal = {step["type"] for step in _nested(document.get("normalizer"))}
    return "ByteLevel" in kinds and kinds <= {"ByteLevel", "Split", "Digits"} and normal <= {*FORMS}


def _patterns(pre_tokenizer: dict) -> list[str]:
    out = []
    for step in _nested(pre_tokenizer):
        if step["type"] == "Split":
            if step.get("behavior") != "Isolated" or step.get("invert"):
                raise ValueError("its tokenizer splits in an unusual way; install tokenizers.")
            pattern = step["pattern"]
            out.append(pattern.get("Regex") or re.escape(pattern["String"]))
        elif step["type"] == "Digits":
            out.append(r"\p{N}" if step.get("individual_digits") else r"\p{N}+")
        elif step.get("use_regex", True):
            out.append(GPT2_WORDS)
    return out


def _isolated(pattern: re.Pattern, text: str) -> list[str]:
    """Matches and what lies between them, in order."""
    out, at = [], 0
    for match in pattern.finditer(text):
        out += [text[at : match.start()], match[0]]
        at = match.end()
    return [piece for piece in (*out, text[at:]) if piece]


def _translated(pattern: str) -> str:
    r"""A regular expression as Python's `re` takes it, which knows no \p{L}; and Unicode's \s."""
    classes = {"L": _letters("L"), "N": _letters("N"), "s": SPACES}

    def name(match: re.Match) -> str:
        return match[1] or match[2] or match[3]

    out, depth, k = "", 0, 0
    token = re.compile(r"\\p\{(\w+)\}|\\p(\w)|\\(s)|\\S|\\.|\[\^?|\]|.", re.DOTALL)
    while k < len(pattern):
        match = token.match(pattern, k)
        text, k = match[0], match.end()
        if text == r"\S":
            out += rf"[^{SPACES}]"
        elif name(match):
            held = classes.get(name(match)) or _letters(name(match))
            out += held if depth else f"[{held}]"
        else:
            depth += (text in ("[", "[^")) - (text == "]")
            out += text
    return out


@cache
def _letters(category: str) -> str:
    """The characters of a Unicode category as the inside of a character class."""
    ranges, start = [], None
    for k in range(sys.maxunicode + 2):
        inside = k <= sys.maxunicode and unicodedata.category(chr(k)).startswith(category)
        if inside and start is None:
            start = k
        elif not inside and start is not None:
            ranges.append(f"\\U{start:08x}-\\U{k - 1:08x}")
            start = None
    return "".join(ranges)


def _around(post_processor: dict | None) -> tuple[list[int], list[int]]:
    """Special tokens that a template puts before and after a text."""
    before, after, seen = [], [], False
    for step in _nested(post_processor):
        if step["type"] != "TemplateProcessing":
            continue
        for part in step["single"]:
            if "Sequence" in part:
                seen = True
            else:
                ids = step["special_tokens"][part["SpecialToken"]["id"]]["ids"]
                (after if seen else before).extend(ids)
    return before, after


def _byte_letters() -> dict[int, str]:
    """The printable letter that stands for each byte, as in GPT-2."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in plain]
    return {b: chr(b) for b in plain} | {b: chr(256 + k) for k, b in enumerate(others)}
