"""Pairs of workers: static matchings, one of which a round may draw.

With n workers, n even, the n - 1 matchings of a round-robin tournament contain every pair exactly
once, so that a uniform draw pairs any two workers with probability 1 / (n - 1), as a uniform random
perfect matching does. With n odd there are n, and one worker sits out each.
"""


def matchings(workers: int) -> list[tuple[int, ...]]:
    """The partner of every worker (itself: none), for each matching of the tournament."""
    seats = workers + workers % 2
    found = []
    for turn in range(seats - 1):
        partner = list(range(workers))
        for i in range(seats // 2):  # seat 0 stays, the others move around
            a = 0 if i == 0 else (turn + i - 1) % (seats - 1) + 1
            b = (turn + seats - 2 - i) % (seats - 1) + 1
            if max(a, b) < workers:
                partner[a], partner[b] = b, a
        found.append(tuple(partner))
    return found
