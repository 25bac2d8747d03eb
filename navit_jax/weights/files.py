"""One file of weights as named tensors that are read later: safetensors and .npz; a pickle is refused.

A pickle is a program: loading one runs what its author wrote, so .pt, .pth, .bin and .ckpt are refused, with the lines
that turn them into safetensors where torch is. A file is known by its first bytes, not by its name. Both formats are
read here by their published layouts, so that importing needs no library, bfloat16 comes through, shapes are known
without reading values, and every broken file gets a message of its own.
"""

import json
import struct
import zipfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np

from input_pipeline.errors import UserError

DTYPES = {  # of safetensors; no vision model is made of what is not here
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
KNOWN = "expected safetensors (a file, or a folder of shards with its index) or a NumPy .npz"
PICKLES = (".pt", ".pth", ".bin", ".ckpt", ".pkl")
LONGEST_HEADER = 100_000_000  # bytes; the safetensors library refuses more, too


class Entry(NamedTuple):
    """A tensor that is not read yet. fetch() gives it in the file's own dtype; UserError where the file is broken."""

    shape: tuple[int, ...]
    fetch: Callable[[], np.ndarray]


def entries_of(path: Path) -> dict[str, Entry]:
    """The tensors of one file. Raises UserError if it is missing, broken, a pickle or of another format."""
    if not path.exists():
        raise UserError(f"There is no {path}; {KNOWN}, or a run of ours")
    try:
        with path.open("rb") as file:
            start = file.read(9)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    if start[8:9] == b"{":
        return _safetensors(path)
    if start[:2] == b"PK":
        return _npz(path)
    if start[:1] == b"\x80" or path.suffix in PICKLES:  # a pickle of protocol 2 or later starts so
        raise UserError(refusal(path))
    what = "an empty file" if not start else f"a file of an unknown format (it starts with {start[:8]!r})"
    cut = ", or a truncated one" if path.suffix in (".safetensors", ".npz") else ""
    raise UserError(f"{path} is {what}{cut}; {KNOWN}")


def refusal(path: Path) -> str:
    """Why a pickle is not read, and the lines that convert it."""
    new = path.with_suffix(".safetensors")
    return (
        f"{path} is a pickle: loading it would run whatever program its author put into it, so it is refused. Where "
        "torch is installed, these lines make a safetensors file of its tensors; give that instead:\n"
        f'  import torch, safetensors.torch; state = torch.load("{path}", map_location="cpu", weights_only=True)\n'
        f'  safetensors.torch.save_file({{k: v.clone().contiguous() for k, v in state.items()}}, "{new}")'
    )


def _safetensors(path: Path) -> dict[str, Entry]:
    """Eight bytes of header length, a JSON header {name: {dtype, shape, data_offsets}}, then the values."""
    size = path.stat().st_size
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        if length > min(size - 8, LONGEST_HEADER):
            raise UserError(f"{path} is truncated or no safetensors: its header should be {length} bytes of {size}")
        try:
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            parts = {name: (x["dtype"], tuple(x["shape"]), *x["data_offsets"]) for name, x in header.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path} has a broken safetensors header: {type(error).__name__}: {error}") from error
    begin = 8 + length
    expected = begin + max((end for *_, end in parts.values()), default=0)
    if size != expected:
        raise UserError(
            f"{path} is {'truncated' if size < expected else 'too long'}: {size} bytes, expected {expected}"
        )
    entries = {}
    for name, (dtype, shape, start, end) in parts.items():
        if dtype not in DTYPES:
            raise UserError(f"{path}: {name} has the dtype {dtype}; expected one of {', '.join(DTYPES)}")
        if not 0 <= start <= end or end - start != int(np.prod(shape)) * np.dtype(DTYPES[dtype]).itemsize:
            raise UserError(f"{path}: {name} {[*shape]} of {dtype} does not fit its {end - start} bytes")
        entries[name] = Entry(shape, partial(_mapped, path, DTYPES[dtype], begin + start, shape))
    return entries


def _mapped(path: Path, dtype: type, offset: int, shape: tuple[int, ...]) -> np.ndarray:
    if not np.prod(shape):
        return np.zeros(shape, dtype)  # an empty map is an error
    return (
        np.memmap(path, np.uint8, "r", offset, int(np.prod(shape)) * np.dtype(dtype).itemsize)
        .view(dtype)
        .reshape(shape)
    )


def write_safetensors(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """The arrays under these names; the file appears when it is whole. Raises OSError."""
    codes = {np.dtype(dtype): code for code, dtype in DTYPES.items()}
    header, end = {"__metadata__": {"format": "pt"}}, 0  # transformers refuses a file that does not say so
    for name, x in arrays.items():
        header[name] = {"dtype": codes[x.dtype], "shape": [*x.shape], "data_offsets": [end, end := end + x.nbytes]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # values begin at a multiple of 8 bytes
    unfinished = path.with_name(path.name + ".unfinished")
    try:
        with unfinished.open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            for x in arrays.values():
                file.write(np.ascontiguousarray(x).tobytes())
        unfinished.rename(path)
    finally:
        unfinished.unlink(missing_ok=True)


def _npz(path: Path) -> dict[str, Entry]:
    """A zip of .npy members, whose headers alone are read here."""
    entries = {}
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            if any(name.endswith(".pkl") for name in names):  # what torch.save writes is a zip with a pickle in it
                raise UserError(refusal(path))
            odd = [name for name in names if not name.endswith(".npy")]
            if odd:
                raise UserError(f"{path} is a zip of other files ({', '.join(odd[:3])}); {KNOWN}")
            for member in names:
                with archive.open(member) as file:
                    version = np.lib.format.read_magic(file)
                    header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
                    shape, _, dtype = header[version](file)
                name = member.removesuffix(".npy")
                if dtype.hasobject:
                    raise UserError(
                        f"{path}: {name} is an array of Python objects, a pickle, so it is refused; save "
                        "arrays of numbers, one a parameter"
                    )
                if dtype.kind not in "fiub" and dtype != "V2":  # bfloat16 comes back as two bytes without a meaning
                    raise UserError(f"{path}: {name} has the dtype {dtype}; expected numbers")
                entries[name] = Entry(shape, partial(_member, path, member))
    except UserError:
        raise
    except Exception as error:  # zip, its decompressors and NumPy's parser have each many kinds
        if path.suffix in PICKLES:
            raise UserError(refusal(path)) from error
        raise UserError(f"{path} is truncated or damaged: {error}") from error
    return entries


def _member(path: Path, member: str) -> np.ndarray:
    try:
        with zipfile.ZipFile(path) as archive, archive.open(member) as file:
            array = np.lib.format.read_array(file, allow_pickle=False)
    except Exception as error:  # as above
        raise UserError(f"{path} is damaged: {member}: {error}") from error
    return array.view(ml_dtypes.bfloat16) if array.dtype == "V2" else array
