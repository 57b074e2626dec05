"""Tar shards as WebDataset writes them: members that stand together and have one key are one sample.

The key of a member is its name up to the first dot after the last slash, the rest is its kind: ``a/000123.seg.png`` is
the ``seg.png`` of sample ``a/000123``.

WebDataset streams shards and shuffles in a buffer, so that the order depends on all that was read before. Here shards
are indexed once, and members are read where they stand: the order of images is that of every other data set, a function
of the seed and the epoch, and a resumed run need not read again what came before. It costs random access: keep shards
on a disk that is good at it, and plain, as no place in a compressed one can be reached without all before it.
"""

from __future__ import annotations

import json
import re
import tarfile
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from .decoding import Part
from .errors import MissingData

_IMAGES = ("jpg", "jpeg", "png", "webp")
_META = re.compile(r"__[^/]*__($|/)")  # names that WebDataset keeps for itself
_MAGIC = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
_CLASSES = 2**20  # a larger number is no class: probes keep weights for every one


class Sample(NamedTuple):
    """One image: where it is, its class (-1: it has none) and what is said of it (empty: nothing)."""

    image: Part
    label: int
    caption: str


class _Member(NamedTuple):
    key: str
    kind: str
    part: Part
    text: bytes  # of kinds that are not images


def find_shards(folder: Path, pattern: str) -> list[Path]:
    """The files ``pattern`` of a folder, by name.

    Raises:
        MissingData: one is compressed, by its content or its name.
    """
    for file in sorted([*folder.glob(pattern), *folder.glob(pattern + ".*"), *folder.glob(pattern[:-2] + "gz")]):
        with file.open("rb") as opened:
            head = opened.read(6)
        if found := [name for magic, name in _MAGIC.items() if head.startswith(magic)]:
            raise MissingData(
                f"got {file}, which is compressed ({found[0]}); expected a plain .tar, as its images are read in any "
                "order. Decompress it: images are small as they are."
            )
    return sorted(folder.glob(pattern))


def samples(shard: Path) -> Iterator[Sample]:
    """The samples of a shard that have an image, in its order.

    ``.jpg``, ``.jpeg``, ``.png`` or ``.webp`` is the image, the number in ``.cls`` or else ``"label"`` in ``.json`` its
    class, ``.txt`` its caption; other members are left alone.

    Raises:
        MissingData: the shard is damaged, members of one sample do not stand together or are there twice, or a class is
            no number.
    """
    keys = set()
    for key, group in groupby(_members(shard), key=lambda member: member.key):
        members = list(group)
        found = {member.kind: member for member in members}
        if key in keys or len(found) < len(members):
            raise MissingData(
                f"got {key} in {shard} twice, or its members apart; expected them one after the other. Write the shard "
                "sorted: tar --sort=name."
            )
        keys.add(key)
        image = next((found[kind] for kind in found if kind in _IMAGES), None)
        if image is not None:
            label = _label(found.get("cls") or found.get("json"))
            caption = found["txt"].text.decode(errors="replace").strip() if "txt" in found else ""
            yield Sample(image.part, label, caption)


def _members(shard: Path) -> Iterator[_Member]:
    try:
        with tarfile.open(shard, "r:") as tar:
            while (info := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # tarfile would keep them all
                folder, slash, base = info.name.rpartition("/")
                stem, dot, kind = base.partition(".")
                kind = kind.lower()
                if not (info.isreg() and stem and dot) or _META.match(info.name):
                    continue
                opened = tar.extractfile(info) if kind in ("cls", "json", "txt") else None
                text = opened.read() if opened else b""
                part = Part(str(shard), info.offset_data, info.size, info.name)
                yield _Member(folder + slash + stem, kind, part, text)
            with shard.open("rb") as file:
                file.seek(tar.offset)
                if file.read(tarfile.BLOCKSIZE).strip(b"\0"):  # tarfile stops there without a word
                    raise tarfile.ReadError("no header where one should be")
    except (tarfile.TarError, OSError) as error:
        raise MissingData(
            f"{shard} cannot be read ({error}); expected a whole tar file. Make or get it again."
        ) from error


def _label(member: _Member | None) -> int:
    """The class in a ``.cls`` or ``.json``; -1 where there is none."""
    if member is None:
        return -1
    try:
        if member.kind == "cls":
            label = int(member.text)
        else:
            about = json.loads(member.text)
            label = about.get("label", -1) if isinstance(about, dict) else -1
    except ValueError:
        label = None
    if type(label) is not int or not -1 <= label < _CLASSES:
        raise MissingData(
            f"got {member.text[:40]!r} in {member.part}; expected the number of a class, from 0 on"
            f"{'' if member.kind == 'cls' else ', as label'}. Write it again, or leave it out."
        )
    return label
