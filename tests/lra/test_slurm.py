"""A SLURM cluster of this one machine: an array of four cells, of which one is told to save and one is killed.

Needs slurm-wlm and munge (Debian's packages) and root, which all of its daemons run as.
"""

import json
import os
import shutil
import socket
import subprocess
import time

import pytest
import yaml

from lra.__main__ import main
from lra.cell import run_cell
from lra.train import LAST

DAEMONS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scontrol")
PATHS = os.environ.get("PATH", "") + os.pathsep + "/usr/sbin"
pytestmark = [
    pytest.mark.slurm,
    pytest.mark.slow,
    pytest.mark.skipif(not all(shutil.which(d, path=PATHS) for d in DAEMONS), reason="needs slurm-wlm and munge"),
    pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="slurmd starts jobs as root only"),
]

# No cgroups and no systemd: containers have neither. A requeued job waits for its credential to expire.
CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ctld_port}
SlurmdPort={d_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={root}/munge.socket,cred_expire=5
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/slurmd.log
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=3
MailProg=/bin/true
NodeName={host} NodeAddr=127.0.0.1 CPUs=4 State=UNKNOWN
PartitionName=test Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def ask(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def version() -> tuple[int, ...]:
    return tuple(int(part) for part in ask("slurmctld", "-V").split()[-1].split(".")[:2])


def wait_for(what, seconds: float, say=lambda: "") -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, say()
        time.sleep(0.2)


@pytest.fixture
def cluster(tmp_path_factory, monkeypatch):
    """Starts munged, slurmctld and slurmd in a folder of their own and stops them at the end."""
    root = tmp_path_factory.mktemp("slurm")
    monkeypatch.setenv("PATH", PATHS)
    for folder in ("state", "spool"):
        (root / folder).mkdir()
    key = root / "munge.key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o400)
    conf = CONF.format(root=root, host=socket.gethostname().split(".")[0], ctld_port=free_port(), d_port=free_port())
    (root / "slurm.conf").write_text(conf)
    # Before 23.02 there is no such plugin, and the one of version 1 does nothing until a job is confined.
    disabled = "disabled" if version() >= (23, 2) else "cgroup/v1"
    (root / "cgroup.conf").write_text(f"CgroupPlugin={disabled}\n")
    monkeypatch.setenv("SLURM_CONF", str(root / "slurm.conf"))
    munge = [f"--{name}={root / ('munge.' + end)}" for name, end in (("socket", "socket"), ("key-file", "key"))]
    munge += [f"--{name}-file={root / ('munge.' + name)}" for name in ("pid", "log", "seed")]
    daemons: list[subprocess.Popen] = []
    logs = open(root / "daemons.log", "w")
    try:
        for command in (["munged", "--foreground", "--force", *munge], ["slurmctld", "-D"], ["slurmd", "-D"]):
            daemons.append(subprocess.Popen(command, stdout=logs, stderr=logs))
            if command[0] == "munged":
                wait_for((root / "munge.socket").exists, 20)

        def said() -> str:
            return "\n".join(f"{path}:\n{path.read_text()[-3000:]}" for path in root.glob("*.log"))

        def idle() -> bool:
            shown = subprocess.run(["sinfo", "-h", "-o", "%T"], capture_output=True, text=True)
            return "idle" in shown.stdout

        wait_for(idle, 60, said)
        yield root
    finally:
        subprocess.run(["scancel", "--user=root", "--signal=KILL", "--full"], capture_output=True)
        for daemon in reversed(daemons):
            daemon.terminate()
            try:
                daemon.wait(20)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        logs.close()


def test_an_array_of_four_cells_of_which_two_are_cut_short(cluster, tiny, cache_dir, tmp_path, capsys):
    pytest.importorskip("submitit")
    cells = [tiny(seed=seed, budget={"steps": 900, "evaluations": 3}) for seed in range(4)]
    alone = run_cell(cells[0], tmp_path / "alone", cache_dir=cache_dir, accelerator="cpu")  # and makes the data
    config = cells[0].to_dict()
    (tmp_path / "cell.yaml").write_text(yaml.safe_dump({k: config[k] for k in ("task", "model", "optim", "budget")}))
    runs = tmp_path / "runs"
    argv = ["sweep", str(tmp_path / "cell.yaml"), "--mixers", "lru", "--regimes", "scratch", "--seeds", "0,1,2,3"]
    argv += ["--launcher", "slurm", "--slurm.gpus", "0", "--slurm.cpus", "1", "--slurm.partition", "test"]
    argv += ["--accelerator", "cpu", "--runs-dir", str(runs), "--cache-dir", cache_dir]
    capsys.readouterr()
    assert main(argv) == 0
    assert "4 submitted as 1" in capsys.readouterr().out
    assert main(argv) == 0
    assert "4 still queued, 0 submitted" in capsys.readouterr().out

    def logs() -> str:
        files = [*runs.rglob("*_log.*"), *cluster.glob("*.log")]
        return "\n".join(f"{path}:\n{path.read_text()[-2000:]}" for path in files)

    jobs = json.loads((runs / "slurm" / "submitted.json").read_text())
    for cell, order in ((cells[0], ["scancel", "--signal=USR2"]), (cells[1], ["scontrol", "requeue"])):
        wait_for((runs / cell.key / LAST).exists, 120, logs)
        ask(*order, jobs[cell.key])
    wait_for(lambda: all((runs / cell.key / "result.json").exists() for cell in cells), 300, logs)
    wait_for(lambda: not ask("squeue", "-h"), 60, logs)
    for cell in cells[:2]:
        shown = ask("scontrol", "show", "job", jobs[cell.key])
        assert "Restarts=1" in shown and "JobState=COMPLETED" in shown, shown
        [log] = (runs / "slurm").glob(f"{jobs[cell.key]}_0_log.out")
        assert f"{cell.key}: resuming" in log.read_text()
    result = json.loads((runs / cells[0].key / "result.json").read_text())
    assert result["curve"] == alone["curve"], "bit for bit, though it was preempted"
    assert main(argv) == 0
    assert "4 cells, 4 of them done\n0 submitted" in capsys.readouterr().out
