"""Ways to score pairs of blocks, each a pair of functions: what a block is remembered by, and how memories compare.

`summarise` takes the tokens of one side in their order to a `BlockSummary`; `compare` takes a slab of query summaries
and all key summaries to scores [B, H, i, J], larger = kept sooner. What a score makes of an empty key block does not
matter: none is ever kept. A new score is one file here and one entry below.
"""

import functools

from baatt.scores import antidiagonal, cluster_variance, clusters, covariance, exact, runs, simple
from baatt.types import Score

_OF_8_TOKENS = Score(
    functools.partial(antidiagonal.summarise, stride=8), functools.partial(antidiagonal.compare, stride=8)
)
_OF_CLUSTERS = ("representatives", "refinements", "peak")
_EXACT = Score(exact.summarise, exact.compare)

#: `BAAttConfig.score` -> the score.
SCORES: dict[str, Score] = {
    "covariance": Score(covariance.summarise, covariance.compare, ("beta",), logits=True),
    "clusters": Score(clusters.summarise, clusters.compare, _OF_CLUSTERS),
    "clusters-variance": Score(cluster_variance.summarise, cluster_variance.compare, (*_OF_CLUSTERS, "beta")),
    "mean": Score(covariance.summarise, simple.compare_means, logits=True),
    "covariance-16": Score(functools.partial(runs.summarise, run=16), runs.compare, ("beta",)),
    "covariance-8": Score(functools.partial(runs.summarise, run=8), runs.compare, ("beta",)),
    "antidiagonal": _OF_8_TOKENS,
    "antidiagonal-8": _OF_8_TOKENS,
    "antidiagonal-16": Score(
        functools.partial(antidiagonal.summarise, stride=16), functools.partial(antidiagonal.compare, stride=16)
    ),
    "window": Score(simple.summarise_places, simple.compare_window),
    "random": Score(simple.summarise_places, simple.compare_random),
    "oracle": _EXACT,
    "exact": _EXACT,
    "exact-peak": Score(exact.summarise, exact.compare_peak),
}
