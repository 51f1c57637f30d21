"""The page of exported architectures says what the exports do."""

import mlx.core as mx
import pytest

import zoo
from zoo_exports import OK
from zoo_page import CHECKS, PAGE, read_page, row


@pytest.fixture(scope="module")
def page():
    return read_page(PAGE.read_text(encoding="utf8"))


def test_the_page_lists_exactly_the_architectures_of_the_zoo(page):
    assert list(page) == list(zoo.CONFIGS)


def test_at_least_sixty_export_to_onnx_and_forty_to_core_ml(page):
    for k, least in enumerate((60, 40)):
        assert sum(cells[k].startswith(OK) for cells in page.values()) >= least


def test_what_does_not_export_has_a_reason(page):
    said = {cell for cells in page.values() for cell in cells if not cell.startswith(OK)}
    assert said and all(len(reason) > 10 and "site-packages" not in reason for reason in said)


@pytest.mark.parametrize("name", ["qwen2_moe", "mamba"])
def test_a_row_is_what_comes_out_here(name, page):
    mx.disable_compile()
    found = row(name)
    mx.enable_compile()
    assert [found[target] for target in CHECKS] == page[name]
