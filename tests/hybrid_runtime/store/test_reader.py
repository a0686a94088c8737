"""A store read back: every weight where it was written, and a part that is damaged or missing refused by name."""

import numpy as np
import pytest
import torch

from hybrid_kernels.packed_matrix import Bundles, PackedMatrix
from hybrid_runtime.errors import IncompleteStore, StoreError
from hybrid_runtime.store.manifest import MANIFEST
from hybrid_runtime.store.reader import open_store

from .small_store import CONFIGS, DATA, FORMATS, damage, write_store


@pytest.mark.parametrize("row_format", FORMATS, ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_every_weight_is_read_as_it_was_written(tmp_path, name, row_format):
    manifest, written = write_store(tmp_path / "store", name, row_format)
    store = open_store(tmp_path / "store")
    assert store.manifest == manifest
    read = {}
    for part in store.manifest.parts:
        formats = {entry.name: entry.row_format for entry in part.entries}
        for weight_name, weight in store.read_part(part):
            read[weight_name] = weight
            if isinstance(weight, torch.Tensor):
                assert weight.dtype == torch.float32
                assert torch.equal(weight.view(torch.uint8), written[weight_name])
                continue
            assert weight.row_format == formats[weight_name]
            found = weight.data if isinstance(weight, Bundles) else weight.rows
            assert torch.equal(found, written[weight_name])
            assert found.data_ptr() % 64 == 0  # a row starts on a cache line
    assert read.keys() == written.keys()
    kinds = {"bundles": Bundles, "rows": PackedMatrix, "vector": torch.Tensor}
    for part in store.manifest.parts:
        assert all(isinstance(read[entry.name], kinds[entry.kind]) for entry in part.entries)


def test_a_sound_store_verifies_and_knows_its_size(tmp_path):
    write_store(tmp_path)
    store = open_store(tmp_path)
    store.verify()
    assert store.num_bytes == sum(path.stat().st_size for path in (tmp_path / DATA).iterdir())
    assert store.data_folder == tmp_path / DATA
    assert store.tokenizer_folder == tmp_path / DATA / "tokenizer"


@pytest.mark.parametrize("file", ["embed.bin", "layer-00001.bin", "head.bin"])
def test_a_missing_part_is_refused_by_name(tmp_path, file):
    write_store(tmp_path)
    (tmp_path / DATA / file).unlink()
    with pytest.raises(StoreError, match=rf"{DATA}/{file}: is missing; convert the model again"):
        open_store(tmp_path)


def test_a_part_that_is_a_folder_is_missing(tmp_path):
    write_store(tmp_path)
    (tmp_path / DATA / "head.bin").unlink()
    (tmp_path / DATA / "head.bin").mkdir()
    with pytest.raises(StoreError, match=r"head\.bin: is missing"):
        open_store(tmp_path)


@pytest.mark.parametrize("change", [-1, 1, -4096, 4096])
def test_a_part_of_another_size_is_refused_with_both_numbers(tmp_path, change):
    write_store(tmp_path)
    path = tmp_path / DATA / "layer-00000.bin"
    size = path.stat().st_size
    path.write_bytes((path.read_bytes() + bytes(max(0, change)))[: size + change])
    with pytest.raises(StoreError, match=rf"layer-00000\.bin: has {size + change} bytes, expected {size}; convert"):
        open_store(tmp_path)


def test_a_part_that_shrinks_after_opening_is_refused(tmp_path):
    write_store(tmp_path)
    store = open_store(tmp_path)
    part = store.manifest.parts[1]
    path = store.data_folder / part.file
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(
        StoreError, match=rf"{part.file}: ends at byte {part.num_bytes - 100}, expected {part.num_bytes}"
    ):
        dict(store.read_part(part))


@pytest.mark.parametrize("file", ["embed.bin", "layer-00001.bin", "head.bin"])
def test_one_flipped_bit_fails_verification_by_name(tmp_path, file):
    write_store(tmp_path)
    path = tmp_path / DATA / file
    data = np.fromfile(path, np.uint8)
    data[len(data) // 2] ^= 1
    data.tofile(path)
    store = open_store(tmp_path)  # sizes are right; reading everything is for those who ask
    with pytest.raises(StoreError, match=rf"{file}: its sha256 is not the manifest's; the file is damaged"):
        store.verify()


def test_a_digest_of_another_file_fails_verification(tmp_path):
    manifest, _ = write_store(tmp_path)
    damage(tmp_path, sha256=manifest.sha256 | {"head.bin": manifest.sha256["embed.bin"]})
    with pytest.raises(StoreError, match=r"head\.bin: its sha256 is not the manifest's"):
        open_store(tmp_path).verify()


def test_a_part_without_a_digest_is_refused(tmp_path):
    manifest, _ = write_store(tmp_path)
    damage(tmp_path, sha256={file: digest for file, digest in manifest.sha256.items() if file != "head.bin"})
    with pytest.raises(StoreError, match=r"sha256 names \d+ parts"):
        open_store(tmp_path)


@pytest.mark.parametrize("name", ["no folder", "an empty folder", "a file"])
def test_what_is_no_store_is_called_so(tmp_path, name):
    path = tmp_path / "x"
    if name == "an empty folder":
        path.mkdir()
    elif name == "a file":
        path.write_text("x")
    with pytest.raises(StoreError, match=rf"x: has no {MANIFEST}; it is not a store"):
        open_store(path)


def test_a_journal_without_a_manifest_is_an_unfinished_conversion(tmp_path):
    write_store(tmp_path)
    (tmp_path / MANIFEST).unlink()
    (tmp_path / DATA / "journal.jsonl").touch()
    with pytest.raises(IncompleteStore, match=r"its conversion has not finished; run the same hybrid-convert command"):
        open_store(tmp_path)


def test_the_weights_of_a_part_are_views_of_one_block(tmp_path):
    """Views share one block: a part of n bytes takes n bytes, not n for each of its weights."""
    write_store(tmp_path)
    store = open_store(tmp_path)
    weights = dict(store.read_part(store.manifest.parts[1]))
    storages = {
        (weight if isinstance(weight, torch.Tensor) else weight.data if isinstance(weight, Bundles) else weight.rows)
        .untyped_storage()
        .data_ptr()
        for weight in weights.values()
    }
    assert len(storages) == 1
