"""A row at the larger scales: one run on the cluster, or the same global batch on GPUs of this machine."""

import pytest
from resolved_flags import recipe_flags, resolved

from benchmarks import tables
from benchmarks.experiments import cluster
from benchmarks.experiments.table import arguments_of
from open_clip_train_fastclip.errors import UserError


def test_a_run_of_two_tables_has_one_name_on_the_cluster():
    two_nodes = next(row for row in tables.load("scaling").rows if row.name == "v3-x2")
    published_setting = next(row for row in tables.load("temperature").rows if row.name == "v3")
    names = {cluster.Job(row, "medium", 0).name for row in (two_nodes, published_setting)}
    assert len(names) == 1


@pytest.mark.parametrize("scale", cluster.RECIPES)
@pytest.mark.parametrize("loss", ["clip", "sogclr", "fastclip-v3"])
def test_recipes_are_read_as_the_batch_script_reads_them(scale, loss):
    flags = cluster.recipe_flags(scale, loss)
    words = [word.replace("$DATA", "/data") for word in arguments_of(flags)]
    assert [*words, "--loss", loss] == recipe_flags(cluster.RECIPES[scale], loss)


def test_runs_on_gpus_of_this_machine_have_the_published_global_batch(monkeypatch):
    monkeypatch.setenv("DATA", "/data")
    job = cluster.Job(tables.load("memory").rows[1], "medium", 0)
    command = job.local_run(4).command
    args = resolved(*command[command.index("--") + 1 :])
    assert (args.batch_size, args.model, args.freeze_temperature, args.seed) == (256, "RN50", True, 2024)
    assert args.train_data == "/data/cc3m_train/{00000..00331}.tar" and args.name == job.name
    with pytest.raises(UserError, match="1024 cannot be divided among 3 GPUs"):
        job.local_run(3)
