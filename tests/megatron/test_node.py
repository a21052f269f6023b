"""Values that exist once on a node: equal, protected, freed, and one copy of them, however processes make up nodes."""

from __future__ import annotations

import pytest

from tests.support import node_cases


@pytest.fixture(scope="module")
def one_node():
    cases = node_cases.equal_values, node_cases.a_write_stays_in_its_process, node_cases.errors, node_cases.memory
    return node_cases.run(4, 1, *cases, node_cases.after_a_kill)


def test_every_process_gets_the_value_of_the_leader(one_node):
    found = one_node["equal_values"]
    assert len(found) == 4 and {makers for makers, _ in found.values()} == {found[0][0]}
    assert all(same for _, same in found.values())


def test_two_nodes_have_a_leader_each():
    found = node_cases.run(4, 2, node_cases.equal_values, node_cases.errors)
    makers = [found["equal_values"][rank][0] for rank in range(4)]
    assert makers[0] == makers[1] != makers[2] == makers[3]
    assert all(same for _, same in found["equal_values"].values())
    assert [found["errors"][rank][0] for rank in (2, 3)] == [
        "ZeroDivisionError: division by zero", "PeerError: rank 2: division by zero",
    ]  # fmt: skip


def test_a_process_that_writes_changes_its_own_pages_alone(one_node):
    assert one_node["a_write_stays_in_its_process"] == {rank: rank + 1.0 for rank in range(4)}


def test_an_error_of_the_leader_is_raised_in_every_process(one_node):
    by_zero, unpicklable, memory, well = one_node["errors"][0]
    assert by_zero == "ZeroDivisionError: division by zero" and "pickle" in unpicklable and well == "well"
    assert memory.startswith(f"MemoryError: the node has no memory for {4 << 20} bytes to share: [Errno 27]")
    for rank in (1, 2, 3):
        said = [f"PeerError: rank 0: {error.split(': ', 1)[1]}" for error in (by_zero, unpicklable, memory)]
        assert one_node["errors"][rank] == [*said, "well"]


def test_a_column_is_one_copy_on_the_node_and_is_freed(one_node):
    during, after, files = zip(*one_node["memory"].values(), strict=True)
    assert 4.0 <= sum(during) < 1.1 * 4.0, during  # bytes a token of a float32 column, over four processes
    assert sum(after) < 0.1 * 4.0, after
    assert files == (0, 0, 0, 0)


def test_a_killed_leader_leaves_its_values_to_the_others(one_node):
    assert one_node["after_a_kill"] == {rank: float(node_cases.TOKENS) for rank in (1, 2, 3)}
