"""The field's summaries of R, as pure functions.

R is a (T+1) × T matrix, a list of rows. R[i][j] is the score on domain j (1 … T) after training domain i; row 0 is
the untouched base model. An entry is None where a domain has no such score (no records with choices, say); such a
domain is left out of that metric's means. Where a domain is scored only once it is learned, entries before that are
None but for the base's: there is no fwt, and forgetting is from the best of the scores that are known.

Scores may be of either sense. `acc` and `learning_accuracy` are in the score's own units. The differences (`bwt`,
`forgetting`, `fwt`, `learned`, `intransigence`) are turned so that their sign reads alike for both: positive
forgetting is always "got worse", positive bwt, fwt and learned are always "got better", positive intransigence is
always "learned less than alone".
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

LOWER_IS_BETTER = frozenset({"bits_per_byte"})

FORMULAS = {
    "acc": "mean_j R[T][j]",
    "learning_accuracy": "mean_j R[j][j]",
    "learned": "mean_j R[j][j] - R[0][j]",
    "forgetting": "mean_{j<T} max_{0<=i<T} R[i][j] - R[T][j]",
    "bwt": "mean_{j<T} R[T][j] - R[j][j]",
    "fwt": "mean_{j>1} R[j-1][j] - R[0][j]",
    "gain_lost": "sum_{j<T} (R[j][j] - R[T][j]) / sum_{j<T} (R[j][j] - R[0][j])",
    "intransigence": "mean_j R_single[j] - R[j][j]",
}
"""What each number is. For a score of which lower is better, differences change sign and max is min.

ACC, BWT, FWT: Lopez-Paz & Ranzato 2017 (GEM). Forgetting: Chaudhry et al. 2018, here with the base model among the
earlier scores. Learning accuracy: Riemer et al. 2019. Intransigence: Chaudhry et al. 2018, here against a model that
was trained on domain j alone (method `single`), and the mean of all domains.
"""

Matrix = Sequence[Sequence[Any]]
"""R: rows of floats, None where a domain has no such score."""


def _mean(values: list[Any]) -> float | None:
    return sum(values) / len(values) if values else None


def _check(R: Matrix) -> int:
    domains = len(R) - 1
    if domains < 1 or any(len(row) != domains for row in R):
        raise ValueError(
            f"R must be (T+1) x T: a row for the base and one after each of T domains; got {len(R)} rows "
            f"of lengths {sorted({len(row) for row in R})}"
        )
    return domains


def intransigence(R: Matrix, single: Matrix, *, lower_is_better: bool = False) -> float | None:
    """mean_j R_single[j] − R[j][j]; None where no domain has both scores.

    Args:
        single: R of the bound that trains a model for each domain from the base; its diagonal counts.

    Raises:
        ValueError: of another number of domains.
    """
    domains = _check(R)
    if _check(single) != domains:
        raise ValueError(f"R and R_single must have as many domains; got {domains} and {len(single) - 1}")
    sign = -1.0 if lower_is_better else 1.0
    pairs = [(single[j + 1][j], R[j + 1][j]) for j in range(domains)]
    return _mean([sign * (alone - learned) for alone, learned in pairs if None not in (alone, learned)])


def of_separate_models(summary: dict[str, Any]) -> dict[str, Any]:
    """A summary of R whose rows are models of their own: `acc` is that of each on its domain, and nothing is
    forgotten or passed on (None)."""
    nothing = [None] * len(summary["forgetting_by_domain"])
    return {
        **summary,
        **dict.fromkeys(("forgetting", "bwt", "fwt", "gain_lost")),
        "forgetting_by_domain": nothing,
        "gain_lost_by_domain": nothing,
        "acc": summary["learning_accuracy"],
    }


def summarize(R: Matrix, *, lower_is_better: bool = False, single: Matrix | None = None) -> dict[str, Any]:
    """The numbers of `FORMULAS` (None where none is defined: with one domain nothing can be forgotten), and
    `forgetting_by_domain` and `gain_lost_by_domain`: the terms of domain j, lists of length T that end with None.

    Args:
        single: see `intransigence`; None: it is not known.
    """
    domains = _check(R)
    sign = -1.0 if lower_is_better else 1.0
    last = R[-1]
    scored = [j for j in range(domains) if all(row[j] is not None for row in (R[0], *R[j + 1 :]))]
    earlier = [j for j in scored if j < domains - 1]
    after = {j: R[j + 1][j] for j in scored}
    gained = {j: sign * (after[j] - R[0][j]) for j in scored}
    lost = {j: sign * (after[j] - last[j]) for j in earlier}
    forgotten = {j: max(sign * row[j] for row in R[:-1] if row[j] is not None) - sign * last[j] for j in earlier}
    forward = [None if R[j][j] is None else sign * (R[j][j] - R[0][j]) for j in scored if j > 0]
    gain = sum(gained[j] for j in earlier)
    return {
        "acc": _mean([last[j] for j in scored]),
        "learning_accuracy": _mean([after[j] for j in scored]),
        "learned": _mean([gained[j] for j in scored]),
        "forgetting": _mean([forgotten[j] for j in earlier]),
        "bwt": _mean([-lost[j] for j in earlier]),
        "fwt": None if None in forward else _mean(forward),
        "gain_lost": sum(lost.values()) / gain if gain > 0 else None,
        "intransigence": None if single is None else intransigence(R, single, lower_is_better=lower_is_better),
        "forgetting_by_domain": [forgotten.get(j) for j in range(domains)],
        "gain_lost_by_domain": [lost[j] / gained[j] if j in lost and gained[j] > 0 else None for j in range(domains)],
    }
