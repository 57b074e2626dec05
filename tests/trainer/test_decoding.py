"""Broken images: what stands in for them, how they are counted and listed, and when there are too many."""

import io
import json
import struct
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch

from fastcl.trainer import TrainConfig, TrainError, loop, resume, table, train
from fastcl.trainer.checkpoint import load_checkpoint
from fastcl.trainer.data import Data, load_data
from fastcl.trainer.decoding import Decoder, Part, _pixels
from fastcl.trainer.errors import MissingData

from .runs import interrupt, need_torchvision, same_run

SIZE = 8


def encoded(image: Any, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def picture(grey: int, width: int = 12, height: int = 9) -> bytes:
    from PIL import Image

    return encoded(Image.new("RGB", (width, height), (grey, grey, grey)))


def without_width() -> bytes:
    """A PNG of 0 x 5 pixels, which no encoder writes."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 0, 5, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def damage(which: int) -> bytes:
    from PIL import Image

    noise = torch.randint(256, (40, 40, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    jpeg = encoded(Image.fromarray(noise.numpy()), "JPEG")
    return [jpeg[: len(jpeg) // 2], b"", b"<html>404 Not Found</html>", without_width(), jpeg[:20]][which % 5]


def make_folder(root: Path, count: int = 200, broken: set[int] = frozenset()) -> list[Path]:  # type: ignore[assignment]
    """``count`` images of one grey each, in two classes of dark and light ones, and the files that are broken."""
    paths = []
    for i in range(count):
        path = root / "ab"[i % 2] / f"{i:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(damage(i) if i in broken else picture(i // 2 if i % 2 == 0 else 130 + i // 2))
        if i in broken:
            paths.append(path)
    return sorted(paths)


def config(root: Path, **settings: Any) -> TrainConfig:
    few = {"steps": 9, "batch_size": 16, "probe_every": 6, "checkpoint_every": 3, "threads": 1, "image_size": SIZE}
    return TrainConfig(data="imagefolder", data_dir=str(root), **few | settings)


@pytest.mark.parametrize("which", range(5), ids=["cut", "empty", "text", "no width", "head alone"])
def test_what_cannot_be_decoded(which: int) -> None:
    assert _pixels(damage(which), SIZE) is None


def test_every_kind_of_image_becomes_eight_bits_of_rgb(recwarn: pytest.WarningsRecorder) -> None:
    from PIL import Image

    rgb = Image.new("RGB", (20, 10), (200, 100, 50))
    palette = Image.new("P", (20, 10))
    palette.putpalette([200, 100, 50] * 256)
    clear = rgb.copy()
    clear.putalpha(128)
    deep = Image.fromarray(torch.full((10, 20), 200 * 256, dtype=torch.int32).to(torch.uint16).numpy())
    seen = {
        "RGB": encoded(rgb),
        "RGBA": encoded(clear),
        "CMYK": encoded(rgb.convert("CMYK"), "JPEG", quality=100),
        "palette": encoded(palette),
        "clear palette": encoded(palette, transparency=bytes(256)),
        "WebP": encoded(rgb, "WEBP", lossless=True),
        "16 bits": encoded(deep),
        "16 bits, PPM": encoded(deep.convert("I"), "PPM"),
        "black and white": encoded(Image.new("1", (20, 10), 1)),
    }
    want = {"16 bits": (200,) * 3, "16 bits, PPM": (200,) * 3, "black and white": (255,) * 3}
    for name, content in seen.items():
        pixels = _pixels(content, SIZE)
        assert pixels is not None and pixels.shape == (3, SIZE, SIZE) and pixels.dtype == torch.uint8
        expected = torch.tensor(want.get(name, (200, 100, 50))).view(3, 1, 1)
        assert (pixels - expected).abs().max() <= 2, name
    assert not recwarn.list


def test_files_that_other_programs_would_decode_are_no_images() -> None:
    from PIL import Image

    assert _pixels(encoded(Image.new("RGB", (8, 8)), "PCX"), SIZE) is None  # Pillow reads it by itself
    assert _pixels(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n", SIZE) is None


def decoder(folder: Path, contents: list[bytes | None], groups: list[int], **options: Any) -> Decoder:
    for i, content in enumerate(contents):
        if content is not None:
            (folder / f"{i}.png").write_bytes(content)
    parts = [Part(str(folder / f"{i}.png")) for i in range(len(contents))]
    return Decoder(parts, torch.tensor(groups), SIZE, **{"max_corrupt": 1.0} | options)


def greys(images: torch.Tensor) -> list[int]:
    assert images.ndim == 4 and images.dtype == torch.float32
    return [round(image.mean().item() * 255) for image in images]


@pytest.mark.parametrize("first", [[3], [0, 1, 2, 3, 4, 5], [5, 5, 0]])
def test_the_next_of_the_group_stands_in_whatever_was_read_before(first: list[int], tmp_path: Path) -> None:
    # group 0: 0, 2, 3 (broken), 5 (not there); group 1: 1 (broken), 4
    contents = [picture(0), b"", picture(20), damage(0), picture(40), None]
    images = decoder(tmp_path, contents, [0, 1, 0, 0, 1, 0])
    images.read(torch.tensor(first))
    at = torch.tensor([0, 1, 2, 3, 4, 5, 3])
    assert images.shown(at).tolist() == [0, 4, 2, 0, 4, 0, 0]  # after the last of a group comes its first
    assert greys(images.read(at)) == [0, 40, 20, 0, 40, 0, 0]
    assert images.broken() == [str(tmp_path / f"{i}.png") for i in (1, 3, 5)]
    assert images.read(torch.tensor([], dtype=torch.int64)).shape == (0, 3, SIZE, SIZE)


def test_what_is_shown_is_known_before_it_is_read(tmp_path: Path) -> None:
    images = decoder(tmp_path, [b"", b"", picture(7)], [0, 0, 0])
    assert images.shown(torch.tensor([0, 2])).tolist() == [2, 2]
    assert images.state.tolist() == [2, 2, 1]


def test_a_group_without_an_image_is_a_sentence(tmp_path: Path) -> None:
    images = decoder(tmp_path, [picture(1), b"", b""], [0, 1, 1])
    with pytest.raises(MissingData, match=r"none of the 2 images of a class .*1\.png is one"):
        images.read(torch.tensor([1]))


def test_a_disk_that_does_not_answer_stops_the_run(tmp_path: Path) -> None:
    (tmp_path / "1.png").mkdir()  # reading it is an OSError, as with a lost disk, and no damage to an image
    images = decoder(tmp_path, [picture(1)], [0])
    images.parts = [*images.parts, Part(str(tmp_path / "1.png"))]
    images.state = torch.zeros(2, dtype=torch.uint8)
    with pytest.raises(MissingData, match=r"1\.png cannot be read .* fastcl train --resume"):
        images.read(torch.tensor([1]))


def test_few_images_are_judged_as_if_all_were_read(tmp_path: Path) -> None:
    images = decoder(tmp_path, [b"", b"", b"", *[picture(9)] * 37], [0] * 40, max_corrupt=0.05)
    images.read(torch.tensor([1]))  # 2 of 3 that were read, 2 of 40 in all
    assert images.broken() == [str(tmp_path / f"{i}.png") for i in (1, 2)]
    with pytest.raises(MissingData, match=r"3 of the 4 images read so far .*0\.png.* at most 0\.05 .* --max-corrupt"):
        images.read(torch.tensor([0]))


BROKEN = {3, 22, 24, 57, 88, 110, 131, 150, 177, 199}  # 5 % of 200


@pytest.fixture(scope="module")
def dirty(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path]]:
    need_torchvision()
    root = tmp_path_factory.mktemp("dirty")
    return root, make_folder(root, 200, BROKEN)


@pytest.fixture(scope="module")
def whole(dirty: tuple[Path, list[Path]], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A run on them with one thread that decodes, which reads every image."""
    folder = tmp_path_factory.mktemp("run") / "whole"
    return folder, train(config(dirty[0], output=str(folder), decode_threads=1))


def test_a_run_on_dirty_images_ends_and_lists_them(
    dirty: tuple[Path, list[Path]], whole: tuple[Path, dict[str, Any]]
) -> None:
    folder, result = whole
    assert json.loads((folder / "skipped_images.json").read_text()) == [str(path) for path in dirty[1]]
    assert result["skipped_images"] == len(BROKEN) == 10
    assert "images that cannot be decoded: 10, listed in skipped_images.json" in table(result)


def test_threads_that_decode_change_nothing(
    dirty: tuple[Path, list[Path]], whole: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    result = train(config(dirty[0], output=str(tmp_path / "run"), decode_threads=4))
    same_run(tmp_path / "run", whole[0])
    assert (result["probe"], result["skipped_images"]) == (whole[1]["probe"], 10)
    assert (tmp_path / "run" / "skipped_images.json").read_bytes() == (whole[0] / "skipped_images.json").read_bytes()


def test_a_resumed_run_on_dirty_images_ends_as_if_it_had_not_stopped(
    dirty: tuple[Path, list[Path]], whole: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, listed = tmp_path / "run", []
    with monkeypatch.context() as patch:
        interrupt(patch, at=6)
        step = loop._step

        def looked(*args: Any) -> tuple[float, float]:
            listed.append((folder / "skipped_images.json").exists())
            return step(*args)

        patch.setattr(loop, "_step", looked)
        with pytest.raises(KeyboardInterrupt):
            train(config(dirty[0], output=str(folder)))
    assert listed == [False] * 3 + [True] * 3  # with a checkpoint, for a run that is killed
    known = load_checkpoint(folder / "checkpoint.pt")["data"]["decoded"]
    assert 0 < int((known == 2).sum()) < 10 and int((known == 0).sum()) > 0
    result = resume(folder)
    same_run(folder, whole[0])
    ends = [load_checkpoint(run / "checkpoint.pt")["data"] for run in (folder, whole[0])]
    assert torch.equal(ends[0]["decoded"], ends[1]["decoded"])
    assert (folder / "skipped_images.json").read_bytes() == (whole[0] / "skipped_images.json").read_bytes()
    assert result["skipped_images"] == 10


def test_what_was_broken_before_the_checkpoint_is_counted_after_a_resume(
    dirty: tuple[Path, list[Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Images that only the steps before the checkpoint read: nothing finds them again."""
    settings = {"steps": 4, "probe_every": 4, "batch_size": 4}
    monkeypatch.setattr("fastcl.trainer.probe._LIMIT", 40)  # the probes do not read all
    train(config(dirty[0], output=str(tmp_path / "whole"), seed=4, **settings))
    with monkeypatch.context() as patch:
        interrupt(patch, at=4)
        with pytest.raises(KeyboardInterrupt):
            train(config(dirty[0], output=str(tmp_path / "cut"), seed=4, **settings))
    resume(tmp_path / "cut")
    one, other = (load_checkpoint(tmp_path / run / "checkpoint.pt")["data"]["decoded"] for run in ("whole", "cut"))
    assert torch.equal(one, other) and int((one == 0).sum()) > 0


def test_an_image_and_its_label_belong_together(dirty: tuple[Path, list[Path]]) -> None:
    data: Data = load_data(config(dirty[0]))
    for half in (data.train, data.test):
        at = torch.arange(len(half))
        light = half.read(at).mean((1, 2, 3)) > 0.5
        assert torch.equal(light, half.labels == 1)
    train_greys = {round(x * 255) for x in data.train.read(torch.arange(len(data.train))).mean((1, 2, 3)).tolist()}
    test_greys = {round(x * 255) for x in data.test.read(torch.arange(len(data.test))).mean((1, 2, 3)).tolist()}
    assert not train_greys & test_greys  # nothing of one half stands in for the other


def test_half_of_the_images_broken_stops_the_run(tmp_path: Path) -> None:
    need_torchvision()
    broken = make_folder(tmp_path / "data", 200, set(range(0, 200, 4)) | set(range(1, 200, 4)))
    with pytest.raises(MissingData, match=r"1\d of the \d+ images read so far cannot be decoded \(.*\.png, .* more\)"):
        train(config(tmp_path / "data", output=str(tmp_path / "run")))
    listed = json.loads((tmp_path / "run" / "skipped_images.json").read_text())
    assert 10 < len(listed) < 100 and set(listed) <= {str(path) for path in broken}
    assert not (tmp_path / "run" / "result.json").exists()


@pytest.mark.parametrize("share", [-0.1, 1.5, float("nan")])
def test_a_share_is_a_share(share: float) -> None:
    with pytest.raises(TrainError, match=r"got max_corrupt = .*; expected a share, 0 to 1"):
        TrainConfig(max_corrupt=share).resolved()


def test_no_thread_decodes_nothing() -> None:
    with pytest.raises(TrainError, match="decode_threads = 0; expected 1 or more"):
        TrainConfig(decode_threads=0).resolved()


def test_a_folder_that_changed_is_not_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    need_torchvision()
    make_folder(tmp_path / "data", 60)
    interrupt(monkeypatch, at=4)
    with pytest.raises(KeyboardInterrupt):
        train(config(tmp_path / "data", output=str(tmp_path / "run")))
    (tmp_path / "data" / "a" / "new.png").write_bytes(picture(3))
    with pytest.raises(TrainError, match="other data than the run began with"):
        resume(tmp_path / "run")
