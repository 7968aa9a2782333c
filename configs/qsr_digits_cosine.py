"""The QSR comparison on digits: when to meet under cosine decay, local AdamW; 8 workers.

Source: Gu, Lyu, Arora, Zhang & Huang 2024, "A Quadratic Synchronization Rule for Distributed Deep
Learning" (ICLR, arXiv 2310.14423). The argument picks the rule: dense, constant, linear, quadratic
(QSR; the default), cubic or post_local; with -smoke behind it, the small size. Coefficients are in
`qsr_rules.py`. All six with five seeds:

    F=configs/qsr_digits_cosine.py; python -m experiments.compare --seeds=5 \
      --configs=$F:dense,$F:constant,$F:linear,$F:quadratic,$F:cubic,$F:post_local
"""

from configs import common, qsr_rules


def get_config(argument=None):
    rule, size = qsr_rules.split(argument)
    return qsr_rules.apply(common.digits(size), rule)
