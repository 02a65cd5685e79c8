import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bench.__main__ import main
from bench.network import link

ROOT = Path(__file__).parents[3]
OBSTACLE = link.check()
needs_link = pytest.mark.skipif(OBSTACLE is not None, reason=str(OBSTACLE))

# Rank 0 sends 4 MB to every other rank; each says what it sees of the launch.
SEND = """
import os, torch, torch.distributed as dist
assert dist.is_torchelastic_launched()
dist.init_process_group("gloo")
rank, size = dist.get_rank(), dist.get_world_size()
block = torch.full((1_000_000,), float(rank))
if rank == 0:
    for other in range(1, size):
        dist.send(block, other)
else:
    dist.recv(block, 0)
    assert block.sum() == 0
assert os.environ["PARE_LINK_RATE"] == "400mbit"
os.write(1, f"rank {rank} of {size} local {os.environ['LOCAL_RANK']} group {os.environ['GROUP_RANK']}\\n".encode())
dist.barrier()
dist.destroy_process_group()
"""


def _namespaces(pid=None):
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True).stdout
    owner = f"pare-{pid or os.getpid()}-"
    return [line for line in listed.splitlines() if line.startswith(owner)]


def _launch(*arguments, **options):
    command = [sys.executable, "-m", "bench", "link", *arguments]
    return subprocess.Popen(
        command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True, **options
    )


def _wait_for(path, process):
    while not path.exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)


@needs_link
def test_three_hosts_exchange_the_bytes_the_interfaces_count(tmp_path):
    report = tmp_path / "report.json"
    done = _launch("--rate", "400mbit", "--hosts", "3", f"--report={report}", "--", sys.executable, "-c", SEND)
    out, err = done.communicate(timeout=120)
    assert done.returncode == 0, err
    lines = out.splitlines()
    assert "rank 0 of 3 local 0 group 0" in lines
    for rank in (1, 2):
        assert f"[host {rank}] rank {rank} of 3 local 0 group {rank}" in lines
    content = json.loads(report.read_text())
    assert content["rate"] == "400mbit" and [h["exit"] for h in content["hosts"]] == [0, 0, 0]
    payload = 4_000_000
    # Headers are 66 bytes a 1448-byte segment (4.6 %); the rest is the rendezvous, and resent segments.
    assert 2 * payload < content["hosts"][0]["tx_bytes"] < 2 * payload * 1.1
    for host in content["hosts"][1:]:
        assert payload < host["rx_bytes"] < payload * 1.1
        assert host["tx_bytes"] < payload * 0.1
    assert f"sent {content['hosts'][0]['tx_bytes']:,} bytes" in err
    assert not _namespaces(done.pid)


@needs_link
def test_ranks_of_one_host_do_not_use_the_link(tmp_path):
    report = tmp_path / "report.json"
    ranks = ("--hosts", "2", "--ranks_per_host", "2")
    done = _launch("--rate", "400mbit", *ranks, f"--report={report}", "--", sys.executable, "-c", SEND)
    out, err = done.communicate(timeout=120)
    assert done.returncode == 0, err
    lines = out.splitlines()
    assert "rank 0 of 4 local 0 group 0" in lines
    for rank in (1, 2, 3):
        assert f"[rank {rank}] rank {rank} of 4 local {rank % 2} group {rank // 2}" in lines
    first, second = json.loads(report.read_text())["hosts"]
    payload = 4_000_000  # to each of two ranks on the other host; the third is rank 0's neighbour
    assert 2 * payload < first["tx_bytes"] < 2 * payload * 1.1 and second["exit"] == 0
    assert 2 * payload < second["rx_bytes"] < 2 * payload * 1.1


@needs_link
def test_both_ends_of_every_cable_are_limited():
    with link.emulated_network(2, "250mbit") as names:
        switch = names[0].replace("-h0", "-switch")
        for namespace, device in ((names[0], "eth0"), (names[1], "eth0"), (switch, "port0"), (switch, "port1")):
            shown = subprocess.run(
                ["tc", "-n", namespace, "qdisc", "show", "dev", device], capture_output=True, text=True, check=True
            ).stdout
            assert "qdisc tbf" in shown and "rate 250Mbit" in shown
        assert len(_namespaces()) == 3
    assert not _namespaces()


@needs_link
def test_a_delay_is_set_or_refused_in_words():
    try:
        with link.emulated_network(2, "1gbit", "2ms") as names:
            shown = subprocess.run(["tc", "-n", names[0], "qdisc", "show"], capture_output=True, text=True).stdout
            assert "delay 2ms" in shown
    except link.LinkUnavailableError as error:
        assert "sch_netem" in str(error)
    assert not _namespaces()


@needs_link
def test_when_one_host_fails_the_others_are_stopped():
    script = "import os, sys, time; sys.exit(3) if os.environ['RANK'] == '1' else time.sleep(300)"
    done = _launch("--", sys.executable, "-c", script)
    _, err = done.communicate(timeout=60)
    assert done.returncode == 3
    assert "host 1 failed with exit status 3; stopping host 0" in err
    assert "host 0 (10.77.0.1): exit 143" in err
    assert not _namespaces(done.pid)


@needs_link
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_passed_on_and_everything_removed(tmp_path, number):
    script = (
        "import os, signal, sys, time; from pathlib import Path; rank = os.environ['RANK']\n"
        "def stop(number, frame): Path('stopped' + rank).write_text(str(number)); sys.exit(0)\n"
        "signal.signal(signal.SIGTERM, stop); signal.signal(signal.SIGINT, stop)\n"
        "os.chdir(sys.argv[1]); Path('ready' + rank).touch(); time.sleep(300)"
    )
    done = _launch("--", sys.executable, "-c", script, str(tmp_path))
    for rank in "01":
        _wait_for(tmp_path / f"ready{rank}", done)
    assert len(_namespaces(done.pid)) == 3
    done.send_signal(number)
    _, err = done.communicate(timeout=60)
    assert done.returncode == 128 + number, err
    for rank in "01":
        assert (tmp_path / f"stopped{rank}").read_text() == str(int(number))
    assert not _namespaces(done.pid)


@needs_link
def test_what_a_killed_launcher_left_is_removed_at_the_next_start(tmp_path):
    script = "import os, sys, time; open(sys.argv[1] + os.environ['RANK'], 'x'); time.sleep(300)"
    done = _launch("--", sys.executable, "-c", script, str(tmp_path / "ready"))
    for rank in "01":
        _wait_for(tmp_path / f"ready{rank}", done)
    left = _namespaces(done.pid)
    assert len(left) == 3
    listed = [subprocess.check_output(["ip", "netns", "pids", name.split()[0]], text=True).split() for name in left]
    pids = [int(pid) for group in listed for pid in group]
    assert len(pids) == 2
    done.kill()
    done.wait()
    done.stdout.close()
    done.stderr.close()
    assert len(_namespaces(done.pid)) == 3
    assert link.check() is None
    assert not _namespaces(done.pid)
    for pid in pids:
        stat = Path(f"/proc/{pid}/stat")
        assert not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z"


def test_says_what_it_needs(monkeypatch, capsys):
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setenv("PATH", "/nonexistent")
    assert main(["link", "--", "true"]) == 1
    error = capsys.readouterr().err
    for word in ("no root", "no ip", "no tc", "iproute2", "NET_ADMIN"):
        assert word in error


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--rate", "fast", "--", "true"], "rate"),
        (["--rate", "0gbit", "--", "true"], "rate"),
        (["--delay", "1", "--", "true"], "delay"),
        (["--hosts", "1", "--", "true"], "hosts"),
        ([], "no command"),
    ],
)
def test_malformed_arguments_are_named(arguments, word, capsys):
    assert main(["link", *arguments]) == 1
    assert word in capsys.readouterr().err


def test_rates():
    assert link.rate_bits_per_s("1gbit") == 1e9
    assert link.rate_bits_per_s("2.5mbit") == 2.5e6


def test_ranks_share_the_cores_unless_told_otherwise(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    cores = len(os.sched_getaffinity(0))
    assert link.rank_environment(1, 2)["OMP_NUM_THREADS"] == str(max(1, cores // 2))
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert "OMP_NUM_THREADS" not in link.rank_environment(1, 2)
