"""The assignment problem: which column goes with which row of a square matrix, so that the sum is largest.

Most rows of two copies that belong together are each other's best match, so a greedy start settles nearly all of them, and
only the rest is rearranged, one row at a time, along the shortest augmenting path (Jonker and Volgenant 1987, doi
10.1007/BF02278710). Written in numpy, so that an audit does not need scipy, which is larger than everything else that a
server installs beside torch; the tests compare both. Not covered: rectangular matrices.
"""

import numpy as np


def assign(score: np.ndarray) -> np.ndarray:
    """The column for each row that maximizes the sum of the chosen entries.

    Args:
        score: shape (n, n), float64, finite.

    Returns:
        A permutation, shape (n,), int64.
    """
    greedy = np.asarray(score.argmax(axis=1))
    if len(np.unique(greedy)) == len(greedy):
        return greedy  # the best entry of every row is an upper bound
    cost = -score
    of_column = cost.min(axis=0)  # prices: cost - of_row - of_column is never negative, and zero for what is assigned
    reduced = cost - of_column
    columns, of_row = np.asarray(reduced.argmin(axis=1)), reduced.min(axis=1)
    rows = np.full(len(cost), -1)
    for row, column in enumerate(columns.tolist()):
        if rows[column] < 0:
            rows[column] = row
        else:
            columns[row] = -1
    for unassigned in np.flatnonzero(columns < 0):
        _augment(int(unassigned), cost, rows, columns, of_row, of_column)
    return columns


def _augment(
    start: int, cost: np.ndarray, rows: np.ndarray, columns: np.ndarray, of_row: np.ndarray, of_column: np.ndarray
) -> None:
    """Assigns one more row along the shortest path (Dijkstra) to a free column; changes all arrays but `cost`."""
    distances, reached_from = np.full(len(cost), np.inf), np.full(len(cost), -1)
    unvisited = np.arange(len(cost))
    visited: list[int] = []
    row, distance = start, 0.0
    while True:
        candidate = distance + cost[row, unvisited] - of_row[row] - of_column[unvisited]
        nearer = candidate < distances[unvisited]
        distances[unvisited[nearer]], reached_from[unvisited[nearer]] = candidate[nearer], row
        nearest = int(distances[unvisited].argmin())
        column = int(unvisited[nearest])
        distance = distances[column]
        if rows[column] < 0:
            break
        visited.append(column)
        unvisited = np.delete(unvisited, nearest)
        row = int(rows[column])
    of_row[start] += distance
    of_row[rows[visited]] += distance - distances[visited]
    of_column[visited] -= distance - distances[visited]
    while True:
        row = int(reached_from[column])
        rows[column], column, columns[row] = row, int(columns[row]), column
        if row == start:
            return
