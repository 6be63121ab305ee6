"""Weight files in every format, with and without a record beside them, damaged in many ways."""

from __future__ import annotations

import functools
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from random import Random

import torch

from hf_lopt import rules, weights

from .outcomes import DAMAGED, SAME, UNRECORDED, Result, refusal


# Rule and the form in which its embedded weights are written; "published" where there is a folder format.
SETS = [
    *(
        (rule, form)
        for rule in ("velo", "celo2", "small_fc_lopt", "rnn_mlp")
        for form in ("theta_state", "safetensors")
    ),
    *((rule, "published") for rule in ("velo", "celo2", "small_fc_lopt")),
]
RECORD = "hf_lopt.json"
_LOW, _HIGH = b"\x00", b"\xff"


@functools.cache
def originals() -> Path:
    """A folder with all sets as they were saved."""
    folder = Path(tempfile.mkdtemp(prefix="fuzz-originals-"))
    for rule, form in SETS:
        theta = dict(weights.load(rule, "bundled").theta)
        if rule == "small_fc_lopt":  # the offsets that the published form has no room for
            theta["momentum_decays"] = torch.tensor([0.1, -0.2, 0.3])
        weights.save(theta, folder / f"{rule}-{form}", format=form, rule=rule)
    return folder


@functools.cache
def digests() -> dict[tuple[str, str], str]:
    """The content of each set as it loads."""
    return {(rule, form): _load(rule, originals() / f"{rule}-{form}") for rule, form in SETS}


def _load(rule: str, folder: Path) -> str:
    return weights.load(rule, folder, rules.get(rule).shapes).sha256


def weight_files_in(folder: Path) -> list[Path]:
    """The weight files of a saved set."""
    return sorted(file for file in folder.rglob("*") if file.suffix in (".state", ".safetensors"))


def run(random: Random, folder: Path) -> Result:
    """Damage one set and load it."""
    rule, form = random.choice(SETS)
    target = folder / "set"
    shutil.copytree(originals() / f"{rule}-{form}", target)
    file = random.choice(weight_files_in(target))
    recorded = random.random() < 0.4
    kinds = MUTATIONS | (SAFETENSORS_MUTATIONS if file.suffix == ".safetensors" else MSGPACK_MUTATIONS)
    kinds |= RECORD_MUTATIONS if recorded else {}
    kind = random.choice(sorted(kinds))
    if not recorded:
        (target / RECORD).unlink()
    kinds[kind](random, file if kind not in RECORD_MUTATIONS else target / RECORD)
    what = f"{kind}, {'recorded' if recorded else 'bare'}"
    try:
        found = _load(rule, target)
    except Exception as error:  # judged by its kind and its text
        return refusal(error, what, folder)
    if found == digests()[rule, form]:
        return Result(SAME, what)
    if recorded:
        return Result(DAMAGED, what, f"{rule} {form}")
    # Without its record the published form of small_fc has lost its offsets, and is what it says.
    return Result(UNRECORDED, what)


# --- damage: each function changes the file in place


def _bytes(change: Callable[[Random, bytearray], bytes | bytearray]) -> Callable[[Random, Path], None]:
    def mutate(random: Random, file: Path) -> None:
        file.write_bytes(change(random, bytearray(file.read_bytes())))

    return mutate


def _flip_bits(random: Random, data: bytearray) -> bytearray:
    # Among the first bytes is what the rest is read by.
    end = len(data) if random.random() < 0.6 else min(len(data), 400)
    for _ in range(random.choice((1, 1, 1, 2, 8))):
        data[random.randrange(end)] ^= 1 << random.randrange(8)
    return data


def _overwrite(random: Random, data: bytearray) -> bytearray:
    start = random.randrange(len(data))
    length = random.choice((1, 4, 16, 4096))
    data[start : start + length] = random.choice((_LOW, _HIGH, b"[", b"\x91")) * len(data[start : start + length])
    return data


def _truncate(random: Random, data: bytearray) -> bytearray:
    return data[: random.choice((0, 1, 8, len(data) - 1, random.randrange(len(data))))]


def _extend(random: Random, data: bytearray) -> bytes:
    return bytes(data) + random.choice((b"\0", b" ", bytes(data), random.randbytes(100)))


def _insert_or_cut(random: Random, data: bytearray) -> bytearray:
    start = random.randrange(len(data))
    length = random.choice((1, 4, 64))
    if random.random() < 0.5:
        del data[start : start + length]
    else:
        data[start:start] = random.randbytes(length)
    return data


def _noise(random: Random, data: bytearray) -> bytes:
    return random.randbytes(random.choice((0, 1, 100, 10_000)))


def _swap_blocks(random: Random, data: bytearray) -> bytearray:
    """Two stretches of numbers change places, as two tensors would."""
    half = len(data) // 2
    length = random.randrange(1, max(2, half // 4))
    a, b = random.randrange(half - length), half + random.randrange(len(data) - half - length)
    data[a : a + length], data[b : b + length] = data[b : b + length], data[a : a + length]
    return data


def _folder(random: Random, file: Path) -> None:
    file.unlink()
    file.mkdir()
    if random.random() < 0.5:
        (file / file.name).write_bytes(b"")


def _link(random: Random, file: Path) -> None:
    places = [file.with_name("nowhere"), file, file.parent, Path(os.devnull), Path("/dev/zero")]
    file.unlink()
    file.symlink_to(random.choice(places))


def _pipe(random: Random, file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


def _of_another(random: Random, file: Path) -> None:
    rule, form = random.choice(SETS)
    shutil.copy(random.choice(weight_files_in(originals() / f"{rule}-{form}")), file)


MUTATIONS: dict[str, Callable[[Random, Path], None]] = {
    "none": lambda random, file: None,
    "flipped bits": _bytes(_flip_bits),
    "overwritten": _bytes(_overwrite),
    "truncated": _bytes(_truncate),
    "extended": _bytes(_extend),
    "inserted or cut": _bytes(_insert_or_cut),
    "noise": _bytes(_noise),
    "swapped": _bytes(_swap_blocks),
    "a folder": _folder,
    "a link": _link,
    "a pipe": _pipe,
    "of another set": _of_another,
}


# --- safetensors


def _header(random: Random, data: bytearray) -> bytes:
    """An entry of the header says something else."""
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    names = [name for name in header if name != "__metadata__"]
    entry = header[name := random.choice(names)]
    other = header[random.choice(names)]
    end = len(data) - 8 - size
    odd = [None, -1, 1 << 62, 1 << 64, 0.5, "2", [], {}, [1 << 40] * 8, [0, 1 << 62], [0, end], [end, 0], [[]]]
    edits: list[Callable[[], object]] = [
        lambda: entry.update(
            dtype=random.choice(["F64", "F16", "BF16", "I32", "C64", "F8_E4M3", "BOOL", "X", 3, None])
        ),
        lambda: entry.update(shape=random.choice(odd)),
        lambda: entry.update(data_offsets=random.choice(odd)),
        lambda: entry["shape"].append(random.choice([0, 1, 2, -1])),
        lambda: entry["shape"].reverse(),
        lambda: entry.update(data_offsets=other["data_offsets"]),
        lambda: header.update({name: other}),
        lambda: header.pop(name),
        lambda: header.update({random.choice(["", "a/b", "\ud800", "x" * 5000]): header.pop(name)}),
        lambda: header.update({name: random.choice(odd)}),
        lambda: header.update(__metadata__=random.choice(odd)),
        lambda: entry.update(more=1),
    ]
    random.choice(edits)()
    text = json.dumps(header).encode()
    if random.random() < 0.2:  # a name that is there twice
        text = text[:-1] + b', "' + name.encode() + b'": ' + json.dumps(other).encode() + b"}"
    return len(text).to_bytes(8, "little") + text + data[8 + size :]


def _header_size(random: Random, data: bytearray) -> bytes:
    sizes = [0, 1, 1 << 20, 1 << 31, 100_000_000, (1 << 63) - 1, (1 << 64) - 1, len(data) - 8, len(data)]
    return random.choice(sizes).to_bytes(8, "little") + data[8:]


def _header_text(random: Random, data: bytearray) -> bytes:
    many = ",".join(f'"{k}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}' for k in range(10_000))
    texts = [b"[" * 500_000, b'{"a":' * 200_000, b"{}", b"[]", b"1", b"{" + many.encode() + b"}", b'{"a":NaN}']
    texts += [b"\xff\xfe", b"", b" " * 100, b'{"__metadata__":{"a":1}}', b'{"a":' + b"9" * 10_000 + b"}"]
    text = random.choice(texts)
    return len(text).to_bytes(8, "little") + text


SAFETENSORS_MUTATIONS: dict[str, Callable[[Random, Path], None]] = {
    "header entry": _bytes(_header),
    "header size": _bytes(_header_size),
    "header text": _bytes(_header_text),
}


# --- msgpack


def _nested(random: Random, data: bytearray) -> bytes:
    depth = random.choice((1, 15, 16, 17, 100, 1100, 200_000))
    return random.choice((b"\x81\xa1a", b"\x91", b"\x81\x91")) * depth + random.choice(
        (b"\x80", b"\x90", b"\xc0", b"")
    )


def _many(random: Random, data: bytearray) -> bytes:
    """Millions of small objects, in a few bytes each."""
    count = random.choice((100, 5_000, 1_000_000))
    head = random.choice((b"\xdd", b"\xdf", b"\x81\xa1a\xdd", b"\x81\xa1a\xdf"))
    items = random.choice((b"\x90", b"\x80", b"\xc0", b"\xa1a\x80", b"\x01\x01", b"\xc7\x00\x01"))
    content = head + count.to_bytes(4, "big") + items * count
    if random.random() < 0.3:  # within an array
        return b"\x81\xa1a\xc9" + len(content).to_bytes(4, "big") + b"\x01" + content
    return content


def _huge(random: Random, data: bytearray) -> bytes:
    """A length that the file does not have, or that no memory has."""
    heads = (b"\xdf", b"\xdd", b"\xdb", b"\xc6", b"\x81\xdb", b"\x81\xa1a\xc6", b"\x81\xa1a\xc9", b"\x81\xa1a\xdd")
    return random.choice(heads) + random.choice((b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\x00\x10\x00\x00")) + data


def _array(random: Random, data: bytearray) -> bytes:
    """One array whose shape, dtype or bytes are odd."""
    shapes = (b"\x90", b"\x91\x01", b"\x92\x00\xce\x40\x00\x00\x00", b"\x91\xff", b"\x91\xcf" + _HIGH * 8, b"\x91\x90")
    shapes += (b"\xdc\x03\xe8" + b"\x01" * 1000, b"\x01", b"\xc0", b"\x98" + b"\xce\x40\x00\x00\x00" * 8)
    dtypes = (b"\xa7float32", b"\xa7float64", b"\xa8bfloat16", b"\xa5int32", b"\xa6object", b"\xc0", b"\xa1\xff")
    contents = (b"\xc4\x04\0\0\0\0", b"\xc4\x00", b"\xa4\0\0\0\0", b"\xc0", b"\xd4\x01\x00", b"\xc6\xff\xff\xff\xff")
    fields = random.choice(shapes) + random.choice(dtypes) + random.choice(contents)
    payload = random.choice((b"\x93", b"\x93", b"\x93", b"\x92", b"\x94", b"\x83")) + fields
    code = random.choice((b"\x01", b"\x01", b"\x01", b"\x02", _HIGH))  # 255: a time, to the library
    return b"\x81\xa1a\xc9" + len(payload).to_bytes(4, "big") + code + payload


def _key(random: Random, data: bytearray) -> bytes:
    keys = (
        b"\x01",
        b"\xc0",
        b"\xc4\x01a",
        b"\xa0",
        b"\xa1\xff",
        b"\x90",
        b"\x80",
        b"\xdb\x00\x01\x00\x00" + b"a" * 65536,
    )
    keys += (b"\xd6\xff\0\0\0\0", b"\xca\0\0\0\0", b"\xa1/", b"\xa1\0")
    return b"\x81" + random.choice(keys) + b"\xc0"


MSGPACK_MUTATIONS: dict[str, Callable[[Random, Path], None]] = {
    "nested": _bytes(_nested),
    "many objects": _bytes(_many),
    "huge length": _bytes(_huge),
    "odd array": _bytes(_array),
    "odd key": _bytes(_key),
}


# --- the record


def _record(random: Random, file: Path) -> None:
    """Another value in the record, or something that is no record."""
    record = json.loads(file.read_bytes())
    odd = [None, 1, "x", [], {}, [[]], float("nan"), "0" * 64, 1e308, -(10**400), [["a"]], {"a": {"b": 1}}]
    key = random.choice(sorted(record))
    kind = random.randrange(4)
    if kind == 0:
        record[key] = random.choice(odd)
        file.write_text(json.dumps(record))
    elif kind == 1 and record["settings"]:
        record["settings"][random.choice(sorted(record["settings"]))] = random.choice(odd)
        file.write_text(json.dumps(record))
    elif kind == 2:
        del record[key]
        file.write_text(json.dumps(record))
    else:
        file.write_bytes(random.choice((b"", b"[" * 100_000, b'{"a":' * 100_000, b"1", b"\xff\xfe", b" " * (2 << 20))))


RECORD_MUTATIONS: dict[str, Callable[[Random, Path], None]] = {
    "record, flipped bits": _bytes(_flip_bits),
    "record, truncated": _bytes(_truncate),
    "record, odd": _record,
    "record, a folder": _folder,
    "record, a link": _link,
}
