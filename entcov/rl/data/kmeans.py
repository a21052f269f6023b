"""K-means on the CPU: Lloyd's algorithm from k-means++ seeds, the same for the same numbers and seed."""

import numpy as np

_MOST_ROUNDS = 300


def kmeans(points: np.ndarray, k: int, *, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(centres [k, D] float64, cluster of each point [N] int64); no cluster is empty.

    Lloyd's rounds go on until no point changes its cluster, at most 300. A cluster that has lost its points gets the
    point that is farthest from its own centre.

    Args:
        points: [N, D], any floating dtype; computed in float64.
        seed: of the choice of the first centres (Arthur and Vassilvitskii, k-means++, 2007).

    Raises:
        ValueError: points that are not finite, or fewer than k different ones.
    """
    points = np.asarray(points, dtype=np.float64)
    if not np.isfinite(points).all():
        raise ValueError("points: must be finite")
    if k > len(points) or k > len(np.unique(points, axis=0)):
        raise ValueError(f"k: must be at most the number of different points, got {k} for {len(points)} points")
    points = points - points.mean(0)  # distances are the same, and less is lost in their differences
    centres = _first_centres(points, k, np.random.default_rng(seed))
    cluster = np.full(len(points), -1)
    for _ in range(_MOST_ROUNDS):
        distance = squared_distances(points, centres)
        before, cluster = cluster, distance.argmin(1)
        own = distance[np.arange(len(points)), cluster]
        for empty in np.setdiff1d(np.arange(k), cluster):
            alone = np.bincount(cluster, minlength=k)[cluster] == 1
            far = np.where(alone, -1.0, own).argmax()
            cluster[far], own[far] = empty, -1.0
        if (before == cluster).all():
            break
        sums = np.zeros_like(centres)
        np.add.at(sums, cluster, points)
        centres = sums / np.bincount(cluster, minlength=k)[:, None]
    return centres, cluster


def nearest_members(points: np.ndarray, k: int, *, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(the member of each of k clusters that is nearest to its centre, ascending; the sizes of these clusters); [k]."""
    points = np.asarray(points, dtype=np.float64)
    centres, cluster = kmeans(points, k, seed=seed)
    distance = squared_distances(points - points.mean(0), centres)[np.arange(len(points)), cluster]
    order = np.lexsort((np.arange(len(points)), distance, cluster))
    first = order[np.unique(cluster[order], return_index=True)[1]]
    by_place = np.argsort(first)
    return first[by_place], np.bincount(cluster, minlength=k)[by_place]


def squared_distances(points: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """[N, k], at least 0."""
    products = points @ centres.T
    return np.maximum((points**2).sum(1)[:, None] - 2 * products + (centres**2).sum(1), 0.0)


def _first_centres(points: np.ndarray, k: int, rng: np.random.Generator) -> np.ndarray:
    """k-means++: each next centre is a point, drawn in proportion to its squared distance from those chosen."""
    chosen = [int(rng.integers(len(points)))]
    distance = squared_distances(points, points[chosen])[:, 0]
    while len(chosen) < k:
        chosen.append(int(rng.choice(len(points), p=distance / distance.sum())))
        distance = np.minimum(distance, squared_distances(points, points[chosen[-1:]])[:, 0])
    return points[chosen]
