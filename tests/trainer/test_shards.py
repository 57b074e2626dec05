"""WebDataset's tar shards: samples, classes, captions, random access, and what is said of damaged ones."""

import gzip
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch

from fastcl.trainer import TrainConfig, TrainError, table, train, write_page
from fastcl.trainer.data import load_data
from fastcl.trainer.errors import MissingData
from fastcl.trainer.evaluation import evaluate
from fastcl.trainer.shards import samples
from fastcl.trainer.text import captions as clip_captions

from .runs import need_torchvision
from .test_decoding import SIZE, damage, picture


def write_shard(path: Path, members: list[tuple[str, bytes]], kind: int = tarfile.PAX_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=kind) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def sample(i: int, label: int | None = None) -> list[tuple[str, bytes]]:
    label = i % 2 if label is None else label
    return [
        (f"{i:06}.cls", str(label).encode()),
        (f"{i:06}.png", picture(i // 2 if i % 2 == 0 else 130 + i // 2)),
        (f"{i:06}.txt", f"number {i}\n".encode()),
    ]


def config(root: Path, **settings: Any) -> TrainConfig:
    few = {"steps": 2, "batch_size": 8, "probe_every": 2, "threads": 1, "image_size": SIZE}
    return TrainConfig(data="shards", data_dir=str(root), **few | settings)


def test_members_with_one_key_are_a_sample(tmp_path: Path) -> None:
    long = "d" * 120  # a name longer than the header of a tar has room for
    members = [
        ("__meta__/000.jpg", b"of the format itself"),
        ("README", b"no kind"),
        ("._000.jpg", b"of a Mac"),
        ("a.b/000.seg.png", b"not the image"),
        ("a.b/000.JPG", b"zero"),
        ("a.b/000.json", b'{"label": 7, "caption": "not this"}'),
        ("a.b/000.txt", "eine Säge\n".encode()),
        ("001.cls", b" 3\n"),
        ("001.webp", b"one"),
        ("001.json", b'{"label": 4}'),
        ("002.jpeg", b"two"),
        ("003.txt", b"a caption alone"),
        (f"{long}/004.png", b"four"),
        (f"{long}/004.json", b'["a list"]'),
    ]
    for kind in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        path = write_shard(tmp_path / "x.tar", members, kind)
        found = list(samples(path))
        assert [(s.image.name, s.label, s.caption) for s in found] == [
            ("a.b/000.JPG", 7, "eine Säge"),
            ("001.webp", 3, ""),
            ("002.jpeg", -1, ""),
            (f"{long}/004.png", -1, ""),
        ]
        content = path.read_bytes()
        places = [s.image for s in found]
        assert [content[p.offset : p.offset + p.size] for p in places] == [b"zero", b"one", b"two", b"four"]
        assert str(places[1]) == f"{path}/001.webp"


def test_train_and_val_shards_are_used_as_they_are(tmp_path: Path) -> None:
    write_shard(tmp_path / "train-1.tar", [m for i in range(20, 40) for m in sample(i)])
    write_shard(tmp_path / "train-0.tar", [m for i in range(20) for m in sample(i)])
    write_shard(tmp_path / "val-0.tar", [m for i in range(40, 46) for m in sample(i)])
    write_shard(tmp_path / "other.tar", sample(99))
    (tmp_path / "classes.txt").write_text("dark\nlight\n")
    data = load_data(config(tmp_path))
    assert (len(data.train), len(data.test), list(data.classes)) == (40, 6, ["dark", "light"])
    assert data.train.captions is not None and data.train.captions[23] == "number 23"
    assert data.test.captions is not None and list(data.test.captions) == [f"number {i}" for i in range(40, 46)]
    at = torch.tensor([39, 0, 17, 0])
    images = data.train.read(at)
    assert images.shape == (4, 3, SIZE, SIZE)
    assert (images.mean((1, 2, 3)) * 255).round().tolist() == [149, 0, 138, 0]
    assert data.train.labels[at].tolist() == [1, 0, 1, 0]


def test_of_other_shards_a_quarter_of_each_class_is_held_out(tmp_path: Path) -> None:
    write_shard(tmp_path / "train-00.tar", [m for i in range(12) for m in sample(i)])
    write_shard(tmp_path / "more.tar", [m for i in range(12, 24) for m in sample(i)])
    data = load_data(config(tmp_path))
    assert (len(data.train), len(data.test), list(data.classes)) == (18, 6, ["0", "1"])
    assert data.test.labels.bincount().tolist() == [3, 3]
    for half in (data.train, data.test):
        light = half.read(torch.arange(len(half))).mean((1, 2, 3)) > 0.5
        assert torch.equal(light, half.labels == 1)
        assert half.captions is not None
        assert [int(caption.split()[1]) % 2 for caption in half.captions] == half.labels.tolist()


def test_shards_without_captions_have_none(tmp_path: Path) -> None:
    write_shard(tmp_path / "x.tar", [m for i in range(16) for m in sample(i) if not m[0].endswith("txt")])
    assert load_data(config(tmp_path)).train.captions is None


def test_a_stand_in_brings_its_caption(tmp_path: Path) -> None:
    members = [m for i in range(24) for m in sample(i)]
    members[13] = (members[13][0], damage(0))  # 000004.png
    write_shard(tmp_path / "train-0.tar", members)
    write_shard(tmp_path / "val-0.tar", sample(50) + sample(51))
    data = load_data(config(tmp_path))
    at = torch.tensor([3, 4, 5])
    captions = data.train.captions
    assert captions is not None and [captions[i] for i in at.tolist()] == ["number 3", "number 6", "number 5"]
    assert (data.train.read(at).mean((1, 2, 3)) * 255).round().tolist() == [131, 3, 132]
    assert clip_captions(data, at, seed=0, epoch=0)[1] == "number 6"  # what CLIP reads
    assert captions[-20:6] == ["number 6", "number 5"] and len(captions) == len(list(captions)) == 24
    assert data.decoder.broken() == [f"{tmp_path / 'train-0.tar'}/000004.png"]


def test_a_run_on_dirty_shards(tmp_path: Path) -> None:
    need_torchvision()
    members = [m for i in range(80) for m in sample(i)]
    for i in (7, 30):
        members[3 * i + 1] = (members[3 * i + 1][0], damage(i))
    write_shard(tmp_path / "x.tar", members)
    result = train(config(tmp_path, output=str(tmp_path / "run"), encoder="conv"))
    assert result["skipped_images"] == 2 and result["dataset"] == "shards"
    names = [f"{tmp_path / 'x.tar'}/{name}" for name in ("000007.png", "000030.png")]
    assert sorted(json.loads((tmp_path / "run" / "skipped_images.json").read_text())) == names


@pytest.mark.parametrize("method", ["simclr", "clip"])
def test_images_without_a_class_are_trained_on_and_not_probed(method: str, tmp_path: Path) -> None:
    write_shard(tmp_path / "x.tar", [m for i in range(24) for m in sample(i)[1:]])
    assert (load_data(config(tmp_path)).train.labels == -1).all()
    run = tmp_path / "run"
    result = train(config(tmp_path, output=str(run), method=method))
    assert result["probe"] == {"raw": {}, "random": {}, "trained": {}} and result["zero_shot"] is None
    assert result["embeddings"]["effective_rank"] > 0 and "accuracy" not in table(result)
    page = write_page(run).read_text()
    assert "probes against step" not in page and "map of features" in page and not (run / "probe.png").exists()
    with pytest.raises(TrainError, match="got images without labels in shards; expected labels"):
        evaluate(run)
    recall = result["retrieval"]
    if method == "simclr":
        assert recall is None
        return
    assert set(recall) == {"image_to_text", "text_to_image"}
    assert all(value * 6 % 100 == pytest.approx(0, abs=1e-9) for value in recall.values())  # of six pairs
    assert f"recall at 1 of held-out pairs, %: {recall['image_to_text']:.1f} of texts" in table(result)


def test_labels_of_one_half_alone_are_not_enough_to_probe(tmp_path: Path) -> None:
    write_shard(tmp_path / "train-0.tar", [m for i in range(24) for m in sample(i)])
    write_shard(tmp_path / "val-0.tar", [m for i in range(24) for m in sample(i)[1:]])
    with pytest.raises(MissingData, match="got labels of training images alone; expected some of both"):
        train(config(tmp_path, output=str(tmp_path / "run")))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["x.tar.gz", "x.tgz", "x.tar"])
def test_a_compressed_shard_is_refused(name: str, tmp_path: Path) -> None:
    plain = write_shard(tmp_path / "plain" / "y.tar", sample(0))
    write_shard(tmp_path / "a.tar", sample(1))  # some that are not do not help
    (tmp_path / name).write_bytes(gzip.compress(plain.read_bytes()))
    with pytest.raises(MissingData, match=rf"{name}, which is compressed \(gzip\); expected a plain \.tar"):
        load_data(config(tmp_path))


@pytest.mark.parametrize("damage", ["cut in a member", "cut in a header", "header", "text", "empty"])
def test_a_damaged_shard_is_refused(damage: str, tmp_path: Path) -> None:
    path = write_shard(tmp_path / "x.tar", sample(0) + sample(1))
    whole = path.read_bytes()
    third = list(samples(path))[1].image.offset
    path.write_bytes(
        {
            "cut in a member": whole[: third + 9],
            "cut in a header": whole[: third - 100],
            "header": whole[: third - 512] + b"?" * 512 + whole[third:],
            "text": b"<html>404 Not Found</html>" * 40,
            "empty": b"",
        }[damage]
    )
    with pytest.raises(MissingData, match=r"x\.tar cannot be read \(.*\); expected a whole tar file"):
        load_data(config(tmp_path))


@pytest.mark.parametrize(
    "members",
    [
        [("0.png", b""), ("1.png", b""), ("0.cls", b"0"), ("1.cls", b"1")],
        [("0.png", b""), ("0.cls", b"0"), ("0.cls", b"1")],
        [("0.png", b""), ("0.PNG", b"")],
    ],
    ids=["apart", "two classes", "two images"],
)
def test_a_sample_stands_together_and_once(members: list[tuple[str, bytes]], tmp_path: Path) -> None:
    write_shard(tmp_path / "x.tar", members)
    with pytest.raises(MissingData, match=r"got 0 in .*x\.tar twice, .* tar --sort=name"):
        load_data(config(tmp_path))


@pytest.mark.parametrize(
    ("kind", "content"),
    [
        ("cls", b"cat"), ("cls", b""), ("cls", b"-2"), ("cls", b"1.5"), ("cls", b"\xff\xfe"), ("cls", b"99999999999"),
        ("json", b"{"), ("json", b'{"label": "cat"}'), ("json", b'{"label": true}'), ("json", b'{"label": null}'),
        ("json", b"\xff\xfe\xfa"),
    ],
)  # fmt: skip
def test_a_class_that_is_no_number_is_refused(kind: str, content: bytes, tmp_path: Path) -> None:
    write_shard(tmp_path / "x.tar", [("0.png", b""), (f"0.{kind}", content)])
    with pytest.raises(MissingData, match=rf"x\.tar/0\.{kind}; expected the number of a class"):
        load_data(config(tmp_path))


def test_fewer_names_than_classes_are_refused(tmp_path: Path) -> None:
    write_shard(tmp_path / "x.tar", [m for i in range(24) for m in sample(i)])
    (tmp_path / "classes.txt").write_text("dark")
    with pytest.raises(MissingData, match="got 1 names for 2 classes"):
        load_data(config(tmp_path))
