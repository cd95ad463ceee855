"""A real Slurm on this machine, all of it in one folder: what the tests of the chain run on.

munged, mariadbd, slurmdbd, slurmctld and a slurmd for each node of a description (`descriptions.py`), each on its own
port or socket; none reads anything below /etc. A cluster without accounting has no mariadbd and no slurmdbd. Needs
root, and Debian's slurm-wlm, slurmdbd, munge and mariadb-server. To look around in one outside the tests:

    python -m tests.slurm_real.cluster /tmp/little uneven     # starts it, prints what to export, ends with Ctrl-C
    SLURM_CONF=/tmp/little/slurm.conf sinfo
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from tests.slurm_real import ordinary
from tests.slurm_real.descriptions import CLUSTERS, GPUS, TWO_NODES, Description

DAEMONS = ("munged", "mariadbd", "mariadb-install-db", "slurmdbd", "slurmctld", "slurmd", "sbatch", "sacct", "sacctmgr")
START_S = 120.0  # a daemon that does not answer after this long has failed
HOSTS = Path("/etc/hosts")
HOSTS_MARK = "# the nodes of livt_scale's test cluster"

SLURMDBD_CONF = """\
DbdHost={host}
DbdAddr=127.0.0.1
DbdPort={dbd_port}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort={sql_port}
StorageUser=slurm
StoragePass=slurm
StorageLoc=slurm_acct
LogFile={folder}/slurmdbd.log
PidFile={folder}/slurmdbd.pid
"""
SQL = """\
CREATE DATABASE slurm_acct;
GRANT ALL ON slurm_acct.* TO 'slurm'@'127.0.0.1' IDENTIFIED BY 'slurm';
"""  # an init file has one statement a line


class ClusterError(Exception):
    """The cluster did not come up: which daemon, and the end of its log."""


def why_not() -> str | None:
    """What keeps a cluster from being started here; None: nothing."""
    if os.geteuid() != 0:
        return "a Slurm of its own needs root (slurmd starts jobs as their users)"
    missing = [name for name in DAEMONS if which(name) is None]
    if missing:
        return f"not installed: {', '.join(missing)} (apt-get install slurm-wlm slurmdbd munge mariadb-server)"
    return None


def which(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


class Cluster:
    """The cluster of `description` below `folder`, whose path is short: a socket's has at most 107 bytes."""

    def __init__(self, folder: Path, description: Description = TWO_NODES) -> None:
        self.folder, self.description = folder, description
        self.conf = folder / "slurm.conf"
        self._daemons: list[tuple[str, subprocess.Popen[bytes]]] = []
        names = ("ctld", "dbd", "sql", *self.nodes)
        self._ports = dict(zip(names, free_ports(len(names)), strict=True))

    @property
    def nodes(self) -> tuple[str, ...]:
        return self.description.nodes

    @property
    def environ(self) -> dict[str, str]:
        """What a program needs in its environment to speak to this cluster and to no other."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SBATCH_", "SALLOC_", "SRUN_"))}
        return kept | {"SLURM_CONF": str(self.conf)}

    def start(self) -> None:
        """All daemons up, all nodes idle, an account for all users. ClusterError where one does not come up."""
        try:
            self._lay_out()
            self._start_munge()
            if self.description.accounting:
                self._start_database()
            self._start_slurm()
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Ends every job and daemon; nothing of the cluster is left running. To be called as often as one likes."""
        try:
            if any(name == "slurmctld" and process.poll() is None for name, process in self._daemons):
                self.cancel_all()
        finally:  # where Slurm does not answer, its processes end all the same
            for _, process in reversed(self._daemons):
                end(process)
            self._daemons.clear()
            for pid in self._strays():
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            forget_hosts(self.folder)

    def cancel_all(self) -> None:
        """Ends all jobs and waits until their processes are gone."""
        for user in ("root", ordinary.NAME):
            self.run("scancel", f"--user={user}", "--full", check=False)
            self.run("scancel", f"--user={user}", "--signal=KILL", "--full", check=False)
        wait_for(lambda: not self.run("squeue", "--noheader").stdout.strip(), "the queue to be empty", seconds=180)

    def settle(self) -> None:
        """No job is left, and all nodes take jobs."""
        self.cancel_all()
        for node in self.nodes:
            self.bring_back(node)

    def run(self, *words: str | Path, check: bool = True, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        """A command of Slurm (or of ours) against this cluster."""
        command = [str(w) for w in words]
        done = subprocess.run(command, env=self.environ, cwd=cwd, capture_output=True, text=True, timeout=120)
        if check and done.returncode != 0:
            raise ClusterError(f"{' '.join(command)}: exit {done.returncode}\n{done.stdout}\n{done.stderr}")
        return done

    def lose(self, node: str) -> None:
        """The controller takes the node for down; its processes run on, as behind a broken cable."""
        self.run("scontrol", "update", f"nodename={node}", "state=down", "reason=lost")

    def kill(self, node: str, *, noticed_s: float) -> None:
        """Nothing runs on the node any more, as after a power cut; after `noticed_s` the controller takes it for down.

        A real controller notices after SlurmdTimeout, which is minutes and cannot be short on a busy machine.
        """
        for name, process in [d for d in self._daemons if d[0] == f"slurmd-{node}"]:
            process.kill()
            process.wait()
            self._daemons.remove((name, process))
        tasks = [pid for pid in self._strays() if f"SLURMD_NODENAME={node}".encode() in environ_of(pid)]
        steps = {parent for pid in tasks if comm_of(parent := parent_of(pid)) == "slurmstepd"}
        for pid in (*steps, *tasks):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(noticed_s)
        self.lose(node)

    def bring_back(self, node: str) -> None:
        """The node takes jobs again. It may have come back by itself: its slurmd is alive and calls the controller."""
        if all(name != f"slurmd-{node}" for name, _ in self._daemons):
            self._start_node(node)
        seen = ("sinfo", "--noheader", "--Node", f"--nodes={node}", "--format=%t")

        def up() -> bool:
            self.run("scontrol", "update", f"nodename={node}", "state=resume", check=False)
            return "down" not in self.run(*seen).stdout

        wait_for(up, f"{node} to come back", seconds=START_S)

    def show(self, job: str) -> dict[str, str]:
        """What `scontrol show job` says of it, by name. Values with spaces keep their first word."""
        told = self.run("scontrol", "--oneliner", "show", "job", job).stdout
        return dict(word.split("=", 1) for word in told.split() if "=" in word)

    def wait(self, job: str, *states: str, seconds: float = 120) -> dict[str, str]:
        """Until the job is in one of `states`; what `show` says then."""

        def arrived() -> dict[str, str] | None:
            seen.update(self.show(job))
            return dict(seen) if seen["JobState"] in states else None

        seen: dict[str, str] = {}
        return wait_for(arrived, lambda: f"job {job} to be {' or '.join(states)}: it is {seen}", seconds=seconds)

    def _lay_out(self) -> None:
        folder, ports, host = self.folder, self._ports, socket.gethostname().split(".")[0]
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o755)  # munged refuses a socket that others cannot reach
        for name in ("state", "sql", *(f"spool-{node}" for node in self.nodes)):
            (folder / name).mkdir(exist_ok=True)
        gpus = [folder / f"gpu{n}" for n in range(GPUS)]
        for gpu in gpus:  # Slurm deals them out and says which are whose: CUDA_VISIBLE_DEVICES. Nobody opens them.
            os.mknod(gpu, stat.S_IFCHR | 0o600, os.makedev(1, 3))
        self.conf.write_text(self.description.slurm_conf(folder, host, ports))
        (folder / "gres.conf").write_text("".join(f"Name=gpu File={gpu}\n" for gpu in gpus))
        named = {"folder": folder, "host": host, "dbd_port": ports["dbd"], "sql_port": ports["sql"]}
        (folder / "slurmdbd.conf").write_text(SLURMDBD_CONF.format(**named))
        (folder / "slurmdbd.conf").chmod(0o600)
        (folder / "munge.key").write_bytes(os.urandom(1024))
        (folder / "munge.key").chmod(0o400)
        remember_hosts(self.folder, self.nodes)

    def _start_munge(self) -> None:
        files = {
            name: f"--{name}-file={self.folder}/munge.{name.removesuffix('-file')}" for name in ("key", "pid", "seed")
        }
        self._spawn("munged", "--foreground", "--force", f"--socket={self.folder}/munge.socket", *files.values())
        self._await("munged", lambda: (self.folder / "munge.socket").exists())

    def _start_database(self) -> None:
        sql = self.folder / "sql"
        own = ("--no-defaults", "--user=root", f"--datadir={sql}")
        install = (which("mariadb-install-db") or "", *own, "--skip-test-db", "--innodb-log-file-size=8M")
        subprocess.run(install, check=True, capture_output=True, timeout=120)
        (self.folder / "init.sql").write_text(SQL)
        self._spawn(
            "mariadbd",
            *own,
            f"--socket={self.folder}/sql.socket",
            f"--pid-file={self.folder}/sql.pid",
            "--bind-address=127.0.0.1",
            "--skip-name-resolve",  # who comes from 127.0.0.1 is called so, not localhost
            f"--port={self._ports['sql']}",
            f"--init-file={self.folder}/init.sql",
            "--innodb-buffer-pool-size=64M",
            "--innodb-log-file-size=8M",
            "--innodb-lock-wait-timeout=900",
            "--innodb-flush-log-at-trx-commit=0",  # a cluster that lives for minutes: nothing to be lost at a power cut
        )
        self._await("mariadbd", lambda: listens(self._ports["sql"]))
        self._spawn("slurmdbd", "-D")
        self._await("slurmdbd", lambda: listens(self._ports["dbd"]))
        self.run("sacctmgr", "--immediate", "add", "cluster", "livt")
        self.run("sacctmgr", "--immediate", "add", "account", "lab", "Cluster=livt")
        self.run("sacctmgr", "--immediate", "add", "qos", "low")
        for user in ("root", ordinary.NAME):
            may = ("Account=lab", "QOS=normal,low", "DefaultQOS=normal")
            self.run("sacctmgr", "--immediate", "add", "user", user, *may)

    def _start_slurm(self) -> None:
        self._spawn("slurmctld", "-D", "-c")
        self._await("slurmctld", lambda: self.run("scontrol", "ping", check=False).returncode == 0)
        for node in self.nodes:
            self._start_node(node)
        first = self.description.partitions[0].name
        idle = ("sinfo", "--noheader", "--Node", f"--partition={first}", "--format=%t")
        self._await("slurmd", lambda: self.run(*idle, check=False).stdout.split() == ["idle"] * len(self.nodes))

    def _start_node(self, node: str) -> None:
        self._spawn("slurmd", "-D", "-N", node, log=f"slurmd-{node}")

    def _spawn(self, name: str, *words: str, log: str = "") -> None:
        with (self.folder / f"{log or name}.out").open("ab") as out:
            command = [which(name) or name, *words]
            process = subprocess.Popen(
                command,
                env=self.environ,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
                preexec_fn=ends_with_us,
            )
        self._daemons.append((log or name, process))

    def _await(self, name: str, answers) -> None:
        def dead() -> bool:
            return any(n.partition("-")[0] == name and p.poll() is not None for n, p in self._daemons)

        try:
            wait_for(lambda: answers() or dead(), f"{name} to answer", seconds=START_S)
        except TimeoutError as error:
            raise ClusterError(f"{error}\n{self.logs(name)}") from error
        if dead():
            raise ClusterError(f"{name} ended\n{self.logs(name)}")

    def logs(self, name: str) -> str:
        """The last lines that a daemon wrote."""
        files = sorted(f for f in self.folder.glob(f"{name}*") if f.suffix in (".out", ".log"))
        return "\n".join(f"{f.name}: " + "\n".join(f.read_text(errors="replace").splitlines()[-15:]) for f in files)

    def _strays(self) -> Iterator[int]:
        """Processes of this cluster's jobs."""
        mine = f"SLURM_CONF={self.conf}".encode()
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit() or int(entry.name) == os.getpid():
                continue
            names = environ_of(int(entry.name))
            if mine in names and any(name.startswith(b"SLURM_JOB_ID=") for name in names):
                yield int(entry.name)


def environ_of(pid: int) -> list[bytes]:
    """NAME=VALUE of a process; empty if it has ended meanwhile."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    return []


def parent_of(pid: int) -> int:
    with suppress(OSError):
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return 0


def comm_of(pid: int) -> str:
    with suppress(OSError):
        return Path(f"/proc/{pid}/comm").read_text().strip()
    return ""


def wait_for(ready, what, *, seconds: float, every_s: float = 0.2):
    """What `ready()` gives, as soon as it is true; TimeoutError after `seconds`. what: text, or what makes it."""
    end_at = time.monotonic() + seconds
    while not (value := ready()):
        if time.monotonic() > end_at:
            raise TimeoutError(f"waited {seconds:.0f} s for {what if isinstance(what, str) else what()}")
        time.sleep(every_s)
    return value


def end(process: subprocess.Popen[bytes]) -> None:
    """SIGTERM, and SIGKILL to one that does not heed it."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(timeout=15)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(timeout=15)


def short_folder() -> Path:
    """A new folder for a cluster. In memory where there is room: a busy disk takes a minute to sync the database."""
    memory = Path("/dev/shm")
    roomy = memory.is_dir() and os.access(memory, os.W_OK) and shutil.disk_usage(memory).free > 512 * 2**20
    return Path(tempfile.mkdtemp(prefix="livt-slurm-", dir=memory if roomy else None))


def ends_with_us() -> None:
    """In a daemon, before it is one: SIGTERM when who started it is gone, even by SIGKILL."""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)


def free_ports(num: int) -> list[int]:
    with_all = [socket.socket() for _ in range(num)]
    try:
        for listener in with_all:
            listener.bind(("127.0.0.1", 0))
        return [int(listener.getsockname()[1]) for listener in with_all]
    finally:
        for listener in with_all:
            listener.close()


def listens(port: int) -> bool:
    with socket.socket() as caller:
        return caller.connect_ex(("127.0.0.1", port)) == 0


def remember_hosts(folder: Path, nodes: tuple[str, ...]) -> None:
    """The nodes' names resolve, as they do on any cluster: tasks meet at the first node's name."""
    _rewrite_hosts(folder, [f"127.0.0.1 {' '.join(nodes)} {HOSTS_MARK} {folder}\n"])


def forget_hosts(folder: Path) -> None:
    """A cluster takes its own line away; another that runs beside it keeps its own."""
    _rewrite_hosts(folder, [])


def _rewrite_hosts(folder: Path, own: list[str]) -> None:
    """Written in place, locked: a container's /etc/hosts is mounted, it cannot be replaced."""
    with HOSTS.open("r+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        lines = file.readlines()
        wanted = [line for line in lines if not line.endswith(f"{HOSTS_MARK} {folder}\n")] + own
        if wanted != lines:
            file.seek(0)
            file.writelines(wanted)
            file.truncate()


def main() -> None:
    """A cluster to look around in, until Ctrl-C or SIGTERM."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else short_folder()
    if reason := why_not():
        sys.exit(reason)
    cluster = Cluster(folder, CLUSTERS[sys.argv[2] if len(sys.argv) > 2 else "two_nodes"])
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        cluster.start()
        print(f"export SLURM_CONF={cluster.conf}", flush=True)
        signal.pause()
    except KeyboardInterrupt:
        cluster.stop()


if __name__ == "__main__":
    main()
