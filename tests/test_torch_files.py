"""What can go wrong when a torch program comes in: files, operators, sizes, training mode."""

import io
import json
import zipfile

import mlx.core as mx
import numpy as np
import pytest
import torch
from mlx_compress.bridges.torch import from_hf, from_torch
from torch import nn

import operators
from mlx_compress.errors import InputError


def assert_same(imported, module, x):
    (got,) = imported(imported.parameters, mx.array(x.numpy()))
    with torch.no_grad():
        np.testing.assert_allclose(np.array(got), module(x).numpy(), atol=1e-5)


# ---- files


def exported(module=None, **options):
    module = module or nn.Sequential(nn.Linear(3, 4), nn.ReLU()).eval()
    return module, torch.export.export(module, (torch.zeros(2, 3),), **options)


def test_a_pt2_file_comes_in(tmp_path):
    module, program = exported(dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    torch.export.save(program, tmp_path / "net.pt2")
    x = torch.randn(5, 3)
    for source in (program, tmp_path / "net.pt2", str(tmp_path / "net.pt2")):
        imported = from_torch(source)
        assert imported.parameters.keys() == {"0.weight", "0.bias"}
        assert_same(imported, module, x)


@pytest.fixture
def archive(tmp_path):
    torch.export.save(exported()[1], tmp_path / "net.pt2")
    return tmp_path / "net.pt2"


def rewritten(archive, change):
    """The archive with its entries {name: bytes} changed."""
    with zipfile.ZipFile(archive) as opened:
        entries = {name: opened.read(name) for name in opened.namelist()}
    change(entries)
    with zipfile.ZipFile(archive, "w") as opened:
        for name, content in entries.items():
            opened.writestr(name, content)
    return archive


class Payload:
    def __reduce__(self):
        raise_flag = "open('/nonexistent/executed', 'w')"
        return eval, (raise_flag,)


def pickled():
    buffer = io.BytesIO()
    torch.save(Payload(), buffer)
    return buffer.getvalue()


def with_pickled_weights(entries):
    name = "net/data/weights/model_weights_config.json"
    config = json.loads(entries[name])
    for entry in config["config"].values():
        entry["use_pickle"] = True
    entries[name] = json.dumps(config).encode()


HOSTILE = {
    "sample_inputs/model.pt": lambda e: e.update({"net/data/sample_inputs/model.pt": pickled()}),
    "model_weights_config.json": with_pickled_weights,
    "custom_obj_0": lambda e: e.update({"net/data/constants/custom_obj_0": pickled()}),
    "aotinductor": lambda e: e.update({"net/data/aotinductor/model/a.so": b"\x7fELF"}),
    "weights/model.pt": lambda e: e.update({"net/data/weights/model.pt": pickled()}),
}


@pytest.mark.parametrize("entry", HOSTILE)
def test_a_file_that_could_run_code_is_refused(archive, entry):
    rewritten(archive, HOSTILE[entry])
    with pytest.raises(InputError, match=f"{entry}.* could run code when it is loaded"):
        from_torch(archive)


def test_damaged_and_foreign_files_are_said_to_be_so(archive, tmp_path):
    content = archive.read_bytes()
    cases = {
        "absent": (None, "no such file"),
        "text": (b"hello", "not a .pt2 of torch.export, or damaged"),
        "cut": (content[: len(content) // 2], "not a .pt2 of torch.export, or damaged"),
        "flipped": (content.replace(b"torch.ops.aten.linear", b"torch.ops.aten.linexx"),
                    "is damaged; export it anew"),
    }  # fmt: skip
    for name, (held, text) in cases.items():
        file = tmp_path / f"{name}.pt2"
        if held is not None:
            file.write_bytes(held)
        with pytest.raises(InputError, match=text):
            from_torch(file)
    buffer = tmp_path / "weights.pt2"
    torch.save({"a": torch.zeros(2)}, buffer)
    with pytest.raises(InputError, match="holds no exported program"):
        from_torch(buffer)


def test_folders_that_transformers_cannot_open_are_said_to_be_so(tmp_path):
    with pytest.raises(InputError, match="no such folder"):
        from_hf(tmp_path / "absent")
    with pytest.raises(InputError, match="transformers cannot read it"):
        from_hf(tmp_path)


# ---- what cannot come in


def refused(function, *examples, dynamic=None):
    examples = examples or (torch.ones(2, 4),)
    options = {} if dynamic is None else {"dynamic": dynamic}
    with pytest.raises(InputError) as raised:
        from_torch(operators.Function(function), examples, **options)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_operators_without_a_rule_are_named_all_at_once():
    text = refused(lambda x: torch.linalg.qr(x[0, None])[1] + torch.special.bessel_j0(x) + x.cos())
    assert "no rule for aten.linalg_qr.default" in text and "aten.special_bessel_j0" in text


def test_places_of_a_maximum_pool_are_not_computed():
    text = refused(
        lambda x: nn.functional.max_pool2d(x, 2, return_indices=True)[1], torch.ones(2, 3, 4, 4)
    )
    assert "aten.max_pool2d_with_indices.default (its output 1)" in text


@pytest.mark.parametrize(
    "function", [lambda x: x.nonzero(), lambda x: x * x.sum().item(), lambda x: x[x > 0],
                 lambda x: x + 1 if x.sum() > 0 else x]
)  # fmt: skip
def test_what_depends_on_the_data_names_the_remedy(function):
    assert "torch.where" in refused(function)


def test_a_size_that_the_code_fixes_cannot_be_open():
    text = refused(lambda x: x.reshape(2, 2, 2), dynamic={0: "batch"})
    assert "leave that axis out of `dynamic`" in text


def test_inputs_of_other_sizes_are_refused():
    imported = from_torch(nn.Linear(3, 2), [torch.zeros(2, 3)], dynamic={})
    with pytest.raises(InputError, match=r"input: shape \(5, 3\).*exported for \(2, 3\)"):
        imported(imported.parameters, mx.zeros((5, 3)))
    with pytest.raises(InputError, match="2 inputs given, the program takes 1"):
        imported(imported.parameters, mx.zeros((2, 3)), mx.zeros((2, 3)))


def test_training_mode_is_put_back_and_not_exported():
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout())
    module[2].eval()
    imported = from_torch(module, [torch.zeros(2, 3)])
    assert module.training and module[1].training and not module[2].training
    x = torch.randn(5, 3)
    assert_same(imported, module.eval(), x)
    program = torch.export.export(module.train(), (torch.zeros(2, 3),))
    with pytest.raises(InputError, match=r"eval"):
        from_torch(program)
