"""Lengths of two public traces as quantiles, from which `QuantileRequests` draws prompts of a thousand tokens and more.

Each list has the quantiles at the levels 0, 1/64, ..., 1, in tokens, of the trace's requests whose prompt and output
have at most `most_tokens` together: `numpy.quantile(tokens, linspace(0, 1, 65), method="inverted_cdf")`. Between two
quantiles, the logarithm of a length is linear in the level. `tests/test_workload_lengths.py` computes the lists again
from the traces, and measures how well they fit:

| | requests kept | | mean of the trace | of the fit | largest difference of the distribution functions |
|---|---|---|---|---|---|
| Azure | 99.5 % | prompt | 1133 | 1138 | 0.011 |
| | | output | 212 | 213 | 0.012 |
| Mooncake | 53.7 % | prompt | 3233 | 3235 | 0.004 |
| | | output | 325 | 328 | 0.008 |

Prompt and output are drawn independently: their rank correlation is 0.08 and 0.05 in the traces. The lists must never
change: other lengths get another name.
"""

from typing import NamedTuple

import numpy as np


class Lengths(NamedTuple):
    """Quantiles of the lengths of a trace, all int64 [Q]."""

    prompt_tokens: np.ndarray
    output_tokens: np.ndarray

    @property
    def most_tokens(self) -> int:
        """Tokens of the longest request that can be drawn, prompt and output."""
        return int(self.prompt_tokens[-1] + self.output_tokens[-1])


def _quantiles(numbers: str) -> np.ndarray:
    return np.array(numbers.split(), np.int64)


AZURE_CONVERSATION = Lengths(
    prompt_tokens=_quantiles("""
        2 63 163 181 194 200 206 212 234 317 374 378 383 387 391 394 396 398 400 403 405 408 411 418 427 452 787
        902 961 984 999 1010 1019 1027 1035 1043 1050 1058 1066 1074 1082 1090 1099 1108 1118 1130 1143 1161
        1183 1221 1297 1314 1320 1419 1683 1980 2229 2513 2790 4072 4078 4082 4088 4097 4921
    """),
    output_tokens=_quantiles("""
        7 18 33 40 45 49 53 56 60 64 68 72 75 78 81 83 85 87 89 90 92 94 95 97 99 101 104 107 110 114 118 124
        130 136 142 150 159 163 173 183 198 217 230 373 378 385 390 394 395 396 397 399 403 407 411 414 416 420
        427 429 440 457 504 568 1000
    """),
)
"""A conversation service of Azure in 2023, requests of at most 5,000 tokens (AzurePublicDataset, CC-BY 4.0: Patel et
al., "Splitwise", ISCA 2024)."""

MOONCAKE_CONVERSATION = Lengths(
    prompt_tokens=_quantiles("""
        891 894 895 896 898 899 901 904 907 914 925 939 966 1009 1053 1094 1146 1214 1269 1322 1380 1452 1518
        1586 1674 1769 1850 1941 2073 2196 2334 2479 2650 2778 2973 3131 3312 3513 3687 3856 4007 4150 4283 4398
        4514 4661 4758 4896 5033 5155 5268 5445 5609 5767 5933 6093 6263 6440 6626 6812 6999 7181 7411 7648 8137
    """),
    output_tokens=_quantiles("""
        1 3 6 10 13 18 22 27 31 37 46 59 73 89 102 117 132 146 166 182 196 209 222 234 246 260 273 282 292 304
        314 322 331 341 350 359 366 374 384 392 399 406 414 422 431 440 447 456 464 474 485 496 509 520 535 546
        561 577 598 624 655 688 755 864 2000
    """),
)
"""A chat service with long contexts, requests of at most 8,192 tokens (Mooncake, Apache-2.0: Qin et al., FAST 2025)."""
