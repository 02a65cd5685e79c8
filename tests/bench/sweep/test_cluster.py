"""Sweeps whose runs are jobs, through submitit's local executor and stand-in commands."""

import json
import shutil

import pytest

from bench.sweep import cluster
from bench.sweep.cluster import shape
from bench.sweep.plan import plan
from tests.bench.sweep.test_sweep import start  # noqa: F401 - a fixture

pytest.importorskip("submitit", reason="needs the extra cluster")


def test_runs_are_jobs_with_the_same_records_and_resume(start):  # noqa: F811
    status, records, ran = start(["a", "fail"], "--launcher", "local")
    assert status == 1 and sorted(ran) == ["--what=a", "--what=fail"]
    by_name = {one["run_name"]: one for one in records}
    assert by_name["a"]["kind"] == "run" and by_name["a"]["val_ppl"] == 9.0 and by_name["a"]["wall_s"] > 0
    assert by_name["fail"]["kind"] == "failure" and "it went wrong" in by_name["fail"]["error"]
    assert by_name["a"]["command"] == "python main.py fit --config configs/bench/base.yaml --what=a"
    status, records, ran = start(["a"], "--launcher", "local")
    assert status == 0 and len(ran) == 2 and len(records) == 2  # done before


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of the job that is left running
def test_jobs_that_go_on_are_found_again(start, tmp_path):  # noqa: F811
    run = plan("configs/bench/base.yaml", {"what": ["later"]})[0]
    work = tmp_path / "results.runs"
    jobs = cluster.run_jobs([run], work, 100, "local", {}, 8)
    command = ["python", "-c", "import time; time.sleep(1); print('through')"]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(cluster.executing, "command_of", lambda *a, **k: command)
        patched.setattr(cluster, "_POLL_S", 0.05)
        patched.setattr(cluster.time, "sleep", _stop)
        with pytest.raises(KeyboardInterrupt):
            next(jobs)
    noted = json.loads((work / "jobs.json").read_text())
    assert list(noted) == [run.key]
    ((found, ended, folder),) = cluster.run_jobs([run], work, 100, "local", {}, 8)  # submits nothing
    assert found == run and ended.exit_status == 0 and ended.last_lines == "through" and folder == work / run.key
    assert json.loads((work / "jobs.json").read_text()) == {}


@pytest.mark.parametrize(
    ("cluster_", "said"),
    [
        ("{cpus_per_task: many}", "cluster.cpus_per_task='many': "),
        ("{slurm_partitions: gpu}", "cluster.slurm_partitions='gpu': Unknown argument 'partitions'"),
        ("{gpus: 8}", "cluster.gpus=8: "),
        ("{nodes: 2}", "cluster.nodes: the sweep says this of each run itself"),
    ],
)
def test_parameters_that_submitit_refuses_are_named_before_a_run_is_submitted(
    start,  # noqa: F811
    tmp_path,
    capsys,
    cluster_,
    said,
):
    status, records, ran = start(["a"], "--launcher", "local", "--cluster", cluster_)
    assert status == 1 and not records and not ran and not (tmp_path / "results.runs").exists()
    assert said in capsys.readouterr().err
    assert start(["a"], "--launcher", "local", "--cluster", cluster_, "--dry_run")[0] == 0


@pytest.mark.skipif(shutil.which("srun") is not None, reason="this is a cluster")
def test_a_cluster_that_is_not_there_is_refused(start, capsys):  # noqa: F811
    status, _, ran = start(["a"], "--launcher", "slurm", arguments={"world_size": 2})
    assert status == 1 and not ran and "launcher=slurm: " in capsys.readouterr().err


def _stop(seconds):
    raise KeyboardInterrupt


def test_ranks_on_nodes():
    axes = {"ranks": {"few": {"world_size": 4}, "many": {"world_size": 16}, "odd": {"world_size": 12}, "any": {}}}
    few, many, odd, any_ = plan("configs/bench/base.yaml", axes)
    assert shape(few, "slurm", 8) == (1, 4) and shape(many, "slurm", 8) == (2, 8) and shape(many, "local", 8) == (1, 1)
    assert many.placed(False, 8) == ["--trainer.num_nodes=2", "--trainer.devices=8"]
    assert many.placed(False) == ["--trainer.num_nodes=1", "--trainer.devices=16"]
    with pytest.raises(ValueError, match="odd: world_size 12 does not fill nodes of 8"):
        cluster.check([few, odd], "slurm", 8)
    with pytest.raises(ValueError, match="give world_size"):
        cluster.check([any_], "slurm", 8)


def test_only_the_first_task_writes_to_the_run_s_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_PROCID", "1")
    assert cluster.work_off(["true"], tmp_path / "key", 60).exit_status == 0
    assert not (tmp_path / "key").exists() and (tmp_path / "key.rank1/output.log").is_file()
