"""What every loss means: the definitions on the full matrix, in plain torch, any dtype, twice differentiable.

Names and arguments are those of ``fastcl.functional``. These are the oracle of every test, in fp64, and the way out
where the fused functions refuse (second derivatives, ``torch.func``). They store the matrix: O(N^2) memory.
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
