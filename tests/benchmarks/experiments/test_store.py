"""results/runs.jsonl: what counts of the rows of a run."""

from benchmarks.experiments.store import DONE, FAILED, Store


def test_of_two_rows_the_newest_counts_and_none_is_lost(tmp_path):
    store = Store(tmp_path)
    store.add({"key": "a", "status": FAILED})
    assert not store.is_done("a")
    store.add({"key": "a", "status": DONE})
    assert Store(tmp_path).is_done("a") and len((tmp_path / "runs.jsonl").read_text().splitlines()) == 2
