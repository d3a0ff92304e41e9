"""Numbers that the paper reports, in percent: shown beside what is measured here.

Table 8 by the weight of the compensation, its RULER-4K column and beside it VideoMME and RealWorldQA, and the sorting
ablation, by the sorted side and the sparsity. The model, the sparsity of Table 8 and the segments are not stated.
"""

BETA = {0.0: 88.42, 0.1: 91.11, 0.5: 90.06, 1.0: 86.12, 2.0: 80.10}
PIXELS = {0.0: (55.82, 64.62), 0.1: (56.19, 64.32), 0.5: (56.56, 64.84), 1.0: (56.51, 64.84), 2.0: (51.42, 62.83)}
SORT = {
    "none": {0.5: 81.08, 0.7: 52.91, 0.9: 22.34},
    "q": {0.5: 82.64, 0.7: 55.66, 0.9: 24.07},
    "k": {0.5: 87.25, 0.7: 60.56, 0.9: 27.13},
    "qk": {0.5: 88.27, 0.7: 61.66, 0.9: 26.98},
}
