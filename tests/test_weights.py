"""Files of weights as named arrays, and every file that is refused."""

import contextlib
import json
import pickle
import struct
import zipfile

import ml_dtypes
import numpy as np
import parity
import pytest
from parity import refused, same

from input_pipeline.errors import UserError
from navit_jax.weights import files, reader


def by_hand(path, header, data=b""):
    """A safetensors file from its published layout."""
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def test_safetensors_are_read_by_their_layout(tmp_path):
    values = np.arange(6, dtype=np.float32), np.array([1.5, -2], ml_dtypes.bfloat16), np.array([7], np.int64)
    header = {
        "__metadata__": {"format": "pt"},
        "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
        "b": {"dtype": "BF16", "shape": [2], "data_offsets": [24, 28]},
        "c": {"dtype": "I64", "shape": [], "data_offsets": [28, 36]},
        "none": {"dtype": "F32", "shape": [0, 4], "data_offsets": [36, 36]},
    }
    path = by_hand(tmp_path / "x.safetensors", header, b"".join(x.tobytes() for x in values))
    tensors = reader.open_tensors(path)
    assert tensors.names == {"a": (2, 3), "b": (2,), "c": (), "none": (0, 4)}
    np.testing.assert_array_equal(tensors.take("a", (2, 3)), values[0].reshape(2, 3))
    np.testing.assert_array_equal(tensors.take("b"), [1.5, -2])
    assert (tensors.take("c"), tensors.take("none").shape, tensors.take("b").dtype) == (7, (0, 4), np.float32)
    tensors.finish()


def test_what_is_written_is_read_back_bit_by_bit(tmp_path):
    arrays = {"a/b": np.float32([[1, 2], [3, np.pi]]), "": np.float32(5), "half": np.ones(3, ml_dtypes.bfloat16)}
    files.write_safetensors(tmp_path / "x.safetensors", arrays)
    tensors = reader.open_tensors(tmp_path)
    assert same({name: tensors.take(name) for name in arrays}, {n: x.astype(np.float32) for n, x in arrays.items()})
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]


@pytest.mark.slow
def test_the_library_of_safetensors_reads_and_writes_the_same_files(tmp_path):
    library, torch = parity.library("safetensors.torch"), parity.library("torch")
    arrays = {"a": np.float32([[1, 2], [3, np.pi]]), "s": np.float32(5), "half": np.ones(3, ml_dtypes.bfloat16)}
    files.write_safetensors(tmp_path / "x.safetensors", arrays)
    theirs = library.load_file(tmp_path / "x.safetensors")
    assert same({n: x.float().numpy() for n, x in theirs.items()}, {n: x.astype(np.float32) for n, x in arrays.items()})
    values = {str(d): torch.arange(-2, 3).to(d) for d in (torch.float16, torch.bfloat16, torch.int8, torch.float64)}
    library.save_file(values, tmp_path / "y.safetensors")
    tensors = reader.open_tensors(tmp_path / "y.safetensors")
    assert all(np.array_equal(tensors.take(name), x.float().numpy()) for name, x in values.items())


def test_npz_are_read_without_pickle_and_two_bytes_are_bfloat16(tmp_path):
    half = np.float32([[1.5, -2]]).astype(ml_dtypes.bfloat16)
    np.savez(tmp_path / "x.npz", **{"params/a": half, "t": np.float64(3), "f": np.asfortranarray(np.eye(3)[:2])})
    with np.load(tmp_path / "x.npz") as file:
        assert file["params/a"].dtype == "V2"  # numpy alone does not know what they are
    tensors = reader.open_tensors(tmp_path / "x.npz")
    assert tensors.names == {"params/a": (1, 2), "t": (), "f": (2, 3)}
    np.testing.assert_array_equal(tensors.take("params/a"), [[1.5, -2]])
    np.testing.assert_array_equal(tensors.take("f"), np.eye(3)[:2])


def test_shards_are_one_model_and_are_read_one_tensor_at_a_time(tmp_path):
    for number, name in enumerate("ab"):
        files.write_safetensors(tmp_path / f"model-{number}.safetensors", {name: np.full(2, number, np.float32)})
    index = {"weight_map": {"a": "model-0.safetensors", "b": "model-1.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "config.json").write_text('{"model_type": "x"}')
    tensors = reader.open_tensors(tmp_path)
    assert (tensors.names, tensors.config) == ({"a": (2,), "b": (2,)}, {"model_type": "x"})
    assert tensors.take("b").tolist() == [1, 1]
    (tmp_path / "model-1.safetensors").unlink()
    refused(tmp_path, "lacks the shard model-1.safetensors", "1 tensors")
    files.write_safetensors(tmp_path / "model-1.safetensors", {"c": np.zeros(1, np.float32)})
    refused(tmp_path / "model.safetensors.index.json", "b (in model-1.safetensors)")
    index["weight_map"]["b"] = "../elsewhere.safetensors"
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(tmp_path, "lacks the shard ../elsewhere")


def test_broken_files_are_refused_with_what_is_wrong(tmp_path):
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    path = by_hand(tmp_path / "x.safetensors", {"a": entry}, bytes(8))
    whole = path.read_bytes()
    for size, said in ((0, "an empty file"), (5, "truncated"), (20, "truncated"), (len(whole) - 1, "truncated")):
        path.write_bytes(whole[:size])
        refused(path, said)
    path.write_bytes(whole + b"x")
    refused(path, "too long")
    refused(by_hand(path, {"a": entry | {"shape": [3]}}, bytes(8)), "a [3] of F32 does not fit its 8 bytes")
    refused(by_hand(path, {"a": entry | {"dtype": "C64"}}, bytes(8)), "dtype C64")
    refused(by_hand(path, {"a": 3}), "broken safetensors header")
    refused(by_hand(path, {}), "no tensors")
    np.savez(tmp_path / "y.npz", a=np.arange(1000.0))
    whole = (tmp_path / "y.npz").read_bytes()
    (tmp_path / "y.npz").write_bytes(whole[:-20])
    refused(tmp_path / "y.npz", "truncated or damaged")
    (tmp_path / "y.npz").write_bytes(whole[:600] + b"\x55" * 8 + whole[608:])
    with pytest.raises(UserError, match="damaged: a.npy"):
        reader.open_tensors(tmp_path / "y.npz").take("a")
    np.savez(tmp_path / "z.npz", a=np.zeros(2), b=np.array([{}], object))
    refused(tmp_path / "z.npz", "b is an array of Python objects", "pickle")
    np.savez(tmp_path / "z.npz", a=np.array(["text"]))
    refused(tmp_path / "z.npz", "a has the dtype <U4")
    (tmp_path / "w.h5").write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(90))
    refused(tmp_path / "w.h5", "unknown format", "expected safetensors")


def test_no_part_of_a_file_is_a_file_and_damage_is_seen_or_harmless(tmp_path):
    arrays = {"abc": np.arange(6, dtype=np.float32), "de": np.ones((2, 300), np.float32)}
    files.write_safetensors(tmp_path / "x.safetensors", arrays)
    np.savez(tmp_path / "x.npz", **arrays)
    np.savez_compressed(tmp_path / "y.npz", **arrays)
    rng = np.random.default_rng(0)
    for name in ("x.safetensors", "x.npz", "y.npz"):
        path, whole = tmp_path / name, (tmp_path / name).read_bytes()
        for size in rng.choice(len(whole), 100):
            path.write_bytes(whole[:size])
            with pytest.raises(UserError):
                reader.open_tensors(path)
        for _ in range(200):
            damaged = bytearray(whole)
            damaged[rng.integers(min(len(whole), 200) if name == "x.safetensors" else len(whole))] = rng.integers(256)
            path.write_bytes(damaged)
            with contextlib.suppress(UserError):  # any other error is a traceback in a user's face
                tensors = reader.open_tensors(path)
                for tensor in tensors.names:
                    tensors.take(tensor)


def test_pickles_are_refused_with_the_lines_that_convert_them(tmp_path):
    for name in ("a.pt", "b.pth", "pytorch_model.bin", "d.ckpt", "no_ending"):
        path = tmp_path / name
        path.write_bytes(pickle.dumps({"a": 1}, protocol=2))
        refused(path, "pickle", "whatever program", "weights_only=True", str(path.with_suffix(".safetensors")))
    path.unlink()
    refused(tmp_path, "a.pt is a pickle")
    with zipfile.ZipFile(tmp_path / "new.pt", "w") as archive:
        archive.writestr("new/data.pkl", b"")
    refused(tmp_path / "new.pt", "is a pickle")


@pytest.mark.slow
def test_the_two_lines_convert_a_file_of_torch(tmp_path):
    torch = parity.library("torch")
    parity.library("safetensors.torch")
    shared = torch.arange(12.0).reshape(3, 4)
    torch.save({"a": shared.T, "b": shared}, tmp_path / "x.pt")
    lines = [line.strip() for line in refused(tmp_path / "x.pt").splitlines() if line.startswith("  ")]
    assert len(lines) == 2
    exec("\n".join(lines), {})
    tensors = reader.open_tensors(tmp_path / "x.safetensors")
    np.testing.assert_array_equal(tensors.take("a"), shared.T.numpy())


def test_paths_without_weights_are_refused(tmp_path):
    refused(tmp_path / "nothing", "There is no", "expected weights")
    (tmp_path / "notes.txt").write_text("")
    refused(tmp_path, "a folder without weights (it holds notes.txt)")
    for name in "ab":
        files.write_safetensors(tmp_path / f"{name}.safetensors", {name: np.zeros(1, np.float32)})
    refused(tmp_path, "a.safetensors, b.safetensors; name one")
    refused(tmp_path / "a.safetensors", "no known format", "start with a", "big_vision", "navit_jax")
    (tmp_path / "config.json").write_text("{")
    refused(tmp_path / "a.safetensors", "config.json is no JSON")
    (tmp_path / "config.json").write_text("[]")
    refused(tmp_path / "a.safetensors", "expected a JSON object")
