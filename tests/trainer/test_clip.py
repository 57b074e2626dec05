"""CLIP in the trainer: captions that repeat, text that is read up to its end, and images named by words alone."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastcl.trainer import TrainConfig, TrainError, export, loop, resume, table, train
from fastcl.trainer.clip import CLIP
from fastcl.trainer.data import Data, Images, load_data
from fastcl.trainer.export import trained_encoder
from fastcl.trainer.text import TEMPLATES, TextEncoder, captions, prompts, tokens

from .conftest import SHORT
from .runs import interrupt, losses, same_run

CPU = torch.device("cpu")
RUN = SHORT | {"method": "clip", "steps": 160, "probe_every": 160, "checkpoint_every": 160, "text_width": 32}
FEW = RUN | {"steps": 10, "probe_every": 10, "checkpoint_every": 4}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("clip") / "run"
    return folder, train(TrainConfig(output=str(folder), **RUN))


def digits() -> Data:
    return load_data(TrainConfig())


def said(data: Data, *texts: str) -> Data:
    """The same images with captions, and without labels."""
    every = [texts[i % len(texts)] for i in range(len(data.train))]
    unknown = torch.full_like(data.train.labels, -1)
    return dataclasses.replace(data, train=Images(unknown, data.train.read, every))


def test_digits_are_named_by_words_alone_after_a_few_steps(run: tuple[Path, dict[str, Any]]) -> None:
    folder, result = run
    assert result["zero_shot"] > 80  # chance is 10, and 95 were measured
    assert json.loads((folder / "result.json").read_text())["zero_shot"] == result["zero_shot"]
    assert f"zero-shot accuracy of the class names, %: {result['zero_shot']:.1f}" in table(result)


def test_captions_of_other_images_teach_nothing(tmp_path: Path) -> None:
    result = train(TrainConfig(output=str(tmp_path / "run"), control="shuffled-pairs", **RUN | {"steps": 80}))
    assert result["zero_shot"] < 30


def test_another_method_has_no_words(short_run: tuple[Path, dict[str, Any]]) -> None:
    assert short_run[1]["zero_shot"] is None and "zero-shot" not in table(short_run[1])


def test_a_resumed_run_ends_as_if_it_had_not_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = train(TrainConfig(output=str(tmp_path / "whole"), **FEW))
    with monkeypatch.context() as patch:
        interrupt(patch, at=9)
        with pytest.raises(KeyboardInterrupt):
            train(TrainConfig(output=str(tmp_path / "cut"), **FEW))
    resumed = resume(tmp_path / "cut")
    same_run(tmp_path / "cut", tmp_path / "whole")
    assert resumed["zero_shot"] == whole["zero_shot"]


def test_the_image_encoder_is_exported(run: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    about = export(run[0], tmp_path / "encoder.pt")
    encoder, _ = trained_encoder(run[0])
    weights = torch.load(tmp_path / "encoder.pt", weights_only=True)
    assert about["method"] == "clip" and list(weights) == list(encoder.state_dict())


def test_a_batch_is_one_view_and_the_tokens_of_its_captions() -> None:
    config, data = TrainConfig(method="clip", batch_size=32).resolved(), digits()
    (view, text), labels = loop.batch_of(config, data, 3, CPU)
    assert view.shape == (32, 1, 8, 8) and text.shape[0] == 32 and text.dtype == torch.int64
    rows = torch.tensor([3, 20, 5])
    (few_views, few_text), few_labels = loop.batch_of(config, data, 3, CPU, rows)
    assert torch.equal(few_views, view[rows]) and torch.equal(few_labels, labels[rows])
    assert [spelt(row) for row in few_text] == [spelt(row) for row in text[rows]]
    for row, label in zip(text, labels.tolist(), strict=True):
        assert spelt(row) in prompts(data.classes)[label * len(TEMPLATES) :][: len(TEMPLATES)]
    (_, rolled), _ = loop.batch_of(dataclasses.replace(config, control="shuffled-pairs"), data, 3, CPU)
    assert torch.equal(rolled, text.roll(1, 0))


def spelt(row: Tensor) -> str:
    """The text of a row of tokens, which must begin, end and then be filled up."""
    codes = row.tolist()
    end = codes.index(257)
    assert codes[0] == 256 and set(codes[end + 1 :]) <= {258}
    return bytes(codes[1:end]).decode()


def test_captions_are_a_function_of_seed_epoch_and_image() -> None:
    data, at = digits(), torch.arange(0, 1340, 7)
    first = captions(data, at, seed=0, epoch=0)
    assert captions(data, at.flip(0), 0, 0) == first[::-1]
    for seed, epoch in ((1, 0), (0, 1)):
        same = sum(a == b for a, b in zip(first, captions(data, at, seed, epoch), strict=True))
        assert 15 < same < 70  # of 192 one in five
    assert {text.rpartition(" ")[2] for text in first} == {
        "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine",
    }  # fmt: skip
    assert captions(said(data, "a", "b"), torch.tensor([0, 3, 2]), 0, 0) == ["a", "b", "a"]
    assert prompts(["sea_lion"])[0] == "a photo of a sea lion" and len(prompts(["a", "b"])) == 2 * len(TEMPLATES)


def test_tokens_are_bytes_between_a_begin_and_an_end() -> None:
    assert tokens(["ab", ""], 8).tolist() == [[256, 97, 98, 257], [256, 257, 258, 258]]
    assert tokens(["é"], 8).tolist() == [[256, 0xC3, 0xA9, 257]]
    assert tokens(["abcdefgh"], 5).tolist() == [[256, 97, 98, 99, 257]]
    assert tokens(["\udc80"], 8).tolist() == [[256, 63, 257]]  # no text at all: a question mark


def test_the_feature_of_a_text_is_at_its_end_and_sees_all_before_and_nothing_after() -> None:
    torch.manual_seed(0)
    encoder = TextEncoder(32, 2, 16).double()
    alone = encoder(tokens(["abc"], 16))
    torch.testing.assert_close(encoder(tokens(["abc", "a longer text"], 16))[:1], alone, rtol=1e-12, atol=1e-12)
    after = tokens(["abc"], 16)
    torch.testing.assert_close(encoder(torch.cat([after, torch.tensor([[7, 9]])], 1)), alone, rtol=1e-12, atol=1e-12)
    one = TextEncoder(32, 1, 16).double()  # one layer knows an order by positions alone
    for other in ("xbc", "axc", "abx", "acb", "ab"):  # every byte counts, and their order
        assert (one(tokens([other], 16)) - one(tokens(["abc"], 16))).abs().max() > 1e-6


def clip(**settings: Any) -> CLIP:
    config = TrainConfig(method="clip", batch_size=16, **settings).resolved()
    method = loop.build_method(config, load_data(config))
    assert isinstance(method, CLIP)
    return method


def test_the_loss_is_figure_3_of_the_paper_and_learns_its_scale() -> None:
    method = clip()
    image, text = torch.randn(2, 16, 64, dtype=torch.float64, requires_grad=True)
    scale = method.log_scale.exp()
    assert scale.item() == pytest.approx(1 / 0.07)
    unit = torch.nn.functional.normalize
    logits, diagonal = scale.double() * unit(image) @ unit(text).T, torch.arange(16)
    entropy = torch.nn.functional.cross_entropy
    want = (entropy(logits, diagonal) + entropy(logits.T, diagonal)) / 2
    found = method.objective(torch.zeros(16), image, text, scale.expand(16))
    assert found.item() == pytest.approx(want.item(), rel=1e-6)
    (slope,), (wanted,) = (torch.autograd.grad(loss, method.log_scale, retain_graph=True) for loss in (found, want))
    assert slope.item() == pytest.approx(wanted.item(), rel=1e-5) and slope != 0


def test_the_scale_is_clipped_and_can_come_back() -> None:
    method = clip()
    optimizer = torch.optim.SGD(method.parameters(), lr=0.0)
    with torch.no_grad():
        method.log_scale.fill_(9.0)
    views = torch.rand(16, 1, 8, 8), tokens(["a", "b"] * 8, 64)
    loop._step(method, optimizer, views, torch.zeros(16), CPU)
    assert method.log_scale.item() == pytest.approx(math.log(100)) and method.log_scale.grad.abs() > 1e-6


def test_classes_are_the_mean_of_their_prompts() -> None:
    method, classes = clip().eval(), ["cat", "dog", "owl"]
    features, unit = torch.randn(300, 128), torch.nn.functional.normalize
    with torch.no_grad():
        each = torch.stack([method.text_head(method.text_encoder(tokens(prompts([name]), 64))) for name in classes])
        cosines = unit(method.head(features)) @ unit(unit(each, dim=2).mean(1)).T
    wanted = cosines.argmax(1)
    assert method.zero_shot(features, wanted, classes) == 100
    assert method.zero_shot(features, torch.where(torch.arange(300) < 75, 3, wanted), classes) == 75
    assert method.zero_shot(features, wanted, []) is None
    assert method.zero_shot(features, wanted - 1, classes) is None  # some have no class


def test_recall_counts_pairs_that_find_each_other_and_equal_texts() -> None:
    method, unit = clip().eval(), torch.nn.functional.normalize
    texts = [f"number {i % 30}" for i in range(40)]  # ten of them twice
    with torch.no_grad():
        method.head.weight.copy_(torch.eye(64, 128))  # so that images are what their features are
        words = method.text_head(method.text_encoder(tokens(texts, 64)))
    seen = words.clone()
    seen[:12] = words[12]  # a dozen images look like a thirteenth; its text, and theirs, find one of them
    found = {}
    for images in (words, seen):
        recall = method.retrieval(torch.cat([images, torch.zeros(40, 64)], 1), texts)
        cosines = unit(images) @ unit(words).T
        for way, matrix in (("image_to_text", cosines), ("text_to_image", cosines.T)):
            right = [i % 30 == j % 30 for i, j in enumerate(matrix.argmax(1).tolist())]
            assert recall[way] == pytest.approx(100 * sum(right) / 40), way
        found[images is seen] = recall
    assert found[False] == {"image_to_text": 100, "text_to_image": 100}
    assert found[True]["image_to_text"] == 70 != found[True]["text_to_image"]


def test_a_data_set_with_captions_needs_no_labels_to_learn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = digits()
    words = [f"the {label}" for label in data.train.labels.tolist()]
    spoken = dataclasses.replace(data, train=Images(data.train.labels, data.train.read, words))
    seen: list[str] = []
    batch = loop.batch_of

    def spy(*args: Any) -> Any:
        (view, text), labels = batch(*args)
        seen.extend(f"{spelt(row)} {label}" for row, label in zip(text, labels.tolist(), strict=True))
        return (view, text), labels

    monkeypatch.setattr(loop, "batch_of", spy)
    train(TrainConfig(data="given", output=str(tmp_path / "run"), **FEW | {"steps": 2}), data=spoken)
    assert len(seen) == 3 * 64 and all(text.split()[0] == "the" and len(set(text.split()[1:])) == 1 for text in seen)
    loop.check_labels(TrainConfig(method="clip"), said(data, "a"))
    hidden = dataclasses.replace(data, train=Images(torch.full((1,), -1), data.train.read))
    with pytest.raises(TrainError, match="without labels in digits for clip; expected captions, or labels for all"):
        loop.check_labels(TrainConfig(method="clip"), hidden)


def test_a_run_in_half_precision_and_chunks(tmp_path: Path) -> None:
    settings = FEW | {"steps": 4, "accumulate": 2, "chunk": 32, "precision": "bf16"}
    result = train(TrainConfig(output=str(tmp_path / "run"), **settings))
    curve = losses(tmp_path / "run")
    assert curve[0] < math.log(32) * 2 and all(map(math.isfinite, curve)) and result["zero_shot"] is not None


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"text_width": 0}, "text_width = 0; expected 1 or more"),
        ({"text_width": 48}, "text_width = 48; expected a multiple of 32"),
        ({"text_layers": 0}, "text_layers = 0; expected 1 or more"),
        ({"text_context": 2}, "text_context = 2; expected 3 or more"),
        ({"text_context": 8.0}, "text_context = 8.0; expected int"),
        ({"local_crops": 2}, "local_crops = 2 for clip"),
    ],
)
def test_texts_that_cannot_be_are_a_sentence(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(TrainError, match=sentence):
        TrainConfig(method="clip", **settings).resolved()
