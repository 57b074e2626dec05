"""The losses, as formulas over embeddings of length 1 that never build the similarity matrix.

Every softmax loss here compares the positive logit p_i with n_i, the log-sum-exp of the negatives *alone*::

    L_i = -log sigmoid(p_i - n_i) = -log( e^{p_i} / (e^{p_i} + sum_{j negative} e^{s_ij}) )

That is cross-entropy, in the form that keeps its digits when a pair is easy: with the positive inside the sum,
``lse - p`` subtracts two nearly equal numbers. A row with no negatives has n_i = -inf, loss 0 and gradient 0.

Arguments that the functions share:

* ``temperature`` (or ``scale``, its inverse, and ``bias``): a number, or a 0-d tensor, which receives a gradient.
* ``reduction``: ``"mean"`` (over the rows that count; 0 where there are none), ``"sum"``, or ``"none"``: one per row.
* ``weights``: one number per row of the result of ``"none"``, by which it is multiplied; ``"mean"`` then divides by the
  sum of the weights of the rows that count.
* ``normalize``: make every row length 1 first, as :func:`fastcl.pairwise.l2_normalize` does.

All return fp32 (fp64 for fp64 rows), and raise ``TypeError`` or ``ValueError`` for tensors that do not fit. The losses
are defined for rows of length 1; the modules in ``fastcl`` normalize by default, these functions do not.
Two views are stacked as ``[view0; view1]``: row i and row i + B are two views of one image.
``fastcl.reference`` has the same functions, with the same arguments, on the full matrix.
"""

from .labels import cosface, multi_similarity, sincere, supcon, triplet_all, triplet_hard, triplet_semi_hard
from .pairs import byol, negative_cosine, siamese, squared_cosine, triplet
from .queries import clip, gist, in_batch_softmax, info_nce, moco_v3, n_pair, sampled_info_nce, siglip
from .views import all_pairs_nt_xent, dcl, dclw, debiased_nt_xent, hard_nt_xent, nt_xent

__all__ = [
    "all_pairs_nt_xent",
    "byol",
    "clip",
    "cosface",
    "dcl",
    "dclw",
    "debiased_nt_xent",
    "gist",
    "hard_nt_xent",
    "in_batch_softmax",
    "info_nce",
    "moco_v3",
    "multi_similarity",
    "n_pair",
    "negative_cosine",
    "nt_xent",
    "sampled_info_nce",
    "siamese",
    "siglip",
    "sincere",
    "squared_cosine",
    "supcon",
    "triplet",
    "triplet_all",
    "triplet_hard",
    "triplet_semi_hard",
]
