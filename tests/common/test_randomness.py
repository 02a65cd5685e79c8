from common.randomness import run_seed, step_seed


def test_run_seed_is_what_seed_everything_left(monkeypatch):
    monkeypatch.setenv("PL_GLOBAL_SEED", "17")
    assert run_seed() == 17
    monkeypatch.delenv("PL_GLOBAL_SEED")
    assert run_seed() == 0


def test_step_seeds_are_fixed_numbers():
    # Written down: a change would make every checkpoint continue differently.
    assert step_seed(7, 0, 0) == 8460147692890830636
    assert step_seed(7, 1, 0) == 3317731564112288844


def test_step_seeds_differ_and_fit_63_bits():
    seeds = {step_seed(seed, step, rank) for seed in range(3) for step in range(20) for rank in range(4)}
    assert len(seeds) == 3 * 20 * 4
    assert all(0 <= seed < 2**63 for seed in seeds)
