"""The survey of errors: what came, what was expected, how to mend it; and a mistake costs nothing but itself.

Here stand the words, whole, and what a refusal leaves behind.
``...`` in a message stands for any text.
"""

from __future__ import annotations

import ast
import inspect
import math
import re
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import fastcl
from fastcl import _across, cli, inspection
from fastcl import functional as F
from fastcl import pairwise as P
from fastcl.backends import forced
from fastcl.distributed import Ranks, all_rows, evaluate, shuffle_batch
from fastcl.hinges import pair_hinges
from fastcl.integrations import _dropin, patch
from fastcl.integrations.grad_cache import ContrastiveLossWithQueryClosure, SimpleContrastiveLoss
from fastcl.integrations.inf_cl import cal_inf_loss
from fastcl.integrations.solo_learn import moco_loss_func, simclr_loss_func, simsiam_loss_func
from fastcl.integrations.sup_contrast import SupConLoss
from fastcl.testing import CASES
from fastcl.trainer import errors
from fastcl.trainer.config import TrainConfig
from fastcl.trainer.errors import TrainError

# A way to mend is an order: its first word is one of these.
ORDERS = (
    "Ask|Call|Check|Choose|Continue|Convert|Cover|Create|Embed|Get|Give|Guide|Install|Leave|Lower|Make|Match|Mend|Name|"
    "Omit|Pass|Project|Reduce|Remove|Run|Say|See|Set|Stack|Start|Transpose|Try|Use|Warm|Write"
)
SHAPE = re.compile(
    rf"(?:rank \d+ cannot go on, and so no rank does: )?got .+?; expected .+?\. (?:{ORDERS})\b.+", re.DOTALL
)

Z, X, W = torch.randn(6, 4), torch.randn(5, 4), torch.randn(6, 3)
ROWS, LABELS, ON = torch.arange(6), torch.arange(6) // 2, torch.zeros(6)
FEATURES, MASK = torch.randn(3, 2, 4), torch.eye(6)
GIVEN = {"Z": Z, "X": X, "W": W, "ROWS": ROWS, "LABELS": LABELS, "ON": ON, "FEATURES": FEATURES, "MASK": MASK}
CACHED: dict[str, Any] = {"encoders": nn.Identity(), "inputs": [Z, Z], "chunk_size": 2}


def cached(**change: Any) -> Any:
    given = {**CACHED, **change}
    return fastcl.cached_loss(given["encoders"], given["inputs"], fastcl.NTXentLoss(), chunk_size=given["chunk_size"])


def second_derivative(loss: Callable[[torch.Tensor], torch.Tensor]) -> None:
    z = Z.clone().requires_grad_()
    (grad,) = torch.autograd.grad(loss(z), z, create_graph=True)
    grad.sum().backward()


def forced_to(name: str | None) -> None:
    with fastcl.use_backend(name):  # type: ignore[arg-type]
        pass


TENSOR = "a torch.Tensor (rows, features). Convert it first."
FLOATS = (
    "float16, bfloat16, float32 or float64. Call z.float(); complex and integer embeddings have no inner product here."
)
SAME = "the same number of features. Project both to one dimension."
PAIRED = "equal shapes: row i of one is the positive of row i of the other. Check that both come from the same batch."
PER_ROW = "shape (6,): one per row. Match it to the rows."
SCALAR = "a number or a 0-d tensor. Call float() on it."
TEMPERATURE = "a finite number above 0. Choose one; 0.05 to 0.5 are usual."
COUNT = "an integer of at least 1. Pass 1 or more."
REDUCTION = "one of 'mean', 'sum', 'none'. Choose one."
DISTANCE = "one of 'euclidean', 'squared', 'cosine'. Choose one."
FORM = "one of 'out', 'in'. Choose one."
STRATEGY = "one of 'absolute', 'relative'. Choose one."
VIEWS = "of rows: view 0 of every image, then view 1 of every image. Stack the views with torch.cat([view0, view1])."
PLAIN = "Use the function of the same name in fastcl.reference, which is plain"

T, V, R = TypeError, ValueError, RuntimeError
Row = tuple[type[Exception], str, Callable[[], Any]]

# fmt: off
FUNCTIONS: list[Row] = [
    (T, f"got z of type list; expected {TENSOR}", lambda: F.nt_xent([[1.0]], temperature=1)),
    (T, f"got z of dtype torch.int64; expected {FLOATS}", lambda: F.nt_xent(Z.long(), temperature=1)),
    (T, f"got z of dtype torch.complex64; expected {FLOATS}", lambda: F.nt_xent(Z + 0j, temperature=1)),
    (T, "got z of layout torch.sparse_coo; expected a dense tensor. Call z.to_dense().",
     lambda: F.nt_xent(Z.to_sparse(), temperature=1)),
    (V,
     "got z of shape (4,); expected two dimensions (rows, features). Use z.flatten(0, -2) to make every leading "
     "index a row.",
     lambda: F.nt_xent(Z[0], temperature=1)),
    (V, "got z of shape (1, 6, 4); expected two dimensions (rows, features). Use z.flatten(0, -2) ...",
     lambda: F.nt_xent(Z[None], temperature=1)),
    (V, f"got z of shape (5, 4); expected an even number {VIEWS}", lambda: F.nt_xent(X, temperature=1)),
    (V, f"got z of shape (6, 4); expected a multiple of 4 {VIEWS}", lambda: F.nt_xent(Z, views=4, temperature=1)),
    (V, "got views = 1; expected an integer of at least 2. Make two views of every image.",
     lambda: F.nt_xent(Z, views=1, temperature=1)),
    (V, f"got temperature = 0.0; expected {TEMPERATURE}", lambda: F.nt_xent(Z, temperature=0.0)),
    (V, f"got temperature = -1.0; expected {TEMPERATURE}", lambda: F.supcon(Z, LABELS, temperature=-1.0)),
    (V, f"got temperature = nan; expected {TEMPERATURE}", lambda: F.nt_xent(Z, temperature=math.nan)),
    (V, f"got temperature = inf; expected {TEMPERATURE}", lambda: F.dcl(Z, temperature=math.inf)),
    (T, f"got temperature of type str; expected {SCALAR}", lambda: F.nt_xent(Z, temperature="0.1")),
    (T, f"got temperature of type bool; expected {SCALAR}", lambda: F.nt_xent(Z, temperature=True)),
    (V, "got temperature of shape (6,); expected a number or a 0-d tensor. Use temperature.squeeze().",
     lambda: F.nt_xent(Z, temperature=ON)),
    (T, "got temperature of dtype torch.int64; expected a floating-point tensor. Call .float().",
     lambda: F.nt_xent(Z, temperature=ROWS[1])),
    (V, f"got reduction = 'avg'; expected {REDUCTION}", lambda: F.nt_xent(Z, temperature=1, reduction="avg")),
    (V, f"got weights of shape (5,); expected {PER_ROW}", lambda: F.nt_xent(Z, temperature=1, weights=ON[:5])),
    (V, f"got weights of shape (6, 4); expected {PER_ROW}", lambda: F.dcl(Z, temperature=1, weights=Z)),
    (T, "got weights of dtype torch.int64; expected floating-point numbers. Call .float() on it.",
     lambda: F.dcl(Z, temperature=1, weights=ROWS)),
    (V, "got ids of shape (6,); expected shape (3,): one per row. Match it to the rows.",
     lambda: F.nt_xent(Z, temperature=1, ids=LABELS)),
    (V, "got ids beside labels; expected one of the two. Omit ids: rows of one label are never negatives.",
     lambda: F.nt_xent(Z, temperature=1, labels=LABELS, ids=LABELS)),
    (T, "got labels of type list; expected a torch.Tensor of integers. Convert it first.",
     lambda: F.nt_xent(Z, temperature=1, labels=[0, 1])),
    (V, f"got q of shape (6, 4) and k of shape (5, 4); expected {PAIRED}", lambda: F.info_nce(Z, X, temperature=1)),
    (V, f"got q of shape (6, 4) and k of shape (6, 3); expected {SAME}", lambda: F.info_nce(Z, W, temperature=1)),
    (V, "got q on cpu and k on meta; expected one device. Call k.to(q.device).",
     lambda: F.info_nce(Z, Z.to("meta"), temperature=1)),
    (V, f"got q of shape (6, 4) and negatives of shape (6, 3); expected {SAME}",
     lambda: F.info_nce(Z, Z, W, temperature=1)),
    (V, "got symmetric=True with negatives; expected in-batch negatives alone. Omit one of them.",
     lambda: F.info_nce(Z, Z, X, symmetric=True, temperature=1)),
    (V, "got ids with negatives; expected in-batch negatives, which have ids. Omit one of them.",
     lambda: F.info_nce(Z, Z, X, ids=ROWS, temperature=1)),
    (V, "got label_smoothing with ids; expected one of the two. Omit one: smoothing spreads over all keys.",
     lambda: F.info_nce(Z, Z, label_smoothing=0.1, ids=ROWS, temperature=1)),
    (V, "got label_smoothing = 1.5; expected a number from 0.0 to 1.0. Pass a plain float in this range.",
     lambda: F.info_nce(Z, Z, label_smoothing=1.5, temperature=1)),
    (V, "got hardness = inf; expected a finite number. Check how it was computed.",
     lambda: F.info_nce(Z, Z, hardness=math.inf, temperature=1)),
    (V, "got own_negatives of shape (1, 5, 4); expected shape (6, H, 4). Give every query a group of its own.",
     lambda: F.info_nce(Z, Z, own_negatives=X[None], temperature=1)),
    (V, "got own_negatives of type list; expected shape (6, H, 4). Give every query a group of its own.",
     lambda: F.info_nce(Z, Z, own_negatives=[X], temperature=1)),
    (T, "got log_q of type NoneType; expected a torch.Tensor of floating-point numbers. Convert it first.",
     lambda: F.in_batch_softmax(Z, Z, log_q=None, temperature=1)),
    (V, f"got log_q of shape (5,); expected {PER_ROW}", lambda: F.in_batch_softmax(Z, Z, log_q=ON[:5], temperature=1)),
    (V, f"got guide_q of shape (6, 4) and guide_k of shape (5, 4); expected {PAIRED}",
     lambda: F.gist(Z, Z, Z, X, temperature=1)),
    (V, f"got margin_strategy = 'x'; expected {STRATEGY}",
     lambda: F.gist(Z, Z, Z, Z, margin_strategy="x", temperature=1)),
    (V, "got negatives without their guide, or the reverse; expected both or neither. Pass both.",
     lambda: F.gist(Z, Z, Z, Z, negatives=X, temperature=1)),
    (V, "got index of shape (6,); expected shape (6, any): a row of integers per row. Match it to the rows.",
     lambda: F.sampled_info_nce(Z, X, LABELS, LABELS, temperature=1)),
    (V, "got scale = 0; expected any other number. Choose one: with 0 all logits are equal.",
     lambda: F.clip(Z, Z, scale=0.0)),
    (T, "got ids of dtype torch.float32; expected integers. Call .long() on it.",
     lambda: F.clip(Z, Z, ids=ON, scale=1.0)),
    (T, f"got bias of type str; expected {SCALAR}", lambda: F.siglip(Z, Z, scale=1.0, bias="0")),
    (V, f"got labels of shape (5,); expected {PER_ROW}", lambda: F.supcon(Z, LABELS[:5], temperature=1)),
    (V, "got labels on meta; expected the device of the rows, cpu. Call .to(...) on it.",
     lambda: F.supcon(Z, LABELS.to("meta"), temperature=1)),
    (V, f"got form = 'both'; expected {FORM}",
     lambda: F.supcon(Z, LABELS, form="both", temperature=1)),
    (V, "got anchors = 7; expected an integer from 0 to 6. Omit it for all rows.",
     lambda: F.supcon(Z, LABELS, anchors=7, temperature=1)),
    (T, "got labels of dtype torch.float32; expected integers. Call .long() on it.",
     lambda: F.supcon(Z, ON, temperature=1)),
    (V, f"got base_temperature = 0.0; expected {TEMPERATURE}",
     lambda: F.supcon(Z, LABELS, base_temperature=0.0, temperature=1)),
    (V, "got alpha = 0.0; expected a finite number above 0. Check how it was computed.",
     lambda: F.multi_similarity(Z, LABELS, alpha=0.0)),
    (V, "got sigma = 0.0; expected a number from 5e-324 to inf. Pass a plain float in this range.",
     lambda: F.dclw(Z, sigma=0.0, temperature=1)),
    (V, "got tau_plus = 1.0; expected a number from 0.0 to 0.9999999403953552. Pass a plain float in this range.",
     lambda: F.debiased_nt_xent(Z, tau_plus=1.0, temperature=1)),
    (V, "got beta = -1.0; expected a number from 0.0 to inf. Pass a plain float in this range.",
     lambda: F.hard_nt_xent(Z, beta=-1.0, temperature=1)),
    (V, "got beta as a tensor; expected a number from 0.0 to inf. Pass a plain float in this range.",
     lambda: F.hard_nt_xent(Z, beta=ON[0], temperature=1)),
    (V, "got margin = nan; expected a finite number. Check how it was computed.",
     lambda: F.triplet(Z, Z, Z, margin=math.nan)),
    (V, f"got distance = 'city'; expected {DISTANCE}", lambda: F.triplet_hard(Z, LABELS, margin=0.2, distance="city")),
    (T, f"got margin of type str; expected {SCALAR}", lambda: F.triplet_all(Z, LABELS, margin="0.2")),
    (T, f"got margin of type NoneType; expected {SCALAR}", lambda: F.triplet_all(Z, LABELS, margin=None)),
    (T, "got normalize of type str; expected True or False. Pass one of the two.",
     lambda: F.nt_xent(Z, temperature=1, normalize="no")),
    (T, "got symmetric = 2; expected True or False. Pass one of the two.",
     lambda: F.info_nce(Z, Z, temperature=1, symmetric=2)),
    (V, "got anchors = '1'; expected an integer from 0 to 6. Omit it for all rows.",
     lambda: F.supcon(Z, LABELS, anchors="1", temperature=1)),
    (T, "got weights of dtype torch.bool; expected floating-point numbers. Call .float() on it.",
     lambda: F.clip(Z, Z, scale=1.0, weights=LABELS > 0)),
    (V, f"got z of shape (6, 4) and extra_negatives of shape (6, 3); expected {SAME}",
     lambda: F.nt_xent(Z, temperature=1, extra_negatives=W)),
    (T, "got similar of dtype torch.bool; expected integers. Call .long() on it.",
     lambda: F.siamese(Z, Z, LABELS > 0, margin=1.0)),
    (V, f"got z of shape (6, 4) and proxies of shape (6, 3); expected {SAME}", lambda: F.cosface(Z, W, LABELS)),
    (R, f"got a second derivative ...; expected one backward pass. {PLAIN} differentiable torch.",
     lambda: second_derivative(lambda z: F.nt_xent(z, temperature=1))),
    (R,
     f"got a torch.func transform (vmap, grad, jvp) around a fused fastcl loss; expected plain autograd. {PLAIN} "
     "torch.",
     lambda: torch.func.grad(lambda z: F.nt_xent(z, temperature=1))(Z)),
    (V, "got reduction = 'avg'; expected 'mean', 'sum' or 'none'. Choose one.",
     lambda: fastcl.reference.nt_xent(Z, temperature=1, reduction="avg")),
]

PRIMITIVES: list[Row] = [
    (V, f"got drop (of the columns) of shape (6,); expected {PER_ROW.replace('6', '5')}",
     lambda: P.pair_logsumexp(Z, X, scale=1.0, drop=ROWS)),
    (T,
     "got drop of 1 parts; expected one tensor of keys, or a tuple of two. Pass drop=(keys of rows, keys of "
     "columns).",
     lambda: P.pair_logsumexp(Z, X, scale=1.0, drop=(ROWS,))),
    (T, "got only (of the rows) of dtype torch.float32; expected integers. Call .long() on it.",
     lambda: P.pair_logsumexp(Z, scale=1.0, only=ON)),
    (T, "got only (of the rows) of dtype torch.bool; expected integers. Call .long() on it.",
     lambda: P.pair_logsumexp(Z, scale=1.0, only=ON > 0)),
    (V, f"got drop (of the rows) of shape (5,); expected {PER_ROW}",
     lambda: P.pair_logsumexp(Z, X, scale=1.0, drop=(ROWS[:5], ROWS[:5]))),
    (V, "got drop (of the rows) on meta; expected the device of the rows, cpu. Call .to(...) on it.",
     lambda: P.pair_logsumexp(Z, scale=1.0, drop=ROWS.to("meta"))),
    (V, f"got row_bias of shape (5,); expected {PER_ROW}",
     lambda: P.pair_logsumexp(Z, X, scale=1.0, row_bias=ON[:5])),
    (V, "got scale = 0; expected any other number. Choose one: with 0 all logits are equal.",
     lambda: P.pair_logsumexp(Z, X, scale=0.0)),
    (T, "got col_bias of dtype torch.int64; expected floating-point numbers. Call .float() on it.",
     lambda: P.pair_logsumexp(Z, X, scale=1.0, col_bias=ROWS[:5])),
    (V, "got row_bias = nan; expected a finite number. Check how it was computed.",
     lambda: P.pair_softplus_sum(Z, X, scale=1.0, row_bias=math.nan)),
    (V, f"got ceiling of shape (1,); expected {PER_ROW}", lambda: P.pair_logsumexp(Z, X, scale=1.0, ceiling=ON[:1])),
    (T,
     "got guide of 2 parts; expected a tuple of three tensors. Pass guide=(features of rows, features of columns, "
     "limit of every row).",
     lambda: P.pair_logsumexp(Z, X, scale=1.0, guide=(Z, X))),
    (T, "got guide of type Tensor; expected a tuple of three tensors. Pass guide=(features of rows, ...",
     lambda: P.pair_logsumexp(Z, X, scale=1.0, guide=Z)),
    (V, f"got guide (of the rows) of shape (6, 4) and guide (of the columns) of shape (5, 2); expected {SAME}",
     lambda: P.pair_logsumexp(Z, X, scale=1.0, guide=(Z, X[:, :2], ON))),
    (V, f"got guide (limits) of shape (5,); expected {PER_ROW}",
     lambda: P.pair_logsumexp(Z, X, scale=1.0, guide=(Z, X, ON[:5]))),
    (V,
     "got guide (of the rows) of shape (5, 4) for 6 rows; expected one row of guide features per row. Guide the "
     "same batch.",
     lambda: P.pair_logsumexp(Z, X, scale=1.0, guide=(X, X, ON))),
    (V, f"got q of shape (6, 4) and k of shape (6, 3); expected {SAME}",
     lambda: P.pair_softplus_total(Z, W, scale=1.0)),
    (V, f"got topk = 0; expected {COUNT}", lambda: P.pair_topk(Z, topk=0)),
    (V, f"got columns of shape (5,); expected {PER_ROW}", lambda: P.listed_dot(Z, X, LABELS, LABELS[:5])),
    (T, "got index of type list; expected a torch.Tensor of integers. Convert it first.",
     lambda: P.gathered_dot(Z, X, [[0]])),
    (V, "got x of shape (4,); expected two dimensions (rows, features). Use x.flatten(0, -2) ...",
     lambda: P.l2_normalize(Z[0])),
    (V, "got v of shape (6, 4); expected 5 rows, one per column. Give every column what is to be averaged.",
     lambda: inspection.pair_softmax_matmul(Z, X, Z, scale=1.0)),
    (V, f"got positive of shape (5,); expected {PER_ROW}", lambda: inspection.pair_statistics(ON[:5], Z, X, scale=1.0)),
    (V,
     "got backend 'numpy'; expected one of native, chunked, triton, auto. Mend the name given to "
     "fastcl.use_backend or FASTCL_BACKEND.",
     lambda: forced_to("numpy")),
    (V, "got backend None; expected one of native, chunked, triton, auto. Mend the name ...", lambda: forced_to(None)),
    (T, "got x of type int; expected a torch.Tensor (rows, features). Pass such as a loss is given.",
     lambda: fastcl.available_backends(3)),
    (T, "got loss of type int; expected a module or a function. Pass what is to be called.",
     lambda: fastcl.explain(3, Z)),
    (T, "got rows of type int; expected a slice. Pass slice(start, stop), or leave it out for all.",
     lambda: inspection.similarity_tile(Z, rows=3, scale=1.0)),
    (V,
     "got the number of parts = 0; expected an integer of at least 1. Pass the log-sum-exp of every block of columns.",
     lambda: P.merge_logsumexp()),
    (V, "got part 1 of shape (5,); expected shape (6,): one per row. Match it to the rows.",
     lambda: P.merge_logsumexp(ON, ON[:5])),
    (T, "got both of type Tensor; expected True or False. Pass one of the two.",
     lambda: P.pair_logsumexp(Z, X, scale=1.0, both=ON)),
    (V, "got the name 'nt_xnet'; expected a function of fastcl.functional or fastcl.pairwise. Check the spelling.",
     lambda: fastcl.explain("nt_xnet", Z)),
]

MODULES: list[Row] = [
    (V, f"got temperature = 0; expected {TEMPERATURE}", lambda: fastcl.NTXentLoss(0)),
    (V, f"got reduction = 'avg'; expected {REDUCTION}", lambda: fastcl.SigLIPLoss(reduction="avg")),
    (T,
     "got learn_temperature=True with a tensor; expected a number to start from. Pass a number, or pass your own "
     "nn.Parameter without learn_temperature.",
     lambda: fastcl.NTXentLoss(ON[0], learn_temperature=True)),
    (T,
     "got even without process_group; expected options of this loss. Pass "
     "process_group=torch.distributed.group.WORLD, or leave them out.",
     lambda: fastcl.NTXentLoss(even=True)),
    (V, f"got view0 of shape (6, 4) and view1 of shape (5, 4); expected {PAIRED}", lambda: fastcl.NTXentLoss()(Z, X)),
    (V, "got 3 views; expected two. Use NTXentLoss or SupConLoss for more views.",
     lambda: fastcl.DCLLoss()(torch.stack([Z, Z, Z], 1))),
    (V, f"got image of shape (6, 4) and text of shape (5, 4); expected {PAIRED}", lambda: fastcl.CLIPLoss()(Z, X, 1.0)),
    (V, "got contrast_mode = 'two'; expected one of 'all', 'one'. Choose one.",
     lambda: fastcl.SupConLoss(contrast_mode="two")),
    (T, f"got z of type int; expected {TENSOR}", lambda: fastcl.SupConLoss()(3, LABELS)),
    (V, "got z of shape (4,); expected two dimensions (rows, features). Use z.flatten(0, -2) ...",
     lambda: fastcl.SupConLoss()(Z[0], LABELS[:1])),
    (V, "got labels and a mask; expected one of the two. Pass one: both say which rows belong together.",
     lambda: fastcl.SupConLoss()(Z, LABELS, mask=MASK)),
    (V, "got mask of shape (5, 6); expected shape (6, 6): which rows belong together. Pass that, or labels.",
     lambda: fastcl.SupConLoss()(Z, mask=MASK[:5])),
    (V,
     "got a mask that is none of classes; expected an equivalence: ... Pass labels, or a class for each group: "
     "positives are classes here, so that no matrix is needed.",
     lambda: fastcl.SupConLoss()(Z, mask=0 * MASK)),
    (V, "got mining = 'easy'; expected one of 'hard', 'semi-hard', 'all'. Choose one.",
     lambda: fastcl.BatchTripletLoss(mining="easy")),
    (V, f"got form = 'mean'; expected {FORM}", lambda: fastcl.SupConLoss(form="mean")),
    (V, f"got margin_strategy = 'half'; expected {STRATEGY}", lambda: fastcl.GISTLoss(margin_strategy="half")),
    *((V, f"got distance = 'city'; expected {DISTANCE}", partial(module, distance="city"))
      for module in (fastcl.BatchTripletLoss, fastcl.TripletLoss, fastcl.SiameseLoss)),
    (V, f"got dim = 0; expected {COUNT}", lambda: fastcl.MoCoLoss(0)),
    (V, f"got classes = 0; expected {COUNT}", lambda: fastcl.CosFaceLoss(0, 4)),
    (V, f"got dim = True; expected {COUNT}", lambda: fastcl.CosFaceLoss(4, True)),
    (V, f"got size = 2.5; expected {COUNT}", lambda: fastcl.MoCoLoss(4, 2.5)),
    (V, f"got size = True; expected {COUNT}", lambda: fastcl.FeatureQueue(4, True)),
    (V, "got budget = 0; expected an integer of at least 1. Pass the tokens that fit into memory.",
     lambda: fastcl.token_chunks([3, 4], 0)),
    (T,
     "got lengths of type int ('int' object is not iterable); expected one number of tokens per row. Pass a list or a "
     "vector.",
     lambda: fastcl.token_chunks(3, 4)),
    (T, "got loss of type int; expected a module or a function. Pass what is to be called.",
     lambda: fastcl.cached_loss(nn.Identity(), [Z], 3, chunk_size=2)),
    (T, "got encoders of type int; expected modules or functions. Pass one for all towers, or a list of one for each.",
     lambda: cached(encoders=3)),
    (T,
     "got process_group of type str; expected a process group of this rank. Pass torch.distributed.group.WORLD, once "
     "it is there.",
     lambda: fastcl.NTXentLoss(process_group="world")),
    (V, "got chunk_size = 0; expected at least 1, 'auto', or sizes. Pass the rows that fit into memory.",
     lambda: cached(chunk_size=0)),
    (T, "got chunk_size of type float; expected rows, 'auto', or sizes. Pass the rows that fit into memory.",
     lambda: cached(chunk_size=2.5)),
    (V,
     "got chunks of [4, 4] rows for 6; expected sizes of at least 1 that add up. Use token_chunks, which makes "
     "such.",
     lambda: cached(chunk_size=[4, 4])),
    (V, "got 1 chunk sizes for 2 towers; expected 2, or one. Pass one chunk size for all towers, or one each.",
     lambda: cached(chunk_size=[[3, 3]])),
    (V, "got 1 encoders for 2 towers; expected 2, or one. Pass one encoder for all towers, or one each.",
     lambda: cached(encoders=[nn.Identity()])),
    (T,
     "got inputs of a tower without a tensor (int); expected tensors with one row per example. Pass [x] for one "
     "tower.",
     lambda: cached(inputs=[Z, 3])),
    (V,
     "got tensors of 5 and 6 rows in one tower; expected one number of rows. Pass what all rows share by a closure "
     "of the encoder.",
     lambda: cached(inputs=[(Z, X), Z])),
    (V, "got (4,) from the encoder for 2 rows; expected tensors with one row for each. Reduce over rows in the loss.",
     lambda: cached(encoders=lambda x: x.sum(0))),
    (R,
     "got a second derivative (create_graph=True) through cached_loss; expected one backward pass: ... Call the "
     "loss without chunks.",
     lambda: second_derivative(lambda z: cached(inputs=[z, z]))),
]

INTEGRATIONS: list[Row] = [
    (V, "got the library 'torchmetrics'; expected one of lightly, ... Use its import name, with underscores.",
     lambda: patch("torchmetrics")),
    (ImportError,
     "got no module no_such_library; expected the library whose losses are replaced. Get it: pip install it.",
     lambda: _dropin.upstream("no_such_library.losses", "pip install it")),
    (V, "got features of shape (6, 4); expected (images, views, ...). Use features.unsqueeze(1) for a single view.",
     lambda: SupConLoss()(Z)),
    (V, "got labels and mask; expected one of the two. Omit labels: a mask says all that they say.",
     lambda: SupConLoss()(FEATURES, LABELS[:3], MASK[:3, :3])),
    (V, "got contrast_mode = 'both'; expected 'all' or 'one'. Say which views are anchors.",
     lambda: SupConLoss(contrast_mode="both")(FEATURES)),
    (V, "got 6 labels for 3 images; expected one label per image. Pass each once, not once per view.",
     lambda: SupConLoss()(FEATURES, LABELS)),
    (V, "got mask of shape (6, 6); expected (3, 3). Pass a row per image, not per view.",
     lambda: SupConLoss()(FEATURES, mask=MASK)),
    (T, "got z; expected z and indexes, or z1 and z2. Pass both arguments of one form.", lambda: simclr_loss_func(Z)),
    (T,
     "got extra_pos_mask of dtype torch.float32; expected booleans, or integers 0 and 1. Convert it: positives "
     "have no weights here.",
     lambda: simclr_loss_func(Z[:3], Z[3:], 0.1, MASK)),
    (V,
     "got p of shape (6, 4) and z of shape (5, 4); expected shapes of which one extends the other. Check that both "
     "come from the same batch.",
     lambda: simsiam_loss_func(Z, X)),
    (T, "got features of type int; expected a torch.Tensor (images, views, ...). Convert it first.",
     lambda: SupConLoss()(3)),
    (V, f"got base_temperature = 0; expected {TEMPERATURE}", lambda: SupConLoss(base_temperature=0)(FEATURES)),
    (V, "got scale of shape (6,); expected one number, or shape (6, 1). Use scale.unsqueeze(1).",
     lambda: cal_inf_loss(Z, Z, scale=ON)),
    (V, "got n_hard_negatives = -1; expected an integer of at least 0. Pass how many keys follow each positive.",
     lambda: SimpleContrastiveLoss(-1)),
    (V,
     "got target of shape (6,); expected shape (6, 5) of probabilities. Pass one for every query and key, or "
     "integers.",
     lambda: SimpleContrastiveLoss()(Z, X, ON)),
    (V, "got queue of shape (4,); expected a matrix (features, keys). Transpose it: keys are its columns.",
     lambda: moco_loss_func(Z, Z, Z[0])),
    (V, "got ...; expected a row of k for every row of q. Pass labels, which say which.", lambda: cal_inf_loss(Z, X)),
    (V, "got 6 queries and 5 keys; expected 1 keys per query. Set n_hard_negatives ..., or pass a target.",
     lambda: SimpleContrastiveLoss()(Z, X)),
    (V, "got 3 tensors; expected queries and keys, or keys alone. Pass 1 or 2.",
     lambda: ContrastiveLossWithQueryClosure()(Z, Z, Z)),
    (V, "got keys without queries; expected queries, or a query_closure. Pass one of the two.",
     lambda: ContrastiveLossWithQueryClosure()(Z)),
]

RANKS: list[Row] = [
    (V, "got strategy = 'tree'; expected one of 'auto', 'gather', 'ring'. Choose one.",
     lambda: Ranks(dist.group.WORLD, strategy="tree")),
    (V, "got wire_dtype = torch.int8; expected a floating-point dtype. Pass torch.bfloat16, or omit it.",
     lambda: Ranks(dist.group.WORLD, wire_dtype=torch.int8)),
    (V, "got wire_dtype = 'bf16'; expected a floating-point dtype. Pass torch.bfloat16, or omit it.",
     lambda: Ranks(dist.group.WORLD, wire_dtype="bf16")),
    (T, "got process_group of type NoneType; expected a process group of this rank. Pass ...", lambda: Ranks(None)),
    (T, "got function of type int; expected a module or a function. Pass what is to be called.",
     lambda: evaluate(3, Ranks(dist.group.WORLD), Z)),
    (T, "got ranks of type ProcessGroup; expected fastcl.distributed.Ranks. Pass Ranks(process_group).",
     lambda: evaluate(F.nt_xent, dist.group.WORLD, Z, temperature=1)),
    (T, "got x of type int; expected a torch.Tensor (rows, ...). Convert it first.",
     lambda: all_rows(3, dist.group.WORLD)),
    (V, "got x of shape (); expected shape (rows, ...). Pass what this rank has, a row per image.",
     lambda: all_rows(ON[0], dist.group.WORLD)),
    (T, "got even of type str; expected True or False. Pass one of the two.",
     lambda: all_rows(Z, dist.group.WORLD, even="no")),
    (T, "got generator of type int; expected a torch.Generator. Pass one, or leave it out for torch's own.",
     lambda: shuffle_batch(Z, dist.group.WORLD, generator=3)),
    (V, f"got z of shape (5, 4); expected an even number {VIEWS}",
     lambda: fastcl.NTXentLoss(process_group=dist.group.WORLD)(X)),
    (V, f"got labels of shape (4,); expected {PER_ROW}",
     lambda: fastcl.SupConLoss(process_group=dist.group.WORLD)(Z, LABELS[:4])),
    (V, f"got q of shape (6, 4) and negatives of shape (8, 3); expected {SAME}",
     lambda: fastcl.MoCoLoss(3, 8, process_group=dist.group.WORLD)(Z, Z)),
]

CONFIGS: list[tuple[dict[str, Any], str]] = [
    ({"steps": 0}, "got steps = 0; expected 1 or more. Choose a larger number."),
    ({"steps": "10"}, "got steps = '10'; expected int. Give one."),
    ({"batch_size": 1}, "got batch_size = 1; expected 2 or more. Choose a larger number."),
    ({"method": "simsiam2"}, "got method = 'simsiam2'; expected one of ... Choose one."),
    ({"temperature": math.inf}, "got temperature = inf; expected a finite number above 0. Choose another."),
    ({"warmup_steps": 9, "steps": 5}, "got warmup_steps = 9 for 5 steps; expected no more. Warm up less."),
    ({"accumulate": 3},
     "got accumulate = 3 for a batch size of 256; expected equal micro-batches of at least 2 images. Choose a "
     "divisor."),
    ({"local_crops": 2, "method": "moco"},
     "got local_crops = 2 for moco; expected a method ...: simclr, ... Choose one, or leave them out."),
    ({"control": "frozen-queue"},
     "got control = 'frozen-queue' for simclr; expected moco, which has one. Choose --method moco."),
    ({"bn_splits": 2, "method": "byol"}, "got bn_splits = 2 for byol; expected moco, ... Leave one out."),
]

COMMANDS: list[tuple[list[str], str]] = [
    (["bench", "--rows", "5"], "got rows = 5; expected an even number of rows, at least 2. Choose another batch size."),
    (["bench", "--rows", "8", "--rounds", "0"], "got rounds = 0; expected 1 or more. Choose a larger number."),
    (["bench", "--json", "none/x.json"],
     "got --json none/x.json; expected a file in a folder that exists. Create none first."),
    (["train", "--steps", "0"], "got steps = 0; expected 1 or more. Choose a larger number."),
    (["train", "--set", "steps"],
     "got --set steps; expected KEY=VALUE with a key of config.json. See fastcl train --help."),
    (["train", "--preset", "none"], "got preset 'none'; expected one of ... Choose one."),
    (["train", "--resume", "none"],
     "got no checkpoint.pt in none; expected a run with a checkpoint. Start one with: fastcl train"),
    (["train", "--resume", "none", "--steps", "3"],
     "got --steps with --resume; expected --resume alone: the run keeps its settings. Leave it out."),
    (["report", "none"],
     "got no checkpoint.pt in none; expected a run with a checkpoint. Start one with: fastcl train"),
    (["export", "none", "--to", "x.tar"], "got x.tar; expected a name that ends in .pt, ... Choose the format."),
]
# fmt: on


def is_like(message: str, template: str) -> bool:
    return re.fullmatch(".+?".join(map(re.escape, template.split("..."))), message, re.DOTALL) is not None


def refused(kind: type[Exception], template: str, call: Callable[[], Any]) -> None:
    """The call fails with this error, in these words and in the house's shape, and leaves all as it was."""
    before = {name: t.clone() for name, t in GIVEN.items()}
    with pytest.raises(kind) as caught:
        call()
    message = str(caught.value)
    assert caught.type is kind
    assert is_like(message, template), message
    assert SHAPE.fullmatch(message), message
    for name, t in GIVEN.items():
        assert torch.equal(t, before[name]) and t.grad is None and not t.requires_grad, name
    assert forced() == "auto" and _across.current() is None


def ids(rows: list[Row]) -> list[str]:
    return [f"{number}: {template.partition(';')[0]}" for number, (_, template, _) in enumerate(rows)]


ROWS_OF_ONE_PROCESS = [*FUNCTIONS, *PRIMITIVES, *MODULES, *INTEGRATIONS]


@pytest.mark.parametrize(("kind", "template", "call"), ROWS_OF_ONE_PROCESS, ids=ids(ROWS_OF_ONE_PROCESS))
def test_a_mistake_is_refused_in_words(kind: type[Exception], template: str, call: Callable[[], Any]) -> None:
    refused(kind, template, call)


@pytest.fixture(scope="module")
def alone() -> Iterator[None]:
    """A process group of this process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize(("kind", "template", "call"), RANKS, ids=ids(RANKS))
def test_a_mistake_over_ranks_is_refused_in_words(
    alone: None, kind: type[Exception], template: str, call: Callable[[], Any]
) -> None:
    refused(kind, template, call)


@pytest.mark.parametrize(("settings", "template"), CONFIGS, ids=[str(settings) for settings, _ in CONFIGS])
def test_a_mistake_in_a_config_is_refused_in_words(settings: dict[str, Any], template: str) -> None:
    refused(TrainError, template, lambda: TrainConfig(**settings).resolved())


@pytest.mark.parametrize(("words", "template"), COMMANDS, ids=[" ".join(words) for words, _ in COMMANDS])
def test_a_mistake_at_the_terminal_is_one_line_and_writes_nothing(
    words: list[str],
    template: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(words) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1
    message = printed.err.removeprefix(f"fastcl {words[0]}: ").rstrip("\n")
    assert is_like(message, template), message
    assert SHAPE.fullmatch(message), message
    assert not list(tmp_path.iterdir())


# Values of types that nothing takes, and others that some arguments take.
NEVER: list[Any] = ["1", object(), [1.0], {}, (ROWS,)]
SOMETIMES: list[Any] = [
    None, True, 3, -2, 2.5, math.nan, ROWS, ON, ON > 0, ON + 0j, Z + 0j, Z.to_sparse(), FEATURES, ON[0], ROWS[0],
]  # fmt: skip
POINTERS = torch.zeros(6, 2, dtype=torch.long)
PAIR, LABELLED = (Z, Z), (Z, LABELS)
Call = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]
CALLS: dict[str, Call] = {
    **{case.label: (getattr(F, case.name), *case.inputs(6 // case.rows(1)[0], 4)) for case in CASES},
    "pair_logsumexp": (P.pair_logsumexp, (Z, X), {"scale": 2.0}),
    "pair_softplus_sum": (P.pair_softplus_sum, (Z, X), {"scale": 2.0}),
    "pair_softplus_total": (P.pair_softplus_total, (Z, X), {"scale": 2.0}),
    "pair_topk": (P.pair_topk, (Z, X), {"topk": 2}),
    "contrastive": (P.contrastive, PAIR, {"scale": 2.0}),
    "merge_logsumexp": (lambda part, other: P.merge_logsumexp(part, other), (ON, ON), {}),
    "row_dot": (P.row_dot, PAIR, {}),
    "gathered_dot": (P.gathered_dot, (Z, Z, POINTERS), {}),
    "listed_dot": (P.listed_dot, (Z, Z, LABELS, LABELS), {}),
    "scale_gradient": (P.scale_gradient, (Z, 2.0), {}),
    "l2_normalize": (P.l2_normalize, (Z,), {}),
    "similarity_tile": (lambda q, k, rows, cols, scale: inspection.similarity_tile(q, k, rows, cols, scale=scale),
                        (Z, X, slice(2), slice(3), 2.0), {}),
    "pair_softmax_matmul": (lambda q, k, v, scale: inspection.pair_softmax_matmul(q, k, v, scale=scale),
                            (Z, X, X, 2.0), {}),
    "pair_statistics": (inspection.pair_statistics, (ON, Z, X), {"scale": 2.0}),
    "pair_hinges": (pair_hinges, (Z, Z, LABELS, LABELS), {"positive_margin": 0.1, "negative_margin": 1.0}),
    "simclr_loss_func": (lambda z, indexes, temperature: simclr_loss_func(z, indexes, temperature),
                         (Z, LABELS, 0.1), {}),
    "moco_loss_func": (moco_loss_func, (Z, Z, Z.T), {}),
    "simsiam_loss_func": (lambda p, z: simsiam_loss_func(p, z), PAIR, {}),
    "SupContrast": (lambda features, labels: SupConLoss()(features, labels), (FEATURES, ROWS[:3]), {}),
    "GradCache": (lambda n, x, y, target, reduction: SimpleContrastiveLoss(n)(x, y, target, reduction),
                  (0, Z, Z, None, "mean"), {}),
    "cal_inf_loss": (lambda q, k, labels, scale, strict: cal_inf_loss(q, k, labels, scale, strict=strict),
                     (Z, Z, LABELS, 2.0, False), {}),
    "available_backends": (fastcl.available_backends, (Z,), {}),
    "explain": (lambda loss: fastcl.explain(loss, Z, temperature=1.0), ("nt_xent",), {}),
    "cached_loss": (lambda encoders, loss, chunk_size: fastcl.cached_loss(encoders, PAIR, loss, chunk_size=chunk_size),
                    (nn.Identity(), fastcl.NTXentLoss(), 2), {}),
}  # fmt: skip
ARGUMENTS: dict[str, tuple[dict[str, Any], tuple[Any, ...]]] = {  # of the modules: their own, and those of a call
    "NTXentLoss": ({}, PAIR), "DCLLoss": ({}, PAIR), "DCLWLoss": ({}, PAIR), "HardNTXentLoss": ({}, PAIR),
    "InfoNCELoss": ({}, PAIR), "InBatchSoftmaxLoss": ({}, (Z, Z, ON)), "GISTLoss": ({}, (Z, Z, Z, Z)),
    "SampledInfoNCELoss": ({}, (Z, Z, LABELS, POINTERS)), "MoCoLoss": ({"dim": 4, "queue_size": 8}, PAIR),
    "MoCoV3Loss": ({}, (Z, Z, Z, Z)), "CLIPLoss": ({}, (Z, Z, 2.0)), "SigLIPLoss": ({}, (Z, Z, 2.0, -1.0)),
    "SupConLoss": ({}, LABELLED), "SINCERELoss": ({}, LABELLED), "MultiSimilarityLoss": ({}, LABELLED),
    "BatchTripletLoss": ({}, LABELLED), "TripletLoss": ({}, (Z, Z, Z)), "SiameseLoss": ({}, (Z, Z, LABELS)),
    "NPairLoss": ({}, PAIR), "NegativeCosineLoss": ({}, PAIR), "BYOLLoss": ({}, PAIR),
    "CosFaceLoss": ({"classes": 6, "dim": 4}, LABELLED), "FeatureQueue": ({"dim": 4, "size": 8}, ()),
}  # fmt: skip


def of_module(name: str) -> Iterator[tuple[str, Callable[[Any], Any]]]:
    """Every argument of a module and of a call of it, and what passes a value for that; first a call that is right."""
    kind, (given, args) = getattr(fastcl, name), ARGUMENTS[name]

    def made(**change: Any) -> Any:
        module = kind(**{**given, **change})
        return module(*args) if args else module

    made()
    for base in kind.__mro__[: kind.__mro__.index(nn.Module)]:
        for argument in inspect.signature(base.__init__).parameters:
            if argument not in ("self", "options", "ranks"):
                yield argument, lambda value, argument=argument: made(**{argument: value})
    if args:
        yield from of_function(kind(**given).forward, args, {})


def of_function(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Iterator[tuple[str, Callable[[Any], Any]]]:
    """Every argument of a function, and what passes a value for that; first a call that is right."""
    function(*args, **kwargs)
    signature = inspect.signature(function)
    given = signature.bind(*args, **kwargs).arguments
    for name, parameter in signature.parameters.items():
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            yield name, lambda value, name=name: function(**{**given, name: value})


def refuses(what: str, call: Callable[[Any], Any], value: Any) -> bool:
    """Whether the value is refused, in the house's shape; whatever else is raised is a failure."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, of complex numbers and integers of one element
        try:
            call(value)
        except Exception as error:
            said = SHAPE.fullmatch(str(error)) is not None
            assert isinstance(error, TypeError | ValueError) and said, f"{what}={value!r}: {error!r}"
            return True
    return False


@pytest.mark.parametrize("name", [*CALLS, *ARGUMENTS])
def test_a_value_of_a_wrong_type_is_refused_in_words(name: str) -> None:
    arguments = of_function(*CALLS[name]) if name in CALLS else of_module(name)
    for argument, call in arguments:
        accepted = [value for value in NEVER if not refuses(argument, call, value)]
        assert not accepted, f"{argument} takes {accepted}"
        for value in SOMETIMES:
            refuses(argument, call, value)


def test_every_public_name_that_takes_rows_is_asked() -> None:
    losses = {name for name in fastcl.__all__ if name.endswith("Loss")}
    assert losses <= ARGUMENTS.keys()
    assert {case.name for case in CASES} == set(F.__all__)
    primitives = {name for name, value in vars(P).items() if inspect.isfunction(value) and value.__doc__}
    assert {name for name in primitives if not name.startswith("_") and "Args:" in getattr(P, name).__doc__} <= {
        *CALLS, "pair_argmax",
    }  # fmt: skip


def test_the_survey_is_wide() -> None:
    assert len(ROWS_OF_ONE_PROCESS) + len(RANKS) + len(CONFIGS) + len(COMMANDS) >= 120


# --- a mistake costs nothing but itself -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "call"),
    [
        (fastcl.FeatureQueue(4, 8), lambda queue: queue.enqueue(W)),
        (fastcl.FeatureQueue(4, 8), lambda queue: queue.enqueue(Z[0])),
        (fastcl.FeatureQueue(4, 8), lambda queue: queue.enqueue(Z.long())),
        (fastcl.FeatureQueue(4, 8), lambda queue: queue.enqueue(Z.to("meta"))),
        (fastcl.FeatureQueue(4, 8), lambda queue: queue.enqueue(None)),
        (fastcl.MoCoLoss(4, 8), lambda loss: loss(Z, X)),
        (fastcl.MoCoLoss(4, 8), lambda loss: loss(W, W)),
        (fastcl.MoCoLoss(4, 8), lambda loss: loss(Z, Z, Z)),
        (fastcl.MoCoLoss(4, 8), lambda loss: loss(Z, Z, weights=ON[:5])),
        (fastcl.MoCoLoss(4, 8, learn_temperature=True), lambda loss: loss(Z, None)),
        (fastcl.CosFaceLoss(3, 4), lambda loss: loss(W, LABELS)),
    ],
)
def test_what_a_loss_keeps_survives_a_mistake(module: nn.Module, call: Callable[[nn.Module], Any]) -> None:
    before = {name: t.clone() for name, t in module.state_dict().items()}
    with pytest.raises((TypeError, ValueError)) as caught:
        call(module)
    assert SHAPE.fullmatch(str(caught.value)), caught.value
    assert all(torch.equal(t, before[name]) for name, t in module.state_dict().items())
    assert all(parameter.grad is None for parameter in module.parameters())


def test_a_loss_that_fails_after_its_encoder_leaves_no_gradients() -> None:
    encoder = nn.Linear(4, 3)
    with pytest.raises(ValueError, match="got 7 rows"):

        def loss(*embeddings: torch.Tensor) -> torch.Tensor:
            raise ValueError("got 7 rows")

        fastcl.cached_loss(encoder, [Z, Z], loss, chunk_size=2)
    assert encoder.weight.grad is None
    fastcl.cached_loss(encoder, [Z, Z], fastcl.NTXentLoss(), chunk_size=2).backward()
    assert encoder.weight.grad is not None


# --- no message without its parts -----------------------------------------------------------------------------------

ROOT = Path(fastcl.__file__).parent
# Messages of another shape, and why.
OTHERS = {
    "fastcl backend {} cannot run pair_{} on {} {} on {}: {}. Use ": "the backend's reason says what it needs and got",
    "rank {} cannot go on, and so no rank does: {}": "quotes that rank's sentence",
    "a formula on this rank's rows has no neighbours among all": "no public function reaches it",
    "the embedded digits ({} bytes) do not match their checksum. ": "what is expected is a whole file",
    "train/ and val/ in {} have different classes. ": "what is expected is the contrary",
    "{} is not in {} ({}). Name its folder": "what is expected is the data set",
    "its kernels need a CUDA device": "caught: why a library is not compared with",
    "torch {} does not have it": "the same",
    "No module named 'solo'": "the same",
    "{} The digits (--data digits) do without.": "goes on where the message of a missing package ends",
}
# The trainer also passes on what the machine says: what cannot be done (the reason), and how to mend it. Its users see
# its own errors alone; others are quoted in them.
MACHINE = re.compile(r".+(?: cannot be \w+|, which .+) \(.+\)(?:; .+)?\. \S.+", re.DOTALL)
TRAINER = re.compile(r".+; expected .+\. \S.+", re.DOTALL)
ERRORS_OF_THE_TRAINER = {
    name for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, TrainError)
}


def texts(node: ast.expr, names: dict[str, list[ast.expr]]) -> list[str]:
    """What an expression may say; ``{}`` stands for what is known at run time alone."""
    if isinstance(node, ast.Constant):
        return [str(node.value)]
    if isinstance(node, ast.IfExp):
        return [*texts(node.body, names), *texts(node.orelse, names)]
    if isinstance(node, ast.Name):
        return [text for value in names.get(node.id, []) for text in texts(value, {})] or ["{}"]
    if isinstance(node, ast.JoinedStr):
        parts = [texts(part.value if isinstance(part, ast.FormattedValue) else part, names) for part in node.values]
        return ["".join(part[min(i, len(part) - 1)] for part in parts) for i in range(max(map(len, parts)))]
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "sentence":
        got, expected, mend = (texts(argument, names) for argument in node.args)
        return [f"got {got[0]}; expected {expected[0]}. {way}" for way in mend]
    return ["{}"]


def made(path: Path) -> Iterator[tuple[int, str]]:
    """Lines and messages of the errors that a file makes; bare and abstract ones have none."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for scope in [tree, *(node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))]:
        inner = [node for part in ast.iter_child_nodes(scope) for node in walk_of_one_scope(part)]
        names: dict[str, list[ast.expr]] = {}
        for node in [*tree.body, *inner]:
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                names.setdefault(node.targets[0].id, []).append(node.value)
        for node in inner:
            if isinstance(node, ast.Call) and node.args and is_error(node.func, "trainer" in path.parts):
                yield from ((node.lineno, text) for text in texts(node.args[0], names))


def is_error(made: ast.expr, in_the_trainer: bool) -> bool:
    name = ast.unparse(made).rpartition(".")[2]
    return name in ERRORS_OF_THE_TRAINER or (name.endswith("Error") and not in_the_trainer)


def walk_of_one_scope(node: ast.AST) -> Iterator[ast.AST]:
    if not isinstance(node, ast.FunctionDef):
        yield node
        for child in ast.iter_child_nodes(node):
            yield from walk_of_one_scope(child)


def test_every_message_has_its_three_parts() -> None:
    seen, wrong, used = 0, [], set()
    for path in sorted(ROOT.rglob("*.py")):
        of_the_trainer = "trainer" in path.relative_to(ROOT).parts
        for line, text in made(path):
            seen += 1
            exception = [start for start in OTHERS if text.startswith(start)]
            used |= {*exception}
            said = bool(SHAPE.fullmatch(text)) or (text.endswith(". {}") and "; expected " in text)
            if of_the_trainer:
                said = said or bool(TRAINER.fullmatch(text)) or bool(MACHINE.fullmatch(text))
            if not said and not exception:
                wrong.append(f"{path.relative_to(ROOT)}:{line}: {text}")
    assert not wrong, "\n".join(wrong)
    assert seen > 150
    assert used == OTHERS.keys(), f"no longer raised: {OTHERS.keys() - used}"
