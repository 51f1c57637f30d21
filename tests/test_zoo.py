"""Every architecture that the zoo builds, pruned and opened again by stock mlx-lm."""

import mlx.core as mx
import pytest

import zoo
from zoo_checks import NONE, OK, PAGE, TOLERANCE, cells, check, read_table

KINDS = ("channels", "heads", "experts")
PROVEN = ("llama", "qwen3_moe")  # also opened in a fresh process, which takes seconds

# A head is as wide as the hidden size over the number of heads, so fewer heads would be wider.
HEADS_FROM_WIDTH = (
    "Klear apertus baichuan_m1 bailing_moe cohere deepseek gpt_neox granite granitemoe "
    "granitemoehybrid helium hunyuan internlm2 internlm3 jamba lfm2 lfm2-vl lfm2_moe mimo minicpm "
    "minicpm3 mixtral nanochat nemotron-nas phi phi3small phimoe plamo qwen2 qwen2_moe qwen2_vl "
    "recurrent_gemma rwkv7 starcoder2"
).split()

# What no stock config tells, or no engine can see, and words of the reason that is given.
EXPECTED: dict[str, dict[str, str]] = {
    **{name: {"heads": "hidden_size would have to be"} for name in HEADS_FROM_WIDTH},
    # The same, under another name; and the MLP is four times the width, or computed from it.
    "afm7": {"heads": "hidden_dim would have to be"},
    "gpt2": dict.fromkeys(("channels", "heads"), "n_embd would have to be"),
    "gpt_neox": dict.fromkeys(("channels", "heads"), "hidden_size would have to be"),
    "gptj": dict.fromkeys(("channels", "heads"), "n_embd would have to be"),
    "lille-130m": {"channels": "no number in it", "heads": "n_embd would have to be"},
    "phixtral": dict.fromkeys(("channels", "heads"), "model_dim would have to be"),
    # Heads times their width must be the hidden size, or the fused projection makes it so.
    "cohere2": {"heads": "no number in it sets that alone"},
    "gpt_bigcode": {"heads": "no number in it sets that alone"},
    "phi3": {"heads": "no number in it sets that alone"},
    # The config tells these heads, but the code reshapes to the hidden size.
    "exaone": {"heads": "it computes something else"},
    # One output projection of the hidden size, or layers of another kind, share the number.
    "bailing_hybrid": {"heads": "no number in it sets that alone"},
    "bailing_moe_linear": {"heads": "head_dim would have to be"},
    "bailing_moe_v3": {"heads": "num_attention_heads would have to be"},
    "gear": {"heads": "num_attention_heads would have to be"},
    "qwen": {"heads": "num_attention_heads would have to be"},
    # Layers with two KV groups and layers with one share the number of query heads.
    "gemma4": {"heads": "text_config.head_dim would have to be"},
    # One group of two, and one expert of each group: the ranking of groups is of other sizes, and
    # a graph with a pruned ranking cannot be compared, so only the logits tell.
    "deepseek_v2": {"experts": "computes something else"},
    # Its experts are picked by a Python loop over `.tolist()`.
    "dbrx": dict.fromkeys(KINDS, "cannot be traced at mlx_lm/models/dbrx.py"),
    # Packed in a form of its own, which cannot be undone before pruning.
    "prism_hadamard_qwen35": dict.fromkeys(KINDS, "Hadamard packs require 2-bit"),
}


@pytest.fixture(autouse=True, scope="module")
def without_compiler():
    mx.disable_compile()  # on the CPU, each compiled function calls a C++ compiler
    yield
    mx.enable_compile()


@pytest.fixture(scope="module")
def page():
    return read_table(PAGE.read_text(encoding="utf8"))


@pytest.mark.parametrize("name", zoo.CONFIGS)
def test_a_pruned_architecture_opens_in_stock_mlx_lm_and_equals_the_zeroed_one(
    name, tmp_path, page
):
    row = check(name, tmp_path, prove=name in PROVEN)
    for kind in KINDS:
        said, expected = getattr(row, kind), EXPECTED.get(name, {}).get(kind)
        if expected:
            assert expected in said and not said.startswith(OK)
        else:
            assert said == NONE or said.startswith(OK)
    assert row.error is None or row.error <= TOLERANCE
    assert row.free or EXPECTED[name].keys() == set(KINDS)
    assert cells(row) == page[name], "docs/architectures.md is out of date: make architectures"


def test_the_table_lists_exactly_the_architectures_of_the_zoo(page):
    assert list(page) == list(zoo.CONFIGS)
    assert EXPECTED.keys() <= page.keys()


def test_the_channels_of_at_least_a_hundred_architectures_can_be_pruned(page):
    assert sum(channels.startswith(OK) for _, _, channels, *_ in page.values()) >= 100
    assert sum(row[2].startswith(OK) and row[3] in (OK, NONE) for row in page.values()) >= 60


def test_experts_can_be_removed_where_a_config_tells_their_number(page):
    for name in ("mixtral", "qwen3_moe", "olmoe", "deepseek", "gpt_oss", "qwen2_moe"):
        assert page[name][4] == OK
