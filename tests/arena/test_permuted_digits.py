"""The claim of benchmarks/arena/permuted_digits.py, on three tasks and one seed."""

import pytest

pytest.importorskip("sklearn", reason="scikit-learn is not installed")


@pytest.fixture(scope="module")
def results():
    from benchmarks.arena import permuted_digits as digits

    tasks, methods = digits.make_tasks(seed=0, count=3, epochs=4), ("adamw", "projected-gradient", "gpm", "orthogonal")
    return {method: digits.run(method, tasks, 0, digits.CHOSEN[method]) for method in methods}


def test_it_forgets_less_than_a_tenth_of_what_adamw_forgets(results):
    assert results["adamw"]["bwt"] < -0.05
    assert results["orthogonal"]["bwt"] > results["adamw"]["bwt"] / 10


def test_it_learns_within_two_points_of_adamw(results):
    assert results["orthogonal"]["learning_accuracy"] > results["adamw"]["learning_accuracy"] - 0.02


def test_only_the_projected_update_stays_out_of_what_is_used(results):
    assert max(results["orthogonal"]["leak"].values()) < 1e-6
    assert max(results["projected-gradient"]["leak"].values()) > 0.01


def test_the_gpm_that_it_is_compared_with_is_no_straw_man(results):
    assert results["gpm"]["bwt"] > results["adamw"]["bwt"] / 10
    assert results["gpm"]["learning_accuracy"] > results["adamw"]["learning_accuracy"] - 0.02
