"""How long the tour takes is of a whole tour."""

import pytest

from bench.experiments import tour_time


def test_a_tour_that_was_begun_is_not_timed(tmp_path):
    (tmp_path / "tour").mkdir()
    with pytest.raises(ValueError, match=r"tour: a tour was here.*give another --folder"):
        tour_time.run(tmp_path / "records.jsonl", tmp_path)
