"""What is kept on disk equals what was measured, whatever interrupts, damages or shares it."""

import json
import os
import signal
import subprocess
import sys
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from mlx_compress.bridges.mlx_lm import trace_logits

import tiny
from mlx_compress import second, stream
from mlx_compress.axes import named_axes
from mlx_compress.calibrate import calibrate
from mlx_compress.errors import ResourceError
from mlx_compress.second import OnDisk
from mlx_compress.store import LOCK, MANIFEST, Store, default_folder, store_key, tidy

MODELS = {"llama": tiny.LLAMA, "mixtral": tiny.MIXTRAL}


@pytest.fixture(autouse=True)
def small_groups(monkeypatch):
    """A group for each batch; sums of both dtypes."""
    mx.disable_compile()
    monkeypatch.setattr(stream, "KEPT", 0.0)
    monkeypatch.setattr(stream, "KEPT_BYTES", 1)
    monkeypatch.setattr(second, "FINE", 20)
    yield
    mx.enable_compile()


@cache
def case(name):
    model, batches = tiny.build(MODELS[name]), tiny.batches()
    named = named_axes(trace_logits(model, batches[0][0]))
    held = tiny.parameters(model)
    return named, batches, lambda paths: {path: held[path] for path in paths}


def loss(b, outputs):
    return (b + 1) * (outputs[0] ** 3).sum()


def measure(name="llama", store=None, *, gradients=True, full=True, kinds=("channels", "heads"),
            **options):  # fmt: skip
    named, batches, fetch = case(name)
    dims = [d.name for d in named.free(kinds)]
    options = {"fetch": fetch, **options}
    return calibrate(
        named, batches, dims=dims, loss=loss if gradients else None,
        second={} if full else None, store=store, **options,
    )  # fmt: skip


@cache
def plain(name="llama", **options):
    """What is measured without a store."""
    return measure(name, **options)


def no_fetch(paths):
    raise AssertionError(f"{paths}: read, although all is kept")


def require_same(got, want):
    """Bit for bit, with dtypes, in the same order."""
    assert list(got.moments) == list(want.moments) and list(got.second) == list(want.second)
    for key, held in want.moments.items():
        for field, array in vars(held).items():
            other = getattr(got.moments[key], field)
            assert (other is None) == (array is None), field
            if array is not None:
                assert np.asarray(other).dtype == np.asarray(array).dtype
                np.testing.assert_array_equal(other, array, err_msg=field)
    for key, array in want.second.items():
        assert got.second[key].dtype == array.dtype
        np.testing.assert_array_equal(got.second[key], array)


class Stop(Exception):
    pass


class Killer:
    """A progress that kills at its event `at`; `events` are those that came."""

    def __init__(self, at=None, kill=None):
        self.at, self.kill, self.events = at, kill or self._raise, []

    def __call__(self, stage, done, total):
        self.events.append((stage, done, total))
        if len(self.events) == self.at:
            self.kill()

    @staticmethod
    def _raise():
        raise Stop


# ---- the same, however it came about


@pytest.mark.parametrize("name", MODELS)
def test_a_store_shows_in_no_bit_and_a_warm_one_runs_nothing(tmp_path, monkeypatch, name):
    want = plain(name)
    if name == "llama":
        assert {array.dtype.name for array in want.second.values()} == {"float32", "float64"}
    store = Store(tmp_path, "key")
    require_same(measure(name, store), want)
    del store
    monkeypatch.setattr(stream, "KEPT_BYTES", 2**28)
    require_same(measure(name), want)  # in one group
    warm = Store(tmp_path, "key")
    require_same(measure(name, warm, fetch=no_fetch), want)
    assert not warm.notes and warm.complete
    require_same(measure(name, Store(tmp_path, "key"), full=False, fetch=no_fetch),
                 plain(name, full=False))  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_what_was_interrupted_is_resumed_to_the_same_bits(tmp_path, name):
    want, all_of_it = measure(name), Killer()
    measure(name, progress=all_of_it)
    count = len(all_of_it.events)
    each = count // 3
    for at in (1, each // 2, each, each + 1, 2 * each, 2 * each + 1, 3 * each - 2, 3 * each):
        store = Store(tmp_path, str(at))
        with pytest.raises(Stop):
            measure(name, store, progress=Killer(at))
        rest = Killer()
        require_same(measure(name, store, progress=rest), want)
        assert len(rest.events) == count - (at - 1) // each * each


def test_interrupted_again_and_again_it_still_gets_there(tmp_path):
    want = plain()
    events = Killer()
    measure(progress=events)
    for _ in range(2):  # each gets one group further
        with pytest.raises(Stop):
            measure(store=Store(tmp_path, "key"), progress=Killer(len(events.events) // 3 + 1))
    store = Store(tmp_path, "key")
    require_same(measure(store=store, progress=(rest := Killer())), want)
    assert len(rest.events) == len(events.events) // 3


def test_a_killed_process_leaves_what_a_new_one_goes_on_with(tmp_path):
    events = Killer()
    measure(progress=events)
    at = len(events.events) * 2 // 3 + 2
    code = f"""
import os, signal, mlx_compress
import mlx.core as mx
from mlx_compress import second, stream
import test_store as t
mx.disable_compile()
stream.KEPT, stream.KEPT_BYTES, second.FINE = 0.0, 1, 20
kill = lambda: os.kill(os.getpid(), signal.SIGKILL)
t.measure(store=t.Store({str(tmp_path)!r}, "key"), progress=t.Killer({at}, kill))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent)
    assert done.returncode == -signal.SIGKILL
    rest = Killer()
    store = Store(tmp_path, "key")
    require_same(measure(store=store, progress=rest), plain())
    assert not store.notes and len(rest.events) == len(events.events) // 3
    named = {file.name for held in store.kept.values() for file in held.files.values()}
    assert {file.name for file in store.folder.iterdir()} == named | {MANIFEST, LOCK}


# ---- kinds


@pytest.mark.parametrize("first", [(False, False), (False, True), (True, False)])
def test_a_kind_that_is_missing_is_collected_and_the_others_stay(tmp_path, first):
    gradients, full = first
    store = Store(tmp_path, "key")
    require_same(measure(store=store, gradients=gradients, full=full),
                 plain(gradients=gradients, full=full))  # fmt: skip
    require_same(measure(store=store), plain())
    del store
    for gradients, full in ((False, False), (False, True), (True, False), (True, True)):
        got = measure(store=Store(tmp_path, "key"), gradients=gradients, full=full, fetch=no_fetch)
        require_same(got, plain(gradients=gradients, full=full))


def test_a_kind_that_nobody_asks_for_is_not_lost(tmp_path):
    measure(store=Store(tmp_path, "key"), full=False)
    measure(store=Store(tmp_path, "key"), gradients=False)
    require_same(measure(store=Store(tmp_path, "key"), fetch=no_fetch), plain())


def test_kinds_that_got_differently_far_are_each_completed(tmp_path):
    events = Killer()
    measure(gradients=False, progress=events)
    with pytest.raises(Stop):
        measure(store=Store(tmp_path, "key"), gradients=False, full=False,
                progress=Killer(len(events.events) * 2 // 3 + 1))  # fmt: skip
    store = Store(tmp_path, "key")
    with pytest.raises(Stop):
        measure(store=store, gradients=False, progress=Killer(len(events.events) // 3 + 1))
    assert store.done == {"moments": 2, "second": 1}
    require_same(measure(store=store), plain())


# ---- damage


def truncate(file):
    file.write_bytes(file.read_bytes()[:-3])


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) * 2 // 3] ^= 1
    file.write_bytes(content)


def of_another_version(file):
    file.write_text(json.dumps({**json.loads(file.read_text()), "format": 99}))


def edited(file):
    file.write_text(file.read_text().replace('"taylor": 3', '"taylor": 2'))


DAMAGE = [
    ("*.npy", truncate), ("*.npy", flip), ("*.npy", Path.unlink), (MANIFEST, truncate),
    (MANIFEST, flip), (MANIFEST, of_another_version), (MANIFEST, edited),
    (MANIFEST, lambda file: file.write_text("[]")), (MANIFEST, lambda file: file.write_text("")),
]  # fmt: skip


@pytest.mark.parametrize("pattern, damage", DAMAGE)
def test_what_is_damaged_is_collected_anew_and_said(tmp_path, pattern, damage):
    measure(store=Store(tmp_path, "key"))
    damage(sorted(Path(tmp_path, "key").glob(pattern))[-1])
    store = Store(tmp_path, "key")
    require_same(measure(store=store), plain())
    assert store.notes == [f"{store.folder}: damaged, or of another version; collected anew."]
    del store
    require_same(measure(store=Store(tmp_path, "key"), fetch=no_fetch), plain())


def test_sums_of_another_model_are_not_taken(tmp_path):
    measure("mixtral", Store(tmp_path, "key"))
    store = Store(tmp_path, "key")
    require_same(measure("llama", store), plain("llama"))
    assert "collected anew" in store.notes[0]


def test_sums_at_fewer_places_are_not_enough(tmp_path):
    measure(store=Store(tmp_path, "key"), kinds=("channels",))
    require_same(measure(store=Store(tmp_path, "key")), plain())
    store = Store(tmp_path, "key")
    require_same(measure(store=store, kinds=("channels",)), plain(kinds=("channels",)))
    assert "collected anew" in store.notes[0]


def test_a_folder_that_cannot_be_made_is_done_without(tmp_path):
    (tmp_path / "file").write_text("")
    store = Store(tmp_path / "file", "key")
    require_same(measure(store=store), plain())
    assert "Not a directory; the statistics of this run are not kept" in store.notes[0]


def test_a_full_disk_is_said_with_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda place: SimpleNamespace(free=10))
    with pytest.raises(ResourceError, match="point MLX_COMPRESS_CACHE to a larger disk"):
        measure(store=Store(tmp_path, "key"))


def test_a_new_value_leaves_the_old_file_only_where_files_stay(tmp_path):
    for held, files in ((OnDisk(tmp_path), 2), (OnDisk(), 1)):
        held["a"] = np.zeros(3)
        held["a"] = np.ones(3, np.float32)
        assert held["a"].dtype == np.float32 and held["a"].sum() == 3
        assert len(list(held.folder.glob("*.npy"))) == files and "b" not in held


# ---- several processes


def test_while_one_collects_another_does_without(tmp_path):
    want, other = plain(), Store(tmp_path, "key")
    seen = []

    def progress(stage, done, total):
        if not seen:
            seen.append(measure(store=other))

    require_same(measure(store=Store(tmp_path, "key"), progress=progress), want)
    require_same(seen[0], want)
    assert "in use elsewhere; the statistics of this run are not kept" in other.notes[0]


def test_what_is_complete_is_read_by_many(tmp_path):
    first = Store(tmp_path, "key")
    measure(store=first)
    others = [Store(tmp_path, "key") for _ in range(2)]
    for other in others:
        require_same(measure(store=other, fetch=no_fetch), plain())
    assert not first.notes + others[0].notes + others[1].notes


# ---- room


def filled(folder, *names):
    """Keys of 1,000 bytes each, the first used longest ago."""
    for age, name in enumerate(reversed(names)):
        place = folder / name
        place.mkdir(parents=True)
        (place / LOCK).touch()
        (place / MANIFEST).write_bytes(b"x" * 1000)
        os.utime(place / MANIFEST, (1e9 - age, 1e9 - age))


def test_the_keys_used_least_recently_go_first(tmp_path):
    filled(tmp_path, "a", "b", "c", "d")
    (tmp_path / "not-ours").mkdir()
    assert tidy(tmp_path, limit_bytes=4000) == []
    assert tidy(tmp_path, limit_bytes=2500) == ["a", "b"]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["c", "d", "not-ours"]


def test_what_is_kept_or_in_use_stays(tmp_path):
    filled(tmp_path, "a", "b", "c")
    store = Store(tmp_path, "used")
    measure(store=store)
    os.utime(store.folder / MANIFEST, (1, 1))
    assert tidy(tmp_path, limit_bytes=0, keep="b") == ["a", "c"]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["b", "used"]
    del store
    assert tidy(tmp_path, limit_bytes=0) == ["used", "b"]


def test_statistics_keep_their_files_from_being_tidied_away(tmp_path):
    statistics = measure(store=Store(tmp_path, "key"))
    assert tidy(tmp_path, limit_bytes=0) == []
    require_same(statistics, plain())


def test_a_use_makes_a_key_recent(tmp_path):
    for age, key in enumerate("ba"):
        measure(store=Store(tmp_path, key))
        os.utime(tmp_path / key / MANIFEST, (1e9 - age, 1e9 - age))
    measure(store=Store(tmp_path, "a"))
    assert tidy(tmp_path, limit_bytes=(tmp_path / "a" / MANIFEST).stat().st_size) == ["b", "a"]


# ---- names


def test_a_key_tells_all_its_parts_apart():
    array = np.arange(6, dtype=np.int32)
    parts = [
        ("ab", "c"), ("a", "bc"), ("abc",), (b"abc",), ("abc", ""), (array,),
        (array.reshape(2, 3),), (array.astype(np.int64),), (array.tobytes(),), (array[::-1],),
        (array[::2],),
    ]  # fmt: skip
    assert len({store_key(*each) for each in parts}) == len(parts)
    assert store_key(array[::-1][::-1]) == store_key(array)


def test_the_folder_is_where_caches_are(monkeypatch):
    for name in ("MLX_COMPRESS_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/home/me")
    for platform, caches in (("linux", ".cache"), ("darwin", "Library/Caches")):
        monkeypatch.setattr(sys, "platform", platform)
        assert default_folder() == Path("/home/me", caches, "mlx-compress/statistics")
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    assert default_folder() == Path("/cache/mlx-compress/statistics")
    monkeypatch.setenv("MLX_COMPRESS_CACHE", "/mine")
    assert default_folder() == Path("/mine/statistics")
