"""The drop-ins behind a real, tiny SentenceTransformer: losses and gradients of the model are the originals'."""

from __future__ import annotations

import warnings
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor

upstream = pytest.importorskip(
    "sentence_transformers.sentence_transformer.losses", reason="sentence-transformers is not installed"
)

from benchmarks.dropins.sentence_transformers import WORDS, pair, tiny_model  # noqa: E402
from fastcl._bench import nothing_kept  # noqa: E402
from fastcl._measure import peak_bytes  # noqa: E402
from fastcl.integrations import sentence_transformers as ours  # noqa: E402

from .formula import check_interface  # noqa: E402

NAMES = [name for name in ours.__all__ if name.endswith("Loss")]
SENTENCES = [
    ["the cat sits", "a red dog runs here", "the old bird sings", "sun there", "a bird runs slowly"],
    ["a cat sits here", "the dog runs", "bird sings there", "the red sun", "the bird runs"],
    ["the sun sings", "old cat", "a dog sits", "the bird slowly", "a red cat there"],
]


def arguments(name: str, model: Any, guide: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    options = {"mini_batch_size": 2} if name.startswith("Cached") else {}
    return ((model, guide) if "GIST" in name else (model,)), options


def loss_and_grads(loss: Any, model: Any, columns: int) -> tuple[Tensor, list[Tensor]]:
    model.zero_grad()
    features = [dict(model.preprocess(texts)) for texts in SENTENCES[:columns]]
    value = loss(features, torch.tensor([1, 0, 1, 1, 0]))
    value.backward()
    return value.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]


# only losses with a guide look at a second tokenizer
@pytest.mark.parametrize(
    "name, other_tokenizer", [*((name, False) for name in NAMES), *((name, True) for name in NAMES if "GIST" in name)]
)
def test_losses_and_gradients_of_a_model(name: str, other_tokenizer: bool) -> None:
    model = deepcopy(tiny_model())
    guide = tiny_model(tuple(reversed(WORDS)) if other_tokenizer else WORDS, seed=1)
    models, options = arguments(name, model, guide)
    mine, theirs = pair(name, *models, **options)
    if "GIST" in name:
        assert mine.must_retokenize is other_tokenizer
    columns = 2 if name == "ContrastiveLoss" or "Symmetric" in name else 3
    got, grads = loss_and_grads(mine, model, columns)
    want, wanted = loss_and_grads(theirs, model, columns)
    assert len(grads) == len(wanted) > 10
    assert torch.isclose(got, want, rtol=1e-5, atol=1e-6)
    size = torch.stack([g.norm() for g in wanted]).norm()
    assert torch.stack([(a - b).norm() for a, b in zip(grads, wanted, strict=True)]).norm() < 1e-5 * size


@pytest.mark.parametrize("name", NAMES)
def test_same_arguments_attributes_settings_and_state(name: str) -> None:
    models, options = arguments(name, tiny_model(), tiny_model())
    mine, theirs = pair(name, *models, **options)
    check_interface(mine, theirs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert mine.get_config_dict() == theirs.get_config_dict()


def test_the_cached_loss_hands_its_settings_on() -> None:
    loss = ours.CachedMultipleNegativesRankingLoss(tiny_model(), strict=True)
    assert type(loss.loss) is ours.MultipleNegativesRankingLoss and loss.loss.strict
    loss.scale = 7.0
    assert loss.loss.scale == 7.0


def test_another_similarity_is_the_originals() -> None:
    def negative_distance(a: Tensor, b: Tensor) -> Tensor:
        return -torch.cdist(a, b)

    mine, theirs = pair("MultipleNegativesRankingLoss", tiny_model(), similarity_fct=negative_distance)
    columns = [torch.randn(5, 4, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    assert not mine.is_fused(columns)
    assert torch.equal(*(loss.compute_loss_from_embeddings(columns, None) for loss in (mine, theirs)))


@pytest.mark.parametrize("directions", [("query_to_doc",), ("query_to_doc", "query_to_query", "doc_to_doc")])
def test_memory_grows_with_the_batch(directions: tuple[str, ...]) -> None:
    loss, _ = pair("MultipleNegativesRankingLoss", tiny_model(), directions=directions)

    def step(n: int) -> int:
        columns = [torch.randn(n, 16, requires_grad=True) for _ in range(3)]
        return peak_bytes(lambda: loss.compute_loss_from_embeddings(columns, None).backward())

    with nothing_kept():
        assert step(2048) < 3 * step(1024)


def test_a_zero_embedding_receives_no_gradient_unless_strict() -> None:
    def gradient(loss: Any) -> Tensor:
        columns = [torch.randn(4, 3, generator=torch.Generator().manual_seed(i)) for i in range(2)]
        columns[0][1] = 0
        columns[0].requires_grad_()
        loss.compute_loss_from_embeddings(columns, None).backward()
        assert columns[0].grad is not None
        return columns[0].grad[1].norm()

    mine, theirs = pair("MultipleNegativesRankingLoss", tiny_model())
    strict = ours.MultipleNegativesRankingLoss(tiny_model(), strict=True)
    assert gradient(mine) == 0 and gradient(theirs) > 1e9
    assert torch.isclose(gradient(strict), gradient(theirs), rtol=1e-5)


def test_a_row_is_no_negative_of_itself_unless_strict() -> None:
    columns = [torch.randn(4, 3, generator=torch.Generator().manual_seed(i)) for i in range(2)]

    def loss(**options: Any) -> Tensor:
        made = ours.GISTEmbedLoss(tiny_model(), tiny_model(), temperature=0.1, margin=-3.0, **options)
        return made.compute_loss_from_embeddings(columns, columns)  # type: ignore[no-any-return]

    # the margin lets every pair count: logits of the row of query i are against all keys, queries and other keys
    q, k = (torch.nn.functional.normalize(column.double(), dim=1) for column in columns)
    itself = torch.eye(4, dtype=torch.bool)

    def dense(with_itself: bool) -> Tensor:
        among = [q @ q.T, k @ k.T]
        if not with_itself:
            among = [s.masked_fill(itself, -torch.inf) for s in among]
        return torch.nn.functional.cross_entropy(torch.cat([q @ k.T, *among], 1) / 0.1, torch.arange(4))

    assert torch.isclose(loss().double(), dense(False), rtol=1e-5)
    assert torch.isclose(loss(strict=True).double(), dense(True), rtol=1e-5)


def test_columns_that_do_not_fit_are_refused_in_words() -> None:
    made = ours.GISTEmbedLoss(tiny_model(), tiny_model())
    with pytest.raises(ValueError, match=r"^got 1 columns; expected two, or three .+\. Use Cached"):
        made([{}], None)
    with pytest.raises(ValueError, match=r"^got 2 columns and 1 of the guide; expected .+\. Embed every"):
        made.compute_loss_from_embeddings([torch.ones(2, 3)] * 2, [torch.ones(2, 3)])
